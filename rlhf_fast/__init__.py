"""The RLHF hot path as C++, CUDA and Triton kernels, with a trainer that fits on a page."""

from importlib import import_module
from typing import Any

from rlhf_fast.ops import gae

__version__ = "0.1.0"

# Trainers import transformers, so that they are imported when they are first asked for.
_LAZY = {
    "SFTConfig": "rlhf_fast.trainers.sft",
    "SFTTrainer": "rlhf_fast.trainers.sft",
    "RewardConfig": "rlhf_fast.trainers.reward",
    "RewardTrainer": "rlhf_fast.trainers.reward",
    "PPOConfig": "rlhf_fast.trainers.ppo",
    "PPOTrainer": "rlhf_fast.trainers.ppo",
}
__all__ = ["gae", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = globals()[name] = getattr(import_module(_LAZY[name]), name)
        return value
    raise AttributeError(f"module 'rlhf_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
