"""What a benchmark leaves behind: two tables and the goals on the screen, <device>.json and a PNG in a folder."""

import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from rlhf_fast.bench import goals
from rlhf_fast.bench.harness import copy_bandwidth, device_name, measure, read_bandwidth
from rlhf_fast.bench.peers import wanted

REST = "the cases after these"
PARTS = {"versions", "remark", "rows", "notes", "goals"}  # of an op, which the page shows


def path_of(folder: Path, device: str, ending: str) -> Path:
    """``folder``/<device><ending>."""
    return folder / ("".join(c if c.isalnum() else "-" for c in device_name(device).lower()).strip("-") + ending)


def known(folder: Path, device: str) -> dict:
    """What ``folder``/<device>.json holds; empty where there is none.

    Raises ``ValueError`` where it is no JSON, or has an op without what `finish` writes of one.
    """
    path = path_of(folder, device, ".json")
    found = read(path) if path.exists() else {}
    for op, record in found.items():
        if isinstance(record, dict) and (missing := PARTS - record.keys()):
            raise ValueError(f"{path}: not a file of results ({op} has no {', '.join(sorted(missing))})")
    return found


def read(path: Path) -> dict:
    """The object in a JSON file. Raises ``ValueError`` naming a file that cannot be read or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(f"{path}: not a file of results ({why})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a file of results (no object)")
    return found


def table(title: str, rows: list[dict]) -> None:
    """Print ``rows`` as a table; the columns are the keys of all rows."""
    print(f"\n{title}")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[cell(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(c), *(len(row[i]) for row in cells)) for i, c in enumerate(columns)]
    for row in [columns, *cells]:
        print("  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))))


def cell(value: object) -> str:
    """``value`` with three digits that count."""
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
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        torch.ones(min(free // 2, 2**33) // 4)


def run(
    op: str, device: str, folder: Path, *, peers: Sequence[str] | None = None, seconds: float | None = None
) -> list[dict]:
    """Measure every case of ``op`` on ``device``, then print, judge, save and draw; returns the rows.

    Interrupted, or out of the device's memory, it keeps the rows that it has. ``peers`` and ``seconds`` are those of
    ``measure``. Raises ``KeyboardInterrupt`` after an interruption.
    """
    module = import_module(f"rlhf_fast.bench.{op}")
    torch.manual_seed(0)
    rows, notes, stopped = [], {}, False
    try:
        for case in module.cases(device, notes):
            rows.append(measure(case, device, notes, peers=peers, seconds=seconds))
            del case  # its tensors, before those of the next are made
    except KeyboardInterrupt:
        notes[REST], stopped = "interrupted", True
    except torch.OutOfMemoryError:
        notes[REST] = "the memory of the GPU is too small for them"
    notes = {
        name: why
        for name, why in notes.items()
        if name == REST or any(wanted(peer, peers) for peer in name.split(", "))
    }
    if rows:
        finish(op, device, rows, notes, module.REMARK, folder)
    else:
        print(f"\n{op}: nothing was measured: {'; '.join(f'{name}: {why}' for name, why in notes.items())}")
    if stopped:
        raise KeyboardInterrupt
    return rows


def finish(op: str, device: str, rows: list[dict], notes: dict[str, str], remark: str, folder: Path) -> None:
    """Print, judge, save and draw the rows of ``op``. ``remark`` says what the bytes are and who makes gradients."""
    ratios = [{"time / ours": row["case"]} | row["ratios"] for row in rows]
    bandwidths = {"copy GB/s": copy_bandwidth(device)}
    if device == "cuda":
        bandwidths["read GB/s"] = read_bandwidth()
    speeds = ", ".join(f"{name.split()[0]} {speed:.0f} GB/s" for name, speed in bandwidths.items())
    title = f"{op} on {device_name(device)}, medians of interleaved runs; measured in this run: {speeds}"
    table(title, shown(rows))
    print(remark)
    if any(row["ratios"] for row in rows):
        table("How many times our time each of the others takes, in the same run", ratios)
    for name, why in notes.items():
        print(f"left out: {name}: {why}")
    judged = goals.judge(op, device, rows)
    print()
    for goal in judged:
        print(goals.line(goal))
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    record = {"versions": versions(), "date": today, **bandwidths, "remark": remark}
    record |= {"rows": rows, "notes": notes, "goals": judged}
    path = path_of(folder, device, ".json")
    folder.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.{os.getpid()}")  # what another run reads meanwhile is never half a file
    whole.write_text(json.dumps(known(folder, device) | {"device": device_name(device), op: record}, indent=1) + "\n")
    whole.replace(path)
    print(f"written to {path}")
    if find_spec("matplotlib"):
        from rlhf_fast.bench.chart import draw

        picture = path_of(folder, device, f"-{op}.png")
        draw(op, device_name(device), rows, picture)
        print(f"drawn in {picture}")
    else:
        print("not drawn: matplotlib is not installed")


def shown(rows: list[dict]) -> list[dict]:
    """``rows`` without the ratios, which have a table of their own, and without what is a goal."""
    hidden = "ratios", "syncs", "captured"
    return [{name: value for name, value in row.items() if name not in hidden} for row in rows]


def versions() -> dict[str, str]:
    """Those that a figure depends on; the peers' own are in their names."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    if "triton" in sys.modules:
        found["triton"] = sys.modules["triton"].__version__
    return found
