"""Whose the folder of a run is: run.json says what runs in it, and its lock whether that is alive."""

import fcntl
import json
from pathlib import Path
from typing import Any, TextIO

RECORD = "run.json"
#: What a run leaves that ends in its first step; the figures are empty.
FIRST = {RECORD, "metrics.jsonl", "tensorboard", "report.html"}
#: Fields that change no number of a run, or only its rounding: they may change when it is resumed.
FREE = ("quiet", "keep", "save_every", "sample_every", "eval_every", "micro_batch_size", "gradient_checkpointing",
        "packing")  # fmt: skip


def check_folder(folder: str | Path | None, *, run: bool = False) -> None:
    """Raise ``ValueError`` if ``folder`` is not free for a new run, ``OSError`` if it cannot be a folder.

    It is free if it holds nothing, or nothing but a run that ended before its first step was done. With ``run`` any run
    that is there already is no reason.
    """
    if folder is None or not Path(folder).exists():
        return
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, not a folder to write a run into")
    held = sorted(entry.name for entry in folder.iterdir())
    if held and RECORD not in held:
        raise ValueError(f"{folder} is not empty (it holds {held[0]}): choose another output_dir")
    if held and not run:
        with open(folder / RECORD) as file:
            _lock(file, fcntl.LOCK_SH)
        if not _is_new(folder):
            raise _taken(folder)


def claim(folder: Path, record: dict[str, Any], *, resume: bool) -> tuple[TextIO, bool]:
    """Make ``folder`` that of the run in ``record``: its ``trainer``, ``config`` and more for run.json.

    Returns the file whose lock keeps other processes out for as long as it is open, and whether the run was there
    already. Raises ``ValueError`` where the folder holds anything else, a run that is finished or under way, one
    of another trainer or config, or any without ``resume``.
    """
    check_folder(folder, run=True)
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / RECORD, "a+")  # noqa: SIM115 (it lives as long as the run)
    try:
        _lock(file, fcntl.LOCK_EX)  # of two runs that start together one gets the folder
        new = _is_new(folder)
        if new:
            file.truncate(0)
            file.write(json.dumps(record, indent=2) + "\n")
            file.flush()
        elif resume:
            _check_record(folder, record)
        else:
            raise _taken(folder)
    except BaseException:
        file.close()
        raise
    return file, not new


def _lock(file: TextIO, how: int) -> None:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{Path(file.name).parent} holds a run that is under way") from None


def _is_new(folder: Path) -> bool:
    """Whether nothing is in ``folder`` but what a run leaves that has done no step."""
    figures, held = folder / "metrics.jsonl", {entry.name for entry in folder.iterdir()}
    done = "finished" in _read(folder) or (figures.exists() and figures.stat().st_size > 0)
    return held <= FIRST and not done


def _taken(folder: Path) -> ValueError:
    return ValueError(f"{folder} already holds a run ({RECORD}): choose another output_dir or remove it")


def _check_record(folder: Path, record: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless the run in the folder is that of ``record``, and unfinished."""
    there = _read(folder)
    if not {"trainer", "config"} <= there.keys():
        raise ValueError(f"{folder / RECORD} is damaged: it does not say which run is there, and none can go on")
    if there["trainer"] != record["trainer"]:
        raise ValueError(f"{folder} holds a run of {there['trainer']}, which {record['trainer']} cannot resume")
    if "finished" in there:
        raise ValueError(f"{folder} holds a run that is finished, its model included: nothing to resume")
    config, kept = record["config"], there["config"]
    for name in (n for n in kept if n in config and n not in FREE and kept[n] != config[n]):
        raise ValueError(
            f"{folder} holds a run with {name}={kept[name]!r}, and {config[name]!r} would not be that run: "
            "resume it as it was"
        )


def _read(folder: Path) -> dict[str, Any]:
    """What run.json says; nothing if its process was killed when it wrote it."""
    try:
        found = json.loads((folder / RECORD).read_text())
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}
