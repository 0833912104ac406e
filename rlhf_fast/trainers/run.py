"""A run: the folder that holds its figures, checkpoints and result, and the loop that keeps both safe."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

RECORD = "run.json"


def check_folder(folder: str | Path | None) -> None:
    """Raise ``ValueError`` if ``folder`` holds a run or anything else, ``OSError`` if it cannot be a folder."""
    if folder is None or not Path(folder).exists():
        return
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"{folder} is a file, not a folder to write a run into")
    held = sorted(entry.name for entry in Path(folder).iterdir())
    if RECORD in held:
        raise ValueError(f"{folder} already holds a run ({RECORD}): choose another output_dir or remove it")
    if held:
        raise ValueError(f"{folder} is not empty (it holds {held[0]}): choose another output_dir")


class Run:
    """What one training run writes into ``folder``; with ``folder=None`` it writes nothing.

    ::

        run.json            the trainer, its config and the versions it ran with
        metrics.jsonl       one JSON object per step
        tensorboard/        the same numbers
        samples.jsonl       responses written during PPO
        checkpoints/step-N  the last ``keep`` of them, each complete: it is renamed into place when all is written
        (the files of the final model, as ``save_pretrained`` names them)
    """

    def __init__(self, kind: str, folder: str | Path | None, config: Any, *, keep: int, quiet: bool) -> None:
        check_folder(folder)
        self.kind, self.config, self.keep, self.quiet = kind, config, keep, quiet
        self.folder = None if folder is None else Path(folder)
        self.stop_signal = 0
        self.start = time.monotonic()
        self.metrics: dict[str, float] = {}

    def open(self, total: int) -> None:
        """Create the folder and start the clock of ``total`` steps."""
        if self.folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            check_folder(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            record = {"trainer": self.kind, "config": dataclasses.asdict(self.config), "versions": versions()}
            try:
                with open(self.folder / RECORD, "x") as file:  # of two runs that start together one gets the folder
                    file.write(json.dumps(record, indent=2) + "\n")
            except FileExistsError:
                check_folder(self.folder)
            self.lines = open(self.folder / "metrics.jsonl", "a")  # noqa: SIM115 (it lives as long as the run)
            self.board = SummaryWriter(str(self.folder / "tensorboard"))
        from tqdm import tqdm

        every = 0.2 if sys.stderr.isatty() else 10.0  # seconds between two looks of the bar
        self.bar = tqdm(
            total=total, desc=self.kind, unit="step", disable=self.quiet, mininterval=every, dynamic_ncols=True
        )
        self.start = time.monotonic()

    def close(self) -> None:
        """Flush and close what ``open`` opened."""
        self.bar.close()
        if self.folder is not None:
            self.lines.close()
            self.board.close()

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

    def show_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Append ``{prompt, response, score}`` records to samples.jsonl and print them as a table."""
        if self.folder is not None:
            with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as lines:
                lines.writelines(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n" for sample in samples)
        if self.quiet:
            return
        from rich.console import Console
        from rich.table import Table

        table = Table("prompt", "response", "score", title=f"step {step}", show_lines=True)
        for sample in samples:
            table.add_row(_short(sample["prompt"]), _short(sample["response"]), f"{sample['score']:.3f}")
        with self.bar.external_write_mode(file=sys.stderr):
            Console(stderr=True, markup=False, highlight=False).print(table)

    def checkpoint(self, step: int, save: Callable[[Path], None]) -> None:
        """Let ``save`` fill checkpoints/step-N; a crash on the way leaves the older checkpoints as they are."""
        if self.folder is None:
            return
        final = self.folder / "checkpoints" / f"step-{step}"
        if final.exists():
            return
        partial = final.with_name(f"{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save(partial)
        os.replace(partial, final)
        for old in self.checkpoints()[: -self.keep]:
            shutil.rmtree(old)

    def finish(self, save: Callable[[Path], None]) -> None:
        """Let ``save`` write the result into the folder: its files appear once all are written."""
        if self.folder is None:
            return
        partial = self.folder / "model.partial"
        partial.mkdir()
        save(partial)
        for file in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):  # without it, no model
            os.replace(file, self.folder / file.name)
        partial.rmdir()
        self.say(f"the model is in {self.folder}")

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        if self.folder is None or not (self.folder / "checkpoints").is_dir():
            return []
        found = [path for path in (self.folder / "checkpoints").iterdir() if re.fullmatch(r"step-\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def last_checkpoint(self) -> str:
        """The newest complete checkpoint, in words."""
        found = self.checkpoints()
        return f"last good checkpoint: {found[-1]}" if found else "there is no checkpoint yet"

    def say(self, line: str) -> None:
        """Write one line above the progress bar."""
        if not self.quiet:
            self.bar.write(line, file=sys.stderr)


def drive(trainer: Any, run: Run, *, total: int, save_every: int, live: Iterable[str]) -> dict[str, float]:
    """Take every step of ``trainer``, log it, save when due or interrupted; returns the last metrics.

    ``trainer`` has ``batches()``, ``step(batch)``, ``after(step, run)`` (evaluation, samples: more metrics),
    ``save(folder)`` (a checkpoint), ``save_model(folder)`` (the result) and ``updates``, the count of its optimizer
    steps. Ctrl-C and SIGTERM end the run after the step that is under way, so that a checkpoint always holds the
    state between two steps; a second Ctrl-C ends it at once.
    """
    run.open(total)
    restore = _listen(run)
    done = 0
    try:
        for batch in trainer.batches():
            updates = trainer.updates
            try:
                stats = trainer.step(batch)
            except Exception as error:
                if trainer.updates == updates and done:  # nothing of this step has reached the weights
                    run.checkpoint(done, trainer.save)
                for kind in (FloatingPointError, ValueError, TypeError):
                    if isinstance(error, kind):
                        raise kind(f"step {done + 1}: {error}; {run.last_checkpoint()}") from error
                raise
            done += 1
            run.log(done, stats | trainer.after(done, run), live=live)
            run.bar.update()
            if run.stop_signal:
                run.checkpoint(done, trainer.save)
                run.say(f"stopped after step {done}; {run.last_checkpoint()}")
                raise KeyboardInterrupt if run.stop_signal == signal.SIGINT else SystemExit(128 + run.stop_signal)
            if save_every and done % save_every == 0:
                run.checkpoint(done, trainer.save)
        run.finish(trainer.save_model)
        return run.metrics
    finally:
        restore()
        run.close()


def _listen(run: Run) -> Callable[[], None]:
    """Turn SIGINT and SIGTERM into ``run.stop_signal``; returns what puts the old handlers back."""
    previous: dict[int, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        run.stop_signal = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if not run.quiet:  # not by print: the signal may have come in the middle of one
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:  # signals reach the main thread only; elsewhere the caller keeps its own way to stop
        pass
    return restore


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


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the numbers of a trainer beside its weights: trainer.json."""
    (folder / "trainer.json").write_text(json.dumps(state, indent=2) + "\n")


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


def _short(text: str, room: int = 240) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= room else f"{text[: room // 2 - 1]} … {text[-room // 2 + 1 :]}"
