"""The one place that decides which implementation of an op runs.

PyTorch's own dispatcher makes the choice, by the device of the tensors. An op called ``gae`` is served by the first of
these that this machine has:

    CPU     ``_cpu.gae``    (csrc/cpu/gae.cpp)
    CUDA    ``_cuda.gae``   (kernels/cuda/gae.cu), ``triton_kernels.gae.gae`` (kernels/triton/gae.py), as CHOICES has it
    any     the reference, written in plain PyTorch beside the op (rlhf_fast/ops/gae.py)

Calling convention of every kernel: the arguments of the op's schema in their order, then its outputs, already
allocated. A Triton kernel gets tensors; a compiled one gets ``(address, dtype code, shape, strides)`` for each tensor,
``None`` for an absent one, and on CUDA the device index and the stream at the end.
"""

import ctypes
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIBRARY = torch.library.Library("rlhf_fast", "DEF")
#: op → implementation ("reference", "cpp", "cuda", "triton") → a function with the arguments of the op's schema.
IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {}
#: op → implementation → why this machine does not have it.
ABSENT: dict[str, dict[str, str]] = {}


class Choice(NamedTuple):
    """Which kernels may serve an op on a GPU, best first, and what says so."""

    order: tuple[str, ...]
    argument: str  # what speaks for this order before any GPU has spoken: bytes, launches
    measured: str = ""  # the GPU of the results under benchmarks/results that say so; none yet where empty


#: Op, with its backward → the choice. One order for all dtypes and sizes, for no argument here has a size or a dtype at
#: which it turns around: the kernels of an op move the same bytes, and what differs is a constant per call.
CHOICES = {
    "advantages": Choice(
        ("cuda", "triton"), "CUDA keeps a token in registers from scan to store, Triton loads it twice"
    ),
    "gae": Choice(("cuda", "triton"), "CUDA keeps a token in registers from scan to store, Triton loads it twice"),
    "kl": Choice(("cuda", "triton"), "both read each logit once; a call of Triton's costs more host time"),
    "logprobs": Choice(("cuda", "triton"), "both read each logit once; a call of Triton's costs more host time"),
    "ppo_loss": Choice(
        ("cuda", "triton"),
        "launches decide below 1 M tokens: CUDA takes 2 or 3, Triton also PyTorch's sums of the mask",
    ),
    "sample": Choice(("cuda", "triton"), "a step of decoding is short, and a call of Triton's costs more host time"),
}
#: The dtype codes of csrc/ops.h.
DTYPE_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.bool: 6,
    torch.int8: 7,
}


def define(
    schema: str,
    reference: Callable,
    fake: Callable,
    *,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    scratch: Callable | None = None,
) -> Callable:
    """Declare the op of ``schema``, bind its kernels and return it as a function.

    ``fake`` returns empty outputs of the right shape, dtype and device; it serves tracing and allocates for the
    kernels. ``backward`` and ``setup_context`` are those of ``torch.library.register_autograd``; without them a
    gradient that reaches the op raises, for an output that looks differentiable and is not is worse. In the schema all
    tensors come first (their device decides, and PyTorch differentiates no keyword-only tensor), then the numbers.
    ``scratch`` returns a tensor that the CUDA kernel is given behind the outputs, as room from one launch to the next.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rlhf_fast::{name}", fake, lib=LIBRARY)
    op: Callable = getattr(torch.ops.rlhf_fast, name).default
    kernels: dict[torch._C.DispatchKey, Callable] = {}
    autograd = _autograd(op, backward or _no_backward(name), setup_context, kernels)
    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    IMPLEMENTATIONS[name], ABSENT[name] = {"reference": reference}, {}
    for implementation, find in FINDERS.items():
        kernel = find(name)
        if isinstance(kernel, str):
            ABSENT[name][implementation] = kernel
        else:
            room = scratch if implementation == "cuda" else None
            bound = bind(op, fake, kernel, compiled=implementation != "triton", scratch=room)
            IMPLEMENTATIONS[name][implementation] = bound
    for device in ("CPU", "CUDA"):
        if serving(name, device) != "reference":
            kernel = kernels[getattr(torch._C.DispatchKey, device)] = IMPLEMENTATIONS[name][serving(name, device)]
            LIBRARY.impl(name, kernel, device)
    return op


def bind(op: Any, fake: Callable, kernel: Callable, *, compiled: bool, scratch: Callable | None = None) -> Callable:
    """Turn ``kernel``, which fills outputs, into a function with the arguments of ``op`` that returns them."""
    parameters = [(a.name, a.default_value) for a in op._schema.arguments]

    def launch(*args: Any, **kwargs: Any) -> Any:
        outputs = fake(*args, **kwargs)
        given = [*args, *[kwargs.get(name, default) for name, default in parameters[len(args) :]]]
        given += outputs if isinstance(outputs, tuple) else (outputs,)
        if scratch is not None:
            given.append(scratch(*args, **kwargs))
        device = args[0].device
        if not compiled:
            with (
                torch.cuda.device(device) if device.type == "cuda" else nullcontext()
            ):  # Triton launches on the current
                kernel(*given)
            return outputs
        views = [_view(a) if isinstance(a, Tensor) else a for a in given]
        if device.type == "cuda":
            kernel(*views, device.index, torch.cuda.current_stream(device).cuda_stream)
        else:
            kernel(*views)
        return outputs

    return launch


def _autograd(op: Any, backward: Callable, setup_context: Callable | None, kernels: dict) -> Callable:
    """The op above autograd, as ``torch.library.register_autograd`` makes it, at 3 us a call.

    That one looks every default up in the schema at each call, 75 us for an op of twenty arguments, and goes through
    the dispatcher once more, 2.5 us, even where nothing but a kernel of ``kernels`` is left below autograd.
    """
    arguments = op._schema.arguments
    positional = [a.default_value for a in arguments if not a.kwarg_only]
    numbers = {a.name: a.default_value for a in arguments if a.kwarg_only}

    def below(keyset: Any, args: Sequence, kwargs: dict) -> Any:
        left = keyset & torch._C._after_autograd_keyset
        kernel = kernels.get(left.highestPriorityTypeId())
        if kernel is not None:
            return kernel(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(left, *args, **kwargs)

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset, kwargs = args
        output = below(keyset, inputs, kwargs)
        if setup_context is not None:
            setup_context(ctx, tuple(inputs), {**numbers, **kwargs}, output)
        return output

    def pull_back(ctx: Any, *grads: Any) -> tuple:
        result = backward(ctx, *grads)
        return (*(result if isinstance(result, tuple) else (result,)), None, None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(pull_back)}
    node: Any = type(f"{op._opname}_node", (torch.autograd.Function,), methods)

    def autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            for a in args:
                if isinstance(a, Tensor) and a.requires_grad:
                    # The dispatcher leaves out defaults.
                    return node.apply(*args, *positional[len(args) :], keyset, kwargs)
        return below(keyset, args, kwargs)

    return autograd


def candidates(op: str, device: str) -> tuple[str, ...]:
    """The kernels that may serve ``op`` on ``device`` ("CPU" or "CUDA"), best first."""
    return ("cpp",) if device == "CPU" else CHOICES[op.removesuffix("_backward")].order


def serving(op: str, device: str) -> str:
    """The name of the implementation that serves ``op`` on ``device``."""
    return next((c for c in candidates(op, device) if c in IMPLEMENTATIONS[op]), "reference")


def _view(tensor: Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.shape, tensor.stride()


def _no_backward(name: str) -> Callable:
    def backward(*_: Any) -> Any:
        raise NotImplementedError(f"{name} has no derivative: detach its inputs or do not differentiate twice")

    return backward


def extension(name: str) -> ModuleType | str:
    """The compiled module ``_cpu`` or ``_cuda``, or the sentence that says why there is none."""
    if find_spec(f"rlhf_fast.{name}") is None:
        return f"rlhf_fast.{name} was not built"
    if name == "_cpu" and not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        # It takes OpenMP from the process: that of PyTorch, or the system's where PyTorch was built without.
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    return import_module(f"rlhf_fast.{name}")


def require(*packages: str) -> None:
    """Raise ``ModuleNotFoundError`` in one sentence if one of ``packages``, all of the extra ``train``, is absent."""
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"{package} is not installed: pip install 'rlhf-fast[train]'", name=package)


def driver() -> str:
    """The newest CUDA that the installed driver runs, or that there is no driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return "absent"
    if failed:
        return f"refuses to answer (error {failed})"
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _compiled(module: str) -> Callable[[str], Callable | str]:
    def find(op: str) -> Callable | str:
        found = extension(module)
        if isinstance(found, str):
            return found
        return getattr(found, op, f"rlhf_fast.{module} has no {op}")

    return find


def _triton(op: str) -> Callable | str:
    if find_spec("triton") is None:
        return "triton is not installed"
    package = "rlhf_fast.triton_kernels"
    module = f"{package}.{op.removesuffix('_backward')}"
    found = find_spec(module) if find_spec(package) else None
    # Read, not imported: importing triton costs more than importing this whole package.
    if found is None or found.origin is None or f"\ndef {op}(" not in Path(found.origin).read_text():
        return f"{package} has no {op}"

    def kernel(*args: Any) -> None:
        getattr(import_module(module), op)(*args)

    return kernel


FINDERS: dict[str, Callable[[str], Callable | str]] = {
    "cpp": _compiled("_cpu"),
    "cuda": _compiled("_cuda"),
    "triton": _triton,
}
