"""Losses that teach a policy from ranked or paired responses, without a reward model beside it: RRHF and DPO."""

from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from rlhf_fast.losses.inputs import check_dims, check_values, divided, precise
from rlhf_fast.losses.reward import better
from rlhf_fast.ops.checks import FLOATS, INTEGERS, check_choice, check_positive, check_range, check_tensor

DPO_KINDS = ("sigmoid", "ipo", "hinge")


class RRHFLossOutput(NamedTuple):
    """What `rrhf_loss` returns; all 0-d."""

    loss: Tensor
    rank_loss: Tensor
    sft_loss: Tensor


def rrhf_loss(
    logprobs: Tensor,  # [B, K, T]
    mask: Tensor,  # [B, K, T], bool
    scores: Tensor,  # [B, K], float or integer
    *,
    length_norm: float = 1.0,
    sft_weight: float = 1.0,
    denominator: float | Tensor | None = None,  # number or 0-d
) -> RRHFLossOutput:
    """Rank responses to align language models with human feedback (Yuan et al. 2023), the form of the paper.

    With ``m`` the mask and ``r`` the scores, for the K responses of each prompt::

        p_i       = sum_t m_it logp_it / (sum_t m_it)^length_norm
        rank_loss = sum over r_i < r_j of max(0, p_i - p_j)
        sft_loss  = -sum_t m_bt logp_bt,   b the response of the highest score, the first of equals
        loss      = rank_loss + sft_weight * sft_loss

    each the mean over the prompts. Ties contribute nothing to ``rank_loss``. A response without a token takes no part,
    whatever its score: that is how a prompt with fewer than K responses is padded. A prompt with a single response
    has a ``sft_loss`` only; one with none does not count.

    The code that the authors released weighs the rank term by 100 and divides by the padded length; this does not.

    Args:
        logprobs: ``[B, K, T]``, of the response tokens under the policy, in nats.
        mask: True on response tokens; what is stored elsewhere is never used.
        scores: ``[B, K]``, larger = better; only their order within a prompt counts.
        length_norm: power of the length that divides a response's logprob, 0 for none.
        sft_weight: weight of the imitation of the best response.
        denominator: takes the place of the number of prompts that count: with that of the full batch, micro-batches
            and ranks add up to its loss and gradient.

    Returns:
        `RRHFLossOutput`, float32 (float64 for float64 logprobs); 0 with a graph where no prompt counts.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number; a score of NaN, on the CPU.
    """
    check_dims("rrhf_loss", "logprobs", logprobs, "[B, K, T]")
    like: dict[str, Any] = {"shape": logprobs.shape, "rule": "like logprobs", "device": logprobs.device}
    check_tensor("rrhf_loss", "mask", mask, dtypes=(torch.bool,), **like)
    like |= {"shape": logprobs.shape[:2], "rule": "[B, K] of logprobs"}
    check_tensor("rrhf_loss", "scores", scores, dtypes=FLOATS + INTEGERS, **like)
    for name, number in (("length_norm", length_norm), ("sft_weight", sft_weight)):
        check_range("rrhf_loss", name, number, 0.0, torch.finfo(torch.float32).max)
    lengths = mask.sum(2)
    there = lengths > 0
    check_values("rrhf_loss", "scores", "a number", scores, ~(scores.isnan() & there))
    sums = torch.where(mask, precise(logprobs), 0).sum(2)
    p = sums / lengths.clamp(min=1).to(sums.dtype) ** length_norm
    gaps = relu(p[:, None, :] - p[:, :, None])  # [B, i, j]: by how much j is likelier than i
    rank_losses = torch.where(better(scores, there), gaps, 0).sum((1, 2))
    sft_losses = -torch.where(_best(scores, there), sums, 0).sum(1)
    count = there.any(1).sum()
    rank_loss, sft_loss = (divided("rrhf_loss", x.sum(), count, denominator) for x in (rank_losses, sft_losses))
    return RRHFLossOutput(rank_loss + sft_weight * sft_loss if sft_weight else rank_loss, rank_loss, sft_loss)


def dpo_loss(
    chosen: Tensor,  # [B]
    rejected: Tensor,  # [B]
    ref_chosen: Tensor,  # [B]
    ref_rejected: Tensor,  # [B]
    *,
    beta: float = 0.1,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023), from the logprobs of whole responses.

    With ``h = (chosen - ref_chosen) - (rejected - ref_rejected)`` and ``e = label_smoothing``, the mean of::

        sigmoid    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)      e: Mitchell 2023, "cDPO"
        ipo        (h - 1 / (2 beta))^2                                       Azar et al. 2023
        hinge      max(0, 1 - beta h)                                         Zhao et al. 2023, "SLiC-HF"

    Args:
        chosen: ``[B]``, summed over the tokens of the preferred responses, under the policy, in nats. (TRL takes the
            mean over the tokens for ``ipo``.)
        rejected: ``[B]``, of the others.
        ref_chosen: ``[B]``, under the reference.
        ref_rejected: ``[B]``, of the others, under the reference.
        beta: strength of the pull towards the reference, above 0.
        kind: ``"sigmoid"``, ``"ipo"`` or ``"hinge"``.
        label_smoothing: share of preferences that are the wrong way round, in [0, 0.5]; for ``sigmoid`` only.

    Returns:
        A scalar, float32 (float64 if an input is); 0 with a graph for an empty batch.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, range or kind.
    """
    check_dims("dpo_loss", "chosen", chosen, "[B]")
    like: dict[str, Any] = {"dtypes": FLOATS, "shape": chosen.shape, "rule": "like chosen", "device": chosen.device}
    for name, x in (("rejected", rejected), ("ref_chosen", ref_chosen), ("ref_rejected", ref_rejected)):
        check_tensor("dpo_loss", name, x, **like)
    check_positive("dpo_loss", "beta", beta)
    check_choice("dpo_loss", "kind", kind, DPO_KINDS)
    check_range("dpo_loss", "label_smoothing", label_smoothing, 0.0, 0.5)
    if label_smoothing and kind != "sigmoid":
        raise ValueError(f"dpo_loss: label_smoothing must be 0 with kind {kind!r}, got {label_smoothing}")
    h = (precise(chosen) - precise(ref_chosen)) - (precise(rejected) - precise(ref_rejected))
    if kind == "sigmoid":
        losses = -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)
    elif kind == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        losses = relu(1 - beta * h)
    return losses.sum() / max(len(chosen), 1)


def _best(scores: Tensor, there: Tensor) -> Tensor:
    """``[B, K]``, True at the first of the highest scores among the responses that are there."""
    scores = torch.where(there, scores.double(), -inf)
    place = torch.arange(scores.shape[1], device=scores.device)
    leading = there & (scores == scores.amax(1, keepdim=True))
    first = torch.where(leading, place, scores.shape[1]).amin(1, keepdim=True)
    return place == first
