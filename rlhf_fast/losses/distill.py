"""Distillation of a teacher's distribution into a student, with the reward as a policy gradient beside it."""

from math import inf, log
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.losses.inputs import divided, precise
from rlhf_fast.ops import kl, logprobs
from rlhf_fast.ops.checks import FLOATS, INTEGERS, check_choice, check_positive, check_range, check_tensor
from rlhf_fast.ops.logprobs import flat_rows, normalised, row_blocks, row_sum, scaled

DIVERGENCES = ("forward", "reverse", "jsd")


def distill_loss(
    logits: Tensor,  # [..., V]
    teacher_logits: Tensor,  # [..., V]
    mask: Tensor,  # [...], bool
    *,
    temperature: float = 1.0,
    kind: str = "forward",
    advantages: Tensor | None = None,  # [...] or [B]
    ids: Tensor | None = None,  # [...], integer
    alpha: float = 1.0,
    denominator: float | Tensor | None = None,  # number or 0-d
) -> Tensor:
    """Soft targets of a teacher, and a policy gradient where there are advantages; the mean over the tokens.

    With ``p = softmax(logits / temperature)`` of the student, ``q`` of the teacher alike and ``m = (p + q) / 2``::

        forward    D = KL(q || p)                          Hinton et al. 2015; covers all that the teacher does
        reverse    D = KL(p || q)                          Gu et al. 2024, "MiniLLM"; keeps to what it does most
        jsd        D = KL(p || m) / 2 + KL(q || m) / 2     symmetric, at most log 2
        loss       = alpha * temperature^2 * D - A * log softmax(logits)_id

    ``temperature^2`` keeps the size of the gradient. The reward enters as an advantage ``A``: added to the loss as a
    constant it would have no gradient. The policy is the student itself, so that its logprob is at temperature 1.

    D is summed over the whole vocabulary, a few rows at a time: no float32 copy of the logits. The gradient of both
    terms is one tensor like ``logits``, rounded once.

    Args:
        logits: ``[..., V]`` of the student, any strides, never modified; all that gets a gradient.
        teacher_logits: ``[..., V]``, of the same vocabulary.
        mask: ``[...]``, True where a token counts. What is stored elsewhere is never used.
        temperature: softens both distributions of D, above 0.
        kind: ``"forward"``, ``"reverse"`` or ``"jsd"``.
        advantages: per token, or ``[B]``, one per sequence, for ``logits [B, T, V]``; a standardised reward.
        ids: ``[...]``, the tokens that the advantages are of; the two are given together.
        alpha: weight of D.
        denominator: takes the place of the number of tokens that count: with that of the full batch, micro-batches
            and ranks add up to its loss and gradient.

    Returns:
        A scalar in nats, float32 (float64 if an input is); 0 with a graph for an empty mask.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, range or kind, or advantages without ids.
        IndexError: an id outside ``[0, V)`` where the mask is True, on the CPU. On a GPU the loss becomes NaN.
    """
    _check(logits, teacher_logits, mask, temperature, kind, alpha)
    teacher_logits, ids, advantages = teacher_logits.detach(), *_policy_gradient(logits, mask, ids, advantages)
    if kind == "reverse" and (ids is None or temperature == 1):  # then the op has the gradient of both
        divergence, of_ids, _, _ = kl(logits, teacher_logits, ids, temperature=temperature, mask=mask)
    else:
        divergence, of_ids = _Distillation.apply(logits, teacher_logits, mask, ids, temperature, kind)
    total = (alpha * temperature**2) * divergence.sum()
    if advantages is not None and of_ids is not None:
        # A weight of 0 is no weight, even where the divergence is infinite.
        total = (total if alpha else 0) - (advantages * of_ids).sum()
    return divided("distill_loss", total, mask.sum(), denominator)


class _Distillation(torch.autograd.Function):
    """The divergence of each row and the logprob of its id, with one gradient for both."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, teacher: Tensor, mask: Tensor, ids: Tensor | None, temperature: float, kind: str
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(logits, teacher, mask, ids)
        ctx.temperature, ctx.kind = temperature, kind
        if kind == "jsd":
            divergence = _jsd(logits, teacher, mask, temperature)
        else:
            first, second = (teacher, logits) if kind == "forward" else (logits, teacher)
            divergence = kl(first, second, temperature=temperature, mask=mask).kl
        return divergence, None if ids is None else logprobs(logits, ids, mask=mask).logprobs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_divergence: Tensor, grad_logprobs: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, teacher, mask, ids = ctx.saved_tensors
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        flat, valid, k = grad.view(-1, logits.shape[-1]), mask.reshape(-1, 1), grad_divergence.reshape(-1, 1)
        for at, block, teacher_block in row_blocks(logits, teacher):
            logp, logq = _log_softmax(block, ctx.temperature), _log_softmax(teacher_block, ctx.temperature)
            slope = _SLOPES[ctx.kind](logp, logq) / ctx.temperature
            dz = torch.where(k[at] == 0, 0, k[at] * slope)  # an infinite divergence that nobody asks about
            if ids is not None and grad_logprobs is not None:
                g, chosen = grad_logprobs.reshape(-1, 1)[at], ids.reshape(-1, 1)[at]
                dz = dz - g * (logp if ctx.temperature == 1 else _log_softmax(block, 1.0)).exp()
                dz.scatter_add_(-1, chosen, g.to(dz.dtype))
            flat[at] = torch.where(valid[at], dz, 0).to(grad.dtype)
        return grad, None, None, None, None, None


def _forward_slope(logp: Tensor, logq: Tensor) -> Tensor:
    return logp.exp() - logq.exp()


def _reverse_slope(logp: Tensor, logq: Tensor) -> Tensor:
    return _centred(_terms(logp, logq), logp)


def _jsd_slope(logp: Tensor, logq: Tensor) -> Tensor:
    return _centred(_terms(logp, _mixture(logp, logq)), logp) / 2


_SLOPES = {"forward": _forward_slope, "reverse": _reverse_slope, "jsd": _jsd_slope}


def _jsd(logits: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    double = torch.float64 in (logits.dtype, teacher.dtype)
    divergence = torch.empty(mask.shape, dtype=torch.float64 if double else torch.float32, device=mask.device)
    flat = divergence.view(-1)
    for at, block, teacher_block in row_blocks(logits, teacher):
        logp, logq = _log_softmax(block, temperature), _log_softmax(teacher_block, temperature)
        logm = _mixture(logp, logq)
        flat[at] = row_sum(_terms(logp, logm) + _terms(logq, logm)) / 2
    return divergence.masked_fill_(~mask, 0)


def _terms(logp: Tensor, logq: Tensor) -> Tensor:
    """``p (log p - log q)``, the terms of KL(p || q); 0 where p is 0, a select, for 0 * -inf is NaN."""
    return torch.where(logp == -inf, 0, logp.exp() * (logp - logq))


def _centred(terms: Tensor, logp: Tensor) -> Tensor:
    """``p_i (t_i - sum_j p_j t_j)`` from the ``p_i t_i``: the derivative of sum p t through the softmax."""
    return terms - logp.exp() * row_sum(terms)[:, None]


def _mixture(logp: Tensor, logq: Tensor) -> Tensor:
    return torch.logaddexp(logp, logq) - log(2)


def _log_softmax(block: Tensor, temperature: float) -> Tensor:
    shifted, _, total, _ = normalised(scaled(block, temperature))
    return shifted - total.log()[:, None]


def _check(logits: Tensor, teacher: Tensor, mask: Tensor, temperature: float, kind: str, alpha: float) -> None:
    check_tensor("distill_loss", "logits", logits, dtypes=FLOATS)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"distill_loss: logits must be [..., V] with V at least 1, got {list(logits.shape)}")
    shape, device = logits.shape, logits.device
    rule = "like logits (a teacher of the same vocabulary)"
    check_tensor("distill_loss", "teacher_logits", teacher, dtypes=FLOATS, shape=shape, rule=rule, device=device)
    rule = "like logits without its last dimension"
    check_tensor("distill_loss", "mask", mask, dtypes=(torch.bool,), shape=shape[:-1], rule=rule, device=device)
    check_positive("distill_loss", "temperature", temperature)
    check_choice("distill_loss", "kind", kind, DIVERGENCES)
    check_range("distill_loss", "alpha", alpha, 0.0, torch.finfo(torch.float32).max)


def _policy_gradient(
    logits: Tensor, mask: Tensor, ids: Tensor | None, advantages: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Ids fit for a gather and advantages per token, 0 where masked; or None and None."""
    if (ids is None) != (advantages is None):
        raise ValueError("distill_loss: advantages and ids must be given together")
    if ids is None or advantages is None:
        return None, None
    like: dict[str, Any] = {"rule": "like mask", "shape": mask.shape, "device": mask.device}
    check_tensor("distill_loss", "ids", ids, dtypes=INTEGERS, **like)
    if isinstance(advantages, Tensor) and mask.dim() == 2 and advantages.shape == mask.shape[:1]:
        advantages = advantages[:, None].expand(mask.shape)
    check_tensor("distill_loss", "advantages", advantages, dtypes=FLOATS, **(like | {"rule": "like mask, or [B]"}))
    chosen, _, inside = flat_rows("distill_loss", ids, mask, logits.shape[-1])
    weights = torch.where(mask, precise(advantages.detach()), 0)
    return chosen.view(ids.shape), weights.masked_fill(~inside.view(mask.shape), torch.nan)
