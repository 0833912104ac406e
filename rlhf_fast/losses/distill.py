"""Distillation of a teacher's distribution into a student, with the reward as a policy gradient beside it."""

from math import inf
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.losses.inputs import divided, precise
from rlhf_fast.ops import kl, logprobs
from rlhf_fast.ops.checks import FLOATS, INTEGERS, check_choice, check_positive, check_range, check_tensor
from rlhf_fast.ops.logprobs import flat_rows, row_blocks, scaled

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
            slope = _SLOPES[ctx.kind](scaled(block, ctx.temperature), scaled(teacher_block, ctx.temperature))
            # A select, for a divergence that nobody asks about may be infinite.
            dz = slope.mul_(k[at] / ctx.temperature).masked_fill_(k[at] == 0, 0)
            if ids is not None and grad_logprobs is not None:
                g, chosen = grad_logprobs.reshape(-1, 1)[at], ids.reshape(-1, 1)[at]
                dz -= scaled(block, 1.0).softmax(-1).mul_(g)
                dz.scatter_add_(-1, chosen, g.to(dz.dtype))
            flat[at] = dz.masked_fill_(~valid[at], 0)
        return grad, None, None, None, None, None


def _forward_slope(z: Tensor, w: Tensor) -> Tensor:
    return z.softmax(-1).sub_(w.softmax(-1))


def _reverse_slope(z: Tensor, w: Tensor) -> Tensor:
    logp, logq = z.log_softmax(-1), w.log_softmax(-1)
    p = logp.exp()
    return _centred(torch.where(logp == -inf, 0, p * (logp - logq)), p)


def _jsd_slope(z: Tensor, w: Tensor) -> Tensor:
    p, q = z.softmax(-1), w.softmax(-1)
    return _centred(_terms(p, (p + q).div_(2)), p).div_(2)


_SLOPES = {"forward": _forward_slope, "reverse": _reverse_slope, "jsd": _jsd_slope}


def _centred(terms: Tensor, p: Tensor) -> Tensor:
    """``p_i (t_i - sum_j p_j t_j)`` from the ``p_i t_i``: the derivative of sum p t through the softmax."""
    return terms.sub_(p.mul_(terms.sum(-1, keepdim=True)))


def _jsd(logits: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    double = torch.float64 in (logits.dtype, teacher.dtype)
    divergence = torch.empty(mask.shape, dtype=torch.float64 if double else torch.float32, device=mask.device)
    flat = divergence.view(-1)
    for at, block, teacher_block in row_blocks(logits, teacher):
        p, q = scaled(block, temperature).softmax(-1), scaled(teacher_block, temperature).softmax(-1)
        m = (p + q).div_(2)
        flat[at] = (_terms(p, m).sum(-1) + _terms(q, m).sum(-1)) / 2
    return divergence.masked_fill_(~mask, 0)


def _terms(p: Tensor, m: Tensor) -> Tensor:
    """``p log(p / m)``, the terms of KL(p || m) for a mixture m that p is part of; 0 where p is 0."""
    return (p / m).log_().mul_(p).masked_fill_(p == 0, 0)


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
