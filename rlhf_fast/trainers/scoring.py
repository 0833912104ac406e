"""What responses earn: the reward's scores, scaled, less the penalties and the price of the KL; their advantages."""

from typing import Any

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.losses import group_advantages, whiten
from rlhf_fast.rewards import EnsembleReward, RunningMoments, ask, check_scores, overlong_penalty, shape_rewards
from rlhf_fast.rollout import Rollout
from rlhf_fast.trainers import learning, processes


def scores(reward: Any, rollout: Rollout, config: Any, moments: RunningMoments) -> Tensor:
    """The reward's scores, ``[B]`` or ``[B, T]``, scaled as ``config`` says; ``rollout`` keeps them raw.

    Each process asks for its share. Of an ensemble ``rollout`` keeps the ``uncertainty``, too.
    """
    found = raw(reward, rollout, config.precision)
    if config.scale_scores == "none":
        return found
    moments.update(rollout.sequence_scores())
    return (found - (moments.mean if config.scale_scores == "norm" else 0.0)) / moments.std


def raw(reward: Any, rollout: Rollout, precision: str) -> Tensor:
    """The reward's scores as it gives them."""
    mine = processes.share(torch.arange(len(rollout)))
    some = rollout if len(mine) == len(rollout) else rollout.select(mine) if len(mine) else None
    texts = None if some is None else (some.prompts, some.texts, some.columns, some.response_ids())
    mask = rollout.mask[:0] if some is None else some.mask
    rollout.scores, rollout.uncertainty = said(reward, texts, mask, precision)
    return rollout.scores


def said(
    reward: Any,
    texts: tuple[Any, ...] | None,  # prompts, responses, columns and, if known, the tokens of the responses
    mask: Tensor,  # [b, T], bool, True on the tokens of the responses
    precision: str,
) -> tuple[Tensor, Tensor | None]:
    """What ``reward`` says, ``[B]`` or ``[B, T]``, and ``[B]`` by how much the members of an ensemble disagree.

    Each process asks about its own ``b`` of the ``B`` texts, which are None where it has none.
    """

    def part() -> Tensor | None:
        if texts is None:
            return None
        with torch.no_grad(), learning.autocast(mask.device, precision):
            return check_scores(ask(reward, *texts), len(mask), texts[1], prompts=texts[0], mask=mask)

    found = processes.joined(part).to(mask.device)
    if not isinstance(reward, EnsembleReward):
        return found, None
    return found, processes.joined(lambda: None if texts is None else reward.uncertainty).to(mask.device)


def advantages(
    scores: Tensor,  # [B], or [B, T]
    mask: Tensor,  # [B, T], bool
) -> Tensor:
    """This process's share of the standardised scores, or, per token, of the sums of the rewards still to come."""
    if scores.dim() == 1:
        return processes.share(group_advantages(scores, torch.zeros_like(scores, dtype=torch.long)))
    to_go, _ = ops.gae(scores, torch.zeros_like(scores), mask, gamma=1.0, lam=1.0)
    return processes.share(whiten(to_go, mask))


def statistics(scores: Tensor, mask: Tensor, uncertainty: Tensor | None) -> dict[str, Tensor]:
    """The mean score of a response and, of an ensemble, the mean of what its members disagree by."""
    sums = scores if scores.dim() == 1 else torch.where(mask, scores, 0).sum(1)
    return {"scores": sums.mean()} | ({} if uncertainty is None else {"uncertainty": uncertainty.mean()})


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
