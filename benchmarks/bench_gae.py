"""gae against its reference, torch.compile of it, the loops that trainers run, and a copy of the same bytes.

Goals (two cores): at 64 x 1024 at least 300 times faster than a loop that carries over holes and 100 times faster than
a plain one, at 512 x 1024 at least 60 and 25 times, and within 3 times a copy of the bytes it must move.
"""

import torch
from harness import device_name, devices, interleave, save, table
from torch import Tensor

from rlhf_fast.dispatch import IMPLEMENTATIONS
from rlhf_fast.ops import gae

BYTES_PER_TOKEN = 17  # reads rewards, values (4 + 4) and mask (1), writes advantages and returns (4 + 4)


def plain_loop(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """A token at a time, the mask already applied: what TRL and OpenRLHF do."""
    advantage, columns = 0.0, []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        advantage = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def carrying_loop(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """A token at a time, stepping over holes by carrying both states: what verl does."""
    weight, following, advantage, columns = mask.float(), 0.0, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        m = weight[:, t]
        here = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage
        following = values[:, t] * m + (1 - m) * following
        advantage = here * m + (1 - m) * advantage
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def measure(batch: int, tokens: int, device: str, *, packed: bool = False) -> dict:
    """One row of the table: every candidate on one shape; the loops and the compiled reference where T is small."""
    shape = (tokens,) if packed else (batch, tokens)
    rewards, values = torch.randn(shape, device=device), torch.randn(shape, device=device)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    offsets = torch.tensor([0, tokens], device=device) if packed else None
    source = torch.randint(256, (rewards.numel() * BYTES_PER_TOKEN // 2,), dtype=torch.uint8, device=device)
    numbers = {"gamma": 1.0, "lam": 0.95}
    forms = IMPLEMENTATIONS["gae"]
    candidates = {"ours": lambda: gae(rewards, values, mask, cu_seqlens=offsets, **numbers)}
    candidates["copy"] = source.clone  # into new memory, as the results of gae are
    names = ("cuda", "triton") if device == "cuda" else ("cpp",)
    for name in [n for n in (*names, "reference") if n in forms]:
        candidates[name] = lambda form=forms[name]: form(rewards, values, mask, None, offsets, **numbers)
    if not packed and tokens <= 1024:
        compiled = torch.compile(forms["reference"], dynamic=False)
        candidates["compile"] = lambda: compiled(rewards, values, mask, **numbers)
        candidates["loop (TRL)"] = lambda: plain_loop(rewards, values, **numbers)
        candidates["loop (verl)"] = lambda: carrying_loop(rewards, values, mask, **numbers)
        for name, ours, theirs in (
            ("plain", gae(rewards, values, mask, **numbers), plain_loop(rewards, values, **numbers)),
            ("carrying", gae(rewards, values, mask, **numbers), carrying_loop(rewards, values, mask, **numbers)),
        ):
            assert torch.allclose(ours[0], theirs[0], atol=1e-4), f"the {name} loop computes something else"
    times = interleave(candidates, device=device)
    row = {"shape": f"1x{tokens} packed" if packed else f"{batch}x{tokens}", "ours, us": times["ours"] * 1e6}
    row["GB/s"] = rewards.numel() * BYTES_PER_TOKEN / times["ours"] / 1e9
    row["/ copy"] = times["ours"] / times["copy"]
    return row | {f"{name} / ours": times[name] / times["ours"] for name in times if name not in ("ours", "copy")}


def main() -> None:
    torch.manual_seed(0)
    for device in devices():
        shapes = [(64, 1024), (512, 1024)] + ([(4096, 8192)] if device == "cuda" else [(64, 8192)])
        rows = [measure(batch, tokens, device) for batch, tokens in shapes]
        rows.append(measure(1, 2**20, device, packed=True))
        table(f"gae on {device_name(device)}, float32, medians of interleaved runs", rows)
        print(f"written to {save('gae', device, rows)}")


if __name__ == "__main__":
    main()
