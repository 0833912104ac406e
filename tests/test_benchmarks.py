"""The benchmarks' own machinery: rows, ratios, goals, charts, and the path of a GPU walked without one."""

import dataclasses
import json
import re
from importlib.util import find_spec
from pathlib import Path

import gpu_check
import pytest
import torch
from conftest import GPU

from rlhf_fast import cli
from rlhf_fast.bench import advantages as bench_advantages
from rlhf_fast.bench import chart, compare, goals, harness, peers, record, suite
from rlhf_fast.bench import gae as bench_gae
from rlhf_fast.bench import kl as bench_kl
from rlhf_fast.bench import logprobs as bench_logprobs
from rlhf_fast.bench import ppo_loss as bench_ppo_loss
from rlhf_fast.bench import sample as bench_sample
from rlhf_fast.commands import SOURCES
from rlhf_fast.flags import settings


def test_a_peer_is_named_after_its_package_or_its_formula():
    notes = {}
    torch_label = f"Torch {torch.__version__}"
    assert list(peers.package_or_formula("Torch", "torch", lambda: abs, None, notes)) == [torch_label]
    assert peers.package_or_formula("Nobody", "no-such-package", lambda: abs, sum, notes) == {"Nobody's formula": sum}
    assert notes == {}
    assert peers.package_or_formula("Nobody", "no-such-package", lambda: abs, None, notes) == {}
    assert notes == {"Nobody": "not installed"}

    def broken():
        raise ImportError("no such symbol\nand more")

    assert peers.package_or_formula("Torch", "torch", broken, sum, notes) == {"Torch's formula": sum}
    assert notes["Torch"] == "its formula is measured, for ImportError: no such symbol"


def test_a_row_by_hand(monkeypatch):
    times = {"ours": 1e-3, "twice": 2e-3, "floor copy": 5e-4}
    monkeypatch.setattr(harness, "interleave", lambda calls, device, seconds: {name: times[name] for name in calls})
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(harness, "peak_bytes", lambda call, device: 2**20)

    def broken(x):
        raise ValueError("this one\ncannot")

    x, notes = torch.ones(3), {}
    case = harness.Case(
        name="three",
        bytes=4_000_000,
        inputs=[(x,)],
        ours=lambda x: x + 1,
        peers={"twice": lambda x: x + 1, "wrong": lambda x: x - 1, "broken": broken},
        floors={"copy": lambda x: x.clone()},
        agrees=torch.equal,
    )
    row = harness.measure(case, "cpu", notes)
    assert row == {
        "case": "three", "us": 1000.0, "GB/s": 4.0, "% copy": 40.0, "/ copy": 2.0, "peak MiB": 1.0,
        "ratios": {"twice": 2.0},
    }  # fmt: skip
    assert notes == {"wrong, three": "computes something else", "broken, three": "ValueError: this one"}

    def found(gradient):
        row = harness.measure(dataclasses.replace(case, gradient=gradient), "cpu", {})
        return row["peak MiB"], row.get("peak / gradient")

    assert found(2**20) == (1.0, 1.0)
    assert found(2**21) == (None, None)  # a new gradient of 2 MiB is not made in 1 MiB: the counter has missed it


def test_inputs_take_turns():
    seen = []
    call = harness.turning(seen.append, [(1,), (2,), (3,)])
    for _ in range(5):
        call()
    assert seen == [1, 2, 3, 1, 2]


ROW = {"case": "64x1024", "us": 10.0, "GB/s": 4.0, "% copy": 40.0, "/ copy": 2.5, "peak MiB": None}


@pytest.fixture
def measured(monkeypatch):
    """The suite without its clock: a row per op, as ``change`` has it, and no warm-up of the memory."""
    changed = {}

    def measure(case, device, notes, *, peers, seconds):
        return ROW | {"case": case, "ratios": {"verl's formula": 301.0, "cpp": 0.9}} | changed

    monkeypatch.setattr(record, "measure", measure)
    monkeypatch.setattr(record, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(suite, "devices", lambda: ["cpu"])
    monkeypatch.setattr(record, "touch_memory", lambda: None)
    for module in (bench_gae, bench_kl):
        monkeypatch.setattr(module, "cases", lambda device, notes: iter(["64x1024"]))
    return changed


def test_an_interrupted_benchmark_keeps_its_rows(measured, monkeypatch, tmp_path, capsys):
    def cases(device, notes):
        notes["Somebody"] = "needs a GPU"
        yield "64x1024"
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_gae, "cases", cases)
    folder = tmp_path / "results"
    assert cli.main(["bench", "--op", "gae,kl", "--out", str(folder)]) == 130
    assert "kl" not in record.known(folder, "cpu")
    assert (folder / "report.html").exists()
    written = record.known(folder, "cpu")["gae"]
    assert [r["case"] for r in written["rows"]] == ["64x1024"]
    assert written["notes"] == {"Somebody": "needs a GPU", record.REST: "interrupted"}
    assert [(g["what"], g["met"]) for g in written["goals"]] == [
        ("64x1024, verl's time over ours", True),
        ("64x1024, the kernel over a copy of the bytes", True),
    ]
    printed = capsys.readouterr().out
    assert f"{bench_gae.REMARK}\n" in printed
    assert "left out: Somebody: needs a GPU\n" in printed
    assert "C3 64x1024, verl's time over ours: 301 (goal ≥ 300) ✓\n" in printed


@pytest.mark.parametrize(
    ("asked", "said"), [((), []), (("quack",), ["Liger, quack"]), (None, ["verl", "Liger, quack"])]
)
def test_nothing_is_said_of_peers_that_nobody_asked_for(measured, monkeypatch, tmp_path, asked, said):
    def cases(device, notes):
        notes |= {"verl": "its formula is measured, for a reason", "Liger, quack": "need a GPU"}
        yield "64x1024"

    monkeypatch.setattr(bench_gae, "cases", cases)
    record.run("gae", "cpu", tmp_path, peers=asked)
    assert list(record.known(tmp_path, "cpu")["gae"]["notes"]) == said


def test_compare_tells_what_became_slower(measured, tmp_path, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    run = ["bench", "--op", "gae,kl", "--device", "cpu", "--out"]
    assert cli.main([*run, str(old)]) == 0
    # Half the share of a copy, and peers at 0.6 of what they took beside ours: 1 / 0.6 is the lesser.
    measured |= {"% copy": 20.0, "ratios": {"verl's formula": 180.6, "cpp": 0.9}}
    assert cli.main([*run, str(new), "--compare", str(old), "--threshold", "1.6"]) == 1
    printed = capsys.readouterr().out
    assert "slower: gae 64x1024 on cpu: 1.67 times\n" in printed
    assert "2 of 2 cases are more than 1.6 times slower\n" in printed
    page = (new / "report.html").read_text()
    assert "✗ missed" in page
    assert "1.67" in page
    file = record.path_of(old, "cpu", ".json")
    assert cli.main([*run, str(new), "--compare", str(file), "--threshold", "1.7"]) == 0
    measured["ratios"] = {"cpp": 0.9}  # none that both have: by the copy alone
    assert cli.main([*run, str(new), "--compare", str(file), "--threshold", "1.99"]) == 1
    assert cli.main([*run, str(new), "--compare", str(new)]) == 0


def test_a_faster_peer_or_copy_alone_is_no_regression():
    def slower(share, ratio):
        old, new = ({"case": "c", "% copy": s, "ratios": {"eager": r}} for s, r in ((40.0, 8.0), (share, ratio)))
        return compare.change("cpu", "gae", old, new, 1.25)["slower"]

    assert not slower(40.0, 2.0)
    assert not slower(10.0, 8.0)
    assert slower(10.0, 2.0)


def test_gpu_check_benchmarks_every_op():
    assert [step.name for step in gpu_check.benches()] == [f"bench_{op}" for op in suite.OPS]


def old_file(folder, text):
    folder.joinpath("old.json").write_text(text)
    return str(folder / "old.json")


def old_row(folder, **changed):
    row = {"case": "64x1024", "% copy": 40.0, "ratios": {"eager": 8.0}} | changed
    return old_file(folder, json.dumps({"gae": {"rows": [row]}}))


def holding(folder, text):
    """A folder for results that has some already."""
    record.path_of(folder, "cpu", ".json").write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "gea"], "unknown op 'gea' (did you mean gae?)"),
        (["--op", "gea"], "there are advantages, gae, kl"),
        (["--device", "tpu"], "unknown device 'tpu': there are cpu and cuda"),
        (["--device", "cuda"], "torch sees no GPU"),
        (["--peers", "eager,trll"], "unknown peer 'trll' (did you mean"),
        (["--peers", "flash-attn"], "the peer flash-attn is not installed: pip install flash-attn"),
        (["--threshold", "1"], "BenchConfig.threshold must be above 1, got 1.0"),
        (["--compare", "nowhere.json"], "nowhere.json: there is no such file"),
        (["--compare", lambda folder: old_file(folder, "{")], "old.json: not a file of results (Expecting"),
        (["--compare", lambda folder: old_file(folder, "[]")], "old.json: not a file of results (no object)"),
        (["--compare", lambda folder: old_file(folder, "{}")], "old.json: not a file of results (it has no op)"),
        (
            ["--compare", lambda folder: old_file(folder, '{"gae": {"rows": [{"shape": "64"}]}}')],
            "gae has a row without",
        ),
        (["--compare", lambda folder: old_row(folder, **{"% copy": float("nan")})], "gae has a row without"),
        (["--compare", lambda folder: old_row(folder, **{"% copy": 0})], "gae has a row without"),
        (["--compare", lambda folder: old_row(folder, **{"% copy": None})], "gae has a row without"),
        (["--compare", lambda folder: old_row(folder, case=["64x1024"])], "gae has a row without"),
        (["--compare", lambda folder: old_row(folder, ratios=["eager"])], "gae has a row without"),
        (["--compare", lambda folder: old_row(folder, ratios={"eager": "8"})], "gae has a row without"),
        (["--compare", lambda folder: old_file(folder, '{"gae": {"rows": 5}}')], "gae has a row without"),
        (["--compare", lambda folder: str(Path(old_file(folder, "{}")).parent)], ", but old.json: name that file"),
        (["--out", lambda folder: old_file(folder, "")], "is not a folder"),
        (["--out", lambda folder: holding(folder, "{")], "not a file of results (Expecting"),
        (
            ["--out", lambda folder: holding(folder, '{"kl": {"rows": []}}')],
            "(kl has no goals, notes, remark, versions)",
        ),
        (["--out", lambda folder: old_file(folder, "") + "/now"], "old.json/now: Not a directory"),
    ],
)
def test_bad_input_of_bench(measured, monkeypatch, tmp_path, capsys, arguments, said):
    monkeypatch.setattr(peers, "version", lambda distribution: None)
    arguments = [a(tmp_path) if callable(a) else a for a in arguments]
    assert cli.main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""  # before anything is measured


def test_results_without_a_case_of_this_run_are_no_baseline(measured, tmp_path, capsys):
    row = '{"case": "1x1", "% copy": 1.0, "ratios": {}}'
    given = ["--op", "gae", "--out", str(tmp_path / "new"), "--compare"]
    assert cli.main(["bench", *given, old_file(tmp_path, f'{{"gae": {{"rows": [{row}]}}}}')]) == 2
    assert "no case of this run" in capsys.readouterr().err
    assert cli.main(["bench", *given, old_file(tmp_path, f'{{"kl": {{"rows": [{row}]}}}}')]) == 2
    assert "has no results of gae" in capsys.readouterr().err


def test_cases_that_only_one_run_has_are_named(measured, monkeypatch, tmp_path, capsys):
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    assert cli.main(["bench", "--op", "gae", "--out", old]) == 0
    monkeypatch.setattr(bench_gae, "cases", lambda device, notes: iter(["64x1024", "9x9"]))
    assert cli.main(["bench", "--op", "gae,kl", "--out", new, "--compare", old]) == 0
    printed = capsys.readouterr().out
    assert "not compared: gae on cpu, in this run alone: 9x9\n" in printed
    assert "not compared: kl on cpu, in this run alone: 64x1024\n" in printed
    assert "not compared: gae on cpu, in this run alone: 9x9" in (tmp_path / "new" / "report.html").read_text()
    monkeypatch.setattr(bench_gae, "cases", lambda device, notes: iter(["64x1024"]))
    assert cli.main(["bench", "--op", "gae", "--out", old, "--compare", new]) == 0
    assert "not compared: gae on cpu, in the earlier results alone: 9x9\n" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_to(measured, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite.os, "access", lambda path, mode: False)  # who runs the tests may write everywhere
    assert cli.main(["bench", "--op", "gae", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr() == ("", f"rlhf-fast: --out {tmp_path} cannot be written to\n")


def test_the_commands_of_the_docs_are_taken(measured, monkeypatch):
    text = Path(__file__).parents[1].joinpath("docs", "bench.md").read_text(encoding="utf-8")
    commands = re.findall(r"^rlhf-fast (bench .*?) *(?:#.*)?$", text, re.MULTILINE)
    assert len(commands) == 4
    monkeypatch.setattr(peers, "version", lambda distribution: "1")
    for command in commands:
        sources, config = settings("bench", "", SOURCES["bench"], suite.BenchConfig, command.split()[1:])
        assert set(suite.chosen_ops(sources["op"])) <= set(suite.OPS)
        assert sources["out"] in ("rlhf-fast-bench", "now")
        assert config.threshold == 1.25
        peers.chosen_peers(sources["peers"])
    for name in re.findall(r"`(\w[\w-]*)`", text.split("- **`--peers`** takes")[1].split("Without it")[0]):
        assert name in (*peers.PEERS, "none", "advantages") or "torch" in name
    assert {name for name in peers.PEERS if f"`{name}`" not in text} == set()


def test_peers_are_chosen_by_name(monkeypatch):
    monkeypatch.setattr(peers, "version", lambda distribution: "1.10.0")
    assert peers.chosen_peers(None) is None
    assert peers.chosen_peers("none") == ()
    named = peers.chosen_peers("trl, Compile")
    assert named == ("TRL", "compile")
    labels = ("TRL 1.10.0", "TRL's formula", "compile", "eager", "cpp")
    assert [peers.wanted(label, named) for label in labels] == [True, True, True, False, False]
    assert all(peers.wanted(label, None) for label in labels)
    assert not any(peers.wanted(label, ()) for label in labels)


def test_the_whole_command_on_tiny_shapes(monkeypatch, tmp_path, capsys):
    """Every op, timed for real, from the flags to the report."""
    tiny = {
        "advantages": lambda notes: bench_advantages.case(3, 17, "cpu", "k1"),
        "gae": lambda notes: bench_gae.case(3, 17, "cpu", notes),
        "kl": lambda notes: bench_kl.case(4, 33, torch.float32, "cpu", notes, backward=True),
        "logprobs": lambda notes: bench_logprobs.case(4, 33, torch.float32, "cpu", notes, backward=False),
        "ppo_loss": lambda notes: bench_ppo_loss.case(3, 17, "cpu", notes),
        "sample": lambda notes: bench_sample.case("plain", 4, 64, torch.float32, "cpu", notes),
    }
    modules = (bench_advantages, bench_gae, bench_kl, bench_logprobs, bench_ppo_loss, bench_sample)
    for module, make in zip(modules, tiny.values(), strict=True):
        monkeypatch.setattr(module, "cases", lambda device, notes, make=make: iter([make(notes)]))
    monkeypatch.setattr(record, "touch_memory", lambda: None)
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(record, "copy_bandwidth", lambda device: 10.0)
    flags = ["--device", "cpu", "--peers", "eager,reference,pieces,TRL,cpp,vLLM", "--seconds", "0.002"]
    monkeypatch.setattr(peers, "version", lambda distribution: "some")
    assert cli.main(["bench", *flags, "--out", str(tmp_path)]) == 0
    assert tuple(tiny) == suite.OPS
    found = record.known(tmp_path, "cpu")
    for op in suite.OPS:
        (row,) = found[op]["rows"]
        assert row["us"] > 0
        assert row["% copy"] == pytest.approx(10 * row["GB/s"])
        assert row["ratios"]
        assert not any(name.startswith(("compile", "verl")) for name in row["ratios"])
        assert not [why for why in found[op]["notes"].values() if "computes something else" in why]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == (len(suite.OPS) if find_spec("matplotlib") else 0)
    for op in suite.OPS:
        assert f"<h2>{op} on " in page
    printed = capsys.readouterr().out
    assert printed.startswith("rlhf_fast: ")
    assert "kernels on cpu: advantages " in printed


def test_gpu_check_shows_the_goals_of_this_run(monkeypatch):
    def of(name, *notes):
        return {"notes": dict.fromkeys(notes, ""), "goals": [{"goal": name, "what": "", "measured": 1.0, "met": True}]}

    found = {
        "device": "some GPU",
        "sample": of("G9"),
        "kl": of("G4", record.REST),
        "gae": of("G7"),
        "logprobs": of("G1"),
    }
    monkeypatch.setattr(record, "known", lambda folder, device: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    results = {"bench_sample": "ok", "bench_kl": "over its 100 s", "bench_gae": "over its 100 s", "build": "ok"}
    assert [(g["goal"], g["met"]) for g in gpu_check.goals_of(results)] == [("G4", "✓"), ("G9", "✓")]


def logprobs_row(**changes):
    row = {"case": "256x151936 float32", "us": 1.0, "/ sum": 1.5, "ratios": {"TRL 1.16.0": 20.0, "eager": 5.0}}
    return row | changes


def test_goals_on_a_cpu():
    rows = [
        logprobs_row(),
        logprobs_row(**{"case": "256x151936 bfloat16", "ratios": {"TRL's formula": 17.0}}),
        logprobs_row(**{"case": "256x151936 float32 with backward", "peak / gradient": 1.2}),
    ]
    judged = goals.judge("logprobs", "cpu", rows)
    assert [(g["goal"], g["measured"], g["bound"], g["met"]) for g in judged] == [
        ("C1", 20.0, "≥ 18", True),
        ("C1", 1.5, "≤ 1.8", True),
        ("C1", 17.0, "≥ 18", False),
        ("C2", 5.0, "≥ 6", False),  # no row has torch.compile: no word of that goal
        ("C2", 1.2, "≤ 1.02", False),
    ]
    assert goals.line(judged[0]) == "C1 256x151936 float32, TRL's time over ours: 20 (goal ≥ 18) ✓"
    assert goals.line(judged[2]).endswith("17 (goal ≥ 18) ✗")


def gpu_row(case, **changes):
    row = {"case": case, "us": 20.0, "GB/s": 1.0, "% copy": 86.0, "% read": 91.0, "launches": 2, "with backward": 4}
    return row | {"/ copy": 1.1, "syncs": 0, "captured": 1, "ratios": {"FlashInfer 0.7": 1.5, "cuda": 0.9}} | changes


GPU_GOALS = {
    "logprobs": (["8192x151936 bfloat16", "8192x151936 bfloat16 with backward"], {"G1", "G2", "G10"}),
    "kl": (["8192x151936 bfloat16 with backward"], {"G4", "G10"}),
    "gae": (["64x1024", "512x1024", "4096x8192", "1x1048576 packed"], {"G7", "G10"}),
    "ppo_loss": (["512x2048"], {"G8", "G10"}),
    "sample": (["p.9, 128x131072 float32", "plain, 8x131072 float32"], {"G9", "G10"}),
}


@pytest.mark.parametrize("op", GPU_GOALS)
def test_goals_on_a_gpu(op):
    cases, expected = GPU_GOALS[op]
    ratios = {"compile": 6.0, "FlashInfer 0.7": 1.5, "cuda": 0.9}
    good = goals.judge(op, "cuda", [gpu_row(case, ratios=ratios, **{"graph us": 5.0}) for case in cases])
    assert {g["goal"] for g in good} == expected
    assert all(g["met"] for g in good), good
    bad = {"% copy": 50.0, "% read": 20.0, "/ copy": 9.0, "launches": 7, "with backward": 99, "syncs": 1, "captured": 0}
    bad |= {"graph us": 90.0, "ratios": {"compile": 0.5, "FlashInfer 0.7": 0.5}}
    assert not any(g["met"] for g in goals.judge(op, "cuda", [gpu_row(case, **bad) for case in cases]))


def test_a_chart_is_small(tmp_path):
    pytest.importorskip("matplotlib")
    names = ("eager", "compile", "FlashInfer 0.7", "TRL's formula")
    rows = [
        {"case": f"p.9, {n}x131072 float32", "us": 17.0 * n, "GB/s": 900.0, "% copy": 31.0}
        | {"ratios": {name: 1.5 + n + i for i, name in enumerate(names)}}
        for n in range(1, 7)
    ]
    chart.draw("sample", "some device", rows, tmp_path / "chart.png")
    written = (tmp_path / "chart.png").read_bytes()
    assert written.startswith(b"\x89PNG")
    assert len(written) < 40_000


def test_figures_in_the_repository_belong_to_their_device():
    files = list(gpu_check.RESULTS.glob("*.json"))
    assert files
    for path in files:
        device = json.loads(path.read_text())["device"]
        assert path.stem == "".join(c if c.isalnum() else "-" for c in device.lower())


class OnTheCPU(torch.overrides.TorchFunctionMode):
    """Everything that asks for the GPU gets the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*["cpu" if isinstance(a, str) and a == "cuda" else a for a in args], **kwargs)


# float32 where a peer's Triton kernel may take part: in place, the interpreter's bfloat16 gives nonsense.
CASES_OF_A_GPU = {
    "advantages": lambda notes: bench_advantages.case(3, 17, "cuda", "k1"),
    "gae": lambda notes: bench_gae.case(3, 17, "cuda", notes),
    "gae, packed": lambda notes: bench_gae.case(1, 50, "cuda", notes, packed=True),
    "kl": lambda notes: bench_kl.case(4, 33, torch.bfloat16, "cuda", notes, backward=False),
    "kl, backward": lambda notes: bench_kl.case(4, 33, torch.bfloat16, "cuda", notes, backward=True),
    "logprobs": lambda notes: bench_logprobs.case(4, 33, torch.float32, "cuda", notes, backward=False),
    "logprobs, backward": lambda notes: bench_logprobs.case(4, 33, torch.float32, "cuda", notes, backward=True),
    "ppo_loss": lambda notes: bench_ppo_loss.case(3, 17, "cuda", notes),
    "ppo_loss, logits": lambda notes: bench_ppo_loss.from_logits(2, 5, 33, "cuda", notes),
    "sample": lambda notes: bench_sample.case("k50 + p.9", 4, 64, torch.float32, "cuda", notes),
    "sample, plain": lambda notes: bench_sample.case("plain", 4, 64, torch.bfloat16, "cuda", notes),
}


@pytest.mark.skipif(GPU, reason="here the benchmarks themselves walk it")
@pytest.mark.parametrize("name", CASES_OF_A_GPU)
def test_the_path_of_a_gpu(name, monkeypatch, capsys):
    def take_turns(candidates, *, device, seconds=None):
        for call in candidates.values():
            call()
        return {name: 1e-5 * (i + 1) for i, name in enumerate(candidates)}

    monkeypatch.setattr(harness, "interleave", take_turns)
    monkeypatch.setattr(harness, "graph_seconds", lambda call, inputs: [call(*inputs[0]), 5e-6][1])
    monkeypatch.setattr(harness, "launches", lambda call: [call(), 2][1])
    monkeypatch.setattr(harness, "host_syncs", lambda call: [call(), 0][1])
    monkeypatch.setattr(harness, "peak_bytes", lambda call, device: 2**20)
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device: 3000.0)
    monkeypatch.setattr(harness, "read_bandwidth", lambda: 3200.0)
    monkeypatch.setattr(harness, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    properties = type("Properties", (), {"L2_cache_size": 4000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    notes = {}
    with OnTheCPU():
        case = CASES_OF_A_GPU[name](notes)
        row = harness.measure(case, "cuda", notes)
    size = sum(t.nbytes for t in case.inputs[0])
    assert (len(case.inputs) - 1) * size <= 2 * 4000 < len(case.inputs) * size  # they do not fit that L2 twice
    assert row["graph us"] == 5
    assert row["GB/s"] == pytest.approx(case.bytes / 5e-6 / 1e9)
    assert row["% read"] == pytest.approx(row["GB/s"] / 32)
    assert row["launches"] == 2
    assert row["ratios"]
    op = name.split(",")[0]
    judged = goals.judge(op, "cuda", [row])
    assert {goal["goal"] for goal in judged} >= {"G10"}
    record.table(op, [{k: v for k, v in row.items() if k != "ratios"}])
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 160
    assert not [why for why in notes.values() if "computes something else" in why], notes
