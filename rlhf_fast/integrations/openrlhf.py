"""OpenRLHF: logprobs and entropy of its actor, GAE of its experience maker, its policy and its value loss.

Its masks may be bool or numbers; what is not 0 counts. Losses and advantages are float32 (float64 of float64).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.integrations.inputs import divisor, is_plain, softmax_dtype
from rlhf_fast.integrations.patching import Peer, Replacement
from rlhf_fast.losses.statistics import masked_mean
from rlhf_fast.ops.gae import gae
from rlhf_fast.ops.logprobs import logprobs
from rlhf_fast.ops.ppo_loss import ppo_loss


def log_probs_from_logits(original: Callable) -> Callable:
    """Logprobs of the labels. The temperature divides a number in a register, not the caller's logits."""

    def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        return logprobs(logits, labels, temperature=temperature).logprobs.to(softmax_dtype(logits))

    return log_probs_from_logits


def compute_entropy(original: Callable) -> Callable:
    """Entropy of every row of logits, in their dtype, with nothing to compile."""

    def compute_entropy(logits: Tensor) -> Tensor:
        anything = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        return logprobs(logits, anything).entropy.to(softmax_dtype(logits))

    return compute_entropy


def get_advantages_and_returns(original: Callable) -> Callable:
    """Advantages and returns, not whitened; a hole is a token of value and reward 0."""

    @torch.no_grad()
    def get_advantages_and_returns(
        self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
    ) -> tuple[Tensor, Tensor]:
        mask = _mask(action_mask, rewards)
        return gae(rewards, values, mask, gamma=float(gamma), lam=float(lambd), holes="zero")

    return get_advantages_and_returns


def policy_loss(original: Callable) -> Callable:
    """``PolicyLoss.forward``; GSPO, corrections for another engine's logprobs, and the unusual, run OpenRLHF's own."""

    def forward(
        self: Any,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple:
        counts = (dp_size, batch_num_tokens, global_batch_size)
        plain = is_plain(log_probs, action_mask, old_log_probs, advantages)
        if not plain or self.policy_loss_type != "ppo" or self.is_correction_level != "off":
            return original(self, log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, *counts)
        mask = _mask(action_mask, log_probs)
        old_log_probs, advantages = old_log_probs.expand_as(log_probs), advantages.expand_as(log_probs)
        aggregate, factor = _aggregate(self.token_level_loss, mask, *counts)
        loss, stats = ppo_loss(
            log_probs, old_log_probs, advantages, mask, cliprange=(self.clip_eps_low, self.clip_eps_high),
            dual_clip=self.dual_clip, log_ratio_clamp=20.0, **aggregate,
        )  # fmt: skip
        with torch.no_grad():  # these are means over the tokens, however the loss is aggregated
            ratio = torch.where(mask, log_probs.detach() - old_log_probs, 0)
            if aggregate == {"aggregate": "token_mean", "denominator": None}:
                clipped = stats["clipfrac"].float()
            else:
                r = ratio.clamp(-20, 20).exp()
                beyond = r.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high) * advantages < r * advantages
                clipped = masked_mean(beyond.float(), mask)
            kl = masked_mean(-ratio, mask)
        return loss * factor, clipped, kl, None, None

    return forward


def value_loss(original: Callable) -> Callable:
    """``ValueLoss.forward``."""

    def forward(
        self: Any,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        counts, olds = (dp_size, batch_num_tokens, global_batch_size), () if self.clip_eps is None else (old_values,)
        if not is_plain(values, action_mask, returns, *olds):
            return original(self, values, old_values, returns, action_mask, *counts)
        mask, returns = _mask(action_mask, values), returns.expand_as(values)
        aggregate, factor = _aggregate(self.token_level_loss, mask, *counts)
        none = torch.zeros((), device=values.device).expand(values.shape)  # no policy in this loss
        clip: dict[str, Any] = {}
        if olds:
            clip = {"old_values": old_values.expand_as(values), "cliprange_value": self.clip_eps}
        loss, _ = ppo_loss(none, none, none, mask, values=values, returns=returns, vf_coef=1.0, **clip, **aggregate)
        return loss * factor

    return forward


def _mask(mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask != 0


def _aggregate(
    token_level: bool, mask: Tensor, dp_size: int, batch_num_tokens: Any, global_batch_size: Any
) -> tuple[dict[str, Any], float]:
    """The arguments of `ppo_loss`, and what its loss is multiplied with."""
    count = batch_num_tokens if token_level else global_batch_size
    name = "token_mean" if token_level else "seq_mean_token_mean"
    return {"aggregate": name, "denominator": divisor(count, mask.device)}, 1.0 if count is None else float(dp_size)


_COUNTS = "dp_size=1, batch_num_tokens=None, global_batch_size=None"

PEER = Peer(
    since="0.11",
    until="0.12",
    replacements=(
        Replacement(
            "openrlhf.models.utils",
            "log_probs_from_logits",
            ("logits, labels, temperature=1.0",),
            log_probs_from_logits,
        ),
        Replacement("openrlhf.models.utils", "compute_entropy", ("logits",), compute_entropy),
        Replacement(
            "openrlhf.trainer.ppo_utils.experience_maker",
            "RemoteExperienceMaker.get_advantages_and_returns",
            ("self, values, rewards, action_mask, gamma, lambd",),
            get_advantages_and_returns,
        ),
        Replacement(
            "openrlhf.models.loss",
            "PolicyLoss.forward",
            (f"self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, {_COUNTS}",),
            policy_loss,
        ),
        Replacement(
            "openrlhf.models.loss",
            "ValueLoss.forward",
            (f"self, values, old_values, returns, action_mask=None, {_COUNTS}",),
            value_loss,
        ),
    ),
)
