"""advantages against the three functions whose place it takes, torch.compile of them and a copy of the same bytes.

The pieces are shape_rewards, gae (already a kernel) and whiten, one after the other, as a trainer calls them.
"""

import torch
from harness import device_name, devices, interleave, save, table

from rlhf_fast import advantages, gae, shape_rewards, whiten
from rlhf_fast.dispatch import IMPLEMENTATIONS

# Reads logprobs, ref_logprobs, values (4 + 4 + 4) and mask (1), writes advantages, returns and rewards (4 + 4 + 4).
# Whitening reads and writes the advantages once more (4 + 4), for it must have seen all of them.
BYTES_PER_TOKEN = 33


def measure(batch: int, tokens: int, device: str, kl: str) -> dict:
    """One row of the table: responses of different lengths."""
    logprobs, noise, values = (torch.randn(batch, tokens, device=device) for _ in range(3))
    refs, scores = logprobs + 0.1 * noise, torch.randn(batch, device=device)
    lengths = torch.randint(tokens // 2, tokens + 1, (batch, 1), device=device)
    mask = torch.arange(tokens, device=device) < lengths
    source = torch.randint(256, (mask.numel() * BYTES_PER_TOKEN // 2,), dtype=torch.uint8, device=device)
    given, forms = (scores, logprobs, refs, values, mask), IMPLEMENTATIONS["advantages"]

    def pieces():
        rewards = shape_rewards(scores, logprobs, refs, mask, kl_coef=0.05, kl=kl)
        found, returns = gae(rewards, values, mask)
        return whiten(found, mask), returns, rewards

    candidates = {"ours": lambda: advantages(*given, kl_coef=0.05, kl=kl), "copy": source.clone, "pieces": pieces}
    for ours, theirs in zip(candidates["ours"](), pieces(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4), "the pieces compute something else"
    for name in [n for n in ("cuda", "triton") if device == "cuda" and n in forms]:
        candidates[name] = lambda form=forms[name]: form(*given, kl_coef=0.05, kl=kl)
    compiled = torch.compile(forms["reference"], dynamic=False)
    candidates["compile"] = lambda: compiled(*given, kl_coef=0.05, kl=kl)
    times = interleave(candidates, device=device)
    row = {"shape": f"{batch}x{tokens} {kl}", "ours, us": times["ours"] * 1e6}
    row |= {"GB/s": mask.numel() * BYTES_PER_TOKEN / times["ours"] / 1e9, "/ copy": times["ours"] / times["copy"]}
    return row | {f"{name} / ours": times[name] / times["ours"] for name in times if name not in ("ours", "copy")}


def main() -> None:
    torch.manual_seed(0)
    for device in devices():
        shapes = [(64, 53, "k1"), (64, 1024, "k1"), (64, 1024, "k3"), (512, 1024, "k1")]
        shapes += [(4096, 8192, "k1")] if device == "cuda" else []
        rows = [measure(batch, tokens, device, kl) for batch, tokens, kl in shapes]
        table(f"advantages on {device_name(device)}, float32, medians of interleaved runs", rows)
        print(f"written to {save('advantages', device, rows)}")


if __name__ == "__main__":
    main()
