"""PPO without a critic: the scores of several responses to one prompt are each other's baseline.

GRPO (Shao et al. 2024), Dr. GRPO (Liu et al. 2025), RLOO (Ahmadian et al. 2024), REINFORCE++ (Hu et al. 2025), with the
options of DAPO (Yu et al. 2025): another clip upwards, the mean over tokens, groups drawn again, a price on length.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import data, models, ops
from rlhf_fast.generators import Generator
from rlhf_fast.losses import group_advantages, whiten
from rlhf_fast.losses.advantages import ADVANTAGES
from rlhf_fast.ops.ppo_loss import KL_ESTIMATES
from rlhf_fast.rewards import RewardError, RunningMoments, load_reward, shape_rewards, token_readers
from rlhf_fast.rollout import Rollout, statistics
from rlhf_fast.sharing import check_share, freeze, shared_copy, with_adapters
from rlhf_fast.trainers import checkpoint, learning, online, scoring
from rlhf_fast.trainers.drive import drive
from rlhf_fast.trainers.options import chosen, option, validate
from rlhf_fast.trainers.run import Run, check_folder

AGGREGATES = ("token_mean", "seq_mean_token_mean", "longest")


@dataclass(frozen=True)
class GRPOConfig:
    """Every number of GRPO and its relatives."""

    steps: int = option(200, "steps: each writes and learns from one batch of groups", low=1)
    batch_size: int = option(16, "prompts per step", low=1)
    group_size: int = option(8, "responses to each prompt", low=2)
    minibatch_size: int = option(32, "responses per optimizer step", low=1)
    micro_batch_size: int | None = option(None, "responses per forward pass, a matter of memory only", low=1)
    ppo_epochs: int = option(1, "passes over each batch", low=1)
    learning_rate: float = option(1e-6, "peak learning rate", low=0.0)
    schedule: str = option("constant", "the learning rate after the warm-up", choices=learning.SCHEDULES)
    warmup_ratio: float = option(0.03, "share of the steps in which the rate rises linearly", low=0.0, high=1.0)
    weight_decay: float = option(0.0, "AdamW's weight decay", low=0.0)
    max_grad_norm: float = option(1.0, "norm to which the gradient is clipped", above=0.0)
    advantage: str = option("grpo", "how a score becomes an advantage", choices=ADVANTAGES)
    eps: float = option(1e-6, "added to the standard deviation of a group", low=0.0)
    aggregate: str = option(
        "token_mean",
        "mean over tokens, over responses or, longest (Dr. GRPO), over responses times max_new_tokens",
        choices=AGGREGATES,
    )
    cliprange: float = option(0.2, "how far the ratio may move from 1 before its gradient stops", above=0.0)
    cliprange_high: float | None = option(None, "cliprange upwards, if it differs; DAPO's is 0.28", above=0.0)
    dual_clip: float | None = option(None, "bound of the loss in units of a negative advantage, e.g. 3", above=1.0)
    entropy_coef: float = option(0.0, "weight of the entropy bonus", low=0.0)
    kl_coef: float = option(0.0, "price of the KL, in the loss (reinforce_pp: rewards); 0: no reference", low=0.0)
    kl: str = option("k3", "estimator of the KL that kl_coef prices", choices=KL_ESTIMATES)
    stop_kl: float | None = option(None, "approx_kl at which the passes over a batch end early", above=0.0)
    resample: int = option(0, "times that groups of equal scores are drawn anew (dynamic sampling)", low=0)
    old_logprobs: str = option("recomputed", "the ratio starts from the trainer's or the sampler's", choices=online.OLD)
    importance_cap: float | None = option(None, "largest trainer/sampler ratio that corrects an advantage", above=0.0)
    scale_scores: str = option("none", "divide by the running std; norm: less the mean first", choices=online.SCALES)
    clip_scores: float | None = option(None, "largest absolute score, after scaling", above=0.0)
    missing_eos_penalty: float | None = option(None, "taken from the score of a response that never ends", low=0)
    overlong_penalty: float = option(0.0, "taken from a response of max_new_tokens; less within overlong_buffer", low=0)
    overlong_buffer: int = option(16, "last tokens of max_new_tokens in which overlong_penalty rises from 0", low=1)
    learn_truncated: bool = option(True, "learn from responses that never end, too")
    skip_failed_rewards: bool = option(False, "leave out a batch on which the reward function raises, and count it")
    max_prompt_length: int | None = option(None, "longest prompt in tokens; what the context leaves if absent", low=1)
    overlong: str = option("error", "a longer prompt stops the run or is left out", choices=("error", "drop"))
    max_new_tokens: int = option(64, "longest response in tokens", low=1)
    temperature: float = option(1.0, "sampling temperature, and that of every logprob", above=0.0)
    top_k: int = option(0, "sample among the k likeliest tokens; 0 for all", low=0)
    top_p: float = option(1.0, "sample in the smallest set of this probability", above=0.0, high=1.0)
    stop_token: str | None = option(None, "a token that ends a response, beside the end token")
    packing: bool = option(False, "prompts and responses are read without their padding, several to a row")
    share: str = option("none", "weights of policy and reference: none, hydra:k (top k layers apart) or lora")
    lora_rank: int = option(16, "rank of the adapters with share=lora", low=1)
    lora_alpha: float = option(32.0, "scale of the adapters, over the rank", above=0.0)
    precision: str = option("fp32", "bf16 runs the models' products in bfloat16", choices=learning.PRECISIONS)
    gradient_checkpointing: bool = option(False, "compute activations anew for the backward pass: less memory, slower")
    seed: int = option(0, "of the prompts' order, the responses and the minibatches", low=0, high=2**63 - 1)
    sample_every: int = option(10, "steps between tables of samples; 0 for none", low=0)
    save_every: int = option(50, "steps between checkpoints; 0 for none", low=0)
    keep: int = option(2, "checkpoints that stay on the disk", low=1)
    quiet: bool = option(False, "no progress bar and no tables")

    def __post_init__(self) -> None:
        validate(self)
        check_share("GRPOConfig.share", self.share)


class GRPOTrainer:
    """Policy, reward and, where the KL has a price, frozen reference; verbs: ``rollout``, ``advantages``, ``update``.

    Args:
        model: the policy to train: a path, a Hub id or a causal LM.
        reward: a path or module with a scalar head, or ``callable(prompts, responses, **columns)`` that returns one
            score per response, ``[B]``, or one per token, ``[B, T]``, whose sum counts; a list of these or an
            ``EnsembleReward``.
        prompts: a path, a list of dicts or a ``datasets.Dataset`` with the column ``prompt``; the others reach the
            reward.
        output_dir: the folder of the run; nothing is written without it.
        config: a ``GRPOConfig``.
        tokenizer: the policy's, needed if ``model`` is a module.
        reference: what the KL is taken from: a path or module; a frozen copy of the policy as it is now if absent.
        generator: what writes the responses, a ``generators.Generator``; the policy's own decode loop if absent.
    """

    def __init__(
        self,
        model: Any,
        *,
        reward: Any,
        prompts: Any,
        output_dir: str | Path | None = None,
        config: GRPOConfig | None = None,
        tokenizer: Any = None,
        reference: Any = None,
        generator: Generator | None = None,
    ) -> None:
        check_folder(output_dir, run=True)
        c = self.config = chosen(config, GRPOConfig)
        if reference is not None and not c.kl_coef:
            warnings.warn("the reference is not used: GRPOConfig.kl_coef is 0", stacklevel=2)
        self.output_dir, self.generator = output_dir, generator
        self.accelerator = learning.accelerator()
        device = learning.home(self.accelerator)
        records = data.read_records(prompts)
        self.tokenizer = models.load_tokenizer(model, tokenizer)
        self.policy = learning.trainable(models.load_policy(model), device, c)
        freeze(self.policy, c.share)
        self.reference = None
        if c.kl_coef > 0:
            kept = self.policy if reference is None else models.load_policy(reference)
            self.reference = models.frozen_copy(kept, shared_copy).to(device)
        self.reward = load_reward(reward, self.tokenizer, device=self.accelerator.device)
        if c.share == "lora":
            self.policy = with_adapters(self.policy, rank=c.lora_rank, alpha=c.lora_alpha, seed=c.seed)
        readers = {model: 0 for model in (self.policy, self.reference) if model is not None}
        # A reward model that reads the policy's tokens reads an end token after every response, too.
        readers |= dict.fromkeys(token_readers(self.reward), 1)
        self.prompts = online.tokenise(records, self.tokenizer, readers, c)
        self.stop_ids = online.stop_ids(self.policy, self.tokenizer, c.stop_token)
        self.attention = learning.prepare_packing(self.accelerator, [self.policy, self.reference], c)
        learning.shard(self.accelerator, [self.policy, self.reference])
        self.optimizer = learning.adamw([(self.policy, c.learning_rate)], c.weight_decay)
        self.learners, self.moments = {"": self.policy}, RunningMoments()
        self.done = self.updates = self.skipped = 0  # steps, optimizer steps, batches that taught nothing
        self.samples: list[dict[str, Any]] = []

    def train(self, *, resume: bool = False) -> dict[str, float]:
        """Run every step and leave the policy in ``output_dir``; returns the last metrics.

        With ``resume`` the run in ``output_dir`` goes on from its last checkpoint, if there is one, to the bits that it
        would have had without the stop.
        """
        c = self.config
        run = Run("grpo", self.output_dir, c, keep=c.keep, quiet=c.quiet)
        live = ("scores", "zero_variance", "loss")
        return drive(self, run, total=c.steps, save_every=c.save_every, resume=resume, live=live)

    def batches(self) -> Iterator[list[data.Prompt]]:
        """The batches of prompts that are left of ``steps``: one shuffled pass after the other."""
        return online.batches(self.prompts, self.config, self.done)

    def step(self, batch: list[data.Prompt]) -> dict[str, float]:
        """One step on groups of responses to the prompts of ``batch``; returns its statistics."""
        c = self.config
        rate = learning.set_rate(self.optimizer, c.schedule, self.done, c.steps, c.warmup_ratio)
        try:
            rollout, scores, equal = self.rollout(batch)
        except RewardError as error:
            if not c.skip_failed_rewards:
                raise
            warnings.warn(f"step {self.done + 1} is skipped: {error}", stacklevel=2)
            self.done, self.skipped, self.samples = self.done + 1, self.skipped + 1, []
            return {"skipped": float(self.skipped)}
        advantages = online.corrected(self.advantages(rollout, scores), rollout, c.importance_cap)
        seen = learning.numbers(statistics(rollout, scores))
        stats = self.update(rollout, advantages)
        first = {"mismatch": stats["mismatch"]} if c.old_logprobs == "sampler" else {}
        self.done, self.samples = self.done + 1, rollout.samples(4)
        return stats | seen | first | {"zero_variance": equal, "lr": rate, "skipped": float(self.skipped)}

    @torch.no_grad()
    def rollout(self, batch: list[data.Prompt]) -> tuple[Rollout, Tensor, float]:
        """``group_size`` responses to each prompt and their scores ``[B]``, less the penalties; group after group.

        Last, the share of groups of the first draw whose scores were all equal. With ``resample`` those are replaced by
        groups of other prompts, where these differ. Policy and reference then read what is kept.
        """
        c, rounds, asked = self.config, [], batch
        for attempt in range(1 + c.resample):
            written = online.write(
                self.policy, [prompt for prompt in asked for _ in range(c.group_size)], self.tokenizer, c,
                stop_ids=self.stop_ids, step=self.done, attempt=attempt, generator=self.generator,
            )  # fmt: skip
            rounds.append((written, scoring.sequence_scores(self.reward, written, c, self.moments)))
            equal = [online.equal_groups(scores, c.group_size) for _, scores in rounds]
            missing = len(batch) - sum(len(found) - sum(found) for found in equal)
            if missing <= 0:
                break
            asked = online.more(self.prompts, missing, c, self.done, attempt)
        rollout, scores = online.keep_groups(rounds, len(batch), c.group_size)

        def read(part: Rollout) -> None:
            online.compare(self.policy, self.reference, part, c)

        online.fill(rollout, self.forward_size, ("old_logprobs", "ref_logprobs", "kl"), read)
        return rollout, scores, sum(equal[0]) / len(batch)

    def advantages(self, rollout: Rollout, scores: Tensor) -> Tensor:
        """``[B]``, or ``[B, T]`` for REINFORCE++ with a KL: what is left to come of the token rewards, whitened."""
        c = self.config
        if c.advantage == "reinforce_pp" and c.kl_coef > 0:
            both = rollout.old_logprobs, rollout.ref_logprobs
            rewards = shape_rewards(scores, *both, rollout.mask, kl_coef=c.kl_coef, kl=c.kl)
            to_go, _ = ops.gae(rewards, torch.zeros_like(rewards), rollout.mask, gamma=1.0, lam=1.0)
            return whiten(to_go, rollout.mask)
        groups = torch.arange(len(scores), device=scores.device) // c.group_size
        return group_advantages(scores, groups, kind=c.advantage, eps=c.eps)

    def update(self, rollout: Rollout, advantages: Tensor) -> dict[str, float]:
        """``ppo_epochs`` passes of clipped updates, fewer if the policy has moved by ``stop_kl``."""
        return online.update(self, rollout, (advantages,))

    def count(self, rollout: Rollout, rows: Tensor) -> Tensor:
        """What the loss of the minibatch ``rows`` is divided by, 0-d: its tokens, its responses or their room."""
        mask = self.learned(rollout)[rows]
        if self.config.aggregate == "longest":
            return mask.new_tensor(len(rows) * self.config.max_new_tokens, dtype=torch.long)
        return mask.any(1).sum() if self.config.aggregate == "seq_mean_token_mean" else mask.sum()

    def learned(self, rollout: Rollout) -> Tensor:
        """``[B, T]``: the tokens to learn from."""
        return rollout.mask if self.config.learn_truncated else rollout.mask & rollout.ended[:, None]

    def loss(self, rollout: Rollout, advantages: Tensor, count: Tensor) -> ops.PPOLossOutput:
        """Clipped policy loss of some responses of a minibatch; the KL is in it but for REINFORCE++."""
        c, now, mask = self.config, online.read(self.policy, rollout, self.config), self.learned(rollout)
        priced = self.reference is not None and c.advantage != "reinforce_pp"
        found = ops.ppo_loss(
            now.logprobs, rollout.old_logprobs, advantages, mask, cliprange=online.cliprange(c),
            entropy=now.entropy, entropy_coef=c.entropy_coef, ref_logprobs=rollout.ref_logprobs if priced else None,
            kl_coef=c.kl_coef if priced else 0.0, kl=c.kl, dual_clip=c.dual_clip,
            aggregate="token_mean" if c.aggregate == "longest" else c.aggregate, denominator=count,
        )  # fmt: skip
        return found._replace(stats=found.stats | {"filled": mask.sum() / count}) if c.aggregate == "longest" else found

    def after(self, step: int, run: Run) -> dict[str, float]:
        """Show samples where they are due."""
        online.show_samples(self, step, run)
        return {}

    def save(self, folder: Path) -> None:
        """Write a checkpoint: the policy and the numbers between two steps."""
        self.save_model(folder)
        kept = {"step": self.done, "updates": self.updates, "skipped": self.skipped}
        kept |= {"moments": self.moments.state_dict()}
        checkpoint.save_state(folder, self.optimizer, kept, self.prompts)

    def restore(self, folder: Path) -> None:
        """Go back to the state of a checkpoint."""
        models.restore(self.policy, folder)
        kept = checkpoint.load_state(folder, self.optimizer, self.prompts)
        self.done, self.updates, self.skipped = kept["step"], kept["updates"], kept["skipped"]
        self.moments.load_state_dict(kept["moments"])

    def save_model(self, folder: Path) -> None:
        """Write the policy and its tokenizer as ``save_pretrained`` does."""
        models.save(self.policy, self.tokenizer, folder)

    @property
    def forward_size(self) -> int:
        """Responses per forward pass."""
        return self.config.micro_batch_size or self.config.minibatch_size
