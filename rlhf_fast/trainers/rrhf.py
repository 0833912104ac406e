"""RRHF: a policy learns to rank answers as their scores do, and to give the best (Yuan et al. 2023)."""

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
from rlhf_fast.losses import RRHFLossOutput, rrhf_loss
from rlhf_fast.losses.reward import better
from rlhf_fast.trainers import learning, offline, processes
from rlhf_fast.trainers.drive import drive
from rlhf_fast.trainers.options import chosen, option, validate
from rlhf_fast.trainers.run import Run, check_folder


@dataclass(frozen=True)
class RRHFConfig:
    """Every number of RRHF."""

    epochs: int = option(1, "passes over the prompts", low=1)
    batch_size: int = option(16, "prompts, each with all of its responses, per optimizer step", low=1)
    micro_batch_size: int | None = option(None, "responses per forward pass, a matter of memory only", low=1)
    learning_rate: float = option(2e-5, "peak learning rate", low=0.0)
    schedule: str = option("cosine", "the learning rate after the warm-up", choices=learning.SCHEDULES)
    warmup_ratio: float = option(0.03, "share of the steps in which the rate rises linearly", low=0.0, high=1.0)
    weight_decay: float = option(0.0, "AdamW's weight decay", low=0.0)
    max_grad_norm: float = option(1.0, "norm to which the gradient is clipped", above=0.0)
    length_norm: float = option(1.0, "power of its length that divides the logprob of a response", low=0.0)
    sft_weight: float = option(1.0, "weight of the imitation of the best response", low=0.0)
    max_length: int | None = option(None, "longest prompt and response in tokens; the context if absent", low=2)
    overlong: str = option("error", "a longer response stops the run, or is cut, or its prompt left out",
                           choices=data.OVERLONG)  # fmt: skip
    packing: bool = option(False, "prompts and responses are read without their padding, several to a row")
    precision: str = option("fp32", "bf16 runs the model's products in bfloat16", choices=learning.PRECISIONS)
    gradient_checkpointing: bool = option(False, "compute activations anew for the backward pass: less memory, slower")
    seed: int = option(0, "of the order of the prompts", low=0, high=2**63 - 1)
    eval_every: int = option(100, "steps between evaluations, beside the one at the end; 0 for that one only", low=0)
    save_every: int = option(500, "steps between checkpoints; 0 for none", low=0)
    keep: int = option(2, "checkpoints that stay on the disk", low=1)
    quiet: bool = option(False, "no progress bar")

    def __post_init__(self) -> None:
        validate(self)


class RRHFTrainer:
    """Teach ``model`` to find the better answers likelier; no reward model, reference or critic beside it.

    Args:
        model: the policy to train: a path, a Hub id or a causal LM.
        data: a path, a list of dicts or a ``datasets.Dataset`` with ``prompt``, ``responses`` and ``scores``, as
            ``sample_and_rank`` makes them.
        output_dir: the folder of the run; nothing is written without it.
        config: an ``RRHFConfig``.
        tokenizer: needed if ``model`` is a module.
        eval_data: like ``data``.
    """

    def __init__(
        self,
        model: Any,
        *,
        data: Any,
        output_dir: str | Path | None = None,
        config: RRHFConfig | None = None,
        tokenizer: Any = None,
        eval_data: Any = None,
    ) -> None:
        check_folder(output_dir, run=True)
        self.accelerator = learning.accelerator()
        self.config, self.output_dir = chosen(config, RRHFConfig), output_dir
        records, eval_records = read_records(data), [] if eval_data is None else read_records(eval_data)
        self.tokenizer = models.load_tokenizer(model, tokenizer)
        policy = models.load_policy(model)
        self.max_length = models.allowed_length(policy, self.config.max_length)
        self.examples = self._tokenise(records)
        self.eval_examples = self._tokenise(eval_records) if eval_records else []
        answers = (example.answers for example in [*self.examples, *self.eval_examples])
        models.check_tokens(policy, self.tokenizer, itertools.chain.from_iterable(answers))
        home = learning.home(self.accelerator)
        self.model = learning.trainable(policy, home, self.config)
        self.attention = learning.prepare_packing(self.accelerator, [self.model], self.config)
        learning.shard(self.accelerator, [self.model])
        self.optimizer = learning.adamw([(self.model, self.config.learning_rate)], self.config.weight_decay)
        self.steps = self.config.epochs * math.ceil(len(self.examples) / self.config.batch_size)
        self.done = self.updates = 0

    def _tokenise(self, records: list[data.Record]) -> list[data.Ranked]:
        limits = {"max_length": self.max_length, "overlong": self.config.overlong}
        return data.ranked_examples(records, self.tokenizer, **limits)

    def train(self, *, resume: bool = False) -> dict[str, float]:
        """Run every step and leave the policy in ``output_dir``; returns the last metrics.

        With ``resume`` the run in ``output_dir`` goes on from its last checkpoint, if there is one, to the bits that it
        would have had without the stop.
        """
        c, live = self.config, ("rank_loss", "sft_loss", "accuracy", "eval_accuracy")
        run = Run("rrhf", self.output_dir, c, keep=c.keep, quiet=c.quiet)
        return drive(self, run, total=self.steps, save_every=c.save_every, resume=resume, live=live)

    def batches(self) -> Iterator[list[data.Ranked]]:
        """The shuffled prompts of every epoch in batches; those that are left."""
        return offline.batches(self)

    def step(self, batch: list[data.Ranked]) -> dict[str, float]:
        """One optimizer step on the mean loss of the prompts of ``batch``; returns its statistics."""
        found = offline.summed(self.learn(*turn, len(batch)) for turn in self.turns(batch))
        return with_accuracy(offline.update(self, found))

    def parts(self, mine: list[data.Ranked]) -> list[list[data.Ranked]]:
        """``mine``, at most ``micro_batch_size`` responses at a time; a prompt with more alone."""
        found: list[list[data.Ranked]] = []
        for example in mine:
            responses = sum(len(e.answers) for e in [*(found[-1] if found else []), example])
            if not found or responses > (self.config.micro_batch_size or responses):
                found.append([])
            found[-1].append(example)
        return found

    def turns(self, batch: list[data.Ranked]) -> Iterator[tuple[list[data.Ranked], float, int]]:
        """``processes.turns`` of ``batch``, each with the most forward passes that a process needs for its own part."""

        def passes(part: list[data.Ranked]) -> int:
            return len(self.chunks(sum(len(example.answers) for example in part)))

        every = [[passes(part) for part in self.parts(mine)] for mine in processes.shares(batch)]
        longest = map(max, itertools.zip_longest(*every, fillvalue=passes(batch[:1])))
        return ((*turn, most) for turn, most in zip(processes.turns(batch, self.parts), longest, strict=True))

    def learn(self, part: list[data.Ranked], counts: float, passes: int, prompts: int) -> dict[str, Tensor]:
        """Add the gradient of ``part`` of a batch of ``prompts`` to that of the weights; returns its statistics.

        The ranking couples the responses of a prompt. Where they do not fit in one forward pass, the first one
        finds the gradient of every logprob, and the second carries it, some responses at a time, to the weights.
        """
        answers = self.collate(part)
        with torch.set_grad_enabled(passes == 1):
            found = self.read(answers, passes)
        output, stats = self.loss(part, found if passes == 1 else found.requires_grad_(), answers.mask, prompts)
        stats = {name: counts * value for name, value in stats.items()}
        if passes == 1:
            self.accelerator.backward(counts * output.loss)
            return stats
        (slopes,) = torch.autograd.grad(counts * output.loss, found)
        for rows, once in self.chunks(len(answers.ids), passes):
            again = offline.logprobs(self.model, answers.select(rows), self.config)
            self.accelerator.backward((again * slopes[rows]).sum() * once)
        return stats

    def collate(self, part: list[data.Ranked]) -> offline.Answers:
        """All responses of all prompts of ``part``, on the model's device."""
        sequences = [ids for example in part for ids in example.answers]
        masks = [offline.answered(ids, example.prompt_length) for example in part for ids in example.answers]
        return offline.collate(sequences, masks, self.tokenizer.pad_token_id, self.accelerator.device)

    def loss(
        self,
        part: list[data.Ranked],
        logprobs: Tensor,  # [N, T], of all responses of the part
        mask: Tensor,  # [N, T], bool
        prompts: int,
    ) -> tuple[RRHFLossOutput, dict[str, Tensor]]:
        """What ``part`` adds to the losses of a batch of ``prompts``, and to its statistics.

        ``right`` of ``pairs`` responses with different scores stand in the order of their scores under the model.
        """
        c, device = self.config, logprobs.device
        rows, there = data.pad(torch.arange(len(logprobs)).split([len(e.answers) for e in part]), 0)
        # Their order is all that counts: as ranks it survives any dtype.
        scores, _ = data.pad([ranks(e.scores) for e in part], 0)
        rows, there, scores = rows.to(device), there.to(device), scores.to(device)
        grid, counts = logprobs[rows], mask[rows] & there[..., None]
        norm = {"length_norm": c.length_norm, "sft_weight": c.sft_weight}
        output = rrhf_loss(grid, counts, scores, **norm, denominator=prompts)
        lengths = counts.sum(2)
        mean = torch.where(counts, grid.detach(), 0).sum(2) / lengths.clamp(min=1) ** c.length_norm
        ahead = better(scores, lengths > 0)
        right = torch.where(ahead, ((mean[:, :, None] - mean[:, None, :]).sign() + 1) / 2, 0)
        stats = {name: value.detach() for name, value in output._asdict().items()}
        return output, stats | {"right": right.sum(), "pairs": ahead.sum().float()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """``eval_loss``, its terms and ``eval_accuracy`` of the held-out prompts. Raises ``ValueError`` without any."""
        examples = offline.held_out(self)
        turns = itertools.chain.from_iterable(map(self.turns, learning.split(examples, self.config.batch_size)))
        found = offline.summed(self.judge(*turn, len(examples)) for turn in turns)
        return {f"eval_{name}": value for name, value in with_accuracy(learning.numbers(found)).items()}

    def judge(self, part: list[data.Ranked], counts: float, passes: int, prompts: int) -> dict[str, Tensor]:
        """The statistics of ``part`` of ``prompts``, without a gradient."""
        answers = self.collate(part)
        found = self.loss(part, self.read(answers, passes), answers.mask, prompts)[1]
        return {name: counts * value for name, value in found.items()}

    def read(self, answers: offline.Answers, passes: int = 1) -> Tensor:
        """``[N, T]`` logprobs, ``micro_batch_size`` responses at a time, by at least ``passes`` forward passes."""
        chunks = self.chunks(len(answers.ids), passes)
        found = [(offline.logprobs(self.model, answers.select(rows), self.config), counts) for rows, counts in chunks]
        return torch.cat([rows for rows, counts in found if counts])

    def chunks(self, responses: int, passes: int = 1) -> list[tuple[Tensor, float]]:
        """The rows that go through the model together, with 1, and the first again, with 0, up to ``passes``."""
        own = [(rows, 1.0) for rows in torch.arange(responses).split(self.config.micro_batch_size or responses)]
        return [*own, *[(own[0][0], 0.0)] * (passes - len(own))]

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
        """Write the policy and its tokenizer as ``save_pretrained`` does."""
        models.save(self.model, self.tokenizer, folder)


def ranks(scores: list[float]) -> list[int]:
    """Integers in the order of ``scores``, equal where they are equal."""
    place = {score: i for i, score in enumerate(sorted(set(scores)))}
    return [place[score] for score in scores]


def with_accuracy(stats: dict[str, float]) -> dict[str, float]:
    """``stats`` with the ``accuracy`` for ``right`` and ``pairs``: their quotient, NaN where no two scores differ."""
    right, pairs = stats.pop("right"), stats.pop("pairs")
    return stats | {"accuracy": right / pairs if pairs else math.nan}
