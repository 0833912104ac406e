import json
import tempfile
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from torch import nn

from rlhf_fast import models, pretrained
from rlhf_fast.models import (
    context_length,
    frozen_copy,
    hidden_states,
    load_policy,
    load_scalar_model,
    load_tokenizer,
    position_ids,
    save,
    sequence_scores,
    token_logits,
    token_values,
)

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
WIDE = BODY | {"num_key_value_heads": 2, "intermediate_size": 64, "initializer_range": 0.2}
#: Architecture → its sizes. Granite, CodeGen and Mamba have no class with a scalar head in transformers.
OTHERS = {
    "GPTNeoX": BODY | {"intermediate_size": 64, "initializer_range": 0.2},
    "OPT": BODY | {"ffn_dim": 64, "word_embed_proj_dim": 16, "init_std": 0.2},
    "Qwen2": WIDE,
    "Gemma2": WIDE | {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 2.0},
    "Mixtral": WIDE | {"num_local_experts": 4},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "Granite": WIDE | {"logits_scaling": 3.0},
    "CodeGen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}
NAMES = ["GPT2", "Llama", *OTHERS]
#: Their softmax is in float32 whatever the weights are: zeros added to a float32 sum reorder it.
FLOAT32_SOFTMAX = ("Gemma2", "Bloom", "CodeGen")


def build(name):
    import transformers

    if name in ("GPT2", "Llama"):
        return {"GPT2": tiny_gpt2, "Llama": tiny_llama}[name](TOKENIZER, seed=2)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=V, pad_token_id=0, bos_token_id=2, eos_token_id=1, **OTHERS[name]
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


def padded(ids, left, right, fill):
    wide = nn.functional.pad(ids, (left, right), value=fill)
    return wide, nn.functional.pad(torch.ones_like(ids, dtype=torch.bool), (left, right))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None)
@given(left=st.integers(0, 5), right=st.integers(0, 5), fill=st.integers(0, 9), seed=st.integers(0, 99))
def test_padding_moves_no_number(name, left, right, fill, seed):
    torch.manual_seed(seed)
    ids = torch.randint(3, V, (2, 9))
    wide, mask = padded(ids, left, right, fill)
    policy = load_policy(build(name)).train()
    scalar = load_scalar_model(policy).train()
    for dtype in (torch.float32, torch.float64):
        # transformers 5 cannot: Mixtral has no float64, and Gemma2 and Bloom turn the float64 mask of an all masked
        # row into -inf, the softmax of which is NaN.
        if dtype == torch.float64 and (name == "Mixtral" or (name in ("Gemma2", "Bloom") and left)):
            continue
        tolerance = 1e-5 if dtype == torch.float32 else 1e-6 if name in FLOAT32_SOFTMAX else 1e-10
        policy, scalar = policy.to(dtype), scalar.to(dtype)
        with torch.no_grad():
            plain, full = padded(ids, 0, 0, 0)
            logits, values = token_logits(policy, plain, full), token_values(scalar, plain, full)
            there = slice(left, left + 9)
            assert logits.std() > 0.05
            assert_near(token_logits(policy, wide, mask)[:, there], logits, tolerance)
            assert_near(hidden_states(policy, wide, mask)[:, there], hidden_states(policy, plain, full), tolerance)
            moved = token_values(scalar, wide, mask)
            assert moved.dtype == dtype
            assert_near(moved[:, there], values, tolerance)
            assert (moved[~mask] == 0).all()
            assert_near(sequence_scores(scalar, wide, mask), values[:, -1], tolerance)


def assert_near(actual, expected, tolerance):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_scores_are_those_of_transformers(name, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model = load_policy(build(name))
    ids = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert torch.equal(token_logits(model, ids, mask), expected)
        assert_near(token_logits(model, ids, mask, keep=3), expected[:, -3:], 1e-6)
        assert_near(token_logits(model, ids, mask, keep=3, final=False), expected[:, -3:-1], 1e-6)
        if name == "Gemma2":
            assert expected.abs().max() <= 2  # the softcap
        head = load_scalar_model(model)
        assert type(head).__name__ == f"{name}ForSequenceClassification"
        scores = sequence_scores(head, ids, mask)
        assert scores.std() > 0.01
        save(model, TOKENIZER, tmp_path / "policy")
        save(head, TOKENIZER, tmp_path / "head")
        for folder in ("policy", "head"):
            names = {file.name for file in (tmp_path / folder).iterdir()}
            assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
            assert not [file for file in names if file.endswith((".bin", ".pt"))]
        again, same = load_policy(tmp_path / "policy"), load_scalar_model(str(tmp_path / "head"))
        assert torch.equal(token_logits(again, ids, mask), expected)
        assert_near(sequence_scores(same, ids, mask), scores, 1e-6)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
        assert torch.equal(theirs(ids).logits, expected)
        if type(head).__module__.startswith("transformers."):
            theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "head").eval()
            assert theirs.config.num_labels == 1
            assert_near(theirs(ids, attention_mask=mask.long()).logits[:, 0], scores, 1e-6)


def test_backward_reaches_backbone_and_head():
    for model in (load_scalar_model(build("Llama")), load_scalar_model(build("Granite"))):
        wide, mask = padded(torch.randint(3, V, (2, 5)), 2, 1, 0)
        sequence_scores(model.train(), wide, mask).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert model.score.weight.grad.abs().sum() > 0


def test_positions_count_valid_tokens():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 2], [0, 0, 0, 0]]


def test_the_score_is_read_where_the_mask_ends():
    model = load_scalar_model(tiny_gpt2(tiny_tokenizer(pad_is_eos=True)))
    ids = torch.tensor([[5, 6, 1, 1, 1], [5, 6, 7, 1, 1]])  # pad and end token are both 1
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    values = token_values(model, ids, mask)
    assert torch.equal(sequence_scores(model, ids, mask), torch.stack([values[0, 2], values[1, 4]]))
    assert sequence_scores(model, ids, torch.zeros_like(mask)).tolist() == [0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_no_dropout_is_left(name):
    config = build(name).config
    for field in vars(config):
        if isinstance(getattr(config, field), float) and ("drop" in field or "jitter" in field):
            setattr(config, field, 0.4)
    torch.manual_seed(0)
    model = load_policy(type(build(name))(config)).train()
    ids = torch.randint(3, V, (2, 9))
    mask = torch.ones_like(ids, dtype=torch.bool)
    torch.testing.assert_close(token_logits(model, ids, mask), token_logits(model.eval(), ids, mask), atol=0, rtol=0)


def test_roles_share_nothing_unasked(tmp_path):
    policy = load_policy(tiny_gpt2(TOKENIZER))
    assert load_policy(policy) is policy
    reference = frozen_copy(policy.train())
    critic = load_scalar_model(policy, zero_head=True)
    again = load_scalar_model(critic)
    ids, mask = torch.randint(3, V, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    before = token_logits(reference, ids, mask), hidden_states(critic, ids, mask)
    assert torch.equal(before[1], hidden_states(policy, ids, mask))
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
        again.score.weight.fill_(3.0)
    assert torch.equal(token_logits(reference, ids, mask), before[0])
    assert torch.equal(hidden_states(critic, ids, mask), before[1])
    assert not reference.training
    assert not any(p.requires_grad for p in reference.parameters())
    assert policy.training
    assert (critic.score.weight == 0).all()
    assert (token_values(critic, ids, mask) == 0).all()


def test_a_new_head_and_its_dtype():
    torch.manual_seed(0)
    wide = tiny_gpt2(TOKENIZER, n_embd=256, n_layer=1).bfloat16()
    model = load_scalar_model(wide)
    assert model.score.weight.dtype == torch.bfloat16
    assert model.score.weight.float().std().item() == pytest.approx(257**-0.5, rel=0.15)
    ids, mask = torch.randint(3, V, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    values = token_values(model, ids, mask)
    exact = hidden_states(model, ids, mask).double() @ model.score.weight.double().T
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact[..., 0], atol=1e-5, rtol=0)
    model = load_scalar_model(tiny_gpt2(TOKENIZER))
    with torch.autocast("cpu", torch.bfloat16):
        assert token_values(model, ids, mask).dtype == torch.float32
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no scalar head: load it with load_scalar_model"):
        token_values(tiny_gpt2(TOKENIZER), ids, mask)
    with pytest.raises(ValueError, match="keep must be between 1 and the length 9, got 10"):
        token_logits(tiny_gpt2(TOKENIZER), ids, mask, keep=10)


def test_stored_dtype(tmp_path):
    save(tiny_gpt2(TOKENIZER).bfloat16(), TOKENIZER, tmp_path / "half")
    assert load_policy(tmp_path / "half").dtype == torch.float32
    assert load_policy(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    assert load_scalar_model(tmp_path / "half").score.weight.dtype == torch.float32


def test_context_length():
    assert [context_length(build(name)) for name in ("GPT2", "Llama", "OPT", "Bloom", "Mamba")] == [
        128, 128, 64, None, None,
    ]  # fmt: skip
    assert context_length(torch.compile(build("GPT2"))) == 128


def test_compiled_models_are_seen_through():
    model = load_policy(tiny_gpt2(TOKENIZER))
    ids, mask = torch.randint(3, V, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    wrapped = torch.compile(model, backend="eager")
    torch.testing.assert_close(token_logits(wrapped, ids, mask), token_logits(model, ids, mask))
    assert torch.equal(hidden_states(wrapped, ids, mask), hidden_states(model, ids, mask))


def test_loading_and_saving_draw_no_bars_and_give_them_back(tmp_path, capfd):
    from transformers.utils import logging

    save(tiny_gpt2(TOKENIZER), TOKENIZER, tmp_path / "sft")
    load_policy(tmp_path / "sft")
    assert capfd.readouterr().err == ""
    assert logging.is_progress_bar_enabled()


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    import safetensors

    model = tiny_gpt2(TOKENIZER)

    def full(*_, **__):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match=r"full: the weights cannot be written: I/O error: No space left on device"):
        save(model, TOKENIZER, tmp_path / "full")


@pytest.fixture(scope="module")
def shelf():
    """A folder with every kind of broken model."""
    with tempfile.TemporaryDirectory() as folder:
        yield _stock(folder)


def _stock(folder):
    from pathlib import Path

    from safetensors.torch import load_file, save_file

    runs = Path(folder) / "runs"
    save(tiny_gpt2(TOKENIZER), TOKENIZER, runs / "sft")
    save(load_scalar_model(tiny_gpt2(TOKENIZER)), TOKENIZER, runs / "reward")
    save(tiny_llama(TOKENIZER), TOKENIZER, runs / "part")
    weights = load_file(runs / "part" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, runs / "part" / "model.safetensors", metadata={"format": "pt"})
    save(tiny_gpt2(TOKENIZER), TOKENIZER, runs / "wide")
    tiny_gpt2(TOKENIZER, n_embd=64).config.save_pretrained(runs / "wide")
    for name in ("empty", "pickle", "cut", "typeless", "bare", "adapter", "labels", "encoder"):
        (runs / name).mkdir()
    for name in ("pickle", "cut", "bare"):
        tiny_gpt2(TOKENIZER).config.save_pretrained(runs / name)
    torch.save({}, runs / "pickle" / "pytorch_model.bin")
    (runs / "cut" / "model.safetensors").write_bytes(b"xx")
    (runs / "typeless" / "config.json").write_text("{}")
    (runs / "typeless" / "model.safetensors").write_bytes(b"xx")
    (runs / "adapter" / "adapter_config.json").write_text("{}")
    config = json.loads((runs / "reward" / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (runs / "labels" / "config.json").write_text(json.dumps(config))
    (runs / "labels" / "model.safetensors").write_bytes(b"xx")
    (runs / "encoder" / "config.json").write_text('{"model_type": "t5"}')
    (runs / "encoder" / "model.safetensors").write_bytes(b"xx")
    (runs / "file").write_text("x")
    return Path(folder)


@pytest.mark.parametrize(
    ("load", "name", "message"),
    [
        (load_policy, "none", "runs/none holds no model: there is no such folder"),
        (load_policy, "file", "runs/file holds no model: it is a file, not a folder"),
        (load_policy, "empty", "runs/empty holds no model: config.json is missing"),
        (load_policy, "bare", "runs/bare holds no model: there is no .safetensors file"),
        (load_policy, "pickle", "runs/pickle holds its weights only as pickle (pytorch_model.bin), which can run code"),
        (load_policy, "cut", "runs/cut cannot be loaded: Error while deserializing header"),
        (load_policy, "typeless", "runs/typeless cannot be loaded: Unrecognized model in runs/typeless."),
        (load_policy, "adapter", "runs/adapter holds an adapter, not a whole model"),
        (load_policy, "part", "runs/part lacks 1 weights of a LlamaForCausalLM, the first is lm_head.weight"),
        (load_policy, "wide", "runs/wide: transformer.h.0.attn.c_attn.bias is [96], and [192] by config.json"),
        (load_policy, "reward", "runs/reward holds a model with a scalar head (GPT2ForSequenceClassification), not a"),
        (load_policy, "encoder", "runs/encoder holds a t5 model, which is not a causal language model"),
        (load_scalar_model, "none", "runs/none holds no model: there is no such folder"),
        (load_scalar_model, "pickle", "runs/pickle holds its weights only as pickle"),
        (load_scalar_model, "labels", "runs/labels has a head of 2 labels: a critic or reward model has 1"),
        (load_tokenizer, "none", "runs/none holds no tokenizer: there is no such folder"),
        (load_tokenizer, "file", "runs/file holds no tokenizer: it is a file, not a folder"),
        (load_tokenizer, "bare", "runs/bare holds no tokenizer: tokenizer.json is missing"),
    ],
)
def test_one_sentence_says_what_is_wrong_with_a_path(shelf, monkeypatch, capfd, load, name, message):
    monkeypatch.chdir(shelf)
    with pytest.raises(ValueError, match=r"^runs/") as caught:
        load(f"runs/{name}")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert "Traceback" not in capfd.readouterr().err


def test_what_looks_like_a_path_never_reaches_the_network(shelf, monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(shelf)
    for name in ("runs/none", "./none", "/none", "~/none-such", "a/b/c", "../none-such"):
        with pytest.raises(ValueError, match="holds no model: there is no such folder"):
            load_policy(name)
    for name in ("runs/sft", "./runs/sft", shelf / "runs" / "sft"):
        assert load_policy(name).config.n_layer == 2
        assert len(load_tokenizer(name)) == V


@pytest.mark.parametrize("answers", [True, False])
def test_what_looks_like_a_hub_id_is_sought_on_the_hub_where_that_answers(monkeypatch, answers):
    """Where it does not, its readers would try again and again: for 50 seconds for a folder that is misspelt."""
    import huggingface_hub
    from transformers import AutoConfig

    asked = []

    def head(url, timeout):
        asked.append((url, timeout))
        if not answers:
            raise ConnectionError("Name or service not known")

    def read(source, local_files_only):
        asked.append((source, local_files_only))
        raise OSError("nothing here")

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr(AutoConfig, "from_pretrained", read)
    for name in ("gpt2", "none/sft"):
        with pytest.raises(ValueError, match=f"^{name} is no folder here: nothing here$"):
            load_policy(name)
    hub = huggingface_hub.constants.ENDPOINT, huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT
    assert asked == [hub, ("gpt2", not answers), hub, ("none/sft", not answers)]


def test_a_hub_id_that_fails_is_one_sentence(monkeypatch):
    from transformers import AutoConfig

    def fail(*_, **__):
        raise OSError("\nnobody/nothing is not a local folder and no model of the Hub\nIf this is private, log in.")

    monkeypatch.setattr(pretrained, "hub_answers", lambda: True)
    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(ValueError, match=r"^nobody/nothing is no folder here: nobody/nothing is not a local .* Hub$"):
        load_policy("nobody/nothing")


def test_tokenizers(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == 0
    assert load_tokenizer(tiny_gpt2(TOKENIZER), tmp_path).pad_token_id == 0
    assert load_tokenizer("ignored", TOKENIZER) is TOKENIZER
    bare = tiny_tokenizer()
    bare.pad_token = None
    assert load_tokenizer("ignored", bare).pad_token_id == bare.eos_token_id
    bare.eos_token = None
    with pytest.raises(ValueError, match="has no end token"):
        load_tokenizer("ignored", bare)
    with pytest.raises(ValueError, match="a model given as a module comes without its tokenizer: pass tokenizer="):
        load_tokenizer(tiny_gpt2(TOKENIZER))


def test_a_model_that_padding_changes_is_refused(tmp_path):
    from transformers import BartConfig, BartForCausalLM

    torch.manual_seed(0)
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "init_std": 0.2}
    model = BartForCausalLM(BartConfig(vocab_size=V, max_position_embeddings=32, is_encoder_decoder=False, **sizes))
    save(model, TOKENIZER, tmp_path)
    with pytest.raises(ValueError, match="BartForCausalLM takes no position_ids, and padding on the left changes"):
        load_policy(tmp_path)
    assert models.accepts(model).isdisjoint({"position_ids"})
