"""What every formula here does with its arguments: their precision, their checks, what a mean divides by."""

import torch
from torch import Tensor

from rlhf_fast.ops.checks import FLOATS, INTEGERS, check_positive, check_tensor


def precise(x: Tensor, like: torch.dtype | None = None) -> Tensor:
    """``x`` in float32, in float64 if it has that dtype, or ``like`` in its place."""
    return x.to(torch.float64 if (like or x.dtype) == torch.float64 else torch.float32)


def check_masked(name: str, x: Tensor, mask: Tensor) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``x`` is a float tensor and ``mask`` a bool one of its shape."""
    check_tensor(name, "x", x, dtypes=FLOATS)
    check_tensor(name, "mask", mask, dtypes=(torch.bool,), shape=x.shape, rule="like x", device=x.device)


def check_dims(name: str, argument: str, value: Tensor, shape: str) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``value`` is a float tensor of as many dimensions as ``"[B, K]"``.

    Only its first dimension may be empty, or the one of the tokens, ``T``.
    """
    check_tensor(name, argument, value, dtypes=FLOATS)
    names = shape.strip("[]").split(", ")
    if value.dim() != len(names) or any(n == 0 and d not in "BT" for d, n in zip(names, value.shape, strict=True)):
        some = " with K at least 1" if "K" in names else ""
        raise ValueError(f"{name}: {argument} must be {shape}{some}, got {list(value.shape)}")


def check_values(name: str, argument: str, rule: str, values: Tensor, good: Tensor) -> None:
    """Raise ``ValueError`` that names the first value which is not ``good``; on the CPU, where a look costs no sync."""
    if values.device.type != "cpu" or torch.compiler.is_compiling() or bool(good.all()):
        return
    place = tuple((~good).nonzero()[0].tolist())
    raise ValueError(f"{name}: {argument} must be {rule}, got {values[place].item()} at {list(place)}")


def divided(name: str, total: Tensor, count: Tensor, denominator: float | Tensor | None) -> Tensor:
    """``total / count``, 0 for a count of 0; ``denominator``, where there is one, takes the place of the count.

    Raises ``TypeError`` or ``ValueError`` where the denominator is no number above 0 and no 0-d tensor.
    """
    if denominator is None:
        return total / count.clamp(min=1)
    if isinstance(denominator, Tensor):
        rule, dtypes = "a number or 0-d", FLOATS + INTEGERS
        check_tensor(name, "denominator", denominator, dtypes=dtypes, shape=(), rule=rule, device=total.device)
        return total / denominator.detach().to(total.dtype)
    check_positive(name, "denominator", denominator)
    return total / denominator
