"""The loop of every trainer: steps, figures, checkpoints, and what becomes of a run that is stopped or fails."""

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf_fast import packing, sharded, zero
from rlhf_fast.trainers import checkpoint, processes
from rlhf_fast.trainers.run import Run
from rlhf_fast.trainers.watch import Watch, training_range

ECHO = 2.0  # seconds in which the same signal again is the launcher's
AGREED = (FloatingPointError, ValueError, TypeError)  # what all processes raise in the same place


def drive(
    trainer: Any, run: Run, *, total: int, save_every: int, live: Iterable[str], resume: bool = False
) -> dict[str, float]:
    """Take every step of ``trainer``, log it, save when due or interrupted; returns the last metrics.

    ``trainer`` has ``batches()`` (those that are left), ``step(batch)``, ``after(step, run)`` (evaluation, samples:
    more metrics), ``save(folder)`` (a checkpoint), ``restore(folder)``, ``save_model(folder)`` (the result), ``done``
    and ``updates``, the counts of its steps and of its optimizer's. Ctrl-C and SIGTERM end the run after the step that
    is under way, so that a checkpoint always holds the state between two steps; a second Ctrl-C ends it at once. Where
    the trainer has ``on_step(step, stats)``, that is called after each step, and what it raises ends the run. While
    the run lasts its models attend as its ``attention`` says.
    """
    found = processes.gathered(lambda: run.open(total, resume=resume))[0]
    deafen = _listen(run)
    told = getattr(trainer, "on_step", None)
    done, fault = 0, None  # steps: those of a loop of the caller's own, before this one, are among them
    attention = getattr(trainer, "attention", ())
    try:
        packing.take_up(attention)
        watch = Watch(run.config, training_range(trainer)).replay(run.past)
        if found is not None:
            trainer.restore(found)
            checkpoint.load_random(found, processes.rank())
            run.say(f"going on after step {trainer.done}, from {found}")
        done = run.bar.initial = run.bar.n = trainer.done
        for batch in trainer.batches():
            updates = trainer.updates
            try:
                stats = trainer.step(batch)
            except Exception as error:
                # Nothing of this step has reached the weights, and no process is elsewhere.
                if trainer.updates == updates and done and (processes.count() == 1 or isinstance(error, AGREED)):
                    save(trainer, run, done)
                for kind in AGREED:
                    if isinstance(error, kind):
                        raise kind(f"step {done + 1}: {error}; {run.last_checkpoint()}") from error
                raise
            done += 1
            stats |= trainer.after(done, run)
            run.log(done, stats, live=live)
            run.bar.update()
            for cause, sentence in watch.look(done, stats):
                run.warn(done, cause, sentence)
            if told is not None:
                told(done, stats)
            run.stop_signal = processes.highest(run.stop_signal)
            if run.stop_signal:
                save(trainer, run, done)
                run.say(f"stopped after step {done}; {run.last_checkpoint()}")
                raise KeyboardInterrupt if run.stop_signal == signal.SIGINT else SystemExit(128 + run.stop_signal)
            if save_every and done % save_every == 0:
                save(trainer, run, done)
        with _collected(trainer):
            processes.gathered(lambda: run.finish(trainer.save_model))
        return run.metrics
    except BaseException as error:
        fault = error
        raise
    finally:
        deafen()
        packing.put_back(attention)
        run.close(fault)


def save(trainer: Any, run: Run, done: int) -> None:
    """Write a checkpoint after step ``done``, in which every process keeps its own generators."""
    states = processes.gathered(checkpoint.random_state)

    def write(folder: Path) -> None:
        trainer.save(folder)
        for process, state in list(enumerate(states))[1:]:
            checkpoint.save_random(folder, process, state)

    with _collected(trainer):
        processes.gathered(lambda: run.checkpoint(done, write))


def _collected(trainer: Any) -> AbstractContextManager[None]:
    """Gather the sharded models that ``trainer`` teaches, and what its optimizer keeps, in the first process."""
    models = [m for m in vars(trainer).values() if sharded.is_sharded(m)]
    optimizer = getattr(trainer, "optimizer", None)
    if not (models or isinstance(optimizer, zero.ZeroAdamW)) or trainer.output_dir is None:
        return nullcontext()
    return sharded.collected([m for m in models if any(p.requires_grad for p in m.parameters())], optimizer)


def _listen(run: Run) -> Callable[[], None]:
    """Turn SIGINT and SIGTERM into ``run.stop_signal``; returns what puts the old handlers back."""
    previous: dict[int, Any] = {}
    heard: dict[int, float] = {}
    several = processes.count() > 1  # their launcher passes on what the terminal has sent to each of them already

    def note(number: int, _: FrameType | None) -> None:
        again = number in heard
        if again and time.monotonic() - heard[number] < ECHO:
            return
        heard[number] = time.monotonic()
        if again or not several:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if again:
            signal.raise_signal(number)
        run.stop_signal = number
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
