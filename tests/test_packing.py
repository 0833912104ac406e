"""Packed sequences have the logits that they have alone; the rows are few and always the same."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_gpt2, tiny_llama

from rlhf_fast import attention, dispatch
from rlhf_fast.attention import can_use_rows, use_rows, uses_rows
from rlhf_fast.generate import decode
from rlhf_fast.models import token_logits
from rlhf_fast.packing import check_packing, first_fit, pack, packed_logits, prefer_varlen, prepare, uses_varlen

CPU = torch.device("cpu")
SEQUENCES = [([5, 9, 3, 7], [False, True, True, True]), ([8], [True]), ([6, 6], [True, True]), ([4] * 7, [True] * 7)]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 25))
def test_every_sequence_is_in_one_row_that_holds_it(lengths, room):
    rows = first_fit(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for n, row in enumerate(rows):
        assert len(row) == 1 or sum(lengths[i] for i in row) <= room
        for earlier in rows[:n]:  # or it would stand there
            assert sum(lengths[i] for i in earlier) + lengths[row[0]] > room
    assert rows == first_fit(lengths, room)


def test_first_fit_by_hand():
    assert first_fit([2, 5, 4, 7, 1, 3, 8], 10) == [[6, 0], [3, 5], [1, 2, 4]]


def test_positions_and_masks_by_hand():
    packed = pack([SEQUENCES[:2], SEQUENCES[2:3]], 0, CPU)
    assert packed.ids.tolist() == [[5, 9, 3, 7, 8], [6, 6, 0, 0, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 0, 0]]
    assert packed.at.tolist() == [0, 1, 2, 5]  # 8 and the first 6 are the first of their sequences
    assert packed.targets.tolist() == [9, 3, 7, 6]
    flat = pack([SEQUENCES[:2], SEQUENCES[2:3]], 0, CPU, flat=True)
    assert flat.ids.tolist() == [[5, 9, 3, 7, 8, 6, 6]]
    assert flat.positions.tolist() == [[0, 1, 2, 3, 0, 0, 1]]
    assert (flat.at.tolist(), flat.targets.tolist()) == ([0, 1, 2, 5], [9, 3, 7, 6])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("flat", [False, True])
def test_no_sequence_sees_another(make, flat, attention):
    model = make().double().eval()
    model.set_attn_implementation(attention)
    packed = pack([SEQUENCES[:3], SEQUENCES[3:]], 0, CPU, flat=flat)
    found = packed_logits(model, packed)
    expected = []
    for ids, mask in SEQUENCES:
        logits = token_logits(model, torch.tensor([ids]), torch.ones(1, len(ids)).bool())[0]
        expected += [logits[i - 1] for i in range(1, len(ids)) if mask[i]]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-10)


def test_a_model_whose_sequences_would_see_each_other_is_refused():
    model = tiny_gpt2()
    check_packing(model)
    assert model.training
    # With a mask, transformers does not look at the positions.
    forward = model.transformer.forward
    model.transformer.forward = lambda input_ids, **more: forward(
        input_ids, **more | {"attention_mask": torch.ones_like(input_ids)}
    )
    with pytest.raises(ValueError, match="the sequences of GPT2LMHeadModel see each other when they are packed"):
        check_packing(model)
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM takes no position_ids"):
        check_packing(bloom)


@pytest.mark.parametrize(
    ("device", "precision", "installed", "chosen"),
    [
        ("cuda", "bf16", True, True),
        ("cuda", "bf16", False, False),
        ("cuda", "fp32", True, False),
        ("cpu", "bf16", True, False),
    ],
)
def test_flash_attn_is_asked_for_where_it_can_run(monkeypatch, device, precision, installed, chosen):
    model = tiny_llama()
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object() if installed else None)
    asked = []
    monkeypatch.setattr(model, "set_attn_implementation", asked.append)
    prefer_varlen(model, torch.device(device), precision)
    assert asked == ["flash_attention_2"] * chosen
    assert not uses_varlen(model)
    model.config._attn_implementation = "flash_attention_2"
    assert uses_varlen(model)


@pytest.mark.parametrize("short", [0, attention.SHORT])  # tokens up to which two products are taken instead of sdpa
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_a_row_whose_attention_is_padded_gives_the_logits_and_gradients_of_each_sequence_alone(
    make, short, monkeypatch
):
    monkeypatch.setattr(attention, "SHORT", short)
    model, other = make().double().eval(), make().double().eval()
    other.load_state_dict(model.state_dict())
    assert can_use_rows(model)
    use_rows(model)
    packed = pack([SEQUENCES], 0, CPU, flat=True)
    logits = packed_logits(model, packed._replace(at=torch.arange(packed.ids.shape[1])))
    alone = [token_logits(other, torch.tensor([ids]), torch.ones(1, len(ids)).bool())[0] for ids, _ in SEQUENCES]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=0, atol=1e-10)
    logits.log_softmax(-1).square().sum().backward()
    torch.cat(alone).log_softmax(-1).square().sum().backward()
    for (name, found), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.fixture
def arithmetic(monkeypatch):
    """The dtypes of the queries that attend to something, by sdpa or by two products."""
    from transformers.integrations import sdpa_attention

    seen = set()

    def note(holder, name, at):
        inner = getattr(holder, name)

        def noted(*given, **options):
            seen.add(given[at].dtype)
            return inner(*given, **options)

        monkeypatch.setattr(holder, name, noted)

    note(sdpa_attention, "sdpa_attention_forward", 1)
    note(attention, "_products", 0)
    return seen


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_in_bfloat16_a_row_attends_in_float32(make, arithmetic):
    """In bfloat16 the backward of attention on a CPU takes longer than all that the products save."""
    model = make().eval()
    use_rows(model)
    packed = pack([SEQUENCES], 0, CPU, flat=True)
    exact = packed_logits(model, packed)
    with torch.autocast("cpu", torch.bfloat16):
        logits = packed_logits(model, packed)
    assert logits.dtype == torch.bfloat16
    assert arithmetic == {torch.float32}
    torch.testing.assert_close(logits.float(), exact, rtol=0, atol=0.02 * float(exact.detach().abs().max()))


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_a_token_attends_to_the_cache_as_by_sdpa(make, arithmetic):
    """The prompt attends by sdpa, each token after it by two products; padding on the left of a row changes nothing."""
    model = make().double().eval()
    ids, mask = torch.tensor([[0, 0, 5, 9], [3, 4, 5, 6]]), torch.ones(2, 4).bool()
    mask[0, :2] = False
    options = {"max_new_tokens": 9, "stop_ids": [], "pad_id": 0, "seeds": torch.arange(2)}
    expected = decode(model, ids, mask, **options)
    use_rows(model)
    found = decode(model, ids, mask, **options)
    assert torch.equal(found.responses, expected.responses)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-6)  # they are kept in float32
    arithmetic.clear()
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.float()(ids, attention_mask=mask, use_cache=True).past_key_values
        arithmetic.clear()  # of the prompt, whose attention is transformers' own
        model(ids[:, :1], attention_mask=torch.ones(2, 5).bool(), past_key_values=cache)
    assert arithmetic == {torch.float32}


def test_with_an_ordinary_mask_a_prepared_model_attends_as_before():
    model, ids, mask = tiny_llama().double().eval(), torch.tensor([[0, 0, 5, 9], [3, 4, 5, 6]]), torch.ones(2, 4).bool()
    mask[0, :2] = False
    before = token_logits(model, ids, mask)
    use_rows(model)
    assert torch.equal(token_logits(model, ids, mask), before)


def test_a_window_of_attention_is_not_for_rows():
    model = tiny_llama()
    model.config.sliding_window = 4
    assert not can_use_rows(model)


def test_a_model_that_cannot_read_rows_is_refused_in_one_sentence(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(model.model, "forward", lambda **_: {}["mask"])
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot read packed sequences .* use packing=false"):
        check_packing(model)


def test_a_row_must_give_what_the_model_gave_before():
    """A BERT that is no decoder sees the tokens after, too, and attention of rows would silently leave them out."""
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = SimpleNamespace(packing=True, precision="fp32")
    for decoder in (False, True):
        model = BertLMHeadModel(BertConfig(vocab_size=20, is_decoder=decoder, initializer_range=0.5, **sizes)).eval()
        with nullcontext() if decoder else pytest.raises(ValueError, match="see each other when they are packed"):
            prepare([model], CPU, config)
        assert uses_rows(model) == decoder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_weights_of_half_precision_are_no_reason_to_refuse(make, dtype):
    """A teacher or a reference may be given so; what rounding moves is more than a thousandth."""
    prepare([make().to(dtype)], CPU, SimpleNamespace(packing=True, precision="fp32"))


def test_blocks_of_tokens_are_noticed(monkeypatch):
    """DeepSeek V4 attends to summaries of 128 tokens, whichever sequence of the row they are of."""
    model = tiny_llama(max_position_embeddings=256)
    inner = model.model.forward

    def blocks(**given):
        output = inner(**given)
        whole = output.last_hidden_state[:, : output.last_hidden_state.shape[1] // 128 * 128].unflatten(1, (-1, 128))
        output.last_hidden_state = output.last_hidden_state.clone()
        output.last_hidden_state[:, 128:] += whole.mean((1, 2))
        return output

    monkeypatch.setattr(model.model, "forward", blocks)
    with pytest.raises(ValueError, match="see each other when they are packed"):
        check_packing(model)


def test_a_model_that_makes_its_own_mask_is_packed_as_before(monkeypatch):
    """Its mask of bools would meet the places of a layout; with its own it tells the sequences apart."""
    model = tiny_llama()
    inner = model.model.forward

    def masked(attention_mask=None, **given):
        if attention_mask is not None:
            raise RuntimeError("The size of tensor a must match the size of tensor b")
        return inner(**given)

    monkeypatch.setattr(model.model, "forward", masked)
    (prepared,) = prepare([model], CPU, SimpleNamespace(packing=True, precision="fp32"))
    assert prepared[1:] == ("sdpa", "sdpa")
    assert model.config._attn_implementation == "sdpa"
