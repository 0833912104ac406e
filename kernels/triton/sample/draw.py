"""The draw: sums of the tiles, and the token at which a sum is reached."""

import triton
import triton.language as tl
from rlhf_fast.triton_kernels.sample.floats import _sum, _weights


@triton.jit
def _merged(stats_ptr, masses_ptr, tiles, slope, slope_low, nothing, LANES: tl.constexpr):
    """Maximum, mass and number of all tiles; ``masses`` become those relative to the maximum."""
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    top, count, bad, total = tl.full([], float("-inf"), dtype), 0, 0, tl.zeros([], tl.float64)
    start = 0
    while start < tiles:
        tile = start + tl.arange(0, LANES)
        top = tl.maximum(top, tl.max(tl.load(stats_ptr + tile, mask=tile < tiles, other=float("-inf"))))
        counts = tl.load(stats_ptr + 2 * tiles + tile, mask=tile < tiles, other=0.0).to(tl.int32)
        bad += tl.sum((counts < 0).to(tl.int32))
        count += tl.sum(counts)
        start += LANES
    top += 0.0  # of the two zeros the one that no score is above
    start = 0
    while start < tiles:
        tile = start + tl.arange(0, LANES)
        most = tl.load(stats_ptr + tile, mask=tile < tiles, other=float("-inf"))
        mass = tl.load(stats_ptr + tiles + tile, mask=tile < tiles, other=0.0).to(tl.float64)
        weight, _ = _weights(most, top, slope, slope_low, nothing)
        mass = tl.where(most == float("-inf"), 0.0, mass * weight)
        tl.store(masses_ptr + tile, mass, mask=tile < tiles)
        total += tl.sum(mass)
        start += LANES
    tl.debug_barrier()  # other threads read the masses
    return top, count, bad, total


@triton.jit
def _policy(stats_ptr, tiles, inverse, PROCESSED: tl.constexpr, LANES: tl.constexpr):
    """Maximum and mass of the logits themselves, and their entropy."""
    top, start = tl.full([], float("-inf"), tl.float64), 0
    total, spread = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    tops_ptr, masses_ptr = stats_ptr, stats_ptr + tiles
    if PROCESSED:
        tops_ptr, masses_ptr = stats_ptr + 4 * tiles, stats_ptr + 5 * tiles
    while start < tiles:
        tile = start + tl.arange(0, LANES)
        most = tl.load(tops_ptr + tile, mask=tile < tiles, other=float("-inf"))
        top = tl.maximum(top, tl.max(most).to(tl.float64))
        start += LANES
    start = 0
    while start < tiles:
        tile = start + tl.arange(0, LANES)
        most = tl.load(tops_ptr + tile, mask=tile < tiles, other=float("-inf")).to(tl.float64)
        mass = tl.load(masses_ptr + tile, mask=tile < tiles, other=0.0).to(tl.float64)
        dot = tl.load(stats_ptr + 3 * tiles + tile, mask=tile < tiles, other=0.0).to(tl.float64)
        shift = tl.maximum((most - top) * inverse, -800.0)
        weight = tl.exp(shift)
        total += tl.sum(tl.where(most == float("-inf"), 0.0, mass * weight))
        spread += tl.sum(tl.where(most == float("-inf"), 0.0, (dot * 0.6931471805599453 + mass * shift) * weight))
        start += LANES
    return top, total, tl.log(total) - spread / total


@triton.jit
def _take(scores_ptr, stride, i, mask, dtype: tl.constexpr):
    return tl.load(scores_ptr + i.to(tl.int64) * stride, mask=mask, other=float("-inf")).to(dtype)


@triton.jit
def _reached(weights, index, before, target):
    """The first index at which the sum exceeds ``target``, the last one of any weight if none does; -1 if none has."""
    reached = before + tl.cumsum(weights, 0)
    first = tl.min(tl.where((reached > target) & (weights > 0), index, 2147483647))
    last = tl.max(tl.where(weights > 0, index, -1))
    at = tl.where(first < 2147483647, first, last)
    own = tl.sum(tl.where(index == at, weights, 0.0))
    return at, first < 2147483647, tl.sum(tl.where(index == at, reached, 0.0)) - own, own


@triton.jit
def _draw(
    scores_ptr, stride, size, stats_ptr, masses_ptr, tiles, top, inverse, slope, slope_low, nothing,
    low, high, first, by_count, afresh, total, u, offset, TILE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The token where the mass reaches u * total + offset, of those in [low, high], at ``low`` from id ``first`` on.

    Their mass and number too, if these are taken ``afresh``: else the masses are those of all tokens.
    """
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    count, start = 0, 0
    if afresh:
        total = total * 0.0
        tl.debug_barrier()
        while start < tiles:
            tile = start + tl.arange(0, ROWS)
            visit = tl.load(stats_ptr + tile, mask=tile < tiles, other=float("-inf")) >= low
            mass = tl.zeros([ROWS], dtype)
            if tl.max(visit.to(tl.int32)) > 0:
                i = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
                x = _take(scores_ptr, stride, i, (i < size) & visit[:, None], dtype)
                keep = ((x > low) & (x <= high)) | ((x == low) & (i >= first))
                weight, _ = _weights(x, top, slope, slope_low, nothing)
                mass = tl.sum(tl.where(keep, tl.where(by_count, 1.0, weight), 0.0), 1)
                count += _sum(keep.to(tl.int32))
            tl.store(masses_ptr + tile, mass.to(tl.float64), mask=tile < tiles)
            total += tl.sum(mass.to(tl.float64))
            start += ROWS
        tl.debug_barrier()
    target = u * total + offset
    before, rest, whole = tl.zeros([], tl.float64), tl.zeros([], tl.float64), tl.full([], 1, tl.float64)
    at, found, start = 0, 0, 0
    while start < tiles:
        tile = start + tl.arange(0, LANES)
        mass = tl.load(masses_ptr + tile, mask=tile < tiles, other=0.0)
        here, beyond, prior, own = _reached(mass, tile, before, target)
        better = (found == 0) & (here >= 0)
        at, rest, whole = (
            tl.where(better, here, at),
            tl.where(better, target - prior, rest),
            tl.where(better, own, whole),
        )
        found = tl.where(beyond, 1, found)
        before += tl.sum(mass)
        start += LANES
    i = at * TILE + tl.arange(0, TILE)
    x = _take(scores_ptr, stride, i, i < size, dtype)
    keep = ((x > low) & (x <= high)) | ((x == low) & (i >= first))
    weight = tl.where(by_count, 1.0, tl.exp((x.to(tl.float64) - top.to(tl.float64)) * inverse))
    weight = tl.where(keep, weight, 0.0)
    id, _, _, _ = _reached(weight, i, before * 0.0, rest * (tl.sum(weight) / whole))
    return id, total, count
