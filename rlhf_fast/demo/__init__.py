"""The main job in five minutes, without a download."""

from rlhf_fast.demo.config import DemoConfig
from rlhf_fast.demo.run import run_demo

__all__ = ["DemoConfig", "run_demo"]
