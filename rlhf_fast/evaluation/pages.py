"""An evaluation on the terminal and in its folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_fast.data import Prompt
from rlhf_fast.evaluation.answers import Answers
from rlhf_fast.report import Curve, Sample, Table, number, write_report

#: figure → what it is called; those with an interval are shown with it.
NAMES = {
    "reward": "mean reward",
    "kl": "KL, nats a response",
    "perplexity": "perplexity",
    "bleu": "BLEU, 0 to 100",
    "rouge1": "ROUGE-1, 0 to 1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "tokens": "tokens, mean",
    "tokens_median": "tokens, median",
    "tokens_p95": "tokens, 95 %",
    "tokens_max": "tokens, most",
    "ended": "share that ends",
    "distinct": "share of different",
}
NOTE = (
    "In brackets: 95 % intervals, Wilson's for the win rate of the model over each, in which a tie counts half. The KL "
    "is taken from the reference. Perplexity is that of the reference answers. A response ends if it stops before "
    "max_new_tokens."
)


def write(
    folder: Path, results: dict[str, Any], prompts: list[Prompt], answers: Mapping[str, Answers], samples: int
) -> None:
    """Fill ``folder`` with results.json, responses.jsonl and report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with open(folder / "responses.jsonl", "w", encoding="utf-8") as lines:
        for i, prompt in enumerate(prompts):
            record: dict[str, Any] = {"prompt": prompt.prompt}
            for name, said in answers.items():
                record |= {name: said.texts[i]} | ({} if said.scores is None else {f"{name}_score": _score(said, i)})
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    shown = [
        Sample(prompt.prompt, {name: (said.texts[i], _score(said, i)) for name, said in answers.items()})
        for i, prompt in enumerate(prompts[:samples])
    ]
    curves = []
    if results["frontier"]:
        points = sorted((row["kl"], row["reward"]) for row in results["frontier"])
        curves = [Curve("Reward against KL", {"checkpoints": points}, "KL", "higher and further to the left is better")]
    tables = [Table(*each) for each in _tables(results)]
    tables[0] = Table(tables[0].title, tables[0].header, tables[0].rows, NOTE)
    config = Table("Config", ("field", "value"), [(name, str(value)) for name, value in results["config"].items()])
    environment = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    write_report(
        folder, title="Evaluation", summary="\n".join(results["notes"]),
        tables=tables, curves=curves, samples=shown, appendix=[config], environment=environment,
    )  # fmt: skip


def show(results: dict[str, Any], folder: str | Path | None) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(markup=False, highlight=False)
    for title, header, rows in _tables(results):
        table = RichTable(*header, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for note in results["notes"]:
        console.print(note)
    if folder is not None:
        console.print(f"report: {Path(folder) / 'report.html'}")


def _tables(results: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, header and rows of each table."""
    figures, rates = results["figures"], results["win_rate"]
    known = [name for name in NAMES if any(name in each for each in figures.values())]
    rows = [(NAMES[name], *(_figure(each, name) for each in figures.values())) for name in known]
    if rates:
        won = [_interval(rates[name], "share", "low", "high") if name in rates else "" for name in figures]
        rows.insert(0, ("win rate over it", *won))
    found = [(f"{results['prompts']} prompts", ("", *figures), rows)]
    if results["frontier"]:
        lines = [
            (row["checkpoint"], _figure(row, "reward"), _figure(row, "kl"), _figure(row, "tokens"), "✓" * row["best"])
            for row in results["frontier"]
        ]
        found.append(("Checkpoints", ("", "mean reward", "KL", "tokens", "frontier"), lines))
    return found


def _figure(figures: Mapping[str, float], name: str) -> str:
    if name not in figures:
        return ""
    if f"{name}_low" in figures:
        return _interval(figures, name, f"{name}_low", f"{name}_high")
    return number(figures[name])


def _interval(figures: Mapping[str, float], name: str, low: str, high: str) -> str:
    return f"{number(figures[name])} [{figures[low]:.3g}, {figures[high]:.3g}]"


def _score(said: Answers, i: int) -> float | None:
    return None if said.scores is None else float(said.scores[i])
