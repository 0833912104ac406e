"""Linear layers in float32 on the CPU, by whichever of PyTorch's two libraries is the faster one there.

PyTorch multiplies float32 matrices by MKL, which keeps to AVX2 on AMD's processors: on a Zen 5 core it reaches
113 GFLOP/s where oneDNN, which PyTorch brings along too, reaches 250 with AVX-512. It asks oneDNN only where products
may be rounded to bfloat16. oneDNN makes use of that leave where a processor has AMX; elsewhere it computes in float32
all the same, and there, where a trial shows it, the leave is given.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CPUINFO = Path("/proc/cpuinfo")
LEAST = 2**20  # multiplications below which the call is what takes the time


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Let oneDNN compute linear layers, forward and backward, where ``onednn_is_better``; no number is rounded more."""
    with _Layers() if onednn_is_better() else contextlib.nullcontext():
        yield


@cache
def onednn_is_better() -> bool:
    """Whether MKL is the slower one (an AMD processor with AVX-512) and oneDNN rounds nothing to bfloat16."""
    known = hasattr(torch.backends.mkldnn, "matmul") and torch.backends.mkldnn.is_available()  # torch 2.9 and later
    if not known or not torch.backends.mkl.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "AuthenticAMD" not in _cpuinfo():
        return False
    return not _rounds()


def bfloat16_is_native(device: torch.device) -> bool:
    """Whether products of bfloat16 are the faster ones on ``device``: a CPU needs instructions for them."""
    return device.type == "cuda" or any(word in _cpuinfo() for word in ("avx512_bf16", "amx_bf16"))


class _Layers(TorchFunctionMode):
    """Takes the calls of a layer's product; attention is left alone, whose many small ones suit MKL better."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear and 2 <= len(args) <= 3 and set(kwargs) <= {"bias"}:
            x, weight, bias = args[0], args[1], args[2] if len(args) == 3 else kwargs.get("bias")
            if x.dim() >= 2 and weight.dim() == 2 and _fit(x, weight, bias):
                return _Product.apply(x.reshape(-1, x.shape[-1]), weight.t(), bias).unflatten(0, x.shape[:-1])
        elif func is torch.addmm and len(args) == 3 and not kwargs:  # transformers' Conv1D
            bias, x, weight = args
            if bias.dim() == 1 and _fit(x, weight, bias):
                return _Product.apply(x, weight, bias)
        return func(*args, **kwargs)


class _Product(torch.autograd.Function):
    """``x @ weight + bias``, and its derivatives, by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [N, H], [H, K], [K] → [N, K]
        ctx.save_for_backward(x, weight)
        with _onednn():
            return x @ weight if bias is None else torch.addmm(bias, x, weight)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        with _onednn():
            return (
                slope @ weight.t() if wanted[0] else None,
                x.t() @ slope if wanted[1] else None,
                slope.sum(0) if wanted[2] else None,
            )


def _fit(x: Any, weight: Any, bias: Any) -> bool:
    """Whether these are float32 on the CPU, nobody wants them in another dtype, and they are worth it."""
    some = [x, weight] if bias is None else [x, weight, bias]
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in some) or torch.is_autocast_enabled("cpu"):
        return False
    if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in some):  # vmap knows F.linear, not _Product
        return False
    return bool(x.shape[-1] > 0 and x.numel() * weight.numel() >= LEAST * x.shape[-1])


@contextlib.contextmanager
def _onednn() -> Iterator[None]:
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _cpuinfo() -> str:
    return CPUINFO.read_text() if CPUINFO.exists() else ""


def _rounds() -> bool:
    """Whether a product loses the bits that bfloat16 has no room for."""
    x = torch.full((64, 64), 1 + 2**-12)
    with _onednn():
        found = [x @ x, x.t() @ x, torch.addmm(torch.zeros(64), x, x.t())]
    exact = 64 * (1 + 2**-12) ** 2  # 64 if its factors were rounded
    return any(bool(((product.double() - exact).abs() > 64 * 2**-20).any()) for product in found)
