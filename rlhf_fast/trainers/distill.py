"""Distillation: a student learns the teacher's distribution over every next token, and what a reward says of its own.

Hinton et al. 2015; on the student's own samples Agarwal et al. 2024, "GKD", and Gu et al. 2024, "MiniLLM".
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import columns, data, models
from rlhf_fast.data import read_records
from rlhf_fast.losses import distill_loss
from rlhf_fast.losses.distill import DIVERGENCES
from rlhf_fast.pretrained import unwrap
from rlhf_fast.rewards import RewardError, load_reward, token_readers
from rlhf_fast.rollout import Rollout
from rlhf_fast.trainers import learning, offline, online, processes, reading, scoring
from rlhf_fast.trainers.drive import drive
from rlhf_fast.trainers.options import chosen, option, validate
from rlhf_fast.trainers.run import Run, check_folder

Answers = offline.Answers | Rollout
#: This process's turns of one forward pass each, the advantages of its responses and statistics of the whole batch.
Batch = tuple[Iterable[tuple[Answers, float]], Tensor | None, dict[str, Tensor]]


@dataclass(frozen=True)
class DistillConfig:
    """Every number of distillation."""

    epochs: int = option(1, "passes over the given responses", low=1)
    steps: int = option(200, "steps on the student's own responses: each writes and learns from one batch", low=1)
    batch_size: int = option(16, "responses per optimizer step", low=1)
    micro_batch_size: int | None = option(None, "responses per forward pass, a matter of memory only", low=1)
    learning_rate: float = option(2e-5, "peak learning rate", low=0.0)
    schedule: str = option("cosine", "the learning rate after the warm-up", choices=learning.SCHEDULES)
    warmup_ratio: float = option(0.03, "share of the steps in which the rate rises linearly", low=0.0, high=1.0)
    weight_decay: float = option(0.0, "AdamW's weight decay", low=0.0)
    max_grad_norm: float = option(1.0, "norm to which the gradient is clipped", above=0.0)
    kind: str = option("forward", "KL(teacher || student), the reverse, or the symmetric jsd", choices=DIVERGENCES)
    soft_temperature: float = option(1.0, "softens both distributions of the divergence", above=0.0)
    alpha: float = option(1.0, "weight of the divergence beside the reward", low=0.0)
    skip_failed_rewards: bool = option(False, "leave out a batch on which the reward function raises, and count it")
    max_length: int | None = option(None, "longest given sequence in tokens; the context if absent", low=2)
    max_prompt_length: int | None = option(None, "longest prompt in tokens; what the context leaves if absent", low=1)
    overlong: str = option("error", "a longer sequence stops the run, is cut (a prompt never) or is left out",
                           choices=data.OVERLONG)  # fmt: skip
    max_new_tokens: int = option(64, "longest response of the student in tokens", low=1)
    temperature: float = option(1.0, "sampling temperature of the student's responses", above=0.0)
    top_k: int = option(0, "sample among the k likeliest tokens; 0 for all", low=0)
    top_p: float = option(1.0, "sample in the smallest set of this probability", above=0.0, high=1.0)
    packing: bool = option(False, "prompts and responses are read without their padding, several to a row")
    precision: str = option("fp32", "bf16 runs the models' products in bfloat16", choices=learning.PRECISIONS)
    gradient_checkpointing: bool = option(False, "compute activations anew for the backward pass: less memory, slower")
    seed: int = option(0, "of the order of the data and the responses", low=0, high=2**63 - 1)
    eval_every: int = option(100, "steps between evaluations, beside the one at the end; 0 for that one only", low=0)
    sample_every: int = option(10, "steps between tables of the student's own responses; 0 for none", low=0)
    save_every: int = option(500, "steps between checkpoints; 0 for none", low=0)
    keep: int = option(2, "checkpoints that stay on the disk", low=1)
    quiet: bool = option(False, "no progress bar and no tables")

    def __post_init__(self) -> None:
        validate(self)


class DistillTrainer:
    """Teach ``model`` to predict as ``teacher`` does, on given responses or on its own.

    Args:
        model: the student: a path, a Hub id or a causal LM.
        teacher: a path, a Hub id or a causal LM with the student's vocabulary.
        data: given responses: a path, a list of dicts or a ``datasets.Dataset`` as for ``SFTTrainer``.
        prompts: in place of ``data``, prompts that the student answers itself at every step.
        reward: a path or module with a scalar head, or ``callable(prompts, responses, **columns)`` that returns one
            score per response, ``[B]``, or one per token, ``[B, T]``; a list of these or an ``EnsembleReward``.
            Standardised over the batch it is the advantage of a policy gradient beside the divergence; of rewards per
            token the sum of those that are still to come. Given responses need the columns ``prompt`` and ``response``
            for it.
        output_dir: the folder of the run; nothing is written without it.
        config: a ``DistillConfig``.
        tokenizer: needed if ``model`` is a module.
        eval_data: held-out responses, like ``data``.
    """

    def __init__(
        self,
        model: Any,
        *,
        teacher: Any,
        data: Any = None,
        prompts: Any = None,
        reward: Any = None,
        output_dir: str | Path | None = None,
        config: DistillConfig | None = None,
        tokenizer: Any = None,
        eval_data: Any = None,
    ) -> None:
        check_folder(output_dir, run=True)
        if (data is None) == (prompts is None):
            raise ValueError("distillation learns either from data, given responses, or from prompts: pass one of them")
        self.accelerator = learning.accelerator()
        c = self.config = chosen(config, DistillConfig)
        if reward is None and not c.alpha:
            raise ValueError("DistillConfig.alpha is 0 and there is no reward: there would be nothing to learn")
        self.device, self.output_dir, self.own = self.accelerator.device, output_dir, data is None
        records = read_records(prompts if self.own else data)
        eval_records = [] if eval_data is None else read_records(eval_data)
        self.tokenizer = models.load_tokenizer(model, tokenizer)
        student, self.teacher = models.load_policy(model), models.load_policy(teacher)
        both = (student, self.teacher)
        lengths = [n for m in both if (n := models.allowed_length(m, c.max_length))]
        self.max_length = min(lengths, default=None)
        self.reward = None if reward is None else load_reward(reward, self.tokenizer, device=self.device)
        if self.own:
            # A reward model that reads the student's tokens reads an end token after every response, too.
            readers = dict.fromkeys(both, 0) | dict.fromkeys(token_readers(self.reward), 1)
            self.examples: list[Any] = online.tokenise(records, self.tokenizer, readers, c)
        else:
            self.examples = self._tokenise(records)
        self.eval_examples = self._tokenise(eval_records) if eval_records else []
        given = [*self.eval_examples, *([] if self.own else self.examples)]
        for each in both:
            models.check_tokens(each, self.tokenizer, (example.ids for example in given))
        check_vocabulary(student, self.teacher, teacher, self.tokenizer)
        self.said = {} if self.own or reward is None else {r.place: texts(r, self.tokenizer) for r in records}
        home = learning.home(self.accelerator)
        self.model = learning.trainable(student, home, c)
        self.teacher = models.frozen_copy(self.teacher).to(home)
        self.stop_ids = online.stop_ids(self.model, self.tokenizer, None)
        self.attention = learning.prepare_packing(self.accelerator, [self.model, self.teacher], c)
        learning.shard(self.accelerator, [self.model, self.teacher])
        self.optimizer = learning.adamw([(self.model, c.learning_rate)], c.weight_decay)
        self.steps = c.steps if self.own else c.epochs * math.ceil(len(self.examples) / c.batch_size)
        self.done = self.updates = self.skipped = 0  # steps, those of the optimizer, batches without a reward
        self.samples: list[dict[str, Any]] = []

    def _tokenise(self, records: list[data.Record]) -> list[data.Example]:
        limits = {"max_length": self.max_length, "overlong": self.config.overlong}
        return data.sft_examples(records, self.tokenizer, **limits)

    def train(self, *, resume: bool = False) -> dict[str, float]:
        """Run every step and leave the student in ``output_dir``; returns the last metrics.

        With ``resume`` the run in ``output_dir`` goes on from its last checkpoint, if there is one, to the bits that it
        would have had without the stop.
        """
        c, live = self.config, ("loss", "divergence", "scores", "eval_divergence")
        run = Run("distill", self.output_dir, c, keep=c.keep, quiet=c.quiet)
        return drive(self, run, total=self.steps, save_every=c.save_every, resume=resume, live=live)

    def batches(self) -> Iterator[list[Any]]:
        """The batches of examples or prompts that are left, in the order of the seed."""
        return online.batches(self.examples, self.config, self.done) if self.own else offline.batches(self)

    def step(self, batch: list[Any]) -> dict[str, float]:
        """One optimizer step on the mean over the response tokens of ``batch``; returns its statistics."""
        try:
            parts, advantages, stats = self.written(batch) if self.own else self.given(batch)
        except RewardError as error:
            if not self.config.skip_failed_rewards:
                raise
            warnings.warn(f"step {self.done + 1} is skipped: {error}", stacklevel=2)
            self.done, self.skipped, self.samples = self.done + 1, self.skipped + 1, []
            return {"skipped": float(self.skipped)}
        tokens = int(stats["tokens"])
        total = offline.summed(self.losses(parts, advantages, tokens), self.accelerator.backward)
        numbers = offline.update(self, total | stats)
        return numbers | ({} if self.reward is None else {"skipped": float(self.skipped)})

    def given(self, batch: list[data.Example]) -> Batch:
        """Given responses."""
        turns = processes.turns(batch, lambda mine: learning.split(mine, self.config.micro_batch_size))
        parts = [(self.collate(part), counts) for part, counts in turns]
        stats = {"tokens": torch.tensor(offline.count(batch))}
        if self.reward is None:
            return parts, None, stats
        mine, texts = processes.share(batch), None
        if mine:
            prompts, answers, columns = (list(x) for x in zip(*(self.said[e.place] for e in mine), strict=True))
            names = dict.fromkeys(name for record in columns for name in record)
            texts = (prompts, answers, {n: [record.get(n) for record in columns] for n in names})
        scores, uncertainty = scoring.said(self.reward, texts, self.collate(mine).mask, self.config.precision)
        mask = self.collate(batch).mask
        return parts, scoring.advantages(scores, mask), stats | scoring.statistics(scores, mask, uncertainty)

    @torch.no_grad()
    def written(self, batch: list[data.Prompt]) -> Batch:
        """Responses that the student writes to the prompts of ``batch``."""
        c = self.config
        rollout = online.write(self.model, batch, self.tokenizer, c, stop_ids=self.stop_ids, step=self.done)
        turns = processes.turns(torch.arange(len(batch)), lambda rows: learning.split(rows, c.micro_batch_size))
        parts = [(rollout.select(rows), counts) for rows, counts in turns]
        stats = {"tokens": rollout.lengths.sum(), "ended": rollout.ended.float().mean()}
        stats["response_length"] = rollout.lengths.float().mean()
        scores = None if self.reward is None else scoring.raw(self.reward, rollout, c.precision)
        self.samples = rollout.samples(4)
        if scores is None:
            return parts, None, stats
        stats |= scoring.statistics(scores, rollout.mask, rollout.uncertainty)
        return parts, scoring.advantages(scores, rollout.mask), stats

    def losses(
        self, parts: Iterable[tuple[Answers, float]], advantages: Tensor | None, tokens: int
    ) -> Iterator[dict[str, Tensor]]:
        """The ``loss`` of each of ``parts``; the ``advantages`` of those that count are ``[b]`` or ``[b, T]``."""
        first = 0
        for part, counts in parts:
            size, width = part.mask.shape
            gain = advantages if advantages is None or counts else advantages.new_zeros(first + size)
            gain = gain if gain is None else gain[first : first + size]
            stats = self.loss(part, gain if gain is None or gain.dim() == 1 else gain[:, :width], tokens)
            # The divergence may be infinite, and 0 times that is not 0.
            yield stats if counts else {"loss": 0 * stats["loss"], "divergence": torch.zeros_like(stats["divergence"])}
            first += size

    def collate(self, part: list[data.Example]) -> offline.Answers:
        """The sequences of ``part`` on the model's device."""
        sequences, masks = [example.ids for example in part], [example.mask for example in part]
        return offline.collate(sequences, masks, self.tokenizer.pad_token_id, self.device)

    def loss(self, answers: Answers, advantages: Tensor | None, tokens: int) -> dict[str, Tensor]:
        """What some responses add to the ``loss`` and the ``divergence`` of ``tokens`` tokens."""
        c = self.config
        seen = reading.predictions(self.model, answers, c)
        with torch.no_grad():
            teacher = reading.predictions(self.teacher, answers, c).logits
        alike = min(seen.logits.shape[-1], teacher.shape[-1])  # a head may have rows for no token, to be a round number
        student, teacher, mask = seen.logits[..., :alike], teacher[..., :alike], seen.gather(answers.mask)
        soft: dict[str, Any] = {"temperature": c.soft_temperature, "kind": c.kind, "denominator": max(tokens, 1)}
        gain: dict[str, Any] = {}
        if advantages is not None:
            each = advantages if advantages.dim() == 2 else advantages[:, None].expand(answers.mask.shape)
            gain = {"advantages": seen.gather(each), "ids": seen.tokens}
        loss = distill_loss(student, teacher, mask, alpha=c.alpha, **soft, **gain)
        if advantages is None and c.alpha:
            return {"loss": loss, "divergence": loss.detach() / (c.alpha * c.soft_temperature**2)}
        with torch.no_grad():
            divergence = distill_loss(student, teacher, mask, **soft) / c.soft_temperature**2
        return {"loss": loss, "divergence": divergence}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """``eval_divergence`` of the held-out responses, mean per token in nats. Raises ``ValueError`` without any."""
        examples, size = offline.held_out(self), self.config.micro_batch_size or self.config.batch_size
        turns = processes.turns(examples, lambda mine: learning.split(mine, size))
        parts = ((self.collate(part), counts) for part, counts in turns)
        found = offline.summed(self.losses(parts, None, offline.count(examples)))
        return {"eval_divergence": found["divergence"].item()}

    def after(self, step: int, run: Run) -> dict[str, float]:
        """Show the student's own responses and evaluate where that is due."""
        online.show_samples(self, step, run)
        return self.evaluate() if offline.due(self, step) else {}

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        offline.save(self, folder, skipped=self.skipped)

    def restore(self, folder: Path) -> None:
        """Go back to the state of a checkpoint."""
        self.skipped = offline.restore(self, folder)["skipped"]

    def save_model(self, folder: Path) -> None:
        """Write the student and its tokenizer as ``save_pretrained`` does."""
        models.save(self.model, self.tokenizer, folder)


def check_vocabulary(student: Any, teacher: Any, source: Any, tokenizer: Any) -> None:
    """Raise ``ValueError`` unless ``teacher``, loaded from ``source``, has the tokens of the student."""
    rows = [unwrap(m).get_input_embeddings().weight.shape[0] for m in (teacher, student)]
    other = None
    if isinstance(source, (str, Path)):
        try:
            other = models.load_tokenizer(source)
        except ValueError:  # its folder has none: the sizes must do
            other = None
    if other is not None and other.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"teacher and student must share the vocabulary: the tokenizer of {source} has other tokens")
    if other is None and rows[0] != rows[1]:
        raise ValueError(f"teacher and student must share the vocabulary: they have {rows[0]} and {rows[1]} tokens")


def texts(record: data.Record, tokenizer: Any) -> tuple[str, str, dict[str, Any]]:
    """Prompt, response and further columns of ``record``, as the reward sees them."""
    more = {name: value for name, value in record.items() if name not in ("prompt", "response")}
    return columns.prompt_text(record, tokenizer), columns.text(record, "response"), more
