"""advantages against the three functions whose place it takes, torch.compile of them and a copy of the same bytes.

The pieces are shape_rewards, gae (already a kernel) and whiten, one after the other, as a trainer calls them.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlhf_fast import advantages, gae, shape_rewards, whiten
from rlhf_fast.bench.harness import Case, sets, turning
from rlhf_fast.bench.peers import compiled
from rlhf_fast.dispatch import IMPLEMENTATIONS

# Reads logprobs, ref_logprobs, values (4 + 4 + 4) and mask (1), writes advantages, returns and rewards (4 + 4 + 4).
# Whitening reads and writes the advantages once more (4 + 4), for it must have seen all of them.
BYTES_PER_TOKEN = 33
REMARK = "Floor: 33 bytes a token, each tensor once and the advantages twice, for whitening must have seen all of them."


def agrees(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    """All three outputs."""
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


def case(batch: int, tokens: int, device: str, kl: str) -> Case:
    """Every candidate on one shape: responses of different lengths."""
    half, forms = batch * tokens * BYTES_PER_TOKEN // 2, IMPLEMENTATIONS["advantages"]
    copy = turning(torch.clone, sets(lambda: (torch.randint(256, (half,), dtype=torch.uint8, device=device),), device))

    def make() -> tuple[Tensor, ...]:
        logprobs, noise, values = (torch.randn(batch, tokens, device=device) for _ in range(3))
        lengths = torch.randint(tokens // 2, tokens + 1, (batch, 1), device=device)
        mask = torch.arange(tokens, device=device) < lengths
        return torch.randn(batch, device=device), logprobs, logprobs + 0.1 * noise, values, mask

    def pieces(scores: Tensor, logprobs: Tensor, refs: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        rewards = shape_rewards(scores, logprobs, refs, mask, kl_coef=0.05, kl=kl)
        found, returns = gae(rewards, values, mask)
        return whiten(found, mask), returns, rewards

    given: dict[str, Callable] = {"pieces": pieces}
    for name in [n for n in (*(("cuda", "triton") if device == "cuda" else ("cpp",)), "reference") if n in forms]:
        given[name] = lambda *tensors, form=forms[name]: form(*tensors, kl_coef=0.05, kl=kl)
    whole = compiled(forms["reference"], device)
    given["compile"] = lambda *tensors: whole(*tensors, kl_coef=0.05, kl=kl)
    return Case(
        name=f"{batch}x{tokens} {kl}",
        bytes=batch * tokens * BYTES_PER_TOKEN,
        inputs=sets(make, device),
        ours=lambda *tensors: advantages(*tensors, kl_coef=0.05, kl=kl),
        peers=given,
        floors={"copy": lambda *_: copy()},
        agrees=agrees,
    )


def cases(device: str, notes: dict[str, str]) -> Iterator[Case]:
    """Every shape of the suite on ``device``; why a peer is missing goes to ``notes``."""
    for batch, tokens, kl in ((64, 53, "k1"), (64, 1024, "k1"), (64, 1024, "k3"), (512, 1024, "k1")):
        yield case(batch, tokens, device, kl)
    if device == "cuda":
        yield case(4096, 8192, device, "k1")
