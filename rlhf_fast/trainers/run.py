"""A run: the folder that holds its figures, checkpoints and result, and its random streams."""

import dataclasses
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_fast.trainers import checkpoint, processes
from rlhf_fast.trainers.folder import RECORD as RECORD
from rlhf_fast.trainers.folder import check_folder as check_folder
from rlhf_fast.trainers.folder import claim
from rlhf_fast.trainers.lines import cut
from rlhf_fast.trainers.page import write_page


class Run:
    """What one training run, of several processes the first alone, writes into ``folder``; nothing if that is None.

    ::

        run.json            the trainer, its config, the versions and how many processes it ran with
        metrics.jsonl       one JSON object per step; docs/metrics.md explains the names
        warnings.jsonl      what trainers/watch.py found in them, if anything
        report.html         all of that as a page, also of a run that fails
        tensorboard/        the same numbers
        samples.jsonl       responses written during PPO, GRPO or distillation
        margins.jsonl       a histogram per evaluation of a reward model
        checkpoints/step-N  the last ``keep`` of them, each complete: it is renamed into place when all is written
        (the files of the final model, as ``save_pretrained`` names them)
    """

    def __init__(self, kind: str, folder: str | Path | None, config: Any, *, keep: int, quiet: bool) -> None:
        first = processes.rank() == 0
        self.kind, self.config, self.keep, self.quiet = kind, config, keep, quiet or not first
        self.folder = None if folder is None or not first else Path(folder)
        self.stop_signal = 0
        self.start, self.before = time.monotonic(), 0.0  # seconds that the run had taken before it was resumed
        self.metrics: dict[str, float] = {}
        self.past: list[dict[str, Any]] = []  # the lines of metrics.jsonl before the run was resumed

    def open(self, total: int, *, resume: bool = False) -> Path | None:
        """Create the folder and start the clock of ``total`` steps; returns the checkpoint to go on from, if any.

        With ``resume`` a run that is there is taken up again; without one a new run begins. Raises ``ValueError`` where
        the folder holds anything else, a run that is finished or under way, or one of another trainer or config.
        """
        found = None
        if self.folder is not None:
            record = {"trainer": self.kind, "config": dataclasses.asdict(self.config), "versions": versions()}
            record["processes"] = processes.count()
            self.lock, going_on = claim(self.folder, record, resume=resume)
            found = self._newest() if going_on else None
            self._open_figures(_step(found) if found else 0)
        from tqdm import tqdm

        every = 0.2 if sys.stderr.isatty() else 10.0  # seconds between two looks of the bar
        self.bar = tqdm(
            total=total, desc=self.kind, unit="step", disable=self.quiet, mininterval=every, dynamic_ncols=True,
            initial=_step(found) if found else 0,
        )  # fmt: skip
        self.start = time.monotonic() - self.before
        return found

    def _newest(self) -> Path | None:
        """The newest checkpoint that is whole; the others are named in a warning."""
        assert self.folder is not None
        folder = self.folder / "checkpoints"
        whole = self.checkpoints()
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path not in whole:
                warnings.warn(f"{path} is half-written and ignored", stacklevel=2)
        return whole[-1] if whole else None

    def _open_figures(self, step: int) -> None:
        """Open the figures for what comes after ``step``; what a killed run wrote beyond it is dropped."""
        assert self.folder is not None
        from torch.utils.tensorboard import SummaryWriter

        lines = self.past = cut(self.folder / "metrics.jsonl", step)
        for name in ("samples.jsonl", "margins.jsonl", "warnings.jsonl"):
            cut(self.folder / name, step)
        for line in lines:
            self.metrics |= {name: value for name, value in line.items() if name not in ("step", "time")}
        self.before = lines[-1]["time"] if lines else 0.0
        self.lines = open(self.folder / "metrics.jsonl", "a")  # noqa: SIM115 (it lives as long as the run)
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1 if step else None)

    def close(self, error: BaseException | None = None) -> None:
        """Flush and close what ``open`` opened, and write report.html; ``error`` is what ended the run early."""
        self.bar.close()
        if self.folder is not None:
            self.lines.close()
            self.board.close()
            try:
                write_page(self.folder, self.kind, error)
            except Exception as fault:  # a page that cannot be written must not hide what ended the run
                warnings.warn(f"{self.folder / 'report.html'} was not written: {fault}", stacklevel=2)
            self.lock.close()

    def log(self, step: int, stats: dict[str, float], *, live: Iterable[str] = ()) -> None:
        """Append one line to metrics.jsonl, the same numbers to TensorBoard and those named ``live`` to the bar."""
        self.metrics = {**self.metrics, **stats}
        shown = {name: f"{stats[name]:.4g}" for name in live if name in stats}
        self.bar.set_postfix(shown, refresh=False)
        if self.folder is None:
            return
        # JSON has no NaN: a statistic without a value (the variance of one token, say) is null.
        numbers = {name: value if math.isfinite(value) else None for name, value in stats.items()}
        line = {"step": step, "time": round(time.monotonic() - self.start, 3), **numbers}
        self.lines.write(json.dumps(line) + "\n")
        self.lines.flush()
        for name, value in stats.items():
            self.board.add_scalar(name, value, step)

    def append(self, name: str, step: int, record: dict[str, Any]) -> None:
        """Append a line to the file ``name``."""
        if self.folder is not None:
            with open(self.folder / name, "a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": step, **record}, ensure_ascii=False) + "\n")

    def show_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Append ``{prompt, response, score}`` records, a score maybe None, to samples.jsonl; print them as a table."""
        for sample in samples:
            self.append("samples.jsonl", step, sample)
        if self.quiet:
            return
        from rich.console import Console
        from rich.table import Table

        table = Table("prompt", "response", "score", title=f"step {step}", show_lines=True)
        for prompt, response, score in (map(s.get, ("prompt", "response", "score")) for s in samples):
            table.add_row(_short(prompt), _short(response), "" if score is None else f"{score:.3f}")
        with self.bar.external_write_mode(file=sys.stderr):
            Console(stderr=True, markup=False, highlight=False).print(table)

    def warn(self, step: int, cause: str, sentence: str) -> None:
        """Append a warning to warnings.jsonl and say it above the progress bar."""
        self.append("warnings.jsonl", step, {"cause": cause, "warning": sentence})
        self.say(f"step {step}: {sentence}")

    def checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        """Let ``save`` fill checkpoints/step-N; a crash on the way leaves the older checkpoints as they are."""
        if self.folder is None:
            return
        final = self.folder / "checkpoints" / f"step-{step}"
        if checkpoint.is_whole(final):
            return
        partial = final.with_name(f"{final.name}.partial")
        shutil.rmtree(final, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save(partial)
        checkpoint.seal(partial)
        os.replace(partial, final)
        for old in self.checkpoints()[: -self.keep]:
            shutil.rmtree(old)

    def finish(self, save: Callable[[Path], None]) -> None:
        """Let ``save`` write the result into the folder: its files appear once all are written."""
        if self.folder is None:
            return
        partial = self.folder / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save(partial)
        for file in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):  # without it, no model
            os.replace(file, self.folder / file.name)
        partial.rmdir()
        record = json.loads((self.folder / RECORD).read_text()) | {"finished": True}
        (self.folder / f"{RECORD}.partial").write_text(json.dumps(record, indent=2) + "\n")
        os.replace(self.folder / f"{RECORD}.partial", self.folder / RECORD)
        self.say(f"the model is in {self.folder}")

    def checkpoints(self) -> list[Path]:
        """The whole checkpoints, oldest first."""
        if self.folder is None or not (self.folder / "checkpoints").is_dir():
            return []
        found = [path for path in (self.folder / "checkpoints").iterdir() if re.fullmatch(r"step-\d+", path.name)]
        return sorted(filter(checkpoint.is_whole, found), key=_step)

    def last_checkpoint(self) -> str:
        """The newest complete checkpoint, in words."""
        if processes.rank():
            return "process 0 knows the last good checkpoint"
        found = self.checkpoints()
        return f"last good checkpoint: {found[-1]}" if found else "there is no checkpoint yet"

    def say(self, line: str) -> None:
        """Write one line above the progress bar."""
        if not self.quiet:
            self.bar.write(line, file=sys.stderr)


def stream(seed: int, *key: int) -> torch.Generator:
    """A generator that depends on ``seed`` and ``key`` alone, so that every step can be drawn again on its own."""
    state = np.random.SeedSequence((seed, *key)).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def epochs(examples: list[Any], batch_size: int, count: int, seed: int) -> Iterator[list[Any]]:
    """``count`` passes over ``examples`` in batches, each pass in its own order; the last batch may be smaller."""
    for epoch in range(count):
        order = torch.randperm(len(examples), generator=stream(seed, epoch)).tolist()
        for start in range(0, len(order), batch_size):
            yield [examples[i] for i in order[start : start + batch_size]]


def versions() -> dict[str, str]:
    """The versions that a run depends on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    # Its own word for it, which names the CUDA that it was built with; the metadata of a wheel may not.
    known = {"torch": str(torch.__version__)}
    for package in ("rlhf-fast", "torch", "transformers", "numpy", "triton"):
        try:
            found[package] = known.get(package) or version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _short(text: str, room: int = 240) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= room else f"{text[: room // 2 - 1]} … {text[-room // 2 + 1 :]}"
