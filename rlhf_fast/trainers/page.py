"""report.html of a run: its curves, the last samples, the warnings, the config and the versions."""

import json
import math
from pathlib import Path
from typing import Any

from rlhf_fast.metrics import METRICS, find
from rlhf_fast.report import Curve, Sample, Table, number, read_lines, series, write_report

MOST_LINES = 5000  # of metrics.jsonl that are read: more would take more than a second, and no chart is so wide
MOST_SAMPLES, LONGEST = 8, 2000  # samples, and characters of each text


def write_page(folder: Path, kind: str, error: BaseException | None = None) -> Path:
    """Write ``report.html`` into the ``folder`` of a run of trainer ``kind`` that ended, by ``error`` or well."""
    lines = _metrics(folder / "metrics.jsonl")
    record = json.loads((folder / "run.json").read_text())
    warned = read_lines(folder / "warnings.jsonl") if (folder / "warnings.jsonl").exists() else []
    curves, still = _curves(lines)
    curves += _margins(folder / "margins.jsonl")
    tables = []
    if warned:
        rows = [(w["step"], w["warning"]) for w in warned[-50:]]
        tables = [Table("Warnings", ("step", "what the figures say"), rows)]
    after = [Table("Figures that never changed", ("name", "value", "what it is"), still)] if still else []
    config = [(name, _value(value)) for name, value in record["config"].items()]
    after += [Table("Config", ("field", "value"), config), Table("Versions", ("", ""), [*record["versions"].items()])]
    return write_report(
        folder, title=f"{kind} run: {folder.name}", summary=_summary(lines, len(warned), error), tables=tables,
        curves=curves, samples=_samples(folder / "samples.jsonl"), appendix=after, environment="",
    )  # fmt: skip


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of ``path``; of very many the last, evenly spaced ones before it and all with an evaluation."""
    texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    stride = math.ceil(len(texts) / MOST_LINES) or 1
    kept = [text for i, text in enumerate(reversed(texts)) if i % stride == 0 or '"eval_' in text]
    return [json.loads(text) for text in reversed(kept)]


def _curves(lines: list[dict[str, Any]]) -> tuple[list[Curve], list[tuple[str, Any, str]]]:
    """A chart for each figure that changes, in the order of ``METRICS``; and those that do not, as rows."""
    written = dict.fromkeys(name for line in lines for name in line if name not in ("step", "time"))
    known = [name for base in METRICS for name in (f"eval_{base}", base) if name in written]
    names = known + [name for name in written if name not in known]
    curves, still = [], []
    for name in names:
        points, metric = series(lines, name), find(name)
        unit = f"{metric.unit}: " if metric and metric.unit not in ("1", "varies") else ""
        values = {value for _, value in points}
        if len(values) == 1:
            value = values.pop()
            still.append((name, "no value" if value is None else number(value), metric.meaning if metric else ""))
        else:
            curves.append(Curve(name, {name: points}, note=unit + (metric.meaning if metric else "")))
    return curves, still


def _margins(path: Path) -> list[Curve]:
    """The margins of the last evaluation of a reward model, as a histogram."""
    if not path.exists():
        return []
    last = read_lines(path)[-1]
    edges = last["edges"]
    shape = [((low + high) / 2, n) for low, high, n in zip(edges, edges[1:], last["counts"], strict=False)]
    note = f"held-out pairs or labels at step {last['step']}: those above 0 are told right"
    return [Curve("eval_margins", {"eval_margins": shape}, x="margin", note=note)]


def _samples(path: Path) -> list[Sample]:
    """The last samples that were written, the longest of their texts cut."""
    texts = path.read_text(encoding="utf-8").splitlines()[-MOST_SAMPLES:] if path.exists() else []
    lines = [json.loads(text) for text in texts]
    last = [line for line in lines if line["step"] == lines[-1]["step"]]
    return [Sample(_cut(s["prompt"]), {f"step {s['step']}": (_cut(s["response"]), s["score"])}) for s in last]


def _summary(lines: list[dict[str, Any]], warned: int, error: BaseException | None) -> str:
    step, seconds = (lines[-1]["step"], lines[-1]["time"]) if lines else (0, 0.0)
    words = {KeyboardInterrupt: "Interrupted", SystemExit: "Stopped by a signal"}
    if error is None:
        ending = "Finished"
    else:
        ending = words.get(type(error), f"Ended by {type(error).__name__} ({_cut(str(error))})")
    hours, rest = divmod(round(seconds), 3600)
    time = f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
    said = "no warnings" if not warned else "1 warning" if warned == 1 else f"{warned} warnings"
    return f"{ending} after {step} step{'s' * (step != 1)} and {time}, with {said}."


def _value(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
