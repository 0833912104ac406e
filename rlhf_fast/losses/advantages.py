"""Advantages without a critic: the score of a response against those of the same prompt."""

import torch
from torch import Tensor

from rlhf_fast.losses.inputs import check_dims, precise
from rlhf_fast.ops.checks import INTEGERS, check_choice, check_range, check_tensor

ADVANTAGES = ("grpo", "dr_grpo", "rloo", "reinforce_pp")


def group_advantages(
    scores: Tensor,  # [B]
    groups: Tensor,  # [B], integer
    *,
    kind: str = "grpo",
    eps: float = 1e-6,
) -> Tensor:
    """The advantage of each response over its group, the responses to the same prompt.

    With ``mean``, ``std`` (unbiased) and ``K`` of the group of response i::

        grpo            (r_i - mean) / (std + eps)               Shao et al. 2024, "DeepSeekMath"
        dr_grpo         r_i - mean                               Liu et al. 2025, "Understanding R1-Zero-like training"
        rloo            r_i - the mean of the K - 1 others       Ahmadian et al. 2024, "Back to basics"
        reinforce_pp    as grpo, with the batch as one group     Hu et al. 2025, "REINFORCE++"

    A response alone in its group, and one whose group has equal scores, gets exactly 0.

    REINFORCE++ takes no baseline from the group: it whitens the returns of all tokens of the batch. Without a KL in the
    rewards a return is the score, and this is its advantage, each response counting once. With one, use ``gae`` with
    ``gamma = lam = 1`` and values of 0, then ``whiten``.

    Args:
        scores: ``[B]``, of the responses.
        groups: ``[B]``, the number of the prompt of each, any numbers in any order; groups of any sizes.
        kind: ``"grpo"``, ``"dr_grpo"``, ``"rloo"`` or ``"reinforce_pp"``.
        eps: added to the standard deviation, not negative.

    Returns:
        ``[B]``, float32 (float64 for float64 scores), without a gradient; the same bits in any order of the responses.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, range or kind.
    """
    check_dims("group_advantages", "scores", scores, "[B]")
    rule, device = "[B] like scores", scores.device
    check_tensor("group_advantages", "groups", groups, dtypes=INTEGERS, shape=scores.shape, rule=rule, device=device)
    check_choice("group_advantages", "kind", kind, ADVANTAGES)
    check_range("group_advantages", "eps", eps, 0.0, torch.finfo(torch.float32).max)
    if kind == "reinforce_pp":
        groups = torch.zeros_like(groups)
    deviation, variance, count = _around_mean(scores.detach().double(), groups)
    if kind == "grpo" or kind == "reinforce_pp":
        advantages = deviation / (variance.sqrt() + eps)
    elif kind == "dr_grpo":
        advantages = deviation
    else:
        advantages = deviation * count / (count - 1).clamp(min=1)  # a quotient of two integers would be float32
    return precise(torch.where(deviation == 0, 0, advantages), scores.dtype)


def _around_mean(scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Deviation from the mean of the group, its unbiased variance and its size, ``[B]`` each.

    Sorted by group and score, then summed by segments: no atomic addition, whose order would change the bits, no host
    synchronisation, and no dependence on the order in which the responses came.
    """
    order = scores.argsort()
    order = order[groups[order].argsort(stable=True)]
    x, g = scores[order], groups[order]
    starts = torch.ones_like(g, dtype=torch.bool)
    starts[1:] = g[1:] != g[:-1]
    segment = starts.cumsum(0) - 1  # the number of the group of each response, in this order
    sizes = torch.zeros_like(segment).index_add_(0, segment, torch.ones_like(segment))
    count = sizes[segment]
    x = x - x[(sizes.cumsum(0) - sizes)[segment]]  # from the group's first: equal scores are exactly 0
    deviation = x - _segment_sum(x, sizes)[segment] / count
    variance = _segment_sum(deviation**2, sizes)[segment] / (count - 1).clamp(min=1)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return deviation[back], variance[back], count[back]


def _segment_sum(x: Tensor, sizes: Tensor) -> Tensor:
    """Sums over segments of the given sizes; 0 for those of size 0."""
    return torch.segment_reduce(x, "sum", lengths=sizes, unsafe=True)
