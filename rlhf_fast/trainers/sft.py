"""Supervised fine-tuning: cross entropy of the response tokens."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import data, models, ops, packing
from rlhf_fast.data import read_records
from rlhf_fast.trainers import learning, offline, processes
from rlhf_fast.trainers.drive import drive
from rlhf_fast.trainers.options import chosen, option, validate
from rlhf_fast.trainers.run import Run, check_folder


@dataclass(frozen=True)
class SFTConfig:
    """Every number of supervised fine-tuning."""

    epochs: int = option(1, "passes over the data", low=1)
    batch_size: int = option(16, "sequences per optimizer step", low=1)
    micro_batch_size: int | None = option(None, "sequences, or packed rows, per forward pass: memory only", low=1)
    learning_rate: float = option(2e-5, "peak learning rate", low=0.0)
    schedule: str = option("cosine", "the learning rate after the warm-up", choices=learning.SCHEDULES)
    warmup_ratio: float = option(0.03, "share of the steps in which the rate rises linearly", low=0.0, high=1.0)
    weight_decay: float = option(0.0, "AdamW's weight decay", low=0.0)
    max_grad_norm: float = option(1.0, "norm to which the gradient is clipped", above=0.0)
    max_length: int | None = option(None, "longest sequence in tokens; the model's context if absent", low=2)
    overlong: str = option("error", "a longer sequence stops the run, is cut or is left out", choices=data.OVERLONG)
    packing: bool = option(False, "sequences of a batch share rows of max_length, or as long as the longest if absent")
    precision: str = option("fp32", "bf16 runs the model's products in bfloat16", choices=learning.PRECISIONS)
    gradient_checkpointing: bool = option(False, "compute activations anew for the backward pass: less memory, slower")
    seed: int = option(0, "of the order of the data", low=0, high=2**63 - 1)
    eval_every: int = option(100, "steps between evaluations, beside the one at the end; 0 for that one only", low=0)
    save_every: int = option(500, "steps between checkpoints; 0 for none", low=0)
    keep: int = option(2, "checkpoints that stay on the disk", low=1)
    quiet: bool = option(False, "no progress bar")

    def __post_init__(self) -> None:
        validate(self)


class SFTTrainer:
    """Teach ``model`` the responses of ``data``.

    Args:
        model: a path, a Hub id or a causal LM.
        data: a path, a list of dicts or a ``datasets.Dataset`` with ``text``, ``prompt`` and ``response``, or
            ``messages``.
        output_dir: the folder of the run; nothing is written without it.
        config: an ``SFTConfig``.
        tokenizer: needed if ``model`` is a module.
        eval_data: like ``data``.
    """

    def __init__(
        self,
        model: Any,
        *,
        data: Any,
        output_dir: str | Path | None = None,
        config: SFTConfig | None = None,
        tokenizer: Any = None,
        eval_data: Any = None,
    ) -> None:
        check_folder(output_dir, run=True)
        self.accelerator = learning.accelerator()
        self.config, self.output_dir = chosen(config, SFTConfig), output_dir
        records, eval_records = read_records(data), [] if eval_data is None else read_records(eval_data)
        self.tokenizer = models.load_tokenizer(model, tokenizer)
        policy = models.load_policy(model)
        self.max_length = models.allowed_length(policy, self.config.max_length)
        self.examples = self._tokenise(records)
        self.eval_examples = self._tokenise(eval_records) if eval_records else []
        models.check_tokens(policy, self.tokenizer, (e.ids for e in [*self.examples, *self.eval_examples]))
        self.model = learning.trainable(policy, learning.home(self.accelerator), self.config)
        self.attention = learning.prepare_packing(self.accelerator, [self.model], self.config, rows=False)
        learning.shard(self.accelerator, [self.model])
        self.optimizer = learning.adamw([(self.model, self.config.learning_rate)], self.config.weight_decay)
        self.steps = self.config.epochs * math.ceil(len(self.examples) / self.config.batch_size)
        self.done = self.updates = 0

    def _tokenise(self, records: list[data.Record]) -> list[data.Example]:
        limits = {"max_length": self.max_length, "overlong": self.config.overlong}
        return data.sft_examples(records, self.tokenizer, **limits)

    def train(self, *, resume: bool = False) -> dict[str, float]:
        """Run every step and leave the model in ``output_dir``; returns the last metrics.

        With ``resume`` the run in ``output_dir`` goes on from its last checkpoint, if there is one, to the bits that it
        would have had without the stop.
        """
        c = self.config
        run = Run("sft", self.output_dir, c, keep=c.keep, quiet=c.quiet)
        return drive(self, run, total=self.steps, save_every=c.save_every, resume=resume, live=("loss", "eval_loss"))

    def batches(self) -> Iterator[list[data.Example]]:
        """The shuffled examples of every epoch in batches; those that are left."""
        return offline.batches(self)

    def step(self, batch: list[data.Example]) -> dict[str, float]:
        """One optimizer step on the mean loss of the response tokens of ``batch``; returns its statistics."""
        tokens = offline.count(batch)
        parts = self.losses(batch, tokens, self.parts)
        return offline.update(self, offline.summed(parts, self.accelerator.backward)) | {"tokens": float(tokens)}

    def losses(self, batch: list[data.Example], tokens: int, cut: Callable) -> Iterator[dict[str, Tensor]]:
        """What this process's share of ``batch``, as ``cut`` cuts it, adds to the mean loss of ``tokens`` tokens."""
        return ({"loss": counts * self.loss(part) / max(tokens, 1)} for part, counts in processes.turns(batch, cut))

    def parts(self, batch: list[data.Example]) -> list[list[Any]]:
        """``batch`` in parts of ``micro_batch_size`` examples or, packed, rows of examples."""
        c = self.config
        if not c.packing or not batch:
            return learning.split(batch, c.micro_batch_size)
        lengths = [len(example.ids) for example in batch]
        rows = packing.first_fit(lengths, max(lengths) if c.max_length is None else c.max_length)
        return learning.split([[batch[i] for i in row] for row in rows], c.micro_batch_size)

    def packed_loss(self, rows: list[list[data.Example]]) -> Tensor:
        """The ``loss`` of examples that share rows."""
        device, flat = self.accelerator.device, packing.uses_varlen(self.model)
        pieces = [[(example.ids, example.mask) for example in row] for row in rows]
        packed = packing.pack(pieces, self.tokenizer.pad_token_id, device, flat=flat)
        with learning.autocast(device, self.config.precision):
            logits = packing.packed_logits(self.model, packed)
        return -ops.logprobs(logits, packed.targets).logprobs.sum()

    def loss(self, batch: list[Any]) -> Tensor:
        """The sum over the response tokens of ``batch``, one of ``parts``, of ``-log p``, a 0-d tensor."""
        if self.config.packing:
            return self.packed_loss(batch)
        sequences, masks = [example.ids for example in batch], [example.mask for example in batch]
        answers = offline.collate(sequences, masks, self.tokenizer.pad_token_id, self.accelerator.device)
        return -offline.logprobs(self.model, answers, self.config).sum()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """``eval_loss``, the mean over the response tokens of the held-out data. Raises ``ValueError`` without any."""
        examples, size = offline.held_out(self), self.config.batch_size

        def cut(mine: list[data.Example]) -> list[list[Any]]:
            return [part for some in learning.split(mine, size) for part in self.parts(some)]

        found = offline.summed(self.losses(examples, offline.count(examples), cut))
        return {"eval_loss": found["loss"].item()}

    def after(self, step: int, run: Run) -> dict[str, float]:
        """Evaluate where it is due."""
        return self.evaluate() if offline.due(self, step) else {}

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        offline.save(self, folder)

    def restore(self, folder: Path) -> None:
        """Go back to the state of a checkpoint."""
        offline.restore(self, folder)

    def save_model(self, folder: Path) -> None:
        """Write the model and its tokenizer as ``save_pretrained`` does."""
        models.save(self.model, self.tokenizer, folder)
