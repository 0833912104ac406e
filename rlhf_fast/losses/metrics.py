"""How well the scores of a reward model predict what people prefer, and how well they know it."""

import torch
from torch import Tensor

from rlhf_fast.losses.inputs import check_dims, check_values, precise
from rlhf_fast.ops.checks import FLOATS, INTEGERS, check_range, check_tensor


def pairwise_accuracy(
    chosen: Tensor,  # [B]
    rejected: Tensor,  # [B]
) -> Tensor:
    """The share of pairs whose preferred response has the higher score; equal scores count as half.

    So a model that gives every response the same score has 0.5, as one that draws lots, and neither 0 nor 1.

    Args:
        chosen: ``[B]``, scores of the preferred responses.
        rejected: ``[B]``, of the others.

    Returns:
        A scalar in [0, 1], float32 (float64 if an input is), without a gradient; NaN for an empty batch.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device.
    """
    return _right(_gap("pairwise_accuracy", chosen, rejected)).mean()


def pairwise_calibration_error(
    chosen: Tensor,  # [B]
    rejected: Tensor,  # [B]
    *,
    bins: int = 10,
) -> Tensor:
    """Expected calibration error of the preferences of a reward model.

    Its confidence in a pair is ``sigmoid(|chosen - rejected|)``, which Bradley–Terry makes the probability of the
    answer it prefers; it is right, wrong or, with equal scores, half right. See `calibration_error`.

    Args:
        chosen: ``[B]``, scores of the preferred responses.
        rejected: ``[B]``, of the others.
        bins: of equal width over [0, 1]; the lower half of them stays empty.

    Returns:
        A scalar in [0, 1], float32 (float64 if an input is), without a gradient; NaN for an empty batch.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number of bins.
    """
    gap = _gap("pairwise_calibration_error", chosen, rejected)
    _check_bins("pairwise_calibration_error", bins)
    return _binned(gap.abs().sigmoid(), _right(gap), bins)


def calibration_error(
    scores: Tensor,  # [B]
    labels: Tensor,  # [B], float, integer or bool
    *,
    bins: int = 10,
) -> Tensor:
    """Expected calibration error of scores as logits (Naeini et al. 2015; Guo et al. 2017).

    The answers fall into bins by ``p = sigmoid(score)``. In each the mean of the labels should be the mean of ``p``:
    the error is their distance, averaged over the bins by how many answers each holds.

    Args:
        scores: ``[B]``, in logits.
        labels: ``[B]``, in [0, 1], as for `pointwise_loss`.
        bins: of equal width over [0, 1]; each holds its lower bound, the last one 1 too.

    Returns:
        A scalar in [0, 1], float32 (float64 if an input is), without a gradient; NaN for an empty batch.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number of bins; a label outside [0, 1], on the CPU.
    """
    check_dims("calibration_error", "scores", scores, "[B]")
    dtypes, rule, device = (*FLOATS, *INTEGERS, torch.bool), "like scores", scores.device
    check_tensor("calibration_error", "labels", labels, dtypes=dtypes, shape=scores.shape, rule=rule, device=device)
    check_values("calibration_error", "labels", "in [0, 1]", labels, (labels >= 0) & (labels <= 1))
    _check_bins("calibration_error", bins)
    return _binned(precise(scores.detach()).sigmoid(), precise(labels.detach()), bins)


def _gap(name: str, chosen: Tensor, rejected: Tensor) -> Tensor:
    check_dims(name, "chosen", chosen, "[B]")
    shape, device = chosen.shape, chosen.device
    check_tensor(name, "rejected", rejected, dtypes=FLOATS, shape=shape, rule="like chosen", device=device)
    return precise(chosen.detach()) - precise(rejected.detach())


def _right(gap: Tensor) -> Tensor:
    """1 where the gap is positive, 0 where it is negative, half where it is 0; NaN, whose sign is 0, stays NaN."""
    return torch.where(gap.isnan(), gap, (gap.sign() + 1) / 2)


def _check_bins(name: str, bins: int) -> None:
    check_range(name, "bins", bins, 1, 1_000_000)
    if bins != int(bins):
        raise ValueError(f"{name}: bins must be a whole number, got {bins}")


def _binned(p: Tensor, outcome: Tensor, bins: int) -> Tensor:
    """Sum over the bins of ``|sum of (outcome - p)| / B``: the count of a bin is its weight and cancels."""
    place = (p * bins).floor().clamp(max=bins - 1)
    inside = place[:, None] == torch.arange(bins, device=p.device)
    # A probability of NaN is in no bin, but must not make the error smaller.
    wrong = torch.where(inside, (outcome - p)[:, None], 0).sum(0).abs().sum()
    return torch.where(p.isnan().any(), torch.nan, wrong / len(p)) if len(p) else wrong / wrong
