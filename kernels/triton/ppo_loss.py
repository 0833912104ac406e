"""The clipped loss in Triton: a program per BLOCK tokens makes gradients and partial sums, one more adds these up."""

import torch

import triton
import triton.language as tl

#: Tokens per program, and partial sums per step of the last one. The same for every shape, for bits follow from them.
BLOCK = 1024
BLOCK_PARTIALS = 64
KLS = {"k1": 1, "k2": 2, "k3": 3, "abs": 4}
NUMBERS = ["low", "high", "cliprange_value", "vf_coef", "entropy_coef", "kl_coef", "dual_clip", "clamp"]
STRIDES = [
    f"{name}_stride_{d}" for name in ("lp", "old", "adv", "mask", "v", "old_v", "ret", "ent", "ref") for d in "bt"
]


@triton.jit
def _reduced(x):
    """e^r - 1 and 2^n in two factors with x = n ln(2) + r: tl.exp of float32 is off by many ulp where x is large."""
    x = tl.where(x > 89.0, 89.0, tl.where(x < -104.0, -104.0, x))
    n = tl.floor(tl.where(x != x, 0.0, x) * 1.44269504 + 0.5)
    r = tl.fma(n, 2.12194440e-4, tl.fma(n, -0.693359375, x))
    p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    p = tl.fma(p, r, 8.3334519073e-3)
    p = tl.fma(p, r, 4.1665795894e-2)
    p = tl.fma(p, r, 1.6666665459e-1)
    p = tl.fma(p, r, 5.0000001201e-1)
    n = n.to(tl.int32)
    first = ((n // 2 + 127) << 23).to(tl.float32, bitcast=True)
    second = ((n - n // 2 + 127) << 23).to(tl.float32, bitcast=True)
    return tl.fma(p, r * r, r), first, second, n


@triton.jit
def _exp(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    fraction, first, second, _ = _reduced(x)
    return (1.0 + fraction) * first * second


@triton.jit
def _expm1(x):
    if x.dtype == tl.float64:
        u = tl.exp(x)
        near = (u - 1.0) * x / tl.where(u == 1.0, 1.0, tl.log(u))  # Kahan: both have the rounding of u
        return tl.where(u == 1.0, x, tl.where(tl.abs(x) < 1.0, near, u - 1.0))
    fraction, first, second, n = _reduced(x)
    return tl.where(n == 0, fraction, (1.0 + fraction) * first * second - 1.0)


@triton.jit
def _larger(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def _clamped(x, low, high):
    x = tl.where((x < low) | (low != low), low, x)
    return tl.where((x > high) | (high != high), high, x)


@triton.jit
def _share(unclipped, clipped, x, low, high):
    """The share of the unclipped loss's derivative that the larger one has; equal ones give half of theirs each."""
    tied = tl.where((x >= low) & (x <= high), 1.0, 0.5).to(x.dtype)
    return tl.where(unclipped == clipped, tied, (unclipped > clipped).to(x.dtype))


@triton.jit
def _policy(log_ratio, advantage, low, high, dual_clip, clamp):
    ratio = _exp(_clamped(log_ratio, -clamp, clamp))
    unclipped, clipped = -advantage * ratio, -advantage * _clamped(ratio, low, high)
    loss, share = _larger(unclipped, clipped), _share(unclipped, clipped, ratio, low, high)
    if dual_clip != 0:
        bound, falls = -advantage * dual_clip, advantage < 0
        kept = tl.where(loss == bound, 0.5 * share, tl.where(loss < bound, share, 0.0))
        share = tl.where(falls, kept, share)
        loss = tl.where(falls & (bound < loss), bound, loss)
    slope = tl.where((log_ratio >= -clamp) & (log_ratio <= clamp), unclipped * share, 0.0)
    return loss, slope, ratio, (clipped > unclipped).to(ratio.dtype)


@triton.jit
def _value(value, old, target, cliprange):
    low, high = old - cliprange, old + cliprange
    error, clipped_error = value - target, _clamped(value, low, high) - target
    unclipped, clipped = error * error, clipped_error * clipped_error
    share = _share(unclipped, clipped, value, low, high)
    return 0.5 * _larger(unclipped, clipped), error * share, (clipped > unclipped).to(value.dtype)


@triton.jit
def _kl(d, KL: tl.constexpr):
    if KL == 1:
        return d, tl.full(d.shape, 1.0, d.dtype)
    if KL == 2:
        return 0.5 * d * d, d
    if KL == 3:
        slope = -_expm1(-d)
        return d - slope, slope
    return tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d)).to(d.dtype)


@triton.jit
def _put(partials_ptr, which: tl.constexpr, terms):
    tl.store(partials_ptr + tl.program_id(0).to(tl.int64) * 9 + which, tl.sum(terms.to(tl.float64)))


@triton.jit
def _load(ptr, stride_b, stride_t, i, width, valid, FLAT: tl.constexpr):
    at = i
    if not FLAT:
        at = i // width * stride_b + i % width * stride_t
    return tl.load(ptr + at, mask=valid, other=0)


@triton.jit
def _denominator(denominator_ptr, count_ptr):
    """Of float64: what was given, else the count of the mask, else 1."""
    denominator = tl.full([], 1.0, tl.float64)
    if denominator_ptr is not None:
        denominator = tl.load(denominator_ptr).to(tl.float64)
    elif count_ptr is not None:
        denominator = tl.maximum(tl.load(count_ptr), 1).to(tl.float64)
    return denominator


@triton.jit(do_not_specialize=["width", "tokens", *NUMBERS, *STRIDES])
def ppo_loss_kernel(
    lp_ptr, lp_stride_b, lp_stride_t, old_ptr, old_stride_b, old_stride_t, adv_ptr, adv_stride_b, adv_stride_t,
    mask_ptr, mask_stride_b, mask_stride_t, v_ptr, v_stride_b, v_stride_t, old_v_ptr, old_v_stride_b, old_v_stride_t,
    ret_ptr, ret_stride_b, ret_stride_t, ent_ptr, ent_stride_b, ent_stride_t, ref_ptr, ref_stride_b, ref_stride_t,
    denominator_ptr, count_ptr, row_counts_ptr, width, tokens,
    low: tl.float64, high: tl.float64, cliprange_value: tl.float64, vf_coef: tl.float64, entropy_coef: tl.float64,
    kl_coef: tl.float64, dual_clip: tl.float64, clamp: tl.float64,
    grad_lp_ptr, grad_v_ptr, grad_ent_ptr, partials_ptr,
    FLAT: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p takes tokens [p BLOCK, (p + 1) BLOCK) of the flattened batch."""
    dtype: tl.constexpr = lp_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < tokens
    valid = _load(mask_ptr, mask_stride_b, mask_stride_t, i, width, inside, FLAT) != 0
    weight = valid.to(dtype)
    if row_counts_ptr is not None:
        weight = weight / tl.load(row_counts_ptr + i // width, mask=valid, other=1).to(dtype)
    scaled = tl.where(valid, weight * (1.0 / _denominator(denominator_ptr, count_ptr)).to(dtype), 0.0)
    lp = _load(lp_ptr, lp_stride_b, lp_stride_t, i, width, valid, FLAT)
    log_ratio = lp - _load(old_ptr, old_stride_b, old_stride_t, i, width, valid, FLAT)
    advantage = _load(adv_ptr, adv_stride_b, adv_stride_t, i, width, valid, FLAT)
    low, high = tl.full([BLOCK], low, dtype), tl.full([BLOCK], high, dtype)
    clamp, dual_clip = tl.full([BLOCK], clamp, dtype), tl.full([], dual_clip, dtype)
    loss, slope, ratio, clipped = _policy(log_ratio, advantage, low, high, dual_clip, clamp)
    _put(partials_ptr, 0, weight * loss)
    _put(partials_ptr, 4, weight * (0.5 * log_ratio * log_ratio))
    _put(partials_ptr, 5, weight * clipped)
    _put(partials_ptr, 7, weight * ratio)
    ratio = tl.where(valid, ratio, 0.0)
    strange = tl.max((ratio != ratio).to(tl.int32)) != 0  # tl.max does not see NaN
    largest = tl.where(strange, float("nan"), tl.max(tl.where(ratio != ratio, 0.0, ratio)))
    tl.store(partials_ptr + tl.program_id(0).to(tl.int64) * 9 + 8, largest.to(tl.float64))
    if v_ptr is not None:
        value = _load(v_ptr, v_stride_b, v_stride_t, i, width, valid, FLAT)
        old = value
        if old_v_ptr is not None:
            old = _load(old_v_ptr, old_v_stride_b, old_v_stride_t, i, width, valid, FLAT)
        target = _load(ret_ptr, ret_stride_b, ret_stride_t, i, width, valid, FLAT)
        value_loss, value_slope, value_clipped = _value(value, old, target, tl.full([], cliprange_value, dtype))
        _put(partials_ptr, 1, weight * value_loss)
        _put(partials_ptr, 6, weight * value_clipped)
        tl.store(
            grad_v_ptr + i, tl.where(valid, scaled * (tl.full([], vf_coef, dtype) * value_slope), 0.0), mask=inside
        )
    if ent_ptr is not None:
        _put(partials_ptr, 2, weight * _load(ent_ptr, ent_stride_b, ent_stride_t, i, width, valid, FLAT))
        tl.store(grad_ent_ptr + i, -tl.full([], entropy_coef, dtype) * scaled, mask=inside)
    if ref_ptr is not None:
        estimate, kl_slope = _kl(lp - _load(ref_ptr, ref_stride_b, ref_stride_t, i, width, valid, FLAT), KL)
        _put(partials_ptr, 3, weight * estimate)
        coef = tl.full([], kl_coef, dtype)
        slope += tl.where(coef == 0, 0.0, coef * kl_slope)  # without a weight it may be infinite
    tl.store(grad_lp_ptr + i, tl.where(valid, scaled * slope, 0.0), mask=inside)


@triton.jit
def _at(means, column, which: tl.constexpr):
    return tl.sum(tl.where(column == which, means, 0.0))


@triton.jit
def _weighted(coef, mean):
    return tl.where(coef == 0, 0.0, coef * mean)  # without a weight it may be infinite


@triton.jit(do_not_specialize=["blocks", "vf_coef", "entropy_coef", "kl_coef"])
def ppo_loss_finish_kernel(
    partials_ptr, blocks, denominator_ptr, count_ptr, loss_ptr, stats_ptr,
    vf_coef: tl.float64, entropy_coef: tl.float64, kl_coef: tl.float64,
    HAS_VALUES: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_REF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds up the partial sums in their order; columns that nothing was written to count 0."""
    column = tl.arange(0, 16)
    written = (column == 0) | (column == 4) | (column == 5) | (column == 7) | (column == 8)
    written |= ((column == 1) | (column == 6)) & HAS_VALUES
    written |= ((column == 2) & HAS_ENTROPY) | ((column == 3) & HAS_REF)
    sums = tl.zeros([BLOCK, 16], tl.float64)
    row = tl.arange(0, BLOCK).to(tl.int64)[:, None]
    start = tl.program_id(0)
    while start < blocks:
        x = tl.load(partials_ptr + row * 9 + column[None, :], mask=(row < blocks) & written[None, :], other=0.0)
        sums = tl.where(column[None, :] == 8, _larger(x, sums), sums + x)
        row += BLOCK
        start += BLOCK
    strange = tl.max((sums != sums).to(tl.int32), 0) != 0
    largest = tl.where(strange, float("nan"), tl.max(tl.where(sums != sums, 0.0, sums), 0))
    total = tl.sum(sums, 0)
    means = tl.where(total == 0, 0.0, total / _denominator(denominator_ptr, count_ptr))
    means = tl.where(column == 8, largest, means)
    loss = _at(means, column, 0)
    loss += _weighted(tl.full([], vf_coef, tl.float64), _at(means, column, 1))
    loss -= _weighted(tl.full([], entropy_coef, tl.float64), _at(means, column, 2))
    loss += _weighted(tl.full([], kl_coef, tl.float64), _at(means, column, 3))
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
    tl.store(stats_ptr + column, means.to(stats_ptr.dtype.element_ty), mask=column < 9)


GRADS = [f"{name}_{field}" for name in ("lp", "v", "ent") for field in ("stride_b", "stride_t", "width", "tokens")]


@triton.jit
def _scale(factor, to_ptr, from_ptr, stride_b, stride_t, width, tokens, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_ptr + i, factor * _load(from_ptr, stride_b, stride_t, i, width, i < tokens, FLAT), mask=i < tokens)


@triton.jit(do_not_specialize=GRADS)
def ppo_loss_backward_kernel(
    factor_ptr,
    to_lp_ptr, lp_ptr, lp_stride_b, lp_stride_t, lp_width, lp_tokens,
    to_v_ptr, v_ptr, v_stride_b, v_stride_t, v_width, v_tokens,
    to_ent_ptr, ent_ptr, ent_stride_b, ent_stride_t, ent_width, ent_tokens,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p takes tokens [p BLOCK, (p + 1) BLOCK) of each gradient."""
    factor = tl.load(factor_ptr)
    _scale(factor, to_lp_ptr, lp_ptr, lp_stride_b, lp_stride_t, lp_width, lp_tokens, FLAT, BLOCK)
    _scale(factor, to_v_ptr, v_ptr, v_stride_b, v_stride_t, v_width, v_tokens, FLAT, BLOCK)
    _scale(factor, to_ent_ptr, ent_ptr, ent_stride_b, ent_stride_t, ent_width, ent_tokens, FLAT, BLOCK)


def _strides(tensor: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int]:
    if tensor is None:
        return None, 0, 0
    return tensor, tensor.stride(0) if tensor.dim() == 2 else 0, tensor.stride(-1)


def ppo_loss(
    logprobs, old_logprobs, advantages, mask, values, old_values, returns, entropy, ref_logprobs, denominator,
    cliprange_low, cliprange_high, cliprange_value, vf_coef, entropy_coef, kl_coef, kl, dual_clip, log_ratio_clamp,
    aggregate, loss, stats, grad_logprobs, grad_values, grad_entropy,
) -> None:  # fmt: skip
    """Fill the outputs (rlhf_fast/ops/ppo_loss says what with); the arguments are those of the op's schema."""
    inputs = (logprobs, old_logprobs, advantages, mask, values, old_values, returns, entropy, ref_logprobs)
    tokens, count, row_counts = logprobs.numel(), None, None
    if aggregate.startswith("seq"):
        row_counts = mask.sum(-1)
        count = (row_counts > 0).sum()
    elif aggregate == "token_mean" and denominator is None:
        count = mask.sum()
    blocks = triton.cdiv(tokens, BLOCK)
    partials = logprobs.new_empty((max(blocks, 1), 9), dtype=torch.float64)
    if blocks:
        ppo_loss_kernel[(blocks,)](
            *(x for tensor in inputs for x in _strides(tensor)),
            denominator, count, row_counts if aggregate == "seq_mean_token_mean" else None,
            logprobs.shape[-1], tokens,
            1.0 - cliprange_low, 1.0 + cliprange_high, cliprange_value, vf_coef, entropy_coef, kl_coef,
            dual_clip or 0.0, log_ratio_clamp,
            grad_logprobs, grad_values, grad_entropy, partials,
            FLAT=all(t is None or t.is_contiguous() for t in inputs), KL=KLS[kl], BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    ppo_loss_finish_kernel[(1,)](
        partials, blocks, denominator, count, loss, stats, vf_coef, entropy_coef, kl_coef,
        HAS_VALUES=values is not None, HAS_ENTROPY=entropy is not None, HAS_REF=ref_logprobs is not None,
        BLOCK=BLOCK_PARTIALS, num_warps=4,
    )  # fmt: skip


def ppo_loss_backward(grad_loss, grad_logprobs, grad_values, grad_entropy, logprobs, values, entropy) -> None:
    """Fill the last three with those before, times ``grad_loss``; what is absent has no elements."""
    pairs = (logprobs, grad_logprobs), (values, grad_values), (entropy, grad_entropy)
    blocks = triton.cdiv(max(to.numel() for to, _ in pairs), BLOCK)
    if blocks:
        ppo_loss_backward_kernel[(blocks,)](
            grad_loss, *(x for to, grad in pairs for x in (to, *_strides(grad), max(to.shape[-1], 1), to.numel())),
            FLAT=all(grad.is_contiguous() for _, grad in pairs), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
