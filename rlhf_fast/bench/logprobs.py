"""logprobs against torch.compile, TRL, Liger, quack, flash-attn and what trainers write, and one sum over the logits.

Goals on two cores (256 x 151936): forward at least 18 times faster than TRL's pair of functions and within 1.8 times
``logits.sum()``; forward and backward with the entropy at least 6 times faster than eager and 4 times than
torch.compile in float32, 15 times than eager in bfloat16, with no more memory than the gradient. On an H100: 0.90 of
the read bandwidth, with backward 0.85 of the floor of three passes, and slower than nobody.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlhf_fast.bench.harness import Case, sets
from rlhf_fast.bench.peers import compiled, package_or_formula
from rlhf_fast.dispatch import IMPLEMENTATIONS
from rlhf_fast.ops import logprobs

Results = tuple[Tensor, Tensor | None]  # chosen logprobs (or their sum) and entropies, None from who has none
REMARK = (
    "Floor: each logit read once; with backward read twice and its gradient written once. Our backward reads the "
    "logits again and\nrecomputes the softmax from the saved logsumexp. Liger makes its gradient in the forward, over "
    "the logits themselves;\nquack's one-pass form too, beside them. Liger, quack and flash-attn give no entropy."
)


def trl_formula(logits: Tensor, ids: Tensor) -> Results:
    """The formulas of TRL: a row at a time (in low precision a log_softmax of each), the entropy 128 rows at a time."""
    if logits.dtype in (torch.float32, torch.float64):
        chosen = logits.gather(-1, ids[:, None])[:, 0] - torch.stack([row.logsumexp(-1) for row in logits])
    else:
        rows = zip(logits, ids, strict=True)
        chosen = torch.stack([row.log_softmax(-1).gather(-1, i[None])[0] for row, i in rows])
    entropies = []
    for chunk in logits.split(128):
        logp = chunk.log_softmax(-1)
        entropies.append(-(logp.exp() * logp).sum(-1))
    return chosen, torch.cat(entropies)


def trl_package() -> Callable[[Tensor, Tensor], Results]:
    """TRL's functions; since 1.13 one that runs its Triton kernel on a GPU."""
    from trl.trainer import utils

    if hasattr(utils, "selective_log_softmax_and_entropy"):
        return utils.selective_log_softmax_and_entropy
    return lambda logits, ids: (utils.selective_log_softmax(logits, ids), utils.entropy_from_logits(logits))


def eager(logits: Tensor, ids: Tensor) -> Results:
    """The two lines of most trainers, in float32."""
    logp = logits.float().log_softmax(-1)
    return logp.gather(-1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def verl_formula(logits: Tensor, ids: Tensor) -> Results:
    """As verl and OpenRLHF without flash-attn: logsumexp beside the gather; the entropy as ``lse - sum p z``."""
    z = logits.float()
    lse = z.logsumexp(-1)
    return z.gather(-1, ids[:, None])[:, 0] - lse, lse - (z.softmax(-1) * z).sum(-1)


def liger() -> Callable[[Tensor, Tensor], Results]:
    """Its cross entropy, forward alone."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, ids: (-liger_cross_entropy(logits, ids, reduction="none"), None)


def liger_gradient() -> Callable[[Tensor, Tensor], Tensor]:
    """The gradient by its cross entropy of a sum, its best case. It writes over the logits, so it gets its own."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    copies: dict[int, Tensor] = {}

    def call(logits: Tensor, ids: Tensor) -> Tensor:
        leaf = copies.setdefault(logits.data_ptr(), logits.detach().clone()).requires_grad_()
        return torch.autograd.grad(-liger_cross_entropy(leaf, ids, reduction="sum"), leaf)[0]

    return call


def liger_selective() -> Callable[[Tensor, Tensor], Results]:
    """The logprobs of its GRPO loss, forward only; made for [B, L + 1, V], so it leaves out the last row."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    return lambda logits, ids: (fused_selective_log_softmax(logits[None], ids[None, :-1], 1.0)[0], None)


def quack() -> Callable[[Tensor, Tensor], Results]:
    """Its cross entropy, forward alone."""
    from quack.cross_entropy import cross_entropy

    return lambda logits, ids: (-cross_entropy(logits, ids, reduction="none"), None)


def quack_one_pass() -> Callable[[Tensor, Tensor], Tensor]:
    """Its loss and gradient in one kernel, for a sum; the gradient comes back, no autograd is left to run."""
    from quack.cross_entropy import cross_entropy_fwd

    return lambda logits, ids: -cross_entropy_fwd(logits, ids, return_dx=True)[1]


def flash_attn() -> Callable[[Tensor, Tensor], Results]:
    """Its cross entropy, forward alone."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda logits, ids: (-cross_entropy_loss(logits, ids)[0], None)


def ours(logits: Tensor, ids: Tensor) -> Results:
    """The first two outputs."""
    return tuple(logprobs(logits, ids)[:2])


def gradient_of(function: Callable[[Tensor, Tensor], Results]) -> Callable[[Tensor, Tensor], Tensor]:
    """A call that gives the gradient of ``sum(logprobs + 0.01 entropy)``, or of the logprobs alone without entropy."""

    def call(logits: Tensor, ids: Tensor) -> Tensor:
        leaf = logits.detach().requires_grad_()
        chosen, entropy = function(leaf, ids)
        total = chosen.sum() if entropy is None else chosen.sum() + 0.01 * entropy.sum()
        return torch.autograd.grad(total, leaf)[0]

    return call


def form_gradient(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """One implementation, forward and backward, without autograd."""
    forward, backward = IMPLEMENTATIONS["logprobs"][name], IMPLEMENTATIONS["logprobs_backward"][name]

    def call(logits: Tensor, ids: Tensor) -> Tensor:
        chosen, entropy, lse = forward(logits, ids)
        one = torch.ones_like(chosen)
        return backward(one, 0.01 * one, torch.zeros_like(one), logits, ids, entropy, lse, temperature=1.0)

    return call


def peers(device: str, notes: dict[str, str], *, backward: bool) -> dict[str, Callable]:
    """Label → call of everybody else; why somebody is missing goes to ``notes``."""
    given = {"eager": eager, "compile": compiled(eager, device), "verl's formula": verl_formula}
    given |= package_or_formula("TRL", "trl", trl_package, trl_formula, notes)
    if device == "cuda":
        given |= package_or_formula("Liger", "liger-kernel", liger, None, notes)
        given |= package_or_formula("quack", "quack-kernels", quack, None, notes)
        given |= package_or_formula("flash-attn", "flash-attn", flash_attn, None, notes)
    else:
        notes["Liger, quack, flash-attn"] = "need a GPU"
    if backward:
        given = {name: gradient_of(call) for name, call in given.items()}
        if device == "cuda":
            given |= package_or_formula("Liger", "liger-kernel", liger_gradient, None, {})
            given |= package_or_formula("quack, one pass", "quack-kernels", quack_one_pass, None, {})
    elif device == "cuda":
        given |= package_or_formula("Liger selective", "liger-kernel", liger_selective, None, {})
    return given


def agrees(ours: Results | Tensor, theirs: Results | Tensor) -> bool:
    """To the error of TRL's bfloat16 (0.07 nats) and of a gradient without entropy; tests compare precisely."""
    a, b = (x if isinstance(x, Tensor) else x[0] for x in (ours, theirs))
    few = a.shape[0] if isinstance(theirs, Tensor) else b.shape[0]
    return bool((a[:few] - b).abs().max() < 0.3) if b.dim() else True


def case(rows: int, size: int, dtype: torch.dtype, device: str, notes: dict[str, str], *, backward: bool) -> Case:
    """Every candidate on one shape, forward or forward and backward."""

    def make() -> tuple[Tensor, Tensor]:
        logits = torch.randn(rows, size, device=device).mul_(3).to(dtype)
        return logits, torch.randint(size, (rows,), device=device)

    inputs = sets(make, device)
    given = peers(device, notes, backward=backward)
    forms = IMPLEMENTATIONS["logprobs"]
    for name in [n for n in (("cuda", "triton") if device == "cuda" else ()) if n in forms]:
        given[name] = form_gradient(name) if backward else forms[name]
    if not backward:
        given["reference"] = forms["reference"]
    return Case(
        name=f"{rows}x{size} {str(dtype).removeprefix('torch.')}{' with backward' if backward else ''}",
        bytes=inputs[0][0].nbytes * (3 if backward else 1),
        inputs=inputs,
        ours=gradient_of(ours) if backward else ours,
        peers=given,
        floors={} if backward else {"sum": lambda logits, ids: logits.sum()},
        agrees=agrees,
        forward=ours if backward else None,
        gradient=inputs[0][0].nbytes if backward else 0,
    )


def cases(device: str, notes: dict[str, str]) -> Iterator[Case]:
    """Every shape of the suite on ``device``; why a peer is missing goes to ``notes``."""
    narrow = [(8192, 32000, torch.bfloat16)] if device == "cuda" else []
    rows = 8192 if device == "cuda" else 256
    for backward in (False, True):
        for shape in [(rows, 151936, torch.float32), (rows, 151936, torch.bfloat16), *narrow]:
            yield case(*shape, device, notes, backward=backward)
