"""The knobs of ``sample``: what each may be, and how a number becomes the ``[B]`` tensor that a kernel reads."""

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops.checks import FLOATS, INTEGERS, check_tensor

#: knob → (the rule, the test of a number or tensor, the number that turns the knob off).
KNOBS: dict[str, tuple[str, Callable[[Any], Any], float | None]] = {
    "temperature": ("finite and not negative", lambda v: (v >= 0) & (v < inf), 1.0),
    "top_k": ("an integer", lambda v: v == v, None),
    "top_p": ("a number", lambda v: v == v, None),
    "min_p": ("between 0 and 1", lambda v: (v >= 0) & (v <= 1), 0.0),
    "repetition_penalty": ("finite and above 0", lambda v: (v > 0) & (v < inf), 1.0),
    "presence_penalty": ("finite", lambda v: abs(v) < inf, 0.0),
    "frequency_penalty": ("finite", lambda v: abs(v) < inf, 0.0),
}
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def knob(
    name: str,
    value: object,
    logits: Tensor,  # [B, V]
) -> Tensor | None:
    """``value`` as ``[B]``, float64 or int64; None where it changes nothing. Raises what `sample` raises."""
    rule, test, off = KNOBS[name]
    integer = name == "top_k"
    rows, device = logits.shape[0], logits.device
    if isinstance(value, Tensor):
        dtypes = INTEGERS if integer else FLOATS + INTEGERS
        check_tensor("sample", name, value, dtypes=dtypes, shape=(rows,), rule="a number or [B]", device=device)
        if device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = torch.nonzero(~test(value))
            if len(wrong):
                row = int(wrong[0])
                raise ValueError(f"sample: {name} must be {rule}, got {value[row].item()} in row {row}")
        return value.to(torch.int64 if integer else torch.float64)
    if isinstance(value, float) and value != value:
        raise ValueError(f"sample: {name} must be {rule}, got nan")
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        kind = "an integer" if integer else "a number"
        raise TypeError(f"sample: {name} must be {kind} or a [B] tensor, got {type(value).__name__}")
    if not test(value):
        raise ValueError(f"sample: {name} must be {rule}, got {value}")
    if integer:
        outside = value <= 0 or value >= logits.shape[1]
        return None if outside else torch.full((rows,), value, dtype=torch.int64, device=device)
    if value == off or (name == "top_p" and value >= 1):
        return None
    return torch.full((rows,), value, dtype=torch.float64, device=device)


def out_of_range(
    knobs: dict[str, Tensor | None],  # name → [B]
    like: Tensor,  # [B]
) -> Tensor:
    """Rows whose knobs break a rule: for those who could not look at the values before."""
    wrong = torch.zeros_like(like, dtype=torch.bool)
    for name, value in knobs.items():
        if value is not None:
            wrong = wrong | ~KNOBS[name][1](value)
    return wrong


def per_token(
    name: str,
    value: Tensor | None,  # [B, V] or [V]
    dtypes: tuple[torch.dtype, ...],
    logits: Tensor,  # [B, V]
) -> Tensor | None:
    """``value`` as ``[B, V]``, without a copy where all rows share it."""
    if value is None:
        return None
    shape = logits.shape[1:] if isinstance(value, Tensor) and value.dim() == 1 else logits.shape
    check_tensor("sample", name, value, dtypes=dtypes, shape=shape, rule="[B, V] or [V]", device=logits.device)
    return value.expand(logits.shape)
