"""Generalised advantage estimation in Triton: the scan of kernels/cuda/gae_scan.cuh, a program per sequence, or, where
these are few and long, per BLOCK_T tokens in three launches. Both give the same bits.

Token t hands ``u_t = gamma * lam * A_t + gamma * V_t`` to the token before it, and ``A_t = r_t - V_t + u_next``. A
token's place in the scan is its distance from the last valid token: padding, packing and the batch change no bit.
"""

import torch

import triton
import triton.language as tl

#: Tokens per step. The same for every shape, for the scan's tree and so the bits follow from it.
BLOCK_T = 512
MAX_SPLIT = 64  # sequences that are split, at most
#: What must not be compiled into a kernel, for it changes from call to call.
CHANGING = [f"{name}_stride_b" for name in ("rewards", "values", "mask", "advantages", "returns")]
CHANGING += ["sequences", "tokens", "gamma", "gamma_lam"]


@triton.jit
def _then(a, b, next_a, next_b):
    """One affine map after another. Where ``next_a`` is 0 the first is not looked at: 0 * inf would leak."""
    return next_a * a, tl.where(next_a == 0, next_b, tl.fma(next_a, b, next_b))


@triton.jit
def _offset(cu_seqlens_ptr, stride, b, tokens):
    return tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b * stride).to(tl.int64), 0), tokens)


@triton.jit
def _bounds(cu_seqlens_ptr, stride, b, tokens):
    start, end = b * 0, b * 0 + tokens
    if cu_seqlens_ptr is not None:
        start, end = _offset(cu_seqlens_ptr, stride, b, tokens), _offset(cu_seqlens_ptr, stride, b + 1, tokens)
    return start, end


@triton.jit
def _last_valid(mask_ptr, stride, start, end, BLOCK_T: tl.constexpr):
    """Position of the last valid token of [start, end), start - 1 if there is none."""
    last, top = start - 1, end - 1
    while (top >= start) & (last < start):
        t = top - tl.arange(0, BLOCK_T)
        valid = tl.load(mask_ptr + t * stride, mask=t >= start, other=0) != 0
        last = tl.max(tl.where(valid, t, start - 1))
        top -= BLOCK_T
    return last


@triton.jit
def _clear(advantages_ptr, advantages_stride, returns_ptr, returns_stride, start, end, BLOCK_T: tl.constexpr):
    """Zero [start, end), from its end like everything here, so that no access suggests another layout to the scan."""
    zero = tl.zeros([BLOCK_T], advantages_ptr.dtype.element_ty)
    top = end - 1
    while top >= start:
        t = top - tl.arange(0, BLOCK_T)
        tl.store(advantages_ptr + t * advantages_stride, zero, mask=t >= start)
        tl.store(returns_ptr + t * returns_stride, zero, mask=t >= start)
        top -= BLOCK_T


@triton.jit
def _scan(
    rewards_ptr, rewards_stride, values_ptr, values_stride, mask_ptr, mask_stride,
    start, last, top, gamma, gamma_lam, ZERO: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """What the tokens of a chunk that ends at ``top`` are given: the scan up to the token after each, hence t + 1."""
    t = top - tl.arange(0, BLOCK_T)
    inside = (t + 1 >= start) & (t < last)
    valid = tl.load(mask_ptr + (t + 1) * mask_stride, mask=inside, other=0) != 0
    value = tl.load(values_ptr + (t + 1) * values_stride, mask=inside, other=0.0)
    surprise = tl.load(rewards_ptr + (t + 1) * rewards_stride, mask=inside, other=0.0) - value
    counts = inside if ZERO else valid
    a = tl.where(counts, gamma_lam, 1.0)
    handed = tl.where(gamma_lam == 0, gamma * value, tl.fma(surprise, gamma_lam, gamma * value))
    return tl.associative_scan((a, tl.where(valid, handed, 0.0)), 0, _then)


@triton.jit
def _store(
    rewards_ptr, rewards_stride, values_ptr, values_stride, mask_ptr, mask_stride,
    advantages_ptr, advantages_stride, returns_ptr, returns_stride, start, top, handed, BLOCK_T: tl.constexpr,
):  # fmt: skip
    t = top - tl.arange(0, BLOCK_T)
    inside = t >= start
    valid = tl.load(mask_ptr + t * mask_stride, mask=inside, other=0) != 0
    value = tl.load(values_ptr + t * values_stride, mask=inside, other=0.0)
    advantage = tl.load(rewards_ptr + t * rewards_stride, mask=inside, other=0.0) - value + handed
    tl.store(advantages_ptr + t * advantages_stride, tl.where(valid, advantage, 0.0), mask=inside)
    tl.store(returns_ptr + t * returns_stride, tl.where(valid, advantage + value, 0.0), mask=inside)


@triton.jit
def _handed_on(a, handed, u):
    return tl.where(a == 0, handed, tl.fma(a, u, handed))


@triton.jit
def _end_of(x, BLOCK_T: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK_T) == BLOCK_T - 1, x, 0.0))


@triton.jit(do_not_specialize=CHANGING)
def gae_kernel(
    rewards_ptr, rewards_stride_b, rewards_stride_t, values_ptr, values_stride_b, values_stride_t,
    mask_ptr, mask_stride_b, mask_stride_t, last_values_ptr, last_values_stride, cu_seqlens_ptr, cu_seqlens_stride,
    advantages_ptr, advantages_stride_b, advantages_stride_t, returns_ptr, returns_stride_b, returns_stride_t,
    sequences, tokens, gamma: tl.float64, gamma_lam: tl.float64, ZERO: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Program b < B takes sequence b; with cu_seqlens program B clears what lies outside of all sequences."""
    dtype: tl.constexpr = rewards_ptr.dtype.element_ty
    gamma, gamma_lam = tl.full([], gamma, dtype), tl.full([], gamma_lam, dtype)
    b = tl.program_id(0).to(tl.int64)
    if cu_seqlens_ptr is not None:  # noqa: SIM102 (decided when this is compiled)
        if b == sequences:
            first = _offset(cu_seqlens_ptr, cu_seqlens_stride, 0, tokens)
            final = _offset(cu_seqlens_ptr, cu_seqlens_stride, sequences, tokens)
            _clear(advantages_ptr, advantages_stride_t, returns_ptr, returns_stride_t, first * 0, first, BLOCK_T)
            _clear(advantages_ptr, advantages_stride_t, returns_ptr, returns_stride_t, final, tokens, BLOCK_T)
            return
    start, end = _bounds(cu_seqlens_ptr, cu_seqlens_stride, b, tokens)
    rewards_ptr += b * rewards_stride_b
    values_ptr += b * values_stride_b
    mask_ptr += b * mask_stride_b
    advantages_ptr += b * advantages_stride_b
    returns_ptr += b * returns_stride_b
    last = _last_valid(mask_ptr, mask_stride_t, start, end, BLOCK_T)
    _clear(advantages_ptr, advantages_stride_t, returns_ptr, returns_stride_t, last + 1, end, BLOCK_T)
    u = tl.zeros([], dtype)
    if last_values_ptr is not None:
        u = gamma * tl.load(last_values_ptr + b * last_values_stride)
    top = last
    while top >= start:
        a, handed = _scan(
            rewards_ptr, rewards_stride_t, values_ptr, values_stride_t, mask_ptr, mask_stride_t,
            start, last, top, gamma, gamma_lam, ZERO, BLOCK_T,
        )  # fmt: skip
        handed = _handed_on(a, handed, u)
        _store(
            rewards_ptr, rewards_stride_t, values_ptr, values_stride_t, mask_ptr, mask_stride_t,
            advantages_ptr, advantages_stride_t, returns_ptr, returns_stride_t, start, top, handed, BLOCK_T,
        )  # fmt: skip
        u = _end_of(handed, BLOCK_T)
        top -= BLOCK_T


@triton.jit
def _first_block(cu_seqlens_ptr, stride, b, tokens, BLOCK_T: tl.constexpr):
    """Packed: sequence b owns the blocks from here to where the next begins, which are enough and need no sum."""
    first = b * tl.cdiv(tokens, BLOCK_T)
    if cu_seqlens_ptr is not None:
        first = _offset(cu_seqlens_ptr, stride, b, tokens) // BLOCK_T + b
    return first


@triton.jit
def _place(cu_seqlens_ptr, stride, sequences, tokens, BLOCK_T: tl.constexpr, MAX_SPLIT: tl.constexpr):
    """This program's sequence, the bounds of that, and which of its chunks from the end on."""
    block = tl.program_id(0).to(tl.int64)
    if cu_seqlens_ptr is None:
        b = block // tl.cdiv(tokens, BLOCK_T)
    else:
        j = tl.arange(0, MAX_SPLIT)
        offsets = tl.load(cu_seqlens_ptr + j * stride, mask=j < sequences, other=0).to(tl.int64)
        first = tl.minimum(tl.maximum(offsets, 0), tokens) // BLOCK_T + j
        b = tl.maximum(tl.sum(((j < sequences) & (first <= block)).to(tl.int64)) - 1, 0)
    start, end = _bounds(cu_seqlens_ptr, stride, b, tokens)
    return b, start, end, block - _first_block(cu_seqlens_ptr, stride, b, tokens, BLOCK_T)


@triton.jit(do_not_specialize=CHANGING)
def gae_chunk_kernel(
    rewards_ptr, rewards_stride_b, rewards_stride_t, values_ptr, values_stride_b, values_stride_t,
    mask_ptr, mask_stride_b, mask_stride_t, cu_seqlens_ptr, cu_seqlens_stride, chunks_ptr, sequences, tokens,
    gamma: tl.float64, gamma_lam: tl.float64,
    ZERO: tl.constexpr, BLOCK_T: tl.constexpr, MAX_SPLIT: tl.constexpr,
):  # fmt: skip
    """First launch: the affine map of each chunk."""
    dtype: tl.constexpr = rewards_ptr.dtype.element_ty
    b, start, end, index = _place(cu_seqlens_ptr, cu_seqlens_stride, sequences, tokens, BLOCK_T, MAX_SPLIT)
    mask_ptr += b * mask_stride_b
    last = _last_valid(mask_ptr, mask_stride_t, start, end, BLOCK_T)
    top = last - index * BLOCK_T
    if (index >= 0) & (top >= start):
        a, handed = _scan(
            rewards_ptr + b * rewards_stride_b, rewards_stride_t, values_ptr + b * values_stride_b, values_stride_t,
            mask_ptr, mask_stride_t, start, last, top, tl.full([], gamma, dtype), tl.full([], gamma_lam, dtype),
            ZERO, BLOCK_T,
        )  # fmt: skip
        chunk_ptr = chunks_ptr + 2 * tl.program_id(0).to(tl.int64)
        tl.store(chunk_ptr, _end_of(a, BLOCK_T))
        tl.store(chunk_ptr + 1, _end_of(handed, BLOCK_T))


@triton.jit(do_not_specialize=CHANGING)
def gae_carry_kernel(
    mask_ptr, mask_stride_b, mask_stride_t, last_values_ptr, last_values_stride, cu_seqlens_ptr, cu_seqlens_stride,
    chunks_ptr, carries_ptr, tokens, gamma: tl.float64, BLOCK_T: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Second launch, a program per sequence: what each chunk is handed, in the order in which gae_kernel meets it."""
    dtype: tl.constexpr = chunks_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    start, end = _bounds(cu_seqlens_ptr, cu_seqlens_stride, b, tokens)
    left = tl.cdiv(_last_valid(mask_ptr + b * mask_stride_b, mask_stride_t, start, end, BLOCK_T) + 1 - start, BLOCK_T)
    block = _first_block(cu_seqlens_ptr, cu_seqlens_stride, b, tokens, BLOCK_T)
    u = tl.zeros([], dtype)
    if last_values_ptr is not None:
        u = tl.full([], gamma, dtype) * tl.load(last_values_ptr + b * last_values_stride)
    while left > 0:
        carries = tl.zeros([AHEAD], dtype)
        for i in tl.static_range(AHEAD):  # no store among the loads, so that these need not wait for each other
            a = tl.load(chunks_ptr + 2 * (block + i), mask=i < left, other=1.0)
            handed = tl.load(chunks_ptr + 2 * (block + i) + 1, mask=i < left, other=0.0)
            carries = tl.where(tl.arange(0, AHEAD) == i, u, carries)
            u = _handed_on(a, handed, u)
        tl.store(carries_ptr + block + tl.arange(0, AHEAD), carries, mask=tl.arange(0, AHEAD) < left)
        block += AHEAD
        left -= AHEAD


@triton.jit(do_not_specialize=CHANGING)
def gae_apply_kernel(
    rewards_ptr, rewards_stride_b, rewards_stride_t, values_ptr, values_stride_b, values_stride_t,
    mask_ptr, mask_stride_b, mask_stride_t, cu_seqlens_ptr, cu_seqlens_stride, carries_ptr,
    advantages_ptr, advantages_stride_b, advantages_stride_t, returns_ptr, returns_stride_b, returns_stride_t,
    sequences, tokens, gamma: tl.float64, gamma_lam: tl.float64,
    ZERO: tl.constexpr, BLOCK_T: tl.constexpr, MAX_SPLIT: tl.constexpr,
):  # fmt: skip
    """Third launch: the chunks once more, now with what they are handed; and each program's share of what is masked."""
    dtype: tl.constexpr = rewards_ptr.dtype.element_ty
    if cu_seqlens_ptr is not None:
        share = tl.program_id(0).to(tl.int64) * BLOCK_T
        first = _offset(cu_seqlens_ptr, cu_seqlens_stride, 0, tokens)
        final = _offset(cu_seqlens_ptr, cu_seqlens_stride, sequences, tokens)
        to = tl.minimum(share + BLOCK_T, tokens)
        _clear(
            advantages_ptr, advantages_stride_t, returns_ptr, returns_stride_t, share, tl.minimum(to, first), BLOCK_T
        )
        _clear(
            advantages_ptr, advantages_stride_t, returns_ptr, returns_stride_t, tl.maximum(share, final), to, BLOCK_T
        )
    b, start, end, index = _place(cu_seqlens_ptr, cu_seqlens_stride, sequences, tokens, BLOCK_T, MAX_SPLIT)
    rewards_ptr += b * rewards_stride_b
    values_ptr += b * values_stride_b
    mask_ptr += b * mask_stride_b
    advantages_ptr += b * advantages_stride_b
    returns_ptr += b * returns_stride_b
    last = _last_valid(mask_ptr, mask_stride_t, start, end, BLOCK_T)
    if index >= 0:
        behind = last + 1 + index * BLOCK_T
        _clear(advantages_ptr, advantages_stride_t, returns_ptr, returns_stride_t,
               behind, tl.minimum(behind + BLOCK_T, end), BLOCK_T)  # fmt: skip
    top = last - index * BLOCK_T
    if (index >= 0) & (top >= start):
        a, handed = _scan(
            rewards_ptr, rewards_stride_t, values_ptr, values_stride_t, mask_ptr, mask_stride_t,
            start, last, top, tl.full([], gamma, dtype), tl.full([], gamma_lam, dtype), ZERO, BLOCK_T,
        )  # fmt: skip
        handed = _handed_on(a, handed, tl.load(carries_ptr + tl.program_id(0).to(tl.int64)))
        _store(
            rewards_ptr, rewards_stride_t, values_ptr, values_stride_t, mask_ptr, mask_stride_t,
            advantages_ptr, advantages_stride_t, returns_ptr, returns_stride_t, start, top, handed, BLOCK_T,
        )  # fmt: skip


def few_and_long(sequences: int, longest: int, tokens: int) -> bool:
    """Whether a program per sequence would leave most of the GPU idle for long. Estimated, not measured."""
    return 0 < sequences <= MAX_SPLIT and longest >= 16 * BLOCK_T and tokens >= 4 * BLOCK_T * sequences


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, last_values: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, gamma: float, lam: float, holes: str,
    advantages: torch.Tensor, returns: torch.Tensor,
) -> None:  # fmt: skip
    """Fill ``advantages`` and ``returns`` (rlhf_fast/ops/gae.py says what with)."""
    if rewards.numel() == 0:
        return
    packed = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if packed else rewards.shape[0]
    rows = [(x, 0 if packed else x.stride(0), x.stride(-1)) for x in
            (rewards, values, mask, advantages, returns)]  # fmt: skip
    offsets = cu_seqlens, 0 if cu_seqlens is None else cu_seqlens.stride(0)
    last = last_values, 0 if last_values is None else last_values.stride(0)
    sizes, numbers, tokens = (sequences, rewards.shape[-1]), (gamma, gamma * lam), rewards.shape[-1]
    constants = {"ZERO": holes == "zero", "BLOCK_T": BLOCK_T, "num_warps": 8}
    if not few_and_long(sequences, tokens, rewards.numel()):
        gae_kernel[(sequences + packed,)](*rows[0], *rows[1], *rows[2], *last, *offsets, *rows[3], *rows[4], *sizes,
                                          *numbers, **constants)  # fmt: skip
        return
    chunks = tokens // BLOCK_T + sequences if packed else triton.cdiv(tokens, BLOCK_T) * sequences
    maps, carries = rewards.new_empty((chunks, 2)), rewards.new_empty(chunks)
    gae_chunk_kernel[(chunks,)](*rows[0], *rows[1], *rows[2], *offsets, maps, *sizes, *numbers, **constants,
                                MAX_SPLIT=MAX_SPLIT)  # fmt: skip
    gae_carry_kernel[(sequences,)](*rows[2], *last, *offsets, maps, carries, tokens, gamma,
                                   BLOCK_T=BLOCK_T, AHEAD=16, num_warps=1)  # fmt: skip
    gae_apply_kernel[(chunks,)](*rows[0], *rows[1], *rows[2], *offsets, carries, *rows[3], *rows[4], *sizes, *numbers,
                                **constants, MAX_SPLIT=MAX_SPLIT)  # fmt: skip
