"""bench_rrhf.py: the bytes it counts, what it concludes from its rows, what it says to bad input, and a tiny run."""

import argparse
import random
import re
import sys
from pathlib import Path

import bench_rrhf
import pytest
import torch
from tensor_memory import LiveBytes
from tiny import accelerate_on

from rlhf_fast.demo import DemoConfig, grammar, stages

PAGE = (Path(__file__).parents[1] / "docs" / "rrhf.md").read_text(encoding="utf-8")


def test_live_bytes_by_hand():
    """A layer of 100 x 100 and 100 floats, 40400 bytes in two storages; an input of 400000."""
    layer, live = torch.nn.Linear(100, 100), LiveBytes("forward")
    with live:
        x = torch.ones(1000, 100)
        x[10:].t()  # shares its storage
        assert live.now == 400_000
        y = layer(x).tanh()  # reads the weights; its input is given back, its output kept
        assert live.now == 840_400
        assert live.peaks == {"forward": 1_240_400}
        del x
        assert live.now == 840_400  # the graph holds it
        live.mark("backward")
        y.backward(torch.ones(1000, 100))
        del y
        assert live.now == 80_800  # weights and gradients
    assert live.peaks["forward"] == 1_240_400
    assert live.peaks["backward"] >= 1_240_400
    torch.ones(1000)
    assert live.now == 80_800  # nothing is counted outside
    del layer
    assert live.now == 0


def row(trainer, seed, **values):
    return {"trainer": trainer, "seed": seed, "resident_mb": 10.0, "grammar_drop": 0.0, "sequence_kl": 1.0} | values


def test_the_summary_by_hand():
    rows = [row("ppo", 0, gold_score=9.0, tensor_mb=60.0), row("ppo", 1, gold_score=11.0, tensor_mb=100.0)]
    rows += [row("rrhf", 0, gold_score=9.0, tensor_mb=40.0), row("rrhf", 1, gold_score=10.2, tensor_mb=40.0)]
    found = bench_rrhf.summary(rows)
    assert found["mean"]["ppo"]["gold_score"] == 10.0
    assert found["share"] == pytest.approx({"gold_score": 0.96, "tensor_mb": 0.5, "resident_mb": 1.0})
    assert all(found["goals"].values())
    # The bounds of the demo hold for every seed, not for their mean.
    rows[2] |= {"grammar_drop": 0.11, "gold_score": 8.0}
    assert bench_rrhf.summary(rows)["goals"] == {
        "gold_score": False, "tensor_mb": True, "grammar_drop": False, "sequence_kl": True,
    }  # fmt: skip


def arguments(text, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_rrhf.py", *text.split()])
    return bench_rrhf.arguments()


def test_the_commands_of_the_docs_are_taken(monkeypatch, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    commands = re.findall(r"^python benchmarks/bench_rrhf\.py runs/demo(.*?) *(?:#.*)?$", PAGE, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        arguments(f"{tmp_path}{command}", monkeypatch)
    defaults = arguments(str(tmp_path), monkeypatch)
    assert f"{defaults.rounds} rounds of {defaults.prompts} prompts with {defaults.k} answers each" in " ".join(
        PAGE.split()
    )


@pytest.mark.parametrize(
    ("text", "said"), [("", "no folder of a finished demo"), (" --rounds 0", "--rounds must be at least 1, got 0")]
)
def test_bad_input(text, said, monkeypatch, tmp_path, capsys):
    if text:
        (tmp_path / "run.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        arguments(f"{tmp_path}{text}", monkeypatch)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def task(tmp_path):
    """Random models of the demo's kind, the reward model in a folder of its own."""
    from transformers import GPT2ForSequenceClassification

    beginnings, draw = grammar.prompts("train")[:40], random.Random(0)
    texts = [p.text + grammar.write_review(draw, p, "mixed").response for p in beginnings]
    tokenizer = stages.train_tokenizer(texts, 400)
    config = DemoConfig(
        layers=1, width=32, max_new_tokens=16, ppo_batch_size=8, ppo_minibatch_size=4, ppo_epochs=1, ppo_steps=2
    )
    model = stages.new_model(config, tokenizer)
    torch.manual_seed(0)
    scorer = GPT2ForSequenceClassification(type(model.config).from_dict(model.config.to_dict() | {"num_labels": 1}))
    scorer.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return bench_rrhf.Task(tmp_path, config, tokenizer, beginnings), model


@pytest.mark.parametrize(("train", "answers"), [(bench_rrhf.ppo, 16), (bench_rrhf.rrhf, 12)])
def test_both_learn_and_hold_their_models(train, answers, task):
    pytest.importorskip("accelerate")
    task, model = task
    before = {name: p.clone() for name, p in model.named_parameters()}
    args = argparse.Namespace(prompts=3, k=2, epochs=1, learning_rate=1e-3, sft_weight=1.0)
    args.micro_batch_size = args.write_batch_size = None
    live = LiveBytes("write")
    with accelerate_on("cpu"):
        policy, count = train(args, task, model, 0, live, 2)
    assert count == answers
    assert any(not torch.equal(p, before[name]) for name, p in policy.named_parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    # Each trained model with its gradient and its two moments; the reward model of RRHF is gone by then.
    least = {bench_rrhf.ppo: 4 + 4 + 1 + 1, bench_rrhf.rrhf: 4}[train] * size
    assert live.peaks["update"] > 0.98 * least
    assert live.peaks["write"] > 1.9 * size
