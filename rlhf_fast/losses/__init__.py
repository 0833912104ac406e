"""Formulas that deserve no kernel: losses of reward models and policies, KL estimates, statistics, metrics."""

from rlhf_fast.losses.advantages import group_advantages
from rlhf_fast.losses.distill import distill_loss
from rlhf_fast.losses.metrics import calibration_error, pairwise_accuracy, pairwise_calibration_error
from rlhf_fast.losses.preference import RRHFLossOutput, dpo_loss, rrhf_loss
from rlhf_fast.losses.reward import pairwise_loss, pointwise_loss, ranking_loss
from rlhf_fast.losses.statistics import AdaptiveKL, kl_estimate, masked_mean, whiten

__all__ = [
    "AdaptiveKL",
    "RRHFLossOutput",
    "calibration_error",
    "distill_loss",
    "dpo_loss",
    "group_advantages",
    "kl_estimate",
    "masked_mean",
    "pairwise_accuracy",
    "pairwise_calibration_error",
    "pairwise_loss",
    "pointwise_loss",
    "ranking_loss",
    "rrhf_loss",
    "whiten",
]
