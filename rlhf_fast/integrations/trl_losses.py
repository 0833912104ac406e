"""TRL: the losses of its GRPO and RLOO trainers, by the op that makes loss, statistics and gradient in one pass.

TRL has no functions for them, only each trainer's ``_compute_loss``, which is known by its body. What is not
reproduced here, by the trainer's options, runs TRL's own method.
"""

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.losses.inputs import precise
from rlhf_fast.losses.statistics import kl_estimate
from rlhf_fast.ops.ppo_loss import ppo_loss

#: GRPO's loss types → how the op adds up the tokens; `_denominator` has what the sum is divided by.
AGGREGATES = {
    "grpo": "seq_mean_token_mean",
    "bnpo": "token_sum",
    "dr_grpo": "token_sum",
    "dapo": "token_sum",
    "luspo": "seq_mean_token_sum",
}
#: What a batch may hold for the model besides ids and masks.
IMAGES = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


class Batch(NamedTuple):
    """What a loss of GRPO is computed from, ``[B, T]``."""

    logps: Tensor  # the only one with a gradient
    old: Tensor
    advantages: Tensor
    mask: Tensor  # bool
    entropies: Tensor
    ref: Tensor | None  # None without a KL term


def grpo_loss(original: Callable) -> Callable:
    """``GRPOTrainer._compute_loss``."""

    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not _grpo_is_known(self):
            return original(self, model, inputs)
        mode, mask = "train" if self.model.training else "eval", inputs["completion_mask"] != 0
        mask = mask & (inputs["tool_mask"] != 0) if "tool_mask" in inputs else mask
        logps, entropies = _forward(self, model, inputs)
        old, advantages = inputs.get("old_per_token_logps"), inputs["advantages"]
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        weighted = _weighted(self, inputs, advantages, entropies, mask).expand_as(logps)
        ref = inputs["ref_per_token_logps"] if self.beta else None
        batch = Batch(logps, logps.detach() if old is None else old, weighted, mask, entropies, ref)
        loss, sums = _grpo(self, batch, _denominator(self, inputs, mask, mode))
        clipped = torch.zeros(2, len(mask), device=mask.device)
        if old is not None:  # without it the ratio is 1
            clipped = _clipped(logps, old, advantages, mask, self.epsilon_low, self.epsilon_high)
        _log_grpo(self, mode, sums, clipped, mask.sum(1))
        return loss

    return _compute_loss


def _grpo(trainer: Any, batch: Batch, denominator: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the sums over the tokens of the KL and the entropy."""
    tokens, beta, kl = batch[:4], trainer.beta, torch.zeros((), device=batch.mask.device)
    how: dict[str, Any] = {"aggregate": AGGREGATES[trainer.loss_type], "denominator": denominator}
    how |= {"log_ratio_clamp": inf, "dual_clip": trainer.args.delta}
    bounds = (trainer.epsilon_low, trainer.epsilon_high)
    if beta and trainer.args.use_bias_correction_kl:
        # ratio * k3: its value takes the entropy's place, and its gradient, ratio * (logp - ref), is that of a policy
        # loss without a range.
        gap, kl = _corrected_kl(batch)
        loss, stats = ppo_loss(*tokens, cliprange=bounds, entropy=kl, entropy_coef=-beta, **how)
        how |= {"cliprange": (1.0, inf), "dual_clip": None, "entropy": batch.entropies}
        slope, others = ppo_loss(batch.logps, batch.old, -gap, batch.mask, **how)
        loss = loss + beta * (slope - slope.detach())
        stats = {"kl": stats["entropy"], "entropy": others["entropy"]}
    else:
        how |= {"ref_logprobs": batch.ref, "kl_coef": beta, "entropy": batch.entropies}
        loss, stats = ppo_loss(*tokens, cliprange=bounds, **how)
        if batch.ref is not None and how["aggregate"] != "token_sum":
            kl = kl_estimate(batch.logps.detach(), batch.ref, kind="k3")
    if how["aggregate"] == "token_sum":
        return loss, {name: stats[name] * denominator for name in ("kl", "entropy")}
    # The metrics are those of the tokens, however the loss is aggregated.
    return loss, {"kl": _total(kl, batch.mask), "entropy": _total(batch.entropies, batch.mask)}


@torch.no_grad()
def _corrected_kl(batch: Batch) -> tuple[Tensor, Tensor]:
    """The gap to the reference, and the k3 estimate times the ratio (DeepSeek-V3.2)."""
    gap, ratio = precise(batch.logps) - batch.ref, (precise(batch.logps) - batch.old).exp_()
    return gap, kl_estimate(batch.logps, batch.ref, kind="k3") * ratio


def rloo_loss(original: Callable) -> Callable:
    """``RLOOTrainer._compute_loss``: one ratio per sequence."""

    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.aux_loss_enabled or not _clips(self):
            return original(self, model, inputs)
        mask = inputs["completion_mask"] != 0
        per_token, entropies = _forward(self, model, inputs)
        old, advantages = inputs["old_logps"], inputs["advantages"]
        logps = torch.where(mask, per_token, 0).sum(1)
        bounds = {"cliprange": (self.epsilon_low, self.epsilon_high), "log_ratio_clamp": inf}
        loss, _ = ppo_loss(logps, old, advantages, torch.ones_like(old, dtype=torch.bool), **bounds)
        column = (x[:, None] for x in (logps, old, advantages))
        clipped = _clipped(*column, torch.ones_like(mask[:, :1]), self.epsilon_low, self.epsilon_high)
        _log_rloo(self, _total(entropies, mask), mask.sum(), clipped.T)
        return loss

    return _compute_loss


def _clips(trainer: Any) -> bool:
    """Whether the ratio is clipped as PPO clips it: a range around 1."""
    return 0 < trainer.epsilon_low <= 1 and 0 < trainer.epsilon_high < inf


def _grpo_is_known(trainer: Any) -> bool:
    """Whether the trainer's options are those that are reproduced."""
    args = trainer.args
    return (
        trainer.loss_type in AGGREGATES
        and trainer.importance_sampling_level == "token"
        and _clips(trainer)
        and (args.delta is None or args.delta > 1 + trainer.epsilon_high)  # below, it is no bound of A < 0 alone
        and trainer.off_policy_mask_threshold is None
        and not trainer._entropy_bonus_enabled
        and not trainer.aux_loss_enabled
    )


def _forward(trainer: Any, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies of the completions, ``[B, T]``; the entropies without a gradient."""
    both = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
    length = inputs["completion_ids"].shape[1]
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
        model, *both, length, compute_entropy=True, compute_aux_loss=False, **{x: inputs.get(x) for x in IMAGES}
    )
    return logps, entropies.detach()


def _weighted(trainer: Any, inputs: dict[str, Any], advantages: Tensor, entropies: Tensor, mask: Tensor) -> Tensor:
    """The advantages times the weights of the policy's loss: none is negative, so they go through its maximum."""
    if trainer.top_entropy_quantile < 1:
        advantages = advantages * trainer.get_high_entropy_mask(entropies, mask, 1 - trainer.top_entropy_quantile)
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        advantages = advantages * inputs["importance_sampling_ratio"]
    return advantages


def _denominator(trainer: Any, inputs: dict[str, Any], mask: Tensor, mode: str) -> float | Tensor:
    """What the sum of tokens, or of sequences, is divided by, with the micro-batches that one step accumulates."""
    accumulated = trainer.current_gradient_accumulation_steps if mode == "train" else 1
    if trainer.loss_type == "bnpo":
        return mask.sum().clamp(min=1) * accumulated
    if trainer.loss_type == "dr_grpo":
        return float(len(mask) * trainer.max_completion_length * accumulated)
    if trainer.loss_type == "dapo":  # the tokens of the generated batch, of which one step has a part
        steps = trainer.args.steps_per_generation if mode == "train" else 1
        return inputs["num_items_in_batch"].clamp(min=1.0) * (accumulated / steps / trainer.accelerator.num_processes)
    return float(len(mask) * accumulated)


@torch.no_grad()
def _clipped(logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """How many tokens of each row were clipped from below and from above: ``[2, B]``, float."""
    sign = advantages.sign()
    bound = torch.where(sign < 0, 1 - low, 1 + high)
    beyond = ((precise(logps) - old).exp() * sign > bound * sign) & mask
    below = (beyond & (sign < 0)).sum(1)
    return torch.stack([below, beyond.sum(1) - below]).float()


def _log_grpo(trainer: Any, mode: str, sums: dict[str, Tensor], clipped: Tensor, lengths: Tensor) -> None:
    """TRL's metrics, of all processes, with one look at the device."""
    stacked = torch.stack([sums["kl"], sums["entropy"], *clipped.sum(1), lengths.sum()]).float()
    stacked = trainer.accelerator.reduce(stacked, reduction="sum")
    low, high = trainer.accelerator.gather((clipped / lengths).T).unbind(1)  # NaN for a row without a token
    extremes = torch.stack([_least(low), -_least(-high)])
    kl, entropy, lower, upper, least, most = torch.cat([stacked[:4] / stacked[4].clamp(min=1), extremes]).tolist()
    numbers = {
        "entropy": entropy, "clip_ratio/low_mean": lower, "clip_ratio/high_mean": upper,
        "clip_ratio/region_mean": lower + upper, "clip_ratio/low_min": least, "clip_ratio/high_max": most,
    }  # fmt: skip
    for name, number in (numbers | ({"kl": kl} if trainer.beta else {})).items():
        trainer._metrics[mode][name].append(number)


def _log_rloo(trainer: Any, entropy: Tensor, count: Tensor, clipped: Tensor) -> None:
    """TRL's metrics, of all processes, with one look at the device; ``clipped [B, 2]``."""
    sums = trainer.accelerator.reduce(torch.stack([entropy.float(), count.float()]), reduction="sum")
    rows = trainer.accelerator.gather(clipped)
    numbers = [(sums[0] / sums[1].clamp(min=1))[None], rows.mean(0), rows[:, :1].amin(0), rows[:, 1:].amax(0)]
    entropy_mean, lower, upper, least, most = torch.cat(numbers).tolist()
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    metrics["entropy"].append(entropy_mean)
    metrics["clip_ratio/low_mean"].append(lower)
    metrics["clip_ratio/low_min"].append(least)
    metrics["clip_ratio/high_mean"].append(upper)
    metrics["clip_ratio/high_max"].append(most)
    metrics["clip_ratio/region_mean"].append(lower + upper)


def _total(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, precise(x), 0).sum()


def _least(x: Tensor) -> Tensor:
    """The least number, NaN where there is none."""
    least = torch.where(x.isnan(), inf, x).amin()
    return torch.where(least == inf, torch.nan, least)
