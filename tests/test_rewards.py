import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

from rlhf_fast.models import load_policy, load_scalar_model, save
from rlhf_fast.rewards import EnsembleReward, RewardError, ask, check_scores, load_reward, shape_rewards, token_readers

NAN = float("nan")
TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def right_padded(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def test_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, NAN]])
    ref = torch.tensor([[-1.5, -2.0, -1.0], [-1.5, -3.0, NAN]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    scores = torch.tensor([1.0, -7.0])
    # k1 of row 1: 0.5, 0, -2; of row 2: 0.5, 2.
    made = shape_rewards(scores, logprobs, ref, mask, kl_coef=0.1)
    torch.testing.assert_close(made, torch.tensor([[-0.05, 0.0, 1.2], [-0.05, -7.2, 0.0]]))
    made = shape_rewards(scores, logprobs, ref, mask, kl_coef=0.1, kl="k2", clip_scores=5.0)
    torch.testing.assert_close(made, torch.tensor([[-0.0125, 0.0, 0.8], [-0.0125, -5.2, 0.0]]))
    made = shape_rewards(scores, logprobs, ref, mask, kl_coef=0.1, kl="abs", at="next")
    torch.testing.assert_close(made, torch.tensor([[-0.05, 0.0, 0.8], [-0.05, -0.2, -7.0]]))
    k3 = [np.exp(-0.5) + 0.5 - 1, 0.0, np.exp(2) - 2 - 1]
    made = shape_rewards(scores, logprobs, ref, mask, kl_coef=torch.tensor(0.1), kl="k3")
    torch.testing.assert_close(made[0], torch.tensor([-0.1 * k3[0], 0.0, 1 - 0.1 * k3[2]], dtype=torch.float32))
    dense = torch.tensor([[1.0, 2.0, 3.0], [4.0, -5.0, NAN]])
    made = shape_rewards(dense, logprobs, ref, mask, kl_coef=0.0, clip_scores=3.0)
    torch.testing.assert_close(made, torch.tensor([[1.0, 2.0, 3.0], [3.0, -3.0, 0.0]]))


def test_where_the_score_lands_in_trl_and_elsewhere():
    # Responses of 8, 5 and 3 tokens in 8 columns: TRL's PPO puts the score at 7, 5 and 3, others at 7, 4 and 2.
    mask = right_padded([8, 5, 3], 8)
    zeros = torch.zeros(3, 8)
    for at, columns in (("next", [7, 5, 3]), ("last", [7, 4, 2])):
        made = shape_rewards(torch.tensor([1.0, 2.0, 3.0]), zeros, zeros, mask, kl_coef=0.1, at=at)
        assert made.argmax(1).tolist() == columns
        assert made.sum(1).tolist() == [1.0, 2.0, 3.0]
    # TRL's own lines (ppo_trainer.py), on the same mask.
    length = mask.sum(1) - 1
    after = length + 1
    end = torch.where(after < 8, after, length)
    theirs = zeros.clone()
    theirs[torch.arange(3), end] += torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(theirs, shape_rewards(torch.tensor([1.0, 2.0, 3.0]), zeros, zeros, mask, kl_coef=0.1, at="next"))


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(0, 4),
    width=st.integers(0, 6),
    kl=st.sampled_from(["k1", "k2", "k3", "abs"]),
    at=st.sampled_from(["last", "next"]),
    dense=st.booleans(),
)
def test_token_by_token_in_float64(data, rows, width, kl, at, dense):
    torch.manual_seed(data.draw(st.integers(0, 999)))
    mask = torch.rand(rows, width) < 0.6
    logprobs, ref = (torch.randn(rows, width, dtype=torch.float64) for _ in range(2))
    scores = torch.randn((rows, width) if dense else (rows,), dtype=torch.float64)
    expected = np.zeros((rows, width))
    formula = {
        "k1": lambda d: d,
        "k2": lambda d: d * d / 2,
        "k3": lambda d: np.exp(-d) + d - 1,
        "abs": abs,
    }[kl]
    for i in range(rows):
        valid = [j for j in range(width) if mask[i, j]]
        for j in valid:
            expected[i, j] = -0.3 * formula((logprobs[i, j] - ref[i, j]).item())
            expected[i, j] += scores[i, j].item() if dense else 0.0
        if valid and not dense:
            expected[i, min(valid[-1] + (at == "next"), width - 1)] += scores[i].item()
    for stored in (logprobs, ref, *([scores] if dense else [])):
        stored[~mask] = NAN
    made = shape_rewards(scores, logprobs, ref, mask, kl_coef=0.3, kl=kl, at=at)
    assert made.dtype == torch.float64
    np.testing.assert_allclose(made.numpy(), expected, atol=1e-14)


def test_nothing_masked_leaks():
    mask = torch.tensor([[True, False], [False, False]])
    logprobs = torch.tensor([[-1.0, NAN], [torch.inf, NAN]], requires_grad=True)
    made = shape_rewards(torch.tensor([1.0, NAN]), logprobs, torch.zeros(2, 2), mask, kl_coef=1.0, kl="k3")
    assert made.tolist() == [[pytest.approx(1 - (np.exp(1) - 2)), 0.0], [0.0, 0.0]]
    made.sum().backward()
    assert logprobs.grad.tolist() == [[pytest.approx(np.exp(1) - 1), 0.0], [0.0, 0.0]]


def test_a_price_of_0_is_none_even_where_the_kl_is_infinite():
    logprobs, mask = torch.tensor([[-200.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool)
    ref = torch.tensor([[0.0, -torch.inf]])
    for price in (0.0, torch.tensor(0.0)):
        for kind in ("k1", "k3"):  # exp(200) is beyond float32
            made = shape_rewards(torch.ones(1), logprobs, ref, mask, kl_coef=price, kl=kind)
            assert made.tolist() == [[0.0, 1.0]]


def test_dtypes_and_errors():
    x, mask = torch.zeros(2, 3), right_padded([3, 1], 3)
    half = x.bfloat16()
    assert shape_rewards(half[:, 0], half, half, mask, kl_coef=0.1).dtype == torch.float32
    assert shape_rewards(x[:, 0].double(), x, x, mask, kl_coef=0.1).dtype == torch.float64
    for options, message in [
        ({"kl": "k4"}, "shape_rewards: kl must be one of k1, k2, k3, abs, got 'k4'"),
        ({"at": "first"}, "shape_rewards: at must be one of last, next, got 'first'"),
        ({"clip_scores": 0.0}, "shape_rewards: clip_scores must be above 0, got 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            shape_rewards(x[:, 0], x, x, mask, kl_coef=0.1, **options)
    with pytest.raises(ValueError, match=r"scores must be \[B\] or \[B, T\] of \[2, 3\], got \[3\]"):
        shape_rewards(x[0], x, x, mask, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"ref_logprobs must be like logprobs, got \[2, 2\]"):
        shape_rewards(x[:, 0], x, x[:, :2], mask, kl_coef=0.1)
    with pytest.raises(TypeError, match="mask must be bool, got float32"):
        shape_rewards(x[:, 0], x, x, x, kl_coef=0.1)


PROMPTS = ["the movie was", "I like", "a very good plot and"]
RESPONSES = [" good", " this dull movie", " fun"]


def expected_scores(model, tokenizer):
    """transformers' own forward, one text at a time, unpadded: its score is that of the last token."""
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        text = prompt + response + tokenizer.eos_token
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state
            found.append(model.score(hidden)[0, -1, 0].item())
    return torch.tensor(found)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_a_reward_model(tmp_path, make, pad_is_eos):
    tokenizer = tiny_tokenizer(pad_is_eos)
    torch.manual_seed(0)
    model = load_scalar_model(make(tokenizer))
    expected = expected_scores(model, tokenizer)
    assert expected.std() > 0.1
    save(model, tokenizer, tmp_path / "reward")
    for source in (tmp_path / "reward", str(tmp_path / "reward"), model):
        for size in (1, 2, 32):
            scores = load_reward(source, tokenizer, batch_size=size)(PROMPTS, RESPONSES, gold=[1, 2, 3])
            torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
            assert not scores.requires_grad
    # The reward model reads with its own tokenizer, or with the policy's where it has none.
    other = tiny_tokenizer(bos=True)
    assert torch.equal(load_reward(tmp_path / "reward", other)(PROMPTS, RESPONSES), scores)
    for file in (tmp_path / "reward").glob("tokenizer*"):
        file.unlink()
    assert torch.equal(load_reward(tmp_path / "reward", tokenizer)(PROMPTS, RESPONSES), scores)
    assert not torch.equal(load_reward(tmp_path / "reward", other)(PROMPTS, RESPONSES), scores)


def test_what_is_no_reward(tmp_path):
    save(load_policy(tiny_gpt2(TOKENIZER)), TOKENIZER, tmp_path / "sft")
    with pytest.raises(ValueError, match="sft holds a language model, not a reward model"):
        load_reward(tmp_path / "sft", TOKENIZER)
    with pytest.raises(ValueError, match="none holds no model: there is no such folder"):
        load_reward(tmp_path / "none", TOKENIZER)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no scalar head"):
        load_reward(tiny_gpt2(TOKENIZER), TOKENIZER)
    with pytest.raises(TypeError, match="the reward must be a path, a module or a callable, got int"):
        load_reward(3, TOKENIZER)
    short = load_reward(load_scalar_model(tiny_gpt2(TOKENIZER, n_positions=5)), TOKENIZER)
    with pytest.raises(ValueError, match="context of 5 tokens is too short for a prompt and response of 7: 'the movie"):
        short(PROMPTS, RESPONSES)

    small = tiny_gpt2(TOKENIZER)
    small.resize_token_embeddings(100)
    with pytest.raises(ValueError, match=r"the tokenizer's token \d+ is none of the model's 100"):
        load_reward(load_scalar_model(small), TOKENIZER)(PROMPTS, RESPONSES)

    def judge(prompts, responses, **columns):
        return [len(r) for r in responses]

    assert load_reward(judge, TOKENIZER) is judge


def test_check_scores():
    for scores in ([1, 2.5], (1, 2.5), np.array([1, 2.5]), torch.tensor([1, 2.5]).double(), [torch.tensor(1), 2.5]):
        found = check_scores(scores, 2)
        assert found.dtype == torch.float32
        assert found.tolist() == [1, 2.5]
    assert check_scores([[1, 2], [3, 4]], 2).shape == (2, 2)
    assert check_scores([True, False], 2).tolist() == [1, 0]
    for scores, shape in [([1.0], r"\[1\]"), (1.0, r"\[\]"), ([1.0] * 3, r"\[3\]"), ([], r"\[0\]")]:
        with pytest.raises(ValueError, match=f"one score for each of 2 prompts, got shape {shape}"):
            check_scores(scores, 2)
    for scores in (None, ["a", "b"], [[1, 2], [3]], {"a": 1}):
        with pytest.raises(TypeError, match="the reward must return numbers, got "):
            check_scores(scores, 2)
    long = "x" * 100
    with pytest.raises(ValueError, match=r"the reward of prompt 2 of 2 is nan: prompt 'q', response 'x{60}…'$"):
        check_scores([1, NAN], 2, ["a", long], prompts=["p", "q"])
    with pytest.raises(ValueError, match=r"the reward of prompt 1 of 2 is -inf$"):
        check_scores([[0.0, -torch.inf], [1.0, 1.0]], 2)
    mask = torch.tensor([[True, False], [True, True]])
    assert check_scores([[0.0, NAN], [1.0, 1.0]], 2, mask=mask).shape == (2, 2)
    with pytest.raises(ValueError, match="the reward of prompt 2 of 2 is nan"):
        check_scores([[0.0, NAN], [1.0, NAN]], 2, mask=mask)
    with pytest.raises(ValueError, match=r"\[B, T\] of \[2, 2\], got shape \[2, 3\]"):
        check_scores(torch.zeros(2, 3), 2, mask=mask)


def test_a_process_model_says_how_good_the_worst_step_is():
    torch.manual_seed(1)
    model = load_scalar_model(tiny_gpt2(TOKENIZER))
    model.config.step_separator = "\n"
    responses = [" good\n fun\n dull", " fun", "", " dull\n\n fun\n"]
    expected, everywhere = [], []
    for response in responses:
        ids = TOKENIZER("the movie")["input_ids"]
        ends = []
        steps = [step for step in response.split("\n") if step] or [""]
        for i, step in enumerate(steps):
            ids = ids + TOKENIZER(step + ("\n" if i < len(steps) - 1 else TOKENIZER.eos_token))["input_ids"]
            ends.append(len(ids) - 1)
        with torch.no_grad():
            values = model.score(model.base_model(torch.tensor([ids])).last_hidden_state)[0, :, 0]
        expected.append(values[ends].min().item())
        everywhere.append(values[-1].item())
    for size in (1, 8):
        found = load_reward(model, TOKENIZER, batch_size=size)(["the movie"] * 4, responses)
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)
    assert expected[0] < everywhere[0]
    assert expected[1:3] == everywhere[1:3]


def table(scores):
    """A reward that looks a response up."""
    return lambda prompts, responses, **columns: [scores[r] for r in responses]


MEMBERS = [table({"a": 1.0, "b": 4.0}), table({"a": 3.0, "b": 4.0}), table({"a": 5.0, "b": 1.0})]


def test_an_ensemble_by_hand():
    for combine, expected in [("mean", [3.0, 3.0]), ("worst", [1.0, 1.0]), ("mean_minus_std", [2.0, 3 - 0.5 * 3**0.5])]:
        ensemble = load_reward(EnsembleReward(MEMBERS, combine=combine, caution=0.5), TOKENIZER)
        torch.testing.assert_close(ensemble(["p", "p"], ["a", "b"], gold=[0, 0]), torch.tensor(expected))
        torch.testing.assert_close(ensemble.uncertainty, torch.tensor([2.0, 3**0.5]))
    listed = load_reward(MEMBERS, TOKENIZER)
    assert listed(["p", "p"], ["b", "a"]).tolist() == [3, 3]
    assert listed.uncertainty.tolist() == pytest.approx([3**0.5, 2.0])


def test_an_ensemble_of_models(tmp_path):
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(load_scalar_model(tiny_gpt2(TOKENIZER)))
    save(models[0], TOKENIZER, tmp_path / "one")
    each = torch.stack([load_reward(model, TOKENIZER)(PROMPTS, RESPONSES) for model in models])
    ensemble = load_reward([tmp_path / "one", models[1], MEMBERS[0]], TOKENIZER)
    assert [type(reward).__name__ for reward in ensemble.rewards] == ["ModelReward", "ModelReward", "function"]
    assert len(token_readers(ensemble)) == 2
    other = tiny_tokenizer()
    other.add_tokens(["another"])
    assert token_readers(load_reward([tmp_path / "one", MEMBERS[0]], other)) == []
    pair = EnsembleReward([tmp_path / "one", str(tmp_path / "one")])
    torch.testing.assert_close(pair(PROMPTS, RESPONSES), each[0])  # a path brings its tokenizer along
    assert pair.uncertainty.tolist() == [0, 0, 0]
    worst = load_reward(EnsembleReward(models, combine="worst"), TOKENIZER)
    torch.testing.assert_close(worst(PROMPTS, RESPONSES), each.amin(0))
    torch.testing.assert_close(worst.uncertainty, (each[0] - each[1]).abs() / 2**0.5)


def test_what_is_no_ensemble():
    for members in ([], MEMBERS[:1], "runs/reward"):
        with pytest.raises(ValueError, match="an ensemble needs two members or more"):
            EnsembleReward(members)
    with pytest.raises(ValueError, match=r"combine must be one of .*mean_minus_std.*, got 'best'"):
        EnsembleReward(MEMBERS, combine="best")
    for caution in (-1.0, NAN, float("inf")):
        with pytest.raises(ValueError, match="caution must be finite and not negative"):
            EnsembleReward(MEMBERS, caution=caution)
    with pytest.raises(TypeError, match="the reward must be a path, a module or a callable, got int"):
        load_reward([MEMBERS[0], 3], TOKENIZER)
    with pytest.raises(ValueError, match="a model given as a module comes without its tokenizer"):
        EnsembleReward([load_scalar_model(tiny_gpt2(TOKENIZER))] * 2)(PROMPTS, RESPONSES)


@pytest.mark.parametrize(
    ("member", "error", "words"),
    [
        (lambda p, r: [1.0], ValueError, "member 2 of 2: the reward must return one score for each of 2 prompts"),
        (lambda p, r: [1.0, NAN], ValueError, "member 2 of 2: the reward of prompt 2 of 2 is nan: prompt 'q'"),
        (lambda p, r: [[1.0], [2.0]], ValueError, r"member 2 of 2: .* one score per response, got shape \[2, 1\]"),
        (lambda p, r: None, TypeError, "member 2 of 2: the reward must return numbers, got NoneType"),
        (
            lambda p, r: [{}[x] for x in r],
            RewardError,
            "^member 2 of 2: the reward raised KeyError at .*; prompt 1 of ",
        ),
    ],
)
def test_a_broken_member_is_named(member, error, words):
    ensemble = load_reward([MEMBERS[0], member], TOKENIZER)
    with pytest.raises(error, match=words):
        ask(ensemble, ["p", "q"], ["a", "b"], {})


def test_a_reward_model_reads_what_the_policy_wrote():
    torch.manual_seed(0)
    model = load_scalar_model(tiny_gpt2(TOKENIZER))
    reward, half = load_reward(model, TOKENIZER), TOKENIZER("é", add_special_tokens=False)["input_ids"][:1]
    text = TOKENIZER.decode(half)
    assert len(TOKENIZER(text)["input_ids"]) == 3  # a replacement character
    good = TOKENIZER(" good")["input_ids"]
    written = [[*good, EOS], half * 4, [*half, TOKENIZER.bos_token_id, *half, EOS], []]
    texts = TOKENIZER.batch_decode(written, skip_special_tokens=True)
    before = TOKENIZER("the movie")["input_ids"]
    expected = []
    for ids in ([*good, EOS], [*half * 4, EOS], [*half * 2, EOS], [EOS]):
        with torch.no_grad():
            expected.append(model.score(model.base_model(torch.tensor([before + ids])).last_hidden_state)[0, -1, 0])
    found = ask(reward, ["the movie"] * 4, texts, {"likes": [1] * 4}, written)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)
    plain = reward(["the movie"] * 4, texts)
    assert torch.equal(plain.isclose(found, atol=1e-5), torch.tensor([True, False, False, True]))
    torch.testing.assert_close(
        ask(load_reward([model, model], TOKENIZER), ["the movie"] * 4, texts, {}, written), found
    )
    # A model with other tokens reads the text, and a function never sees the tokens.
    reward.reads_tokens = False
    assert torch.equal(ask(reward, ["the movie"] * 4, texts, {}, written), plain)
    assert ask(lambda prompts, responses: [len(r) for r in responses], ["p"], ["ab"], {}, [[1]]) == [2]
