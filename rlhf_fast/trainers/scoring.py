"""What a rollout earns: the reward's scores, scaled, less the penalties and the price of the KL."""

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.rewards import RunningMoments, ask, check_scores, overlong_penalty, shape_rewards
from rlhf_fast.rollout import Rollout
from rlhf_fast.trainers import learning, processes


def scores(reward: Any, rollout: Rollout, config: Any, moments: RunningMoments) -> Tensor:
    """The reward's scores, ``[B]`` or ``[B, T]``, scaled as ``config`` says; ``rollout`` keeps them raw.

    Each process asks for its share.
    """
    mine = processes.share(torch.arange(len(rollout)))

    def part() -> Tensor | None:
        if not len(mine):
            return None
        asked = rollout.select(mine) if processes.count() > 1 else rollout
        with learning.autocast(rollout.mask.device, config.precision):
            said = ask(reward, asked.prompts, asked.texts, asked.columns, asked.response_ids())
        return check_scores(said, len(asked), asked.texts, prompts=asked.prompts, mask=asked.mask)

    found = processes.joined(part).to(rollout.mask.device)
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


def sequence_scores(reward: Any, rollout: Rollout, config: Any, moments: RunningMoments) -> Tensor:
    """One score for each response, ``[B]``: scaled, clipped and less the penalties."""
    found = scores(reward, rollout, config, moments)
    if found.dim() == 2:
        found = torch.where(rollout.mask, found, 0).sum(1)
    if config.clip_scores is not None:
        found = found.clamp(-config.clip_scores, config.clip_scores)
    return found - penalties(rollout, config)


def penalties(rollout: Rollout, config: Any) -> Tensor:
    """What each response loses for not ending and for being long, ``[B]``."""
    missing = torch.where(rollout.ended, 0.0, config.missing_eos_penalty or 0.0)
    buffer = min(config.overlong_buffer, config.max_new_tokens)
    length = overlong_penalty(rollout.mask.sum(1), longest=config.max_new_tokens, buffer=buffer)
    return missing + config.overlong_penalty * length
