"""A run that is killed and resumed ends with the bits of one that never stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_gpt2, tiny_tokenizer

import rlhf_fast as rf
from rlhf_fast.trainers import checkpoint
from rlhf_fast.trainers.run import Run

KINDS = ("sft", "sft packed", "reward", "process", "ppo", "grpo", "rrhf", "dpo", "dpo known", "distill", "distill own")
MOMENTS = ("step", "during save", "after save")
TOKENIZER = tiny_tokenizer()
DEMOS = [{"prompt": "the movie", "response": f" was {w}"} for w in ("good", "bad", "great", "awful")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder in which killed_runs.py did its work, and what it printed."""
    root = tmp_path_factory.mktemp("runs")
    script = Path(__file__).with_name("killed_runs.py")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(root), *KINDS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root, done.stdout.splitlines(), done.stderr


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def figures(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_six_steps_are_three_a_kill_and_three(runs, kind, moment):
    """Weights, optimizer, KL coefficient, generators and data, byte for byte, and the figures of every step."""
    root, printed, errors = runs
    assert f"{kind} {moment} {-signal.SIGKILL} 0" in printed, errors
    whole, resumed = root / f"{kind} whole", root / f"{kind} {moment}"
    expected = contents(whole / "state")
    assert {"model.safetensors", "optimizer.safetensors", "random.json", "trainer.json"} <= set(expected)
    assert contents(resumed / "state") == expected
    assert figures(resumed) == figures(whole)
    assert [line["step"] for line in figures(whole)] == [1, 2, 3, 4, 5, 6]
    assert contents(resumed / "checkpoints") == contents(whole / "checkpoints")
    for name in ("model.safetensors", "config.json", "margins.jsonl"):
        assert (resumed / name).exists() == (whole / name).exists() == (name != "margins.jsonl" or kind == "process")
        assert not (whole / name).exists() or (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_a_half_written_checkpoint_is_named(runs):
    _, _, errors = runs
    assert "step-6.partial is half-written and ignored" in errors


def sft(folder, data=DEMOS, **numbers):
    numbers = {"epochs": 2, "batch_size": 2, "save_every": 1, "keep": 3, "quiet": True} | numbers
    return rf.SFTTrainer(tiny_gpt2(), data=data, output_dir=folder, tokenizer=TOKENIZER, config=rf.SFTConfig(**numbers))


@pytest.fixture
def stopped(tmp_path):
    """A run of four steps that failed in its fourth."""
    trainer = sft(tmp_path / "run")
    step = trainer.step
    trainer.step = lambda batch: step(batch) if trainer.done < 3 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    return tmp_path / "run"


@pytest.mark.parametrize("harm", ["cut", "lost", "no list"])
def test_a_damaged_checkpoint_is_passed_over(stopped, harm):
    last = stopped / "checkpoints" / "step-3"
    if harm == "cut":
        (last / "model.safetensors").write_bytes((last / "model.safetensors").read_bytes()[:-1])
    else:
        (last / ("optimizer.safetensors" if harm == "lost" else checkpoint.SIZES)).unlink()
    trainer = sft(stopped)
    with pytest.warns(UserWarning, match="step-3 is half-written and ignored"):
        trainer.train(resume=True)
    assert trainer.done == 4
    assert [line["step"] for line in figures(stopped)] == [1, 2, 3, 4]
    assert checkpoint.is_whole(last)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 0.5}, "holds a run with learning_rate=2e-05, and 0.5 would not be that run"),
        ({"data": DEMOS[::-1]}, "was written by a run on other data"),
    ],
)
def test_another_run_cannot_go_on(stopped, change, words):
    before = contents(stopped / "checkpoints")
    with pytest.raises(ValueError, match=words):
        sft(stopped, **change).train(resume=True)
    assert contents(stopped / "checkpoints") == before


@pytest.mark.parametrize(
    ("reader", "record", "change"),
    [
        ("pair_examples", {"prompt": "the", "chosen": " good", "rejected": " bad", "margin": 1}, {"margin": 2}),
        ("ranked_examples", {"prompt": "the", "responses": [" a", " b"], "scores": [1, 2]}, {"scores": [2, 1]}),
        ("prompt_examples", {"prompt": "the", "wish": "good"}, {"wish": "bad"}),
        ("sft_examples", {"prompt": "the", "response": " good"}, {"prompt": "", "response": "the good"}),
    ],
)
def test_whatever_the_data_say_is_in_their_fingerprint(tmp_path, reader, record, change):
    def found(record, file="data.jsonl"):
        (tmp_path / file).write_text(json.dumps(record))
        return checkpoint.fingerprint(getattr(rf.data, reader)(rf.data.read_records(tmp_path / file), TOKENIZER))

    assert found(record) == found(record) == found(record, "moved.jsonl")
    assert found(record | change) != found(record)


def test_a_column_of_any_kind_has_a_fingerprint():
    records = [{"prompt": "the", "image": object(), "table": {(1, 2): 3}, "numbers": [1.5, None]} for _ in range(2)]
    one, other = (rf.data.prompt_examples(rf.data.read_records([record]), TOKENIZER) for record in records)
    assert checkpoint.fingerprint(one) == checkpoint.fingerprint(other)


def test_another_trainer_cannot_go_on(stopped):
    pairs = [{"prompt": "the", "chosen": " good", "rejected": " bad"}]
    with pytest.raises(ValueError, match="holds a run of sft, which reward cannot resume"):
        rf.RewardTrainer(tiny_gpt2(), data=pairs, output_dir=stopped, tokenizer=TOKENIZER).train(resume=True)


def test_without_resume_the_run_is_refused_and_a_finished_one_always(stopped):
    with pytest.raises(ValueError, match=r"already holds a run \(run.json\)"):
        sft(stopped).train()
    sft(stopped, save_every=2, keep=1).train(resume=True)
    assert os.listdir(stopped / "checkpoints") == ["step-4"]
    with pytest.raises(ValueError, match="holds a run that is finished"):
        sft(stopped).train(resume=True)


@pytest.mark.parametrize("text", ["", "null", '{"trainer": "sf', '{"trainer": "sft"}'])
def test_a_record_that_does_not_say_which_run_is_there(stopped, text):
    (stopped / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is damaged: it does not say which run is there"):
        sft(stopped).train(resume=True)
    with pytest.raises(ValueError, match=r"already holds a run \(run\.json\)"):
        sft(stopped).train()


def test_a_run_that_has_no_checkpoint_yet_begins_again(stopped):
    shutil.rmtree(stopped / "checkpoints")
    resumed = sft(stopped)
    resumed.train(resume=True)
    fresh = sft(stopped.parent / "fresh")
    fresh.train(resume=True)  # nothing there to resume: a new run
    assert figures(stopped) == figures(stopped.parent / "fresh")
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), fresh.model.parameters(), strict=True))


def test_a_run_under_way_is_left_alone(stopped):
    config = sft(None).config
    first, second = (Run("sft", stopped, config, keep=3, quiet=True) for _ in range(2))
    first.open(4, resume=True)
    with pytest.raises(ValueError, match="holds a run that is under way"):
        second.open(4, resume=True)
    first.close()
    second.open(4, resume=True)
    second.close()


def test_a_line_cut_by_the_kill_is_dropped(stopped):
    with open(stopped / "metrics.jsonl", "a") as lines:
        lines.write('{"step": 4, "loss": 0.')
    sft(stopped).train(resume=True)
    assert [line["step"] for line in figures(stopped)] == [1, 2, 3, 4]


def test_the_optimizer_of_other_weights_is_refused(stopped):
    trainer = sft(stopped)
    next(trainer.model.parameters()).requires_grad_(False)
    trainer.optimizer = rf.trainers.learning.adamw([(trainer.model, 1e-3)], 0.0)
    with pytest.raises(ValueError, match="holds the optimizer of other weights"):
        trainer.train(resume=True)
