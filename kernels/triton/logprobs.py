"""Chosen-token logprob, entropy and logsumexp of every row of logits, and their gradient, in Triton: a program per row.

Forward: one read, every lane with a softmax of its own that is merged at the end, so that the bits follow from V alone.
Backward: one read, one write.
"""

import torch

import triton
import triton.language as tl
from rlhf_fast.triton_kernels import rows


@triton.jit
def _tanh(x):
    """By exp of a negative number, and by its series near 0, where that cancels."""
    a = tl.abs(x)
    e = tl.exp(-2 * a)
    large = (1 - e) / (1 + e)
    s = -x * x
    rest = tl.fma(s, tl.fma(s, tl.fma(s, 0.021869488536, 0.053968253968), 0.13333333333), 0.33333333333)
    small = tl.fma(a, s * rest, a)
    y = tl.where(a < 0.1, small, large)
    return tl.where(x < 0, -y, y)


@triton.jit
def _capped(x, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        return softcap * _tanh(x / softcap)
    return x


NUMBERS = ["rows_middle", "rows_inner", "size", "softcap", "temperature", "logits_stride_v"]
NUMBERS += [f"{name}_stride_{d}" for name in ("logits", "ids", "mask") for d in "omi"]


@triton.jit(do_not_specialize=NUMBERS)
def logprobs_kernel(
    logits_ptr, logits_stride_o, logits_stride_m, logits_stride_i, logits_stride_v,
    ids_ptr, ids_stride_o, ids_stride_m, ids_stride_i,
    mask_ptr, mask_stride_o, mask_stride_m, mask_stride_i,
    logprobs_ptr, entropy_ptr, lse_ptr,
    rows_middle, rows_inner, size,
    softcap: tl.float64, temperature: tl.float64,
    CAPPED: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i takes row i; with a wrong id all of its results are NaN."""
    dtype: tl.constexpr = logprobs_ptr.dtype.element_ty
    softcap, scale = tl.full([], softcap, dtype), tl.full([], 1 / temperature, dtype)
    row = tl.program_id(0).to(tl.int64)
    size = rows.sided(size, SIDE)
    if not rows.counts(row, mask_ptr, rows_middle, rows_inner, mask_stride_o, mask_stride_m, mask_stride_i):
        zero = tl.zeros([], dtype)
        tl.store(logprobs_ptr + row, zero)
        tl.store(entropy_ptr + row, zero)
        tl.store(lse_ptr + row, zero)
        return
    at = rows.offset(row, rows_middle, rows_inner, logits_stride_o, logits_stride_m, logits_stride_i)
    logits_ptr += rows.sided(at, SIDE)
    top = tl.full([BLOCK // 4], float("-inf"), dtype)
    total, dot = tl.zeros([BLOCK // 4], dtype), tl.zeros([BLOCK // 4], dtype)
    start = row * 0
    while start < size:
        x = rows.load(logits_ptr, start, logits_stride_v, size, dtype, SIDE, BLOCK)
        z = _capped(x, softcap, CAPPED) * scale
        if CAPPED:
            z = tl.where(tl.arange(0, BLOCK) < size - start, z, float("-inf"))
        z = rows.quarters(z)
        top, base, shift = rows.raised(top, z)
        weight, d = tl.exp(shift), z - base[None, None, :]
        e = tl.exp(d)
        # A shift as far as a token masked by the lowest float makes it would be infinite times 0.
        dot = tl.fma(total, tl.maximum(shift, rows.LOWEST), dot)
        dot = tl.fma(dot, weight, rows.sum_of(e * tl.maximum(d, rows.LOWEST)))
        total = tl.fma(total, weight, rows.sum_of(e))
        start += BLOCK
    base, shift = rows.merged(top)
    weight = tl.exp(shift)
    dot = rows.tree_sum((dot + total * tl.maximum(shift, rows.LOWEST)) * weight)
    total = rows.tree_sum(total * weight)
    chosen = tl.load(ids_ptr + rows.offset(row, rows_middle, rows_inner, ids_stride_o, ids_stride_m, ids_stride_i))
    inside = (chosen >= 0) & (chosen < size)
    x = tl.load(logits_ptr + chosen.to(tl.int64) * logits_stride_v, mask=inside, other=0.0).to(dtype)
    z = _capped(x, softcap, CAPPED) * scale
    log_total = tl.log(total)
    nothing = tl.where(inside, 0.0, float("nan"))  # the whole result of a row with a wrong id
    tl.store(logprobs_ptr + row, z - base - log_total + nothing)
    tl.store(entropy_ptr + row, log_total - dot / total + nothing)
    tl.store(lse_ptr + row, base + log_total + nothing)


@triton.jit(do_not_specialize=NUMBERS)
def logprobs_backward_kernel(
    upstream_ptr, logits_ptr, logits_stride_o, logits_stride_m, logits_stride_i, logits_stride_v,
    ids_ptr, ids_stride_o, ids_stride_m, ids_stride_i,
    mask_ptr, mask_stride_o, mask_stride_m, mask_stride_i,
    grad_ptr, rows_middle, rows_inner, size,
    softcap: tl.float64, temperature: tl.float64,
    CAPPED: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``upstream`` is [N, 5]: the three gradients, the entropy, the logsumexp."""
    dtype: tl.constexpr = upstream_ptr.dtype.element_ty
    softcap, scale = tl.full([], softcap, dtype), tl.full([], 1 / temperature, dtype)
    row = tl.program_id(0).to(tl.int64)
    size = rows.sided(size, SIDE)
    grad_ptr += row * size
    if not rows.counts(row, mask_ptr, rows_middle, rows_inner, mask_stride_o, mask_stride_m, mask_stride_i):
        rows.clear(grad_ptr, size, BLOCK)
        return
    upstream_ptr += row * 5
    g, h, up = tl.load(upstream_ptr), tl.load(upstream_ptr + 1), tl.load(upstream_ptr + 2)
    entropy, lse = tl.load(upstream_ptr + 3), tl.load(upstream_ptr + 4)
    chosen = tl.load(ids_ptr + rows.offset(row, rows_middle, rows_inner, ids_stride_o, ids_stride_m, ids_stride_i))
    at = rows.offset(row, rows_middle, rows_inner, logits_stride_o, logits_stride_m, logits_stride_i)
    logits_ptr += rows.sided(at, SIDE)
    start = row * 0
    while start < size:
        capped = _capped(rows.load(logits_ptr, start, logits_stride_v, size, dtype, SIDE, BLOCK), softcap, CAPPED)
        logp = capped * scale - lse  # a product as it is rounded: that of a certain token and its lse are one number
        dz = tl.where(logp == float("-inf"), 0.0, tl.exp(logp) * tl.fma(-h, logp + entropy, up - g))
        dz += rows.only_at(chosen, start, g, BLOCK)
        if CAPPED:
            bound = capped / softcap
            dz *= tl.fma(-bound, bound, 1.0)
        rows.store(grad_ptr, start, size, dz * scale, BLOCK)
        start += BLOCK


def logprobs(
    logits: torch.Tensor,  # [..., V]
    ids: torch.Tensor,  # [...]
    mask: torch.Tensor | None,  # [...], bool
    temperature: float,
    softcap: float | None,
    logprobs: torch.Tensor,  # [...]
    entropy: torch.Tensor,  # [...]
    lse: torch.Tensor,  # [...]
) -> None:
    """Fill the outputs (rlhf_fast/ops/logprobs.py says what with)."""
    if ids.numel() == 0:
        return
    fold = rows.folded(logits[..., 0], ids, ids if mask is None else mask)
    if fold is None:  # many dimensions in no order: a launch for each index of the first
        for i in range(logits.shape[0]):
            part = None if mask is None else mask[i]
            again(logits[i], ids[i], part, temperature, softcap, logprobs[i], entropy[i], lse[i])
        return
    shape, (of_logits, of_ids, of_mask) = fold
    logprobs_kernel[(ids.numel(),)](
        logits, *of_logits, logits.stride(-1),
        ids, *of_ids,
        mask, *of_mask,
        logprobs, entropy, lse,
        *shape[1:], logits.shape[-1],
        softcap or 0.0, temperature,
        CAPPED=softcap is not None, **rows.constants(lse.dtype, logits),
    )  # fmt: skip


def logprobs_backward(
    grad_logprobs: torch.Tensor,  # [...]
    grad_entropy: torch.Tensor,  # [...]
    grad_lse: torch.Tensor,  # [...]
    logits: torch.Tensor,  # [..., V]
    ids: torch.Tensor,  # [...]
    entropy: torch.Tensor,  # [...]
    lse: torch.Tensor,  # [...]
    mask: torch.Tensor | None,  # [...], bool
    temperature: float,
    softcap: float | None,
    grad: torch.Tensor,  # [..., V]
) -> None:
    """Fill ``grad`` (rlhf_fast/ops/logprobs.py says what with)."""
    if ids.numel() == 0:
        return
    numbers = grad_logprobs, grad_entropy, grad_lse, entropy, lse
    fold = rows.folded(logits[..., 0], ids, ids if mask is None else mask)
    if fold is None:
        for i in range(logits.shape[0]):
            part = [None if t is None else t[i] for t in (*numbers[:3], logits, ids, *numbers[3:], mask)]
            logprobs_backward(*part, temperature, softcap, grad[i])
        return
    shape, (of_logits, of_ids, of_mask) = fold
    upstream = torch.stack([t.reshape(-1) for t in numbers], dim=-1)
    logprobs_backward_kernel[(ids.numel(),)](
        upstream, logits, *of_logits, logits.stride(-1),
        ids, *of_ids,
        mask, *of_mask,
        grad, *shape[1:], logits.shape[-1],
        softcap or 0.0, temperature,
        CAPPED=softcap is not None, **rows.constants(lse.dtype, logits, grad, sums=False),
    )  # fmt: skip


again = logprobs  # its own output hides it from itself
