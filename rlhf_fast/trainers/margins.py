"""How well scores predict what people said of answers: what is kept of a micro-batch, and the figures of all."""

import torch
from torch import Tensor

from rlhf_fast.losses.metrics import calibration_error, pairwise_accuracy, pairwise_calibration_error
from rlhf_fast.preferences import Judged


def seen(
    judged: Judged,
    scores: Tensor,  # [B, K]
) -> dict[str, Tensor]:
    """The ``M`` scores that count, their targets, and of ``P`` pairs of answers that compete the scores of both."""
    flat, targets = scores.flatten(), judged.targets.flatten()
    found = {"scores": flat[judged.there], "targets": targets[judged.there]}
    return found | {"better": flat[judged.over], "worse": flat[judged.under]}


def merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all ``parts`` one after the other; a part may be empty."""
    parts = [part for part in parts if part]
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def statistics(kind: str, found: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """How well what is ``seen`` predicts what is said of the answers, and the margins, one per prediction.

    Of two answers that compete the margin is the score of the better less that of the worse; of a labelled one its
    score, negative where the label is below a half. Where it is positive the prediction is right; 0 is half right.
    """
    scores = found["scores"]
    if kind in ("pairwise", "ranking"):
        margins = found["better"] - found["worse"]
        ece = pairwise_calibration_error(found["better"], found["worse"])
    else:
        labels = found["targets"]
        margins, ece = scores * (labels - 0.5).sign(), calibration_error(scores, labels)
    accuracy, mean = pairwise_accuracy(margins, torch.zeros_like(margins)), scores.mean()
    std = (scores - mean).square().mean().sqrt()
    stats = {"accuracy": accuracy, "ece": ece, "margin_mean": margins.mean(), "score_mean": mean, "score_std": std}
    return stats, margins


def histogram(
    margins: Tensor,  # [M]
    bins: int = 20,
) -> dict[str, list[float]]:
    """``counts`` of the margins between ``edges``, of which the one in the middle is 0."""
    finite = margins[margins.isfinite()].float().cpu()
    limit = max(finite.abs().amax().item() if len(finite) else 0.0, 1e-6)
    edges = torch.linspace(-limit, limit, bins + 1)
    return {"edges": edges.tolist(), "counts": torch.histc(finite, bins, -limit, limit).tolist()}
