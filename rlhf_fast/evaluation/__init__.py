"""Evaluation: a model's answers to held-out prompts, judged by a reward, against a baseline and against references."""

from rlhf_fast.evaluation.config import EvaluateConfig
from rlhf_fast.evaluation.evaluate import evaluate

__all__ = ["EvaluateConfig", "evaluate"]
