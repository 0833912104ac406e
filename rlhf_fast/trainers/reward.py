"""Reward modelling: a scalar head learns which of two answers people prefer (Bradley–Terry; Stiennon et al. 2020)."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import data, models
from rlhf_fast.data import read_records
from rlhf_fast.losses import pairwise_loss
from rlhf_fast.trainers import checkpoint, learning, processes
from rlhf_fast.trainers.drive import drive
from rlhf_fast.trainers.options import chosen, option, validate
from rlhf_fast.trainers.run import Run, check_folder, epochs


@dataclass(frozen=True)
class RewardConfig:
    """Every number of reward modelling."""

    epochs: int = option(1, "passes over the pairs", low=1)
    batch_size: int = option(16, "pairs per optimizer step", low=1)
    micro_batch_size: int | None = option(None, "pairs per forward pass, a matter of memory only", low=1)
    learning_rate: float = option(1e-5, "peak learning rate", low=0.0)
    schedule: str = option("cosine", "the learning rate after the warm-up", choices=learning.SCHEDULES)
    warmup_ratio: float = option(0.03, "share of the steps in which the rate rises linearly", low=0.0, high=1.0)
    weight_decay: float = option(0.0, "AdamW's weight decay", low=0.0)
    max_grad_norm: float = option(1.0, "norm to which the gradient is clipped", above=0.0)
    center_coef: float = option(0.0, "weight of the squared sum of the two scores, which keeps them near 0", low=0.0)
    max_length: int | None = option(None, "longest prompt and answer in tokens; the context if absent", low=2)
    overlong: str = option("error", "a longer pair stops the run, is cut or is left out", choices=data.OVERLONG)
    precision: str = option("fp32", "bf16 runs the model's products in bfloat16", choices=learning.PRECISIONS)
    gradient_checkpointing: bool = option(False, "compute activations anew for the backward pass: less memory, slower")
    seed: int = option(0, "of the new head and the order of the pairs", low=0, high=2**63 - 1)
    eval_every: int = option(100, "steps between evaluations, beside the one at the end; 0 for that one only", low=0)
    save_every: int = option(500, "steps between checkpoints; 0 for none", low=0)
    keep: int = option(2, "checkpoints that stay on the disk", low=1)
    quiet: bool = option(False, "no progress bar")

    def __post_init__(self) -> None:
        validate(self)


class RewardTrainer:
    """Teach a scalar head on ``model`` to score the chosen answer of a pair above the rejected one.

    Args:
        model: a path, a Hub id or a module: a causal LM, or a model that has a scalar head already.
        data: a path, a list of dicts or a ``datasets.Dataset`` with ``prompt``, ``chosen`` and ``rejected``, or the
            last two with a shared beginning; ``margin`` if there is one.
        output_dir: the folder of the run; nothing is written without it.
        config: a ``RewardConfig``.
        tokenizer: needed if ``model`` is a module.
        eval_data: like ``data``.
    """

    def __init__(
        self,
        model: Any,
        *,
        data: Any,
        output_dir: str | Path | None = None,
        config: RewardConfig | None = None,
        tokenizer: Any = None,
        eval_data: Any = None,
    ) -> None:
        check_folder(output_dir, run=True)
        self.accelerator = learning.accelerator(parallel=True)
        self.config, self.output_dir = chosen(config, RewardConfig), output_dir
        records, eval_records = read_records(data), [] if eval_data is None else read_records(eval_data)
        self.tokenizer = models.load_tokenizer(model, tokenizer)
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            scorer = models.load_scalar_model(model)
        self.max_length = models.allowed_length(scorer, self.config.max_length)
        self.pairs = self._tokenise(records)
        self.eval_pairs = self._tokenise(eval_records) if eval_records else []
        answers = ((pair.chosen, pair.rejected) for pair in [*self.pairs, *self.eval_pairs])
        models.check_tokens(scorer, self.tokenizer, itertools.chain.from_iterable(answers))
        self.model = learning.trainable(scorer, self.accelerator.device, self.config)
        self.optimizer = learning.adamw([(self.model, self.config.learning_rate)], self.config.weight_decay)
        self.steps = self.config.epochs * math.ceil(len(self.pairs) / self.config.batch_size)
        self.done = self.updates = 0

    def _tokenise(self, records: list[data.Record]) -> list[data.Pair]:
        limits = {"max_length": self.max_length, "overlong": self.config.overlong}
        return data.pair_examples(records, self.tokenizer, **limits)

    def train(self, *, resume: bool = False) -> dict[str, float]:
        """Run every step and leave the reward model in ``output_dir``; returns the last metrics.

        With ``resume`` the run in ``output_dir`` goes on from its last checkpoint, if there is one, to the bits that it
        would have had without the stop.
        """
        c = self.config
        run = Run("reward", self.output_dir, c, keep=c.keep, quiet=c.quiet)
        return drive(
            self,
            run,
            total=self.steps,
            save_every=c.save_every,
            resume=resume,
            live=("loss", "accuracy", "eval_accuracy"),
        )

    def batches(self) -> Iterator[list[data.Pair]]:
        """The shuffled pairs of every epoch in batches; those that are left."""
        every = epochs(self.pairs, self.config.batch_size, self.config.epochs, self.config.seed)
        return itertools.islice(every, self.done, None)

    def step(self, batch: list[data.Pair]) -> dict[str, float]:
        """One optimizer step on the mean loss of the pairs of ``batch``; returns its statistics."""
        c, mine = self.config, processes.share(batch)
        rate = learning.set_rate(self.optimizer, c.schedule, self.done, self.steps, c.warmup_ratio)

        def backward() -> Tensor | None:
            found = []
            for part in learning.split(mine, c.micro_batch_size):
                chosen, rejected = self.scores(part)
                loss = self.loss(part, chosen, rejected) * (len(part) / len(batch))
                self.accelerator.backward(loss)
                shares = (loss / len(part)).expand(len(part))  # as columns they are gathered beside the scores
                found.append(torch.stack([chosen, rejected, shares], 1).detach())
            return torch.cat(found) if found else None

        chosen, rejected, losses = processes.joined(backward).unbind(1)
        norms = learning.clip_gradients(self.accelerator, [self.model], c.max_grad_norm)
        both, right = torch.stack([chosen, rejected]), (chosen > rejected).float().mean()
        numbers = torch.stack([losses.sum(), norms[0].to(both.device), right, both.mean(), both.std()]).tolist()
        stats = dict(zip(("loss", "grad_norm", "accuracy", "score_mean", "score_std"), numbers, strict=True))
        learning.check_finite(self.optimizer, stats["loss"], [stats["grad_norm"]])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done, self.updates = self.done + 1, self.updates + 1
        return stats | {"lr": rate}

    def scores(self, pairs: list[data.Pair]) -> tuple[Tensor, Tensor]:
        """The scores ``[B]`` of the chosen and of the rejected answers, from one forward pass over both."""
        device = self.accelerator.device
        answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        ids, mask = data.pad(answers, self.tokenizer.pad_token_id)
        with learning.autocast(device, self.config.precision):
            scores = models.sequence_scores(self.model, ids.to(device), mask.to(device))
        chosen, rejected = scores.chunk(2)
        return chosen, rejected

    def loss(self, pairs: list[data.Pair], chosen: Tensor, rejected: Tensor) -> Tensor:
        """The mean pairwise loss of ``pairs``, a 0-d tensor."""
        margin = None
        if any(pair.margin is not None for pair in pairs):
            margin = torch.tensor([pair.margin or 0.0 for pair in pairs], device=chosen.device)
        return pairwise_loss(chosen, rejected, margin=margin, center_coef=self.config.center_coef)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """``eval_loss`` and ``eval_accuracy``, the share of held-out pairs whose chosen answer scores higher."""

        def judge() -> dict[str, Tensor]:
            loss = right = torch.zeros((), device=self.accelerator.device)
            size = self.config.micro_batch_size or self.config.batch_size
            for part in learning.split(processes.share(self.eval_pairs), size):
                chosen, rejected = self.scores(part)
                loss = loss + self.loss(part, chosen, rejected) * len(part)
                right = right + (chosen > rejected).sum()
            return {"eval_loss": loss / len(self.eval_pairs), "eval_accuracy": right / len(self.eval_pairs)}

        return learning.numbers(processes.summed(judge))

    def after(self, step: int, run: Run) -> dict[str, float]:
        """Evaluate where it is due."""
        every = self.config.eval_every
        due = step == self.steps or (every and step % every == 0)
        return self.evaluate() if self.eval_pairs and due else {}

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        self.save_model(folder)
        checkpoint.save_state(folder, self.optimizer, {"step": self.done, "updates": self.updates}, self.pairs)

    def restore(self, folder: Path) -> None:
        """Go back to the state of a checkpoint."""
        models.restore(self.model, folder)
        numbers = checkpoint.load_state(folder, self.optimizer, self.pairs)
        self.done, self.updates = numbers["step"], numbers["updates"]

    def save_model(self, folder: Path) -> None:
        """Write the reward model and its tokenizer as ``save_pretrained`` does."""
        models.save(self.model, self.tokenizer, folder)
