"""Chosen-token logprob, entropy and logsumexp of every row of logits, and their gradient, in Triton: a program per row.

Forward: one read, every lane with a softmax of its own that is merged at the end, so that the bits follow from V alone.
Backward: one read, one write.
"""

import torch

import triton
import triton.language as tl

#: Logits per step. The same for every shape, for the tree of the sums and so the bits follow from it. What does not
#: fit in the registers as float64 would spill.
BLOCK, BLOCK_FLOAT64 = 4096, 1024
#: Leading dimensions that a launch walks through, by division.
DIMS = 3


@triton.jit
def _tanh(x):
    """By exp of a negative number, and by its series near 0, where that cancels."""
    a = tl.abs(x)
    e = tl.exp(-2 * a)
    large = (1 - e) / (1 + e)
    s = x * x
    small = a * (1 - s * (0.33333333333 - s * (0.13333333333 - s * (0.053968253968 - s * 0.021869488536))))
    y = tl.where(a < 0.1, small, large)
    return tl.where(x < 0, -y, y)


@triton.jit
def _offset(row, middle, inner, stride_o, stride_m, stride_i):
    """Where row ``row`` of ``[outer, middle, inner]`` begins."""
    return row // (middle * inner) * stride_o + row // inner % middle * stride_m + row % inner * stride_i


@triton.jit
def _capped(x, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        return softcap * _tanh(x / softcap)
    return x


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """To the nearest of ``dtype``, ties to even. For bfloat16 by hand: Triton's interpreter would cut the bits off."""
    if dtype == tl.bfloat16:
        u = x.to(tl.uint32, bitcast=True)
        u = (u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, u.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


NUMBERS = [
    "rows_middle", "rows_inner", "logits_stride_o", "logits_stride_m", "logits_stride_i", "ids_stride_o",
    "ids_stride_m", "ids_stride_i", "mask_stride_o", "mask_stride_m", "mask_stride_i", "size", "softcap", "temperature",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def logprobs_kernel(
    logits_ptr, logits_stride_o, logits_stride_m, logits_stride_i, logits_stride_v,
    ids_ptr, ids_stride_o, ids_stride_m, ids_stride_i,
    mask_ptr, mask_stride_o, mask_stride_m, mask_stride_i,
    logprobs_ptr, entropy_ptr, lse_ptr,
    rows_middle, rows_inner, size,
    softcap: tl.float64, temperature: tl.float64,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i takes row i; with a wrong id all of its results are NaN."""
    dtype: tl.constexpr = logprobs_ptr.dtype.element_ty
    softcap, scale = tl.full([], softcap, dtype), tl.full([], 1 / temperature, dtype)
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None:
        at = _offset(row, rows_middle, rows_inner, mask_stride_o, mask_stride_m, mask_stride_i)
        if tl.load(mask_ptr + at) == 0:
            zero = tl.zeros([], dtype)
            tl.store(logprobs_ptr + row, zero)
            tl.store(entropy_ptr + row, zero)
            tl.store(lse_ptr + row, zero)
            return
    logits_ptr += _offset(row, rows_middle, rows_inner, logits_stride_o, logits_stride_m, logits_stride_i)
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), dtype)
    total, dot = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    start = row * 0
    while start < size:
        i = start + lane
        x = tl.load(logits_ptr + i * logits_stride_v, mask=i < size, other=0.0).to(dtype)
        z = tl.where(i < size, _capped(x, softcap, CAPPED) * scale, float("-inf"))
        higher = tl.maximum(top, z)  # z may be NaN: what counts is that its exponential is
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shift = tl.where(top == float("-inf"), 0.0, top - base)
        weight, e = tl.exp(shift), tl.exp(z - base)
        dot = (dot + total * shift) * weight + tl.where(e == 0, 0.0, e * (z - base))
        total = total * weight + e
        top = higher
        start += BLOCK
    highest = tl.max(top)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    shift = tl.where(top == float("-inf"), 0.0, top - base)
    weight = tl.exp(shift)
    dot = tl.sum((dot + total * shift) * weight)
    total = tl.sum(total * weight)
    chosen = tl.load(ids_ptr + _offset(row, rows_middle, rows_inner, ids_stride_o, ids_stride_m, ids_stride_i))
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
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``upstream`` is [N, 5]: the three gradients, the entropy, the logsumexp."""
    dtype: tl.constexpr = upstream_ptr.dtype.element_ty
    softcap, scale = tl.full([], softcap, dtype), tl.full([], 1 / temperature, dtype)
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * size
    lane = tl.arange(0, BLOCK)
    start = row * 0
    if mask_ptr is not None:
        at = _offset(row, rows_middle, rows_inner, mask_stride_o, mask_stride_m, mask_stride_i)
        if tl.load(mask_ptr + at) == 0:
            while start < size:
                tl.store(grad_ptr + start + lane, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), start + lane < size)
                start += BLOCK
            return
    upstream_ptr += row * 5
    g, h, up = tl.load(upstream_ptr), tl.load(upstream_ptr + 1), tl.load(upstream_ptr + 2)
    entropy, lse = tl.load(upstream_ptr + 3), tl.load(upstream_ptr + 4)
    chosen = tl.load(ids_ptr + _offset(row, rows_middle, rows_inner, ids_stride_o, ids_stride_m, ids_stride_i))
    logits_ptr += _offset(row, rows_middle, rows_inner, logits_stride_o, logits_stride_m, logits_stride_i)
    while start < size:
        i = start + lane
        x = tl.load(logits_ptr + i * logits_stride_v, mask=i < size, other=0.0).to(dtype)
        capped = _capped(x, softcap, CAPPED)
        logp = capped * scale - lse
        dz = tl.where(logp == float("-inf"), 0.0, tl.exp(logp) * (up - g - h * (logp + entropy)))
        dz += tl.where(i == chosen, g, 0.0)
        if CAPPED:
            dz *= 1 - (capped / softcap) * (capped / softcap)
        tl.store(grad_ptr + i, _rounded(dz * scale, grad_ptr.dtype.element_ty), mask=i < size)
        start += BLOCK


def block_of(logits: torch.Tensor) -> int:
    """Logits per step."""
    return BLOCK_FLOAT64 if logits.dtype == torch.float64 else BLOCK


def folded(*tensors: torch.Tensor) -> tuple[list[int], list[list[int]]] | None:
    """The shape of all tensors in DIMS dimensions and their strides; None where it does not fold.

    Neighbouring dimensions fold where every tensor strides over them as over one.
    """
    shape = tensors[0].shape
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for d in reversed(range(len(shape))):
        here = [t.stride(d) for t in tensors]
        if shape[d] == 1:
            continue
        if sizes and all(h == s[-1] * sizes[-1] for h, s in zip(here, strides, strict=True)):
            sizes[-1] *= shape[d]
            continue
        sizes.append(shape[d])
        for s, h in zip(strides, here, strict=True):
            s.append(h)
    missing = DIMS - len(sizes)
    if missing < 0:
        return None
    return [*[1] * missing, *reversed(sizes)], [[*[0] * missing, *reversed(s)] for s in strides]


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
    rows = logits[..., 0]
    fold = folded(rows, ids, ids if mask is None else mask)
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
        CAPPED=softcap is not None, BLOCK=block_of(logits), num_warps=8,
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
    fold = folded(logits[..., 0], ids, ids if mask is None else mask)
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
        CAPPED=softcap is not None, BLOCK=block_of(logits), num_warps=8,
    )  # fmt: skip


again = logprobs  # its own output hides it from itself
