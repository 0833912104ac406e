"""Two processes that share the work take the steps of one process on the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from rlhf_fast.trainers import processes

KINDS = (
    "sft", "sft_packed", "reward", "reward_rankings", "reward_steps", "ppo", "ppo_dense", "grpo", "grpo_tokens", "rrhf",
    "dpo", "dpo_known", "distill", "distill_tokens", "distill_own",
)  # fmt: skip
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch without gloo: runs where it is built in"
)


def environment():
    """That of one process on the CPU."""
    calm = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return calm | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of many_processes.py, run once by one process and once by two."""
    root, script = tmp_path_factory.mktemp("processes"), Path(__file__).with_name("many_processes.py")
    calm, two = environment(), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    environments = {"one": calm} | {f"two {i}": calm | two | {"RANK": i, "LOCAL_RANK": i} for i in ("0", "1")}
    started = {}
    for name, variables in environments.items():
        with open(root / f"{name}.txt", "w") as said:
            command = [sys.executable, str(script), str(root / name.split()[0])]
            started[name] = subprocess.Popen(command, env=variables, stdout=said, stderr=said)
    try:
        status = {name: process.wait(timeout=180) for name, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
    assert status == {"one": 0, "two 0": 0, "two 1": 3}, "\n".join((root / f"{n}.txt").read_text() for n in started)
    return root


def figures(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def said(runs, name):
    return [json.loads((runs / "two" / f"{name}.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_with_the_weights_of_one(runs, kind):
    paths = (f"one/{kind}.0.pt", f"two/{kind}.0.pt", f"two/{kind}.1.pt")
    one, first, second = (torch.load(runs / path) for path in paths)
    assert all(torch.equal(first[name], second[name]) for name in one)
    start = torch.load(runs / "one" / f"{kind}.start.0.pt")
    moved = max((one[name] - start[name]).abs().max() for name in one)
    assert moved > 3e-4  # a step of AdamW at this rate: what agrees below has learned something
    for name, weight in one.items():
        torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_report_the_figures_of_one(runs, kind):
    one, two = figures(runs / "one" / kind), figures(runs / "two" / kind)
    assert len(one) == 4
    for alone, both in zip(one, two, strict=True):
        assert alone.keys() == both.keys()
        for name, value in alone.items():
            # A KL is a sum of differences of logprobs near -6, which have 5e-7 of rounding each; the largest ratio and
            # the norm of the gradient magnify that.
            tolerance = {"rel": 1e-6, "abs": 1e-6} if "loss" in name else {"rel": 1e-5, "abs": 5e-6}
            assert both[name] == pytest.approx(value, **tolerance), name
    last = said(runs, f"{kind}.last")
    assert last[0] == last[1]


def test_the_responses_are_those_of_one_process_and_of_many_lengths(runs):
    lengths = [line["response_length"] for kind in ("ppo", "grpo") for line in figures(runs / "two" / kind)]
    assert any(length % 1 for length in lengths)
    assert (runs / "two" / "ppo" / "samples.jsonl").read_text() == (runs / "one" / "ppo" / "samples.jsonl").read_text()


def test_a_signal_to_one_process_stops_all_after_the_step(runs):
    assert said(runs, "stopped") == [[128 + 15, 3]] * 2


def test_resumed_they_end_with_the_bits_of_a_run_that_never_stopped(runs):
    """With a reward that draws from the generators of each process."""
    assert said(runs, "resumed") == [[True, 4]] * 2
    assert figures(runs / "two" / "stopped") == figures(runs / "two" / "whole")


def test_an_error_in_one_process_is_raised_in_all(runs):
    first, second = said(runs, "failing")
    assert first[0] == second[0] == "ValueError"
    assert "step 1: process 1: the reward raised OSError" in first[1]
    assert "no connection; prompt 1 of 2: 'the" in first[1]
    assert "step 1: the reward raised OSError" in second[1]


def test_a_batch_without_a_reward_in_one_process_is_skipped_in_all(runs):
    assert said(runs, "skipping") == [{"skipped": 4.0}] * 2


def test_all_start_from_the_weights_of_the_first(runs):
    first, second = said(runs, "same weights")
    assert first == second


def test_the_others_notice_when_one_dies(runs):
    assert json.loads((runs / "two" / "dying.0.json").read_text()) == ["RuntimeError", 2]


def test_accelerate_launches_the_command_line(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"text": "the movie was good"}\n' * 3)
    launch = f"-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port {free_port()}"
    command = "-m rlhf_fast.cli sft --model model --data data.jsonl --output_dir run --batch_size 3 --epochs 2"
    done = subprocess.run(
        [sys.executable, *launch.split(), *command.split()], cwd=tmp_path, env=environment(), capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    assert len(figures(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert done.stderr.count("the model is in run") == 1


def test_one_process_has_everything():
    items = list(range(5))
    assert (processes.count(), processes.rank(), processes.share(items)) == (1, 0, items)
    assert processes.gathered(lambda: items) == [items]
    assert processes.highest(3) == 3


@pytest.mark.parametrize("size", range(7))
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_shares_are_neighbours_and_in_all_everything(monkeypatch, size, number):
    monkeypatch.setattr(processes, "count", lambda: number)
    shares = []
    for rank in range(number):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(processes.share(list(range(size))))
    assert [item for share in shares for item in share] == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
