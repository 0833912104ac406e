"""The search itself: each trial is a run in a folder of its own, and the study a journal beside them."""

import dataclasses
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.report import Curve, Table, number, write_report
from rlhf_fast.sweep.plan import Plan, read_plan
from rlhf_fast.trainers.options import field_types
from rlhf_fast.trainers.run import RECORD, versions

JOURNAL = "study.log"
ENDS = {"COMPLETE": "finished", "PRUNED": "given up", "FAIL": "failed"}


def sweep(
    make: Callable[[Any, Path], Any], config: Any, plan: str | Path, output_dir: str | Path, *, resume: bool = False
) -> dict[str, Any]:
    """Search the fields of ``config`` that the file ``plan`` names; returns what results.json holds.

    Args:
        make: a new trainer from a config and the folder of its run.
        config: what the fields that are not searched keep.
        plan: a YAML file, see ``Plan``.
        output_dir: a new folder: ``trial-N/`` is the run of trial N, results.json and report.html the table of them,
            best.yaml the config of the best, ``study.log`` the journal of the search.
        resume: go on with the search in ``output_dir``; a trial that was interrupted goes on from its checkpoint.

    A trial whose numbers do not fit each other, or whose loss is NaN, has failed and the next one begins; any other
    error ends the search. Raises ``ValueError`` for a bad plan and for a folder that holds anything else.
    """
    if find_spec("optuna") is None:
        raise ModuleNotFoundError("optuna is not installed: pip install 'rlhf-fast[sweep]'", name="optuna")
    chosen, folder = read_plan(plan, config), Path(output_dir)
    study = _open(folder, chosen, config, str(plan), resume=resume)
    while (number := _next(study, chosen)) is not None:
        _run(study, number, chosen, make, config, folder, str(plan))
        _write(study, chosen, config, folder)
    results = _write(study, chosen, config, folder)
    if not getattr(config, "quiet", False):
        _show(results, folder)
    return results


def _open(folder: Path, plan: Plan, config: Any, path: str, *, resume: bool) -> Any:
    """The study in ``folder``, new or taken up again."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    held = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if held and not (resume and JOURNAL in held):
        words = f"{folder} already holds a sweep" if JOURNAL in held else f"{folder} is not empty (it holds {held[0]})"
        raise ValueError(f"{words}: choose another output_dir{', or resume it' * (JOURNAL in held)}")
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruners = {
        "median": optuna.pruners.MedianPruner(plan.startup_trials, plan.warmup_steps),
        "halving": optuna.pruners.SuccessiveHalvingPruner(min_resource=max(plan.warmup_steps, plan.prune_every)),
        "none": optuna.pruners.NopPruner(),
    }
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))), study_name="sweep", load_if_exists=True,
        direction=plan.direction, pruner=pruners[plan.pruner],
    )  # fmt: skip
    asked = {"plan": dataclasses.asdict(plan) | {"trials": 0}, "config": dataclasses.asdict(config)}
    asked = json.loads(json.dumps(asked))
    if study.user_attrs.setdefault("asked", asked) != asked:
        raise ValueError(f"{folder} holds a sweep of another plan or config than {path}: resume it as it was")
    study.set_user_attr("asked", asked)
    # What a stopped search has not drawn is drawn anew, and not what it drew first.
    study.sampler = optuna.samplers.TPESampler(seed=plan.seed + len(study.trials))
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs={"run": trial.user_attrs.get("run", trial.number)})
        study.set_user_attr(f"interrupted {trial.number}", True)
    return study


def _taken(study: Any) -> list[Any]:
    """The trials that count, without those that were interrupted and went on as others."""
    return [t for t in study.trials if not study.user_attrs.get(f"interrupted {t.number}")]


def _next(study: Any, plan: Plan) -> Any:
    """A new trial, or None where all were taken."""
    waiting = [trial for trial in study.trials if trial.state.name == "WAITING"]
    done = [trial for trial in _taken(study) if trial.state.is_finished()]
    return study.ask() if waiting or len(done) < plan.trials else None


def _run(
    study: Any, trial: Any, plan: Plan, make: Callable[[Any, Path], Any], config: Any, folder: Path, path: str
) -> None:
    """Train with the numbers of ``trial`` and tell the study how it went."""
    import optuna

    run = trial.user_attrs.get("run", trial.number)
    trial.set_user_attr("run", run)
    start, states = time.monotonic(), optuna.trial.TrialState
    verdict: dict[str, Any] = {"state": states.FAIL}
    values = plan.suggest(trial, field_types(type(config)))
    try:
        numbers = dataclasses.replace(config, **values)
    except ValueError as error:  # each value is taken, and not all of them together
        trial.set_user_attr("why", str(error))
    else:
        try:
            verdict = {"values": _train(trial, numbers, plan, make, folder / f"trial-{run}", path)}
        except optuna.TrialPruned:
            verdict = {"state": states.PRUNED}
        except (FloatingPointError, torch.OutOfMemoryError) as error:
            trial.set_user_attr("why", " ".join(str(error).split()))
    trial.set_user_attr("seconds", round(time.monotonic() - start, 1))
    study.tell(trial, **verdict)


def _train(trial: Any, numbers: Any, plan: Plan, make: Callable[[Any, Path], Any], folder: Path, path: str) -> float:
    """One run, from where it was interrupted; returns its metric."""
    heard = _Listener(trial, plan, folder / "metrics.jsonl")
    record = folder / RECORD
    if not (record.exists() and json.loads(record.read_text()).get("finished")):
        trainer = make(numbers, folder)
        trainer.on_step = heard
        trainer.train(resume=True)
    if not heard.values:
        raise ValueError(f"{path}: no step of the run has the metric {plan.metric}")
    return heard.value()


class _Listener:
    """Hears the figures of a run's steps, tells the study now and then, and ends the run where it has no hope."""

    def __init__(self, trial: Any, plan: Plan, earlier: Path) -> None:
        self.trial, self.plan = trial, plan
        lines = earlier.read_text(encoding="utf-8").splitlines() if earlier.exists() else []
        self.values: dict[int, float] = {}  # step → metric; of a run that is resumed also from before
        for line in lines:
            self.keep(json.loads(line))

    def keep(self, stats: dict[str, Any]) -> None:
        """Note the metric, if this step has it."""
        value = stats.get(self.plan.metric)
        if value is not None and value == value:
            self.values[stats["step"]] = value

    def __call__(self, step: int, stats: dict[str, float]) -> None:
        """Take in one step. Raises ``TrialPruned``."""
        import optuna

        self.values = {at: value for at, value in self.values.items() if at < step}  # a resumed run repeats some
        self.keep({"step": step, **stats})
        if step % self.plan.prune_every == 0 and self.values:
            self.trial.report(self.value(), step)
            if self.trial.should_prune():
                raise optuna.TrialPruned(f"{self.plan.metric} {number(self.value())} at step {step}")

    def value(self) -> float:
        """The mean of the last values of the metric."""
        last = [self.values[step] for step in sorted(self.values)][-self.plan.last :]
        return sum(last) / len(last)


def _write(study: Any, plan: Plan, config: Any, folder: Path) -> dict[str, Any]:
    """results.json, report.html and best.yaml of all trials that have ended so far."""
    import yaml

    rows = []
    for trial in _taken(study):
        if trial.state.is_finished():
            values = trial.intermediate_values
            last = trial.value if trial.value is not None else values[max(values)] if values else None
            said = {"trial": trial.user_attrs["run"], "ended": ENDS[trial.state.name], plan.metric: last}
            why = {"why": trial.user_attrs["why"]} if "why" in trial.user_attrs else {}
            rows.append(said | {"params": trial.params, "seconds": trial.user_attrs.get("seconds")} | why)
    whole = [row for row in rows if row["ended"] == "finished"]
    pick = max if plan.direction == "maximize" else min
    best = pick(whole, key=lambda row: row[plan.metric]) if whole else None
    results = {"metric": plan.metric, "direction": plan.direction, "best": best, "trials": rows, "versions": versions()}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if best is not None:
        numbers = dataclasses.asdict(config) | best["params"]
        (folder / "best.yaml").write_text(yaml.safe_dump(numbers, sort_keys=False))
    points = [(float(row["trial"]), row[plan.metric]) for row in rows]
    header, cells = _table(results)
    write_report(
        folder, title=f"Sweep: {plan.metric}", summary=f"{len(rows)} of {plan.trials} trials, {plan.direction}.",
        tables=[Table("Trials, the best first", header, cells)], samples=[], environment="",
        curves=[Curve(plan.metric, {plan.metric: points}, "trial")] if len(points) > 1 else [],
    )  # fmt: skip
    return results


def _table(results: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows, the best trial first, those without a value last."""
    metric, sign = results["metric"], -1.0 if results["direction"] == "maximize" else 1.0
    fields = list(dict.fromkeys(name for row in results["trials"] for name in row["params"]))

    def place(row: dict[str, Any]) -> tuple[bool, float]:
        return (row["ended"] != "finished", sign * row[metric] if row[metric] is not None else 0.0)

    def shown(value: Any) -> str:
        return "" if value is None else number(value) if isinstance(value, float) else str(value)

    rows = []
    for row in sorted(results["trials"], key=place):
        tried = (shown(row["params"].get(name)) for name in fields)
        ending = row["ended"] + (f": {row['why']}" if "why" in row else "")
        rows.append((f"trial-{row['trial']}", shown(row[metric]), *tried, ending, f"{row['seconds']:.0f} s"))
    return ("", metric, *fields, "", "time"), rows


def _show(results: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    header, rows = _table(results)
    table = RichTable(*header, title="Trials, the best first")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    console.print(table)
    if results["best"] is not None:
        console.print(f"the best config: {folder / 'best.yaml'}, its model: {folder}/trial-{results['best']['trial']}")
