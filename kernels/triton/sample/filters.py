"""Top-k, top-p and min-p: each becomes the smallest score that stays."""

import triton
import triton.language as tl
from rlhf_fast.triton_kernels.sample.draw import _draw, _take
from rlhf_fast.triton_kernels.sample.floats import (
    _divided,
    _float,
    _inverse,
    _knob,
    _lowest,
    _middle,
    _ordinal,
    _sum,
    _weights,
)


@triton.jit
def _lowest_that(x, y, temperature, LIKELY: tl.constexpr):
    """The smallest score as large as ``x`` after the division; if LIKELY, at least ``y`` times as likely."""
    dtype: tl.constexpr = x.dtype
    bits: tl.constexpr = dtype.primitive_bitwidth
    lane, least = tl.arange(0, 256).to(tl.int64), tl.full([], -(2 ** (bits - 1)), tl.int64)
    shift = bits - 8
    while shift >= 0:
        ordinal = least + (lane << shift) + ((lane * 0 + 1) << shift) - 1
        score = _float(ordinal, dtype)
        if LIKELY:
            z = tl.minimum((score.to(tl.float64) - x.to(tl.float64)) / temperature, 0.0)
            holds = tl.exp(z).to(dtype) >= y
        else:
            divisor = temperature.to(dtype)
            holds = _divided(score, divisor) >= _divided(x, divisor)
        holds = (holds & (score == score) & (ordinal < _ordinal(x))) | (ordinal >= _ordinal(x))
        least += (256 - tl.sum(holds.to(tl.int64))) << shift
        shift -= 8
    return least


@triton.jit
def _guess(
    scores_ptr, stride, size, stats_ptr, tiles, top, slope, slope_low, nothing, least, count, limit, by_count,
    TILE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Two scores, as ordinals, between which the edge should be: by the maxima of the tiles, or a sample of them."""
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    low, high = _ordinal(least), _ordinal(top) + 1
    a, b, bound = low, high, high
    missing = count - limit  # with top-k it is k
    if by_count & (missing <= tiles):  # as many tiles reach as far, so the k-th token does
        for _ in range(20):
            middle, enough, start = _middle(a, bound), 0, 0
            while start < tiles:
                tile = start + tl.arange(0, LANES)
                most = tl.load(stats_ptr + tile, mask=tile < tiles, other=float("-inf"))
                enough += tl.sum((most >= _float(middle, dtype)).to(tl.int32))
                start += LANES
            a, bound = tl.where(enough >= missing, middle, a), tl.where(enough >= missing, bound, middle)
    elif count > ROWS * TILE:
        tile = (tl.arange(0, ROWS).to(tl.int64) * tiles // ROWS).to(tl.int32)
        i = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        x = _take(scores_ptr, stride, i, i < size, dtype)
        weight, _ = _weights(x, top, slope, slope_low, nothing)
        weight = tl.where(x >= least, tl.where(by_count, 1.0, weight), 0.0)
        share = ROWS / tl.maximum(tiles, 1).to(tl.float64)
        under = tl.where(by_count, count - 1.5 * missing, 0.94 * limit) * share
        over = tl.where(by_count, count - 0.6 * missing, 1.06 * limit) * share
        bound, b, beyond = high, low, high
        for _ in range(20):
            middle, other = _middle(a, bound), _middle(b, beyond)
            fits = _sum(tl.where(x < _float(middle, dtype), weight, 0.0)) <= under
            a, bound = tl.where(fits, middle, a), tl.where(fits, bound, middle)
            fits = _sum(tl.where(x < _float(other, dtype), weight, 0.0)) <= over
            b, beyond = tl.where(fits, other, b), tl.where(fits, beyond, other)
        b = beyond
    return a, b


@triton.jit
def _pass(
    scores_ptr, stride, size, stats_ptr, masses_ptr, tiles, ids_ptr, top, slope, slope_low, nothing,
    least, a, b, by_count, within, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mass and number of tokens in [least, a), the same of [a, b), which are collected if they are few enough.

    Unless ``within``, tiles that do not reach ``a`` count as a whole: no token is below ``least``.
    """
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    under, inside = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    fewer, n, start = 0, 0, 0
    while start < tiles:
        tile = start + tl.arange(0, ROWS)
        most = tl.load(stats_ptr + tile, mask=tile < tiles, other=float("-inf"))
        visit = most >= tl.where(within, least, a)
        whole = (tile < tiles) & (most < tl.where(within, float("-inf"), a))
        number = tl.load(stats_ptr + 2 * tiles + tile, mask=whole, other=0.0)
        fewer += tl.sum(number.to(tl.int32))
        under += tl.where(by_count, number.to(tl.float64), tl.load(masses_ptr + tile, mask=whole, other=0.0))
        if tl.max(visit.to(tl.int32)) > 0:
            i = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
            x = _take(scores_ptr, stride, i, (i < size) & visit[:, None], dtype)
            weight, _ = _weights(x, top, slope, slope_low, nothing)
            weight = tl.where(by_count, 1.0, weight)
            below, between = (x >= least) & (x < a), (x >= a) & (x < b)
            under += tl.sum(tl.where(below, weight, 0.0), 1).to(tl.float64)
            inside += tl.sum(tl.where(between, weight, 0.0), 1).to(tl.float64)
            fewer += _sum(below.to(tl.int32))
            more = _sum(between.to(tl.int32))
            if (more > 0) & (n + more <= ROWS * TILE):
                tl.store(ids_ptr + n + _rank(between), i, mask=between)
            n += more
        start += ROWS
    tl.debug_barrier()
    return tl.sum(under), tl.sum(inside), fewer, n


@triton.jit
def _rank(flags):
    """How many are set before each, row by row."""
    ones = flags.to(tl.int32)
    rows = tl.sum(ones, 1)
    return tl.cumsum(ones, 1) - ones + (tl.cumsum(rows, 0) - rows)[:, None]


@triton.jit
def _thirds(low, high, steps, dtype: tl.constexpr):
    """Two ordinals in between: of the thirds of the values at first, then of the ordinals."""
    step = tl.maximum(((high >> 1) - (low >> 1)) // 3 * 2, 1)
    a, b = low + step, high - step
    if steps < 3:
        x, y = _float(low, dtype) / 3, _float(high, dtype) / 3
        a, b = _ordinal(x + x + y), _ordinal(x + y + y)
    a = tl.minimum(tl.maximum(a, low + 1), high - 1)
    return a, tl.minimum(tl.maximum(b, a), high - 1)


@triton.jit
def _search(
    scores_ptr, stride, size, stats_ptr, masses_ptr, tiles, ids_ptr, top, slope, slope_low, nothing,
    least, count, limit, by_count, within, TILE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The largest score of which the tokens in [``least``, it) are no more than ``limit``, by mass or by number.

    Returned are its ordinal, what is below it, how many tokens have it and how many were collected, -1 if too many.
    """
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    low, high = _ordinal(least), _ordinal(top) + 1
    a, b = low, high
    if count > ROWS * TILE:
        a, b = _guess(scores_ptr, stride, size, stats_ptr, tiles, top, slope, slope_low, nothing, least, count, limit,
                      by_count, TILE, ROWS, LANES)  # fmt: skip
    under, fewer, up_to, n, steps = tl.zeros([], tl.float64), 0, count, -1, 0
    while (n < 0) & (low + 1 < high):  # else all in between are equal
        below, inside, number, between = _pass(
            scores_ptr, stride, size, stats_ptr, masses_ptr, tiles, ids_ptr, top, slope, slope_low, nothing,
            least, _float(a, dtype), _float(b, dtype), by_count, within, TILE, ROWS,
        )  # fmt: skip
        from_a, from_b = (a == low) | (below <= limit), (b < high) & (below + inside <= limit)
        if from_b:
            low, under, fewer = b, below + inside, number + between
        elif from_a:
            low, under, fewer, high, up_to = a, below, number, b, number + between
            if between <= ROWS * TILE:
                n = between
        else:
            high, up_to = a, number
        a, b = low, high
        if up_to - fewer > ROWS * TILE:
            a, b = _thirds(low, high, steps, dtype)
        steps += 1
    ties = up_to - fewer
    if n >= 0:
        at = tl.arange(0, ROWS)[:, None] * TILE + tl.arange(0, TILE)[None, :]
        x = _take(scores_ptr, stride, tl.load(ids_ptr + at, mask=at < n, other=0), at < n, dtype)
        weight, _ = _weights(x, top, slope, slope_low, nothing)
        weight = tl.where(at < n, tl.where(by_count, 1.0, weight), 0.0)
        while low + 1 < high:
            middle = _middle(low, high)
            fits = under + _sum(tl.where(x < _float(middle, dtype), weight, 0.0)) <= limit
            low, high = tl.where(fits, middle, low), tl.where(fits, high, middle)
        under += _sum(tl.where(x < _float(low, dtype), weight, 0.0))
        ties = _sum(((x == _float(low, dtype)) & (at < n)).to(tl.int32))
    return low, under, ties, n


@triton.jit
def _nth_tie(scores_ptr, stride, ids_ptr, x, n, number, TILE: tl.constexpr, ROWS: tl.constexpr):
    """The id of the collected token that equals ``x`` and has ``number`` of these before it."""
    at = tl.arange(0, ROWS)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    ids = tl.load(ids_ptr + at, mask=at < n, other=0)
    tie = (_take(scores_ptr, stride, ids, at < n, x.dtype) == x) & (at < n)
    return _sum(tl.where(tie & (_rank(tie) == number), ids, 0))


@triton.jit
def _filtered(
    scores_ptr, stride, size, stats_ptr, masses_ptr, tiles, ids_ptr, top, slope, slope_low, nothing, total, count,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, flags,
    TILE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The smallest score that the filters leave, and the id from which on it is left."""
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    lowest = _lowest(dtype)
    low, first, phase = lowest, 0, 0
    while phase < 2:  # top-k, then top-p of what that leaves
        by_k = phase == 0
        # Knobs are loaded where they are used: registers are short in the search.
        top_k, top_p = _knob(top_k_ptr, row, flags, 1, 0), _knob(top_p_ptr, row, flags, 2, 1.0)
        if (by_k & (top_k > 0) & (top_k < count)) | ((phase == 1) & (top_p < 1)):
            tail = (1 - top_p).to(dtype).to(tl.float64)
            if dtype == tl.float32:  # rounding comes after the sum there: to compare with the middle says the same
                tail = (tail + _float(_ordinal((1 - top_p).to(dtype)) + 1, dtype).to(tl.float64)) / 2
            limit = tl.where(by_k, (count - top_k).to(tl.float64), total * tail)
            edge, under, ties, n = _search(
                scores_ptr, stride, size, stats_ptr, masses_ptr, tiles, ids_ptr, top, slope, slope_low,
                nothing, low, count, limit, by_k, low > lowest, TILE, ROWS, LANES,
            )  # fmt: skip
            low = _float(edge, dtype)
            weight, _ = _weights(low, top, slope, slope_low, nothing)
            dropped = tl.zeros([], tl.float64)
            if (phase == 1) & (ties > 1):
                over = tl.floor((limit - under) / weight.to(tl.float64))
                dropped = tl.minimum(tl.maximum(over, 0.0), ties - 1.0)
            temperature = _knob(temperature_ptr, row, flags, 0, 1.0)
            if by_k & (temperature != 1.0):
                low = tl.maximum(_float(_lowest_that(low, low, temperature, False), dtype), lowest)
            if (dropped > 0) & (n >= 0):
                first = _nth_tie(scores_ptr, stride, ids_ptr, low, n, dropped.to(tl.int32), TILE, ROWS)
            elif by_k | (dropped > 0):  # the mass that top-k leaves, or the tie at which top-p begins
                id, mass, number = _draw(
                    scores_ptr, stride, size, stats_ptr, masses_ptr, tiles, top, _inverse(temperature), slope,
                    slope_low, nothing, low, tl.where(by_k, top, low), 0, phase == 1, True, total, 0.0, dropped,
                    TILE, ROWS, LANES,
                )  # fmt: skip
                first, total, count = tl.where(by_k, 0, id), mass, tl.where(by_k, number, count)
        phase += 1
    min_p = _knob(min_p_ptr, row, flags, 3, 0.0)
    if min_p > 0:
        temperature = _knob(temperature_ptr, row, flags, 0, 1.0)
        least = _float(_lowest_that(top, min_p.to(dtype), temperature, True), dtype)
        first = tl.where(least > low, 0, first)
        low = tl.maximum(least, low)
    return low, first
