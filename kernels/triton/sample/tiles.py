"""The first launch: what each tile of a row weighs."""

import triton
import triton.language as tl
from rlhf_fast.triton_kernels.sample.floats import _divided, _knob, _scale, _weights

#: What must not be compiled into a kernel, for it changes from call to call.
CHANGING = [f"{name}_stride_b" for name in ("logits", "counts", "bias", "allowed")]
CHANGING += ["flags", "size", "tiles", "splits"]


@triton.jit(do_not_specialize=CHANGING)
def sample_tiles_kernel(
    logits_ptr, logits_stride_b, logits_stride_v, temperature_ptr, repetition_ptr, presence_ptr, frequency_ptr, flags,
    counts_ptr, counts_stride_b, counts_stride_v, bias_ptr, bias_stride_b, bias_stride_v,
    allowed_ptr, allowed_stride_b, allowed_stride_v, scores_ptr, stats_ptr,
    size, tiles, splits, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Per tile: maximum and mass of the scores, their number (-1 if one is NaN or inf); of the logits mass · z too."""
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) // splits
    tile = tl.program_id(0) % splits * WIDE + tl.arange(0, WIDE)
    i = tile[:, None].to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]
    inside = i < size
    raw = tl.load(logits_ptr + row * logits_stride_b + i * logits_stride_v, mask=inside, other=float("-inf")).to(dtype)
    slope, slope_low, nothing = _scale(_knob(temperature_ptr, row, flags, 0, 1.0), dtype)
    top = tl.max(raw, 1)
    weight, y = _weights(raw, tl.where(top == float("-inf"), 0.0, top)[:, None], slope, slope_low, nothing)
    mass, spread = tl.sum(weight, 1), tl.sum(weight * y, 1)
    score = raw
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + row * bias_stride_b + i * bias_stride_v, mask=inside, other=0.0)
        score += bias.to(dtype)
    if counts_ptr is not None:
        counts = tl.load(counts_ptr + row * counts_stride_b + i * counts_stride_v, mask=inside, other=0)
        repetition = _knob(repetition_ptr, row, flags, 4, 1.0).to(dtype)
        repeated = tl.where(score < 0, score * repetition, _divided(score, repetition))
        score = tl.where(counts > 0, repeated, score) - _knob(frequency_ptr, row, flags, 6, 0.0).to(dtype) * counts.to(
            dtype
        )
        score -= tl.where(counts > 0, _knob(presence_ptr, row, flags, 5, 0.0).to(dtype), 0.0)
    bad = tl.sum((inside & ~(score < float("inf"))).to(tl.int32), 1) > 0
    if allowed_ptr is not None:
        allowed = tl.load(allowed_ptr + row * allowed_stride_b + i * allowed_stride_v, mask=inside, other=0)
        score = tl.where(allowed != 0, score, float("-inf"))
    stats_ptr += row * 6 * tiles + tile
    if scores_ptr is not None:
        tl.store(scores_ptr + row * size + i, score, mask=inside)
        tl.store(stats_ptr + 4 * tiles, top, mask=tile < tiles)
        tl.store(stats_ptr + 5 * tiles, mass, mask=tile < tiles)
        top = tl.max(score, 1)
        weight, y = _weights(score, tl.where(top == float("-inf"), 0.0, top)[:, None], slope, slope_low, nothing)
        mass = tl.sum(weight, 1)
    count = tl.sum((score > float("-inf")).to(tl.int32), 1)
    tl.store(stats_ptr, top, mask=tile < tiles)
    tl.store(stats_ptr + tiles, mass, mask=tile < tiles)
    tl.store(stats_ptr + 2 * tiles, tl.where(bad, -1, count).to(dtype), mask=tile < tiles)
    tl.store(stats_ptr + 3 * tiles, spread, mask=tile < tiles)
