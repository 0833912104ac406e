"""The command line: three stages from files, each bad input in one line, Ctrl-C."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import tiny_gpt2, tiny_tokenizer

from rlhf_fast.cli import main

DEMOS = [{"prompt": "the movie was", "response": " great fun"}, {"prompt": "the plot is", "response": " dull"}] * 4
PAIRS = [{"prompt": "the movie is", "chosen": " good and fun", "rejected": " bad"}] * 8
PROMPTS = [{"prompt": p} for p in ("the movie", "I like", "this plot is", "the awful")]


def lines(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_gpt2(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, model, monkeypatch):
    """A folder with a model and good data files, as the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    lines(tmp_path / "demos.jsonl", DEMOS)
    lines(tmp_path / "prefs.jsonl.gz", PAIRS)
    lines(tmp_path / "prompts.jsonl", PROMPTS)
    (tmp_path / "judge.py").write_text("def score(prompts, responses, **_):\n    return [len(r) for r in responses]\n")
    return tmp_path


SFT = "sft --model model --data demos.jsonl --output_dir runs/sft"
REWARD = "reward --model model --data prefs.jsonl.gz --output_dir runs/reward"
PPO = (
    "ppo --model model --reward judge.py:score --prompts prompts.jsonl --output_dir runs/ppo "
    "--steps 2 --batch_size 4 --minibatch_size 2 --max_new_tokens 6"
)


def fails(capsys, command, *words, status=2):
    """``command`` ends with ``status`` and one line on stderr that has every one of ``words``."""
    code = main(command.split() if isinstance(command, str) else command)
    error = capsys.readouterr().err
    assert code == status, error
    assert len(error.strip().splitlines()) == 1, error
    for word in words:
        assert word in error
    return error


def test_three_stages_from_your_own_files(here, capsys):
    assert main(f"{SFT} --epochs 2 --batch-size 4 --eval_data demos.jsonl --quiet true".split()) == 0
    reward = "reward --model runs/sft --data prefs.jsonl.gz --output_dir runs/reward --learning_rate 1e-3 --quiet true"
    assert main(reward.split()) == 0
    ppo = PPO.replace("--model model", "--model runs/sft").replace("judge.py:score", "runs/reward")
    assert main(f"{ppo} --kl_coef 0.1 --sample_every 1 --quiet true".split()) == 0
    assert len((here / "runs/ppo/metrics.jsonl").read_text().splitlines()) == 2
    assert len((here / "runs/ppo/samples.jsonl").read_text().splitlines()) == 8
    assert json.loads((here / "runs/ppo/run.json").read_text())["config"]["kl_coef"] == 0.1
    capsys.readouterr()
    generate = [
        "generate",
        "--model",
        "runs/ppo",
        "--max_new_tokens",
        "5",
        "--seed",
        "3",
        "--prompt",
        "the awful movie",
    ]
    assert main(generate) == 0
    printed = capsys.readouterr().out
    assert main([*generate, "--prompts", "prompts.jsonl", "--output", "out.jsonl"]) == 0
    written = [json.loads(line) for line in (here / "out.jsonl").read_text().splitlines()]
    assert [w["prompt"] for w in written] == ["the awful movie", *(record["prompt"] for record in PROMPTS)]
    assert printed == written[0]["response"] + "\n"
    folders = [folder for _, folders, _ in os.walk(here / "runs") for folder in folders]
    assert not [folder for folder in folders if "partial" in folder]
    assert not list((here / "runs").rglob("*.bin"))


def test_a_quiet_run_prints_nothing(here, capsys):
    from rlhf_fast import SFTConfig, SFTTrainer

    assert main(f"{SFT} --quiet true".split()) == 0
    SFTTrainer("model", data="demos.jsonl", output_dir="runs/b", config=SFTConfig(quiet=True)).train()
    assert capsys.readouterr() == ("", "")


def test_the_progress_is_shown(here, capsys):
    assert main(f"{PPO} --sample_every 2".split()) == 0
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "scores=" in shown
    assert "this plot is" in shown  # the table of samples
    assert "the model is in runs/ppo" in shown


def test_a_file_of_settings_and_flags_that_win(here):
    (here / "x.yaml").write_text(
        "model: model\ndata: demos.jsonl\noutput_dir: runs/a\nlearning_rate: 1e-4\nbatch_size: 4\nquiet: true\n"
        "max_length: null\n"
    )
    assert main(["sft", "--config", "x.yaml", "--batch_size", "8"]) == 0
    config = json.loads((here / "runs/a/run.json").read_text())["config"]
    assert (config["learning_rate"], config["batch_size"], config["max_length"]) == (1e-4, 8, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lerning_rate: 1.0e-4", 'x.yaml: unknown key "lerning_rate" (did you mean "learning_rate"?)'),
        ("data: d\nlearning_rate: -1.0", "x.yaml: SFTConfig.learning_rate must be at least 0, got -1.0"),
        ("learning_rate: fast", "x.yaml: learning_rate must be a number, got 'fast'"),
        ("data: d\nbatch_size: 2.5", "x.yaml: SFTConfig.batch_size must be a whole number, got 2.5"),
        ("data: d\nbatch_size: [4]", "x.yaml: SFTConfig.batch_size must be a whole number, got [4]"),
        ("data: 3", "x.yaml: data must be a string, got 3"),
        ("data: null", "sft needs --data"),
        ("data: d # \xe9", "x.yaml: not valid UTF-8 at byte 11"),
        ("- a", "x.yaml: must hold lines of key: value"),
        ("a: b\nc: [", "x.yaml:"),
    ],
)
def test_a_bad_file_of_settings(here, capsys, text, words):
    (here / "x.yaml").write_text(text, encoding="latin-1")
    fails(capsys, "sft --model model --config x.yaml", words)
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"{SFT} --lerning_rate 1", "unknown flag --lerning_rate (did you mean --learning_rate?)"),
        (f"{SFT} --learning_rate fast", "--learning_rate: must be a number, got 'fast'"),
        (f"{SFT} --learning_rate -1", "SFTConfig.learning_rate must be at least 0, got -1.0"),
        (f"{SFT} --learning_rate -1e-3", "SFTConfig.learning_rate must be at least 0, got -0.001"),
        (f"{SFT} --max_length 500", "max_length 500 exceeds the model's context of 128"),
        (f"{PPO} --max_new_tokens 128", "PPOConfig.max_new_tokens 128 fills the context: no room for a prompt"),
        (["sft", "--model", "", "--data", "demos.jsonl"], "--model is empty"),
        (SFT.replace("--model model", "--model demos.jsonl"), "demos.jsonl holds no tokenizer: it is a file"),
        (SFT.replace("--model model", "--model nowhere/"), "nowhere/ holds no tokenizer: there is no such folder"),
        (f"{SFT} --learning_rate nan", "SFTConfig.learning_rate must be a finite number, got nan"),
        (f"{SFT} --schedule fast", "SFTConfig.schedule must be one of constant, linear, cosine, got 'fast'"),
        (f"{SFT} --quiet maybe", "--quiet: must be true or false, got 'maybe'"),
        (f"{SFT} --config none.yaml", "none.yaml: No such file or directory"),
        (f"{PPO} --kl k9", "PPOConfig.kl must be one of k1, k2, k3, abs, exact, got 'k9'"),
        (f"{PPO} --seed {2**63}", "PPOConfig.seed must be at most 9.22337e+18, got 9223372036854775808"),
        (f"{PPO} --top_p 0", "PPOConfig.top_p must be above 0, got 0.0"),
        ("sft --data demos.jsonl", "sft needs --model"),
        ("sft --model model --data", "--data: expected one argument"),
        ("sftt", "unknown command 'sftt' (did you mean sft?)"),
        (SFT.replace("demos", "none"), "none.jsonl"),
        (SFT.replace("--model model", "--model ./nowhere"), "nowhere"),
        (PPO.replace("judge.py:score", "judge.py:scores"), "judge.py:scores: judge.py has no function scores"),
        (PPO.replace("judge.py:score", "jury.py:score"), "jury.py:score: there is no file jury.py"),
        (PPO.replace("judge.py:score", "judge.py"), "judge.py: name its function as well, judge.py:function"),
        (PPO.replace("judge.py:score", "no.such.module:score"), "No module named 'no'"),
        ("generate --model model --prompts prompts.jsonl --output none/out.jsonl", "there is no folder none"),
        ("generate --model model --prompts prompts.jsonl --max_new_tokens 127", "prompts.jsonl:1 has 4 tokens"),
        ("generate --model model --prompts demos.jsonl --output demos.jsonl", "demos.jsonl exists already"),
        ("sft model", "unknown argument 'model'"),
        ("generate --model model", "generate needs --prompt or --prompts"),
    ],
)
def test_bad_commands(here, capsys, command, words):
    fails(capsys, command, words)
    assert not (here / "runs").exists()


def test_bad_data_names_its_line(here, capsys):
    lines(here / "prefs.jsonl", [*PAIRS, *PAIRS, {"prompt": "a", "chosen": " b"}])
    command = REWARD.replace("prefs.jsonl.gz", "prefs.jsonl")
    fails(capsys, command, 'prefs.jsonl:17: "rejected" is missing')
    (here / "prefs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n')
    fails(capsys, command, "prefs.jsonl:2:")
    (here / "prefs.jsonl").write_text("")
    fails(capsys, command, "prefs.jsonl: no records")
    lines(here / "prompts.jsonl", [{"prompt": "the"}, {"prompt": "the movie " * 100}])
    fails(capsys, PPO, "prompts.jsonl:2:", "tokens")
    assert not (here / "runs").exists()


def test_a_bad_reward_is_one_line(here, capsys):
    (here / "judge.py").write_text(
        "def few(prompts, responses, **_):\n    return [1.0]\n"
        "def nan(prompts, responses, **_):\n    return [float('nan')] * len(prompts)\n"
    )
    for name in ("few", "nan"):
        command = PPO.replace(":score", f":{name}").replace("runs/ppo", f"runs/{name}")
        fails(capsys, f"{command} --quiet true", "reward")


def test_rewards_with_commas_between_them_are_an_ensemble(here, capsys):
    (here / "judge.py").write_text(
        "def score(prompts, responses, **_):\n    return [3.0] * len(responses)\n"
        "def other(prompts, responses, **_):\n    return [1.0] * len(responses)\n"
    )
    assert main([*PPO.replace("judge.py:score", "judge.py:score,judge.py:other").split(), "--quiet", "true"]) == 0
    line = json.loads((here / "runs/ppo/metrics.jsonl").read_text().splitlines()[0])
    assert line["scores"] == 2.0
    fails(
        capsys,
        PPO.replace("judge.py:score", "judge.py:score,judge.py:none").replace("runs/ppo", "runs/two"),
        "judge.py has no function none",
    )


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "the movie is", "response": " good", "label": "true"},
        {"prompt": "the movie is", "responses": [" good", " bad"], "scores": [1, 0]},
        {"prompt": "the movie is", "steps": [" good", " fun"], "labels": [1, None]},
    ],
    ids=["label", "scores", "steps"],
)
def test_the_columns_say_what_a_reward_model_learns(here, capsys, record):
    lines(here / "said.jsonl", [record] * 4)
    command = "reward --model model --data said.jsonl --output_dir runs/{} --quiet true"
    assert main(f"{command} --eval_data said.jsonl --normalise yes".format("one").split()) == 0
    assert abs(json.loads((here / "runs/one/metrics.jsonl").read_text())["eval_score_mean"]) < 1e-6
    lines(here / "said.jsonl", [record, PAIRS[0]])
    fails(capsys, command.format("two"), "said.jsonl:2: it has chosen and rejected, and the records before it")
    lines(here / "said.jsonl", [{"prompt": "a", "answer": "b"}])
    fails(
        capsys, command.format("two"), "said.jsonl:1: no columns that a reward model learns from, which are prompt, ch"
    )


def test_a_reward_that_raises_is_one_line_and_the_state_is_kept(here, capsys):
    (here / "judge.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport lexicon\n\n"
        "@dataclass\nclass Asked:\n    times: int = 0\nasked = Asked()\n\n"
        "def score(prompts, responses, **columns):\n"
        "    asked.times += 1\n"
        "    return lexicon.lengths(responses) if asked.times < 3 else columns['likes']\n"
    )
    (here / "lexicon.py").write_text("def lengths(texts):\n    return [len(text) for text in texts]\n")  # beside it
    error = fails(
        capsys, f"{PPO} --steps 9 --quiet true", "step 3: the reward raised KeyError at ", "judge.py:12: 'likes'"
    )
    assert "last good checkpoint: runs/ppo/checkpoints/step-2" in error
    assert (here / "runs/ppo/checkpoints/step-2/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def score(:", "SyntaxError: invalid syntax"),
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_reward_file_that_cannot_be_imported(here, capsys, text, words):
    (here / "judge.py").write_text(text)
    fails(capsys, PPO, f"judge.py:score: importing judge.py raised {words}")
    assert not (here / "runs").exists()


def test_what_nobody_foresaw_is_one_line_too(here, capsys, monkeypatch):
    from rlhf_fast.trainers.sft import SFTTrainer

    def broken(self, batch):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(SFTTrainer, "loss", broken)
    fails(capsys, f"{SFT} --quiet true", "ZeroDivisionError: division by zero (--debug shows where)")


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(here, capsys):
    assert main(f"{SFT} --quiet true".split()) == 0
    before = {p: p.read_bytes() for p in (here / "runs/sft").rglob("*") if p.is_file()}
    fails(capsys, SFT, "runs/sft already holds a run", "choose another output_dir")
    assert {p: p.read_bytes() for p in (here / "runs/sft").rglob("*") if p.is_file()} == before


def test_a_run_goes_on_where_it_stopped(here, capsys, monkeypatch):
    from rlhf_fast import SFTTrainer

    step = SFTTrainer.step
    command = f"{SFT} --quiet true --batch_size 2 --save_every 1 --epochs 2"
    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "step", lambda self, batch: step(self, batch) if self.done < 2 else 1 / 0)
        fails(capsys, command, "ZeroDivisionError")
    fails(capsys, command, "runs/sft already holds a run")
    fails(capsys, f"{command} --resume maybe", "--resume: must be true or false, got 'maybe'")
    (here / "x.yaml").write_text("resume: 3\n")
    fails(capsys, f"{command} --config x.yaml", "x.yaml: resume must be true or false, got 3")
    (here / "x.yaml").write_text("resume: true\n")
    assert main(f"{command} --config x.yaml".split()) == 0
    figures = [json.loads(line)["step"] for line in (here / "runs/sft/metrics.jsonl").read_text().splitlines()]
    assert figures == list(range(1, len(figures) + 1))
    fails(capsys, f"{command} --resume true", "runs/sft holds a run that is finished")


def test_nan_stops_with_the_last_good_checkpoint(here, capsys, monkeypatch):
    from rlhf_fast.trainers.sft import SFTTrainer

    honest = SFTTrainer.loss
    monkeypatch.setattr(
        SFTTrainer, "loss", lambda self, batch: honest(self, batch) * (torch.nan if self.done == 3 else 1)
    )
    fails(
        capsys, f"{SFT} --batch_size 2 --quiet true",
        "step 4: loss is nan; last good checkpoint: runs/sft/checkpoints/step-3",
    )  # fmt: skip
    assert (here / "runs/sft/checkpoints/step-3/model.safetensors").is_file()


def test_debug_shows_the_traceback(here, capsys):
    assert main(["sft", "--debug", "--model", "model", "--data", "none.jsonl"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_extra_is_named(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    fails(capsys, SFT, "accelerate", "pip install 'rlhf-fast[train]'")


def test_ctrl_c_saves_and_exits_130(here):
    command = [sys.executable, "-m", "rlhf_fast.cli", *PPO.split(), "--steps", "100000", "--save_every", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True)
    try:
        metrics, deadline = here / "runs/ppo/metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") > 1):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    (saved,) = (here / "runs/ppo/checkpoints").iterdir()
    steps = len(metrics.read_text().splitlines())
    assert saved.name == f"step-{steps}"
    assert (saved / "model.safetensors").is_file()
    assert (saved / "critic/model.safetensors").is_file()
    assert json.loads((saved / "trainer.json").read_text())["step"] == steps


def test_help_lists_every_field_and_imports_no_transformers():
    code = (
        "import sys; from rlhf_fast.cli import main\n"
        "for c in ('sft', 'reward', 'ppo', 'rrhf', 'dpo', 'distill', 'generate'):\n"
        "    try: main([c, '--help'])\n"
        "    except SystemExit as e: assert e.code == 0\n"
        "assert main(['--help']) == 0\n"
        "assert not {'transformers', 'accelerate', 'rich', 'matplotlib'} & set(sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for word in (
        "--kl_coef FLOAT",
        "price of a nat of KL",
        "[0.05]",
        "--schedule constant|linear|cosine",
        "--model X",
        "[none]",
        "[false]",
    ):
        assert word in shown


def test_doctor(capsys):
    from rlhf_fast import dispatch

    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^CUDA driver: (absent|CUDA \d+\.\d+)$", shown, re.MULTILINE)
    assert f"torch {torch.__version__}" in shown
    rows = [line.split(maxsplit=3) for line in shown.splitlines() if re.match(r"\w+ +(CPU|CUDA) ", line)]
    states = {(op, device, kernel): state for op, device, kernel, state in rows}
    for op in ("gae", "kl", "logprobs", "ppo_loss", "sample"):
        for device, kernel in (("CPU", "cpp"), ("CUDA", "cuda"), ("CUDA", "triton")):
            state = states[op, device, kernel]
            absent = dispatch.ABSENT[op].get(kernel)
            assert state.startswith("serves") == (dispatch.serving(op, device) == kernel)
            assert (state == f"absent: {absent}") == (kernel not in dispatch.IMPLEMENTATIONS[op])
            unmeasured = device == "CUDA" and absent is None and not dispatch.CHOICES[op].measured
            assert ("(unmeasured)" in state) == unmeasured
        for device in ("CPU", "CUDA"):
            assert ((op, device, "reference") in states) == (dispatch.serving(op, device) == "reference")
        assert (dispatch.CHOICES[op].argument in shown) == (not dispatch.CHOICES[op].measured)


def test_doctor_names_the_gpu_that_measured(capsys, monkeypatch):
    from rlhf_fast import dispatch

    monkeypatch.setitem(dispatch.CHOICES, "gae", dispatch.Choice(("triton", "cuda"), "an argument", "NVIDIA H1"))
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "gae", dict.fromkeys(("cpp", "cuda", "triton", "reference")))
    monkeypatch.setitem(dispatch.ABSENT, "gae", {})
    assert main(["doctor"]) == 0
    shown = re.sub(" +", " ", capsys.readouterr().out)
    assert "gae CUDA triton serves (measured on NVIDIA H1)" in shown
    assert "gae CUDA cuda ready, triton comes first (measured on NVIDIA H1)" in shown
    assert "an argument" not in shown


SWEPT = ["sft", "--model", "m", "--data", "d", "--sweep", "s.yaml"]


@pytest.mark.parametrize(
    ("what", "command"),
    [
        ("demo", ["demo"]), ("generate", ["generate", "--model", "m", "--prompt", "p"]),
        ("evaluate", ["evaluate", "--model", "m", "--prompts", "p"]), ("a sweep", SWEPT),
    ],
)  # fmt: skip
def test_what_runs_in_one_process_refuses_several(monkeypatch, capsys, what, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command) == 2
    assert capsys.readouterr().err == f"rlhf-fast: {what} runs in one process: start it without accelerate launch\n"


def test_a_reader_that_leaves_is_no_error():
    command = [sys.executable, "-m", "rlhf_fast.cli", "doctor"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_nothing_and_version(capsys):
    assert main([]) == 0
    assert "rlhf-fast COMMAND --help" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rlhf_fast 0.")


RANKED = [{"prompt": "the movie is", "responses": [" good and fun", " bad", " dull"], "scores": [2, 0, 0.5]}] * 4


@pytest.mark.parametrize(
    ("command", "metric"),
    [
        ("rrhf --data ranked.jsonl --eval_data ranked.jsonl --micro_batch_size 2", "eval_accuracy"),
        ("dpo --data prefs.jsonl.gz --kind ipo --share hydra:1", "margin"),
        ("dpo --data prefs.jsonl.gz --reference model --precompute_reference true", "chosen_reward"),
        ("distill --teacher model --data demos.jsonl --kind jsd", "divergence"),
        (
            "distill --teacher model --prompts prompts.jsonl --reward judge.py:score --steps 2 --max_new_tokens 4",
            "scores",
        ),
        ("sft --data demos.jsonl --packing true", "loss"),
    ],
)
def test_the_other_trainers_from_your_own_files(here, command, metric):
    lines(here / "ranked.jsonl", RANKED)
    assert main(f"{command} --model model --output_dir runs/x --batch_size 2 --quiet true".split()) == 0
    figures = [json.loads(line) for line in (here / "runs/x/metrics.jsonl").read_text().splitlines()]
    assert len(figures) >= 2
    assert metric in figures[-1]
    assert (here / "runs/x/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("rrhf --data ranked.jsonl", 'ranked.jsonl:5: "score 1" must be a finite number, got None'),
        ("dpo --data prefs.jsonl.gz --kind ipo --label_smoothing 0.1", "label_smoothing must be 0 with kind=ipo"),
        ("dpo --data prefs.jsonl.gz --share top", "DPOConfig.share must be none, lora or hydra:k"),
        ("distill --data demos.jsonl", "distill needs --teacher"),
        ("distill --teacher model", "either from data, given responses, or from prompts: pass one of them"),
        ("distill --teacher nowhere/ --data demos.jsonl", "nowhere/"),
    ],
)
def test_bad_input_of_the_other_trainers(here, capsys, command, words):
    lines(here / "ranked.jsonl", [*RANKED, RANKED[0] | {"scores": [None, 1, 2]}])
    fails(capsys, f"{command} --model model --output_dir runs/x", words)
    assert not (here / "runs").exists()
