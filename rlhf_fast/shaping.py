"""What becomes of what a reward says: checked scores, less the penalties and the KL, as one reward per token."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.losses import kl_estimate
from rlhf_fast.ops.advantages import PLACES
from rlhf_fast.ops.checks import FLOATS, check_choice, check_tensor
from rlhf_fast.ops.ppo_loss import KL_ESTIMATES


def shape_rewards(
    scores: Tensor,  # [B] or [B, T]
    logprobs: Tensor,  # [B, T]
    ref_logprobs: Tensor,  # [B, T]
    mask: Tensor,  # [B, T], bool
    *,
    kl_coef: float | Tensor,  # number or 0-d
    kl: str = "k1",
    at: str = "last",
    clip_scores: float | None = None,
) -> Tensor:
    """The reward of every token (Ziegler et al. 2019): ``r_t = -kl_coef * k_t``, plus the score where it lands.

    Args:
        scores: one per response, or one per token, in units of reward.
        logprobs: of the response tokens under the policy that wrote them, in nats.
        ref_logprobs: the same under the reference.
        mask: True on response tokens; what is stored elsewhere is never used.
        kl_coef: price of a nat.
        kl: the estimator ``k_t``, as in ``kl_estimate``: k1, k2, k3 or abs.
        at: a score of a response lands on its last valid token (``"last"``) or on the token after that (``"next"``,
            TRL's PPO), which is masked; where no column is left for it, on the last valid one.
        clip_scores: scores are clipped to ``[-clip_scores, clip_scores]`` before.

    Returns:
        ``[B, T]``, float32, or float64 if an input is. 0 where masked, but for the score with ``"next"``, and in a row
        without a valid token.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or choice.
    """
    check_tensor("shape_rewards", "logprobs", logprobs, dtypes=FLOATS)
    if logprobs.dim() != 2:
        raise ValueError(f"shape_rewards: logprobs must be [B, T], got {list(logprobs.shape)}")
    like: dict[str, Any] = {"rule": "like logprobs", "device": logprobs.device, "shape": logprobs.shape}
    check_tensor("shape_rewards", "ref_logprobs", ref_logprobs, dtypes=FLOATS, **like)
    check_tensor("shape_rewards", "mask", mask, dtypes=(torch.bool,), **like)
    check_tensor("shape_rewards", "scores", scores, dtypes=FLOATS, device=logprobs.device)
    if scores.shape not in (logprobs.shape, logprobs.shape[:1]):
        raise ValueError(f"shape_rewards: scores must be [B] or [B, T] of {list(mask.shape)}, got {list(scores.shape)}")
    check_choice("shape_rewards", "kl", kl, KL_ESTIMATES)
    check_choice("shape_rewards", "at", at, PLACES)
    if clip_scores is not None and not clip_scores > 0:
        raise ValueError(f"shape_rewards: clip_scores must be above 0, got {clip_scores}")
    dtype = torch.promote_types(torch.promote_types(logprobs.dtype, ref_logprobs.dtype), torch.float32)
    dtype = torch.promote_types(dtype, scores.dtype)
    scores = scores.to(dtype) if clip_scores is None else scores.to(dtype).clamp(-clip_scores, clip_scores)
    # Selected before the arithmetic: a NaN times 0 would leak, into the gradient too.
    both = (torch.where(mask, x.to(dtype), 0) for x in (logprobs, ref_logprobs))
    # A price of 0 is no price, even where the KL is infinite.
    rewards = torch.where(mask & (kl_coef != 0), -kl_coef * kl_estimate(*both, kind=kl), 0)
    if mask.numel() == 0:
        return rewards
    if scores.dim() == 2:
        return rewards + torch.where(mask, scores, 0)
    position = torch.arange(mask.shape[1], device=mask.device)
    landing = torch.where(mask, position, -1).amax(-1, keepdim=True)
    if at == "next":
        landing = torch.where(landing < 0, landing, (landing + 1).clamp(max=mask.shape[1] - 1))
    return rewards + torch.where(position == landing, scores[:, None], 0)


def overlong_penalty(
    lengths: Tensor,  # [B]
    *,
    longest: int,
    buffer: int,
) -> Tensor:
    """What a long response loses, ``[B]`` in 0..1: 0 up to ``longest - buffer`` tokens, then linear, 1 at ``longest``.

    The soft punishment of DAPO (Yu et al. 2025), as a positive number. Raises ``ValueError`` unless the buffer is
    between 1 and ``longest``.
    """
    if not 1 <= buffer <= longest:
        raise ValueError(f"overlong_penalty: buffer must be between 1 and {longest}, got {buffer}")
    return ((lengths - (longest - buffer)) / buffer).clamp(0, 1)


class RunningMoments:
    """Mean and variance of all scores so far, merged batch by batch (Chan et al. 1979) in float64."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, scores: Tensor) -> None:
        """Take in a batch ``[B]``; waits for the device."""
        values = scores.double()
        count, mean = values.numel(), float(values.mean()) if values.numel() else 0.0
        squares, total = float(((values - mean) ** 2).sum()), self.count + count
        gap = mean - self.mean
        self.squares += squares + gap**2 * self.count * count / max(total, 1)
        self.mean += gap * count / max(total, 1)
        self.count = total

    @property
    def std(self) -> float:
        """The unbiased standard deviation; 1 for fewer than two scores, or where all are equal."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return math.sqrt(variance) if variance > 0 else 1.0

    def state_dict(self) -> dict[str, float]:
        """What changes while training."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a ``state_dict``."""
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])


def check_scores(
    scores: Any,
    batch_size: int,
    responses: Sequence[str] = (),
    *,
    prompts: Sequence[str] = (),
    mask: Tensor | None = None,  # [B, T], bool
) -> Tensor:
    """What a reward returned as a float32 tensor, ``[B]`` or ``[B, T]``; with ``mask`` of its shape and on its device.

    Raises ``TypeError`` if it is no list, array or tensor of numbers, ``ValueError`` if it has not one row per prompt
    or if one that counts is NaN or infinite; the error names the prompt by its number and by its text or response.
    """
    try:
        if isinstance(scores, (list, tuple)) and any(isinstance(score, Tensor) for score in scores):
            scores = torch.stack([torch.as_tensor(score) for score in scores])
        found = torch.as_tensor(scores).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        said = next(iter(str(error).splitlines()), "")
        raise TypeError(f"the reward must return numbers, got {type(scores).__name__}: {said}") from None
    if found.dim() == 0 or found.dim() > 2 or found.shape[0] != batch_size:
        shape = list(found.shape)
        raise ValueError(f"the reward must return one score for each of {batch_size} prompts, got shape {shape}")
    if mask is not None and found.dim() == 2 and found.shape != mask.shape:
        raise ValueError(f"the reward must return [B] or [B, T] of {list(mask.shape)}, got shape {list(found.shape)}")
    found = found.float() if mask is None else found.to(mask.device, torch.float32)
    valid = torch.ones_like(found, dtype=torch.bool) if mask is None or found.dim() == 1 else mask
    wrong = (valid & ~found.isfinite()).nonzero()
    if len(wrong):
        row, value = int(wrong[0, 0]), found[tuple(wrong[0])].item()
        texts = [f"{name} {short(said[row])}" for name, said in (("prompt", prompts), ("response", responses)) if said]
        raise ValueError(
            f"the reward of prompt {row + 1} of {batch_size} is {value}{': ' if texts else ''}{', '.join(texts)}"
        )
    return found


def short(text: str) -> str:
    """``text`` in quotes, its beginning only if it is long."""
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
