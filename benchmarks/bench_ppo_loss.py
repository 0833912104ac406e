"""ppo_loss with value loss, all statistics and the gradients, against the same in plain PyTorch, eager and compiled.

Goal (two cores): at 1 M tokens, forward and backward, at least 10 times faster than eager autograd of the formula.
The gradient is made in the forward; the backward scales it.
"""

import torch
from harness import device_name, devices, interleave, save, table
from torch import Tensor

from rlhf_fast.dispatch import IMPLEMENTATIONS
from rlhf_fast.ops import ppo_loss
from rlhf_fast.ops.ppo_loss import STATS

NAMES = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
# Forward: reads 6 floats and the mask, writes 2 gradients. Backward: reads and writes these.
BYTES_PER_TOKEN = 6 * 4 + 1 + 2 * 4 + 4 * 4


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the valid tokens, as TRL, verl and OpenRLHF write it."""
    return (x * mask).sum() / mask.sum()


def eager(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, values: Tensor, old_values: Tensor, returns: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and statistics as the trainers of TRL and verl compute them."""
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


def ours(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, values: Tensor, old_values: Tensor, returns: Tensor
) -> tuple[Tensor, Tensor]:
    """The public function; returns what `eager` does."""
    out = ppo_loss(logprobs, old, advantages, mask, values=values, old_values=old_values, returns=returns)
    names = [n for n in STATS if n not in ("entropy", "kl")]
    return out.loss, torch.stack([out.stats[n] for n in names])


def measure(batch: int, tokens: int, device: str) -> dict:
    """One row of the table: forward and backward of every candidate on one shape."""
    t = {n: torch.randn(batch, tokens, device=device) * (0.2 if "logprobs" in n else 1.0) for n in NAMES}
    mask = torch.rand(batch, tokens, device=device) < 0.9
    leaves = t["logprobs"].requires_grad_(), t["values"].requires_grad_()
    given = [t[n] for n in NAMES[:3]] + [mask] + [t[n] for n in NAMES[3:]]
    target, source = (torch.empty(batch * tokens * BYTES_PER_TOKEN // 2, dtype=torch.uint8) for _ in range(2))
    target, source = target.to(device), source.random_(256).to(device)
    compiled = torch.compile(eager, dynamic=False)
    functions = {"ours": ours, "eager": eager, "compile": compiled}
    results = {name: (f(*given), torch.autograd.grad(f(*given)[0], leaves)) for name, f in functions.items()}
    for name, ((loss, stats), grads) in results.items():
        (loss_of_ours, stats_of_ours), grads_of_ours = results["ours"]
        for a, b in zip((loss, stats, *grads), (loss_of_ours, stats_of_ours, *grads_of_ours), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), f"{name} computes something else"
    candidates = {name: lambda f=f: torch.autograd.grad(f(*given)[0], leaves) for name, f in functions.items()}
    candidates["copy"] = lambda: target.copy_(source)
    forms = IMPLEMENTATIONS["ppo_loss"]
    numbers = {
        "cliprange_low": 0.2, "cliprange_high": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "entropy_coef": 0.0,
        "kl_coef": 0.0, "kl": "k3", "dual_clip": None, "log_ratio_clamp": 20.0, "aggregate": "token_mean",
    }  # fmt: skip
    for name in ("cuda", "triton") if device == "cuda" else ("cpp",):
        if name in forms:
            candidates[f"{name} forward"] = lambda form=forms[name]: form(*given, **numbers)
    candidates["eager forward"] = torch.no_grad()(lambda: eager(*given))
    times = interleave(candidates, device=device)
    row = {"shape": f"{batch}x{tokens}", "ours, us": times["ours"] * 1e6}
    row["GB/s"] = batch * tokens * BYTES_PER_TOKEN / times["ours"] / 1e9
    row["/ copy"] = times["ours"] / times["copy"]
    return row | {f"{name} / ours": times[name] / times["ours"] for name in times if name not in ("ours", "copy")}


def main() -> None:
    torch.manual_seed(0)
    for device in devices():
        rows = [measure(batch, tokens, device) for batch, tokens in ((16, 512), (64, 1024), (512, 2048))]
        table(f"ppo_loss on {device_name(device)}, float32, medians of interleaved runs", rows)
        print(f"written to {save('ppo_loss', device, rows)}")


if __name__ == "__main__":
    main()
