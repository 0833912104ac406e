"""Generalised advantage estimation in Triton: the scan of kernels/cuda/gae_scan.cuh, a program per sequence.

Token t hands ``u_t = gamma * lam * A_t + gamma * V_t`` to the token before it, and ``A_t = r_t - V_t + u_next``. A
token's place in the scan is its distance from the last valid token, so that padding, packing and the batch change no
bit.
"""

import torch

import triton
import triton.language as tl

#: Tokens per step. The same for every shape, for the scan's tree and so the bits follow from it.
BLOCK_T = 512


@triton.jit
def _then(a, b, next_a, next_b):
    """One affine map after another. Where ``next_a`` is 0 the first is not looked at: 0 * inf would leak."""
    return next_a * a, tl.where(next_a == 0, next_b, tl.fma(next_a, b, next_b))


@triton.jit
def _offset(cu_seqlens_ptr, stride, b, tokens):
    return tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b * stride).to(tl.int64), 0), tokens)


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


@triton.jit(
    do_not_specialize=[
        "rewards_stride_b", "values_stride_b", "mask_stride_b", "advantages_stride_b", "returns_stride_b",
        "sequences", "tokens", "gamma", "gamma_lam",
    ]
)  # fmt: skip
def gae_kernel(
    rewards_ptr, rewards_stride_b, rewards_stride_t,
    values_ptr, values_stride_b, values_stride_t,
    mask_ptr, mask_stride_b, mask_stride_t,
    last_values_ptr, last_values_stride,
    cu_seqlens_ptr, cu_seqlens_stride,
    advantages_ptr, advantages_stride_b, advantages_stride_t,
    returns_ptr, returns_stride_b, returns_stride_t,
    sequences, tokens,
    gamma: tl.float64, gamma_lam: tl.float64,
    ZERO: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Program b < B takes sequence b; with cu_seqlens program B clears what lies outside of all sequences."""
    dtype: tl.constexpr = rewards_ptr.dtype.element_ty
    gamma = tl.full([], gamma, dtype)
    gamma_lam = tl.full([], gamma_lam, dtype)
    b = tl.program_id(0).to(tl.int64)
    start, end = b * 0, b * 0 + tokens
    if cu_seqlens_ptr is not None:
        if b == sequences:
            first = _offset(cu_seqlens_ptr, cu_seqlens_stride, 0, end)
            last = _offset(cu_seqlens_ptr, cu_seqlens_stride, sequences, end)
            _clear(advantages_ptr, advantages_stride_t, returns_ptr, returns_stride_t, start, first, BLOCK_T)
            _clear(advantages_ptr, advantages_stride_t, returns_ptr, returns_stride_t, last, end, BLOCK_T)
            return
        start = _offset(cu_seqlens_ptr, cu_seqlens_stride, b, tokens)
        end = _offset(cu_seqlens_ptr, cu_seqlens_stride, b + 1, tokens)
    else:
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
    lane = tl.arange(0, BLOCK_T)
    top = last
    while top >= start:
        # What a token is given is the scan up to the token after it, hence the second loads, one token on.
        t = top - lane
        inside = (t + 1 >= start) & (t < last)
        valid = tl.load(mask_ptr + (t + 1) * mask_stride_t, mask=inside, other=0) != 0
        value = tl.load(values_ptr + (t + 1) * values_stride_t, mask=inside, other=0.0)
        surprise = tl.load(rewards_ptr + (t + 1) * rewards_stride_t, mask=inside, other=0.0) - value
        counts = inside if ZERO else valid
        a = tl.where(counts, gamma_lam, 1.0)
        handed = tl.where(gamma_lam == 0, gamma * value, tl.fma(surprise, gamma_lam, gamma * value))
        a, handed = tl.associative_scan((a, tl.where(valid, handed, 0.0)), 0, _then)
        handed = tl.where(a == 0, handed, tl.fma(a, u, handed))

        inside = t >= start
        valid = tl.load(mask_ptr + t * mask_stride_t, mask=inside, other=0) != 0
        value = tl.load(values_ptr + t * values_stride_t, mask=inside, other=0.0)
        advantage = tl.load(rewards_ptr + t * rewards_stride_t, mask=inside, other=0.0) - value + handed
        tl.store(advantages_ptr + t * advantages_stride_t, tl.where(valid, advantage, 0.0), mask=inside)
        tl.store(returns_ptr + t * returns_stride_t, tl.where(valid, advantage + value, 0.0), mask=inside)
        u = tl.sum(tl.where(lane == BLOCK_T - 1, handed, 0.0))
        top -= BLOCK_T


def gae(
    rewards: torch.Tensor,  # [B, T] or [N]
    values: torch.Tensor,  # [B, T] or [N]
    mask: torch.Tensor,  # [B, T] or [N], bool
    last_values: torch.Tensor | None,  # [B]
    cu_seqlens: torch.Tensor | None,  # [B+1]
    gamma: float,
    lam: float,
    holes: str,
    advantages: torch.Tensor,  # [B, T] or [N]
    returns: torch.Tensor,  # [B, T] or [N]
) -> None:
    """Fill ``advantages`` and ``returns`` (rlhf_fast/ops/gae.py says what with)."""
    if rewards.numel() == 0:
        return
    sequences, programs = rewards.shape[0], rewards.shape[0]
    if cu_seqlens is not None:
        sequences, programs = cu_seqlens.shape[0] - 1, cu_seqlens.shape[0]
    rows = [(x, 0 if cu_seqlens is not None else x.stride(0), x.stride(-1)) for x in
            (rewards, values, mask, advantages, returns)]  # fmt: skip
    gae_kernel[(programs,)](
        *rows[0], *rows[1], *rows[2],
        last_values, 0 if last_values is None else last_values.stride(0),
        cu_seqlens, 0 if cu_seqlens is None else cu_seqlens.stride(0),
        *rows[3], *rows[4],
        sequences, rewards.shape[-1],
        gamma, gamma * lam,
        ZERO=holes == "zero", BLOCK_T=BLOCK_T, num_warps=8,
    )  # fmt: skip
