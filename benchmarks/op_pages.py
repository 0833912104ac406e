"""Writes the figures of docs/ops from the committed results: ``python benchmarks/op_pages.py``, after ``make bench``.

What stands between the two marks of a page is this file's, the rest of the page is not. tests/test_op_pages.py fails
where a page and the results differ.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from rlhf_fast.bench.record import cell

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "ops"
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-x2.json"
BEGIN, END = "<!-- figures: benchmarks/op_pages.py writes them -->\n", "<!-- end of figures -->"
FIGURES = re.compile(f"(?<={BEGIN}).*?(?={END})", re.DOTALL)


def figures(op: str, results: dict) -> str:
    """The table of ``op``: our time, its distance from what must move, and how many times our time others take."""
    record, rows = results[op], results[op]["rows"]
    distances = columns(rows, lambda row: [name for name in row if re.fullmatch(r"/ (sum|amax|copy)", name)])
    if "/ copy" not in distances:
        distances.insert(0, "% copy")
    others = columns(rows, lambda row: row["ratios"])
    header = ["case", "ours", *(name.replace("/", "÷") for name in distances), *others]
    machine = re.sub(r" x(\d+)$", r", \1 threads", results["device"])
    lines = [
        f"{machine}, torch {record['versions']['torch']}, {record['date']}; medians of one run in which all",
        f"take turns. From `{others[0]}` on: how many times our time each of the others takes. On a GPU: unmeasured.",
        "",
        line(header),
        "|---" * len(header) + "|",
    ]
    for row in rows:
        numbers = [row.get(name) for name in distances] + [row["ratios"].get(name) for name in others]
        said = ["–" if number is None else cell(number) for number in numbers]
        lines.append(line([re.sub(r"(\d)x(\d)", r"\1 × \2", row["case"]), duration(row["us"]), *said]))
    picture = f"../../benchmarks/results/{RESULTS.stem}-{op}.png"
    return "\n".join([*lines, "", f"![{op}: times relative to ours]({picture})", ""])


def columns(rows: list[dict], of: Callable[[dict], Iterable[str]]) -> list[str]:
    """The names that ``of`` finds in the rows, each once, in their order."""
    return list(dict.fromkeys(name for row in rows for name in of(row)))


def line(cells: list[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def duration(microseconds: float) -> str:
    """With three digits."""
    return f"{microseconds:.3g} µs" if microseconds < 1000 else f"{microseconds / 1000:.3g} ms"


def written(op: str, page: str, results: dict) -> str:
    """The page of ``op`` with the figures of ``results``. Raises ``ValueError`` where it has no place for them."""
    if len(FIGURES.findall(page)) != 1:
        raise ValueError(f"{op}.md: the marks between which the figures stand are missing")
    return FIGURES.sub(lambda _: figures(op, results), page)


def main() -> None:
    """Rewrite the figures of every page."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for path in sorted(PAGES.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        new = written(path.stem, page, results)
        if new != page:
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: new figures")


if __name__ == "__main__":
    main()
