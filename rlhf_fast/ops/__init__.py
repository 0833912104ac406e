"""The ops: a public function, a plain PyTorch reference and, where there is one, a kernel per device."""

from rlhf_fast.ops.advantages import AdvantagesOutput, advantages
from rlhf_fast.ops.gae import gae
from rlhf_fast.ops.kl import KLOutput, kl
from rlhf_fast.ops.logprobs import LogprobsOutput, logprobs
from rlhf_fast.ops.ppo_loss import PPOLossOutput, ppo_loss
from rlhf_fast.ops.sample import SampleOutput, sample

__all__ = [
    "AdvantagesOutput", "KLOutput", "LogprobsOutput", "PPOLossOutput", "SampleOutput",
    "advantages", "gae", "kl", "logprobs", "ppo_loss", "sample",
]  # fmt: skip
