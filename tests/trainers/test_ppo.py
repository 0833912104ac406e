"""PPO: one step against the formulas in float64, the invariances, and a reward that really rises."""

import copy
import itertools
import json
import math

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

from rlhf_fast import ops
from rlhf_fast.losses import whiten
from rlhf_fast.trainers import learning, online
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer

PROMPTS = ["the movie", "a plot was very", "I like this", "the", "this movie is not very fun and", "dull plot"]


def length_score(prompts, responses, **columns):
    """Not constant, cheap, and the same for every run."""
    return [float(len(text) % 7) - 3.0 for text in responses]


def build(*, reward=length_score, pad_is_eos=False, make=tiny_gpt2, prompts=PROMPTS, columns=None, **config):
    tokenizer = tiny_tokenizer(pad_is_eos)
    records = [{"prompt": p, **{k: v[i] for k, v in (columns or {}).items()}} for i, p in enumerate(prompts)]
    settings = {"batch_size": 6, "minibatch_size": 3, "max_new_tokens": 8, "steps": 4, "quiet": True, **config}
    return PPOTrainer(
        make(tokenizer), reward=reward, prompts=records, tokenizer=tokenizer, config=PPOConfig(**settings)
    )


def collect(trainer):
    """What ``step`` hands to ``update``: a rollout, its advantages and its returns."""
    handed = []
    trainer.update = lambda *given: handed.extend(given) or {}
    trainer.step(trainer.prompts)
    del trainer.update
    trainer.done = 0
    return handed


def shake(model, size=0.02):
    """Move the weights, so that the policy is no longer the one that wrote the responses."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += size * torch.randn(weight.shape, generator=generator)


def end_sooner(trainer):
    """Raise the end token's chance from 1/370 to about one in ten."""
    with torch.no_grad():
        policy = trainer.policy.transformer
        policy.ln_f.bias += 3 * policy.wte.weight[trainer.tokenizer.eos_token_id]


def gradients(*models):
    return torch.cat([p.grad.flatten() for model in models for p in model.parameters() if p.grad is not None])


# One step against the formulas


def test_advantages_are_whitened_unless_told_not_to():
    for whitened in (True, False):
        rollout, advantages, returns = collect(build(whiten_advantages=whitened))
        kept = advantages[rollout.mask]
        if whitened:
            assert kept.mean().item() == pytest.approx(0, abs=1e-6)
            assert kept.var().item() == pytest.approx(1, abs=1e-5)
        else:
            torch.testing.assert_close(kept, (returns - rollout.values)[rollout.mask], atol=1e-6, rtol=0)


def formulas(rollout, scores, config, policy, old_policy, reference, critic, old_critic, kl_coef):
    """PPO from the papers, one sequence at a time without padding, in float64; returns the loss."""
    sequences = []
    for i in range(len(rollout)):
        prompt, response = rollout.prompt_ids[i][rollout.prompt_mask[i]], rollout.responses[i][rollout.mask[i]]
        ids, n = torch.cat([prompt, response])[None], len(response)

        def logp(model, ids=ids, n=n):
            logits = model(ids).logits[0, -n - 1 : -1] / config.temperature
            return torch.log_softmax(logits, -1), ids[0, -n:]

        def value(model, ids=ids, n=n):
            return model.score(model.transformer(ids).last_hidden_state)[0, -n - 1 : -1, 0]

        with torch.no_grad():
            table, y = logp(old_policy)
            old = table.gather(-1, y[:, None])[:, 0]
            table, _ = logp(reference)
            ref = table.gather(-1, y[:, None])[:, 0]
            old_value = value(old_critic)
        rewards = -kl_coef * (old - ref)
        rewards[-1] += scores[i]
        advantages, following, carried = torch.zeros(n).double(), 0.0, 0.0
        for t in reversed(range(n)):
            delta = rewards[t] + config.gamma * following - old_value[t]
            carried = delta + config.gamma * config.lam * carried
            advantages[t], following = carried, old_value[t]
        table, y = logp(policy)
        now = table.gather(-1, y[:, None])[:, 0]
        entropy = -(table.exp() * table).sum(-1)
        sequences.append((now, old, entropy, value(critic), old_value, advantages, advantages + old_value))
    now, old, entropy, new_value, old_value, advantages, returns = (
        torch.cat([s[k] for s in sequences]) for k in range(7)
    )
    advantages = (advantages - advantages.mean()) / (advantages.var(unbiased=True) + 1e-8).sqrt()
    ratio = (now - old).exp()
    low, high = 1 - config.cliprange, 1 + config.cliprange
    policy_loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high)).mean()
    near = old_value + (new_value - old_value).clamp(-config.cliprange_value, config.cliprange_value)
    value_loss = 0.5 * torch.maximum((new_value - returns) ** 2, (near - returns) ** 2).mean()
    return policy_loss + config.vf_coef * value_loss - config.entropy_coef * entropy.mean()


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_one_minibatch_is_the_papers_loss_and_gradient(pad_is_eos):
    trainer = build(
        pad_is_eos=pad_is_eos, minibatch_size=6, micro_batch_size=4, temperature=0.7, kl_coef=0.3, gamma=0.97, lam=0.9,
        vf_coef=0.4, entropy_coef=0.05, cliprange=0.1, cliprange_value=0.05, max_grad_norm=1e9,
    )  # fmt: skip
    shake(trainer.policy)  # the reference stays where it was: a KL other than 0
    torch.nn.init.normal_(trainer.critic.score.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    old_policy, old_critic = copy.deepcopy(trainer.policy).double(), copy.deepcopy(trainer.critic).double()
    rollout, advantages, returns = collect(trainer)
    assert rollout.mask.sum(1).unique().numel() > 1 or rollout.prompt_mask.sum(1).unique().numel() > 1
    shake(trainer.policy, 0.01)
    shake(trainer.critic, 0.01)
    stats = online.accumulate(trainer, rollout, (advantages, returns), torch.randperm(6))
    policy, critic = copy.deepcopy(trainer.policy).double(), copy.deepcopy(trainer.critic).double()
    for model in (policy, critic):
        model.zero_grad()
    reference = copy.deepcopy(trainer.reference).double()
    scores = length_score(rollout.prompts, rollout.texts)
    loss = formulas(rollout, scores, trainer.config, policy, old_policy, reference, critic, old_critic, trainer.kl_coef)
    loss.backward()
    assert 0.02 < stats["clipfrac"] < 1
    assert stats["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for ours, theirs in ((trainer.policy, policy), (trainer.critic, critic)):
        expected = gradients(theirs)
        # The reference is float64; the trainer's float32 passes differ from it by some 1e-6 of the largest entry.
        assert (gradients(ours) - expected).abs().max() < 2e-5 * expected.abs().max()


# Invariances


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_ratio_of_the_first_minibatch_is_one(make, temperature):
    trainer = build(make=make, temperature=temperature)
    rollout, advantages, returns = collect(trainer)
    rows = torch.tensor([4, 0, 2])
    stats = online.accumulate(trainer, rollout, (advantages, returns), rows)
    assert stats["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert stats["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert stats["approx_kl"] < 1e-10
    assert stats["clipfrac"] == 0
    assert stats["value_clipfrac"] == 0
    mask = rollout.mask[rows]
    assert stats["policy_loss"] == pytest.approx(-(advantages[rows][mask]).mean().item(), abs=1e-6)


def test_what_decoding_returned_is_what_the_forward_pass_reads():
    trainer = build(temperature=0.8)
    rollout = trainer.rollout(trainer.prompts)
    from rlhf_fast.generate import decode

    again = decode(
        trainer.policy, rollout.prompt_ids, rollout.prompt_mask, max_new_tokens=8, stop_ids=trainer.stop_ids,
        pad_id=trainer.tokenizer.pad_token_id, temperature=0.8, seeds=torch.arange(6),
    )  # fmt: skip
    rollout.responses, rollout.mask = again.responses, again.mask
    torch.testing.assert_close(
        online.read(trainer.policy, rollout, trainer.config).logprobs, again.logprobs, atol=1e-5, rtol=0
    )


def more_padding(rollout, left, right, junk):
    wider = copy.copy(rollout)
    prompt_pad, pad = (
        (lambda x, v: torch.nn.functional.pad(x, (left, 0), value=v)),
        (lambda x, v: torch.nn.functional.pad(x, (0, right), value=v)),
    )
    wider.prompt_ids, wider.prompt_mask = prompt_pad(rollout.prompt_ids, junk), prompt_pad(rollout.prompt_mask, False)
    wider.responses, wider.mask = pad(rollout.responses, junk), pad(rollout.mask, False)
    for name in ("old_logprobs", "ref_logprobs", "values"):
        setattr(wider, name, pad(getattr(rollout, name), math.nan))
    return wider


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 4), (3, 7)])
def test_padding_changes_no_number(make, left, right):
    trainer = build(make=make, minibatch_size=6, max_grad_norm=1e9)
    shake(trainer.policy)
    rollout, advantages, returns = collect(trainer)
    wider = more_padding(rollout, left, right, junk=7)
    width = rollout.mask.shape[1]
    rewards = trainer.score(wider)
    c = trainer.config
    more_advantages, more_returns = ops.gae(rewards, wider.values, wider.mask, gamma=c.gamma, lam=c.lam)
    more_advantages = whiten(more_advantages, wider.mask)
    torch.testing.assert_close(more_advantages[:, :width], advantages, atol=1e-6, rtol=0)
    torch.testing.assert_close(more_returns[:, :width], returns, atol=1e-6, rtol=0)
    shake(trainer.policy, 0.01)
    results = []
    for case in ((rollout, advantages, returns), (wider, more_advantages, more_returns)):
        loss, stats = trainer.loss(*case, rollout.mask.sum())
        loss.backward()
        results.append(({"loss": loss.item()} | learning.numbers(stats), gradients(trainer.policy, trainer.critic)))
        trainer.optimizer.zero_grad(set_to_none=True)
    (stats, gradient), (more_stats, more_gradient) = results
    for name, value in stats.items():
        # Sums of another length are rounded otherwise: the largest ratio, and it alone, shows the 1e-6 of one logit.
        assert more_stats[name] == pytest.approx(value, abs=1e-6, rel=1e-5 if name == "ratio_max" else 0), name
    torch.testing.assert_close(more_gradient, gradient, atol=1e-6 * gradient.abs().max().item(), rtol=1e-4)


def test_a_long_neighbour_changes_no_response():
    trainer = build(prompts=[*PROMPTS, "the movie is " * 20])
    short = trainer.rollout(trainer.prompts[:2])
    beside = trainer.rollout([trainer.prompts[0], trainer.prompts[6]])
    n = int(short.mask[0].sum())
    assert short.texts[0] == beside.texts[0]
    assert n == int(beside.mask[0].sum())
    for name in ("old_logprobs", "ref_logprobs", "values"):
        torch.testing.assert_close(getattr(short, name)[0, :n], getattr(beside, name)[0, :n], atol=1e-5, rtol=0)


def test_a_selection_drops_the_padding_that_all_of_it_shares():
    trainer = build()
    end_sooner(trainer)
    rollout = trainer.rollout(trainer.prompts)
    lengths, prompt_lengths = rollout.mask.sum(1), rollout.prompt_mask.sum(1)
    assert lengths.unique().numel() > 1
    for rows in ([0], [3, 1], [5, 2, 0], [0, 1, 2, 3, 4, 5]):
        part = rollout.select(torch.tensor(rows))
        assert part.prompt_ids.shape == part.prompt_mask.shape == (len(rows), prompt_lengths[rows].max())
        assert part.mask.shape == part.values.shape == (len(rows), lengths[rows].max())
        for i, row in enumerate(rows):
            assert torch.equal(part.ids[i][part.attention[i]], rollout.ids[row][rollout.attention[row]])
            kept = part.old_logprobs[i][part.mask[i]]
            assert torch.equal(kept, rollout.old_logprobs[row][rollout.mask[row]])
            assert part.texts[i] == rollout.texts[row]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_micro_batches_add_up_to_the_minibatch(size):
    results = []
    for micro in (None, size):
        trainer = build(minibatch_size=6, micro_batch_size=micro, max_grad_norm=1e9, entropy_coef=0.1)
        collected = collect(trainer)
        shake(trainer.policy, 0.01)
        stats = online.accumulate(trainer, collected[0], tuple(collected[1:]), torch.arange(6))
        results.append((stats, gradients(trainer.policy, trainer.critic)))
    (stats, gradient), (more_stats, more_gradient) = results
    torch.testing.assert_close(more_gradient, gradient, atol=1e-6 * gradient.abs().max().item(), rtol=1e-4)
    for name, value in stats.items():
        assert more_stats[name] == pytest.approx(value, abs=1e-6, rel=1e-5), name


def test_pad_may_equal_eos():
    """The stop token is learned from although it is also the pad token, and what follows it is not."""
    by_padding = []
    for pad_is_eos in (False, True):
        trainer = build(pad_is_eos=pad_is_eos)
        end_sooner(trainer)
        rollout, advantages, returns = collect(trainer)
        assert rollout.ended.any()
        for row in range(len(rollout)):
            length = int(rollout.mask[row].sum())
            response = rollout.responses[row, :length].tolist()
            assert rollout.ended[row].item() == (response[-1] == trainer.tokenizer.eos_token_id)
            assert trainer.tokenizer.eos_token_id not in response[:-1]
        stats = online.accumulate(trainer, rollout, (advantages, returns), torch.arange(6))
        by_padding.append((rollout.texts, stats))
    assert by_padding[0][0] == by_padding[1][0]
    for name, value in by_padding[0][1].items():
        assert by_padding[1][1][name] == pytest.approx(value, abs=1e-6, rel=1e-5), name


# The loop


def test_the_same_seed_gives_the_same_run(tmp_path):
    lines = []
    for name in ("a", "b"):
        torch.manual_seed(len(lines))  # the run has streams of its own
        trainer = build(steps=2, learning_rate=1e-3, seed=5)
        trainer.output_dir = tmp_path / name
        trainer.train()
        records = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        lines.append([{k: v for k, v in record.items() if k != "time"} for record in records])
    assert lines[0] == lines[1]
    assert len(lines[0]) == 2


def test_metrics_have_their_names_and_values(tmp_path):
    trainer = build(steps=3, learning_rate=1e-3, kl_coef=0.2, sample_every=2)
    trainer.output_dir = tmp_path / "run"
    metrics = trainer.train()
    names = """loss policy_loss value_loss entropy kl approx_kl clipfrac value_clipfrac ratio_mean ratio_max scores
        first_approx_kl mismatch skipped rewards kl_coef response_length ended explained_variance lr grad_norm
        critic_grad_norm"""
    assert set(metrics) == set(names.split())
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert first["kl"] == pytest.approx(0, abs=1e-6)  # the reference is the policy before its first step
    assert first["rewards"] == pytest.approx(first["scores"], abs=1e-6)
    assert first["kl_coef"] == 0.2
    assert first["explained_variance"] == pytest.approx(0, abs=1e-6)  # a critic whose head is zero
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {2}
    assert all(s["score"] == len(s["response"]) % 7 - 3 for s in samples)
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again(ids).logits, trainer.policy(ids).logits)


def test_your_own_loop_needs_no_folder():
    trainer = build(steps=2)
    stats = [trainer.step(batch) for batch in trainer.batches()]
    assert len(stats) == 2
    assert trainer.updates == 2 * 4 * 2  # steps, epochs, minibatches


def test_batches_pass_over_all_prompts_before_any_comes_again():
    trainer = build(batch_size=4, minibatch_size=2, steps=3)
    seen = [example.prompt for batch in trainer.batches() for example in batch]
    assert len(seen) == 12
    assert sorted(seen[:6]) == sorted(seen[6:]) == sorted(PROMPTS)


def test_other_columns_reach_the_reward():
    calls = []

    def reward(prompts, responses, **columns):
        calls.append((prompts, responses, columns))
        return torch.zeros(len(responses))

    trainer = build(reward=reward, columns={"topic": list("abcdef")})
    trainer.rollout_of = trainer.score(trainer.rollout(trainer.prompts[2:5]))
    (prompts, responses, columns) = calls[0]
    assert prompts == PROMPTS[2:5]
    assert len(responses) == 3
    assert columns == {"topic": ["c", "d", "e"]}


def test_a_dense_reward_lands_on_its_tokens():
    trainer = build(reward=lambda prompts, responses, **_: torch.arange(8.0).repeat(len(prompts), 1), kl_coef=0.0)
    rollout = trainer.rollout(trainer.prompts)
    width = rollout.mask.shape[1]
    expected = torch.where(rollout.mask, torch.arange(8.0)[:width], 0)
    torch.testing.assert_close(trainer.score(rollout), expected)


def test_what_a_dense_reward_says_of_padding_is_not_read():
    trainer = build(kl_coef=0.0)
    end_sooner(trainer)
    rollout = trainer.rollout(trainer.prompts)
    assert not rollout.mask.all()
    dense = torch.where(rollout.mask, 1.0, torch.nan)
    trainer.reward = lambda prompts, responses, **_: dense
    assert trainer.score(rollout).sum(1).tolist() == rollout.mask.sum(1).tolist()


def test_a_response_that_never_ends_costs_the_penalty():
    trainer = build(kl_coef=0.0, missing_eos_penalty=2.0, reward=lambda prompts, responses, **_: [1.0] * len(prompts))
    end_sooner(trainer)
    rollout = trainer.rollout(trainer.prompts)
    assert 0 < rollout.ended.sum() < 6
    assert trainer.score(rollout).sum(1).tolist() == [1.0 if ended else -1.0 for ended in rollout.ended]
    dense = torch.ones(rollout.mask.shape)
    trainer.reward = lambda prompts, responses, **_: dense
    paid = rollout.mask.sum(1) - 2.0 * ~rollout.ended
    assert trainer.score(rollout).sum(1).tolist() == paid.tolist()


def test_the_passes_stop_early_when_the_policy_has_moved_too_far():
    free = build(learning_rate=3e-2, warmup_ratio=0.0, steps=1)
    far = free.step(next(free.batches()))["approx_kl"]
    held = build(learning_rate=3e-2, warmup_ratio=0.0, steps=1, stop_kl=far / 10)
    held.step(next(held.batches()))
    assert free.updates == 8
    assert 1 <= held.updates < 8
    assert all(p.grad is None for p in held.policy.parameters())


def test_the_adaptive_coefficient_follows_the_kl():
    rising = build(kl_coef=0.1, kl_target=1e-3, kl_horizon=60.0, steps=3, learning_rate=1e-2)
    taken = [rising.step(batch) for batch in rising.batches()]
    assert taken[0]["kl_coef"] == 0.1
    for before, after in itertools.pairwise(taken):
        error = min(max(before["kl"] / 1e-3 - 1, -0.2), 0.2)
        assert after["kl_coef"] == pytest.approx(before["kl_coef"] * (1 + error * 6 / 60))
    for stats in taken:  # each step pays the price of its time
        assert stats["rewards"] == pytest.approx(stats["scores"] - stats["kl_coef"] * stats["kl"], abs=1e-5)
    assert taken[1]["kl"] > 1e-3
    assert rising.kl_coef > taken[1]["kl_coef"]


def test_reward_rises():
    """The share of characters that are vowels; a random model is far below what PPO reaches in 60 steps."""

    def vowels(prompts, responses, **_):
        return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in responses]

    trainer = build(
        reward=vowels, steps=60, batch_size=32, minibatch_size=16, ppo_epochs=2, learning_rate=3e-3, kl_coef=0.005,
        critic_learning_rate=1e-2, schedule="constant",
    )  # fmt: skip
    scores = [trainer.step(batch)["scores"] for batch in trainer.batches()]
    assert sum(scores[:3]) / 3 < 0.3
    assert sum(scores[-5:]) / 5 > 0.7


def test_whitened_rewards_keep_their_mean():
    plain, white = (build(whiten_rewards=w) for w in (False, True))
    rollout = plain.rollout(plain.prompts)
    before, after = (trainer.score(rollout)[rollout.mask] for trainer in (plain, white))
    assert after.var().item() == pytest.approx(1, abs=1e-4)
    assert after.mean().item() == pytest.approx(before.mean().item(), abs=1e-5)


def test_scores_are_clipped_before_the_kl_is_paid():
    trainer = build(clip_scores=1.5, kl_coef=0.1)
    shake(trainer.policy)
    rollout = trainer.rollout(trainer.prompts)
    rewards = trainer.score(rollout).sum(1)
    kl = (rollout.old_logprobs - rollout.ref_logprobs).sum(1)
    assert rollout.scores.abs().max() > 1.5
    torch.testing.assert_close(rewards, rollout.scores.clamp(-1.5, 1.5) - 0.1 * kl, atol=1e-5, rtol=0)


def test_bfloat16_keeps_float32_weights_and_a_ratio_of_one():
    trainer = build(precision="bf16", learning_rate=1e-3)
    rollout, advantages, returns = collect(trainer)
    stats = online.accumulate(trainer, rollout, (advantages, returns), torch.arange(6))
    # Old and new logprobs come from the same bfloat16 pass over other batches: the ratio differs by its rounding.
    assert stats["ratio_mean"] == pytest.approx(1, abs=1e-2)
    assert stats["approx_kl"] < 1e-3
    before = copy.deepcopy(trainer.policy.state_dict())
    assert math.isfinite(trainer.step(trainer.prompts)["loss"])
    after = trainer.policy.state_dict()
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert any(not torch.equal(before[k], after[k]) for k in before)
    exact = build(learning_rate=1e-3)
    assert online.read(trainer.reference, rollout, trainer.config).logprobs.dtype == torch.float32
    rounded, full = (online.read(t.reference, rollout, t.config).logprobs for t in (trainer, exact))
    difference = rounded - full
    assert 1e-6 < difference.abs().max() < 0.2  # it really ran in bfloat16


def test_the_critic_starts_as_the_reward_model_where_both_read_the_same_tokens():
    from rlhf_fast.models import load_scalar_model

    torch.manual_seed(0)
    judge = load_scalar_model(tiny_gpt2(seed=7))
    trainer = build(reward=judge)
    for name, weight in judge.state_dict().items():
        assert torch.equal(trainer.critic.state_dict()[name], weight), name
    trainer.step(next(trainer.batches()))
    assert not torch.equal(trainer.critic.score.weight, judge.score.weight)  # a copy: the judge does not learn
    frozen = build(reward=load_scalar_model(tiny_gpt2(seed=7)).requires_grad_(False))
    assert all(weight.requires_grad for weight in frozen.critic.parameters())
    assert not any(weight.requires_grad for weight in frozen.reward.model.parameters())
    assert build().critic.score.weight.abs().max() == 0  # no reward model: the policy's backbone and a head of zeros
    given = load_scalar_model(tiny_gpt2(seed=9))
    tokenizer = tiny_tokenizer()
    trainer = PPOTrainer(
        tiny_gpt2(tokenizer), reward=judge, prompts=[{"prompt": "the"}], tokenizer=tokenizer, critic=given
    )
    assert torch.equal(trainer.critic.score.weight, given.score.weight)


def test_the_reference_may_be_another_model():
    tokenizer = tiny_tokenizer()
    other = tiny_gpt2(tokenizer, seed=4)
    trainer = PPOTrainer(
        tiny_gpt2(tokenizer), reward=length_score, prompts=[{"prompt": p} for p in PROMPTS], tokenizer=tokenizer,
        reference=other, config=PPOConfig(batch_size=6, minibatch_size=6, max_new_tokens=8, quiet=True, steps=1),
    )  # fmt: skip
    rollout = trainer.rollout(trainer.prompts)
    ids = torch.cat([rollout.prompt_ids[0][rollout.prompt_mask[0]], rollout.responses[0][rollout.mask[0]]])
    n = int(rollout.mask[0].sum())
    table = torch.log_softmax(other(ids[None]).logits[0, -n - 1 : -1], -1)
    expected = table.gather(-1, ids[-n:, None])[:, 0]
    torch.testing.assert_close(rollout.ref_logprobs[0, :n], expected, atol=1e-5, rtol=0)
    assert trainer.step(trainer.prompts)["kl"] > 0.1


# Bad input


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda prompts, responses, **_: [0.0], "1"),
        (lambda prompts, responses, **_: [math.nan] * len(prompts), "nan|NaN"),
    ],
)
def test_a_reward_that_returns_the_wrong_thing_is_refused(reward, words):
    trainer = build(reward=reward)
    before = copy.deepcopy(trainer.policy.state_dict())
    with pytest.raises(ValueError, match=words):
        trainer.step(next(trainer.batches()))
    assert all(torch.equal(before[k], v) for k, v in trainer.policy.state_dict().items())


def test_nan_in_the_loss_leaves_the_weights_alone(tmp_path, monkeypatch):
    trainer = build(steps=5, learning_rate=1e-3)
    trainer.output_dir = tmp_path / "run"
    good = {}

    def poison(self=trainer, read=online.read):
        def failing(model, rollout, config):
            output = read(model, rollout, config)
            if self.done == 2 and torch.is_grad_enabled():
                good.update(copy.deepcopy(self.policy.state_dict()))
                return output._replace(logprobs=output.logprobs * math.nan)
            return output

        return failing

    monkeypatch.setattr(online, "read", poison())
    with pytest.raises(FloatingPointError, match=r"^step 3: loss is nan; last good checkpoint: .*checkpoints/step-2$"):
        trainer.train()
    assert all(torch.equal(good[k], v) for k, v in trainer.policy.state_dict().items())
    assert all(p.grad is None for p in trainer.policy.parameters())
    from transformers import AutoModelForCausalLM

    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoints/step-2").state_dict()
    assert all(torch.equal(kept[k], v) for k, v in trainer.policy.state_dict().items() if k in kept)


def test_a_frozen_policy_or_critic_is_refused():
    from rlhf_fast.models import load_scalar_model

    with pytest.raises(ValueError, match="no weight of GPT2LMHeadModel can be trained: requires_grad is False on all"):
        build(make=lambda tokenizer: tiny_gpt2(tokenizer).requires_grad_(False))
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="no weight of GPT2ForSequenceClassification can be trained"):
        PPOTrainer(
            tiny_gpt2(tokenizer), reward=length_score, prompts=[{"prompt": "the"}], tokenizer=tokenizer,
            critic=load_scalar_model(tiny_gpt2(tokenizer)).requires_grad_(False),
        )  # fmt: skip


@pytest.mark.parametrize("role", ["critic", "reference"])
def test_a_model_that_lacks_the_tokens_of_the_policy_is_refused(role):
    tokenizer = tiny_tokenizer()
    small = tiny_gpt2(tokenizer)
    small.resize_token_embeddings(100)
    given = {"reward": length_score, "prompts": [{"prompt": "the movie"}], "tokenizer": tokenizer, role: small}
    with pytest.raises(ValueError, match=r"the tokenizer's token \d+ is none of the model's 100"):
        PPOTrainer(tiny_gpt2(tokenizer), **given)


def test_a_minibatch_larger_than_the_batch_is_refused():
    with pytest.raises(ValueError, match=r"PPOConfig.minibatch_size 16 exceeds batch_size 4"):
        PPOConfig(batch_size=4)


def test_a_prompt_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="120"):
        build(prompts=["the movie " * 100])


@pytest.mark.parametrize(("role", "fit"), [("critic", 6), ("reference", 6), ("reward", 5)])
def test_every_model_has_room_for_prompt_and_response(role, fit):
    from rlhf_fast.models import load_scalar_model

    tokenizer = tiny_tokenizer()
    short = tiny_gpt2(tokenizer, n_positions=12)  # 6 of them for the response; a reward model reads an end token too
    given = {"reward": length_score, role: load_scalar_model(short) if role == "reward" else short}
    config = PPOConfig(steps=1, batch_size=1, minibatch_size=1, max_new_tokens=6, top_p=0.01, quiet=True)
    for length in (fit, fit + 1):
        prompts = [{"prompt": " the" * length}]
        if length == fit:
            PPOTrainer(tiny_gpt2(tokenizer), prompts=prompts, tokenizer=tokenizer, config=config, **given).train()
            continue
        with pytest.raises(ValueError, match=f"record 1: the prompt is {length} tokens long, and {fit} fit"):
            PPOTrainer(tiny_gpt2(tokenizer), prompts=prompts, tokenizer=tokenizer, config=config, **given)


def test_the_critic_of_an_ensemble_starts_from_its_first_reward_model():
    from rlhf_fast.models import load_scalar_model

    members = [load_scalar_model(tiny_gpt2(tiny_tokenizer(), seed=seed)) for seed in (1, 2)]
    trainer = build(reward=[length_score, *members], steps=1)
    for value, expected in zip(trainer.critic.parameters(), members[0].parameters(), strict=True):
        assert torch.equal(value, expected)
    trainer.train()
    assert trainer.reward.uncertainty.shape == (6,)
