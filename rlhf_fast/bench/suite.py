"""The command ``rlhf-fast bench``: which ops, where, against whom, and what became slower."""

import datetime
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_fast import dispatch
from rlhf_fast.bench import compare as comparison
from rlhf_fast.bench import page, record
from rlhf_fast.bench.harness import device_name, devices
from rlhf_fast.bench.peers import PEERS, chosen_peers, version
from rlhf_fast.flags import suggestion
from rlhf_fast.trainers.options import chosen, option, validate

#: Those that are measured: each has a module here.
OPS = tuple(dispatch.CHOICES)


@dataclass(frozen=True)
class BenchConfig:
    """Every number of the benchmark."""

    threshold: float = option(1.25, "with --compare: exit status 1 where an op is so many times slower", above=1.0)
    seconds: float | None = option(None, "for each candidate of a case; 1 on a CPU, 0.15 on a GPU if absent", above=0)

    def __post_init__(self) -> None:
        validate(self)


def bench(
    *,
    op: str | None = None,
    device: str | None = None,
    peers: str | None = None,
    compare: str | None = None,
    out: str = "rlhf-fast-bench",
    config: BenchConfig | None = None,
) -> int:
    """Measure, print, and write results, pictures and ``report.html`` to the folder ``out``.

    Args:
        op: names of ops with commas between them; all if absent.
        device: ``cpu``, ``cuda`` or both with a comma; what this machine has if absent.
        peers: names of ``peers.PEERS``, or ``none``; all that are installed if absent.
        compare: results of an earlier run, a file or its folder.
        out: a folder; results of other ops and devices in it stay.
        config: a ``BenchConfig``.

    Returns 1 if ``compare`` is given and an op became slower than the threshold allows, else 0. Raises ``ValueError``
    for an unknown op, device or peer, a package that is not installed, and for results that cannot be read.
    """
    c = chosen(config, BenchConfig)
    names, places, others = chosen_ops(op), chosen_devices(device), chosen_peers(peers)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {out} is not a folder")
    old = {place: comparison.load(Path(compare), place) for place in places} if compare else {}
    if compare and not any(set(names) & set(records) for records in old.values()):
        raise ValueError(f"{compare} has no results of {', '.join(names)}")
    folder.mkdir(parents=True, exist_ok=True)  # where that fails, before minutes of measurement
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {out} cannot be written to")
    for place in places:
        record.known(folder, place)
    facts = environment(places)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    record.touch_memory()
    compared, remarks = [], []
    try:
        for place in places:
            rows = {name: record.run(name, place, folder, peers=others, seconds=c.seconds) for name in names}
            if compare:
                compared += comparison.changes(place, old[place], rows, c.threshold)
                remarks += [comparison.remark(place, compare), *comparison.alone(place, old[place], rows)]
    finally:  # interrupted: of what is there
        if any(record.path_of(folder, place, ".json").exists() for place in places):
            print(f"report in {page.write(folder, places, facts, compared, ' '.join(remarks))}")
    return verdict(compared, remarks, c.threshold) if compare else 0


def verdict(compared: list[dict], remarks: list[str], threshold: float) -> int:
    """Print the comparison; 1 if a case is past ``threshold``. Raises ``ValueError`` where no case was compared."""
    if not compared:
        raise ValueError("nothing to compare: the earlier results have no case of this run")
    record.table("Against earlier results", [row | {"slower": "✗" if row["slower"] else ""} for row in compared])
    print("\n".join(dict.fromkeys(remarks)))
    slower = [row for row in compared if row["slower"]]
    for row in slower:
        print(f"slower: {row['op']} {row['case']} on {row['device']}: {row['times slower']:.2f} times")
    print(f"{len(slower)} of {len(compared)} cases are more than {threshold:g} times slower")
    return 1 if slower else 0


def chosen_ops(text: str | None) -> list[str]:
    """The ops between the commas of ``text``; all without it. Raises ``ValueError`` for an unknown one."""
    names = OPS if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in OPS:
            raise ValueError(f"unknown op {name!r}{suggestion(name, OPS)}: there are {', '.join(OPS)}")
    return list(dict.fromkeys(names))


def chosen_devices(text: str | None) -> list[str]:
    """The devices between the commas of ``text``; all there are without it. Raises ``ValueError`` for another."""
    names = devices() if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ("cpu", "cuda"):
            raise ValueError(f"unknown device {name!r}: there are cpu and cuda")
        if name not in devices():
            raise ValueError("device cuda: torch sees no GPU on this machine")
    return list(dict.fromkeys(names))


def environment(places: list[str]) -> dict[str, str]:
    """What the figures depend on: machine, versions, kernels, peers."""
    from rlhf_fast import __version__

    found = {
        "rlhf_fast": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    found |= {place: device_name(place) for place in places} | record.versions()
    found |= {"system": platform.platform(), "load": f"{os.getloadavg()[0]:.2f}"}
    if "cuda" in places:
        found |= {"driver": dispatch.driver(), "CUDA": str(torch.version.cuda)}
    for place in places:
        kernels = {name: dispatch.serving(name, place.upper()) for name in OPS}
        found[f"kernels on {place}"] = ", ".join(f"{name} {kernel}" for name, kernel in kernels.items())
    installed = {name: version(package) for name, package in PEERS.items() if package is not None}
    return found | {"peers": ", ".join(f"{name} {v}" for name, v in installed.items() if v is not None) or "none"}
