"""Compiles the CUDA sources as C++ for the CPU (simt.hpp) into a Python module that works on CPU tensors."""

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from rlhf_fast import dispatch

SIMT = Path(__file__).parent
ROOT = SIMT.parents[1]
CACHE = ROOT / "build" / "simt"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fopenmp", "-DRLHF_FAST_SIMT", '-DRLHF_FAST_CUDA_VERSION="simt"', "-Wall"]
FLAGS += ["-Wno-unknown-pragmas", "-fvisibility=hidden"]
FLAGS += ["-mfma", "-ffp-contract=fast"]  # as nvcc does by itself: a product is fused into the sum that it goes into


def absence() -> str | None:
    """Why this machine cannot compile the shim; None if it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the SIMT shim switches stacks in x86-64 assembly for Linux"
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if "fma" not in Path("/proc/cpuinfo").read_text().split():
        return "this processor has no fused multiply-add, which GPUs have"
    return None if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


def compile_into(module: Path, command: Sequence[str], inputs: Sequence[Path]) -> None:
    """Compile ``inputs`` side by side and link them; ``module`` appears when it is whole."""
    scratch = module.parent / str(os.getpid())
    scratch.mkdir(exist_ok=True)
    objects = [scratch / f"{p.name}.o" for p in inputs]
    compilers = [
        subprocess.Popen([*command, "-x", "c++", "-c", str(p), "-o", str(o)])
        for p, o in zip(inputs, objects, strict=True)
    ]
    statuses = [process.wait() for process in compilers]
    if any(statuses):
        raise RuntimeError(f"the SIMT build of {module.stem} failed; see the compiler's output")
    subprocess.run([*command, "-shared", *map(str, objects), "-o", str(scratch / module.name)], check=True)
    os.replace(scratch / module.name, module)
    shutil.rmtree(scratch)


def build(name: str, sources: Sequence[Path]) -> ModuleType:
    """Compile ``sources`` and the scheduler into the module ``name``, unless the cache has it, and import it."""
    import pybind11

    includes = [SIMT, ROOT / "csrc", ROOT / "kernels" / "cuda", pybind11.get_include(), sysconfig.get_path("include")]
    command = ["g++", *FLAGS, *(f"-I{folder}" for folder in includes)]
    inputs = [*sources, SIMT / "simt.cpp"]
    headers = sorted(p for folder in includes[:3] for p in Path(folder).iterdir() if p.suffix in (".h", ".hpp", ".cuh"))
    content = b"\0".join([" ".join(command).encode(), *(p.read_bytes() for p in [*inputs, *headers])])
    folder = CACHE / f"{name}-{hashlib.sha256(content).hexdigest()[:16]}"
    module = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the tests may have begun: it is waited for
        if not module.exists():
            compile_into(module, command, inputs)
    # Not into sys.modules: it stands beside the real rlhf_fast._cuda.
    spec = importlib.util.spec_from_file_location(f"simt.{name}", module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@functools.cache
def cuda_module() -> ModuleType:
    """``_cuda``, all of kernels/cuda with the bindings of csrc, for CPU tensors."""
    return build("_cuda", [ROOT / "csrc" / "bindings_cuda.cpp", *sorted((ROOT / "kernels" / "cuda").glob("*.cu"))])


def simt_implementation(op: str) -> Callable:
    """The CUDA kernel of ``op`` as a function with the arguments of its schema, on CPU tensors."""
    module = importlib.import_module(f"rlhf_fast.ops.{op.removesuffix('_backward')}")
    overload, kernel = getattr(torch.ops.rlhf_fast, op).default, getattr(cuda_module(), op)
    if op.endswith("_backward"):
        return dispatch.bind(overload, module._fake_backward, kernel, compiled=True)
    return dispatch.bind(overload, module._fake, kernel, compiled=True, scratch=getattr(module, "_scratch", None))


def set_order(module: ModuleType, seed: int) -> None:
    """The order in which ``module`` runs threads and blocks; 0 is the plain one."""
    assert module.__file__ is not None
    ctypes.CDLL(module.__file__).simt_set_seed(seed)
