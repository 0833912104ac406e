"""verl: logprobs and entropy, its advantages by GAE, its vanilla policy loss and its value loss.

verl's masks may be bool, integers or floats; what is not 0 counts. Losses and advantages are
float32, or float64 for float64.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.integrations.inputs import divisor, is_plain, softmax_dtype
from rlhf_fast.integrations.patching import Peer, Replacement
from rlhf_fast.losses.statistics import masked_mean, whiten
from rlhf_fast.ops.gae import gae
from rlhf_fast.ops.logprobs import logprobs
from rlhf_fast.ops.ppo_loss import ppo_loss

ALGOS, FUNCTIONAL = "verl.trainer.ppo.core_algos", "verl.utils.torch_functional"
#: verl's names of how token losses become one number → ours; "-norm" divides by a length too.
AGGREGATES = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-sum-norm": "seq_mean_token_sum",
    "seq-mean-token-mean": "seq_mean_token_mean",
}


def logprobs_from_logits(original: Callable) -> Callable:
    """Logprobs of the labels; the logits are never written to, whatever ``inplace_backward`` says."""
    # flash-attn's cross entropy, which verl takes where it is installed, makes float32 of any logits.
    flash = original.__globals__.get("FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", False)

    def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
        found = logprobs(logits, labels).logprobs
        return found if flash else found.to(softmax_dtype(logits))

    return logprobs_from_logits


def entropy_from_logits(original: Callable) -> Callable:
    """Entropy of every row of logits, in their dtype."""

    def entropy_from_logits(logits: Tensor) -> Tensor:
        return _entropy(logits).to(softmax_dtype(logits))

    return entropy_from_logits


def entropy_from_logits_with_chunking(original: Callable) -> Callable:
    """The same, in torch's default dtype for logits of any dtype."""

    def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
        return _entropy(logits).to(torch.get_default_dtype())

    return entropy_from_logits_with_chunking


def compute_gae_advantage_return(original: Callable) -> Callable:
    """Whitened advantages, and returns; 0 where masked, where verl leaves what its scan carries past."""

    def compute_gae_advantage_return(
        token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any
    ) -> tuple[Tensor, Tensor]:
        mask = response_mask != 0
        numbers = {"gamma": float(gamma), "lam": float(lam)}
        with torch.no_grad():
            advantages, returns = gae(token_level_rewards, values, mask, holes="skip", **numbers)
            return whiten(advantages, mask, unbiased=True), returns

    return compute_gae_advantage_return


def compute_policy_loss_vanilla(original: Callable) -> Callable:
    """The clipped loss with its dual clip; with weights for the rollouts, and whatever is unusual, verl's own runs."""

    def compute_policy_loss_vanilla(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        given = (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)
        plain = rollout_is_weights is None and is_plain(log_prob, response_mask, old_log_prob, advantages)
        if not plain or loss_agg_mode not in AGGREGATES or not hasattr(config, "clip_ratio"):
            return original(*given)
        low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
        high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
        mask, bound = response_mask != 0, config.get("clip_ratio_c", 3.0)
        if not (low >= 0 and high >= 0 and bound > 1):
            return original(*given)
        old_log_prob, advantages = old_log_prob.expand_as(log_prob), advantages.expand_as(log_prob)
        aggregate, factor = _aggregate(loss_agg_mode, mask, **config.global_batch_info)
        loss, _ = ppo_loss(
            log_prob, old_log_prob, advantages, mask, cliprange=(low, high), dual_clip=bound, log_ratio_clamp=20.0,
            **aggregate,
        )  # fmt: skip
        numbers = _clipped(log_prob.detach() - old_log_prob, advantages, mask, low, high, bound)
        names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
        return loss * factor, dict(zip(names, numbers.tolist(), strict=True))

    return compute_policy_loss_vanilla


def compute_value_loss(original: Callable) -> Callable:
    """Half of the clipped squared error, and the fraction of tokens that was clipped."""

    def compute_value_loss(
        vpreds: Tensor,
        returns: Tensor,
        values: Tensor,
        response_mask: Tensor,
        cliprange_value: float,
        loss_agg_mode: str = "token-mean",
        dp_size: int = 1,
        batch_num_tokens: int | None = None,
        global_batch_size: int | None = None,
        loss_scale_factor: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        counts = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
        if not is_plain(vpreds, response_mask, returns, values) or not cliprange_value > 0:
            return original(vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode, *counts)
        returns, values = returns.expand_as(vpreds), values.expand_as(vpreds)
        mask, width = response_mask != 0, float(cliprange_value)
        aggregate, factor = _aggregate(loss_agg_mode, mask, *counts)
        none = torch.zeros((), device=vpreds.device).expand(vpreds.shape)  # no policy in this loss
        loss, stats = ppo_loss(
            none, none, none, mask, values=vpreds, old_values=values, returns=returns, vf_coef=1.0,
            cliprange_value=width, **aggregate,
        )  # fmt: skip
        clipped = stats["value_clipfrac"].float()
        if aggregate != {"aggregate": "token_mean", "denominator": None}:
            with torch.no_grad():  # verl's fraction is that of the tokens, however the loss is aggregated
                near = torch.clamp(vpreds, values - width, values + width)
                clipped = masked_mean(((near - returns) ** 2 > (vpreds - returns) ** 2).float(), mask)
        return loss * factor, clipped

    return compute_value_loss


def _entropy(logits: Tensor) -> Tensor:
    anything = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return logprobs(logits, anything).entropy


def _aggregate(
    mode: str,
    mask: Tensor,  # [B, T], bool
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> tuple[dict[str, Any], float]:
    """The arguments of `ppo_loss` for one of verl's modes, and what its loss is multiplied with."""
    if mode not in AGGREGATES:
        raise ValueError(f"loss_agg_mode must be one of {', '.join(AGGREGATES)}, got {mode!r}")
    count = batch_num_tokens if mode == "token-mean" else None if mode == "token-sum" else global_batch_size
    if dp_size > 1 and count is None and mode != "token-sum":
        what = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
        raise ValueError(f"with dp_size {dp_size} the mode {mode} needs {what}, of all ranks")
    factor = float(dp_size)
    if mode == "seq-mean-token-sum-norm":
        factor = factor / (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return {"aggregate": AGGREGATES[mode], "denominator": divisor(count, mask.device)}, factor


@torch.no_grad()
def _clipped(log_ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float, bound: float) -> Tensor:
    """The tokens' share that is clipped, their KL (k1, clamped) and the share that is clipped from below: ``[3]``."""
    log_ratio, negative = torch.where(mask, log_ratio, 0).clamp_(-20, 20), torch.where(mask, advantages, 0).neg_()
    unclipped = log_ratio.exp()
    clipped = unclipped.clamp(1 - low, 1 + high).mul_(negative)
    unclipped.mul_(negative)
    lower = (torch.maximum(unclipped, clipped) > negative * bound) & (negative > 0)
    return torch.stack([masked_mean(x.float(), mask) for x in (clipped > unclipped, log_ratio.neg_(), lower)])


PEER = Peer(
    since="0.9",
    until="1",
    replacements=(
        Replacement(
            FUNCTIONAL, "logprobs_from_logits", ("logits, labels, inplace_backward=True",), logprobs_from_logits
        ),
        Replacement(FUNCTIONAL, "entropy_from_logits", ("logits",), entropy_from_logits),
        Replacement(
            FUNCTIONAL,
            "entropy_from_logits_with_chunking",
            ("logits, chunk_size=2048",),
            entropy_from_logits_with_chunking,
        ),
        Replacement(
            ALGOS,
            "compute_gae_advantage_return",
            ("token_level_rewards, values, response_mask, gamma, lam",),
            compute_gae_advantage_return,
            registries=("ADV_ESTIMATOR_REGISTRY",),
            bodies=("5c15039d7c901d3b",),  # 0.9.0 and 0.9.1, as of the two below
        ),
        Replacement(
            ALGOS,
            "compute_policy_loss_vanilla",
            (
                "old_log_prob, log_prob, advantages, response_mask, loss_agg_mode='token-mean', config=None, "
                "rollout_is_weights=None",
            ),
            compute_policy_loss_vanilla,
            registries=("POLICY_LOSS_REGISTRY",),
            bodies=("57dafb01ebf02dc1",),
        ),
        Replacement(
            ALGOS,
            "compute_value_loss",
            (
                "vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode='token-mean', dp_size=1, "
                "batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None",
            ),
            compute_value_loss,
            bodies=("1234c61d43d46114",),
        ),
    ),
)
