"""bench_trainers.py: its clock, its page in the docs, what it says to bad input, and a tiny step of our side."""

import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import bench_trainers
import pytest
import trainer_sides

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "bench_trainers.py"


def test_the_clock_charges_each_phase(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    module = SimpleNamespace(write=lambda: now.__setitem__(0, now[0] + 2), read=lambda: now.__setitem__(0, now[0] + 1))
    clock = trainer_sides.Clock()
    clock.time(module, "write", "generate")
    clock.time(module, "read", lambda: None if clock.updating else "reference")
    clock.start()
    module.write(), module.read()
    now[0] += 0.5
    clock.mark_update()
    module.read(), clock.mark_update()
    taken = clock.stop()
    expected = {"generate": 2.0, "score": 0.0, "reference": 1.0, "update": 1.0, "rest": 0.5, "step": 4.5}
    assert {name: taken[name] for name in expected} == expected


def arguments(text, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_trainers.py", *text.split()])
    return bench_trainers.arguments()


def test_the_commands_of_the_docs_are_taken(monkeypatch):
    text = (ROOT / "docs" / "trainers-benchmark.md").read_text(encoding="utf-8")
    commands = re.findall(r"^trainers/bin/python benchmarks/bench_trainers.py(.*?) *(?:#.*)?$", text, re.MULTILINE)
    assert [arguments(command, monkeypatch).rounds for command in commands] == [5, 2]
    assert f"trl=={bench_trainers.TRL_VERSION}" in text
    for flag in re.findall(r"--(\w+)", text.split("The flags")[1].split("change")[0]):
        assert flag in bench_trainers.SIZES


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dpo", "unknown algorithm 'dpo'"),
        ("ppo --layers 0", "--layers must be at least 1, got 0"),
        ("ppo --prompts 9", "--prompts must be a multiple of --micro"),
        ("grpo --prompts 8 --group 3", "with grpo of --group"),
        ("ppo --rounds 0", "--rounds must be at least 1"),
    ],
)
def test_bad_input(text, said, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        arguments(text, monkeypatch)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_our_side_answers_with_a_step(algorithm):
    pytest.importorskip("accelerate")
    sizes = "--layers 1 --width 64 --vocab 64 --prompts 8 --prompt_tokens 4 --new_tokens 4 --micro 4 --threads 1"
    command = [sys.executable, str(SCRIPT), algorithm, "--side", "ours", *sizes.split()]
    done = subprocess.run(command, input="step\n", capture_output=True, text=True, timeout=100)
    (line,) = done.stdout.splitlines()
    taken = trainer_sides.json.loads(line)
    phases = sum(taken[name] for name in trainer_sides.PHASES)
    assert taken["step"] == pytest.approx(phases)
    assert all(taken[name] > 0 for name in ("generate", "reference", "update"))
    assert taken["rest"] < 0.5 * taken["step"]
