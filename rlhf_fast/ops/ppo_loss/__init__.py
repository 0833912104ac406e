"""The clipped policy loss, the clipped value loss, their statistics and their gradient in one pass over the tokens."""

from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.dispatch import define
from rlhf_fast.ops.checks import FLOATS, INTEGERS, check_choice, check_finite, check_positive, check_range, check_tensor
from rlhf_fast.ops.ppo_loss.formula import kl_and_slope, reference

__all__ = ["AGGREGATES", "KL_ESTIMATES", "STATS", "PPOLossOutput", "kl_and_slope", "ppo_loss", "reference"]

AGGREGATES = ("token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum")
KL_ESTIMATES = ("k1", "k2", "k3", "abs")
#: The statistics, in the order in which the op returns them.
STATS = (
    "policy_loss", "value_loss", "entropy", "kl", "approx_kl", "clipfrac", "value_clipfrac", "ratio_mean", "ratio_max",
)  # fmt: skip


class PPOLossOutput(NamedTuple):
    """What `ppo_loss` returns."""

    loss: Tensor  # 0-d
    stats: dict[str, Tensor]  # 0-d each, detached


def ppo_loss(
    logprobs: Tensor,  # [B, T] or [N]
    old_logprobs: Tensor,  # [B, T] or [N]
    advantages: Tensor,  # [B, T], [N] or [B]
    mask: Tensor,  # [B, T] or [N], bool
    *,
    cliprange: float | tuple[float, float] = 0.2,
    values: Tensor | None = None,  # [B, T] or [N]
    old_values: Tensor | None = None,  # [B, T] or [N]
    returns: Tensor | None = None,  # [B, T] or [N]
    cliprange_value: float = 0.2,
    vf_coef: float = 0.1,
    entropy: Tensor | None = None,  # [B, T] or [N]
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,  # [B, T] or [N]
    kl_coef: float = 0.0,
    kl: str = "k3",
    dual_clip: float | None = None,
    log_ratio_clamp: float = 20.0,
    aggregate: str = "token_mean",
    denominator: float | Tensor | None = None,  # number or 0-d
) -> PPOLossOutput:
    """PPO's objective (Schulman et al. 2017) as language models use it (Ziegler et al. 2019; Huang et al. 2024).

    With ``d = clamp(logp - old, +-log_ratio_clamp)``, ``rho = exp(d)`` and ``D = logp - ref``, per token::

        policy = max(-A rho, -A clip(rho, 1 - low, 1 + high));  where A < 0 at most -A dual_clip
        value  = 1/2 max((V - R)^2, (clip(V, V_old +- cliprange_value) - R)^2)
        kl     = D (k1), D^2 / 2 (k2), exp(-D) + D - 1 (k3), |D| (abs)
        loss   = agg(policy) + vf_coef agg(value) - entropy_coef agg(entropy) + kl_coef agg(kl)

    Args:
        logprobs: of the chosen tokens under the policy; with ``values`` and ``entropy`` all that gets a gradient.
        old_logprobs: under the policy that wrote the tokens.
        advantages: per token, or ``[B]``, one per sequence.
        mask: True where a token counts. What is stored elsewhere is never used.
        cliprange: of the ratio, one number or ``(low, high)``.
        values: the critic's values, with ``returns``; without them there is no value loss.
        old_values: the values when the tokens were written; without them the value is not clipped.
        returns: the targets of the values.
        cliprange_value: how far a value may move from the old one.
        vf_coef: weight of the value loss.
        entropy: per token, in nats.
        entropy_coef: weight of the entropy bonus.
        ref_logprobs: under the reference policy; without them the KL term is 0.
        kl_coef: weight of the KL term.
        kl: the estimate of Schulman (2020), ``"k1"``, ``"k2"``, ``"k3"`` or ``"abs"``.
        dual_clip: bound of the ratio where the advantage is negative, above 1 (Ye et al. 2020); None for none.
        log_ratio_clamp: bound of the log ratio; outside of it the policy gets no gradient.
        aggregate: ``"token_mean"``, ``"token_sum"``: over all valid tokens; ``"seq_mean_token_mean"``,
            ``"seq_mean_token_sum"``: over those of each sequence, then the mean of the sequences that have any.
        denominator: takes the place of the number of valid tokens (``token_mean``) or sequences (``seq_mean_*``), or
            divides the sum: with that of the full batch, micro-batches and ranks add up to its loss and gradient.

    Returns:
        `PPOLossOutput`: the loss (0 with a graph for an empty mask) and detached 0-d statistics, aggregated alike:
        ``policy_loss value_loss entropy kl approx_kl`` (``(logp - old)^2 / 2``) ``clipfrac value_clipfrac`` (clipped
        loss above the unclipped one) ``ratio_mean``; and ``ratio_max`` over the valid tokens. Float32, or float64 if an
        input is. What was not given counts 0.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, range or choice, or values without returns.
    """
    check_tensor("ppo_loss", "logprobs", logprobs, dtypes=FLOATS)
    if logprobs.dim() not in (1, 2):
        raise ValueError(f"ppo_loss: logprobs must be [B, T] or [N], got {list(logprobs.shape)}")
    if isinstance(advantages, Tensor) and advantages.shape == logprobs.shape[:1] and logprobs.dim() == 2:
        advantages = advantages[:, None].expand(logprobs.shape)
    shape, device = logprobs.shape, logprobs.device
    check_tensor("ppo_loss", "mask", mask, dtypes=(torch.bool,), shape=shape, rule="like logprobs", device=device)
    tensors = {
        "logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages, "values": values,
        "old_values": old_values, "returns": returns, "entropy": entropy, "ref_logprobs": ref_logprobs,
    }  # fmt: skip
    for name, t in tensors.items():
        if t is not None or name in ("old_logprobs", "advantages"):
            check_tensor("ppo_loss", name, t, dtypes=FLOATS, shape=shape, rule="like logprobs", device=device)
    if (values is None) != (returns is None):
        raise ValueError("ppo_loss: values and returns must be given together")
    low, high = _bounds(cliprange)
    check_range("ppo_loss", "cliprange_value", cliprange_value, 0.0, inf)
    check_range("ppo_loss", "log_ratio_clamp", log_ratio_clamp, 0.0, inf)
    check_range("ppo_loss", "dual_clip", 1.0 if dual_clip is None else dual_clip, 1.0, inf)
    for name, coef in (("vf_coef", vf_coef), ("entropy_coef", entropy_coef), ("kl_coef", kl_coef)):
        check_finite("ppo_loss", name, coef)
    check_choice("ppo_loss", "kl", kl, KL_ESTIMATES)
    check_choice("ppo_loss", "aggregate", aggregate, AGGREGATES)
    if logprobs.dim() == 1 and aggregate.startswith("seq_"):
        raise ValueError(f"ppo_loss: aggregate {aggregate!r} needs [B, T], got {list(shape)}")
    double = any(t is not None and t.dtype == torch.float64 for t in tensors.values())
    dtype = torch.float64 if double else torch.float32
    tokens = [t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors.values()]
    loss, stats, *_ = _ppo_loss(
        *tokens[:3], mask, *tokens[3:], _divisor(denominator, dtype, device),
        cliprange_low=low, cliprange_high=high, cliprange_value=cliprange_value, vf_coef=vf_coef,
        entropy_coef=entropy_coef, kl_coef=kl_coef, kl=kl, dual_clip=dual_clip, log_ratio_clamp=log_ratio_clamp,
        aggregate=aggregate,
    )  # fmt: skip
    return PPOLossOutput(loss, dict(zip(STATS, stats.detach().unbind(), strict=True)))


def backward(
    grad_loss: Tensor,  # []
    grad_logprobs: Tensor,  # [B, T] or [N]
    grad_values: Tensor,  # [B, T], [N] or [0]
    grad_entropy: Tensor,  # [B, T], [N] or [0]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that the forward made, times that of the loss."""
    return grad_loss * grad_logprobs, grad_loss * grad_values, grad_loss * grad_entropy


def _bounds(cliprange: float | tuple[float, float]) -> tuple[float, float]:
    bounds = cliprange if isinstance(cliprange, (tuple, list)) else (cliprange, cliprange)
    if len(bounds) != 2:
        raise ValueError(f"ppo_loss: cliprange must be a number or (low, high), got {cliprange}")
    for bound in bounds:
        check_range("ppo_loss", "cliprange", bound, 0.0, inf)
    return float(bounds[0]), float(bounds[1])


def _divisor(denominator: float | Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if denominator is None:
        return None
    if isinstance(denominator, Tensor):
        rule, dtypes = "a number or 0-d", FLOATS + INTEGERS
        check_tensor("ppo_loss", "denominator", denominator, dtypes=dtypes, shape=(), rule=rule, device=device)
        return denominator.detach().to(dtype)
    check_positive("ppo_loss", "denominator", denominator)
    return torch.full((), denominator, dtype=dtype, device=device)


def _fake(logprobs: Tensor, *rest: Any, **__: Any) -> tuple[Tensor, ...]:
    values, entropy = (rest[i] if len(rest) > i else None for i in (3, 6))
    shapes = (), (len(STATS),), logprobs.shape, *((0,) if t is None else t.shape for t in (values, entropy))
    return tuple(logprobs.new_empty(shape) for shape in shapes)


def _scratch(logprobs: Tensor, *_: Any, **__: Any) -> Tensor:
    # The denominator, 1024 counts of the mask, those of the rows and the partial sums of each 1024 tokens.
    rows = logprobs.shape[0] if logprobs.dim() == 2 else 1
    size = 1 + 1024 + rows + len(STATS) * -(-logprobs.numel() // 1024)
    return logprobs.new_empty(size, dtype=torch.float64)


def _fake_backward(grad_loss: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
    return tuple(g.new_empty(g.shape) for g in grads)


def _setup_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.has_values, ctx.has_entropy = inputs[4] is not None, inputs[7] is not None


def _changes_nothing(grad_loss: Tensor) -> bool:
    """Whether the saved gradients can be handed out as they are, as after ``loss.backward()``.

    Not where the graph is kept for another backward, for whoever gets them may change them in place, and not on a GPU,
    where a look is a sync.
    """
    if type(grad_loss) is not Tensor or grad_loss.device.type != "cpu":  # a tracer's tensor cannot be asked
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph() and grad_loss.item() == 1


def _gradient(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple:
    grads = ctx.saved_tensors
    logprobs, values, entropy = grads if _changes_nothing(grad_loss) else _ppo_loss_backward(grad_loss, *grads)
    values, entropy = values if ctx.has_values else None, entropy if ctx.has_entropy else None
    return logprobs, None, None, None, values, None, None, entropy, None, None


_ppo_loss_backward = define(
    "ppo_loss_backward(Tensor grad_loss, Tensor grad_logprobs, Tensor grad_values, Tensor grad_entropy) "
    "-> (Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)
_ppo_loss = define(
    "ppo_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? values=None, "
    "Tensor? old_values=None, Tensor? returns=None, Tensor? entropy=None, Tensor? ref_logprobs=None, "
    "Tensor? denominator=None, *, float cliprange_low, float cliprange_high, float cliprange_value, float vf_coef, "
    "float entropy_coef, float kl_coef, str kl, float? dual_clip, float log_ratio_clamp, str aggregate) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference,
    _fake,
    backward=_gradient,
    setup_context=_setup_context,
    scratch=_scratch,
)
