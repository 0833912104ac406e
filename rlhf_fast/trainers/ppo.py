"""PPO for language models: four models, KL-shaped token rewards, GAE, clipped policy and value loss.

Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022; Huang et al. 2024, "The N+ implementation details".
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
from rlhf_fast.losses import AdaptiveKL, whiten
from rlhf_fast.ops.ppo_loss import KL_ESTIMATES
from rlhf_fast.rewards import RewardError, RunningMoments, load_reward, token_readers
from rlhf_fast.rollout import Rollout, statistics
from rlhf_fast.sharing import check_share, freeze, new_critic, shared_copy, with_adapters
from rlhf_fast.trainers import checkpoint, learning, online, scoring
from rlhf_fast.trainers.drive import drive
from rlhf_fast.trainers.options import chosen, option, validate
from rlhf_fast.trainers.run import Run, check_folder


@dataclass(frozen=True)
class PPOConfig:
    """Every number of PPO."""

    steps: int = option(200, "PPO steps: each writes and learns from one batch of responses", low=1)
    batch_size: int = option(64, "prompts, and so responses, per step", low=1)
    minibatch_size: int = option(16, "responses per optimizer step", low=1)
    micro_batch_size: int | None = option(None, "responses per forward pass, a matter of memory only", low=1)
    ppo_epochs: int = option(4, "passes over each batch", low=1)
    learning_rate: float = option(3e-6, "peak learning rate of the policy", low=0.0)
    critic_learning_rate: float | None = option(None, "peak learning rate of the critic; the policy's if absent", low=0)
    schedule: str = option("linear", "the learning rate after the warm-up", choices=learning.SCHEDULES)
    warmup_ratio: float = option(0.03, "share of the steps in which the rate rises linearly", low=0.0, high=1.0)
    weight_decay: float = option(0.0, "AdamW's weight decay", low=0.0)
    max_grad_norm: float = option(1.0, "norm to which each model's gradient is clipped", above=0.0)
    gamma: float = option(1.0, "discount per token", low=0.0, high=1.0)
    lam: float = option(0.95, "GAE's exponential weight", low=0.0, high=1.0)
    whiten_advantages: bool = option(True, "give the advantages of a batch mean 0 and variance 1")
    whiten_rewards: bool = option(False, "give the token rewards of a batch variance 1, keeping their mean")
    cliprange: float = option(0.2, "how far the ratio may move from 1 before its gradient stops", above=0.0)
    cliprange_high: float | None = option(None, "cliprange upwards, if it differs", above=0.0)
    cliprange_value: float = option(0.2, "how far a value may move from its old one before its gradient stops", above=0)
    vf_coef: float = option(0.1, "weight of the value loss", low=0.0)
    entropy_coef: float = option(0.0, "weight of the entropy bonus", low=0.0)
    dual_clip: float | None = option(None, "bound of the loss in units of a negative advantage, e.g. 3", above=1.0)
    kl_coef: float = option(0.05, "price of a nat of KL from the reference; the first one if kl_target is set", low=0.0)
    kl: str = option("k1", "the KL in the token rewards: an estimator or exact", choices=(*KL_ESTIMATES, "exact"))
    kl_target: float | None = option(None, "sequence KL in nats that an adaptive kl_coef aims at", above=0.0)
    kl_horizon: float = option(10000.0, "responses over which the adaptive kl_coef moves", above=0.0)
    stop_kl: float | None = option(None, "approx_kl at which the passes over a batch end early", above=0.0)
    critic_warmup_steps: int = option(0, "first steps in which the critic learns alone", low=0)
    old_logprobs: str = option("recomputed", "the ratio starts from the trainer's or the sampler's", choices=online.OLD)
    importance_cap: float | None = option(None, "largest trainer/sampler ratio that corrects an advantage", above=0.0)
    scale_scores: str = option("none", "divide by the running std; norm: less the mean first", choices=online.SCALES)
    clip_scores: float | None = option(None, "largest absolute score, after scaling", above=0.0)
    missing_eos_penalty: float | None = option(None, "taken from the last reward of a response that never ends", low=0)
    overlong_penalty: float = option(0.0, "taken from a response of max_new_tokens; less within overlong_buffer", low=0)
    overlong_buffer: int = option(16, "last tokens of max_new_tokens in which overlong_penalty rises from 0", low=1)
    skip_failed_rewards: bool = option(False, "leave out a batch on which the reward function raises, and count it")
    max_prompt_length: int | None = option(None, "longest prompt in tokens; what the context leaves if absent", low=1)
    overlong: str = option("error", "a longer prompt stops the run or is left out", choices=("error", "drop"))
    max_new_tokens: int = option(64, "longest response in tokens", low=1)
    temperature: float = option(1.0, "sampling temperature, and that of every logprob", above=0.0)
    top_k: int = option(0, "sample among the k likeliest tokens; 0 for all", low=0)
    top_p: float = option(1.0, "sample in the smallest set of this probability", above=0.0, high=1.0)
    stop_token: str | None = option(None, "a token that ends a response, beside the end token")
    packing: bool = option(False, "prompts and responses are read without their padding, several to a row")
    share: str = option("none", "weights of policy, reference and critic: none, hydra:k (top k layers apart) or lora")
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
        if self.minibatch_size > self.batch_size:
            raise ValueError(f"PPOConfig.minibatch_size {self.minibatch_size} exceeds batch_size {self.batch_size}")
        check_share("PPOConfig.share", self.share)


class PPOTrainer:
    """Policy, frozen reference, critic and reward; four verbs: ``rollout``, ``score``, ``ops.gae``, ``update``.

    Args:
        model: the policy to train: a path, a Hub id or a causal LM.
        reward: a path or module with a scalar head, or ``callable(prompts, responses, **columns)`` that returns one
            score per response, ``[B]``, or one per token, ``[B, T]``; a list of these or an ``EnsembleReward``.
        prompts: a path, a list of dicts or a ``datasets.Dataset`` with the column ``prompt``; the others reach the
            reward.
        output_dir: the folder of the run; nothing is written without it.
        config: a ``PPOConfig``.
        tokenizer: the policy's, needed if ``model`` is a module.
        reference: what the KL is taken from: a path or module; a frozen copy of the policy as it is now if absent.
        critic: a path or module (a causal LM or a model with a scalar head); the reward model's weights if there is
            one, else the policy's with a head of zeros, if absent.
        generator: what writes the responses, a ``generators.Generator``; the policy's own decode loop if absent.
    """

    def __init__(
        self,
        model: Any,
        *,
        reward: Any,
        prompts: Any,
        output_dir: str | Path | None = None,
        config: PPOConfig | None = None,
        tokenizer: Any = None,
        reference: Any = None,
        critic: Any = None,
        generator: Generator | None = None,
    ) -> None:
        check_folder(output_dir, run=True)
        c = self.config = chosen(config, PPOConfig)
        self.output_dir, self.generator = output_dir, generator
        self.accelerator = learning.accelerator()
        device, self.device = learning.home(self.accelerator), self.accelerator.device
        records = data.read_records(prompts)
        self.tokenizer = models.load_tokenizer(model, tokenizer)
        self.policy = learning.trainable(models.load_policy(model), device, c)
        freeze(self.policy, c.share)
        kept = self.policy if reference is None else models.load_policy(reference)
        self.reference = models.frozen_copy(kept, shared_copy).to(device)
        self.reward = load_reward(reward, self.tokenizer, device=self.device)
        scorers = token_readers(self.reward)
        scorer = scorers[0] if scorers and c.share == "none" else None  # what is shared are the policy's weights
        self.critic = learning.trainable(new_critic(critic, self.policy, scorer, c.seed), device, c)
        if c.share == "lora":
            size = {"rank": c.lora_rank, "alpha": c.lora_alpha, "seed": c.seed}
            self.policy, self.critic = (with_adapters(m, **size) for m in (self.policy, self.critic))
        # A reward model that reads the policy's tokens reads an end token after every response, too.
        readers = {self.policy: 0, self.reference: 0, self.critic: 0} | dict.fromkeys(scorers, 1)
        self.prompts = online.tokenise(records, self.tokenizer, readers, c)
        self.stop_ids = online.stop_ids(self.policy, self.tokenizer, c.stop_token)
        critic_rate = c.learning_rate if c.critic_learning_rate is None else c.critic_learning_rate
        self.attention = learning.prepare_packing(self.accelerator, [self.policy, self.reference, self.critic], c)
        learning.shard(self.accelerator, [self.policy, self.reference, self.critic])
        groups = [(self.policy, c.learning_rate), (self.critic, critic_rate)]
        self.optimizer = learning.adamw(groups, c.weight_decay)
        self.kl_control = AdaptiveKL(c.kl_coef, c.kl_target, c.kl_horizon) if c.kl_target else None
        self.kl_coef, self.moments = c.kl_coef, RunningMoments()
        self.learners = {"": self.policy, "critic_": self.critic}  # prefix of its gradient's norm → model
        self.done = self.updates = self.skipped = 0  # PPO steps, optimizer steps, batches without a reward
        self.samples: list[dict[str, Any]] = []

    def train(self, *, resume: bool = False) -> dict[str, float]:
        """Run every step and leave the policy in ``output_dir``; returns the last metrics.

        With ``resume`` the run in ``output_dir`` goes on from its last checkpoint, if there is one, to the bits that it
        would have had without the stop.
        """
        c = self.config
        run = Run("ppo", self.output_dir, c, keep=c.keep, quiet=c.quiet)
        return drive(self, run, total=c.steps, save_every=c.save_every, resume=resume, live=("scores", "kl", "loss"))

    def batches(self) -> Iterator[list[data.Prompt]]:
        """The batches of prompts that are left of ``steps``: one shuffled pass after the other."""
        return online.batches(self.prompts, self.config, self.done)

    def step(self, batch: list[data.Prompt]) -> dict[str, float]:
        """One PPO step on the prompts of ``batch``; returns its statistics."""
        c = self.config
        rate = learning.set_rate(self.optimizer, c.schedule, self.done, c.steps, c.warmup_ratio)
        rollout = self.rollout(batch)
        try:
            rewards = self.score(rollout)
        except RewardError as error:
            if not c.skip_failed_rewards:
                raise
            warnings.warn(f"step {self.done + 1} is skipped: {error}", stacklevel=2)
            self.done, self.skipped, self.samples = self.done + 1, self.skipped + 1, []
            return {"skipped": float(self.skipped)}
        advantages, returns = ops.gae(rewards, rollout.values, rollout.mask, gamma=c.gamma, lam=c.lam)
        if c.whiten_advantages:
            advantages = whiten(advantages, rollout.mask)
        advantages = online.corrected(advantages, rollout, c.importance_cap)
        before = learning.numbers(statistics(rollout, rewards, returns))
        stats = self.update(rollout, advantages, returns)
        first = {"mismatch": stats["mismatch"]} if c.old_logprobs == "sampler" else {}
        stats |= before | first | {"kl_coef": self.kl_coef, "lr": rate, "skipped": float(self.skipped)}
        if self.kl_control is not None:
            self.kl_coef = self.kl_control.update(stats["kl"], len(rollout))
        self.done, self.samples = self.done + 1, rollout.samples(4)
        return stats

    @torch.no_grad()
    def rollout(self, batch: list[data.Prompt]) -> Rollout:
        """The policy writes a response to each prompt; policy, reference and critic read it once."""
        c = self.config
        rollout = online.write(
            self.policy, batch, self.tokenizer, c, stop_ids=self.stop_ids, step=self.done, generator=self.generator
        )

        def read(part: Rollout) -> None:
            online.compare(self.policy, self.reference, part, c)
            part.values = online.values(self.critic, part, c)

        online.fill(rollout, self.forward_size, ("old_logprobs", "ref_logprobs", "kl", "values"), read)
        return rollout

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Tensor:
        """The reward's score less the price of the KL, as one reward per token ``[B, T]``. Keeps ``rollout.scores``."""
        c = self.config
        scores = scoring.scores(self.reward, rollout, c, self.moments)
        rewards = scoring.token_rewards(scores, rollout, c, self.kl_coef)
        return whiten(rewards, rollout.mask, shift_mean=False) if c.whiten_rewards else rewards

    def update(self, rollout: Rollout, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """``ppo_epochs`` passes of clipped updates, fewer if the policy has moved by ``stop_kl``."""
        return online.update(self, rollout, (advantages, returns))

    def count(self, rollout: Rollout, rows: Tensor) -> Tensor:
        """What the loss of the minibatch ``rows`` is divided by: its valid tokens, 0-d."""
        return rollout.mask[rows].sum()

    def loss(self, rollout: Rollout, advantages: Tensor, returns: Tensor, tokens: Tensor) -> ops.PPOLossOutput:
        """Clipped policy and value loss of some sequences of a minibatch that has ``tokens`` valid tokens in all."""
        c = self.config
        if self.done < c.critic_warmup_steps:  # without its forward pass the policy learns nothing
            now = ops.LogprobsOutput(rollout.old_logprobs, torch.zeros_like(rollout.values), rollout.values)
        else:
            now = online.read(self.policy, rollout, c)
        return ops.ppo_loss(
            now.logprobs, rollout.old_logprobs, advantages, rollout.mask, cliprange=online.cliprange(c),
            values=online.values(self.critic, rollout, c), old_values=rollout.values, returns=returns,
            cliprange_value=c.cliprange_value,
            vf_coef=c.vf_coef, entropy=now.entropy, entropy_coef=c.entropy_coef, dual_clip=c.dual_clip,
            denominator=tokens,
        )  # fmt: skip

    def after(self, step: int, run: Run) -> dict[str, float]:
        """Show samples where they are due."""
        online.show_samples(self, step, run)
        return {}

    def save(self, folder: Path) -> None:
        """Write a checkpoint: policy, critic and the numbers between two steps."""
        self.save_model(folder)
        models.save(self.critic, self.tokenizer, folder / "critic")
        kept = {"step": self.done, "updates": self.updates, "kl_coef": self.kl_coef, "skipped": self.skipped}
        kept |= {"moments": self.moments.state_dict()}
        checkpoint.save_state(folder, self.optimizer, kept, self.prompts)

    def restore(self, folder: Path) -> None:
        """Go back to the state of a checkpoint."""
        models.restore(self.policy, folder)
        models.restore(self.critic, folder / "critic")
        kept = checkpoint.load_state(folder, self.optimizer, self.prompts)
        self.done, self.updates, self.kl_coef = kept["step"], kept["updates"], kept["kl_coef"]
        self.skipped = kept["skipped"]
        self.moments.load_state_dict(kept["moments"])
        if self.kl_control is not None:
            self.kl_control.load_state_dict({"value": self.kl_coef})

    def save_model(self, folder: Path) -> None:
        """Write the policy and its tokenizer as ``save_pretrained`` does."""
        models.save(self.policy, self.tokenizer, folder)

    @property
    def forward_size(self) -> int:
        """Responses per forward pass."""
        return self.config.micro_batch_size or self.config.minibatch_size
