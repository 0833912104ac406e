"""Formulas that deserve no kernel: the losses of reward models and policies, KL estimates, masked statistics."""

from rlhf_fast.losses.advantages import group_advantages
from rlhf_fast.losses.distill import distill_loss
from rlhf_fast.losses.preference import RRHFLossOutput, dpo_loss, rrhf_loss
from rlhf_fast.losses.reward import pairwise_loss, pointwise_loss, ranking_loss
from rlhf_fast.losses.statistics import AdaptiveKL, kl_estimate, masked_mean, whiten

__all__ = [
    "AdaptiveKL",
    "RRHFLossOutput",
    "distill_loss",
    "dpo_loss",
    "group_advantages",
    "kl_estimate",
    "masked_mean",
    "pairwise_loss",
    "pointwise_loss",
    "ranking_loss",
    "rrhf_loss",
    "whiten",
]
