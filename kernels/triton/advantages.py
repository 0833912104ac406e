"""KL-shaped rewards, GAE and whitening in Triton: a program per row shapes, scans as gae does and sums up; then each
program puts the moments of all rows together, in the same order, and whitens its BLOCK_T tokens.
"""

import torch

import triton
import triton.language as tl
from rlhf_fast.triton_kernels.gae import BLOCK_T, _end_of, _handed_on, _last_valid, _then
from rlhf_fast.triton_kernels.ppo_loss import KLS, _kl

BLOCK_B = 256  # rows put together at a time
MANY_ROWS = 1024  # from here on one program does so for all
#: What must not be compiled into a kernel, for it changes from call to call.
CHANGING = [f"{name}_stride_b" for name in ("logprobs", "refs", "values", "mask", "scores")]
CHANGING += ["tokens", "kl_coef", "clip", "gamma", "gamma_lam"]


@triton.jit
def _clipped(x, bound):
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def _tokens(
    logprobs_ptr, logprobs_stride, refs_ptr, refs_stride, values_ptr, values_stride, mask_ptr, mask_stride,
    scores_ptr, scores_stride, t, inside, landing, score, price, clip, KL: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Reward, value and mask of the tokens ``t``."""
    valid = tl.load(mask_ptr + t * mask_stride, mask=inside, other=0) != 0
    value = tl.load(values_ptr + t * values_stride, mask=inside, other=0.0)
    logprob = tl.load(logprobs_ptr + t * logprobs_stride, mask=inside, other=0.0)
    estimate, _ = _kl(logprob - tl.load(refs_ptr + t * refs_stride, mask=inside, other=0.0), KL)
    reward = tl.where(price == 0, 0.0, -price * estimate)  # a price of 0 is none, even of an infinite KL
    if DENSE:
        reward += _clipped(tl.load(scores_ptr + t * scores_stride, mask=inside, other=0.0), clip)
    else:
        reward += tl.where(t == landing, score, 0.0)
    return tl.where(valid, reward, 0.0), value, valid


@triton.jit
def _scanned(reward, value, valid, counts, gamma, gamma_lam, u):
    """What each token is given, from the tokens after each; ``u`` comes in from behind the block."""
    handed = tl.where(gamma_lam == 0, gamma * value, tl.fma(reward - value, gamma_lam, gamma * value))
    a = tl.where(counts, gamma_lam, 1.0)
    a, handed = tl.associative_scan((a, tl.where(valid, handed, 0.0)), 0, _then)
    return _handed_on(a, handed, u)


@triton.jit
def _store_behind(advantages_ptr, returns_ptr, rewards_ptr, last, tokens, landing, score, BLOCK_T: tl.constexpr):
    """What lies behind the last valid token: nothing, but perhaps the score."""
    zero = tl.zeros([BLOCK_T], advantages_ptr.dtype.element_ty)
    top = last * 0 + tokens - 1
    while top > last:
        t = top - tl.arange(0, BLOCK_T)
        tl.store(advantages_ptr + t, zero, mask=t > last)
        tl.store(returns_ptr + t, zero, mask=t > last)
        tl.store(rewards_ptr + t, tl.where(t == landing, score, zero), mask=t > last)
        top -= BLOCK_T


@triton.jit
def _put(moments_ptr, count, mean, squares):
    tl.store(moments_ptr, count)
    tl.store(moments_ptr + 1, mean)
    tl.store(moments_ptr + 2, squares)


@triton.jit(do_not_specialize=CHANGING)
def advantages_kernel(
    logprobs_ptr, logprobs_stride_b, logprobs_stride_t, refs_ptr, refs_stride_b, refs_stride_t,
    values_ptr, values_stride_b, values_stride_t, mask_ptr, mask_stride_b, mask_stride_t,
    scores_ptr, scores_stride_b, scores_stride_t, last_values_ptr, last_values_stride, price_ptr,
    advantages_ptr, returns_ptr, rewards_ptr, moments_ptr,
    tokens, kl_coef: tl.float64, clip: tl.float64, gamma: tl.float64, gamma_lam: tl.float64,
    KL: tl.constexpr, DENSE: tl.constexpr, NEXT: tl.constexpr, ZERO: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """First launch, a program per row: all outputs, the advantages not yet whitened, and the row's moments."""
    dtype: tl.constexpr = logprobs_ptr.dtype.element_ty
    gamma, gamma_lam = tl.full([], gamma, dtype), tl.full([], gamma_lam, dtype)
    clip, price = tl.full([], clip, dtype), tl.full([], kl_coef, dtype)
    if price_ptr is not None:
        price = tl.load(price_ptr)
    b = tl.program_id(0).to(tl.int64)
    logprobs_ptr, refs_ptr = logprobs_ptr + b * logprobs_stride_b, refs_ptr + b * refs_stride_b
    values_ptr, mask_ptr = values_ptr + b * values_stride_b, mask_ptr + b * mask_stride_b
    scores_ptr, rewards_ptr = scores_ptr + b * scores_stride_b, rewards_ptr + b * tokens
    advantages_ptr, returns_ptr = advantages_ptr + b * tokens, returns_ptr + b * tokens
    last = _last_valid(mask_ptr, mask_stride_t, b * 0, b * 0 + tokens, BLOCK_T)
    landing = tl.where(last < 0, last, tl.minimum(last + NEXT, tokens - 1))
    u = tl.zeros([], dtype)
    score = u if DENSE else _clipped(tl.load(scores_ptr), clip)
    if last_values_ptr is not None:
        u = gamma * tl.load(last_values_ptr + b * last_values_stride)
    _store_behind(advantages_ptr, returns_ptr, rewards_ptr, last, tokens, landing, score, BLOCK_T)
    count = tl.zeros([], tl.float64)
    center, total, squares = count, count, count
    top = last
    while top >= 0:
        t = top - tl.arange(0, BLOCK_T)
        inside = (t + 1 >= 0) & (t < last)  # what the tokens are given: the scan up to the token after each
        reward, value, valid = _tokens(
            logprobs_ptr, logprobs_stride_t, refs_ptr, refs_stride_t, values_ptr, values_stride_t,
            mask_ptr, mask_stride_t, scores_ptr, scores_stride_t, t + 1, inside, landing, score, price, clip, KL, DENSE,
        )  # fmt: skip
        handed = _scanned(reward, value, valid, inside if ZERO else valid, gamma, gamma_lam, u)
        u = _end_of(handed, BLOCK_T)
        reward, value, valid = _tokens(
            logprobs_ptr, logprobs_stride_t, refs_ptr, refs_stride_t, values_ptr, values_stride_t,
            mask_ptr, mask_stride_t, scores_ptr, scores_stride_t, t, t >= 0, landing, score, price, clip, KL, DENSE,
        )  # fmt: skip
        advantage = reward - value + handed
        tl.store(advantages_ptr + t, tl.where(valid, advantage, 0.0), mask=t >= 0)
        tl.store(returns_ptr + t, tl.where(valid, advantage + value, 0.0), mask=t >= 0)
        tl.store(rewards_ptr + t, reward, mask=t >= 0)
        # Around a member of the data, from which their mean is never so far that the squares would cancel.
        wide = advantage.to(tl.float64)
        center = tl.where(top == last, tl.sum(tl.where(t == last, wide, 0.0)), center)
        away = tl.where(valid, wide - center, 0.0)
        count += tl.sum(valid.to(tl.float64))
        total += tl.sum(away)
        squares += tl.sum(away * away)
        top -= BLOCK_T
    shift = total / tl.maximum(count, 1.0)
    _put(moments_ptr + 3 * b, count, center + shift, squares - total * shift)


@triton.jit
def _together(moments_ptr, rows, BLOCK_B: tl.constexpr):
    """Count, mean and sum of squared deviations over all rows."""
    row = tl.arange(0, BLOCK_B).to(tl.int64)
    counts = tl.zeros([BLOCK_B], tl.float64)
    totals, squares = counts, counts
    for start in range(0, rows, BLOCK_B):
        count = tl.load(moments_ptr + 3 * (start + row), mask=start + row < rows, other=0.0)
        counts += count
        totals += count * tl.load(moments_ptr + 3 * (start + row) + 1, mask=start + row < rows, other=0.0)
    mean = tl.sum(totals) / tl.maximum(tl.sum(counts), 1.0)
    for start in range(0, rows, BLOCK_B):
        count = tl.load(moments_ptr + 3 * (start + row), mask=start + row < rows, other=0.0)
        away = tl.load(moments_ptr + 3 * (start + row) + 1, mask=start + row < rows, other=0.0) - mean
        own = tl.load(moments_ptr + 3 * (start + row) + 2, mask=start + row < rows, other=0.0)
        squares += tl.where(count > 0, own + count * away * away, 0.0)
    return tl.sum(counts), mean, tl.sum(squares)


@triton.jit(do_not_specialize=["rows"])
def advantages_together_kernel(moments_ptr, rows, BLOCK_B: tl.constexpr):
    """Puts what is put together where one more row would be."""
    count, mean, squares = _together(moments_ptr, rows, BLOCK_B)
    _put(moments_ptr + 3 * rows, count, mean, squares)


@triton.jit(do_not_specialize=["mask_stride_b", "rows", "tokens", "keep_mean", "unbiased"])
def advantages_whiten_kernel(
    advantages_ptr, mask_ptr, mask_stride_b, mask_stride_t, moments_ptr, rows, tokens, keep_mean, unbiased,
    MANY: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Last launch, a program per BLOCK_T tokens of a row."""
    if MANY:
        moments_ptr += 3 * rows.to(tl.int64)
        count, mean, squares = tl.load(moments_ptr), tl.load(moments_ptr + 1), tl.load(moments_ptr + 2)
    else:
        count, mean, squares = _together(moments_ptr, rows, BLOCK_B)
    dtype: tl.constexpr = advantages_ptr.dtype.element_ty
    scale = (1.0 / tl.sqrt(squares / tl.maximum(count - unbiased, 1.0) + 1e-8)).to(dtype)
    near = mean.to(dtype)  # the mean in two parts, so that float32 is enough
    rest = (mean - near.to(tl.float64)).to(dtype)
    block = tl.program_id(0).to(tl.int64)
    b = block // tl.cdiv(tokens, BLOCK_T)
    t = (block - b * tl.cdiv(tokens, BLOCK_T)) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = tl.load(mask_ptr + b * mask_stride_b + t * mask_stride_t, mask=t < tokens, other=0) != 0
    x = tl.load(advantages_ptr + b * tokens + t, mask=valid, other=0.0)
    shift = tl.where(keep_mean != 0, near, 0.0)
    tl.store(advantages_ptr + b * tokens + t, ((x - near) - rest) * scale + shift, mask=valid)


def advantages(
    scores, logprobs, ref_logprobs, values, mask, last_values, price, kl_coef, kl, at, clip_scores, gamma, lam, holes,
    whiten, shift_mean, unbiased, advantages, returns, rewards,
) -> None:  # fmt: skip
    """Fill the outputs (rlhf_fast/ops/advantages.py says what with); the arguments are those of the op's schema."""
    if logprobs.numel() == 0:
        return
    rows, tokens = logprobs.shape
    moments = logprobs.new_empty((rows + 1, 3), dtype=torch.float64)
    inputs = [(x, x.stride(0), x.stride(1)) for x in (logprobs, ref_logprobs, values, mask)]
    dense = scores.dim() == 2
    advantages_kernel[(rows,)](
        *(x for given in inputs for x in given), scores, scores.stride(0), scores.stride(1) if dense else 0,
        last_values, 0 if last_values is None else last_values.stride(0), price,
        advantages, returns, rewards, moments, tokens, kl_coef,
        float("inf") if clip_scores is None else clip_scores, gamma, gamma * lam,
        KL=KLS[kl], DENSE=dense, NEXT=at == "next", ZERO=holes == "zero", BLOCK_T=BLOCK_T, num_warps=8,
    )  # fmt: skip
    if not whiten:
        return
    if rows > MANY_ROWS:
        advantages_together_kernel[(1,)](moments, rows, BLOCK_B=BLOCK_B, num_warps=8)
    advantages_whiten_kernel[(rows * triton.cdiv(tokens, BLOCK_T),)](
        advantages, *inputs[3], moments, rows, tokens, int(not shift_mean), int(unbiased),
        MANY=rows > MANY_ROWS, BLOCK_B=BLOCK_B, BLOCK_T=BLOCK_T, num_warps=4,
    )  # fmt: skip
