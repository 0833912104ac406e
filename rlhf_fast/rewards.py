"""Rewards: what scores a response, and how a score and the KL become one reward per token."""

import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.data import encode, pad
from rlhf_fast.losses import kl_estimate
from rlhf_fast.models import (
    check_tokens,
    context_length,
    evaluating,
    load_scalar_model,
    load_tokenizer,
    sequence_scores,
    unwrap,
)
from rlhf_fast.ops.advantages import PLACES
from rlhf_fast.ops.checks import FLOATS, check_choice, check_tensor
from rlhf_fast.ops.ppo_loss import KL_ESTIMATES
from rlhf_fast.pretrained import is_scalar, read_config


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


def load_reward(
    source: Any, tokenizer: Any, *, batch_size: int = 32, device: torch.device | str | None = None
) -> Callable[..., Any]:
    """A reward from a path, a Hub id, a module with a scalar head or a ``callable(prompts, responses, **columns)``.

    A callable is returned itself. A model goes to ``device``, or stays where it is. It reads prompt and response with
    the tokenizer saved beside it, or with ``tokenizer``, the policy's, where there is none or ``source`` is a module.
    Raises ``ValueError`` where ``source`` is a language model: a new scalar head would score at random.
    """
    if isinstance(source, (str, Path)):
        config = read_config(source)
        if not is_scalar(config):
            raise ValueError(f"{source} holds a language model, not a reward model: train one on preferences first")
        model = load_scalar_model(source).to(device)
        return ModelReward(model, _own_tokenizer(source, tokenizer), batch_size=batch_size)
    if isinstance(source, nn.Module):
        if not hasattr(unwrap(source), "score"):
            raise ValueError(f"{type(source).__name__} has no scalar head (score), so that it cannot be the reward")
        return ModelReward(source.to(device), tokenizer, batch_size=batch_size)
    if not callable(source):
        raise TypeError(f"the reward must be a path, a module or a callable, got {type(source).__name__}")
    return source  # type: ignore[no-any-return]


class RewardError(ValueError):
    """A reward function raised something."""


def ask(
    reward: Callable[..., Any], prompts: Sequence[str], responses: Sequence[str], columns: dict[str, list[Any]]
) -> Any:
    """What ``reward`` returns.

    Raises ``RewardError`` that names the line of a function which raised something, and the prompt on which it does so:
    for that it is called again, with one prompt at a time.
    """
    try:
        return reward(prompts, responses, **columns)
    except Exception as error:
        if isinstance(reward, ModelReward):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        place = f" at {frames[1].filename}:{frames[1].lineno}" if len(frames) > 1 else ""
        said = f": {error}" if str(error) else ""
        name = type(error).__name__
        raise RewardError(
            f"the reward raised {name}{place}{said}{_culprit(reward, prompts, responses, columns)}"
        ) from error


def _culprit(
    reward: Callable[..., Any], prompts: Sequence[str], responses: Sequence[str], columns: dict[str, list[Any]]
) -> str:
    """The first prompt on which ``reward`` raises alone, in words; of several prompts none may."""
    for i, prompt in enumerate(prompts):
        try:
            reward(prompts[i : i + 1], responses[i : i + 1], **{name: c[i : i + 1] for name, c in columns.items()})
        except Exception:
            return f"; prompt {i + 1} of {len(prompts)}: {_short(prompt)}, response {_short(responses[i])}"
    return "; on no prompt alone"


class ModelReward:
    """A reward model as a callable: the scalar at the end token of prompt and response."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 32) -> None:
        self.model, self.tokenizer, self.batch_size = model, load_tokenizer(model, tokenizer), batch_size

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **_columns: Any) -> Tensor:
        """``[B]`` scores, float32, on the model's device.

        Raises ``ValueError`` where a text exceeds its context or has a token that the model does not know.
        """
        limit, device = context_length(self.model), next(self.model.parameters()).device
        texts = []
        for prompt, response in zip(prompts, responses, strict=True):
            texts.append(encode(self.tokenizer, prompt) + encode(self.tokenizer, response, start=False, end=True))
            if limit is not None and len(texts[-1]) > limit:
                raise ValueError(
                    f"the reward model's context of {limit} tokens is too short for a prompt and response of "
                    f"{len(texts[-1])}: {_short(prompt)}"
                )
        check_tokens(self.model, self.tokenizer, texts)  # on a GPU an unknown token ends the process
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        scores = torch.zeros(len(texts), device=device)
        with evaluating(self.model):
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                ids, mask = pad([texts[i] for i in rows], self.tokenizer.pad_token_id)
                scores[rows] = sequence_scores(self.model, ids.to(device), mask.to(device)).float()
        return scores


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
        texts = [f"{name} {_short(said[row])}" for name, said in (("prompt", prompts), ("response", responses)) if said]
        raise ValueError(
            f"the reward of prompt {row + 1} of {batch_size} is {value}{': ' if texts else ''}{', '.join(texts)}"
        )
    return found


def _own_tokenizer(source: str | Path, tokenizer: Any) -> Any:
    try:
        return load_tokenizer(source)
    except ValueError:
        if tokenizer is None:
            raise
        return tokenizer


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
