"""What became slower since other results: by the machine's own copy and by the peers, both measured beside ours.

Two runs of one machine differ in clock, neighbours and temperature, and a runner for tests is another machine every
time. So times are not compared, but what each run has measured them against: the share of a copy's bandwidth and the
ratios to the peers. An op became slower by the lesser of the two changes: a faster copy alone, or a faster peer, is
not our loss.
"""

import statistics
from pathlib import Path

from rlhf_fast.bench.harness import device_name
from rlhf_fast.bench.record import path_of, read

OURS = ("cpp", "cuda", "triton")  # they are what is judged


def load(path: Path, device: str) -> dict[str, dict]:
    """Op → its record in the results at ``path``: a file, or the folder of an earlier run.

    Raises ``ValueError`` where there is no such file or it holds something else.
    """
    path = path_of(path, device, ".json") if path.is_dir() else path
    records = {op: record for op, record in read(path).items() if isinstance(record, dict)}
    if not records:
        raise ValueError(f"{path}: not a file of results (it has no op)")
    for op, record in records.items():
        for row in record.get("rows") or [{}]:
            if not isinstance(row, dict) or not {"case", "% copy", "ratios"} <= row.keys():
                raise ValueError(f"{path}: not a file of results ({op} has a row without case, % copy and ratios)")
    return records


def changes(device: str, old: dict[str, dict], new: dict[str, list[dict]], threshold: float) -> list[dict]:
    """A row per case of ``new`` (op → rows) that ``old`` has too; ``slower`` tells whether it is past ``threshold``."""
    found = []
    for op, rows in new.items():
        before = {row["case"]: row for row in old.get(op, {}).get("rows", ())}
        found += [change(device, op, before[row["case"]], row, threshold) for row in rows if row["case"] in before]
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
    name = read(path_of(Path(path), device, ".json") if Path(path).is_dir() else Path(path)).get("device")
    if name != device_name(device):
        text += f" {path} is of another device: {name}."
    return text
