"""GRPO and its relatives: advantages and loss against hand-computed cases, invariances, and that they learn."""

import copy
import itertools
import math

import pytest
import torch
from tiny import tiny_gpt2, tiny_tokenizer

import rlhf_fast as rf
from rlhf_fast.rollout import Rollout
from rlhf_fast.trainers import online

TOKENIZER = tiny_tokenizer()
PROMPTS = [{"prompt": p} for p in ("the movie was", "the plot", "a very bad", "I like this", "not")]


def length(prompts, responses):
    return [float(len(r)) for r in responses]


def build(reward=length, prompts=PROMPTS, **numbers):
    numbers = {"steps": 3, "batch_size": 4, "group_size": 3, "minibatch_size": 12, "max_new_tokens": 6} | numbers
    return rf.GRPOTrainer(
        tiny_gpt2(seed=1),
        reward=reward,
        prompts=prompts,
        tokenizer=TOKENIZER,
        config=rf.GRPOConfig(quiet=True, **numbers),
    )


def perturbed(trainer, scale=0.02):
    """Let the policy differ from its reference."""
    with torch.no_grad():
        for p in trainer.policy.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * scale)
    return trainer


@pytest.mark.parametrize("aggregate", ["token_mean", "seq_mean_token_mean", "longest"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_the_loss_is_the_papers(aggregate, kl_coef):
    """In float64, response by response: the clipped ratio, k3, and the three ways of taking a mean."""
    trainer = perturbed(build(aggregate=aggregate, kl_coef=kl_coef, cliprange=0.1, cliprange_high=0.3))
    rollout, scores, _ = trainer.rollout(trainer.prompts[:4])
    perturbed(trainer, 0.05)
    advantages = trainer.advantages(rollout, scores)
    now = online.read(trainer.policy, rollout, trainer.config).logprobs.double()
    terms = []
    for i in range(len(rollout)):
        m = rollout.mask[i]
        ratio = (now[i] - rollout.old_logprobs[i].double()).exp()[m]
        a = advantages[i].double()
        loss = -torch.minimum(ratio * a, ratio.clamp(0.9, 1.3) * a)
        if kl_coef:
            gap = (now[i] - rollout.ref_logprobs[i].double())[m]
            loss = loss + kl_coef * ((-gap).exp() + gap - 1)
        terms.append(loss)
    expected = {
        "token_mean": torch.cat(terms).mean(),
        "seq_mean_token_mean": torch.stack([t.mean() for t in terms]).mean(),
        "longest": torch.cat(terms).sum() / (12 * 6),
    }[aggregate]
    rows = torch.arange(12)
    loss, stats = trainer.loss(rollout, advantages, trainer.count(rollout, rows))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    assert stats["clipfrac"] > 0


def test_the_advantages_are_those_of_the_groups():
    trainer = build(advantage="grpo", batch_size=2)
    rollout, _, _ = trainer.rollout(trainer.prompts[:2])
    scores = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])
    got = trainer.advantages(rollout, scores)
    assert got.tolist() == pytest.approx([-1.0, 0.0, 1.0, 0, 0, 0], abs=1e-5)
    trainer = build(advantage="rloo", batch_size=2)
    assert trainer.advantages(rollout, scores).tolist() == pytest.approx([-1.5, 0.0, 1.5, 0, 0, 0])


def test_reinforce_pp_pays_the_kl_token_by_token():
    """Returns to go of score and KL, whitened over all tokens of the batch."""
    trainer = perturbed(build(advantage="reinforce_pp", kl_coef=0.5, kl="k1"))
    rollout, scores, _ = trainer.rollout(trainer.prompts[:4])
    got, rows = trainer.advantages(rollout, scores), []
    for i, row in enumerate(rollout.mask):
        n = int(row.sum())
        paid = [-0.5 * (rollout.old_logprobs[i, t] - rollout.ref_logprobs[i, t]).item() for t in range(n)]
        paid[-1] += scores[i].item()
        rows.append([sum(paid[t:]) for t in range(n)])
    flat = torch.tensor(list(itertools.chain(*rows)), dtype=torch.float64)
    expected = (flat - flat.mean()) / flat.std()
    torch.testing.assert_close(got[rollout.mask].double(), expected, rtol=1e-4, atol=1e-5)
    loss, stats = trainer.loss(rollout, got, trainer.count(rollout, torch.arange(12)))
    assert stats["kl"] == 0  # it is in the rewards, not once more in the loss
    assert math.isfinite(loss.item())


@pytest.mark.parametrize("aggregate", ["token_mean", "seq_mean_token_mean", "longest"])
def test_the_gradient_does_not_depend_on_the_micro_batches(aggregate):
    gradients = []
    for size in (1, 4, 12):
        trainer = build(aggregate=aggregate, micro_batch_size=size, kl_coef=0.1, entropy_coef=0.01)
        rollout, scores, _ = trainer.rollout(trainer.prompts[:4])
        online.accumulate(trainer, rollout, (trainer.advantages(rollout, scores),), torch.arange(12))
        gradients.append([p.grad.clone() for p in trainer.policy.parameters()])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_groups_of_equal_scores_are_drawn_anew():
    """Three of four prompts give every response the same score: the groups that do not are looked for."""

    def only_plot(prompts, responses):
        return [float(len(r)) if p == "the plot" else 0.0 for p, r in zip(prompts, responses, strict=True)]

    plain, again = build(only_plot), build(only_plot, resample=30)
    rollout, scores, equal = plain.rollout(plain.prompts[:4])
    assert equal == 0.75
    assert sum(online.equal_groups(scores, 3)) == 3
    rollout, scores, equal = again.rollout(again.prompts[:4])
    assert equal == 0.75
    assert len(rollout) == len(scores) == 12
    assert sum(online.equal_groups(scores, 3)) == 0
    assert set(rollout.prompts) == {"the plot"}
    for start in range(0, 12, 3):
        assert len(set(rollout.prompts[start : start + 3])) == 1
        assert torch.equal(scores[start : start + 3], torch.tensor(only_plot(
            rollout.prompts[start : start + 3], rollout.texts[start : start + 3])))  # fmt: skip
    read = online.read(again.policy, rollout, again.config).logprobs
    torch.testing.assert_close(rollout.old_logprobs, read, rtol=0, atol=1e-5)
    torch.testing.assert_close(rollout.sampler_logprobs, read, rtol=0, atol=1e-5)


def test_joined_rollouts_are_read_as_their_parts():
    trainer = build(kl_coef=0.1)
    parts = [trainer.rollout([prompt])[0] for prompt in trainer.prompts[:3]]
    whole = Rollout.join(parts)
    assert whole.texts == [t for part in parts for t in part.texts]
    read = online.read(trainer.policy, whole, trainer.config).logprobs
    torch.testing.assert_close(torch.where(whole.mask, read, 0), whole.old_logprobs, rtol=0, atol=1e-5)
    back = whole.select(torch.arange(3, 6))
    for name in ("ids", "attention", "mask", "old_logprobs"):
        assert torch.equal(getattr(back, name), getattr(parts[1], name)), name


def test_truncated_responses_may_be_left_out():
    trainer = build(learn_truncated=False, max_new_tokens=8)
    rollout, scores, _ = trainer.rollout(trainer.prompts[:4])
    rollout.ended = torch.arange(12) % 2 == 0
    kept = rollout.select(torch.arange(0, 12, 2))
    a = trainer.loss(rollout, scores, trainer.count(rollout, torch.arange(12)))
    b = trainer.loss(kept, scores[::2], kept.mask.sum())
    assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-5)
    rollout.ended = torch.zeros(12, dtype=torch.bool)
    nothing, _ = trainer.loss(rollout, scores, trainer.count(rollout, torch.arange(12)))
    assert nothing.item() == 0


@pytest.mark.parametrize("aggregate", ["token_mean", "seq_mean_token_mean", "longest"])
def test_a_batch_of_which_nothing_ends_teaches_nothing(aggregate):
    numbers = {"aggregate": aggregate, "kl_coef": 0.1, "entropy_coef": 0.01, "missing_eos_penalty": 1.0}
    trainer = build(learn_truncated=False, max_new_tokens=3, packing=aggregate == "longest", **numbers)
    trainer.stop_ids = []
    before = copy.deepcopy(trainer.policy.state_dict())
    stats = trainer.step(trainer.prompts[:4])
    assert (stats["ended"], stats["loss"], stats["grad_norm"]) == (0, 0, 0)
    assert all(math.isfinite(value) for value in stats.values())
    assert all(torch.equal(before[name], weight) for name, weight in trainer.policy.state_dict().items())


def test_a_minibatch_of_which_nothing_ends_leaves_the_weights_and_the_figures_alone():
    """AdamW would go on from the minibatches before, and an entropy of 0 would be taken for that of a policy."""
    trainer = build(learn_truncated=False, max_new_tokens=3, learning_rate=1e-3)
    trainer.stop_ids = list(range(100))
    assert trainer.step(trainer.prompts[:4])["grad_norm"] > 0
    trainer.stop_ids, before = [], copy.deepcopy(trainer.policy.state_dict())
    trainer.step(trainer.prompts[:4])
    assert all(torch.equal(before[name], weight) for name, weight in trainer.policy.state_dict().items())
    assert (trainer.done, trainer.updates) == (2, 1)

    rollout, scores, _ = trainer.rollout(trainer.prompts[:4])
    found = []
    for size in (3, 12):
        trainer = build(learn_truncated=False, max_new_tokens=3, minibatch_size=size, learning_rate=0.0)
        rollout.ended = torch.arange(12) == 5
        found.append(trainer.update(rollout, scores))
        assert trainer.updates == 1
    names = "entropy", "ratio_mean", "approx_kl", "clipfrac"
    assert [found[0][name] for name in names] == pytest.approx([found[1][name] for name in names], rel=1e-5)


@pytest.mark.parametrize("micro", [None, 5])
def test_what_is_counted_by_the_token_does_not_depend_on_the_room_for_others(micro):
    found = []
    for aggregate in ("token_mean", "longest"):
        trainer = build(aggregate=aggregate, max_new_tokens=8, micro_batch_size=micro, old_logprobs="sampler")
        trainer.stop_ids = list(range(200))
        rollout, scores, _ = trainer.rollout(trainer.prompts[:4])
        assert rollout.mask.sum() < 12 * 8 / 2
        found.append(trainer.update(perturbed(trainer) and rollout, scores))
    names = "entropy", "ratio_mean", "approx_kl", "clipfrac"
    assert [found[0][name] for name in names] == pytest.approx([found[1][name] for name in names], rel=1e-5)
    assert found[0]["clipfrac"] > 0


def test_without_a_price_there_is_no_reference():
    assert build().reference is None
    stats = build().step(build().prompts[:4])
    assert stats["kl"] == 0
    assert {"scores", "rewards", "zero_variance", "mismatch", "loss", "ratio_max", "grad_norm", "lr"} <= set(stats)


def test_a_failed_reward_is_skipped_where_that_is_asked_for():
    def failing(prompts, responses):
        raise RuntimeError("down")

    trainer = build(failing)
    with pytest.raises(ValueError, match=r"RuntimeError.*down; prompt 1 of 12"):
        trainer.step(trainer.prompts[:4])
    trainer = build(failing, skip_failed_rewards=True)
    with pytest.warns(UserWarning, match="step 1 is skipped"):
        assert trainer.step(trainer.prompts[:4]) == {"skipped": 1.0}
    assert trainer.done == 1


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"group_size": 1}, "GRPOConfig.group_size must be at least 2, got 1"),
        ({"advantage": "ppo"}, "GRPOConfig.advantage must be one of grpo, dr_grpo, rloo, reinforce_pp, got 'ppo'"),
        ({"share": "half"}, "GRPOConfig.share must be none, lora or hydra:k, say hydra:2, got 'half'"),
    ],
)
def test_a_value_out_of_range_is_named(bad, words):
    with pytest.raises(ValueError, match=words):
        rf.GRPOConfig(**bad)


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo", "reinforce_pp"])
def test_it_learns(advantage):
    """The reward is the share of " good" in what is written; a policy that has no idea begins near 0."""
    token = TOKENIZER(" good")["input_ids"]
    assert len(token) == 1

    def goodness(prompts, responses):
        return [r.count("good") / 4 for r in responses]

    trainer = build(
        goodness, advantage=advantage, steps=30, batch_size=4, group_size=8, minibatch_size=32, max_new_tokens=4,
        learning_rate=1e-2 if advantage != "dr_grpo" else 2e-2, warmup_ratio=0.0,
    )  # fmt: skip
    seen = [trainer.step(batch)["scores"] for batch in trainer.batches()]
    assert seen[0] < 0.1
    assert sum(seen[-5:]) / 5 > 0.6


def test_the_reward_models_leave_room_for_an_end_token():
    """Two of them, of which the shorter counts; the policy itself reads 128 tokens."""
    members = [rf.models.load_scalar_model(tiny_gpt2(n_positions=n)) for n in (12, 20)]
    for reward in (members, members[0]):
        build(reward=reward, prompts=[{"prompt": " the" * 5}], steps=1, batch_size=1, minibatch_size=3).train()
        with pytest.raises(ValueError, match="record 1: the prompt is 6 tokens long, and 5 fit"):
            build(reward=reward, prompts=[{"prompt": " the" * 6}])


def test_an_ensemble_is_the_reward_of_a_run():
    ensemble = rf.EnsembleReward([length, lambda p, r: [0.0] * len(r)], combine="mean_minus_std", caution=2.0)
    trainer = build(reward=ensemble)
    rollout, scores, _ = trainer.rollout(trainer.prompts[:4])
    lengths = torch.tensor(length(None, rollout.texts))
    torch.testing.assert_close(scores, lengths / 2 - 2 * lengths / 2**0.5)
    torch.testing.assert_close(ensemble.uncertainty, lengths / 2**0.5)
