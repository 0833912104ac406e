"""kl against its reference, torch.compile, the eager formula and Liger, forward and with its gradient.

Goals (H100, bf16): with backward at least 0.80 of the floor of three passes over a model's logits, and 5 times
torch.compile. On the CPU there is no number to meet; the same ratios are printed.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlhf_fast.bench.harness import Case, sets
from rlhf_fast.bench.peers import compiled, package_or_formula
from rlhf_fast.dispatch import IMPLEMENTATIONS
from rlhf_fast.ops import kl

Results = tuple[Tensor, Tensor | None]  # KL per row (or their sum) and the chosen logprobs, None from who has none
REMARK = (
    "Floor: both logits read once; with backward 3 N V b, the gradient written and nothing read again. Our backward "
    "reads both again\nand recomputes both softmaxes from the saved logsumexps: 5 N V b. Liger takes torch's "
    "log_softmax, gives the mean alone\nand makes its gradient in the forward."
)


def eager(logits: Tensor, ref_logits: Tensor, ids: Tensor) -> Results:
    """KL and chosen logprob as most trainers write them, in float32."""
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1), logp.gather(-1, ids[:, None])[:, 0]


def kl_div(logits: Tensor, ref_logits: Tensor, ids: Tensor) -> Results:
    """The same with torch's own kl_div, as the distillation trainers of TRL."""
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    divergence = torch.nn.functional.kl_div(ref_logp, logp, reduction="none", log_target=True).sum(-1)
    return divergence, logp.gather(-1, ids[:, None])[:, 0]


def liger() -> Callable[[Tensor, Tensor, Tensor], Results]:
    """Its Jensen-Shannon divergence at beta 1, which is KL(policy || reference)."""
    from liger_kernel.transformers.functional import liger_jsd

    def call(logits: Tensor, ref_logits: Tensor, ids: Tensor) -> Results:
        logp = logits.float().log_softmax(-1)
        return liger_jsd(logp, ref_logits.float().log_softmax(-1), beta=1.0) * len(ids), None

    return call


def ours(logits: Tensor, ref_logits: Tensor, ids: Tensor) -> Results:
    """The first two of our four."""
    return tuple(kl(logits, ref_logits, ids)[:2])


def gradient_of(function: Callable[..., Results]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A call that gives the gradient of ``sum(kl - 0.1 logprobs)``, or of the KL alone without logprobs."""

    def call(logits: Tensor, ref_logits: Tensor, ids: Tensor) -> Tensor:
        leaf = logits.detach().requires_grad_()
        divergence, chosen = function(leaf, ref_logits, ids)
        total = divergence.sum() if chosen is None else divergence.sum() - 0.1 * chosen.sum()
        return torch.autograd.grad(total, leaf)[0]

    return call


def form_gradient(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One implementation, forward and backward, without autograd."""
    forward, backward = IMPLEMENTATIONS["kl"][name], IMPLEMENTATIONS["kl_backward"][name]

    def call(logits: Tensor, ref_logits: Tensor, ids: Tensor) -> Tensor:
        divergence, _, _, entropy, lse, ref_lse = forward(logits, ref_logits, ids)
        one = torch.ones_like(divergence)
        grads = one, -0.1 * one, torch.zeros_like(one)
        return backward(*grads, logits, ref_logits, divergence, entropy, lse, ref_lse, ids, temperature=1.0)

    return call


def peers(device: str, notes: dict[str, str], *, backward: bool) -> dict[str, Callable]:
    """Label → call of everybody else; why somebody is missing goes to ``notes``."""
    given = {"eager": eager, "kl_div": kl_div, "compile": compiled(eager, device)}
    if device != "cuda":
        notes["Liger"] = "needs a GPU"
    else:
        given |= package_or_formula("Liger", "liger-kernel", liger, None, notes)
    return {name: gradient_of(call) for name, call in given.items()} if backward else given


def agrees(ours: Results | Tensor, theirs: Results | Tensor) -> bool:
    """Roughly; tests compare precisely."""
    a, b = (x if isinstance(x, Tensor) else x[0] for x in (ours, theirs))
    if b.dim() == 0:
        return bool((a.sum() - b).abs() < 1e-2 * a.sum())
    return bool((a - b).abs().max() < 0.2)


def case(rows: int, size: int, dtype: torch.dtype, device: str, notes: dict[str, str], *, backward: bool) -> Case:
    """Every candidate on one shape, forward or forward and backward."""

    def make() -> tuple[Tensor, ...]:
        logits, ref_logits = (torch.randn(rows, size, device=device).mul_(3).to(dtype) for _ in range(2))
        return logits, ref_logits, torch.randint(size, (rows,), device=device)

    inputs = sets(make, device)
    given = peers(device, notes, backward=backward)
    forms = IMPLEMENTATIONS["kl"]
    for name in [n for n in (("cuda", "triton") if device == "cuda" else ()) if n in forms]:
        given[name] = form_gradient(name) if backward else forms[name]
    if not backward:
        given["reference"] = forms["reference"]
    return Case(
        name=f"{rows}x{size} {str(dtype).removeprefix('torch.')}{' with backward' if backward else ''}",
        bytes=inputs[0][0].nbytes * (3 if backward else 2),
        inputs=inputs,
        ours=gradient_of(ours) if backward else ours,
        peers=given,
        agrees=agrees,
        forward=ours if backward else None,
        gradient=inputs[0][0].nbytes if backward else 0,
    )


def cases(device: str, notes: dict[str, str]) -> Iterator[Case]:
    """Every shape of the suite on ``device``; why a peer is missing goes to ``notes``."""
    rows = 8192 if device == "cuda" else 256
    for backward in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            yield case(rows, 151936, dtype, device, notes, backward=backward)
