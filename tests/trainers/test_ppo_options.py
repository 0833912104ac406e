"""The stabilisers of PPO, each against a hand-computed case, and what becomes of a reward that fails."""

import math

import pytest
import torch
from tiny import tiny_gpt2, tiny_tokenizer

import rlhf_fast as rf
from rlhf_fast.rewards import RunningMoments, overlong_penalty
from rlhf_fast.trainers import online

TOKENIZER = tiny_tokenizer()
PROMPTS = [{"prompt": f"the {w} was"} for w in ("movie", "plot", "good", "dull")]


def build(reward=None, **numbers):
    numbers = {"steps": 3, "batch_size": 4, "minibatch_size": 2, "max_new_tokens": 6, "quiet": True} | numbers
    return rf.PPOTrainer(
        tiny_gpt2(seed=1), reward=reward or (lambda prompts, responses: [float(len(r)) for r in responses]),
        prompts=PROMPTS, tokenizer=TOKENIZER, config=rf.PPOConfig(**numbers),
    )  # fmt: skip


def logits_of(model, rollout):
    """``[B, T, V]`` in float64, of the token that each column holds."""
    output = model(input_ids=rollout.ids, attention_mask=rollout.attention.long(),
                   position_ids=(rollout.attention.long().cumsum(-1) - 1).clamp(min=0)).logits.double()  # fmt: skip
    return output[:, rollout.prompt_ids.shape[1] - 1 : -1]


def test_the_exact_kl_is_that_of_the_whole_vocabulary():
    trainer = build(kl="exact", kl_coef=0.3, temperature=0.8, reward=lambda prompts, responses: [0.0] * 4)
    with torch.no_grad():
        for p in trainer.policy.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.02)
    rollout = trainer.rollout(trainer.prompts)
    pi, ref = (torch.log_softmax(logits_of(m, rollout) / 0.8, -1) for m in (trainer.policy, trainer.reference))
    expected = torch.where(rollout.mask, (pi.exp() * (pi - ref)).sum(-1), 0)
    assert expected.max() > 1e-2
    torch.testing.assert_close(rollout.kl.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(trainer.score(rollout).double(), -0.3 * expected, rtol=1e-4, atol=1e-6)
    chosen = torch.where(rollout.mask, pi.gather(-1, rollout.responses[..., None])[..., 0], 0)
    torch.testing.assert_close(rollout.old_logprobs.double(), chosen, rtol=1e-4, atol=1e-5)


def test_the_samplers_logprobs_spare_a_forward_pass_and_differ_by_rounding():
    counted = {"sampler": 0, "recomputed": 0}
    steps = {}
    for source in counted:
        trainer = build(old_logprobs=source)
        forward = trainer.policy.forward

        def count(*args, source=source, forward=forward, **kwargs):
            counted[source] += kwargs.get("past_key_values") is None and not torch.is_grad_enabled()
            return forward(*args, **kwargs)

        trainer.policy.forward = count
        steps[source] = trainer.step(trainer.prompts)
    assert counted["recomputed"] == counted["sampler"] + 2  # two parts of the batch
    for stats in steps.values():
        assert 0 <= stats["mismatch"] < 1e-5
    assert steps["sampler"]["loss"] == pytest.approx(steps["recomputed"]["loss"], abs=1e-5)


def test_the_mismatch_is_what_sampler_and_trainer_differ_by():
    trainer = build()
    rollout = trainer.rollout(trainer.prompts)
    rollout.scores = torch.zeros(4)
    rollout.sampler_logprobs = torch.where(rollout.mask, rollout.old_logprobs - 0.5, 9.0)
    stats = rf.rollout.statistics(rollout, torch.zeros_like(rollout.values), torch.zeros_like(rollout.values))
    assert stats["mismatch"].item() == pytest.approx(0.5, abs=1e-6)
    weighed = online.corrected(torch.ones_like(rollout.values), rollout, 1.2)
    torch.testing.assert_close(weighed, torch.where(rollout.mask, 1.2, 0.0))  # exp(0.5) is more than the cap
    weighed = online.corrected(torch.ones_like(rollout.values), rollout, 5.0)
    torch.testing.assert_close(weighed, torch.where(rollout.mask, math.exp(0.5), 0.0))
    assert online.corrected(weighed, rollout, None) is weighed


def test_running_moments_are_those_of_all_scores_together():
    moments, seen = RunningMoments(), []
    for i in range(5):
        scores = torch.randn(i * 3, generator=torch.Generator().manual_seed(i)) * 2 + 100
        moments.update(scores)
        seen += scores.double().tolist()
        if len(seen) > 1:
            mean = sum(seen) / len(seen)
            assert moments.mean == pytest.approx(mean, rel=1e-12)
            assert moments.std == pytest.approx(
                math.sqrt(sum((x - mean) ** 2 for x in seen) / (len(seen) - 1)), rel=1e-9
            )
    again = RunningMoments()
    again.load_state_dict(moments.state_dict())
    assert (again.mean, again.std) == (moments.mean, moments.std)
    assert RunningMoments().std == 1.0


@pytest.mark.parametrize(("scale", "shift"), [("std", 0.0), ("norm", 2.5)])
def test_scores_are_scaled_by_their_running_moments(scale, shift):
    trainer = build(reward=lambda prompts, responses: [1.0, 2.0, 3.0, 4.0], scale_scores=scale, clip_scores=1.5)
    rollout = trainer.rollout(trainer.prompts)
    std = math.sqrt(5 / 3)  # of 1, 2, 3, 4
    expected = [min(max((x - shift) / std, -1.5), 1.5) for x in (1.0, 2.0, 3.0, 4.0)]
    assert trainer.score(rollout).sum(1).tolist() == pytest.approx(expected)
    assert rollout.scores.tolist() == [1.0, 2.0, 3.0, 4.0]  # what is reported is what the reward said


def test_a_long_response_is_punished_softly():
    lengths = torch.tensor([0, 6, 7, 8, 9, 10, 12])
    got = overlong_penalty(lengths, longest=10, buffer=4)
    assert got.tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    with pytest.raises(ValueError, match="buffer must be between 1 and 10, got 11"):
        overlong_penalty(lengths, longest=10, buffer=11)
    trainer = build(overlong_penalty=2.0, overlong_buffer=3, kl_coef=0.0, reward=lambda prompts, responses: [0.0] * 4)
    rollout = trainer.rollout(trainer.prompts)
    expected = [-2.0 * min(max((n - 3) / 3, 0), 1) for n in rollout.mask.sum(1).tolist()]
    assert trainer.score(rollout).sum(1).tolist() == pytest.approx(expected)
    assert min(expected) == -2.0


def test_the_critic_warms_up_alone():
    trainer = build(critic_warmup_steps=1, learning_rate=1e-2, warmup_ratio=0.0)
    before = [p.clone() for p in trainer.policy.parameters()]
    values = [p.clone() for p in trainer.critic.parameters()]
    first = trainer.step(trainer.prompts)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(values, trainer.critic.parameters(), strict=True))
    assert first["ratio_mean"] == 1
    assert first["grad_norm"] == 0
    trainer.step(trainer.prompts)
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters(), strict=True))


def test_the_clip_may_differ_upwards_and_twice():
    """The numbers reach the loss: a ratio of 1.5 for A = 1 is clipped at 1.3, and one of 30 for A = -1 at 3."""
    trainer = build(cliprange=0.1, cliprange_high=0.3, dual_clip=3.0, vf_coef=0.0)
    rollout = trainer.rollout(trainer.prompts).select(torch.tensor([0]))
    now = online.read(trainer.policy, rollout, trainer.config).logprobs.detach()
    for ratio, advantage, expected in ((1.5, 1.0, -1.3), (30.0, -1.0, 3.0), (0.5, -1.0, 0.9)):
        rollout.old_logprobs = now - math.log(ratio)
        advantages = torch.full_like(now, advantage)
        loss, _ = trainer.loss(rollout, advantages, advantages, rollout.mask.sum())
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_a_stop_token_ends_a_response():
    plain = build(max_new_tokens=12, temperature=1.5).rollout(build().prompts)
    token = int(plain.responses[0, 1])
    text = TOKENIZER.convert_ids_to_tokens(token)
    trainer = build(max_new_tokens=12, temperature=1.5, stop_token=TOKENIZER.convert_tokens_to_string([text]))
    rollout = trainer.rollout(trainer.prompts)
    for ids, mask in zip(rollout.responses, rollout.mask, strict=True):
        said = ids[mask].tolist()
        assert token not in said[:-1]
    assert int(rollout.mask[0].sum()) <= 2
    with pytest.raises(ValueError, match=r"stop_token 'the movie' is [0-9]+ tokens of this tokenizer: it must be one"):
        build(stop_token="the movie")


def failing(prompts, responses):
    if any("good" in p for p in prompts):
        raise KeyError("likes")
    return [1.0] * len(prompts)


def test_a_reward_that_raises_names_the_prompt():
    trainer = build(reward=failing)
    words = r"KeyError at .*test_ppo_options.py:\d+: 'likes'; prompt 3 of 4: 'the good was'"
    with pytest.raises(ValueError, match=words):
        trainer.step(trainer.prompts)


def test_a_batch_whose_reward_raises_may_be_skipped(tmp_path):
    trainer = build(reward=failing, skip_failed_rewards=True, batch_size=2, minibatch_size=2, steps=4)
    trainer.output_dir = tmp_path / "run"
    with pytest.warns(UserWarning, match=r"step \d is skipped: the reward raised KeyError"):
        metrics = trainer.train()
    assert metrics["skipped"] == 2  # four steps are two passes over four prompts, one of which fails
    assert trainer.done == 4
    assert trainer.updates == 2 * 4
