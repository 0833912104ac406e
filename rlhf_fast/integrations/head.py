"""Logprobs straight from hidden states and the weight of the head, a few rows of logits at a time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops.logprobs import logprobs, scaled

#: So many logits exist at a time, 128 MiB of them in bfloat16: 441 rows at V = 151,936. Not tuned on a GPU yet.
TILE = 1 << 26


class Head(NamedTuple):
    """What turns a product with the weight into logits, and what is wanted of them."""

    temperature: float
    softcap: float | None
    extras: tuple[str, ...]  # of "log_sum_sq_probs", "mean_logits", "is_top1"
    gathered: Callable[..., AbstractContextManager]  # holds sharded parameters together while they are read


class HeadLogprobs(torch.autograd.Function):
    """Logprob and entropy of ``ids`` under ``hidden @ weight.T + bias``, with the extras of `Head`.

    The logits of a few rows are made, read and dropped; the backward makes them again. Gradients of the weight add up
    in float32 over the tiles.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, head: Head
    ) -> tuple[Tensor | None, ...]:
        """``hidden [N, H]``, ``weight [V, H]``, ``bias [V]``, ``ids [N]`` → five ``[N]``, None where not wanted."""
        ctx.set_materialize_grads(False)
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        rows = [_statistics(tile, ids[at], head) for at, _, tile in _tiles(hidden, weight, bias, ctx.dtype)]
        columns = [torch.cat(parts) for parts in zip(*rows, strict=True)]
        chosen, entropy, lse, *extras = columns
        found = dict(zip(head.extras, extras, strict=False))
        others = [found.get(name) for name in ("log_sum_sq_probs", "mean_logits", "is_top1")]
        ctx.save_for_backward(hidden, weight, bias, ids, entropy, lse)
        ctx.head = head
        ctx.mark_non_differentiable(*(x for x in others if x is not None))
        return chosen, entropy.clone(), *others  # the saved entropy is not the one that others may change

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None, *_: Any) -> tuple:
        """Gradients of the hidden states, the weight and the bias, each only where it is wanted."""
        hidden, weight, bias, ids, entropy, lse = ctx.saved_tensors
        head, wanted = ctx.head, ctx.needs_input_grad[:3]
        none = torch.zeros_like(lse)
        g, h = (none if x is None else x.to(lse.dtype) for x in (g, h))
        with head.gathered(weight, bias):
            given = (hidden, weight, bias)
            sums = [_zeros(x) if want else None for x, want in zip(given, wanted, strict=True)]
            w = weight.to(ctx.dtype)
            for at, block, tile in _tiles(hidden, weight, bias, ctx.dtype):
                dz = torch.ops.rlhf_fast.logprobs_backward(
                    g[at], h[at], none[at], tile, ids[at], entropy[at], lse[at],
                    temperature=head.temperature, softcap=head.softcap,
                )  # fmt: skip
                del tile
                if sums[0] is not None:
                    _add_product(sums[0][at], dz, w)
                if sums[1] is not None:
                    _add_product(sums[1], dz.t(), block)
                if sums[2] is not None:
                    sums[2] += dz.sum(0, dtype=sums[2].dtype)
        return *(None if s is None else s.to(x.dtype) for s, x in zip(sums, given, strict=True)), None, None


def _tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of rows, with the hidden states and the logits of each."""
    rows = max(1, TILE // max(weight.shape[0], 1))
    w = weight.to(dtype)
    for start in range(0, max(hidden.shape[0], 1), rows):  # of no rows one empty tile
        at = slice(start, min(start + rows, hidden.shape[0]))
        block = hidden[at].to(dtype)
        tile = torch.mm(block, w.t())
        yield at, block, tile if bias is None else tile.add_(bias.to(dtype))


def _statistics(tile: Tensor, ids: Tensor, head: Head) -> list[Tensor]:
    """Logprob, entropy, logsumexp and the extras of each row of logits, in the order of ``head.extras``."""
    t, cap = head.temperature, head.softcap
    out = logprobs(tile, ids, temperature=t, softcap=cap)
    extras = []
    if "log_sum_sq_probs" in head.extras:  # log sum p^2, p^2 being what half the temperature gives but for its sum
        extras.append(logprobs(tile, ids, temperature=t / 2, softcap=cap).lse - 2 * out.lse)
    capped = tile if cap is None or len(extras) == len(head.extras) else scaled(tile, 1.0, cap)
    if "mean_logits" in head.extras:
        extras.append(capped.mean(-1, dtype=out.lse.dtype) / t)
    if "is_top1" in head.extras:
        extras.append(capped.argmax(-1) == ids)  # the first of equals
    return [*out, *extras]


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, the product not rounded to the dtype of its factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and _mm_takes_a_dtype():
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _mm_takes_a_dtype() -> bool:
    """``torch.mm(..., out_dtype=)`` came with 2.8."""
    return tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)
