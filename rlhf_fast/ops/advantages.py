"""From scores and logprobs to whitened advantages: KL-shaped rewards, GAE and the batch's statistics in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.dispatch import define
from rlhf_fast.ops.checks import FLOATS, check_choice, check_finite, check_number, check_range, check_tensor
from rlhf_fast.ops.gae import HOLES
from rlhf_fast.ops.gae import reference as scan
from rlhf_fast.ops.ppo_loss import KL_ESTIMATES, kl_and_slope

PLACES = ("last", "next")


class AdvantagesOutput(NamedTuple):
    """What `advantages` returns."""

    advantages: Tensor  # [B, T]
    returns: Tensor  # [B, T]
    rewards: Tensor  # [B, T]


def advantages(
    scores: Tensor,  # [B] or [B, T]
    logprobs: Tensor,  # [B, T]
    ref_logprobs: Tensor,  # [B, T]
    values: Tensor,  # [B, T]
    mask: Tensor,  # [B, T], bool
    *,
    kl_coef: float | Tensor,  # number or 0-d
    kl: str = "k1",
    at: str = "last",
    clip_scores: float | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,  # [B]
    holes: str = "skip",
    whiten: bool = True,
    shift_mean: bool = True,
    unbiased: bool = True,
) -> AdvantagesOutput:
    """What PPO learns from, in one op: ``whiten(gae(shape_rewards(...)))`` (Ziegler et al. 2019; Schulman et al. 2016).

    Per token, with ``k_t`` the KL estimate and the score where it lands::

        r_t = -kl_coef * k_t + score_t
        A_t = r_t + gamma * V_next - V_t + gamma * lam * A_next,    R_t = A_t + V_t
        A_t = (A_t - mean) * rsqrt(var + 1e-8),    mean and var over the valid tokens of the batch

    It has no derivative: nothing that PPO learns from wants one. For statistics over several ranks take
    ``whiten=False`` here and ``whiten(..., group=...)``.

    Args:
        scores: one per response, or one per token, in units of reward.
        logprobs: of the response tokens under the policy that wrote them, in nats.
        ref_logprobs: the same under the reference.
        values: the critic's value of each token.
        mask: True where a token counts. What is stored elsewhere is never used.
        kl_coef: price of a nat; with 0 even an infinite KL costs nothing.
        kl: the estimator ``k_t``, as in ``kl_estimate``: k1, k2, k3 or abs.
        at: where the score of a response lands, as in ``shape_rewards``: on its last valid token (``"last"``) or on the
            one after that (``"next"``), which is masked, so that the advantages do not see it.
        clip_scores: scores are clipped to ``[-clip_scores, clip_scores]`` before.
        gamma: discount per token, in [0, 1].
        lam: GAE's exponential weight, in [0, 1].
        last_values: ``[B]``, the value after the last valid token of a truncated sequence; 0 if absent.
        holes: what a masked token between two valid ones does, as in ``gae``: ``"skip"`` or ``"zero"``.
        whiten: False leaves the advantages as GAE makes them.
        shift_mean: False adds the mean back to the whitened advantages, so that only their scale changes.
        unbiased: the variance divides by n - 1, else by n. One valid token has variance 0.

    Returns:
        `AdvantagesOutput`, each ``[B, T]``, float32, or float64 if an input is; 0 where masked, but for a score at
        ``"next"`` in the rewards. The bits of a row's rewards and returns depend on that row alone; those of whitened
        advantages on the batch as a whole, but on no number of threads and on no order of execution.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, range or choice.
    """
    check_tensor("advantages", "logprobs", logprobs, dtypes=FLOATS)
    if logprobs.dim() != 2:
        raise ValueError(f"advantages: logprobs must be [B, T], got {list(logprobs.shape)}")
    shape, device = logprobs.shape, logprobs.device
    for name, x in (("ref_logprobs", ref_logprobs), ("values", values)):
        check_tensor("advantages", name, x, dtypes=FLOATS, shape=shape, rule="like logprobs", device=device)
    check_tensor("advantages", "mask", mask, dtypes=(torch.bool,), shape=shape, rule="like logprobs", device=device)
    check_tensor("advantages", "scores", scores, dtypes=FLOATS, device=device)
    if scores.shape not in (shape, shape[:1]):
        raise ValueError(f"advantages: scores must be [B] or [B, T] of {list(shape)}, got {list(scores.shape)}")
    if last_values is not None:
        check_tensor(
            "advantages", "last_values", last_values, dtypes=FLOATS, shape=shape[:1], rule="[B]", device=device
        )
    check_choice("advantages", "kl", kl, KL_ESTIMATES)
    check_choice("advantages", "at", at, PLACES)
    check_choice("advantages", "holes", holes, HOLES)
    check_range("advantages", "gamma", gamma, 0.0, 1.0)
    check_range("advantages", "lam", lam, 0.0, 1.0)
    if clip_scores is not None:
        check_number("advantages", "clip_scores", clip_scores)
        if not clip_scores > 0:
            raise ValueError(f"advantages: clip_scores must be above 0, got {clip_scores}")
    given = (scores, logprobs, ref_logprobs, values, last_values)
    double = any(x is not None and x.dtype == torch.float64 for x in given)
    dtype = torch.float64 if double else torch.float32
    price = _price(kl_coef, dtype, device)
    tokens = [x if x is None or x.dtype == dtype else x.to(dtype) for x in given]
    out = _advantages(
        *tokens[:4], mask, tokens[4], price if isinstance(price, Tensor) else None,
        kl_coef=0.0 if isinstance(price, Tensor) else price, kl=kl, at=at, clip_scores=clip_scores, gamma=gamma,
        lam=lam, holes=holes, whiten=whiten, shift_mean=shift_mean, unbiased=unbiased,
    )  # fmt: skip
    return AdvantagesOutput(*out)


def reference(
    scores: Tensor,  # [B] or [B, T]
    logprobs: Tensor,  # [B, T]
    ref_logprobs: Tensor,  # [B, T]
    values: Tensor,  # [B, T]
    mask: Tensor,  # [B, T], bool
    last_values: Tensor | None = None,  # [B]
    price: Tensor | None = None,  # 0-d, takes the place of kl_coef
    *, kl_coef: float = 0.0, kl: str = "k1", at: str = "last", clip_scores: float | None = None, gamma: float = 1.0,
    lam: float = 0.95, holes: str = "skip", whiten: bool = True, shift_mean: bool = True, unbiased: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rewards, the scan and the whitening, one after the other."""
    if clip_scores is not None:
        scores = scores.clamp(-clip_scores, clip_scores)
    costs = kl_coef if price is None else price
    estimate, _ = kl_and_slope(torch.where(mask, logprobs - ref_logprobs, 0), kl)
    rewards = torch.where(mask & (costs != 0), -costs * estimate, 0)  # a price of 0 is none, even of an infinite KL
    if scores.dim() == 2:
        rewards = rewards + torch.where(mask, scores, 0)
    elif mask.numel() > 0:
        position = torch.arange(mask.shape[1], device=mask.device)
        landing = torch.where(mask, position, -1).amax(-1, keepdim=True)
        if at == "next":
            landing = torch.where(landing < 0, landing, (landing + 1).clamp(max=mask.shape[1] - 1))
        rewards = rewards + torch.where(position == landing, scores[:, None], 0)
    found, returns = scan(rewards, values, mask, last_values, gamma=gamma, lam=lam, holes=holes)
    return _whitened(found, mask, shift_mean, unbiased) if whiten else found, returns, rewards


def _whitened(x: Tensor, mask: Tensor, shift_mean: bool, unbiased: bool) -> Tensor:
    """In float64 and in two passes, for sums of squares would cancel where the mean is large."""
    count = mask.sum()
    mean = torch.where(mask, x, 0).double().sum() / count.clamp(min=1)
    deviation = torch.where(mask, x.double() - mean, 0)
    variance = (deviation**2).sum() / (count - (1 if unbiased else 0)).clamp(min=1)
    scaled = deviation * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0).to(x.dtype)


def _price(kl_coef: float | Tensor, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """A number, or a 0-d tensor where reading its number would be a sync."""
    if not isinstance(kl_coef, Tensor):
        check_finite("advantages", "kl_coef", kl_coef)
        return kl_coef
    if kl_coef.dim() != 0:
        raise ValueError(f"advantages: kl_coef must be a number or 0-d, got {list(kl_coef.shape)}")
    if kl_coef.device != device and kl_coef.device.type == "cpu":
        return float(kl_coef)
    check_tensor("advantages", "kl_coef", kl_coef, dtypes=FLOATS, device=device)
    return kl_coef.detach().to(dtype)


def _fake(scores: Tensor, logprobs: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = logprobs.shape
    return logprobs.new_empty(shape), logprobs.new_empty(shape), logprobs.new_empty(shape)


def _scratch(scores: Tensor, logprobs: Tensor, *_: Any, **__: Any) -> Tensor:
    # Count, mean and sum of squared deviations of each row, and of all.
    return logprobs.new_empty(3 * (logprobs.shape[0] + 1), dtype=torch.float64)


_advantages = define(
    "advantages(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask, "
    "Tensor? last_values=None, Tensor? price=None, *, float kl_coef=0.0, str kl='k1', str at='last', "
    "float? clip_scores=None, float gamma=1.0, float lam=0.95, str holes='skip', bool whiten=True, "
    "bool shift_mean=True, bool unbiased=True) -> (Tensor, Tensor, Tensor)",
    reference,
    _fake,
    scratch=_scratch,
)
