"""KL estimates, masked statistics and the KL controller."""

from math import inf, isnan
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.losses.inputs import check_masked, precise
from rlhf_fast.ops.checks import FLOATS, check_choice, check_tensor
from rlhf_fast.ops.ppo_loss import KL_ESTIMATES, kl_and_slope


def kl_estimate(
    logprobs: Tensor,  # [...]
    ref_logprobs: Tensor,  # [...]
    *,
    kind: str = "k1",
) -> Tensor:
    """Per-token estimates of KL(policy || reference) from one sample (Schulman 2020, "Approximating KL divergence").

    With ``D = logprobs - ref_logprobs``: ``k1`` is D, ``k2`` is D^2 / 2, ``k3`` is exp(-D) + D - 1, ``abs`` is |D|.

    Args:
        logprobs: ``[...]``, of the chosen tokens under the policy.
        ref_logprobs: ``[...]``, under the reference.
        kind: ``"k1"``, ``"k2"``, ``"k3"`` or ``"abs"``.

    Returns:
        ``[...]`` in nats, float32 (float64 if an input is); differentiable.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or kind.
    """
    check_choice("kl_estimate", "kind", kind, KL_ESTIMATES)
    check_tensor("kl_estimate", "logprobs", logprobs, dtypes=FLOATS)
    shape, device = logprobs.shape, logprobs.device
    rule = "like logprobs"
    check_tensor("kl_estimate", "ref_logprobs", ref_logprobs, dtypes=FLOATS, shape=shape, rule=rule, device=device)
    return kl_and_slope(precise(logprobs) - precise(ref_logprobs), kind)[0]


def masked_mean(
    x: Tensor,  # [...]
    mask: Tensor,  # [...], bool
    *,
    dim: int | tuple[int, ...] | None = None,
) -> Tensor:
    """Mean of ``x`` where the mask is True, over all dimensions or ``dim``; 0 where there is nothing to average.

    Args:
        x: ``[...]``; what is stored at masked positions is never used.
        mask: ``[...]``, True where an element counts.
        dim: the dimensions to average over; all if None.

    Returns:
        The mean, float32 (float64 for float64 input); differentiable.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device.
    """
    check_masked("masked_mean", x, mask)
    total = torch.where(mask, precise(x), 0)
    if dim is None:
        return total.sum() / mask.sum().clamp(min=1)
    return total.sum(dim) / mask.sum(dim).clamp(min=1)


def whiten(
    x: Tensor,  # [...]
    mask: Tensor,  # [...], bool
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    group: Any = None,
) -> Tensor:
    """``x`` with mean 0 and variance 1 over the elements that count: ``(x - mean) * rsqrt(var + 1e-8)``.

    Args:
        x: ``[...]``; what is stored at masked positions is never used.
        mask: ``[...]``, True where an element counts.
        shift_mean: False adds the mean back, so that only the scale changes.
        unbiased: the variance divides by n - 1 (TRL, verl), else by n (OpenRLHF).
        group: a ``torch.distributed`` process group; mean and variance are then those of all its ranks together.

    Returns:
        Like ``x``, float32 (float64 for float64 input), 0 where masked. One valid element has variance 0.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, or a group and an ``x`` that wants a gradient.
    """
    check_masked("whiten", x, mask)
    if group is not None and x.requires_grad:
        raise ValueError("whiten: x must be detached where a group is given, no gradient crosses ranks")
    values = torch.where(mask, x, 0).double()
    count, total = _reduced([mask.sum(), values.sum()], group)
    mean = total / count.clamp(min=1)
    # A second pass around the common mean: sums of squares would cancel where the mean is large.
    deviation = torch.where(mask, values - mean, 0)
    (squares,) = _reduced([(deviation**2).sum()], group)
    variance = squares / (count - (1 if unbiased else 0)).clamp(min=1)
    scaled = deviation * torch.rsqrt(variance + 1e-8)
    return precise(torch.where(mask, scaled if shift_mean else scaled + mean, 0), x.dtype)


class AdaptiveKL:
    """The KL coefficient of Ziegler et al. 2019, "Fine-tuning language models from human preferences".

    After every step ``value *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon``.
    """

    def __init__(self, init: float, target: float, horizon: float) -> None:
        if not 0 <= init < inf:
            raise ValueError(f"AdaptiveKL: init must be finite and not negative, got {init}")
        for name, number in (("target", target), ("horizon", horizon)):
            if not 0 < number < inf:
                raise ValueError(f"AdaptiveKL: {name} must be finite and above 0, got {number}")
        self.value, self.target, self.horizon = float(init), float(target), float(horizon)

    def update(self, kl: float | Tensor, n: int) -> float:
        """Move the coefficient after ``n`` samples whose KL per sequence was ``kl`` nats, and return it."""
        if isnan(kl := float(kl)):
            raise ValueError("AdaptiveKL: kl must be a number, got nan")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n / self.horizon
        return self.value

    def state_dict(self) -> dict[str, float]:
        """What changes while training."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a ``state_dict``."""
        self.value = float(state["value"])


def _reduced(sums: list[Tensor], group: Any) -> list[Tensor]:
    """Each sum over all ranks of the group, in float64."""
    packed = torch.stack([s.to(torch.float64) for s in sums])
    if group is not None:
        torch.distributed.all_reduce(packed, group=group)
    return list(packed.unbind())
