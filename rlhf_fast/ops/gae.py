"""Generalised advantage estimation: one affine scan from the end of each sequence to its start."""

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.dispatch import define
from rlhf_fast.ops.checks import FLOATS, INTEGERS, check_choice, check_offsets, check_range, check_tensor

HOLES = ("skip", "zero")


def gae(
    rewards: Tensor,  # [B, T] or [N]
    values: Tensor,  # [B, T] or [N]
    mask: Tensor,  # [B, T] or [N], bool
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,  # [B]
    cu_seqlens: Tensor | None = None,  # [B+1], integer
    holes: str = "skip",
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every token (Schulman et al. 2016, "High-dimensional continuous control using GAE").

    With ``V_next`` the value of the next token, or ``last_values`` after the last valid one::

        delta_t = r_t + gamma * V_next - V_t
        A_t     = delta_t + gamma * lam * A_next
        R_t     = A_t + V_t

    Args:
        rewards: reward of each token, ``[B, T]``, or ``[N]`` when the sequences are packed end to end.
        values: the critic's value of each token, like ``rewards``.
        mask: True where a token counts. What is stored elsewhere is never used.
        gamma: discount per token, in [0, 1].
        lam: GAE's exponential weight, in [0, 1].
        last_values: ``[B]``, the value after the last valid token of a truncated sequence; 0 if absent.
        cu_seqlens: ``[B+1]`` offsets of packed sequences, from 0 to N, as flash-attn takes them.
        holes: what a masked token between two valid ones does: ``"skip"`` steps over it as if it were not there
            (verl), ``"zero"`` gives it value and reward 0 and lets it discount (OpenRLHF).

    Returns:
        ``(advantages, returns)`` of the shape of ``rewards``; float32, or float64 if an input is; 0 where masked.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or range, or offsets that do not rise from 0 to N (the
            offsets are looked at on the CPU only; on a GPU tokens outside every sequence get 0).
    """
    check_tensor("gae", "rewards", rewards, dtypes=FLOATS)
    if rewards.dim() != (2 if cu_seqlens is None else 1):
        rule = "[B, T]" if cu_seqlens is None else "[N] with cu_seqlens"
        raise ValueError(f"gae: rewards must be {rule}, got {list(rewards.shape)}")
    device = rewards.device
    check_tensor("gae", "values", values, dtypes=FLOATS, shape=rewards.shape, rule="like rewards", device=device)
    check_tensor("gae", "mask", mask, dtypes=(torch.bool,), shape=rewards.shape, rule="like rewards", device=device)
    if cu_seqlens is not None:
        check_tensor("gae", "cu_seqlens", cu_seqlens, dtypes=INTEGERS, device=device)
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
            raise ValueError(f"gae: cu_seqlens must be [B+1], got {list(cu_seqlens.shape)}")
    sequences = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if last_values is not None:
        check_tensor("gae", "last_values", last_values, dtypes=FLOATS, shape=(sequences,), rule="[B]", device=device)
    check_range("gae", "gamma", gamma, 0.0, 1.0)
    check_range("gae", "lam", lam, 0.0, 1.0)
    check_choice("gae", "holes", holes, HOLES)
    given = (rewards, values, last_values)
    dtype = torch.float64 if any(x is not None and x.dtype == torch.float64 for x in given) else torch.float32
    r, v, last = (x if x is None or x.dtype == dtype else x.to(dtype) for x in given)
    out = _gae(r, v, mask, last, cu_seqlens, gamma=gamma, lam=lam, holes=holes)
    return out[0], out[1]


def reference(
    rewards: Tensor,  # [B, T] or [N]
    values: Tensor,  # [B, T] or [N]
    mask: Tensor,  # [B, T] or [N], bool
    last_values: Tensor | None = None,  # [B]
    cu_seqlens: Tensor | None = None,  # [B+1]
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    holes: str = "skip",
) -> tuple[Tensor, Tensor]:
    """The scan by doubling: log2(T) vector steps, each of which merges two neighbouring spans of every token."""
    if cu_seqlens is not None:
        check_offsets("gae", cu_seqlens, mask.shape[0])
    if mask.numel() == 0:
        return torch.zeros_like(rewards), torch.zeros_like(rewards)
    tokens = mask.shape[-1]
    position, sequence, end = _layout(mask, cu_seqlens)
    following = _next_valid(mask, position)
    has_next = following < end
    if holes == "zero":
        following = position + 1
    v, r = torch.where(mask, values, 0), torch.where(mask, rewards, 0)
    last = v.new_zeros(()) if last_values is None else last_values[sequence]
    v_next = torch.where(has_next, v.gather(-1, following.clamp(max=tokens - 1).expand_as(v)), last)
    # A_t = a_t * A_{t+1} + b_t. Where a_t is 0 the next token is not read at all: 0 * inf would leak.
    a = has_next.to(v.dtype) * (gamma * lam)
    b = r + gamma * v_next - v
    if holes == "skip":
        a, b = torch.where(mask, a, 1), torch.where(mask, b, 0)
    span = 1
    while span < tokens:
        b_next, a_next = (torch.nn.functional.pad(x[..., span:], (0, span)) for x in (b, a))
        b = torch.where(a == 0, b, torch.addcmul(b, a, b_next))
        a, span = a * a_next, 2 * span
    return torch.where(mask, b, 0), torch.where(mask, b + v, 0)


def backward(
    grad_advantages: Tensor,  # [B, T] or [N]
    grad_returns: Tensor,  # [B, T] or [N]
    mask: Tensor,  # [B, T] or [N], bool
    cu_seqlens: Tensor | None = None,  # [B+1]
    *,
    gamma: float,
    lam: float,
    holes: str = "skip",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rewards, values and last_values: the same scan, run over the reversed sequences."""
    sequences = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if mask.numel() == 0:
        return torch.zeros_like(grad_advantages), torch.zeros_like(grad_returns), grad_returns.new_zeros(sequences)
    reversed_offsets = None if cu_seqlens is None else mask.shape[-1] - cu_seqlens.flip(0)
    # With "zero" a hole passes the gradient on, discounted, so that its own entry is needed: nothing is masked.
    through = mask if holes == "skip" else torch.ones_like(mask)
    upstream = torch.where(mask, grad_advantages + grad_returns, 0).flip(-1)
    c, _ = _gae(
        upstream, torch.zeros_like(upstream), through.flip(-1),
        None, reversed_offsets, gamma=gamma, lam=lam, holes=holes,
    )  # fmt: skip
    c = c.flip(-1)
    position, sequence, end = _layout(mask, cu_seqlens)
    start = torch.zeros_like(end) if cu_seqlens is None else cu_seqlens[sequence]
    latest = torch.where(mask, position, -1).cummax(-1).values  # the last valid token at or before this one
    previous = torch.nn.functional.pad(latest[..., :-1], (1, 0), value=-1) if holes == "skip" else position - 1
    from_previous = torch.where(
        previous >= start, c.gather(-1, previous.clamp(min=0).expand_as(sequence + position)), 0
    )
    grad_values = torch.where(mask, grad_returns - c + gamma * from_previous, 0)
    if cu_seqlens is None:
        last = latest[:, -1:]
        grad_last = torch.where(last >= 0, c.gather(-1, last.clamp(min=0)), 0).squeeze(-1)
    else:
        last = latest[(cu_seqlens[1:] - 1).clamp(min=0)]
        grad_last = torch.where(last >= cu_seqlens[:-1], c[last.clamp(min=0)], 0)
    return torch.where(mask, c, 0), grad_values, gamma * grad_last


def _layout(mask: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Position of each token, the sequence it belongs to and where that sequence ends; all broadcast to the mask."""
    tokens = mask.shape[-1]
    position = torch.arange(tokens, device=mask.device)
    if cu_seqlens is None:
        sequence = torch.arange(mask.shape[0], device=mask.device)[:, None]
        return position, sequence, torch.full_like(position, tokens)
    ends = cu_seqlens[1:].to(position.dtype)
    sequence = torch.searchsorted(ends, position, right=True)
    sequence = sequence.clamp(max=max(ends.shape[0] - 1, 0))
    return position, sequence, ends[sequence]


def _next_valid(mask: Tensor, position: Tensor) -> Tensor:
    """Index of the first valid token after each token; the number of tokens where there is none."""
    tokens = mask.shape[-1]
    at_or_after = torch.where(mask, position, tokens).flip(-1).cummin(-1).values.flip(-1)
    return torch.nn.functional.pad(at_or_after[..., 1:], (0, min(tokens, 1)), value=tokens)


def _fake(rewards: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    like = torch.contiguous_format  # empty_like is 1 us cheaper than new_empty, which reads the shape in Python
    return torch.empty_like(rewards, memory_format=like), torch.empty_like(rewards, memory_format=like)


def _fake_backward(
    grad_advantages: Tensor, grad_returns: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    sequences = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    grad = grad_advantages
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape), grad.new_empty(sequences)


def _setup_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple) -> None:
    _, _, mask, last, offsets = inputs
    ctx.save_for_backward(mask, offsets)
    ctx.numbers, ctx.has_last = keyword_only_inputs, last is not None


def _gradient(ctx: Any, grad_advantages: Tensor, grad_returns: Tensor) -> tuple:
    mask, offsets = ctx.saved_tensors
    rewards, values, last = _gae_backward(grad_advantages, grad_returns, mask, offsets, **ctx.numbers)
    return rewards, values, None, last if ctx.has_last else None, None


_gae_backward = define(
    "gae_backward(Tensor grad_advantages, Tensor grad_returns, Tensor mask, Tensor? cu_seqlens=None, *, "
    "float gamma, float lam, str holes='skip') -> (Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)
_gae = define(
    "gae(Tensor rewards, Tensor values, Tensor mask, Tensor? last_values=None, Tensor? cu_seqlens=None, *, "
    "float gamma=1.0, float lam=0.95, str holes='skip') -> (Tensor, Tensor)",
    reference,
    _fake,
    backward=_gradient,
    setup_context=_setup_context,
)
