"""What a peer's function is given: which losses `ppo_loss` takes over, and the dtype that PyTorch's softmax returns."""

from typing import Any

import torch
from torch import Tensor


def is_plain(tokens: Tensor, mask: Tensor | None, *others: Any) -> bool:
    """Whether these are float ``[B, T]``, the others perhaps broadcast, and nothing but ``tokens`` wants a gradient."""
    shape = tokens.shape
    fits = len(shape) == 2 and (mask is None or mask.shape == shape)
    return fits and all(
        isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad and _broadcasts(x.shape, shape)
        for x in others
    )


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    some = zip(reversed(shape), reversed(to), strict=False)
    return shape == to or (len(shape) <= len(to) and all(a in (1, b) for a, b in some))


def divisor(count: Any, device: torch.device) -> Any:
    """A count as `ppo_loss` takes it; one of 0 too, of a batch in which no token is left."""
    if isinstance(count, Tensor) and count.device != device:
        count = float(count)
    if isinstance(count, Tensor) or count != 0:
        return count
    return torch.zeros((), device=device)


def softmax_dtype(logits: Tensor) -> torch.dtype:
    """That of PyTorch's softmax of these: the same, but under autocast on a GPU float32 of half precision."""
    under = logits.is_cuda and torch.is_autocast_enabled("cuda")
    return torch.promote_types(logits.dtype, torch.float32) if under else logits.dtype
