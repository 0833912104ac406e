"""The ops: a public function, a plain PyTorch reference and, where there is one, a kernel per device."""

from rlhf_fast.ops.gae import gae

__all__ = ["gae"]
