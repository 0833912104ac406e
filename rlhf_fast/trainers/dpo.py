"""DPO: a policy learns from pairs of answers without a reward model (Rafailov et al. 2023)."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast import data, models
from rlhf_fast.data import read_records
from rlhf_fast.losses import dpo_loss
from rlhf_fast.losses.preference import DPO_KINDS
from rlhf_fast.sharing import check_share, freeze, shared_copy, with_adapters
from rlhf_fast.trainers import learning, offline, processes
from rlhf_fast.trainers.drive import drive
from rlhf_fast.trainers.options import chosen, option, validate
from rlhf_fast.trainers.run import Run, check_folder


@dataclass(frozen=True)
class DPOConfig:
    """Every number of DPO."""

    epochs: int = option(1, "passes over the pairs", low=1)
    batch_size: int = option(16, "pairs per optimizer step", low=1)
    micro_batch_size: int | None = option(None, "pairs per forward pass, a matter of memory only", low=1)
    learning_rate: float = option(1e-6, "peak learning rate", low=0.0)
    schedule: str = option("cosine", "the learning rate after the warm-up", choices=learning.SCHEDULES)
    warmup_ratio: float = option(0.1, "share of the steps in which the rate rises linearly", low=0.0, high=1.0)
    weight_decay: float = option(0.0, "AdamW's weight decay", low=0.0)
    max_grad_norm: float = option(1.0, "norm to which the gradient is clipped", above=0.0)
    beta: float = option(0.1, "strength of the pull towards the reference", above=0.0)
    kind: str = option("sigmoid", "the loss: sigmoid (Bradley-Terry), ipo or hinge", choices=DPO_KINDS)
    label_smoothing: float = option(0.0, "share of pairs that are the wrong way round", low=0.0, high=0.5)
    precompute_reference: bool = option(False, "read every pair with the reference first, then drop it")
    share: str = option("none", "weights of policy and reference: none, hydra:k (top k layers apart) or lora")
    lora_rank: int = option(16, "rank of the adapters with share=lora", low=1)
    lora_alpha: float = option(32.0, "scale of the adapters, over the rank", above=0.0)
    max_length: int | None = option(None, "longest prompt and answer in tokens; the context if absent", low=2)
    overlong: str = option("error", "a longer pair stops the run, is cut or is left out", choices=data.OVERLONG)
    packing: bool = option(False, "prompts and answers are read without their padding, several to a row")
    precision: str = option("fp32", "bf16 runs the models' products in bfloat16", choices=learning.PRECISIONS)
    gradient_checkpointing: bool = option(False, "compute activations anew for the backward pass: less memory, slower")
    seed: int = option(0, "of the order of the pairs and of new adapters", low=0, high=2**63 - 1)
    eval_every: int = option(100, "steps between evaluations, beside the one at the end; 0 for that one only", low=0)
    save_every: int = option(500, "steps between checkpoints; 0 for none", low=0)
    keep: int = option(2, "checkpoints that stay on the disk", low=1)
    quiet: bool = option(False, "no progress bar")

    def __post_init__(self) -> None:
        validate(self)
        check_share("DPOConfig.share", self.share)
        if self.label_smoothing and self.kind != "sigmoid":
            raise ValueError(f"DPOConfig.label_smoothing must be 0 with kind={self.kind}, got {self.label_smoothing}")


class DPOTrainer:
    """Teach ``model`` to prefer the chosen answer of a pair by more than the reference does.

    Args:
        model: the policy to train: a path, a Hub id or a causal LM.
        data: a path, a list of dicts or a ``datasets.Dataset`` with ``prompt``, ``chosen`` and ``rejected``, or the
            last two with a shared beginning.
        reference: a path, a Hub id or a causal LM; a frozen copy of the policy as it is now if absent.
        output_dir: the folder of the run; nothing is written without it.
        config: a ``DPOConfig``.
        tokenizer: needed if ``model`` is a module.
        eval_data: like ``data``.
    """

    def __init__(
        self,
        model: Any,
        *,
        data: Any,
        reference: Any = None,
        output_dir: str | Path | None = None,
        config: DPOConfig | None = None,
        tokenizer: Any = None,
        eval_data: Any = None,
    ) -> None:
        check_folder(output_dir, run=True)
        self.accelerator = learning.accelerator()
        c = self.config = chosen(config, DPOConfig)
        self.device, self.output_dir = self.accelerator.device, output_dir
        records, eval_records = read_records(data), [] if eval_data is None else read_records(eval_data)
        self.tokenizer = models.load_tokenizer(model, tokenizer)
        self.model = models.load_policy(model)
        self.reference = self.model if reference is None else models.load_policy(reference)
        lengths = [n for m in (self.model, self.reference) if (n := models.allowed_length(m, c.max_length))]
        self.max_length = min(lengths, default=None)
        self.examples = self._tokenise(records)
        self.eval_examples = self._tokenise(eval_records) if eval_records else []
        for each in (self.model, self.reference):
            answers = ((pair.chosen, pair.rejected) for pair in [*self.examples, *self.eval_examples])
            models.check_tokens(each, self.tokenizer, itertools.chain.from_iterable(answers))
        home = learning.home(self.accelerator)
        self.model = learning.trainable(self.model, home, c)
        freeze(self.model, c.share)
        own = reference is None and c.precompute_reference  # which the policy as it is now can answer for
        self.reference = None if own else models.frozen_copy(self.reference, shared_copy).to(home)
        if c.share == "lora":
            self.model = with_adapters(self.model, rank=c.lora_rank, alpha=c.lora_alpha, seed=c.seed)
        self.attention = learning.prepare_packing(self.accelerator, [self.model, self.reference], c)
        learning.shard(self.accelerator, [self.model, self.reference])
        self.optimizer = learning.adamw([(self.model, c.learning_rate)], c.weight_decay)
        self.known: dict[int, tuple[float, float]] = {}  # id of a pair → what the reference says of its answers
        if c.precompute_reference:
            self._read_all(self.model if own else self.reference)
            self.reference, self.attention = None, [a for a in self.attention if a.model is self.model]
        self.steps = c.epochs * math.ceil(len(self.examples) / c.batch_size)
        self.done = self.updates = 0

    def _tokenise(self, records: list[data.Record]) -> list[data.Pair]:
        limits = {"max_length": self.max_length, "overlong": self.config.overlong}
        return data.pair_examples(records, self.tokenizer, **limits)

    @torch.no_grad()
    def _read_all(self, reference: nn.Module) -> None:
        """Ask ``reference`` about every pair, neighbours of one length together."""
        pairs = sorted(
            [*self.examples, *self.eval_examples], key=lambda pair: max(len(pair.chosen), len(pair.rejected))
        )
        size = self.config.micro_batch_size or self.config.batch_size

        def said() -> list[list[float]]:
            found = []
            for part, counts in processes.turns(pairs, lambda mine: learning.split(mine, size)):
                read = self.logprobs(reference, self.collate(part)).double().T.tolist()
                found += read if counts else []
            return found

        every = itertools.chain.from_iterable(processes.gathered(said, calls=True))
        self.known = {id(pair): (first, second) for pair, (first, second) in zip(pairs, every, strict=True)}

    def train(self, *, resume: bool = False) -> dict[str, float]:
        """Run every step and leave the policy in ``output_dir``; returns the last metrics.

        With ``resume`` the run in ``output_dir`` goes on from its last checkpoint, if there is one, to the bits that it
        would have had without the stop.
        """
        c, live = self.config, ("loss", "accuracy", "margin", "eval_accuracy")
        run = Run("dpo", self.output_dir, c, keep=c.keep, quiet=c.quiet)
        return drive(self, run, total=self.steps, save_every=c.save_every, resume=resume, live=live)

    def batches(self) -> Iterator[list[data.Pair]]:
        """The shuffled pairs of every epoch in batches; those that are left."""
        return offline.batches(self)

    def step(self, batch: list[data.Pair]) -> dict[str, float]:
        """One optimizer step on the mean loss of the pairs of ``batch``; returns its statistics."""
        return offline.update(self, offline.summed(self.losses(batch), self.accelerator.backward))

    def losses(self, pairs: list[data.Pair]) -> Iterator[dict[str, Tensor]]:
        """What ``pairs`` add to their mean loss and statistics, ``micro_batch_size`` of this process's at a time."""
        size = self.config.micro_batch_size or self.config.batch_size
        turns = processes.turns(pairs, lambda mine: learning.split(mine, size))
        return (self.loss(part, counts * len(part) / len(pairs)) for part, counts in turns)

    def loss(self, part: list[data.Pair], share: float) -> dict[str, Tensor]:
        """What ``part``, the ``share`` of a batch, adds to its mean loss and statistics, 0-d each.

        The rewards are those that DPO implies: ``beta`` times how much likelier an answer is than under the reference.
        A pair is right where the chosen answer has the larger one, half right where they are equal.
        """
        c, answers = self.config, self.collate(part)
        now = self.logprobs(self.model, answers)
        if self.reference is None:
            ref = torch.tensor([self.known[id(pair)] for pair in part], dtype=now.dtype, device=self.device).T
        else:
            with torch.no_grad():
                ref = self.logprobs(self.reference, answers)
        loss = dpo_loss(*now, *ref, beta=c.beta, kind=c.kind, label_smoothing=c.label_smoothing)
        rewards = c.beta * (now.detach() - ref)
        margin = rewards[0] - rewards[1]
        stats = {
            "accuracy": ((margin.sign() + 1) / 2).mean(),
            "margin": margin.mean(),
            "chosen_reward": rewards[0].mean(),
            "rejected_reward": rewards[1].mean(),
            "chosen_logprob": now[0].detach().mean(),
            "rejected_logprob": now[1].detach().mean(),
        }
        return {name: share * value for name, value in {"loss": loss, **stats}.items()}

    def collate(self, part: list[data.Pair]) -> offline.Answers:
        """The chosen answers of ``part``, then the rejected ones, on the model's device."""
        sequences = [pair.chosen for pair in part] + [pair.rejected for pair in part]
        masks = [offline.answered(ids, pair.prompt_length) for ids, pair in zip(sequences, part * 2, strict=True)]
        return offline.collate(sequences, masks, self.tokenizer.pad_token_id, self.device)

    def logprobs(self, model: nn.Module, answers: offline.Answers) -> Tensor:
        """``[2, B]``: the logprob of each whole answer under ``model``, the chosen ones first."""
        return offline.logprobs(model, answers, self.config).sum(1).view(2, -1)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The statistics of ``loss`` over the held-out pairs, as ``eval_...``. Raises ``ValueError`` without any."""
        found = learning.numbers(offline.summed(self.losses(offline.held_out(self))))
        return {f"eval_{name}": value for name, value in found.items()}

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
