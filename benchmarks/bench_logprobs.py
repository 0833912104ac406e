"""logprobs against its reference, torch.compile, what trainers write, and one sum over the logits.

Goals (two cores, 256 rows of 151936): forward at least 18 times faster than TRL's pair of functions and within 1.8
times ``logits.sum()``; forward and backward with the entropy at least 6 times faster than eager and 4 times than
torch.compile in float32, 15 times than eager in bfloat16, with no more memory than the gradient.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from harness import device_name, devices, interleave, save, table
from torch import Tensor

from rlhf_fast.dispatch import IMPLEMENTATIONS
from rlhf_fast.ops import logprobs


def trl(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
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


def eager(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The two lines of most trainers, in float32."""
    logp = logits.float().log_softmax(-1)
    return logp.gather(-1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def ours(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The first two outputs."""
    return tuple(logprobs(logits, ids)[:2])


def with_backward(function: Callable, logits: Tensor, ids: Tensor) -> Callable[[], Tensor]:
    """A call that gives the gradient of ``sum(logprobs + 0.01 entropy)``."""
    leaf = logits.detach().requires_grad_()

    def call() -> Tensor:
        chosen, entropy = function(leaf, ids)
        (gradient,) = torch.autograd.grad((chosen + 0.01 * entropy).sum(), leaf)
        return gradient

    return call


def peak_bytes(call: Callable, device: str) -> int:
    """How far memory rises while ``call`` runs; -1 where Linux does not let the mark be reset."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return -1
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def measure(rows: int, size: int, dtype: torch.dtype, device: str, *, backward: bool) -> dict:
    """One row of the table: every candidate on one shape, forward or forward and backward."""
    logits, ids = torch.randn(rows, size, device=device).mul_(3).to(dtype), torch.randint(size, (rows,), device=device)
    compiled = torch.compile(eager, dynamic=False)
    functions = {"ours": ours, "eager": eager, "compile": compiled, "TRL": trl}
    if backward:
        candidates = {name: with_backward(f, logits, ids) for name, f in functions.items() if name != "TRL"}
        assert torch.allclose(candidates["ours"](), candidates["eager"](), atol=1e-3)
        target = torch.empty_like(logits)
        candidates["copy"] = lambda: target.copy_(logits)
    else:
        candidates = {name: lambda f=f: f(logits, ids) for name, f in functions.items()}
        forms = IMPLEMENTATIONS["logprobs"]
        for name in [n for n in (("cuda", "triton") if device == "cuda" else ()) if n in forms]:
            candidates[name] = lambda form=forms[name]: form(logits, ids)
        candidates["reference"] = lambda: forms["reference"](logits, ids)
        candidates["sum"] = lambda: logits.sum()
    times = interleave(candidates, device=device)
    bytes_moved = logits.numel() * logits.element_size() * (3 if backward else 1)
    what = f"{rows}x{size} {str(dtype).removeprefix('torch.')}{' with backward' if backward else ''}"
    row = {"shape": what, "ours, ms": times["ours"] * 1e3, "GB/s": bytes_moved / times["ours"] / 1e9}
    floor = "copy" if backward else "sum"
    row[f"/ {floor}"] = times["ours"] / times.pop(floor)
    row |= {f"{name} / ours": times[name] / times["ours"] for name in times if name != "ours"}
    peak = peak_bytes(candidates["ours"], device)
    return row | {"peak / logits": peak / (logits.numel() * logits.element_size())}


def main() -> None:
    torch.manual_seed(0)
    for device in devices():
        shapes = [(256, 151936)] if device == "cpu" else [(8192, 151936), (8192, 32000)]
        cases = [(rows, size, dtype) for rows, size in shapes for dtype in (torch.float32, torch.bfloat16)]
        forward = [measure(*case, device, backward=False) for case in cases]
        table(f"logprobs on {device_name(device)}, medians of interleaved runs", forward)
        both = [measure(*case, device, backward=True) for case in cases]
        table("forward and backward, with the entropy", both)
        print(f"written to {save('logprobs', device, forward + both)}")


if __name__ == "__main__":
    main()
