"""Everything that only a GPU can tell, in one go: the test suite, compute-sanitizer, the benchmarks. Ends with a table.

Needs no network. Without a GPU it runs what can run and says what it left out.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from harness import RESULTS, table

ROOT = Path(__file__).parent.parent
SLICE = "cuda-cuda and (hand_computed or packed_equals_padded or strided)"


def steps() -> list[tuple[str, list[str], str]]:
    """(name, command, why it is left out; empty if it is not)."""
    gpu = torch.cuda.is_available()
    no_gpu = "" if gpu else "no GPU"
    sanitizer = shutil.which("compute-sanitizer")
    python = [sys.executable, "-m", "pytest", "-q", "-x"]
    found = [("tests", [sys.executable, "-m", "pytest", "-q"], "")]
    for tool in ("memcheck", "racecheck"):
        command = [
            sanitizer or "",
            "--tool",
            tool,
            "--error-exitcode",
            "1",
            *python,
            "tests/ops/test_gae.py",
            "-k",
            SLICE,
        ]
        found.append((f"compute-sanitizer {tool}", command, no_gpu or ("" if sanitizer else "not installed")))
    for bench in sorted(Path(__file__).parent.glob("bench_*.py")):
        found.append((bench.stem, [sys.executable, str(bench)], no_gpu))
    return found


def main() -> int:
    rows, failed = [], 0
    for name, command, left_out in steps():
        start = time.perf_counter()
        if left_out:
            rows.append({"step": name, "result": f"left out: {left_out}", "s": 0})
            continue
        print(f"== {name}: {' '.join(command)}", flush=True)
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        failed += status != 0
        rows.append(
            {"step": name, "result": f"exit {status}" if status else "ok", "s": int(time.perf_counter() - start)}
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    table(f"gpu-check on {device}, torch {torch.__version__}; figures in {RESULTS.relative_to(ROOT)}", rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
