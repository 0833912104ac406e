"""Timing that holds on a shared machine: candidates take turns, medians are compared, ratios come from one run."""

import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


def devices() -> list[str]:
    """Where to measure: the devices named on the command line, else the CPU and the GPU if there is one."""
    found = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [name for name in found if name in sys.argv[1:]] if sys.argv[1:] else found


def interleave(
    candidates: dict[str, Callable], *, device: str = "cpu", seconds: float | None = None
) -> dict[str, float]:
    """Median seconds of each candidate. Each round runs all of them, starting with another one every time.

    A fast candidate is repeated for about 3 ms within a round, so that what the one before it left in the caches and in
    the allocator is not all that is measured. ``seconds`` is the time for each candidate, after two calls to warm up:
    by default 2 on a CPU, which it shares, and 0.5 on a GPU, which it does not.
    """
    if seconds is None:
        seconds = 2.0 if device == "cpu" else 0.5
    repeats, rounds = {}, 3
    for name, call in candidates.items():
        call()
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        once = time.perf_counter() - start
        repeats[name] = max(1, int(3e-3 / max(once, 1e-7)))
        rounds = max(rounds, min(200, int(seconds / (once * repeats[name]))))
    gc.collect()
    gc.disable()  # a collection of all that torch.compile left behind would be charged to whoever is running
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    began = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - began > seconds * len(names):
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                candidates[name]()
            synchronize(device)
            times[name].append((time.perf_counter() - start) / repeats[name])
    gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def device_name(device: str) -> str:
    """The name under which results of this machine are kept."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} x{torch.get_num_threads()}"


def table(title: str, rows: list[dict]) -> None:
    """Print ``rows`` as a table; the first row's keys are the columns."""
    print(f"\n{title}")
    columns = list(rows[0])
    cells = [[_cell(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(c), *(len(row[i]) for row in cells)) for i, c in enumerate(columns)]
    for row in [columns, *cells]:
        print("  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))))


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(op: str, device: str, rows: list[dict]) -> Path:
    """Put the rows of ``op`` into results/<device>.json beside those of the other ops."""
    name = device_name(device)
    path = RESULTS / ("".join(c if c.isalnum() else "-" for c in name.lower()).strip("-") + ".json")
    known = json.loads(path.read_text()) if path.exists() else {}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if "triton" in sys.modules:
        versions["triton"] = sys.modules["triton"].__version__
    known |= {"device": name, op: {"versions": versions, "rows": rows}}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n")
    return path
