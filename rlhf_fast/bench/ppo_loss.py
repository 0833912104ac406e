"""ppo_loss with value loss, all statistics and the gradients, against the same in plain PyTorch, eager and compiled.

Goal (two cores): at 1 M tokens, forward and backward, at least 10 times faster than eager autograd of the formula. On a
GPU: one launch and a small reduction forward, one launch backward. The gradient is made in the forward; the backward
scales it. On a GPU one more case goes from the logits to their gradient, against Liger's GRPO loss.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlhf_fast.bench.harness import Case, sets, turning
from rlhf_fast.bench.peers import compiled, package_or_formula
from rlhf_fast.dispatch import IMPLEMENTATIONS
from rlhf_fast.ops import PPOLossOutput, logprobs, ppo_loss

NAMES = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
# Forward: reads 6 floats and the mask, writes 2 gradients. Backward: reads and writes these.
BYTES_PER_TOKEN = 6 * 4 + 1 + 2 * 4 + 4 * 4
KL_COEF = 0.04
REMARK = (
    "Bytes: 49 a token, what our kernels move: six floats and the mask read, two gradients made in the forward, then "
    "read and written by\nthe backward, which scales them. From logits: 3 N V b, the backward recomputes the "
    "softmax. 'forward' has no backward."
)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the valid tokens, as TRL, verl and OpenRLHF write it."""
    return (x * mask).sum() / mask.sum()


def eager(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, values: Tensor, old_values: Tensor, returns: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and statistics by the formulas that TRL, verl and OpenRLHF share."""
    log_ratio = logprobs - old
    ratio = torch.exp(torch.clamp(log_ratio, -20.0, 20.0))
    unclipped, clipped = -advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2)
    policy_loss = masked_mean(torch.max(unclipped, clipped), mask)
    error = (values - returns) ** 2
    clipped_error = (torch.clamp(values, old_values - 0.2, old_values + 0.2) - returns) ** 2
    value_loss = 0.5 * masked_mean(torch.max(error, clipped_error), mask)
    with torch.no_grad():
        stats = [policy_loss, value_loss, masked_mean(0.5 * log_ratio**2, mask)]
        stats += [masked_mean((clipped > unclipped).float(), mask), masked_mean((clipped_error > error).float(), mask)]
        stats += [masked_mean(ratio, mask), torch.where(mask, ratio, 0).max()]
    return policy_loss + 0.1 * value_loss, torch.stack(stats).detach()


def verl_package() -> Callable:
    """verl's two losses and what they report; its dual clip cannot be turned off, only out of reach."""
    from verl.trainer.ppo.core_algos import compute_policy_loss, compute_value_loss

    def call(logprobs, old, advantages, mask, values, old_values, returns):
        policy_loss, *stats = compute_policy_loss(old, logprobs, advantages, mask, cliprange=0.2, clip_ratio_c=1e9)
        value_loss, clipfrac = compute_value_loss(values, returns, old_values, mask, 0.2)
        return policy_loss + 0.1 * value_loss, [*stats, clipfrac]

    return call


def ours(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, values: Tensor, old_values: Tensor, returns: Tensor
) -> PPOLossOutput:
    """The public function."""
    return ppo_loss(logprobs, old, advantages, mask, values=values, old_values=old_values, returns=returns)


def gradients_of(function: Callable) -> Callable[..., tuple[Tensor, ...]]:
    """A call that gives the gradients of the logprobs and of the values."""
    return lambda *tensors: torch.autograd.grad(function(*tensors)[0], (tensors[0], tensors[4]))


def peers(device: str, notes: dict[str, str]) -> dict[str, Callable]:
    """Label → loss and statistics by everybody else; why somebody is missing goes to ``notes``."""
    found = {"eager": eager, "compile": compiled(eager, device)}
    return found | package_or_formula("verl", "verl", verl_package, None, notes)


def agrees(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    """The gradients; a candidate without backward gives five outputs and is of another kind."""
    return len(theirs) != len(ours) or all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(ours, theirs, strict=True)
    )


def case(batch: int, tokens: int, device: str, notes: dict[str, str]) -> Case:
    """Forward and backward of every candidate on one shape."""

    def make() -> tuple[Tensor, ...]:
        t = {n: torch.randn(batch, tokens, device=device) * (0.2 if "logprobs" in n else 1.0) for n in NAMES}
        mask = torch.rand(batch, tokens, device=device) < 0.9
        t["logprobs"].requires_grad_(), t["values"].requires_grad_()
        return (*(t[n] for n in NAMES[:3]), mask, *(t[n] for n in NAMES[3:]))

    half = batch * tokens * BYTES_PER_TOKEN // 2
    sources = sets(lambda: (torch.randint(256, (half,), dtype=torch.uint8, device=device),), device)
    target = torch.empty_like(sources[0][0])
    copy = turning(target.copy_, sources)
    given = {name: gradients_of(call) for name, call in peers(device, notes).items()}
    forms = IMPLEMENTATIONS["ppo_loss"]
    numbers = {
        "cliprange_low": 0.2, "cliprange_high": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "entropy_coef": 0.0,
        "kl_coef": 0.0, "kl": "k3", "dual_clip": None, "log_ratio_clamp": 20.0, "aggregate": "token_mean",
    }  # fmt: skip
    for name in [n for n in (("cuda", "triton") if device == "cuda" else ("cpp",)) if n in forms]:
        given[f"{name} forward"] = lambda *tensors, form=forms[name]: form(*tensors, **numbers)
    return Case(
        name=f"{batch}x{tokens}",
        bytes=batch * tokens * BYTES_PER_TOKEN,
        inputs=sets(make, device),
        ours=gradients_of(ours),
        peers=given,
        floors={"copy": lambda *_: copy()},
        agrees=agrees,
        forward=ours,
    )


def eager_from_logits(
    logits: Tensor, ids: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """GRPO's loss from [B, L + 1, V] logits: clip and k3, mean over the tokens, as trainers write it."""
    chosen = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    ratio, a = torch.exp(chosen - old), advantages[:, None]
    loss = torch.max(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    return masked_mean(loss + KL_COEF * (torch.exp(ref - chosen) - (ref - chosen) - 1), mask)


def ours_from_logits(logits: Tensor, ids: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """`logprobs` and `ppo_loss`."""
    chosen = logprobs(logits[:, :-1], ids).logprobs
    return ppo_loss(chosen, old, advantages, mask, ref_logprobs=ref, kl_coef=KL_COEF).loss


def liger_from_logits() -> Callable[..., Tensor]:
    """Its Triton GRPO loss on the logits, averaged over all tokens ("bnpo"), in place of nothing of ours."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    numbers = {"temperature": 1.0, "beta": KL_COEF, "eps_low": 0.2, "eps_high": 0.2, "loss_type": "bnpo"}

    def call(logits, ids, old, ref, advantages, mask) -> Tensor:
        return triton_grpo_loss(logits, old, ref, ids, advantages, mask, inplace=False, reduce=True, **numbers)[0]

    return call


def from_logits(batch: int, tokens: int, size: int, device: str, notes: dict[str, str]) -> Case:
    """From the logits in bfloat16 to their gradient: logprobs and ppo_loss together."""

    def make() -> tuple[Tensor, ...]:
        logits = torch.randn(batch, tokens + 1, size, device=device).mul_(3).bfloat16()
        ids, mask = torch.randint(size, (batch, tokens), device=device), torch.ones(batch, tokens, device=device) > 0
        with torch.no_grad():
            chosen = logprobs(logits[:, :-1], ids).logprobs
        old, ref = (chosen + 0.1 * torch.randn_like(chosen) for _ in range(2))
        return logits.requires_grad_(), ids, old, ref, torch.randn(batch, device=device), mask

    everyone = {"eager": eager_from_logits, "compile": compiled(eager_from_logits, device)}
    everyone |= package_or_formula("Liger", "liger-kernel", liger_from_logits, None, notes)
    inputs = sets(make, device)
    with_gradient = {
        name: lambda *tensors, call=call: torch.autograd.grad(call(*tensors), tensors[:1])
        for name, call in {"ours": ours_from_logits, **everyone}.items()
    }
    return Case(
        name=f"from logits, {batch}x{tokens}x{size} bfloat16",
        bytes=3 * inputs[0][0].nbytes,
        inputs=inputs,
        ours=with_gradient.pop("ours"),
        peers=with_gradient,
        forward=ours_from_logits,
    )


def cases(device: str, notes: dict[str, str]) -> Iterator[Case]:
    """Every shape of the suite on ``device``; why a peer is missing goes to ``notes``."""
    for shape in ((16, 512), (64, 1024), (512, 2048)):
        yield case(*shape, device, notes)
    if device == "cuda":
        yield from_logits(8, 1024, 151936, device, notes)
