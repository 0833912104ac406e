import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import accelerate_on, tiny_gpt2, tiny_llama, tiny_tokenizer

from rlhf_fast.data import pad
from rlhf_fast.generate import decode, generate, stop_tokens
from rlhf_fast.models import load_policy, save, token_logits

TOKENIZER = tiny_tokenizer()
PAD, EOS = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
PROMPTS = ["the movie was", "I like this very good plot", "a"]
MODELS = {"gpt2": tiny_gpt2(TOKENIZER, seed=1), "llama": tiny_llama(TOKENIZER, seed=1)}


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """A model that is loaded from a folder goes where the others here are."""
    with accelerate_on("cpu"):
        yield


def batch(prompts=PROMPTS, extra=0):
    ids, mask = pad([TOKENIZER(prompt)["input_ids"] for prompt in prompts], PAD, side="left")
    return torch.nn.functional.pad(ids, (extra, 0), value=7), torch.nn.functional.pad(mask, (extra, 0))


def write(model, ids, mask, **options):
    options = {"max_new_tokens": 20, "stop_ids": [EOS], "pad_id": PAD, "seeds": torch.arange(len(ids))} | options
    return decode(model, ids, mask, **options)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_transformers(name):
    ids, mask = batch()
    model = load_policy(MODELS[name]).eval()
    theirs = model.generate(
        ids, attention_mask=mask.long(), max_new_tokens=40, do_sample=False, pad_token_id=PAD
    )[:, ids.shape[1] :]  # fmt: skip
    # A token that every row writes in the middle serves as a second stop token, so that rows end at several lengths.
    for stops in ([EOS], [EOS, int(theirs[0, 5])], [EOS, *theirs[:2, 9].tolist()]):
        ours = write(model, ids, mask, max_new_tokens=40, temperature=0, stop_ids=stops)
        lengths = []
        for row in theirs.tolist():
            at = next((i for i, token in enumerate(row) if token in stops), None)
            lengths.append((len(row) if at is None else at + 1, at is not None))
        assert ours.mask.sum(1).tolist() == [length for length, _ in lengths]
        assert ours.ended.tolist() == [ended for _, ended in lengths]
        assert ours.responses.shape[1] == max(length for length, _ in lengths)
        for row, other, (length, _) in zip(ours.responses, theirs, lengths, strict=True):
            assert row[:length].tolist() == other[:length].tolist()
            assert (row[length:] == PAD).all()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_logprobs_equal_those_of_one_forward_over_everything(name, temperature):
    model = load_policy(MODELS[name])
    ids, mask = batch()
    stop = int(write(model, ids, mask, temperature=temperature).responses[0, 4])
    made = write(model, ids, mask, temperature=temperature, top_k=50, top_p=0.9, stop_ids=[stop])
    whole, there = torch.cat([ids, made.responses], 1), torch.cat([mask, made.mask], 1)
    with torch.no_grad():
        logits = token_logits(model, whole, there, keep=made.responses.shape[1] + 1)[:, :-1]
    expected = (logits / temperature).log_softmax(-1).gather(-1, made.responses[..., None]).squeeze(-1)
    assert made.mask.any(1).all()
    torch.testing.assert_close(made.logprobs[made.mask], expected[made.mask], atol=1e-5, rtol=0)
    assert (made.logprobs[~made.mask] == 0).all()


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**62), order=st.permutations(range(3)), extra=st.integers(0, 5), pad_is=st.integers(0, 9))
def test_a_row_depends_on_its_own_prompt_and_seed(name, seed, order, extra, pad_is):
    model = load_policy(MODELS[name])
    seeds = seed + torch.arange(3)
    ids, mask = batch()
    together = write(model, ids, mask, seeds=seeds)
    shuffled = write(
        model, *batch([PROMPTS[i] for i in order], extra), seeds=seeds[list(order)], pad_id=pad_is
    )  # fmt: skip
    for row, i in enumerate(order):
        alone = write(model, *batch([PROMPTS[i]]), seeds=seeds[i : i + 1])
        expected = together.responses[i][together.mask[i]].tolist()
        assert alone.responses[0][alone.mask[0]].tolist() == expected
        assert shuffled.responses[row][shuffled.mask[row]].tolist() == expected


def test_a_model_without_a_cache():
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    torch.manual_seed(0)
    config = OpenAIGPTConfig(vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    model = load_policy(OpenAIGPTLMHeadModel(config))
    ids, mask = batch()
    made = write(model, ids, mask, temperature=0, max_new_tokens=5)
    for _ in range(5):
        with torch.no_grad():
            following = token_logits(model, ids, mask, keep=1)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, following], 1), torch.nn.functional.pad(mask, (0, 1), value=True)
    assert made.responses.tolist() == ids[:, -5:].tolist()


def test_every_row_ending_ends_the_loop():
    calls = []
    model = load_policy(tiny_gpt2(TOKENIZER))
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    made = write(model, *batch(), stop_ids=range(len(TOKENIZER)), max_new_tokens=100)
    assert len(calls) == 8  # one look every 8 steps
    assert made.responses.shape == (3, 1)
    assert made.mask.all()
    assert made.ended.all()


def test_modes_and_gradients_are_left_alone():
    model = load_policy(tiny_gpt2(TOKENIZER)).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    made = write(model, *batch())
    assert [module.training for module in model.modules()] == before
    assert not made.logprobs.requires_grad
    token_logits(model, made.responses, made.mask).sum().backward()  # its tensors are no inference tensors


def test_what_decode_refuses():
    model = tiny_gpt2(TOKENIZER, n_positions=16)
    ids, mask = batch()
    longest = int(mask.sum(1).max())
    message = f"prompt 2 has {longest} tokens: with max_new_tokens=11 that is more than the model's context of 16"
    with pytest.raises(ValueError, match=message):
        write(model, ids, mask, max_new_tokens=11)
    assert write(model, *batch(extra=20), max_new_tokens=16 - longest).mask.shape == (3, 16 - longest)
    with pytest.raises(ValueError, match="every prompt must have a token, and be padded on the left"):
        write(model, ids.flip(1), mask.flip(1))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        write(model, ids, mask, max_new_tokens=0)
    with torch.no_grad():
        model.transformer.wte.weight[ids[1, -1]] = torch.nan
    with pytest.raises(ValueError, match="the model's logits are NaN or infinite for prompt 1 of 3"):
        write(model, ids, mask, max_new_tokens=2)


def test_text_to_text(tmp_path):
    model = load_policy(tiny_gpt2(TOKENIZER, seed=3)).eval()
    save(model, TOKENIZER, tmp_path / "model")
    made = generate(model, PROMPTS, tokenizer=TOKENIZER, max_new_tokens=16, seed=5)
    assert generate(tmp_path / "model", PROMPTS, max_new_tokens=16, seed=5, batch_size=2) == made
    assert generate(str(tmp_path / "model"), PROMPTS[:1], max_new_tokens=16, seed=5) == made[:1]
    assert generate(model, PROMPTS, tokenizer=TOKENIZER, max_new_tokens=16, seed=6) != made
    greedy = generate(model, PROMPTS, tokenizer=TOKENIZER, max_new_tokens=16, temperature=0)
    for prompt, response in zip(PROMPTS, greedy, strict=True):
        ids = TOKENIZER(prompt, return_tensors="pt")["input_ids"]
        whole = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=PAD)[0]
        assert response == TOKENIZER.decode(whole[ids.shape[1] :], skip_special_tokens=True)


def test_text_without_seed_follows_torch():
    model = load_policy(tiny_gpt2(TOKENIZER))
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(generate(model, PROMPTS, tokenizer=TOKENIZER, max_new_tokens=8))
    made.append(generate(model, PROMPTS, tokenizer=TOKENIZER, max_new_tokens=8))
    assert made[0] == made[1] != made[2]


def test_conversations_and_stop_tokens():
    chat = tiny_tokenizer(chat=True)
    model = load_policy(tiny_gpt2(chat))
    talk = [{"role": "user", "content": "is it good"}]
    text = chat.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    talked, written = (generate(model, [p], tokenizer=chat, max_new_tokens=8, seed=0) for p in (talk, text))
    assert talked == written
    model.generation_config.eos_token_id = [1, 44]
    assert stop_tokens(model, chat) == [1, 44]


def test_what_generate_refuses():
    model = tiny_gpt2(TOKENIZER)
    with pytest.raises(TypeError, match="prompts must be a list, got one string"):
        generate(model, "a", tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="pass tokenizer="):
        generate(model, ["a"])
    with pytest.raises(ValueError, match="prompt 2: it is empty"):
        generate(model, ["a", ""], tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match='prompt 1: "prompt" must be a string, got a number'):
        generate(model, [3], tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match=r"prompt 2 has 3 tokens: with max_new_tokens=126 that is more than .* of 128"):
        generate(model, ["a", "a good movie"], tokenizer=TOKENIZER, max_new_tokens=126)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        generate(model, ["a"], tokenizer=TOKENIZER, batch_size=0)
    assert generate(model, [], tokenizer=TOKENIZER) == []
