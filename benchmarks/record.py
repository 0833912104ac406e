"""What a benchmark leaves behind: two tables and the goals on the screen, results/<device>.json and a PNG."""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import goals
import torch
from harness import Case, copy_bandwidth, device_name, devices, measure, read_bandwidth

RESULTS = Path(__file__).parent / "results"
REST = "the cases after these"


def path_of(device: str, ending: str) -> Path:
    """results/<device><ending>."""
    return RESULTS / ("".join(c if c.isalnum() else "-" for c in device_name(device).lower()).strip("-") + ending)


def known(device: str) -> dict:
    """What results/<device>.json holds; empty where there is none."""
    path = path_of(device, ".json")
    return json.loads(path.read_text()) if path.exists() else {}


def table(title: str, rows: list[dict]) -> None:
    """Print ``rows`` as a table; the columns are the keys of all rows."""
    print(f"\n{title}")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_cell(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(c), *(len(row[i]) for row in cells)) for i, c in enumerate(columns)]
    for row in [columns, *cells]:
        print("  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))))


def _cell(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def touch_memory() -> None:
    """Write to half of what is free once, 8 GiB at most.

    A virtual machine gets memory from its host when it is first written to, a page at a time, which would be charged to
    whoever allocates most: 100 ms for a gradient of 150 MB that then takes 12.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.ones(min(free // 2, 2**33) // 4)


def run(op: str, cases: Callable[[str, dict[str, str]], Iterator[Case]], remark: str) -> None:
    """Measure ``cases(device, notes)`` on every device asked for, then print, judge, save and draw.

    ``remark`` says what the bytes are and where gradients are made. Interrupted, it keeps the rows that it has.
    """
    for device in devices():
        torch.manual_seed(0)
        touch_memory()
        rows, notes = [], {}
        try:
            for case in cases(device, notes):
                rows.append(measure(case, device, notes))
                del case  # its tensors, before those of the next are made
        except KeyboardInterrupt:
            notes[REST] = "interrupted"
        if rows:
            finish(op, device, rows, notes, remark)


def finish(op: str, device: str, rows: list[dict], notes: dict[str, str], remark: str) -> None:
    """Print, judge, save and draw the rows of ``op``."""
    ratios = [{"time / ours": row["case"]} | row["ratios"] for row in rows]
    bandwidths = {"copy GB/s": copy_bandwidth(device)}
    if device == "cuda":
        bandwidths["read GB/s"] = read_bandwidth()
    speeds = ", ".join(f"{name.split()[0]} {speed:.0f} GB/s" for name, speed in bandwidths.items())
    title = f"{op} on {device_name(device)}, medians of interleaved runs; measured in this run: {speeds}"
    hidden = "ratios", "syncs", "captured"  # the last two are goals
    table(title, [{name: value for name, value in row.items() if name not in hidden} for row in rows])
    print(remark)
    table("How many times our time each of the others takes, in the same run", ratios)
    for name, why in notes.items():
        print(f"left out: {name}: {why}")
    judged = goals.judge(op, device, rows)
    print()
    for goal in judged:
        print(goals.line(goal))
    record = {"versions": versions(), **bandwidths, "remark": remark, "rows": rows, "notes": notes, "goals": judged}
    path = path_of(device, ".json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(known(device) | {"device": device_name(device), op: record}, indent=1) + "\n")
    print(f"written to {path}")
    if find_spec("matplotlib"):
        from chart import draw

        picture = path_of(device, f"-{op}.png")
        draw(op, device_name(device), rows, picture)
        print(f"drawn in {picture}")
    else:
        print("not drawn: matplotlib is not installed")


def versions() -> dict[str, str]:
    """Those that a figure depends on; the peers' own are in their names."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if "triton" in sys.modules:
        found["triton"] = sys.modules["triton"].__version__
    return found
