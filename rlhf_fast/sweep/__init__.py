"""Search: many runs of one trainer with other numbers, through Optuna."""

from rlhf_fast.sweep.plan import Plan, read_plan
from rlhf_fast.sweep.search import sweep

__all__ = ["Plan", "read_plan", "sweep"]
