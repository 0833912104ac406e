"""gae against its reference, torch.compile of it, the loops that trainers run, and a copy of the same bytes.

Goals (two cores): at 64 x 1024 at least 300 times faster than a loop that carries over holes and 100 times faster than
a plain one, at 512 x 1024 at least 60 and 25 times, and within 3 times a copy of the bytes it must move. On an H100:
64 x 1024 in 6 us, 512 x 1024 in 8 us, 4096 x 8192 within 1.3 times a copy, 1 M packed tokens within 3 times.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlhf_fast.bench.harness import Case, sets, turning
from rlhf_fast.bench.peers import compiled, package_or_formula
from rlhf_fast.dispatch import IMPLEMENTATIONS
from rlhf_fast.ops import gae

BYTES_PER_TOKEN = 17  # reads rewards, values (4 + 4) and mask (1), writes advantages and returns (4 + 4)
NUMBERS = {"gamma": 1.0, "lam": 0.95}
REMARK = (
    "Floor: 17 bytes a token, the five tensors once each. TRL's loop takes the mask as applied already, verl's carries "
    "over holes;\nverl's own function also whitens. GB/s of a short call on a GPU are of its time in a CUDA graph."
)


def trl_formula(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A token at a time, the mask already applied: what TRL and OpenRLHF do."""
    gamma, lam = NUMBERS.values()
    advantage, columns = 0.0, []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        advantage = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def verl_formula(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A token at a time, stepping over holes by carrying both states: what verl does."""
    gamma, lam = NUMBERS.values()
    weight, following, advantage, columns = mask.float(), 0.0, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        m = weight[:, t]
        here = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage
        following = values[:, t] * m + (1 - m) * following
        advantage = here * m + (1 - m) * advantage
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def verl_package() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """verl's function; its advantages come whitened, its returns do not."""
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    return lambda rewards, values, mask: compute_gae_advantage_return(rewards, values, mask.float(), *NUMBERS.values())


def loops(notes: dict[str, str]) -> dict[str, Callable]:
    """Label → call of the loops."""
    return {"TRL's formula": trl_formula} | package_or_formula("verl", "verl", verl_package, verl_formula, notes)


def agrees(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    """By the returns, which nobody whitens."""
    return torch.allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-3)


def case(batch: int, tokens: int, device: str, notes: dict[str, str], *, packed: bool = False) -> Case:
    """Every candidate on one shape; the loops and the compiled reference where T is small."""
    shape = (tokens,) if packed else (batch, tokens)
    offsets = torch.tensor([0, tokens], device=device) if packed else None
    count = batch * tokens
    half = count * BYTES_PER_TOKEN // 2
    copy = turning(torch.clone, sets(lambda: (torch.randint(256, (half,), dtype=torch.uint8, device=device),), device))

    def make() -> tuple[Tensor, Tensor, Tensor]:
        return (*(torch.randn(shape, device=device) for _ in range(2)), torch.ones(shape, dtype=torch.bool).to(device))

    forms = IMPLEMENTATIONS["gae"]
    given: dict[str, Callable] = {}
    for name in [n for n in (*(("cuda", "triton") if device == "cuda" else ("cpp",)), "reference") if n in forms]:
        given[name] = lambda *tensors, form=forms[name]: form(*tensors, None, offsets, **NUMBERS)
    if not packed and tokens <= 1024:
        whole = compiled(forms["reference"], device)
        given["compile"] = lambda *tensors: whole(*tensors, **NUMBERS)
        given |= loops(notes)
    return Case(
        name=f"1x{tokens} packed" if packed else f"{batch}x{tokens}",
        bytes=count * BYTES_PER_TOKEN,
        inputs=sets(make, device),
        ours=lambda *tensors: gae(*tensors, cu_seqlens=offsets, **NUMBERS),
        peers=given,
        floors={"copy": lambda *_: copy()},  # into new memory, as the results of gae are
        agrees=agrees,
    )


def cases(device: str, notes: dict[str, str]) -> Iterator[Case]:
    """Every shape of the suite on ``device``; why a peer is missing goes to ``notes``."""
    for shape in ((64, 1024), (512, 1024), (4096, 8192) if device == "cuda" else (64, 8192)):
        yield case(*shape, device, notes)
    yield case(1, 2**20, device, notes, packed=True)
