"""What every public op checks about its tensors: errors that name the op, the argument, the rule and what came."""

from math import inf

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


def check_tensor(
    op: str,
    name: str,
    value: object,
    *,
    dtypes: tuple[torch.dtype, ...],
    shape: torch.Size | tuple[int, ...] | None = None,
    rule: str = "",
    device: torch.device | None = None,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``value`` is a tensor of the given dtypes, shape and device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be {allowed}, got {str(value.dtype).removeprefix('torch.')}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{op}: {name} must be {rule}, got {list(value.shape)} instead of {list(shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like the first argument, got {value.device}")


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_number(op: str, name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a number, of Python, numpy or a 0-d tensor."""
    if not torch.compiler.is_compiling() and not hasattr(value, "__float__"):  # a symbol cannot be asked
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def check_finite(op: str, name: str, value: float) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``value`` is a finite number."""
    check_number(op, name, value)
    if not -inf < value < inf:
        raise ValueError(f"{op}: {name} must be finite, got {value}")


def check_positive(op: str, name: str, value: float) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``value`` is a finite number above 0."""
    check_number(op, name, value)
    if not 0 < value < inf:
        raise ValueError(f"{op}: {name} must be finite and above 0, got {value}")


def check_range(op: str, name: str, value: float, low: float, high: float) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``low <= value <= high`` (NaN is outside of every range)."""
    check_number(op, name, value)
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be between {low:g} and {high:g}, got {value}")


def check_offsets(op: str, cu_seqlens: Tensor, tokens: int) -> None:
    """Raise ``ValueError`` unless the offsets rise from 0 to ``tokens``; on the CPU, where a look costs no sync."""
    if cu_seqlens.device.type != "cpu":
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"{op}: cu_seqlens must rise from 0 to N = {tokens}, got {cu_seqlens.tolist()}")
