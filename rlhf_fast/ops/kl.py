"""Exact KL divergence of two models over the whole vocabulary, with both logprobs and the entropy."""

from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.dispatch import define
from rlhf_fast.ops.checks import FLOATS, INTEGERS, check_positive, check_tensor
from rlhf_fast.ops.logprobs import entropy_of, flat_rows, normalised, row_blocks, row_sum, scaled


class KLOutput(NamedTuple):
    """What `kl` returns; every field is ``[...]``."""

    kl: Tensor
    logprobs: Tensor | None  # None without ids
    ref_logprobs: Tensor | None  # None without ids
    entropy: Tensor


def kl(
    logits: Tensor,  # [..., V]
    ref_logits: Tensor,  # [..., V]
    ids: Tensor | None = None,  # [...], integer
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,  # [...], bool
) -> KLOutput:
    """KL(pi || ref), not an estimate from one token: the sum over the vocabulary, each logit read once.

    With ``pi = softmax(logits / temperature)`` and ``ref`` alike::

        kl      = sum_i pi_i (log pi_i - log ref_i)      0 where pi_i is 0, +inf where only ref_i is
        entropy = -sum_i pi_i log pi_i

    The gradient flows to ``logits`` only: ``pi_i (log pi_i - log ref_i - kl)`` for the KL, those of `logprobs` for the
    logprob and the entropy. That of an infinite KL is NaN.

    Args:
        logits: ``[..., V]`` of the policy, any strides, never modified.
        ref_logits: ``[..., V]`` of the reference; a constant.
        ids: ``[...]``, the chosen token of each row; without them there are no logprobs.
        temperature: divides both logits, above 0.
        mask: ``[...]``, True where a row counts; elsewhere the results are 0 and nothing that is stored there is used.

    Returns:
        `KLOutput` of ``[...]`` tensors in nats: float32, or float64 if one of the logits is.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or range.
        IndexError: an id outside ``[0, V)`` in a row that counts, on the CPU. On a GPU its logprobs become NaN.
    """
    check_tensor("kl", "logits", logits, dtypes=FLOATS)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"kl: logits must be [..., V] with V at least 1, got {list(logits.shape)}")
    shape, device = logits.shape, logits.device
    check_tensor("kl", "ref_logits", ref_logits, dtypes=FLOATS, shape=shape, rule="like logits", device=device)
    rule = "like logits without its last dimension"
    if ids is not None:
        check_tensor("kl", "ids", ids, dtypes=INTEGERS, shape=shape[:-1], rule=rule, device=device)
    if mask is not None:
        check_tensor("kl", "mask", mask, dtypes=(torch.bool,), shape=shape[:-1], rule=rule, device=device)
    check_positive("kl", "temperature", temperature)
    divergence, of_policy, of_ref, entropy, _, _ = _kl(logits, ref_logits.detach(), ids, mask, temperature=temperature)
    if ids is None:
        return KLOutput(divergence, None, None, entropy)
    return KLOutput(divergence, of_policy, of_ref.detach(), entropy)


def reference(
    logits: Tensor,  # [..., V]
    ref_logits: Tensor,  # [..., V]
    ids: Tensor | None = None,  # [...]
    mask: Tensor | None = None,  # [...], bool
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    """The formula on a few rows at a time; at the end also the logsumexp of both, for the backward."""
    outputs = _fake(logits, ref_logits, ids)
    flat = [o.view(-1) for o in outputs]
    divergence, of_policy, of_ref, entropy, lse, ref_lse = flat
    chosen, valid, inside = flat_rows("kl", _or_zeros(ids, logits), mask, logits.shape[-1])
    for at, block, ref_block in row_blocks(logits, ref_logits):
        shifted, weights, total, lse[at] = normalised(scaled(block, temperature).to(lse.dtype))
        ref_shifted, _, ref_total, ref_lse[at] = normalised(scaled(ref_block, temperature).to(lse.dtype))
        logp, ref_logp = shifted - total.log()[:, None], ref_shifted - ref_total.log()[:, None]
        divergence[at] = row_sum(_terms(weights / total[:, None], logp, ref_logp))
        entropy[at] = entropy_of(shifted, weights, total)
        if ids is not None:
            of_policy[at] = logp.gather(-1, chosen[at, None])[:, 0]
            of_ref[at] = ref_logp.gather(-1, chosen[at, None])[:, 0]
    given = flat if ids is not None else [divergence, entropy, lse, ref_lse]
    for output in given:
        output.masked_fill_(~valid, 0)
    for output in (of_policy, of_ref) if ids is not None else ():
        output.masked_fill_(~inside, torch.nan)
    return outputs


def backward(
    grad_kl: Tensor,  # [...]
    grad_logprobs: Tensor,  # [...], or [0] without ids
    grad_entropy: Tensor,  # [...]
    logits: Tensor,  # [..., V]
    ref_logits: Tensor,  # [..., V]
    divergence: Tensor,  # [...]
    entropy: Tensor,  # [...]
    lse: Tensor,  # [...]
    ref_lse: Tensor,  # [...]
    ids: Tensor | None = None,  # [...]
    mask: Tensor | None = None,  # [...], bool
    *,
    temperature: float,
) -> Tensor:
    """Gradient of the logits: ``k p_i (log p_i - log ref_i - KL) + g (1[i=y] - p_i) - h p_i (log p_i + H)``."""
    grad = _fake_backward(grad_kl, grad_logprobs, grad_entropy, logits)
    flat = grad.view(-1, logits.shape[-1])
    k, h, divergence, entropy, lse, ref_lse = (
        t.reshape(-1, 1) for t in (grad_kl, grad_entropy, divergence, entropy, lse, ref_lse)
    )
    chosen, valid, inside = flat_rows("kl", _or_zeros(ids, logits), mask, logits.shape[-1])
    g = torch.zeros_like(k) if ids is None else grad_logprobs.reshape(-1, 1)
    g = torch.where(inside[:, None] | (g == 0), g, torch.nan)
    for at, block, ref_block in row_blocks(logits, ref_logits):
        logp = scaled(block, temperature).to(lse.dtype) - lse[at]
        ref_logp = scaled(ref_block, temperature).to(lse.dtype) - ref_lse[at]
        slope = -g[at] - h[at] * (logp + entropy[at])
        # An infinite KL that nobody asks about must not reach the gradient as 0 * inf.
        slope = slope + torch.where(k[at] == 0, 0, k[at] * (logp - ref_logp - divergence[at]))
        dz = torch.where(logp == -inf, 0, logp.exp() * slope)
        dz.scatter_(-1, chosen[at, None], dz.gather(-1, chosen[at, None]) + g[at])
        flat[at] = torch.where(valid[at, None], dz / temperature, 0).to(grad.dtype)
    return grad


def _terms(p: Tensor, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """``p (log p - log ref)`` by selects: 0 where p is 0, infinite where only the reference is, however small p."""
    terms = torch.where(ref_logp == -inf, inf, p * (logp - ref_logp))
    return torch.where(logp == -inf, 0, terms)


def _or_zeros(ids: Tensor | None, logits: Tensor) -> Tensor:
    return torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device) if ids is None else ids


def _fake(logits: Tensor, ref_logits: Tensor, ids: Tensor | None = None, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    dtype = torch.float64 if torch.float64 in (logits.dtype, ref_logits.dtype) else torch.float32
    rows = logits.shape[:-1]
    shapes = rows, *((0,) if ids is None else rows for _ in range(2)), rows, rows, rows
    return tuple(logits.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake_backward(
    grad_kl: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor, logits: Tensor, *_: Any, **__: Any
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple) -> None:
    logits, ref_logits, ids, mask = inputs
    divergence, _, _, entropy, lse, ref_lse = output
    ctx.save_for_backward(logits, ref_logits, divergence, entropy, lse, ref_lse, ids, mask)
    ctx.temperature = keyword_only_inputs["temperature"]


def _gradient(ctx: Any, grad_kl: Tensor, grad_logprobs: Tensor, _: Tensor, grad_entropy: Tensor, *__: Tensor) -> tuple:
    grads = grad_kl, grad_logprobs, grad_entropy
    return _kl_backward(*grads, *ctx.saved_tensors, temperature=ctx.temperature), None, None, None


_kl_backward = define(
    "kl_backward(Tensor grad_kl, Tensor grad_logprobs, Tensor grad_entropy, Tensor logits, Tensor ref_logits, "
    "Tensor divergence, Tensor entropy, Tensor lse, Tensor ref_lse, Tensor? ids=None, Tensor? mask=None, *, "
    "float temperature) -> Tensor",
    backward,
    _fake_backward,
)
_kl = define(
    "kl(Tensor logits, Tensor ref_logits, Tensor? ids=None, Tensor? mask=None, *, float temperature=1.0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference,
    _fake,
    backward=_gradient,
    setup_context=_setup_context,
)
