"""What the trainers share that learn from given answers: batches, one step, and the logprobs of answers.

``trainer`` has ``config``, ``model``, ``optimizer``, ``accelerator``, ``examples``, ``eval_examples``, ``steps`` (of
the whole run), ``done`` and ``updates`` (those taken) and ``save_model(folder)``.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast import data, models, ops, packing
from rlhf_fast.trainers import checkpoint, learning, processes, reading
from rlhf_fast.trainers.run import epochs


def batches(trainer: Any) -> Iterator[list[Any]]:
    """The shuffled examples of every epoch in batches; those that are left."""
    c = trainer.config
    return itertools.islice(epochs(trainer.examples, c.batch_size, c.epochs, c.seed), trainer.done, None)


def count(examples: list[data.Example]) -> int:
    """The tokens of ``examples`` to learn; the very first of a sequence is none, for nothing predicts it."""
    return sum(sum(example.mask[1:]) for example in examples)


def summed(parts: Iterable[dict[str, Tensor]], backward: Callable[[Tensor], Any] | None = None) -> dict[str, Tensor]:
    """The sum over ``parts``, computed one by one, and over the processes, each of which has its own.

    With ``backward`` the ``loss`` of each part leaves its gradient in the weights.
    """

    def part() -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for stats in parts:
            if backward is not None:
                backward(stats["loss"])
            total = {name: total.get(name, 0) + value.detach() for name, value in stats.items()}
        return total

    return processes.summed(part)


def update(trainer: Any, total: dict[str, Tensor], *, terms: int = 1) -> dict[str, float]:
    """One optimizer step with the gradient in the weights, which is clipped and checked.

    None where the loss has no ``terms``: AdamW's moments would move the weights all the same.

    ``total`` are the statistics of the batch, 0-d each, among them its ``loss``; returns them as numbers, with
    ``grad_norm`` and ``lr``.
    """
    c, optimizer = trainer.config, trainer.optimizer
    rate = learning.set_rate(optimizer, c.schedule, trainer.done, trainer.steps, c.warmup_ratio)
    norms = learning.clip_gradients(trainer.accelerator, [trainer.model], c.max_grad_norm)
    total = {name: value.to(norms.device) for name, value in total.items()}
    stats = learning.numbers(total | {"grad_norm": norms[0]})  # the only wait for the device
    learning.check_finite(optimizer, stats["loss"], [stats["grad_norm"]])
    if terms:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    trainer.done, trainer.updates = trainer.done + 1, trainer.updates + (terms > 0)
    return stats | {"lr": rate}


def due(trainer: Any, step: int) -> bool:
    """Whether there is something to evaluate on, and ``step`` is one after which that happens."""
    every = trainer.config.eval_every
    return bool(trainer.eval_examples) and (step == trainer.steps or (every > 0 and step % every == 0))


def held_out(trainer: Any) -> list[Any]:
    """The examples to evaluate on. Raises ``ValueError`` where there are none."""
    if not trainer.eval_examples:
        raise ValueError("there is nothing to evaluate on: eval_data is absent")
    examples: list[Any] = trainer.eval_examples
    return examples


def save(trainer: Any, folder: Path, **numbers: Any) -> None:
    """Write a checkpoint: the model, the optimizer, how many steps are taken, and further ``numbers``."""
    trainer.save_model(folder)
    kept = {"step": trainer.done, "updates": trainer.updates, **numbers}
    checkpoint.save_state(folder, trainer.optimizer, kept, trainer.examples)


def restore(trainer: Any, folder: Path) -> dict[str, Any]:
    """Go back to the state of a checkpoint; returns its numbers."""
    models.restore(trainer.model, folder)
    kept = checkpoint.load_state(folder, trainer.optimizer, trainer.examples)
    trainer.done, trainer.updates = kept["step"], kept["updates"]
    return kept


@dataclass(frozen=True)
class Answers:
    """``N`` prompts, padded to the left, each with its answer, padded to the right."""

    ids: Tensor  # [N, P + T], int64
    attention: Tensor  # [N, P + T], bool, True on tokens
    responses: Tensor  # [N, T], int64, the last T columns of ids
    mask: Tensor  # [N, T], bool, True on the tokens that count
    prompt_lengths: Tensor  # [N], int64, on the CPU
    lengths: Tensor  # [N], int64, on the CPU, of the responses
    counts: Tensor  # [N, T], the mask on the CPU

    def select(self, rows: Tensor) -> "Answers":
        """The answers ``rows``."""
        return Answers(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @cached_property
    def spots(self) -> packing.Spots:
        """The sequences without their padding, in rows as long as the longest of them."""
        return self._spots(flat=False)

    @cached_property
    def flat_spots(self) -> packing.Spots:
        """The same in one row, for flash-attn's kernels."""
        return self._spots(flat=True)

    def _spots(self, *, flat: bool) -> packing.Spots:
        lengths = self.prompt_lengths, self.lengths
        return packing.spots(self.ids, self.mask, *lengths, counts=self.counts, flat=flat)


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
    lengths = {"prompt_lengths": before.sum(1), "lengths": there.sum(1)}
    return Answers(*(x.to(device, non_blocking=True) for x in found), **lengths, counts=counts)


def answered(sequence: list[int], prompt_length: int) -> list[bool]:
    """The mask of a prompt of ``prompt_length`` tokens with its answer."""
    return [i >= prompt_length for i in range(len(sequence))]


def logprobs(model: nn.Module, answers: Answers, config: Any) -> Tensor:
    """``[N, T]``, the logprob of each token of the answers, in float32; 0 where it does not count."""
    seen = reading.predictions(model, answers, config)
    return seen.spread(ops.logprobs(seen.logits, seen.tokens, mask=seen.mask).logprobs)
