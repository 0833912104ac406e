"""How a model reads prompts with their responses: padded, or packed without their padding.

``answers`` are ``offline.Answers`` or a ``Rollout``; ``config`` has ``packing`` and ``precision``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from rlhf_fast import models, packing
from rlhf_fast.trainers import learning


class Predictions(NamedTuple):
    """The logits that predict the tokens of responses: ``[B, T, V]``, or packed ``[N, V]`` of those that count."""

    logits: Tensor
    tokens: Tensor  # [B, T] or [N], int64, what they predict
    mask: Tensor | None  # [B, T], bool; packed none, for nobody reads what is too much
    spread: Callable[[Tensor], Tensor]  # what there is for each of the tokens as [B, T], 0 where masked
    gather: Callable[[Tensor], Tensor]  # [B, T] like tokens, of those that are too much 0


def predictions(model: nn.Module, answers: Any, config: Any) -> Predictions:
    """What ``model`` predicts at every response token of ``answers``."""
    with learning.autocast(answers.mask.device, config.precision):
        if config.packing:
            spots = spots_of(model, answers)
            logits = packing.packed_logits(model, spots.packed)
            return Predictions(logits, spots.packed.targets, None, spots.spread, spots.gather)
        keep = answers.mask.shape[1] + 1
        logits = models.token_logits(model, answers.ids, answers.attention, keep=keep, final=False)
    return Predictions(logits, answers.responses, answers.mask, _same, _same)  # logits at a token are of the next one


def spots_of(model: nn.Module, answers: Any) -> packing.Spots:
    """Where the tokens of ``answers`` stand in the rows that ``model`` reads."""
    spots: packing.Spots = answers.flat_spots if packing.uses_varlen(model) else answers.spots
    return spots


def _same(x: Tensor) -> Tensor:
    return x
