"""What the trainers share that learn from given answers: sequences in, logits and logprobs of their answers out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf_fast import data, models, ops
from rlhf_fast.trainers import learning


class Answers(NamedTuple):
    """``N`` prompts, padded to the left, each with its answer, padded to the right."""

    ids: Tensor  # [N, P + T], int64
    attention: Tensor  # [N, P + T], bool, True on tokens
    responses: Tensor  # [N, T], int64, the last T columns of ids
    mask: Tensor  # [N, T], bool, True on the tokens that count

    def select(self, rows: Tensor) -> "Answers":
        """The answers ``rows``."""
        return Answers(*(x[rows] for x in self))


def collate(sequences: Sequence[list[int]], masks: Sequence[list[bool]], pad_id: int, device: torch.device) -> Answers:
    """``N`` sequences and which of their tokens count: an answer begins with the first that does.

    The very first token of a sequence never counts, for nothing predicts it.
    """
    starts = [next((i for i, m in enumerate(mask) if m and i), len(mask)) for mask in masks]
    cut = list(zip(sequences, masks, starts, strict=True))
    prompts, before = data.pad([ids[:start] for ids, _, start in cut], pad_id, side="left")
    responses, there = data.pad([ids[start:] for ids, _, start in cut], pad_id)
    counts, _ = data.pad([mask[start:] for _, mask, start in cut], False)
    # Of empty lists there is no dtype to tell.
    prompts, responses, counts = prompts.long(), responses.long(), counts.bool()
    found = torch.cat([prompts, responses], 1), torch.cat([before, there], 1), responses, counts
    return Answers(*(x.to(device, non_blocking=True) for x in found))


def answered(sequence: list[int], prompt_length: int) -> list[bool]:
    """The mask of a prompt of ``prompt_length`` tokens with its answer."""
    return [i >= prompt_length for i in range(len(sequence))]


def logits(model: nn.Module, answers: Answers, precision: str) -> Tensor:
    """``[N, T, V]``, at each token of the answers the logits that predict it."""
    with learning.autocast(answers.ids.device, precision):
        keep = answers.mask.shape[1] + 1
        return models.token_logits(model, answers.ids, answers.attention, keep=keep, final=False)


def logprobs(model: nn.Module, answers: Answers, precision: str) -> Tensor:
    """``[N, T]``, the logprob of each token of the answers, in float32; 0 where it does not count."""
    return ops.logprobs(logits(model, answers, precision), answers.responses, mask=answers.mask).logprobs
