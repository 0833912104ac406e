"""The ops: a public function, a plain PyTorch reference and, where there is one, a kernel per device."""

from rlhf_fast.ops.gae import gae
from rlhf_fast.ops.sample import SampleOutput, sample

__all__ = ["SampleOutput", "gae", "sample"]
