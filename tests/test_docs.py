"""docs/kernels.md: its example runs as it is printed, its figures are the committed ones, its links lead somewhere."""

import json
import re
from pathlib import Path

import pytest

from rlhf_fast import dispatch

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "kernels.md").read_text(encoding="utf-8")


@pytest.mark.skipif(isinstance(dispatch.extension("_cpu"), str), reason="the C++ kernels were not built here")
def test_the_raw_call_computes_what_it_says():
    np = pytest.importorskip("numpy")
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict = {}
    exec(snippet, names)
    (printed,) = re.findall(r"print\(advantages.round\(3\)\) +# (.*)", snippet)
    assert str(names["advantages"].round(3)) == printed
    # By hand: 1 - .3, then .3 - .4 + .95 * .7, then .4 - .5 + .95 * .565.
    assert np.allclose(names["advantages"], [[0.43675, 0.565, 0.7]], atol=1e-6)
    assert np.allclose(names["returns"], [[0.93675, 0.965, 1.0]], atol=1e-6)
    codes = {str(dtype).removeprefix("torch."): code for dtype, code in dispatch.DTYPE_CODES.items()}
    assert names["CODES"].items() <= codes.items()
    said = dict(re.findall(r"(\d) (\w+)", re.findall(r"The codes: (.*?)\.", TEXT, re.DOTALL)[0]))
    assert {name: int(code) for code, name in said.items()} == codes


def test_every_op_has_its_section():
    assert re.findall(r"^## (\w+)$", TEXT, re.MULTILINE) == ["logprobs", "kl", "gae", "ppo_loss", "sample"]


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!http)([^)#]+)", TEXT)
    assert links
    for link in links:
        assert (DOCS / link).exists(), link


@pytest.mark.parametrize(
    ("op", "row", "column", "said"),
    [
        ("logprobs", 0, "ours, ms", "3.3"), ("logprobs", 1, "ours, ms", "2.8"), ("logprobs", 0, "/ sum", "1.5"),
        ("logprobs", 1, "/ sum", "2.4"), ("logprobs", 2, "ours, ms", "17.3"), ("logprobs", 3, "ours, ms", "11.1"),
        ("kl", 0, "ours, ms", "9.0"), ("kl", 1, "ours, ms", "10.0"), ("kl", 2, "ours, ms", "27.7"),
        ("kl", 3, "ours, ms", "28.2"), ("gae", 0, "ours, us", "28"), ("gae", 1, "ours, us", "106"),
        ("gae", 1, "/ copy", "0.7"), ("ppo_loss", 2, "/ copy", "5.3"), ("sample", 3, "/ read", "9.7"),
    ],
)  # fmt: skip
def test_figures_are_the_committed_ones(op, row, column, said):
    results = json.loads((DOCS.parent / "benchmarks" / "results" / "amd-epyc-x2.json").read_text())
    value = results[op]["rows"][row][column]
    decimals = len(said.partition(".")[2])
    assert f"{value:.{decimals}f}" == said
    section = TEXT.split(f"\n## {op}\n")[1].split("\n## ")[0]
    assert re.search(rf"(?<![\d.]){re.escape(said)}(?![\d.]*\d)", section.split("**Measured**")[1])
