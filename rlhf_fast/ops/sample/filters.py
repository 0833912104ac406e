"""What happens to a row of logits before the draw: bias, penalties, temperature, top-k, top-p and min-p."""

from math import inf

import torch
from torch import Tensor

from rlhf_fast.ops.sample.draw import at, invert, row_sum, sum_tree


def processed(
    scores: Tensor,  # [B, V]
    bias: Tensor | None,  # [B, V]
    counts: Tensor | None,  # [B, V], integer
    penalties: dict[str, Tensor | None],  # name → [B]
) -> Tensor:
    """The logits after bias and penalties, in the order of transformers (repetition) and vLLM (the other two)."""
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if counts is None:
        return scores
    seen = counts > 0
    column = {name: None if p is None else p.to(scores.dtype)[:, None] for name, p in penalties.items()}
    repetition, presence, frequency = (column[f"{name}_penalty"] for name in ("repetition", "presence", "frequency"))
    if repetition is not None:
        scores = torch.where(seen, torch.where(scores < 0, scores * repetition, scores / repetition), scores)
    if frequency is not None:
        scores = scores - frequency * counts
    return scores if presence is None else scores - presence * seen


def divided(
    scores: Tensor,  # [B, V] or [B]
    temperature: Tensor | None,  # [B]
) -> Tensor:
    """``scores / temperature`` in the precision of the scores; a temperature of 0 divides by 1."""
    if temperature is None:
        return scores
    divisor = torch.where(temperature == 0, 1.0, temperature).to(scores.dtype)
    return scores / (divisor if scores.dim() == 1 else divisor[:, None])


def kept(
    scores: Tensor,  # [B, V], not yet divided
    logits: Tensor,  # [B, V], divided and shifted so that the largest is 0, float64
    weights: Tensor,  # [B, V], exp of them
    temperature: Tensor | None,  # [B]
    top_k: Tensor | None,  # [B], int64
    top_p: Tensor | None,  # [B]
    min_p: Tensor | None,  # [B]
) -> Tensor | None:
    """Which tokens the three filters leave, ``[B, V]``; None for all."""
    keep = None
    # In the scores' precision, as transformers compares: log(0.5) rounded to float32 weighs a hair less than 0.5.
    likely = None if min_p is None else weights.to(scores.dtype) >= min_p.to(scores.dtype)[:, None]
    if top_k is not None:
        # transformers compares after the division, in the scores' precision: different logits may tie there.
        scaled = divided(scores, temperature)
        keep = scaled >= _kth_largest(scaled, top_k)[:, None]
        logits, weights = torch.where(keep, logits, -inf), torch.where(keep, weights, 0)
    if top_p is not None:
        nucleus = _nucleus(logits, weights, top_p, scores.dtype)
        keep = nucleus if keep is None else keep & nucleus
    if likely is None:
        return keep
    return likely if keep is None else keep & likely


def greedy(
    top: Tensor,  # [B], the largest score
    temperature: Tensor | None,  # [B]
    top_p: Tensor | None,  # [B]
) -> Tensor:
    """Rows that take the likeliest token, ``[B]``."""
    rows = torch.zeros_like(top, dtype=torch.bool)
    if temperature is not None:
        # A temperature so small that it is 0 in the scores' precision, or the largest logit overflows, is as good as 0.
        rows = (temperature.to(top.dtype) == 0) | (torch.isinf(divided(top, temperature)) & torch.isfinite(top))
    return rows if top_p is None else rows | (top_p <= 0)


def _kth_largest(scaled: Tensor, top_k: Tensor) -> Tensor:
    """The smallest value that top-k keeps, -inf where it is off."""
    size = scaled.shape[1]
    on = (top_k > 0) & (top_k < size)
    k = torch.where(on, top_k, 1)
    if scaled.device.type == "cpu" and k.numel():  # elsewhere a look at k would wait for the device
        size = int(k.max())
    return torch.where(on, at(_largest(scaled, size), k - 1), -inf)


def _nucleus(logits: Tensor, weights: Tensor, top_p: Tensor, dtype: torch.dtype) -> Tensor:
    """Which tokens top-p keeps: all but the longest tail, lightest first, whose mass is at most ``1 - top_p``.

    Of equal logits the last ids are kept. transformers compares a float32 sum with a float32 threshold, which is to
    compare the exact sum with the middle between that threshold and the next float32.
    """
    share = torch.where(top_p >= 1, 1.0, 1 - top_p)
    tail = share.to(dtype)
    if dtype == torch.float32:
        tail = (tail.double() + torch.nextafter(tail, torch.full_like(tail, inf)).double()) / 2
    size, total = weights.shape[1], row_sum(weights)
    if weights.device.type == "cpu" and top_p.numel():
        # Tokens that weigh less than a V-th of half the tail are inside it, all together: only the others are sorted.
        # How many that is, the other rows may decide: what comes after the last token that is kept changes no sum.
        heavy = (weights * (2 * size) >= (share * total)[:, None]).sum(-1).max()
        size = max(1, int(heavy))
    largest = _largest(logits, size)
    # The first token at which the sum from the top reaches total - tail is the last one kept.
    reach = torch.nextafter(total * (1 - tail), torch.full_like(total, -inf))
    last = invert(sum_tree(largest.exp()), reach)
    edge = at(largest, last)[:, None]
    above, ties = logits > edge, logits == edge
    missing = last + 1 - above.sum(-1)
    from_the_end = ties.flip(-1).cumsum(-1).flip(-1)
    return above | (ties & (from_the_end <= missing[:, None])) | (top_p >= 1)[:, None]


def _largest(values: Tensor, size: int) -> Tensor:
    """The ``size`` largest values of each row, descending."""
    if 4 * size > values.shape[1]:
        return values.sort(-1, descending=True).values[:, :size]
    return values.topk(size, dim=-1).values
