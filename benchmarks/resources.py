"""Registers, shared memory and spills of every GPU kernel on every architecture, found without a GPU.

``python benchmarks/resources.py`` compiles all of kernels/ ahead of time and writes resources.md beside itself. The
Triton kernels are compiled through their own host functions, called on CPU tensors, so that what is measured is what a
call compiles.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".md")
ARCHITECTURES = (80, 90, 100, 120)
LENGTHS = (1000, 1, 16, 33, 4096)  # each variant must compile once for all of them
NVCC_FLAGS = ["-cubin", "-std=c++17", "-O3", "-Xptxas=-warn-spills,-Werror", f"-I{ROOT / 'csrc'}"]


class Resources(NamedTuple):
    """What one kernel takes; ``stack`` and ``local`` are bytes per thread and are not 0 where registers spill."""

    kernel: str
    architecture: int
    registers: int
    shared: int
    stack: int
    local: int
    scan: str = ""  # of a Triton kernel: the layouts of its scans, which decide their bits


def gae_call(dtype: torch.dtype, holes: str, offsets: torch.dtype | None, length: int) -> list:
    """Arguments of the Triton function ``gae``: packed and bootstrapped with ``offsets``, else padded."""
    shape = (4, length) if offsets is None else (4 * length,)
    rewards, values, advantages, returns = (torch.empty(shape, dtype=dtype) for _ in range(4))
    cu_seqlens = None if offsets is None else torch.empty(5, dtype=offsets)
    last_values = None if offsets is None else torch.empty(4, dtype=dtype)
    mask = torch.empty(shape, dtype=torch.bool)
    return [rewards, values, mask, last_values, cu_seqlens, 0.99, 0.95, holes, advantages, returns]


def logprobs_call(dtype: torch.dtype, index: torch.dtype, softcap: float | None, masked: bool, length: int) -> list:
    """Arguments of the Triton function ``logprobs``."""
    rows = [torch.empty(4, dtype=torch.float64 if dtype == torch.float64 else torch.float32) for _ in range(3)]
    mask = torch.empty(4, dtype=torch.bool) if masked else None
    return [torch.empty(4, length, dtype=dtype), torch.empty(4, dtype=index), mask, 0.7, softcap, *rows]


def logprobs_backward_call(
    dtype: torch.dtype, index: torch.dtype, softcap: float | None, masked: bool, length: int
) -> list:
    """Arguments of the Triton function ``logprobs_backward``."""
    logits, ids, mask, temperature, softcap, *rows = logprobs_call(dtype, index, softcap, masked, length)
    return [*rows, logits, ids, *rows[1:], mask, temperature, softcap, torch.empty_like(logits)]


LOGPROBS_VARIANTS = (
    (torch.float32, torch.int64, None, False),
    (torch.bfloat16, torch.int64, None, True),
    (torch.float16, torch.int32, 30.0, True),
    (torch.float64, torch.int64, None, True),
)


def long_gae_call(dtype: torch.dtype, holes: str, offsets: torch.dtype | None, length: int) -> list:
    """Few and long sequences, which are split."""
    return gae_call(dtype, holes, offsets, 8192 + length)


def ppo_loss_call(dtype: torch.dtype, given: str, kl: str, aggregate: str, strided: bool, length: int) -> list:
    """Arguments of the Triton function ``ppo_loss``; ``given`` has a letter for each optional tensor that is there."""

    def make(dtype: torch.dtype = dtype, *, strided: bool = strided) -> torch.Tensor:
        return torch.empty((4, length, 2), dtype=dtype)[..., 0] if strided else torch.empty((4, length), dtype=dtype)

    tensors = [make(), make(), make(), make(torch.bool)]
    tensors += [make() if letter in given else None for letter in "vorek"]  # values, old, returns, entropy, ref
    scalar = torch.ones((), dtype=dtype)
    numbers = [0.2, 0.3, 0.2, 0.1, 0.01, 0.1, kl, None, 20.0, aggregate]
    outputs = [torch.empty((), dtype=dtype), torch.empty(9, dtype=dtype)]
    outputs += [make(strided=False) for _ in range(3)]
    return [*tensors, scalar if "d" in given else None, *numbers, *outputs]


def sample_call(dtype: torch.dtype, knobs: str, tokens: bool, length: int) -> list:
    """Arguments of the Triton function ``sample``; ``knobs`` has a letter for each that is there, as tpk of "tkpm"."""
    result = torch.float64 if dtype == torch.float64 else torch.float32
    keys = [torch.zeros(4, dtype=torch.int64) for _ in range(2)]
    given = [torch.ones(4, dtype=torch.int64 if x == "k" else torch.float64) if x in knobs else None for x in "tkpmrsf"]
    per_token = [torch.empty(4, length, dtype=d) if tokens else None for d in (torch.int64, result, torch.bool)]
    floats = [torch.empty(4, dtype=result) for _ in range(4)]
    outputs = [torch.empty(4, dtype=torch.int64), *floats, torch.empty(4, dtype=torch.int64)]
    return [torch.empty(4, length, dtype=dtype), *keys, *given, *per_token, *outputs, torch.empty(4, dtype=torch.int8)]


#: Triton op → name of a variant → its arguments at a length: every combination that compiles to something of its own.
TRITON_CALLS: dict[str, dict[str, Callable[[int], list]]] = {
    "gae": {
        f"{str(dtype).removeprefix('torch.')} {holes} {layout}": partial(gae_call, dtype, holes, offsets)
        for dtype, holes, layout, offsets in (
            (torch.float32, "skip", "padded", None),
            (torch.float32, "zero", "padded", None),
            (torch.float32, "skip", "packed int32", torch.int32),
            (torch.float64, "skip", "packed int64", torch.int64),
            (torch.float64, "zero", "padded", None),
        )
    }
    | {
        "float32 skip long": partial(long_gae_call, torch.float32, "skip", None),
        "float32 zero long packed": partial(long_gae_call, torch.float32, "zero", torch.int64),
    },
    **{
        op: {
            f"{op}{' softcap' if cap else ''}{' mask' if masked else ''} {str(dtype).removeprefix('torch.')}": partial(
                call, dtype, index, cap, masked
            )
            for dtype, index, cap, masked in LOGPROBS_VARIANTS
        }
        for op, call in (("logprobs", logprobs_call), ("logprobs_backward", logprobs_backward_call))
    },
    "ppo_loss": {
        f"{str(dtype).removeprefix('torch.')} {name}": partial(ppo_loss_call, dtype, given, kl, aggregate, strided)
        for dtype, name, given, kl, aggregate, strided in (
            (torch.float32, "policy", "", "k1", "token_mean", False),
            (torch.float32, "value", "vor", "k1", "token_mean", False),
            (torch.float32, "all k3", "vorekd", "k3", "token_sum", False),
            (torch.float32, "all k2 seq", "vorek", "k2", "seq_mean_token_mean", False),
            (torch.float32, "all abs strided", "vorekd", "abs", "seq_mean_token_sum", True),
            (torch.float64, "all k3 strided", "vorek", "k3", "seq_mean_token_mean", True),
        )
    },
    "sample": {
        f"{str(dtype).removeprefix('torch.')} {name}": partial(sample_call, dtype, knobs, tokens)
        for dtype, name, knobs, tokens in (
            (torch.float32, "plain", "t", False),
            (torch.bfloat16, "filters", "tkpm", False),
            (torch.float16, "all", "tkpmrsf", True),
            (torch.float64, "all", "tkpmrsf", True),
        )
    },
}


def nvidia_tool(name: str) -> str:
    """Triton brings cuobjdump along; else it is on the PATH with nvcc."""
    spec = find_spec("triton")
    if spec is not None and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    return shutil.which(name) or name


def read_cubin(cubin: Path, architecture: int) -> list[tuple[str, Resources]]:
    """The kernels of a cubin, by their mangled names."""
    report = subprocess.run(
        [nvidia_tool("cuobjdump"), "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    found = []
    for name, line in re.findall(r"Function (\S+):\s*\n(.*)", report):
        number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        found.append(
            (name, Resources(name, architecture, number["REG"], number["SHARED"], number["STACK"], number["LOCAL"]))
        )
    return found


class CompileOnly:
    """Stands in for Triton's CUDA driver: names the architecture to compile for, launches nothing."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def triton_resources() -> Iterator[Resources]:
    """Compile every variant of every Triton kernel; for a process without TRITON_INTERPRET."""
    import triton
    from triton.runtime.driver import driver

    compiled: dict = {}  # in order, each once
    run = triton.runtime.JITFunction.run
    triton.runtime.JITFunction.run = lambda self, *args, grid, warmup, **kwargs: compiled.setdefault(
        run(self, *args, grid=grid, warmup=True, **kwargs)
    )
    for op, calls in TRITON_CALLS.items():
        launch = getattr(import_module(f"rlhf_fast.triton_kernels.{op.removesuffix('_backward')}"), op)
        for variant, arguments in calls.items():
            for architecture in ARCHITECTURES:
                driver.set_active(CompileOnly(architecture))
                compiled.clear()
                for length in LENGTHS:
                    launch(*arguments(length))
                yield from (measured(kernel, variant, architecture) for kernel in compiled)


def measured(kernel, variant: str, architecture: int) -> Resources:
    """Resources of a kernel that Triton compiled; Triton allots the shared memory at launch."""
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        ((name, resources),) = read_cubin(cubin, architecture)
    ir = kernel.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.blocked<.*>)$", ir, re.MULTILINE))
    scans = re.findall(r'"tt\.scan".*?\}\) : \([^)]*?(#\w+)>', ir, re.DOTALL)
    scan = "; ".join(sorted({layouts[name] for name in scans}))
    return resources._replace(kernel=f"{name}, {variant}", shared=kernel.metadata.shared, scan=scan)


def nvcc_resources() -> list[Resources]:
    """Compile every .cu file for every architecture; raises where ptxas warns, of a spill for example."""

    def compile_one(source: Path, architecture: int) -> list[Resources]:
        with TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            command = ["nvcc", *NVCC_FLAGS, f"-arch=sm_{architecture}", str(source), "-o", str(cubin)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{source.name} for sm_{architecture}: {done.stderr}")
            return [r._replace(kernel=readable(name)) for name, r in read_cubin(cubin, architecture)]

    sources = sorted((ROOT / "kernels" / "cuda").glob("*.cu"))
    jobs = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [r for found in pool.map(lambda job: compile_one(*job), jobs) for r in found]


def readable(mangled: str) -> str:
    """``gae_kernel<float, true>`` of a mangled name."""
    name = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout.strip()
    match = re.search(r"(\w+(?:<[^()]*>)?)\(", name.replace("(anonymous namespace)::", ""))
    return match.group(1) if match else name


def nvcc_version() -> str | None:
    """Version of the nvcc on the PATH, None without one."""
    if shutil.which("nvcc") is None:
        return None
    report = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release [\d.]+, V([\d.]+)", report).group(1)


def section(compiler: str, version: str, rows: list[Resources]) -> str:
    """One compiler's table: a line per kernel, registers / shared bytes on each architecture."""
    kernels: dict[str, dict[int, Resources]] = {}
    for row in rows:
        kernels.setdefault(row.kernel, {})[row.architecture] = row
    head = "| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " | spills |\n"
    lines = [f"## {compiler} {version}\n\n", head, "|---" * (len(ARCHITECTURES) + 2) + "|\n"]
    for kernel, by_architecture in sorted(kernels.items()):
        cells = [f"{by_architecture[a].registers} / {by_architecture[a].shared}" for a in ARCHITECTURES]
        spilled = sum(r.stack + r.local for r in by_architecture.values())
        lines.append(f"| `{kernel}` | {' | '.join(cells)} | {spilled} |\n")
    return "".join(lines)


def write_table(triton_rows: list[Resources], nvcc_rows: list[Resources]) -> str:
    """The text of resources.md."""
    import triton

    introduction = (
        "# Resources of the GPU kernels\n\n"
        "Registers per thread / bytes of shared memory per block; spills: bytes of stack and local memory per thread,\n"
        "over all architectures. Written by `python benchmarks/resources.py`, compared in `tests/test_aot.py`.\n\n"
    )
    version = nvcc_version()
    assert version is not None, "the table needs nvcc"
    parts = [section("nvcc", version, nvcc_rows), section("Triton", triton.__version__, triton_rows)]
    return introduction + "\n".join(parts)


def main() -> None:
    if sys.argv[1:] == ["--triton"]:  # one line per kernel, for tests/test_aot.py
        for row in triton_resources():
            print(*row, sep="\t")
        return
    TABLE.write_text(write_table(list(triton_resources()), nvcc_resources()))


if __name__ == "__main__":
    main()
