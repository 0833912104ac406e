"""Exact KL divergence of two models over the vocabulary, and its gradient, in Triton: a program per row, both rows read
side by side, each logit once.

With the logits z and w of the two, and their maxima m and n so far, a lane keeps the sums of exp(z - m), of
exp(z - m) (z - m), of exp(w - n) and of exp(z - m) ((z - m) - (w - n)).
"""

import torch

import triton
import triton.language as tl
from rlhf_fast.triton_kernels import rows

#: Stands for an exponential or a weight that is 0, where 0 times infinity would be NaN.
LEAST = tl.constexpr(1e-30)
NUMBERS = ["rows_middle", "rows_inner", "size", "temperature", "logits_stride_v", "ref_stride_v"]
NUMBERS += [f"{name}_stride_{d}" for name in ("logits", "ref", "ids", "mask") for d in "omi"]


@triton.jit
def _weight(shift):
    """What is left of sums whose maximum rises by ``-shift``: never 0, for that of an infinite sum would be NaN."""
    return tl.maximum(tl.exp(shift), LEAST)


@triton.jit
def _gap(shift, ref_shift):
    """By how much a cross term moves; nothing where the policy's share of it is lifted to 0, which may be infinite."""
    return tl.where(shift < rows.LOWEST, 0.0, shift - ref_shift)


@triton.jit
def _put(kl_ptr, logprobs_ptr, ref_logprobs_ptr, entropy_ptr, lse_ptr, ref_lse_ptr, row, kl, logprob, ref_logprob,
           entropy, lse, ref_lse, CHOSEN: tl.constexpr):  # fmt: skip
    """Store the results of a row."""
    tl.store(kl_ptr + row, kl)
    tl.store(entropy_ptr + row, entropy)
    tl.store(lse_ptr + row, lse)
    tl.store(ref_lse_ptr + row, ref_lse)
    if CHOSEN:
        tl.store(logprobs_ptr + row, logprob)
        tl.store(ref_logprobs_ptr + row, ref_logprob)


@triton.jit(do_not_specialize=NUMBERS)
def kl_kernel(
    logits_ptr, logits_stride_o, logits_stride_m, logits_stride_i, logits_stride_v,
    ref_ptr, ref_stride_o, ref_stride_m, ref_stride_i, ref_stride_v,
    ids_ptr, ids_stride_o, ids_stride_m, ids_stride_i,
    mask_ptr, mask_stride_o, mask_stride_m, mask_stride_i,
    kl_ptr, logprobs_ptr, ref_logprobs_ptr, entropy_ptr, lse_ptr, ref_lse_ptr,
    rows_middle, rows_inner, size, temperature: tl.float64, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i takes row i; with a wrong id its logprobs are NaN."""
    dtype: tl.constexpr = kl_ptr.dtype.element_ty
    scale = tl.full([], 1 / temperature, dtype)
    row = tl.program_id(0).to(tl.int64)
    size = rows.sided(size, SIDE)
    if not rows.counts(row, mask_ptr, rows_middle, rows_inner, mask_stride_o, mask_stride_m, mask_stride_i):
        zero = tl.zeros([], dtype)
        _put(kl_ptr, logprobs_ptr, ref_logprobs_ptr, entropy_ptr, lse_ptr, ref_lse_ptr, row,
               zero, zero, zero, zero, zero, zero, ids_ptr is not None)  # fmt: skip
        return
    at = rows.offset(row, rows_middle, rows_inner, logits_stride_o, logits_stride_m, logits_stride_i)
    ref_at = rows.offset(row, rows_middle, rows_inner, ref_stride_o, ref_stride_m, ref_stride_i)
    logits_ptr += rows.sided(at, SIDE)
    ref_ptr += rows.sided(ref_at, SIDE)
    top = tl.full([BLOCK // 4], float("-inf"), dtype)
    total = tl.zeros([BLOCK // 4], dtype)
    dot, cross, ref_top, ref_total = total, total, top, total
    start = row * 0
    while start < size:
        z = rows.quarters(rows.load(logits_ptr, start, logits_stride_v, size, dtype, SIDE, BLOCK) * scale)
        w = rows.quarters(rows.load(ref_ptr, start, ref_stride_v, size, dtype, SIDE, BLOCK) * scale)
        top, base, shift = rows.raised(top, z)
        ref_top, ref_base, ref_shift = rows.raised(ref_top, w)
        weight, d, ref_d = _weight(shift), z - base[None, None, :], w - ref_base[None, None, :]
        e, d = tl.exp(d), tl.maximum(d, rows.LOWEST)
        # Where only the reference excludes a token this is infinite, however small e.
        terms = tl.where(z == float("-inf"), 0.0, tl.where(w == float("-inf"), float("inf"), e * (d - ref_d)))
        cross = tl.fma(tl.fma(total, _gap(shift, ref_shift), cross), weight, rows.sum_of(terms))
        dot = tl.fma(tl.fma(total, tl.maximum(shift, rows.LOWEST), dot), weight, rows.sum_of(e * d))
        total = tl.fma(total, weight, rows.sum_of(e))
        ref_total = tl.fma(ref_total, tl.exp(ref_shift), rows.sum_of(tl.exp(ref_d)))
        start += BLOCK
    base, shift = rows.merged(top)
    ref_base, ref_shift = rows.merged(ref_top)
    weight = _weight(shift)
    cross = rows.tree_sum((cross + total * _gap(shift, ref_shift)) * weight)
    dot = rows.tree_sum((dot + total * tl.maximum(shift, rows.LOWEST)) * weight)
    total = rows.tree_sum(total * weight)
    ref_total = rows.tree_sum(ref_total * tl.exp(ref_shift))
    log_total, ref_log_total = tl.log(total), tl.log(ref_total)
    kl = cross / total - log_total + ref_log_total
    logprob, ref_logprob = log_total, log_total
    if ids_ptr is not None:
        chosen = tl.load(ids_ptr + rows.offset(row, rows_middle, rows_inner, ids_stride_o, ids_stride_m, ids_stride_i))
        inside = (chosen >= 0) & (chosen < size)
        chosen = chosen.to(tl.int64)
        z = tl.load(logits_ptr + chosen * logits_stride_v, mask=inside, other=float("nan")).to(dtype) * scale
        w = tl.load(ref_ptr + chosen * ref_stride_v, mask=inside, other=float("nan")).to(dtype) * scale
        logprob, ref_logprob = z - base - log_total, w - ref_base - ref_log_total
    _put(kl_ptr, logprobs_ptr, ref_logprobs_ptr, entropy_ptr, lse_ptr, ref_lse_ptr, row, kl, logprob, ref_logprob,
           log_total - dot / total, base + log_total, ref_base + ref_log_total, ids_ptr is not None)  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def kl_backward_kernel(
    upstream_ptr, logits_ptr, logits_stride_o, logits_stride_m, logits_stride_i, logits_stride_v,
    ref_ptr, ref_stride_o, ref_stride_m, ref_stride_i, ref_stride_v,
    ids_ptr, ids_stride_o, ids_stride_m, ids_stride_i,
    mask_ptr, mask_stride_o, mask_stride_m, mask_stride_i,
    grad_ptr, rows_middle, rows_inner, size, temperature: tl.float64, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``upstream`` is [N, 7]: the three gradients, the divergence, the entropy and both logsumexps."""
    dtype: tl.constexpr = upstream_ptr.dtype.element_ty
    scale = tl.full([], 1 / temperature, dtype)
    row = tl.program_id(0).to(tl.int64)
    size = rows.sided(size, SIDE)
    grad_ptr += row * size
    if not rows.counts(row, mask_ptr, rows_middle, rows_inner, mask_stride_o, mask_stride_m, mask_stride_i):
        rows.clear(grad_ptr, size, BLOCK)
        return
    upstream_ptr += row * 7
    k, g, h = tl.load(upstream_ptr), tl.load(upstream_ptr + 1), tl.load(upstream_ptr + 2)
    kl, entropy = tl.load(upstream_ptr + 3), tl.load(upstream_ptr + 4)
    lse, ref_lse = tl.load(upstream_ptr + 5), tl.load(upstream_ptr + 6)
    chosen = row * 0 - 1
    if ids_ptr is not None:
        at = rows.offset(row, rows_middle, rows_inner, ids_stride_o, ids_stride_m, ids_stride_i)
        chosen = tl.load(ids_ptr + at).to(tl.int64)
        g = tl.where(((chosen >= 0) & (chosen < size)) | (g == 0), g, float("nan"))
    at = rows.offset(row, rows_middle, rows_inner, logits_stride_o, logits_stride_m, logits_stride_i)
    logits_ptr += rows.sided(at, SIDE)
    at = rows.offset(row, rows_middle, rows_inner, ref_stride_o, ref_stride_m, ref_stride_i)
    ref_ptr += rows.sided(at, SIDE)
    start = row * 0
    while start < size:
        # Products as they are rounded: the logit of a certain token and its logsumexp are one number.
        logp = rows.load(logits_ptr, start, logits_stride_v, size, dtype, SIDE, BLOCK) * scale - lse
        ref_logp = rows.load(ref_ptr, start, ref_stride_v, size, dtype, SIDE, BLOCK) * scale - ref_lse
        # An infinite KL that nobody asks about must not reach the gradient as 0 * inf.
        slope = tl.fma(-h, logp + entropy, tl.where(k == 0, 0.0, k * (logp - ref_logp - kl)) - g)
        dz = tl.where(logp == float("-inf"), 0.0, tl.exp(logp) * slope)
        dz += rows.only_at(chosen, start, g, BLOCK)
        rows.store(grad_ptr, start, size, dz * scale, BLOCK)
        start += BLOCK


def kl(
    logits: torch.Tensor,  # [..., V]
    ref_logits: torch.Tensor,  # [..., V]
    ids: torch.Tensor | None,  # [...]
    mask: torch.Tensor | None,  # [...], bool
    temperature: float,
    kl: torch.Tensor,  # [...]
    logprobs: torch.Tensor,  # [...], or [0] without ids
    ref_logprobs: torch.Tensor,  # [...], or [0] without ids
    entropy: torch.Tensor,  # [...]
    lse: torch.Tensor,  # [...]
    ref_lse: torch.Tensor,  # [...]
) -> None:
    """Fill the outputs (rlhf_fast/ops/kl.py says what with)."""
    if kl.numel() == 0:
        return
    outputs = kl, logprobs, ref_logprobs, entropy, lse, ref_lse
    fold = rows.folded(logits[..., 0], ref_logits[..., 0], kl if ids is None else ids, kl if mask is None else mask)
    if fold is None:  # many dimensions in no order: a launch for each index of the first
        for i in range(logits.shape[0]):
            tensors = (None if t is None else t[i] for t in (logits, ref_logits, ids, mask))
            again(*tensors, temperature, *(o[i] if o.numel() else o for o in outputs))
        return
    shape, (of_logits, of_ref, of_ids, of_mask) = fold
    kl_kernel[(kl.numel(),)](
        logits, *of_logits, logits.stride(-1),
        ref_logits, *of_ref, ref_logits.stride(-1),
        ids, *of_ids,
        mask, *of_mask,
        *outputs, *shape[1:], logits.shape[-1], temperature,
        **rows.constants(kl.dtype, logits, ref_logits),
    )  # fmt: skip


def kl_backward(
    grad_kl: torch.Tensor,  # [...]
    grad_logprobs: torch.Tensor,  # [...], or [0] without ids
    grad_entropy: torch.Tensor,  # [...]
    logits: torch.Tensor,  # [..., V]
    ref_logits: torch.Tensor,  # [..., V]
    kl: torch.Tensor,  # [...]
    entropy: torch.Tensor,  # [...]
    lse: torch.Tensor,  # [...]
    ref_lse: torch.Tensor,  # [...]
    ids: torch.Tensor | None,  # [...]
    mask: torch.Tensor | None,  # [...], bool
    temperature: float,
    grad: torch.Tensor,  # [..., V]
) -> None:
    """Fill ``grad`` (rlhf_fast/ops/kl.py says what with)."""
    if grad.numel() == 0:
        return
    numbers = grad_kl, grad_logprobs, grad_entropy, kl, entropy, lse, ref_lse
    fold = rows.folded(logits[..., 0], ref_logits[..., 0], kl if ids is None else ids, kl if mask is None else mask)
    if fold is None:
        for i in range(logits.shape[0]):
            part = [t[i] if t is not None and t.numel() else t for t in (*numbers, ids, mask)]
            kl_backward(*part[:3], logits[i], ref_logits[i], *part[3:], temperature, grad[i])
        return
    shape, (of_logits, of_ref, of_ids, of_mask) = fold
    zeros = torch.zeros_like(kl) if ids is None else grad_logprobs
    upstream = torch.stack([t.reshape(-1) for t in (grad_kl, zeros, *numbers[2:])], dim=-1)
    kl_backward_kernel[(kl.numel(),)](
        upstream, logits, *of_logits, logits.stride(-1),
        ref_logits, *of_ref, ref_logits.stride(-1),
        ids, *of_ids,
        mask, *of_mask,
        grad, *shape[1:], logits.shape[-1], temperature,
        **rows.constants(kl.dtype, logits, ref_logits, grad, sums=False),
    )  # fmt: skip


again = kl  # its own output hides it from itself
