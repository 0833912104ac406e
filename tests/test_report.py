import json
import re
from html.parser import HTMLParser

import pytest

from rlhf_fast.report import Curve, Sample, Table, metric_curves, read_lines, series, ticks, write_report

VOID = {"meta", "br", "img", "link", "path"}


class Strict(HTMLParser):
    """Every tag closed in order, every link noted; page text collected."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links, self.words = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def read(path):
    page = Strict()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page, " ".join(page.words)


def write_run(folder, lines=3):
    folder.mkdir(parents=True, exist_ok=True)
    metrics = [
        {"step": i, "time": 0.5 * i, "loss": 1.0 / i, "kl": None if i == 2 else 0.1 * i} for i in range(1, lines + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    record = {"trainer": "ppo", "config": {"steps": 3, "kl": "k1"}, "versions": {"torch": "2.13.0"}}
    (folder / "run.json").write_text(json.dumps(record))
    samples = [{"step": s, "prompt": f"p{s}", "response": f"r{s}", "score": -1.5} for s in (1, 2, 2)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return folder


def test_reads_any_run(tmp_path):
    page, words = read(write_report(write_run(tmp_path / "run")))
    assert page.seen.count("svg") == 2  # loss and kl; step and time are no curves
    assert "ppo run" in words
    assert "torch 2.13.0" in words
    assert "k1" in words
    assert words.count("r2") == 2
    assert "r1" not in words  # only the last samples
    assert "-1.5" in words
    assert page.links == []


def test_escapes_what_users_write(tmp_path):
    evil = '<script>alert("x")</script>&amp;\'"><img src=x onerror=y>'
    path = write_report(
        tmp_path,
        title=evil,
        summary=evil,
        tables=[Table(evil, (evil,), [(evil,)], evil)],
        curves=[Curve(evil, {evil: [(0, 1.0)], "b": [(0, 2.0)]}, evil, evil)],
        samples=[Sample(evil, {evil: (evil, 1.0)})],
        environment=evil,
    )
    page, words = read(path)
    assert "script" not in page.seen
    assert "img" not in page.seen
    assert "onerror" not in re.sub(r"&lt;.*?&gt;", "", path.read_text())
    assert words.count(evil) == 15  # the title twice, everything else once, as it was written


def test_a_line_goes_where_its_numbers_are(tmp_path):
    """x 0..10 and y 0..10 on round ticks: the ends of the line are the corners of the plot."""
    path = write_report(tmp_path, curves=[Curve("c", {"c": [(0, 0.0), (5, None), (5, float("nan")), (10, 10.0)]})])
    line = re.search(r'class="line l0" d="([^"]+)"', path.read_text())[1]
    assert line == "M52.0 196.0L406.0 10.0"


def test_many_points_are_thinned_and_the_last_is_kept(tmp_path):
    curve = Curve("c", {"c": [(i, float(i)) for i in range(5001)]})
    line = re.search(r'class="line l0" d="([^"]+)"', write_report(tmp_path, curves=[curve]).read_text())[1]
    points = line[1:].split("L")
    assert len(points) <= 400
    assert points[-1].startswith("406.0 ")


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [0.0, 0.0], [None, float("inf")], [-1e-12, 1e12]])
def test_odd_curves_are_drawn(tmp_path, values):
    path = write_report(tmp_path, curves=[Curve("c", {"c": list(enumerate(values))})])
    _, words = read(path)
    assert "nan" not in path.read_text().replace("nan ", "").lower().split("</style>")[1]
    assert ("no values" in words) == (values[0] is None)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.03, 0.97, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-7.0, 12.0, [-10.0, -5.0, 0.0, 5.0, 10.0, 15.0]),
        (1.0, 60.0, [0.0, 20.0, 40.0, 60.0]),
        (0.0011, 0.0019, [0.001, 0.0012, 0.0014, 0.0016, 0.0018, 0.002]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == expected


def test_ticks_hold_the_ends():
    for low, high in [(0, 1e-9), (1e9, 1e9 + 3), (-3.3, -3.2), (5, 5), (0.1, 0.7), (1 / 3, 2 / 3)]:
        found = ticks(low, high)
        assert found[0] <= low
        assert found[-1] >= high
        assert 2 <= len(found) <= 8


def test_numbers_and_verdicts_in_a_table(tmp_path):
    table = Table("t", ("a", "b"), [(1234, 0.123456), (True, False), ("text", float("nan"))])
    _, words = read(write_report(tmp_path, tables=[table], curves=[]))
    for shown in ("1234", "0.1235", "✓ holds", "✗ missed", "text", "nan"):
        assert shown in words


def test_series_keeps_steps_and_gaps():
    lines = [{"step": 3, "a": 1.0}, {"step": 5, "b": 2.0}, {"step": 7, "a": None}]
    assert series(lines, "a") == [(3, 1.0), (7, None)]
    assert [curve.title for curve in metric_curves(lines)] == ["a", "b"]
    assert [curve.title for curve in metric_curves(lines, ["b"])] == ["b"]


def test_what_is_missing_or_broken_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl: there is no such file"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        read_lines(tmp_path / "metrics.jsonl")
    assert not (tmp_path / "report.html").exists()
