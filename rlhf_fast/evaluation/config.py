"""The numbers of an evaluation."""

from dataclasses import dataclass

from rlhf_fast.trainers.options import option, validate


@dataclass(frozen=True)
class EvaluateConfig:
    """Every number of an evaluation."""

    max_new_tokens: int = option(128, "longest response in tokens", low=1)
    temperature: float = option(1.0, "sampling temperature; 0 takes the likeliest token", low=0.0)
    top_k: int = option(0, "sample among the k likeliest tokens; 0 for all", low=0)
    top_p: float = option(1.0, "sample in the smallest set of this probability", above=0.0, high=1.0)
    batch_size: int = option(32, "sequences at a time, a matter of memory only", low=1)
    seed: int = option(0, "of the responses; each prompt has the same for every model", low=0, high=2**63 - 1)
    samples: int = option(6, "prompts whose answers stand in report.html", low=0)
    quiet: bool = option(False, "no table")

    def __post_init__(self) -> None:
        validate(self)
