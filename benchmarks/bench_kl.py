"""kl against its reference, torch.compile and the eager formula, forward and with its gradient.

Goals (H100, bf16): with backward at least 0.80 of the floor of three reads or writes of the logits, and 5 times
torch.compile. On the CPU there is no number to meet; the same ratios are printed.
"""

from collections.abc import Callable

import torch
from harness import device_name, devices, interleave, save, table
from torch import Tensor

from rlhf_fast.dispatch import IMPLEMENTATIONS
from rlhf_fast.ops import kl


def eager(logits: Tensor, ref_logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """KL and chosen logprob as most trainers write them, in float32."""
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1), logp.gather(-1, ids[:, None])[:, 0]


def ours(logits: Tensor, ref_logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same two of our four."""
    return tuple(kl(logits, ref_logits, ids)[:2])


def with_backward(function: Callable, logits: Tensor, ref_logits: Tensor, ids: Tensor) -> Callable[[], Tensor]:
    """A call that gives the gradient of ``sum(0.1 kl - logprobs)``."""
    leaf = logits.detach().requires_grad_()

    def call() -> Tensor:
        divergence, chosen = function(leaf, ref_logits, ids)
        (gradient,) = torch.autograd.grad((0.1 * divergence - chosen).sum(), leaf)
        return gradient

    return call


def measure(rows: int, size: int, dtype: torch.dtype, device: str, *, backward: bool) -> dict:
    """One row of the table: every candidate on one shape, forward or forward and backward."""
    logits, ref_logits = (torch.randn(rows, size, device=device).mul_(3).to(dtype) for _ in range(2))
    ids = torch.randint(size, (rows,), device=device)
    functions = {"ours": ours, "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    tensors = logits, ref_logits, ids
    if backward:
        candidates = {name: with_backward(f, *tensors) for name, f in functions.items()}
        assert torch.allclose(candidates["ours"](), candidates["eager"](), atol=1e-3)
    else:
        candidates = {name: lambda f=f: f(*tensors) for name, f in functions.items()}
        forms = IMPLEMENTATIONS["kl"]
        for name in [n for n in (("cuda", "triton") if device == "cuda" else ()) if n in forms]:
            candidates[name] = lambda form=forms[name]: form(*tensors)
        candidates["reference"] = lambda: forms["reference"](*tensors)
    target = torch.empty_like(logits)
    candidates["copy"] = lambda: target.copy_(logits)
    times = interleave(candidates, device=device)
    bytes_moved = logits.numel() * logits.element_size() * (5 if backward else 2)  # two kernels: 2 reads, then 2 + 1
    what = f"{rows}x{size} {str(dtype).removeprefix('torch.')}{' with backward' if backward else ''}"
    row = {"shape": what, "ours, ms": times["ours"] * 1e3, "GB/s": bytes_moved / times["ours"] / 1e9}
    row["/ copy"] = times["ours"] / times.pop("copy")
    return row | {f"{name} / ours": times[name] / times["ours"] for name in times if name != "ours"}


def main() -> None:
    torch.manual_seed(0)
    for device in devices():
        rows, size = (8192, 151936) if device == "cuda" else (256, 151936)
        results = []
        for backward in (False, True):
            found = [measure(rows, size, d, device, backward=backward) for d in (torch.float32, torch.bfloat16)]
            title = f"kl on {device_name(device)}, medians of interleaved runs"
            table("with backward" if backward else title, found)
            results += found
        print(f"written to {save('kl', device, results)}")


if __name__ == "__main__":
    main()
