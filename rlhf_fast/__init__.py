"""The RLHF hot path as C++, CUDA and Triton kernels, with a trainer that fits on a page."""

from importlib import import_module
from typing import Any

# `generate` now, for the name of a module that is imported later would replace the function.
from rlhf_fast.generate import generate
from rlhf_fast.losses import (
    AdaptiveKL,
    RRHFLossOutput,
    distill_loss,
    dpo_loss,
    group_advantages,
    kl_estimate,
    masked_mean,
    pairwise_loss,
    pointwise_loss,
    ranking_loss,
    rrhf_loss,
    whiten,
)
from rlhf_fast.ops import (
    AdvantagesOutput,
    KLOutput,
    LogprobsOutput,
    PPOLossOutput,
    SampleOutput,
    advantages,
    gae,
    kl,
    logprobs,
    ppo_loss,
    sample,
)
from rlhf_fast.rewards import EnsembleReward
from rlhf_fast.shaping import shape_rewards

__version__ = "0.1.0"

#: Imported when they are first asked for: they bring transformers along.
_LAZY = {
    "DPOConfig": "rlhf_fast.trainers.dpo",
    "DPOTrainer": "rlhf_fast.trainers.dpo",
    "DecodeGenerator": "rlhf_fast.generators",
    "DistillConfig": "rlhf_fast.trainers.distill",
    "DistillTrainer": "rlhf_fast.trainers.distill",
    "EvaluateConfig": "rlhf_fast.evaluation",
    "Generator": "rlhf_fast.generators",
    "VLLMGenerator": "rlhf_fast.generators",
    "GRPOConfig": "rlhf_fast.trainers.grpo",
    "GRPOTrainer": "rlhf_fast.trainers.grpo",
    "SFTConfig": "rlhf_fast.trainers.sft",
    "SFTTrainer": "rlhf_fast.trainers.sft",
    "Patch": "rlhf_fast.integrations.patching",
    "evaluate": "rlhf_fast.evaluation",
    "patch": "rlhf_fast.integrations.patching",
    "RewardConfig": "rlhf_fast.trainers.reward",
    "RewardTrainer": "rlhf_fast.trainers.reward",
    "PPOConfig": "rlhf_fast.trainers.ppo",
    "PPOTrainer": "rlhf_fast.trainers.ppo",
    "RRHFConfig": "rlhf_fast.trainers.rrhf",
    "RRHFTrainer": "rlhf_fast.trainers.rrhf",
    "diverse_beams": "rlhf_fast.beams",
    "sample_and_rank": "rlhf_fast.candidates",
}

__all__ = [
    "AdaptiveKL",
    "AdvantagesOutput",
    "DPOConfig",
    "DPOTrainer",
    "DecodeGenerator",
    "DistillConfig",
    "DistillTrainer",
    "EnsembleReward",
    "EvaluateConfig",
    "GRPOConfig",
    "GRPOTrainer",
    "Generator",
    "KLOutput",
    "LogprobsOutput",
    "PPOConfig",
    "PPOLossOutput",
    "PPOTrainer",
    "Patch",
    "RRHFConfig",
    "RRHFLossOutput",
    "RRHFTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "SampleOutput",
    "VLLMGenerator",
    "advantages",
    "distill_loss",
    "diverse_beams",
    "dpo_loss",
    "evaluate",
    "gae",
    "generate",
    "group_advantages",
    "kl",
    "kl_estimate",
    "logprobs",
    "masked_mean",
    "pairwise_loss",
    "patch",
    "pointwise_loss",
    "ppo_loss",
    "ranking_loss",
    "rrhf_loss",
    "sample",
    "sample_and_rank",
    "shape_rewards",
    "whiten",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = globals()[name] = getattr(import_module(_LAZY[name]), name)
        return value
    raise AttributeError(f"module 'rlhf_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
