"""What became slower since other results: by the machine's own copy and by the peers, both measured beside ours.

Two runs of one machine differ in clock, neighbours and temperature, and a runner for tests is another machine every
time. So times are not compared, but what each run has measured them against: the share of a copy's bandwidth and the
ratios to the peers. An op became slower by the lesser of the two changes: a faster copy alone, or a faster peer, is
not our loss.
"""

import math
import statistics
from pathlib import Path
from typing import Any

from rlhf_fast.bench.harness import device_name
from rlhf_fast.bench.record import path_of, read

OURS = ("cpp", "cuda", "triton")  # they are what is judged


def load(path: Path, device: str) -> dict[str, dict]:
    """Op → its record in the results at ``path``: a file, or the folder of an earlier run.

    Raises ``ValueError`` where there is no such file or it holds something else.
    """
    if path.is_dir():
        folder, path = path, path_of(path, device, ".json")
        others = ", ".join(sorted(other.name for other in folder.glob("*.json")))
        if others and not path.exists():
            raise ValueError(f"{folder} has no results of {device_name(device)}, but {others}: name that file itself")
    records = {op: record for op, record in read(path).items() if isinstance(record, dict)}
    if not records:
        raise ValueError(f"{path}: not a file of results (it has no op)")
    for op, record in records.items():
        rows = record.get("rows")
        if not isinstance(rows, list) or not all(_is_row(row) for row in rows or [None]):
            raise ValueError(f"{path}: not a file of results ({op} has a row without case, % copy and ratios)")
    return records


def _is_row(row: Any) -> bool:
    """Whether ``row`` has what `change` divides by."""
    return (
        isinstance(row, dict)
        and isinstance(row.get("case"), str)
        and isinstance(row.get("ratios"), dict)
        and all(_is_positive(number) for number in (row.get("% copy"), *row["ratios"].values()))
    )


def _is_positive(number: Any) -> bool:
    """NaN, which is above no threshold, would let every regression pass."""
    return isinstance(number, int | float) and math.isfinite(number) and number > 0


def changes(device: str, old: dict[str, dict], new: dict[str, list[dict]], threshold: float) -> list[dict]:
    """A row per case of ``new`` (op → rows) that ``old`` has too; ``slower`` tells whether it is past ``threshold``."""
    found = []
    for op, rows in new.items():
        before = {row["case"]: row for row in old.get(op, {}).get("rows", ())}
        found += [change(device, op, before[row["case"]], row, threshold) for row in rows if row["case"] in before]
    return found


def alone(device: str, old: dict[str, dict], new: dict[str, list[dict]]) -> list[str]:
    """A line for each op of ``new`` with cases that only one of the two runs has, which are not compared."""
    found = []
    for op, rows in new.items():
        before, now = ([row["case"] for row in run] for run in (old.get(op, {}).get("rows", ()), rows))
        for here, there, where in ((now, before, "this run"), (before, now, "the earlier results")):
            if cases := [case for case in here if case not in there]:
                found.append(f"not compared: {op} on {device}, in {where} alone: {', '.join(cases)}")
    return found


def change(device: str, op: str, old: dict, new: dict, threshold: float) -> dict:
    """How many times slower one case became, by the copy and by the peers that both runs have."""
    by_copy = old["% copy"] / new["% copy"]
    both = [name for name in new["ratios"] if name in old["ratios"] and not name.startswith(OURS)]
    by_peers = statistics.median(old["ratios"][n] / new["ratios"][n] for n in both) if both else None
    times = by_copy if by_peers is None else min(by_copy, by_peers)
    return {
        "op": op, "case": new["case"], "device": device, "% copy before": old["% copy"], "% copy now": new["% copy"],
        "slower by copy": by_copy, "by peers": by_peers, "times slower": times, "slower": times > threshold,
    }  # fmt: skip


def remark(device: str, path: str) -> str:
    """What the comparison with ``path`` rests on, and whether it was measured elsewhere."""
    text = "Both by what the same run measured: the share of a copy's bandwidth, the ratios to the peers (median)."
    name = read(path_of(Path(path), device, ".json") if Path(path).is_dir() else Path(path)).get("device", "unknown")
    if name != device_name(device):
        text += f" {path} is of another device: {name}."
    return text
