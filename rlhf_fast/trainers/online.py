"""What the trainers share whose policy writes its own training data: prompts in, responses out."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast import data, models, ops
from rlhf_fast.generate import decode, stop_tokens, texts_of
from rlhf_fast.rewards import RunningMoments, ask, check_scores, overlong_penalty, shape_rewards
from rlhf_fast.rollout import Rollout
from rlhf_fast.trainers import learning
from rlhf_fast.trainers.run import stream

PROMPTS, SEEDS, MINIBATCHES = 0, 1, 2  # what a random stream is for


def tokenise(
    records: list[data.Record], tokenizer: Any, readers: dict[nn.Module, int], config: Any
) -> list[data.Prompt]:
    """The prompts of ``records`` that leave every reader room for a response.

    ``readers``: model → how many tokens it reads beside prompt and response. ``config`` has ``max_new_tokens``,
    ``max_prompt_length`` and ``overlong``. Raises ``ValueError`` where there is no room, or a token one does not know.
    """
    new = config.max_new_tokens
    rooms = [n - new - ends for m, ends in readers.items() if (n := models.context_length(m))]
    if min(rooms, default=1) < 1:
        raise ValueError(f"{type(config).__name__}.max_new_tokens {new} fills the context: no room for a prompt")
    rooms += [] if config.max_prompt_length is None else [config.max_prompt_length]
    limits = {"max_length": min(rooms, default=None), "overlong": config.overlong}
    examples = data.prompt_examples(records, tokenizer, **limits)
    for model in readers:
        models.check_tokens(model, tokenizer, (example.ids for example in examples))
    return examples


def batches(prompts: list[data.Prompt], config: Any, done: int) -> Iterator[list[data.Prompt]]:
    """``steps`` batches of prompts, one shuffled pass after the other, without the first ``done``."""
    waiting: list[int] = []
    epoch = 0
    for step in range(config.steps):
        while len(waiting) < config.batch_size:
            waiting += torch.randperm(len(prompts), generator=stream(config.seed, PROMPTS, epoch)).tolist()
            epoch += 1
        if step >= done:
            yield [prompts[i] for i in waiting[: config.batch_size]]
        waiting = waiting[config.batch_size :]


def write(
    policy: nn.Module, batch: list[data.Prompt], tokenizer: Any, config: Any, *, stop_ids: list[int], step: int
) -> Rollout:
    """A response of ``policy`` to each prompt of ``batch``; the seeds depend on the config's and on ``step`` alone."""
    device = next(policy.parameters()).device
    ids = [example.ids for example in batch]
    prompt_ids, prompt_mask = (x.to(device) for x in data.pad(ids, tokenizer.pad_token_id, side="left"))
    seeds = torch.randint(2**62, (len(batch),), generator=stream(config.seed, SEEDS, step))
    with learning.autocast(device, config.precision):
        written = decode(
            policy, prompt_ids, prompt_mask, max_new_tokens=config.max_new_tokens, stop_ids=stop_ids,
            pad_id=tokenizer.pad_token_id, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
            seeds=seeds,
        )  # fmt: skip
    return Rollout.begin(batch, prompt_ids, prompt_mask, written, texts_of(written, tokenizer))


def stop_ids(policy: nn.Module, tokenizer: Any, more: str | None) -> list[int]:
    """The tokens that end a response, with the one that ``more`` is. Raises ``ValueError`` if that is not one token."""
    ids = [] if more is None else tokenizer(more, add_special_tokens=False)["input_ids"]
    if len(ids) != (more is not None):
        raise ValueError(f"stop_token {more!r} is {len(ids)} tokens of this tokenizer: it must be one")
    return sorted({*stop_tokens(policy, tokenizer), *ids})


def read(model: nn.Module, rollout: Rollout, config: Any) -> ops.LogprobsOutput:
    """Logprob and entropy of every response token under ``model``."""
    logits = _logits(model, rollout, config)
    return ops.logprobs(logits, rollout.responses, temperature=config.temperature, mask=rollout.mask)


def compare(policy: nn.Module, reference: nn.Module, rollout: Rollout, config: Any) -> None:
    """Fill in ``ref_logprobs`` and ``kl`` of ``rollout``, and ``old_logprobs`` unless they are the sampler's."""
    recomputed = config.old_logprobs == "recomputed"
    if config.kl == "exact":
        both = (_logits(model, rollout, config) for model in (policy, reference))
        found = ops.kl(*both, rollout.responses, temperature=config.temperature, mask=rollout.mask)
        rollout.kl, old, rollout.ref_logprobs = found.kl, found.logprobs, found.ref_logprobs
        rollout.old_logprobs = old if recomputed else rollout.old_logprobs
        return
    if recomputed:
        rollout.old_logprobs = read(policy, rollout, config).logprobs
    rollout.ref_logprobs = read(reference, rollout, config).logprobs
    rollout.kl = rollout.old_logprobs - rollout.ref_logprobs


def corrected(advantages: Tensor, rollout: Rollout, cap: float | None) -> Tensor:
    """``advantages [B, T]`` times the ratio of trainer to sampler, at most ``cap``: truncated importance sampling.

    Without a cap they are returned as they are. Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training".
    """
    if cap is None:
        return advantages
    ratio = (rollout.old_logprobs - rollout.sampler_logprobs).exp().clamp(max=cap)
    return torch.where(rollout.mask, advantages * ratio, 0)


def scores(reward: Any, rollout: Rollout, config: Any, moments: RunningMoments) -> Tensor:
    """The reward's scores, ``[B]`` or ``[B, T]``, scaled as ``config`` says; ``rollout`` keeps them raw."""
    with learning.autocast(rollout.mask.device, config.precision):
        said = ask(reward, rollout.prompts, rollout.texts, rollout.columns)
    found = check_scores(said, len(rollout), rollout.texts, prompts=rollout.prompts, mask=rollout.mask)
    rollout.scores = found
    if config.scale_scores == "none":
        return found
    moments.update(rollout.sequence_scores())
    return (found - (moments.mean if config.scale_scores == "norm" else 0.0)) / moments.std


def token_rewards(scores: Tensor, rollout: Rollout, config: Any, kl_coef: float) -> Tensor:
    """``[B, T]``: the score, clipped, less the penalties, where a response ends, and the price of the KL everywhere."""
    kl, both = config.kl, (rollout.old_logprobs, rollout.ref_logprobs)
    if kl == "exact":  # k1 of it and 0 is the KL itself
        kl, both = "k1", (rollout.kl, torch.zeros_like(rollout.kl))
    rewards = shape_rewards(scores, *both, rollout.mask, kl_coef=kl_coef, kl=kl, clip_scores=config.clip_scores)
    return rewards + shape_rewards(-penalties(rollout, config), *both, rollout.mask, kl_coef=0.0)


def penalties(rollout: Rollout, config: Any) -> Tensor:
    """What each response loses for not ending and for being long, ``[B]``."""
    missing = torch.where(rollout.ended, 0.0, config.missing_eos_penalty or 0.0)
    buffer = min(config.overlong_buffer, config.max_new_tokens)
    length = overlong_penalty(rollout.mask.sum(1), longest=config.max_new_tokens, buffer=buffer)
    return missing + config.overlong_penalty * length


def _logits(model: nn.Module, rollout: Rollout, config: Any) -> Tensor:
    with learning.autocast(rollout.mask.device, config.precision):
        logits = models.token_logits(model, rollout.ids, rollout.attention, keep=rollout.mask.shape[1] + 1)
    return logits[:, :-1]  # those at a token are of the next one
