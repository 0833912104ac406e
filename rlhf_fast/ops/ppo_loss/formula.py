"""The reference of ppo_loss: loss, statistics and gradients of each token in plain PyTorch."""

import torch
from torch import Tensor


def reference(
    logprobs: Tensor,  # [B, T] or [N]
    old_logprobs: Tensor,  # [B, T] or [N]
    advantages: Tensor,  # [B, T] or [N]
    mask: Tensor,  # [B, T] or [N], bool
    values: Tensor | None = None,  # [B, T] or [N]
    old_values: Tensor | None = None,  # [B, T] or [N]
    returns: Tensor | None = None,  # [B, T] or [N]
    entropy: Tensor | None = None,  # [B, T] or [N]
    ref_logprobs: Tensor | None = None,  # [B, T] or [N]
    denominator: Tensor | None = None,  # []
    *, cliprange_low: float, cliprange_high: float, cliprange_value: float, vf_coef: float, entropy_coef: float,
    kl_coef: float, kl: str, dual_clip: float | None, log_ratio_clamp: float, aggregate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, statistics and the gradients of logprobs, values and entropy."""

    def valid(t: Tensor | None) -> Tensor:
        return logprobs.new_zeros(()) if t is None else torch.where(mask, t, 0)

    weights = _weights(mask, aggregate, denominator, logprobs.dtype)
    log_ratio = valid(logprobs - old_logprobs)
    ratio, policy, d_policy, clipped = _policy(
        log_ratio, valid(advantages), 1 - cliprange_low, 1 + cliprange_high, dual_clip, log_ratio_clamp
    )
    estimate = d_estimate = value = d_value = value_clipped = valid(None)
    if ref_logprobs is not None:
        estimate, d_estimate = kl_and_slope(valid(logprobs - ref_logprobs), kl)
    if values is not None:
        old = values if old_values is None else old_values  # its own value is never clipped
        value, d_value, value_clipped = _value(valid(values), valid(old), valid(returns), cliprange_value)
    per_token = (policy, value, valid(entropy), estimate, log_ratio**2 / 2, clipped, value_clipped, ratio)
    stats = [(weights * t).sum() for t in per_token]
    # A statistic that has no weight may be infinite.
    loss = stats[0] + sum(c * x for c, x in zip((vf_coef, -entropy_coef, kl_coef), stats[1:4], strict=True) if c)
    ratio_max = torch.where(mask, ratio, 0).amax() if mask.numel() else valid(None)
    grads = (
        weights * (d_policy + kl_coef * d_estimate if kl_coef else d_policy),
        mask.new_empty(0, dtype=loss.dtype) if values is None else weights * (vf_coef * d_value),
        mask.new_empty(0, dtype=loss.dtype) if entropy is None else -entropy_coef * weights,
    )
    return loss, torch.stack([*stats, ratio_max]), *grads


def _policy(
    log_ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None, clamp: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ratio, loss, its derivative by the logprob, and 1 where the clipped loss is the larger one."""
    ratio = log_ratio.clamp(-clamp, clamp).exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(low, high)
    inside = (ratio >= low) & (ratio <= high)
    loss, share = _larger(unclipped, clipped, inside)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        # Where two branches are equal each has half of the gradient, as torch.minimum and torch.maximum have it.
        share = torch.where(advantages < 0, share * ((loss < bound) + 0.5 * (loss == bound)), share)
        loss = torch.where(advantages < 0, torch.minimum(loss, bound), loss)
    slope = torch.where(log_ratio.abs() <= clamp, unclipped * share, 0)
    return ratio, loss, slope, (clipped > unclipped).to(loss.dtype)


def _value(values: Tensor, old: Tensor, returns: Tensor, cliprange: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its derivative by the value, and 1 where the clipped loss is the larger one."""
    error = values - returns
    low, high = old - cliprange, old + cliprange
    clipped_error = torch.clamp(values, low, high) - returns
    inside = (values >= low) & (values <= high)
    loss, share = _larger(error**2, clipped_error**2, inside)
    return loss / 2, error * share, (clipped_error**2 > error**2).to(error.dtype)


def _larger(unclipped: Tensor, clipped: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """The larger loss, and the share of the unclipped one's derivative that it has."""
    tied = 0.5 * (1 + inside.to(unclipped.dtype))  # inside of the range the clipped loss has the same derivative
    share = torch.where(unclipped == clipped, tied, (unclipped > clipped).to(unclipped.dtype))
    return torch.maximum(unclipped, clipped), share


def kl_and_slope(
    difference: Tensor,  # [...], logprob - ref_logprob
    kind: str,
) -> tuple[Tensor, Tensor]:
    """An estimate of KL(policy || reference) per token (Schulman 2020), and its derivative by the logprob."""
    if kind == "k1":
        return difference, torch.ones_like(difference)
    if kind == "k2":
        return difference**2 / 2, difference
    if kind == "abs":
        return difference.abs(), difference.sign()
    return torch.expm1(-difference) + difference, -torch.expm1(-difference)


def _weights(mask: Tensor, aggregate: str, denominator: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight of each token, so that ``sum(weights * x)`` is the aggregate of x."""
    weights = mask.to(dtype)
    count = weights.new_ones(())
    if aggregate == "token_mean":
        count = weights.sum()
    elif aggregate != "token_sum":
        tokens = weights.sum(-1, keepdim=True)
        count = (tokens > 0).to(dtype).sum()
        if aggregate == "seq_mean_token_mean":
            weights = weights / tokens.clamp(min=1)
    return torch.where(mask, weights / (count.clamp(min=1) if denominator is None else denominator), 0)
