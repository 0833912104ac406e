"""Reward modelling: a scalar head learns how good an answer is, from what people say of answers.

Four kinds, told apart by the columns of the data: pairs (Bradley–Terry; Stiennon et al. 2020), rankings (Ouyang et al.
2022), labels, and labels of every step of an answer (Lightman et al. 2023).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import data, models, packing, preferences
from rlhf_fast.data import read_records
from rlhf_fast.losses import pairwise_loss, pointwise_loss, ranking_loss
from rlhf_fast.losses.reward import RANKINGS
from rlhf_fast.preferences import Judged
from rlhf_fast.trainers import checkpoint, learning, offline, processes
from rlhf_fast.trainers.drive import drive
from rlhf_fast.trainers.margins import histogram, merged, seen, statistics
from rlhf_fast.trainers.options import chosen, option, validate
from rlhf_fast.trainers.run import Run, check_folder
from rlhf_fast.trainers.watch import note_range

LIVE = ("loss", "accuracy", "eval_accuracy")


@dataclass(frozen=True)
class RewardConfig:
    """Every number of reward modelling. A record is a pair, all answers to a prompt, or one labelled answer."""

    epochs: int = option(1, "passes over the records", low=1)
    batch_size: int = option(16, "records per optimizer step", low=1)
    micro_batch_size: int | None = option(None, "records per forward pass, a matter of memory only", low=1)
    learning_rate: float = option(1e-5, "peak learning rate", low=0.0)
    schedule: str = option("cosine", "the learning rate after the warm-up", choices=learning.SCHEDULES)
    warmup_ratio: float = option(0.03, "share of the steps in which the rate rises linearly", low=0.0, high=1.0)
    weight_decay: float = option(0.0, "AdamW's weight decay", low=0.0)
    max_grad_norm: float = option(1.0, "norm to which the gradient is clipped", above=0.0)
    center_coef: float = option(
        0.0, "of pairs: weight of the squared sum of the two scores, to keep them near 0", low=0
    )
    ranking: str = option("pairs", "of rankings: the mean over all pairs, or Plackett-Luce", choices=RANKINGS)
    separator: str | None = option(None, "of steps: what stands between two of them; a line break if absent")
    normalise: bool = option(False, "shift the scores to mean 0 at the end; their sigmoid is then no probability")
    max_length: int | None = option(None, "longest prompt and answer in tokens; the context if absent", low=2)
    overlong: str = option("error", "a longer record stops the run, is cut or is left out", choices=data.OVERLONG)
    packing: bool = option(False, "prompts and answers are read without their padding, several to a row")
    precision: str = option("fp32", "bf16 runs the model's products in bfloat16", choices=learning.PRECISIONS)
    gradient_checkpointing: bool = option(False, "compute activations anew for the backward pass: less memory, slower")
    seed: int = option(0, "of the new head and the order of the records", low=0, high=2**63 - 1)
    eval_every: int = option(100, "steps between evaluations, beside the one at the end; 0 for that one only", low=0)
    save_every: int = option(500, "steps between checkpoints; 0 for none", low=0)
    keep: int = option(2, "checkpoints that stay on the disk", low=1)
    quiet: bool = option(False, "no progress bar")

    def __post_init__(self) -> None:
        validate(self)
        if self.separator == "":
            raise ValueError("RewardConfig.separator must not be empty")


class RewardTrainer:
    """Teach a scalar head on ``model`` to score answers as people do.

    What is learned follows from the columns of the data:

    - ``prompt``, ``chosen`` and ``rejected`` (or the last two with a shared beginning), and ``margin`` if there is one:
      the chosen answer scores higher (``pairwise_loss``).
    - ``prompt``, ``responses`` and ``scores``: the answers to a prompt score in the order of their scores
      (``ranking_loss``); all of them are read in one forward pass.
    - ``prompt``, ``response`` and ``label``: the sigmoid of the score is the label, a number from 0 to 1, or true or
      false (``pointwise_loss``).
    - ``prompt``, ``steps`` and ``labels``: the same after every step, the mean over all labels of a batch. None is not
      learned.

    An ensemble (``EnsembleReward``) is several models that differ in ``RewardConfig.seed``, hence in their first head
    and the order of their data.

    Args:
        model: a path, a Hub id or a module: a causal LM, or a model that has a scalar head already.
        data: a path, a list of dicts or a ``datasets.Dataset``.
        output_dir: the folder of the run; nothing is written without it.
        config: a ``RewardConfig``.
        tokenizer: needed if ``model`` is a module.
        eval_data: like ``data``.
        calibration_data: like ``data``, whose scores ``normalise`` moves to mean 0; ``data`` itself if absent.
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
        calibration_data: Any = None,
    ) -> None:
        check_folder(output_dir, run=True)
        self.accelerator = learning.accelerator()
        c = self.config = chosen(config, RewardConfig)
        self.output_dir, self.separator = output_dir, c.separator or "\n"
        if calibration_data is not None and not c.normalise:
            raise ValueError("calibration_data is for RewardConfig.normalise, which is false")
        others = (None if d is None else read_records(d) for d in (eval_data, calibration_data))
        records = [read_records(data), *others]
        self.kind = preferences.kind_of(records[0])
        if c.center_coef and self.kind != "pairwise":
            raise ValueError(f"RewardConfig.center_coef is for pairs, and these are data of the kind {self.kind}")
        self.tokenizer = models.load_tokenizer(model, tokenizer)
        with torch.random.fork_rng():
            torch.manual_seed(c.seed)
            scorer = models.load_scalar_model(model)
        self.max_length = models.allowed_length(scorer, c.max_length)
        self.examples, self.eval_examples, self.calibration = (self._tokenise(some) for some in records)
        every = [*self.examples, *self.eval_examples, *self.calibration]
        models.check_tokens(scorer, self.tokenizer, (ids for e in every for ids in preferences.sequences(e)))
        self.model = learning.trainable(scorer, learning.home(self.accelerator), c)
        settings = models.unwrap(self.model).config  # saved beside the weights: how the scores are read
        settings.step_separator = self.separator if self.kind == "process" else None
        settings.score_shift = getattr(settings, "score_shift", 0.0)
        self.attention = learning.prepare_packing(self.accelerator, [self.model], c)
        learning.shard(self.accelerator, [self.model])
        self.optimizer = learning.adamw([(self.model, c.learning_rate)], c.weight_decay)
        self.steps = c.epochs * math.ceil(len(self.examples) / c.batch_size)
        self.done = self.updates = 0

    def _tokenise(self, records: list[data.Record] | None) -> list[Any]:
        if records is None:
            return []
        c, kind = self.config, preferences.kind_of(records, like=self.kind)
        limits: dict[str, Any] = {"max_length": self.max_length, "overlong": c.overlong, "separator": self.separator}
        return preferences.reward_examples(records, self.tokenizer, kind=kind, **limits)

    def train(self, *, resume: bool = False) -> dict[str, float]:
        """Run every step and leave the reward model in ``output_dir``; returns the last metrics.

        With ``resume`` the run in ``output_dir`` goes on from its last checkpoint, if there is one, to the bits that it
        would have had without the stop.
        """
        c = self.config
        run = Run("reward", self.output_dir, c, keep=c.keep, quiet=c.quiet)
        return drive(self, run, total=self.steps, save_every=c.save_every, resume=resume, live=LIVE)

    def batches(self) -> Iterator[list[Any]]:
        """The shuffled records of every epoch in batches; those that are left."""
        return offline.batches(self)

    def step(self, batch: list[Any]) -> dict[str, float]:
        """One optimizer step on the mean loss of ``batch``; returns its statistics."""
        found = self.read(batch, learn=True)
        terms = sum(map(preferences.terms, batch))
        return offline.update(self, {"loss": found["loss"].sum()} | statistics(self.kind, found)[0], terms=terms)

    def read(self, examples: list[Any], *, learn: bool = False) -> dict[str, Tensor]:
        """What is ``seen`` of ``examples``, and the ``loss`` of each micro-batch; every process reads its share.

        With ``learn`` it leaves the gradient of that share in the weights.
        """
        count, size = sum(map(preferences.terms, examples)), self.config.micro_batch_size or self.config.batch_size

        def part() -> dict[str, Tensor]:
            found = []
            for some, counts in processes.turns(examples, lambda mine: learning.split(mine, size)):
                judged = preferences.collate(some, self.tokenizer.pad_token_id).to(self.accelerator.device)
                scores = self.scores(some, judged)
                loss = self.loss(judged, scores, count)
                if learn:
                    self.accelerator.backward(loss * counts)
                if counts:
                    found.append(seen(judged, scores.detach()) | {"loss": loss.detach()[None]})
            return merged(found)

        return merged(processes.gathered(part, calls=True))

    def scores(self, examples: list[Any], judged: Judged) -> Tensor:
        """``[B, K]`` scores of ``examples``, collated, from one forward pass over all sequences."""
        device = self.accelerator.device
        with learning.autocast(device, self.config.precision):
            if self.config.packing:
                packed, order = preferences.packed(examples, device, flat=packing.uses_varlen(self.model))
                return packing.packed_values(self.model, packed)[order]
            values = models.token_values(self.model, judged.ids, judged.attention)
        return values[judged.rows, judged.places]

    def loss(
        self,
        judged: Judged,
        scores: Tensor,  # [B, K]
        count: int,
    ) -> Tensor:
        """What a micro-batch adds to the mean loss over the ``count`` terms of its batch, a 0-d tensor."""
        c, count = self.config, max(count, 1)
        if self.kind == "pairwise":
            better, worse = scores.unbind(1)
            mean = pairwise_loss(better, worse, margin=judged.margins, center_coef=c.center_coef)
            return mean * (len(scores) / count)
        if self.kind == "ranking":
            return ranking_loss(scores, judged.targets, kind=c.ranking, mask=judged.mask, denominator=count)
        return pointwise_loss(scores, judged.targets, mask=judged.mask, denominator=count)

    def evaluate(self) -> dict[str, float]:
        """``eval_loss`` and the statistics of the held-out records, among them ``eval_accuracy``.

        Raises ``ValueError`` where there are none.
        """
        return self._judge(offline.held_out(self))[0]

    @torch.no_grad()
    def _judge(self, examples: list[Any]) -> tuple[dict[str, float], Tensor]:
        """The statistics of ``examples``, and their margins."""
        found = self.read(examples)
        stats, margins = statistics(self.kind, found)
        numbers = learning.numbers({"loss": found["loss"].sum()} | stats)
        return {f"eval_{name}": value for name, value in numbers.items()}, margins

    def normalise(self) -> None:
        """Shift all scores so that those of the calibration data, or else of the training data, have mean 0."""
        config = models.unwrap(self.model).config
        config.score_shift = 0.0
        config.score_shift = -self._judge(self.calibration or self.examples)[0]["eval_score_mean"]

    def after(self, step: int, run: Run) -> dict[str, float]:
        """Normalise at the end, evaluate where it is due."""
        if step == self.steps and self.config.normalise:
            self.normalise()
        if step == self.steps:
            self._note_range()
        if not offline.due(self, step):
            return {}
        stats, margins = self._judge(self.eval_examples)
        run.append("margins.jsonl", step, histogram(margins))
        return stats

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        self.save_model(folder)
        shift = models.unwrap(self.model).config.score_shift
        numbers = {"step": self.done, "updates": self.updates, "score_shift": shift}
        checkpoint.save_state(folder, self.optimizer, numbers, [*self.examples, *self.calibration])

    def restore(self, folder: Path) -> None:
        """Go back to the state of a checkpoint."""
        models.restore(self.model, folder)
        numbers = checkpoint.load_state(folder, self.optimizer, [*self.examples, *self.calibration])
        self.done, self.updates = numbers["step"], numbers["updates"]
        models.unwrap(self.model).config.score_shift = numbers["score_shift"]
        if self.done == self.steps:
            self._note_range()

    def _note_range(self) -> None:
        few = self.examples[:512]
        answers, ends = ([x for e in few for x in of(e)] for of in (preferences.sequences, preferences.ends))
        note_range(self.model, answers, ends, self.tokenizer.pad_token_id)

    def save_model(self, folder: Path) -> None:
        """Write the reward model and its tokenizer as ``save_pretrained`` does; at the end, the scores' range with it.

        The shift of ``normalise`` is ``score_shift`` in config.json, which ``models.token_values`` adds and
        transformers' own forward does not: there the scores differ from ours by this constant.
        """
        models.save(self.model, self.tokenizer, folder)
