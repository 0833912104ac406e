"""Sampling in Triton, in two launches, three with filters: the masses of tiles of the rows; filters; the draw.

The first launch, a program per WIDE tiles, reads the logits once. The others have a program per row and look only at
tiles whose largest score matters, which without filters is one. Top-k and top-p look for the score at their edge: a
pass adds up what lies below two pivots and collects what lies between them, and the search ends if the edge is there
and ROWS * TILE tokens at most are. The first pivots come from the maxima of the tiles or from a few tiles, so that a
pass or two are expected; later ones leave a third of the bracket, so that the worst case is 24 passes (44 in float64).
The draw takes the masses of what is left, tile by tile, in one more pass, and then looks into one tile.

Floor, not measured: V * b bytes for the first launch, then for each pass V * b or less, from the L2 cache if the batch
fits: two passes with one filter, four with top-k and top-p (the second is for the mass that top-k leaves).

Masses are added up from the least likely token, which keeps a small tail exact: in float32 within a tile, in float64
between tiles. Against the reference the id differs only where the uniform lies within 2^-20 (float64: 2^-40) of a
boundary of the CDF, and what top-p keeps only where its threshold lies within that share of the tail from a boundary.
"""

import torch

import triton
import triton.language as tl
from rlhf_fast.triton_kernels.sample.draw import _draw, _merged, _policy
from rlhf_fast.triton_kernels.sample.filters import _filtered
from rlhf_fast.triton_kernels.sample.floats import _divided, _inverse, _knob, _lowest, _scale
from rlhf_fast.triton_kernels.sample.tiles import sample_tiles_kernel

#: Tokens per tile: a warp adds it up. Of the same size for every shape, for the bits follow from it.
TILE = 512
ROWS = 4  # tiles per step of the other launches: with more the search spills
LANES = 512  # tiles that are merged at once
WIDE = 4  # tiles of a program of the first launch
WARPS = 16  # of the second launch: a thread for each of LANES and of TILE, so that all variants add up in one order
KNOBS = ("temperature", "top_k", "top_p", "min_p", "repetition", "presence", "frequency")
#: What must not be compiled into a kernel, for it changes from call to call.
CHANGING = ["flags", "size", "tiles", "scores_stride_b", "logits_stride_b"]


@triton.jit
def _uniform(seed, position):
    """A multiple of 2^-53 in [0, 1): the seed is the key of Philox, the position its counter."""
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
    whole = ((first >> 5).to(tl.int64) << 26) + (second >> 6).to(tl.int64)
    return whole.to(tl.float64) * (2.0**-53)


@triton.jit
def _in_range(row, flags, temperature, top_p, min_p, repetition_ptr, presence_ptr, frequency_ptr):
    infinite = float("inf")
    repetition = _knob(repetition_ptr, row, flags, 4, 1.0)
    good = (temperature >= 0) & (temperature < infinite) & (top_p == top_p) & (min_p >= 0) & (min_p <= 1)
    good = good & (repetition > 0) & (repetition < infinite)
    good = good & (tl.abs(_knob(presence_ptr, row, flags, 5, 0.0)) < infinite)
    return good & (tl.abs(_knob(frequency_ptr, row, flags, 6, 0.0)) < infinite)


@triton.jit(do_not_specialize=CHANGING)
def sample_filter_kernel(
    scores_ptr, scores_stride_b, scores_stride_v, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, flags,
    stats_ptr, masses_ptr, found_ptr, low_ptr, first_ptr, size, tiles,
    TILE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Program i finds the smallest score of row i that the filters leave, and from which id on that is left."""
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    stats_ptr += row * 6 * tiles
    masses_ptr += row * tiles
    temperature, top_p = _knob(temperature_ptr, row, flags, 0, 1.0), _knob(top_p_ptr, row, flags, 2, 1.0)
    slope, slope_low, nothing = _scale(temperature, dtype)
    top, count, bad, total = _merged(stats_ptr, masses_ptr, tiles, slope, slope_low, nothing, LANES)
    usable = (bad == 0) & (count > 0) & (temperature > 0) & (top_p > 0)
    if usable == 0:  # nothing is drawn, or the likeliest
        return
    low, first = _filtered(
        scores_ptr + row * scores_stride_b, scores_stride_v, size, stats_ptr, masses_ptr, tiles,
        found_ptr + row * ROWS * TILE, top, slope, slope_low, nothing, total, count,
        temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, flags, TILE, ROWS, LANES,
    )  # fmt: skip
    tl.store(low_ptr + row, low)
    tl.store(first_ptr + row, first)


@triton.jit(do_not_specialize=CHANGING)
def sample_kernel(
    logits_ptr, logits_stride_b, logits_stride_v, scores_ptr, scores_stride_b, scores_stride_v, seeds_ptr,
    positions_ptr, temperature_ptr, top_p_ptr, min_p_ptr, repetition_ptr, presence_ptr, frequency_ptr, flags,
    stats_ptr, masses_ptr, low_ptr, first_ptr, ids_ptr, logprobs_ptr, policy_ptr, logmass_ptr, entropy_ptr, kept_ptr,
    status_ptr, size, tiles, PROCESSED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Program i draws for row i; ``low`` and ``first`` say what the filters left of it, if there are any."""
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    temperature = _knob(temperature_ptr, row, flags, 0, 1.0)
    top_p, min_p = _knob(top_p_ptr, row, flags, 2, 1.0), _knob(min_p_ptr, row, flags, 3, 0.0)
    stats_ptr += row * 6 * tiles
    masses_ptr += row * tiles
    scores_ptr += row * scores_stride_b
    slope, slope_low, nothing = _scale(temperature, dtype)
    top, count, bad, total = _merged(stats_ptr, masses_ptr, tiles, slope, slope_low, nothing, LANES)
    good = _in_range(row, flags, temperature, top_p, min_p, repetition_ptr, presence_ptr, frequency_ptr)
    status = tl.where(bad > 0, 1, tl.where((count == 0) | (good == 0), 2, 0))
    tl.store(status_ptr + row, status.to(tl.int8))
    if status != 0:
        _store(ids_ptr + row, logprobs_ptr + row, policy_ptr + row, logmass_ptr + row, entropy_ptr + row,
               kept_ptr + row, -1, float("nan"), float("nan"), float("nan"), 0)  # fmt: skip
        return
    divisor = temperature.to(dtype)
    greedy = (divisor == 0) | (tl.abs(_divided(top, divisor)) == float("inf")) | (top_p <= 0)
    inverse = _inverse(temperature)
    low, first = _lowest(dtype), 0
    filtered = greedy
    if low_ptr is not None:
        low, first = tl.load(low_ptr + row), tl.load(first_ptr + row)
        filtered = greedy | (low > _lowest(dtype))
    first = tl.where(greedy, 0, first)
    u = tl.where(greedy, 0.0, _uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row)))
    id, total, kept = _draw(
        scores_ptr, scores_stride_v, size, stats_ptr, masses_ptr, tiles, top, inverse, slope, slope_low, nothing,
        tl.where(greedy, top, low), top, first, greedy, filtered, total, u, 0.0, TILE, ROWS, LANES,
    )  # fmt: skip
    kept = tl.where(greedy, 1, tl.where(filtered, kept, count))
    score = tl.load(scores_ptr + id.to(tl.int64) * scores_stride_v).to(tl.float64)
    logprob = tl.where(greedy, 0.0, (score - top.to(tl.float64)) * inverse - tl.log(total))
    raw_top, raw_total, entropy = _policy(stats_ptr, tiles, inverse, PROCESSED, LANES)
    raw = tl.load(logits_ptr + row * logits_stride_b + id.to(tl.int64) * logits_stride_v).to(tl.float64)
    policy = (raw - raw_top) * inverse - tl.log(raw_total)
    _store(ids_ptr + row, logprobs_ptr + row, policy_ptr + row, logmass_ptr + row, entropy_ptr + row, kept_ptr + row,
           id, logprob, policy, entropy, kept)  # fmt: skip


@triton.jit
def _store(ids_ptr, logprobs_ptr, policy_ptr, logmass_ptr, entropy_ptr, kept_ptr, id, logprob, policy, entropy, kept):
    dtype: tl.constexpr = logprobs_ptr.dtype.element_ty
    logprob, policy = tl.full([], logprob, dtype), tl.full([], policy, dtype)
    tl.store(ids_ptr, tl.full([], id, tl.int64))
    tl.store(logprobs_ptr, logprob)
    tl.store(policy_ptr, policy)
    tl.store(logmass_ptr, policy - logprob)
    tl.store(entropy_ptr, tl.full([], entropy, dtype))
    tl.store(kept_ptr, tl.full([], kept, tl.int64))


def sample(
    logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor,
    temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None,
    min_p: torch.Tensor | None, repetition_penalty: torch.Tensor | None, presence_penalty: torch.Tensor | None,
    frequency_penalty: torch.Tensor | None, token_counts: torch.Tensor | None, logit_bias: torch.Tensor | None,
    allowed: torch.Tensor | None, ids: torch.Tensor, logprobs: torch.Tensor, policy_logprobs: torch.Tensor,
    kept_logmass: torch.Tensor, entropy: torch.Tensor, kept: torch.Tensor, status: torch.Tensor,
) -> None:  # fmt: skip
    """Fill the outputs (rlhf_fast/ops/sample says what with)."""
    rows, size = logits.shape
    if rows == 0:
        return
    seeds, positions = seeds.contiguous(), positions.contiguous()
    knobs = temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty
    flags = sum(1 << bit for bit, knob in enumerate(knobs) if knob is not None)
    nowhere = seeds.view(torch.float64)  # not read, for its flag is not set
    pointers = [
        (seeds if name == "top_k" else nowhere) if knob is None else knob.contiguous()
        for name, knob in zip(KNOBS, knobs, strict=True)
    ]
    tiles, dtype = triton.cdiv(size, TILE), logprobs.dtype
    splits = triton.cdiv(tiles, WIDE)
    processed = [(t, 0, 0) if t is None else (t, *t.stride()) for t in (token_counts, logit_bias, allowed)]
    any_processed = any(t is not None for t, _, _ in processed)
    scores = torch.empty((rows, size), dtype=dtype, device=logits.device) if any_processed else None
    stats = torch.empty((rows, 6, tiles), dtype=dtype, device=logits.device)
    masses = torch.empty((rows, tiles), dtype=torch.float64, device=logits.device)
    sample_tiles_kernel[(rows * splits,)](
        logits, *logits.stride(), pointers[0], *pointers[4:], flags, *processed[0], *processed[1], *processed[2],
        scores, stats, size, tiles, splits, TILE=TILE, WIDE=WIDE, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    drawn = logits if scores is None else scores
    low = first = None
    if any(knob is not None for knob in knobs[1:4]):
        low, first = logprobs.new_empty(rows), ids.new_empty(rows, dtype=torch.int32)
        found = ids.new_empty((rows, ROWS * TILE), dtype=torch.int32)
        sample_filter_kernel[(rows,)](
            drawn, *drawn.stride(), *pointers[:4], flags, stats, masses, found, low, first, size, tiles,
            TILE=TILE, ROWS=ROWS, LANES=LANES, num_warps=8, maxnreg=248, enable_fp_fusion=False,
        )  # fmt: skip
    sample_kernel[(rows,)](
        logits, *logits.stride(), drawn, *drawn.stride(), seeds, positions, pointers[0], *pointers[2:], flags,
        stats, masses, low, first, ids, logprobs, policy_logprobs, kept_logmass, entropy, kept, status, size, tiles,
        PROCESSED=any_processed, TILE=TILE, ROWS=ROWS, LANES=LANES,
        num_warps=WARPS, maxnreg=96, enable_fp_fusion=False,
    )  # fmt: skip
