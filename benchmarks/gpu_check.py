"""Everything that only a GPU can tell, in one go: build, test suite, compute-sanitizer, benchmarks. Ends with two
tables, of the steps and of the goals that the benchmarks measured.

``python benchmarks/gpu_check.py [STEP ...]`` runs the steps whose names begin with one of those given, by default all.
Needs no network. Every step has a time limit and all of them together another one, so that the table comes in any case.
Without a GPU it runs what can run and says what it left out.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))  # the package is installed by the first step only
BUDGET = 560.0  # seconds for everything
GRACE = 10.0  # seconds that a step over its limit has to say so
#: compute-sanitizer sees past the end of a tensor only if tensors do not share an allocation.
SEPARATE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@dataclass
class Step:
    """One command; ``left_out`` says why it does not run."""

    name: str
    command: list[str]
    limit: float  # seconds
    left_out: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def build() -> Step:
    """In place, without isolation, for the GPU of this machine alone: four architectures take four times as long."""
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", "-e", "."]
    managed = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    if sys.prefix == sys.base_prefix and managed.exists():  # a Python of the distribution, not a virtual environment
        pip.insert(-2, "--break-system-packages")
    architecture = "{}{}-real".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
    return Step("build", pip, 150, environment={"RLHF_FAST_CUDA_ARCHS": architecture})


def pytest(name: str, limit: float, *arguments: str) -> Step:
    """Some of the suite, a file at a time on several processes, where a test that hangs ends its own process alone.

    It may wait for a GPU and then hears no signal, so that the watcher must be a thread, which can but end the process.
    """
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "--color=no"]
    several = find_spec("xdist") is not None
    if several:
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "loadfile", "--max-worker-restart", "20"]
    if find_spec("pytest_timeout"):
        command += ["--timeout", "100", "--timeout-method", "thread" if several else "signal"]
    return Step(name, [*command, *arguments], limit)


def sanitizers() -> list[Step]:
    """compute-sanitizer over every CUDA and Triton kernel in every variant of the table of calls, once and small."""
    tool_path = shutil.which("compute-sanitizer")
    absent = "" if tool_path else "compute-sanitizer is not installed"
    found = []
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = [tool_path or "", "--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
        if tool == "memcheck":  # PyTorch asks CUDA things that it may refuse; a kernel's launch checks its own errors
            command += ["--report-api-errors", "no"]
        command += [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_gpu.py"]
        command += ["-k", "agrees and small and (cuda or triton)"]
        found.append(Step(f"sanitizer {tool}", command, 75, absent, SEPARATE))
    return found


def benches() -> list[Step]:
    """Every benchmark, on the GPU alone."""
    command = [sys.executable, "-u", "-m", "rlhf_fast.cli", "bench", "--device", "cuda", "--out", str(RESULTS), "--op"]
    kernels = sorted((ROOT / "kernels" / "cuda").glob("*.cu"))
    ops = [path.stem for path in kernels if (ROOT / "rlhf_fast" / "bench" / f"{path.stem}.py").exists()]
    return [Step(f"bench_{op}", [*command, op], 65) for op in ops]


def steps() -> list[Step]:
    """All steps, what is known least first: the kernels on a GPU, their memory, races and speed, then the rest."""
    memcheck, racecheck, *other_checks = sanitizers()
    needs_gpu = [memcheck, racecheck, *benches(), *other_checks]
    if not torch.cuda.is_available():
        for step in needs_gpu:
            step.left_out = "no GPU"
    kernels = ["tests/test_gpu.py", "tests/ops", "tests/test_gpu_trainers.py", "tests/test_choices.py"]
    others = [f"--ignore={path}" for path in kernels if path != "tests/ops"]  # these on the CPU too
    first = pytest("kernels", 150, *kernels, "-k", "not simt and not cpp-cpu and not reference-cpu")
    return [build(), first, *needs_gpu[:-2], pytest("others", 150, *others), *needs_gpu[-2:]]


def search_path() -> str:
    """The PATH with the tools of CUDA and of this Python behind it, which need not be on it."""
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(cuda), str(Path(sys.executable).parent)])


def run(step: Step, limit: float) -> str:
    """Run ``step`` for ``limit`` seconds at most, then end it and all that it started; how it ended, in some words."""
    environment = {**step.environment, **os.environ, "PYTHONUNBUFFERED": "1"}  # what is set outside wins
    process = subprocess.Popen(step.command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then says what has failed so far
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
        return f"over its {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing of its group is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"exit {status}" if status else "ok"


def goals_of(results: dict[str, str]) -> list[dict]:
    """A row per goal that the benchmarks among the steps of ``results`` wrote down, to the end or until interrupted."""
    from rlhf_fast.bench import record  # not before the build, which replaces what this loads

    records, found = record.known(RESULTS, "cuda") if torch.cuda.is_available() else {}, []
    for op, content in records.items():
        result = results.get(f"bench_{op}", "")
        if result == "ok" or (result.startswith("over") and record.REST in content["notes"]):
            found += content["goals"]
    ordered = sorted(found, key=lambda goal: int(goal["goal"][1:]))
    return [goal | {"met": "✓" if goal["met"] else "✗"} for goal in ordered]


def main() -> int:
    """Run the steps, print the table; 1 if one failed."""
    began, rows, wanted = time.monotonic(), [], tuple(sys.argv[1:])
    os.environ["PATH"] = search_path()
    for step in steps():
        start = time.monotonic()
        room = BUDGET - GRACE - (start - began)
        result = f"left out: {step.left_out}" if step.left_out else ""
        if wanted and not step.name.startswith(wanted):
            continue
        if not result and room < 10:
            result = f"left out: the {BUDGET:.0f} s are over"
        if not result:
            print(f"\n== {start - began:.0f} s: {step.name}: {' '.join(step.command)}", flush=True)
            result = run(step, min(step.limit, room))
        rows.append({"step": step.name, "result": result, "s": int(time.monotonic() - start)})
    from rlhf_fast.bench.record import table

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    table(f"gpu-check on {device}, torch {torch.__version__}; figures in {RESULTS.relative_to(ROOT)}", rows)
    if goals := goals_of({row["step"]: row["result"] for row in rows}):
        table("goals (a ✗ is a figure, not a failure)", goals)
    return 0 if all(row["result"] == "ok" or row["result"].startswith("left out") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
