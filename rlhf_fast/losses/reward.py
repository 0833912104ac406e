"""Losses of reward models, from pairs, labels and rankings, and how well their scores predict what people prefer."""

from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast.losses.inputs import check_dims, check_values, divided, precise
from rlhf_fast.ops.checks import FLOATS, INTEGERS, check_choice, check_tensor

RANKINGS = ("pairs", "plackett_luce")


def pairwise_loss(
    chosen: Tensor,  # [B]
    rejected: Tensor,  # [B]
    *,
    margin: float | Tensor | None = None,  # number or [B]
    center_coef: float = 0.0,
) -> Tensor:
    """Bradley–Terry loss of a reward model: mean of ``-log sigmoid(chosen - rejected - margin)``.

    ``center_coef`` adds ``center_coef * mean((chosen + rejected)^2)``, which keeps the scores around 0 (Eisenstein et
    al. 2023). The margin is Llama 2's (Touvron et al. 2023).

    Args:
        chosen: ``[B]``, scores of the preferred responses.
        rejected: ``[B]``, scores of the others.
        margin: by how much the first is better, a number or ``[B]``.
        center_coef: weight of the centring term.

    Returns:
        A scalar, float32 (float64 if an input is); 0 with a graph for an empty batch.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, or a coefficient that is negative or NaN.
    """
    check_dims("pairwise_loss", "chosen", chosen, "[B]")
    like: dict[str, Any] = {"dtypes": FLOATS, "shape": chosen.shape, "rule": "[B]", "device": chosen.device}
    check_tensor("pairwise_loss", "rejected", rejected, **like)
    if isinstance(margin, Tensor):
        check_tensor("pairwise_loss", "margin", margin, **like)
        margin = precise(margin)
    if not 0 <= center_coef < inf:
        raise ValueError(f"pairwise_loss: center_coef must be finite and not negative, got {center_coef}")
    better, worse = precise(chosen), precise(rejected)
    gap = better - worse if margin is None else better - worse - margin
    loss = -logsigmoid(gap)
    if center_coef:
        loss = loss + center_coef * (better + worse) ** 2
    return loss.sum() / max(len(chosen), 1)


def pointwise_loss(
    scores: Tensor,  # [...]
    labels: Tensor,  # [...], float, integer or bool
    *,
    mask: Tensor | None = None,  # [...], bool
    denominator: float | Tensor | None = None,  # number or 0-d
) -> Tensor:
    """Binary cross-entropy of a score as a logit: mean of ``-y log sigmoid(s) - (1 - y) log sigmoid(-s)``.

    A label is 1 for a good answer, 0 for a bad one, or how sure one is that it is good; the loss is then smallest at
    ``s = log(y / (1 - y))``. With ``[B, S]`` and a mask it is the loss of a process reward model, a label per step
    (Lightman et al. 2023, "Let's verify step by step").

    Args:
        scores: ``[...]``, in logits.
        labels: ``[...]``, in [0, 1].
        mask: True where a label counts, everywhere if None; what is stored elsewhere is never used.
        denominator: takes the place of the number of labels that count: with that of the full batch, micro-batches
            and ranks add up to its loss and gradient.

    Returns:
        A scalar, float32 (float64 if an input is); 0 with a graph where no label counts.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or denominator; a label outside [0, 1], on the CPU.
    """
    check_tensor("pointwise_loss", "scores", scores, dtypes=FLOATS)
    like: dict[str, Any] = {"shape": scores.shape, "rule": "like scores", "device": scores.device}
    check_tensor("pointwise_loss", "labels", labels, dtypes=(*FLOATS, *INTEGERS, torch.bool), **like)
    s, y = precise(scores), precise(labels)
    if mask is not None:
        check_tensor("pointwise_loss", "mask", mask, dtypes=(torch.bool,), **like)
        s, y = torch.where(mask, s, 0), torch.where(mask, y, 0)
    check_values("pointwise_loss", "labels", "in [0, 1]", labels, (y >= 0) & (y <= 1))
    losses = -(y * logsigmoid(s) + (1 - y) * logsigmoid(-s))
    valid = torch.ones_like(s, dtype=torch.bool) if mask is None else mask
    return divided("pointwise_loss", torch.where(valid, losses, 0).sum(), valid.sum(), denominator)


def ranking_loss(
    scores: Tensor,  # [B, K]
    ranking: Tensor,  # [B, K], float or integer
    *,
    kind: str = "pairs",
    mask: Tensor | None = None,  # [B, K], bool
    denominator: float | Tensor | None = None,  # number or 0-d
) -> Tensor:
    """Loss of a reward model over the K ranked answers of each prompt, larger = better; the mean over prompts.

    ``"pairs"`` (Ouyang et al. 2022): the mean of ``-log sigmoid(s_i - s_j)`` over the pairs of a prompt whose first
    answer is ranked above the second. ``"plackett_luce"`` (Plackett 1975): ``sum_i log sum_j exp(s_j) - s_i``, j over
    i itself and the answers below it: the negative log-likelihood of drawing the answers best first. With two answers
    both are the Bradley–Terry loss.

    Ties contribute nothing: neither kind lets two answers of the same rank compete. With ties Plackett–Luce becomes the
    likelihood that each answer beats those ranked below it.

    Args:
        scores: ``[B, K]``.
        ranking: ``[B, K]``, any numbers; only their order within a prompt counts.
        kind: ``"pairs"`` or ``"plackett_luce"``.
        mask: True where there is an answer, everywhere if None; what is stored elsewhere is never used.
        denominator: takes the place of the number of prompts with two answers of different rank, the only ones that
            count: with that of the full batch, micro-batches and ranks add up to its loss and gradient.

    Returns:
        A scalar, float32 (float64 for float64 scores); 0 with a graph where no prompt counts.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, kind or denominator; a ranking of NaN, on the CPU.
    """
    check_dims("ranking_loss", "scores", scores, "[B, K]")
    like: dict[str, Any] = {"shape": scores.shape, "rule": "like scores", "device": scores.device}
    check_tensor("ranking_loss", "ranking", ranking, dtypes=FLOATS + INTEGERS, **like)
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    check_tensor("ranking_loss", "mask", mask, dtypes=(torch.bool,), **like)
    check_choice("ranking_loss", "kind", kind, RANKINGS)
    check_values("ranking_loss", "ranking", "a number", ranking, ~(ranking.isnan() & mask))
    s = torch.where(mask, precise(scores), 0)
    gaps = s[:, None, :] - s[:, :, None]  # [B, i, j]: by how much j scores above i
    beats = better(ranking, mask)
    pairs = beats.sum((1, 2))
    if kind == "pairs":
        losses = torch.where(beats, -logsigmoid(-gaps), 0).sum((1, 2)) / pairs.clamp(min=1)
    else:
        own = torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
        losses = torch.where(beats | own, gaps, -inf).logsumexp(2).sum(1)
    return divided("ranking_loss", losses.sum(), (pairs > 0).sum(), denominator)


def better(
    ranking: Tensor,  # [B, K]
    mask: Tensor,  # [B, K], bool
) -> Tensor:
    """``[B, i, j]``, True where both answers exist and i is ranked above j."""
    return (ranking[:, :, None] > ranking[:, None, :]) & mask[:, :, None] & mask[:, None, :]
