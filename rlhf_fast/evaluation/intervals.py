"""Shares and means with their 95 % intervals."""

import torch
from torch import Tensor

Z = 1.959963984540054  # of the normal distribution, 95 % lie within


def wilson(share: float, n: int, z: float = Z) -> tuple[float, float, float]:
    """``share`` of ``n`` trials with the ends of its score interval (Wilson 1927), 95 % by default."""
    if n == 0:
        return share, 0.0, 1.0
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return share, max(0.0, centre - half), min(1.0, centre + half)


def win_rate(
    ours: Tensor,  # [B] scores
    theirs: Tensor,  # [B] scores of the other model on the same prompts
) -> tuple[float, float, float]:
    """The share of prompts on which ours scores higher (a tie counts half) and its 95 % Wilson interval."""
    return wilson(float((ours > theirs).double().mean() + 0.5 * (ours == theirs).double().mean()), len(ours))


def mean(
    values: Tensor,  # [B]
) -> tuple[float, float, float]:
    """The mean of independent ``values`` and its 95 % interval, ``1.96`` standard errors to either side.

    Of one value the interval is infinite.
    """
    values = values.double()
    centre = float(values.mean())
    half = Z * float(values.std() / len(values) ** 0.5) if len(values) > 1 else torch.inf
    return centre, centre - half, centre + half
