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
from row_calls import ROW_CALLS

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".md")
ARCHITECTURES = (80, 90, 100, 120)
LENGTHS = (1000, 1, 16, 33, 4096)  # each variant must compile once for all of them
#: In PTX, from a label to where it goes back there.
LOOP = r"^(\$L__BB\w+):(.*?bra\S*\s+\1;)"
NVCC_FLAGS = ["-cubin", "-std=c++17", "-O3", "-Xptxas=-warn-spills,-Werror", f"-I{ROOT / 'csrc'}"]


class Resources(NamedTuple):
    """What one kernel takes; ``stack`` and ``local`` are bytes per thread and are not 0 where registers spill."""

    kernel: str
    architecture: int
    registers: int
    shared: int
    stack: int
    local: int
    load: int = 0  # of a Triton kernel: bytes of the widest load in its loops
    scan: str = ""  # the layouts of its scans, which decide their bits


def advantages_call(dtype: torch.dtype, kl: str, at: str, holes: str, plain: bool, rows: int, length: int) -> list:
    """Arguments of the Triton function ``advantages``; not ``plain``: strided, and with all that is optional."""
    score, *tokens = (torch.empty((rows, length, 2), dtype=dtype)[..., 0] for _ in range(4))
    mask, outputs = torch.empty((rows, length), dtype=torch.bool), [torch.empty((rows, length), dtype=dtype)] * 3
    score, tokens = (torch.empty(rows, dtype=dtype), outputs) if plain else (score, tokens)
    last_values, price = (None if plain else torch.empty(shape, dtype=dtype) for shape in ((rows,), ()))
    return [score, *tokens, mask, last_values, price, 0.05, kl, at, None, 0.99, 0.95, holes, True, True, True, *outputs]


def gae_call(dtype: torch.dtype, holes: str, offsets: torch.dtype | None, length: int) -> list:
    """Arguments of the Triton function ``gae``: packed and bootstrapped with ``offsets``, else padded."""
    shape = (4, length) if offsets is None else (4 * length,)
    rewards, values, advantages, returns = (torch.empty(shape, dtype=dtype) for _ in range(4))
    cu_seqlens = None if offsets is None else torch.empty(5, dtype=offsets)
    last_values = None if offsets is None else torch.empty(4, dtype=dtype)
    mask = torch.empty(shape, dtype=torch.bool)
    return [rewards, values, mask, last_values, cu_seqlens, 0.99, 0.95, holes, advantages, returns]


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


def ppo_loss_backward_call(dtype: torch.dtype, given: str, strided: bool, length: int) -> list:
    """Arguments of the Triton function ``ppo_loss_backward``."""
    *_, logprobs, values, entropy = ppo_loss_call(dtype, given, "k1", "token_mean", strided, length)
    made = [
        g if name in "l" + given else g.new_empty(0) for name, g in zip("lve", (logprobs, values, entropy), strict=True)
    ]
    grads = [torch.empty(*g.shape, 2, dtype=dtype)[..., 0] if strided else torch.empty_like(g) for g in made]
    return [torch.ones((), dtype=dtype), *grads, *made]


#: Triton op → name of a variant → its arguments at a length: every combination that compiles to something of its own.
TRITON_CALLS: dict[str, dict[str, Callable[[int], list]]] = {
    "advantages": {
        f"{str(dtype).removeprefix('torch.')} {name}": partial(advantages_call, dtype, *arguments)
        for dtype, name, *arguments in (
            (torch.float32, "k1", "k1", "last", "skip", True, 4),
            (torch.float32, "k3 next many rows", "k3", "next", "skip", True, 1025),
            (torch.float32, "abs dense strided", "abs", "last", "zero", False, 4),
            (torch.float64, "k2", "k2", "last", "skip", True, 4),
        )
    },
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
    **ROW_CALLS,
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
    "ppo_loss_backward": {
        f"{str(dtype).removeprefix('torch.')} {name} backward": partial(ppo_loss_backward_call, dtype, given, strided)
        for dtype, name, given, strided in (
            (torch.float32, "policy", "", False),
            (torch.float32, "all", "ve", False),
            (torch.float64, "all strided", "ve", True),
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
    loops = " ".join(body for _, body in re.findall(LOOP, kernel.asm["ptx"], re.DOTALL | re.MULTILINE))
    loads = [int(n or 1) * int(bits) // 8 for n, bits in re.findall(r"ld\.global(?:\.v(\d))?\.b(\d+)", loops)]
    resources = resources._replace(shared=kernel.metadata.shared, load=max(loads, default=0), scan=scan)
    return resources._replace(kernel=f"{name}, {variant}")


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
