"""Two processes that share the work take the steps of one process on the same global batch.

``two``: each with the whole weights; ``sharded``: each with its part of them, by FSDP2; ``zero1`` to ``zero3``: each
with its part of AdamW's state, of the gradients, too, and of the weights, too, by DeepSpeed.
"""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from torch.distributed.fsdp import FSDPModule

from rlhf_fast.trainers import processes

KINDS = (
    "sft", "sft_packed", "reward", "reward_rankings", "reward_steps", "ppo", "ppo_dense", "grpo", "grpo_tokens", "rrhf",
    "rrhf_packed", "dpo", "dpo_known", "distill", "distill_tokens", "distill_own",
)  # fmt: skip
ZERO = {
    "zero1": ("sft", "ppo", "distill"),
    "zero2": ("sft", "reward", "ppo_dense", "grpo", "rrhf", "dpo"),
    "zero3": ("sft", "reward_rankings", "ppo", "ppo_dense", "grpo_tokens", "rrhf_packed", "dpo_known", "distill_own"),
}
WHAT = dict.fromkeys(("one", "two", "sharded"), KINDS) | ZERO
RUNS = [(how, kind) for how, kinds in WHAT.items() if how != "one" for kind in kinds]
PARTED = "sharded", *ZERO
MANY = "two", "sharded", "zero2", "zero3"
LAST = "two", "sharded", "zero3"  # what each pair of processes does last
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
    """The folders of many_processes.py, run by one process, by two, and by two that shard in each way."""
    root = tmp_path_factory.mktemp("processes")
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    run(root, {"one": (None, ["one"]), "two": ({}, ["two"]), "sharded": (fsdp, ["sharded"])})
    if find_spec("deepspeed"):
        run(root, {"zero": ({"ACCELERATE_USE_DEEPSPEED": "true"}, ZERO)})
    return root


def run(root, groups):
    """Run many_processes.py in ``root`` by each of ``groups``: what is in its environment, and its folders."""
    script, calm, started = Path(__file__).with_name("many_processes.py"), environment(), {}
    for group, (options, folders) in groups.items():
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"} if options is not None else {}
        for rank in ("0", "1")[: 2 if own else 1]:
            variables = calm | own | ({"RANK": rank, "LOCAL_RANK": rank} | options if own else {})
            with open(root / f"{group} {rank}.txt", "w") as said:
                command = [sys.executable, str(script), str(root), *(f"{f}:{','.join(WHAT[f])}" for f in folders)]
                started[f"{group} {rank}"] = subprocess.Popen(command, env=variables, stdout=said, stderr=said)
    try:
        status = {name: process.wait(timeout=300) for name, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
    expected = {name: 3 if name.endswith(" 1") else 0 for name in started}  # the second one dies in the end
    assert status == expected, "\n".join((root / f"{name}.txt").read_text() for name in started)


def figures(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def said(runs, name, how):
    return [json.loads((runs / how / f"{name}.{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture
def how(request):
    if request.param == "sharded" and not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        pytest.skip("FSDP2 sums gradients from PyTorch 2.8 on: runs there")
    if request.param in ZERO and not find_spec("deepspeed"):
        pytest.skip("needs deepspeed: `make test` installs it")
    return request.param


@pytest.mark.parametrize(("how", "kind"), RUNS, indirect=["how"])
def test_two_processes_end_with_the_weights_of_one(runs, kind, how):
    paths = (f"one/{kind}.0.pt", f"{how}/{kind}.0.pt", f"{how}/{kind}.1.pt")
    one, first, second = (torch.load(runs / path) for path in paths)
    assert all(torch.equal(first[name], second[name]) for name in one)
    start = torch.load(runs / "one" / f"{kind}.start.0.pt")
    moved = max((one[name] - start[name]).abs().max() for name in one)
    assert moved > 3e-4  # a step of AdamW at this rate: what agrees below has learned something
    for name, weight in one.items():
        torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(("how", "kind"), RUNS, indirect=["how"])
def test_the_model_on_the_disk_is_that_of_one_process(runs, kind, how):
    """As transformers reads it, and with the same config."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    reader = AutoModelForSequenceClassification if kind.startswith("reward") else AutoModelForCausalLM
    one, two = (reader.from_pretrained(runs / name / kind) for name in ("one", how))
    assert type(one) is type(two)
    for (name, weight), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(other, weight, rtol=0, atol=1e-6, msg=name)
    assert two.config.architectures == one.config.architectures
    if kind == "reward":
        assert two.config.score_mean == pytest.approx(one.config.score_mean, abs=1e-6)


@pytest.mark.parametrize("how", PARTED, indirect=True)
def test_a_process_holds_its_part_alone(runs, how):
    """Of every weight of policy, reference, critic, student and teacher, and of what the optimizers keep."""
    held = list(zip(*said(runs, "parts", how), strict=True))
    moments = [3, 5, 8, 11]  # of PPO, RRHF, DPO and distillation, each after its models
    assert len(held) == moments[-1] + 1
    for i, parts in enumerate(held):
        if how in ("zero1", "zero2") and i not in moments:
            continue
        assert 0 <= sum(part for part, _ in parts) - parts[0][1] < 64  # DeepSpeed pads
        assert max(part for part, _ in parts) <= 0.52 * parts[0][1]  # a scalar head is whole in one of them


@pytest.mark.parametrize(("how", "kind"), RUNS, indirect=["how"])
def test_two_processes_report_the_figures_of_one(runs, kind, how):
    one, two = figures(runs / "one" / kind), figures(runs / how / kind)
    assert len(one) == 4
    for alone, both in zip(one, two, strict=True):
        assert alone.keys() == both.keys()
        for name, value in alone.items():
            # A KL is a sum of differences of logprobs near -6, which have 5e-7 of rounding each; the largest ratio and
            # the norm of the gradient magnify that.
            tolerance = {"rel": 1e-6, "abs": 1e-6} if "loss" in name else {"rel": 1e-5, "abs": 5e-6}
            assert both[name] == pytest.approx(value, **tolerance), name
    last = said(runs, f"{kind}.last", how)
    assert last[0] == last[1]


@pytest.mark.parametrize("how", ["two", "sharded"], indirect=True)
def test_the_responses_are_those_of_one_process_and_of_many_lengths(runs, how):
    lengths = [line["response_length"] for kind in ("ppo", "grpo") for line in figures(runs / how / kind)]
    assert any(length % 1 for length in lengths)
    assert (runs / how / "ppo" / "samples.jsonl").read_text() == (runs / "one" / "ppo" / "samples.jsonl").read_text()


@pytest.mark.parametrize("how", MANY, indirect=True)
def test_a_signal_to_one_process_stops_all_after_the_step(runs, how):
    assert said(runs, "stopped", how) == [[128 + 15, 3]] * 2


@pytest.mark.parametrize("how", MANY, indirect=True)
def test_resumed_they_end_with_the_bits_of_a_run_that_never_stopped(runs, how):
    """With a reward that draws from the generators of each process."""
    assert said(runs, "resumed", how) == [[True, 4]] * 2
    assert figures(runs / how / "stopped") == figures(runs / how / "whole")


@pytest.mark.parametrize("how", ["two", "sharded"], indirect=True)
@pytest.mark.parametrize("kind", ["rrhf", "dpo", "dpo_known", "distill_tokens"])
def test_offline_trainers_go_on_to_the_bits(runs, kind, how):
    assert said(runs, f"{kind}.resumed", how) == [[True, 4]] * 2


@pytest.mark.parametrize("how", LAST, indirect=True)
def test_an_error_in_one_process_is_raised_in_all(runs, how):
    first, second = said(runs, "failing", how)
    assert first[0] == second[0] == "ValueError"
    assert "step 1: process 1: the reward raised OSError" in first[1]
    assert "no connection; prompt 1 of 2: 'the" in first[1]
    assert "step 1: the reward raised OSError" in second[1]


@pytest.mark.parametrize("how", LAST, indirect=True)
def test_a_batch_without_a_reward_in_one_process_is_skipped_in_all(runs, how):
    assert said(runs, "skipping", how) == [{"skipped": 4.0}] * 2


@pytest.mark.parametrize("how", LAST, indirect=True)
def test_all_start_from_the_weights_of_the_first(runs, how):
    first, second = said(runs, "same weights", how)
    assert first == second


def test_no_memory_in_one_process_is_told_to_all(runs):
    first, second = said(runs, "short", "two")
    assert first == ["RuntimeError", "process 1: MemoryError: no room", 2]
    assert second == ["MemoryError", "no room", 2]


@pytest.mark.parametrize("how", ["sharded", "zero3"], indirect=True)
def test_no_memory_in_one_process_that_shards_ends_it_and_the_others_notice(runs, how):
    first, second = said(runs, "short", how)
    assert second == ["RuntimeError", "process 1: MemoryError: no room", 2]
    assert [first[0], first[2]] == ["RuntimeError", 2]


def test_the_others_notice_when_one_dies(runs):
    assert json.loads((runs / "two" / "dying.0.json").read_text()) == ["RuntimeError", 2]


JUDGE = """
import gc, os
from torch.distributed.fsdp import FSDPModule

def judge(prompts, responses):
    with open("parts." + os.environ["RANK"], "a") as file:
        print(sum(isinstance(found, FSDPModule) for found in gc.get_objects()), file=file)
    return [len(response) / 10 for response in responses]
"""
SFT = "sft --data data.jsonl --batch_size 3 --epochs 2"  # of one text: in one process there is nothing to do
PPO = "ppo --reward judge.py:judge --prompts data.jsonl --steps 2 --batch_size 2 --minibatch_size 2 --max_new_tokens 4"


@pytest.mark.parametrize(
    ("options", "command", "parts"),
    [
        ("--multi_gpu", SFT, None),
        # Of policy, reference and critic two layers each and the rest, and the head.
        ("--use_fsdp --fsdp_version 2", PPO, 3 + 3 + 4),
    ],
    ids=["data parallel", "FSDP2"],
)
def test_accelerate_launches_the_command_line(tmp_path, options, command, parts):
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt" if parts else "text": "the movie was good"}) + "\n")
    (tmp_path / "judge.py").write_text(JUDGE)
    launch = f"-m accelerate.commands.launch {options} --num_processes 2 --main_process_port {free_port()}"
    command = f"-m rlhf_fast.cli {command} --model model --output_dir run"
    done = subprocess.run(
        [sys.executable, *launch.split(), *command.split()], cwd=tmp_path, env=environment(), capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    assert len(figures(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert done.stderr.count("the model is in run") == 1
    if parts:
        assert [(tmp_path / f"parts.{rank}").read_text() for rank in range(2)] == [f"{parts}\n" * 2] * 2


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
