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
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from row_calls import ROW_CALLS
from token_calls import TOKEN_CALLS

from rlhf_fast import dispatch

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".md")
ARCHITECTURES = (80, 90, 100, 120)
SEEN = 90  # the architecture whose machine code is read: a vector access is one on all of them or on none
LENGTHS = (1000, 1, 16, 33, 4096)  # each variant must compile once for all of them
#: In PTX, from a label to where it goes back there.
LOOP = r"^(\$L__BB\w+):(.*?bra\S*\s+\1;)"
NVCC_FLAGS = ["-cubin", "-std=c++17", "-O3", "-Xptxas=-warn-spills,-Werror", f"-I{ROOT / 'csrc'}"]


class Resources(NamedTuple):
    """What one kernel takes; ``stack`` and ``local`` are bytes per thread and are not 0 where registers spill.

    ``load`` and ``store``: bytes of a thread's widest access of global memory, 0 for none and on what is not SEEN.
    """

    kernel: str
    architecture: int
    registers: int
    shared: int
    stack: int
    local: int
    load: int = 0
    store: int = 0
    loop: int = 0  # of a Triton kernel: bytes of the widest load in its loops, which the address of a row decides
    scan: str = ""  # of a Triton kernel: the layouts of its scans, which decide their bits


#: Triton op → name of a variant → its arguments at a length: every combination that compiles to something of its own.
TRITON_CALLS: dict[str, dict[str, Callable[[int], list]]] = {**TOKEN_CALLS, **ROW_CALLS}


def nvidia_tool(name: str) -> str:
    """Triton brings cuobjdump along; else it is on the PATH with nvcc."""
    spec = find_spec("triton")
    if spec is not None and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    return shutil.which(name) or name


def read_cubin(cubin: Path, architecture: int, *choice: str) -> list[tuple[str, Resources]]:
    """The kernels of a cubin, by their mangled names; ``choice`` says which one of a file that holds several."""

    def dump(what: str) -> list[tuple[str, str]]:
        command = [nvidia_tool("cuobjdump"), *choice, what, cubin]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = re.split(r"^\s*Function *:? *([^\s:]+):?\n", report, flags=re.MULTILINE)[1:]
        return list(zip(found[::2], found[1::2], strict=True))

    code = dict(dump("-sass")) if architecture == SEEN else {}
    found = []
    for name, line in dump("--dump-resource-usage"):
        number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        used = number["REG"], number["SHARED"], number["STACK"], number["LOCAL"]
        widths = [widest(code.get(name, ""), words) for words in ("LDG|LDGSTS|LD", "STG|ST")]
        found.append((name, Resources(name, architecture, *used, *widths)))
    return found


def widest(code: str, instructions: str) -> int:
    """Bytes of the widest of these instructions, ``LDG.E.128.CONSTANT`` for one; 0 if there is none."""
    bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    found = re.findall(rf"\b(?:{instructions})((?:\.\w+)*) ", code)
    return max((next((bits[w] for w in words.split(".") if w in bits), 32) for words in found), default=0) // 8


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
    resources = resources._replace(shared=kernel.metadata.shared, loop=max(loads, default=0), scan=scan)
    return resources._replace(kernel=f"{name}, {variant}")


def built_module() -> Path | None:
    """``_cuda`` of this checkout, if it is what this nvcc makes of the sources as they are, for all ARCHITECTURES."""
    cuda = dispatch.extension("_cuda")
    if isinstance(cuda, str) or cuda.toolkit != nvcc_version():
        return None
    module = Path(cuda.__file__)
    sources = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").glob("*.*"), *(ROOT / "kernels" / "cuda").iterdir()]
    if module.parent != ROOT / "rlhf_fast" or module.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        return None
    command = [nvidia_tool("cuobjdump"), "--list-elf", module]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return module if set(re.findall(r"sm_(\w+)\.cubin", listed)) == set(map(str, ARCHITECTURES)) else None


def nvcc_resources() -> list[Resources]:
    """Every kernel of every .cu file on every architecture; raises where ptxas warns, of a spill for example.

    Read from ``_cuda``, which has the same flags, where that is built: to compile all of it once more takes minutes.
    """
    module = built_module()
    if module is not None:
        read = [row for a in ARCHITECTURES for row in read_cubin(module, a, "-arch", f"sm_{a}")]
        return [row._replace(kernel=readable(name)) for name, row in read]

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
    head = "| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " | load / store | spills |\n"
    lines = [f"## {compiler} {version}\n\n", head, "|---" * (len(ARCHITECTURES) + 3) + "|\n"]
    for kernel, by_architecture in sorted(kernels.items()):
        cells = [f"{by_architecture[a].registers} / {by_architecture[a].shared}" for a in ARCHITECTURES]
        spilled = sum(r.stack + r.local for r in by_architecture.values())
        cells.append(f"{by_architecture[SEEN].load} / {by_architecture[SEEN].store}")
        lines.append(f"| `{kernel}` | {' | '.join(cells)} | {spilled} |\n")
    return "".join(lines)


def write_table(triton_rows: list[Resources], nvcc_rows: list[Resources]) -> str:
    """The text of resources.md."""
    import triton

    introduction = (
        "# Resources of the GPU kernels\n\n"
        "Registers per thread / bytes of shared memory per block. Load / store: bytes of a thread's widest access of\n"
        f"global memory in the machine code of sm_{SEEN}. Spills: bytes of stack and local memory per thread over all\n"
        "architectures. Written by `python benchmarks/resources.py`, compared in `tests/test_aot.py`.\n\n"
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
