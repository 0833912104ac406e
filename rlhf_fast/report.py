"""One HTML file about one run: its figures, curves and samples, with nothing to fetch and nothing to install."""

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 420, 230, 52, 34, 10, 14  # of a chart, in CSS pixels
MOST_POINTS = 400  # per line: a chart is no wider


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; numbers stand to the right, ``True`` and ``False`` become a tick and a cross."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    picture: Path | None = None  # a PNG to show below them, which becomes part of the page


@dataclass(frozen=True)
class Curve:
    """One chart: lines over ``x``, by name; a point without a value is left out."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float | None]]]
    x: str = "step"
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """A prompt and what was answered to it: answers by the name of who wrote them, with a score where there is one."""

    prompt: str
    answers: Mapping[str, tuple[str, float | None]]


def write_report(
    folder: str | Path,
    *,
    title: str | None = None,
    summary: str = "",
    tables: Iterable[Table] | None = None,
    curves: Iterable[Curve] | None = None,
    samples: Iterable[Sample] | None = None,
    appendix: Iterable[Table] = (),
    environment: str | None = None,
) -> Path:
    """Write ``folder/report.html`` and return its path; what is not given is read from the run in ``folder``.

    The tables of ``appendix`` stand at the end, folded up.

    Read are ``metrics.jsonl`` (a curve for every number), ``samples.jsonl`` (the last ones) and ``run.json`` (the
    trainer, its config, the versions). Raises ``ValueError`` if ``folder`` holds none of what is to be read, naming a
    line that is not JSON.
    """
    folder = Path(folder)
    record = json.loads((folder / "run.json").read_text()) if (folder / "run.json").exists() else {}
    if curves is None:
        curves = metric_curves(read_lines(folder / "metrics.jsonl"))
    if samples is None:
        samples = _last_samples(folder / "samples.jsonl")
    if tables is None:
        tables = [Table("Config", ("field", "value"), list(record["config"].items()))] if "config" in record else []
    if environment is None:
        environment = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    parts = [f"<p class=summary>{escape(summary)}</p>"] if summary else []
    parts += [_table(table) for table in tables]
    charts = [_figure(curve) for curve in curves]
    parts += ["<h2>Curves</h2>", "<div class=charts>", *charts, "</div>"] if charts else []
    shown = [_sample(sample) for sample in samples]
    parts += ["<h2>Samples</h2>", *shown] if shown else []
    parts += [f"<details><summary>{escape(t.title)}</summary>{_table(t, titled=False)}</details>" for t in appendix]
    parts += [f"<footer>{escape(environment)}</footer>"] if environment else []
    name = escape(title or f"{record.get('trainer', folder.name)} run")
    page = PAGE.replace("{style}", STYLE).replace("{title}", name).replace("{body}", "\n".join(parts))
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a ``.jsonl`` file. Raises ``ValueError`` naming the line that is not one, or the missing file."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file, so there is nothing to report")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from None
    return found


def metric_curves(lines: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> list[Curve]:
    """A chart for each of ``names``, by default for every number in ``lines``, over their ``step``."""
    if names is None:
        names = list(dict.fromkeys(name for line in lines for name in line if name not in ("step", "time")))
    return [Curve(name, {name: series(lines, name)}) for name in names]


def series(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float | None]]:
    """``(step, value)`` of every line that has ``name``."""
    return [(line.get("step", i), line[name]) for i, line in enumerate(lines, 1) if name in line]


def _last_samples(path: Path) -> list[Sample]:
    lines = read_lines(path) if path.exists() else []
    last = [line for line in lines if line.get("step") == lines[-1].get("step")]
    return [Sample(s["prompt"], {f"step {s.get('step')}": (s["response"], s.get("score"))}) for s in last]


def _table(table: Table, *, titled: bool = True) -> str:
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in table.header)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in table.rows)
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    scroll = f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    title = f"<h2>{escape(table.title)}</h2>" if titled else ""
    return f"<section>{title}{scroll}{note}{_picture(table)}</section>"


def _picture(table: Table) -> str:
    if table.picture is None:
        return ""
    data = base64.b64encode(table.picture.read_bytes()).decode()
    return f'<img alt="{escape(table.title)}" src="data:image/png;base64,{data}">'


def _cell(cell: Any) -> str:
    if isinstance(cell, bool):
        return "<td class=good>✓ holds</td>" if cell else "<td class=bad>✗ missed</td>"
    if isinstance(cell, (int, float)):
        return f"<td class=number>{number(cell)}</td>"
    return f"<td>{escape(str(cell))}</td>"


def number(value: float) -> str:
    """``value`` with four digits that count."""
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{value:.4g}"


def _sample(sample: Sample) -> str:
    answers = ""
    for name, (text, score) in sample.answers.items():
        badge = "" if score is None else f" <b class={'good' if score > 0 else 'bad'}>{score:+.3g}</b>"
        answers += f"<dt>{escape(name)}{badge}</dt><dd>{escape(text)}</dd>"
    return f"<article><p class=prompt>{escape(sample.prompt)}</p><dl>{answers}</dl></article>"


def _figure(curve: Curve) -> str:
    lines = {name: _thin(points) for name, points in curve.lines.items()}
    keys = "".join(f"<span class=key><i class=k{i}></i>{escape(name)}</span>" for i, name in enumerate(lines))
    caption = f"<b>{escape(curve.title)}</b> " + (keys if len(lines) > 1 else "")
    note = f"<p class=note>{escape(curve.note)}</p>" if curve.note else ""
    return f"<figure><figcaption>{caption}</figcaption>{_chart(curve, lines)}{note}</figure>"


def _thin(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    """The points that have a finite value, at most ``MOST_POINTS`` of them, the last one among them."""
    there = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    stride = math.ceil(len(there) / MOST_POINTS) or 1
    return there[::-1][::stride][::-1]


def _chart(curve: Curve, lines: Mapping[str, list[tuple[float, float]]]) -> str:
    every = [point for points in lines.values() for point in points]
    if not every:
        return "<p class=note>no values</p>"
    xs, ys = ticks(*_ends(x for x, _ in every)), ticks(*_ends(y for _, y in every))
    x0, x1 = _ends(x for x, _ in every)
    x1 = x1 if x1 > x0 else x0 + 1

    def across(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - BOTTOM - TOP)

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(curve.title)}">']
    for y in ys:
        out.append(f'<path class=grid d="M{LEFT} {down(y):.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 7}" y="{down(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in (x for x in xs if x0 <= x <= x1):
        out.append(f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(x)}</text>')
    out.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(curve.x)}</text>')
    for i, points in enumerate(lines.values()):
        path = "M" + "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in points)
        if len(points) == 1:
            path += "h0.1"  # a line of one point is a dot
        if points:
            out.append(f'<path class="line l{i}" d="{path}"/>')
    return "".join(out) + "</svg>"


def _ends(values: Iterable[float]) -> tuple[float, float]:
    there = list(values)
    return min(there), max(there)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, evenly spaced by 1, 2 or 5 times a power of ten, the first ≤ ``low`` and the last ≥ ``high``."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        room = abs(low) / 10 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main><h1>{title}</h1>
{body}
</main></body></html>
"""
STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1d2430; --soft: #667085; --rule: #dfe3ea; --card: #f6f7f9;
  --good: #137a4b; --bad: #b3261e; --c0: #1f5fd0; --c1: #d0591f; --c2: #137a4b; --c3: #8a3fb8 }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --ink: #e6e9ee; --soft: #98a2b3; --rule: #313842;
  --card: #1c2128; --good: #4cc38a; --bad: #ff8a80; --c0: #7aa8ff; --c1: #ffa06b; --c2: #4cc38a; --c3: #cf9bf2 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif }
main { max-width: 960px; margin: 0 auto; padding: 24px 16px 48px }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 12px }
h2 { font-size: 1.15rem; margin: 32px 0 10px }
.summary { max-width: 70ch; white-space: pre-line }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: 6px 12px 6px 0; vertical-align: top; border-bottom: 1px solid var(--rule) }
th { color: var(--soft); font-weight: 600; font-size: .85rem }
.number { font-variant-numeric: tabular-nums }
.good { color: var(--good) }
.bad { color: var(--bad) }
td.good, td.bad { white-space: nowrap }
.note, footer { color: var(--soft); font-size: .85rem; margin: 8px 0 0 }
footer { margin-top: 40px }
details { margin: 24px 0 0 }
details summary { cursor: pointer; font-size: 1.15rem; font-weight: 700 }
.charts { display: grid; gap: 20px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)) }
img { max-width: 100%; height: auto; margin: 12px 0 0; border-radius: 8px }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: 12px }
figcaption { font-size: .9rem; margin: 0 0 6px }
.key { margin-left: 12px; color: var(--soft); white-space: nowrap }
.key i { display: inline-block; width: 14px; height: 3px; margin-right: 5px; vertical-align: middle }
svg { width: 100%; height: auto; display: block }
svg text { fill: var(--soft); font-size: 11px }
.grid { stroke: var(--rule) }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
.l0 { stroke: var(--c0) } .l1 { stroke: var(--c1) } .l2 { stroke: var(--c2) } .l3 { stroke: var(--c3) }
.k0 { background: var(--c0) } .k1 { background: var(--c1) } .k2 { background: var(--c2) } .k3 { background: var(--c3) }
article { background: var(--card); border-radius: 8px; padding: 12px 16px; margin: 0 0 12px }
.prompt { margin: 0 0 8px; font-weight: 600 }
dl { margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px }
dt { color: var(--soft) }
dd { margin: 0 }
dd, .prompt { overflow-wrap: anywhere; white-space: pre-line }
@media (max-width: 560px) { dl { display: block } dd { margin-bottom: 8px } }
"""
