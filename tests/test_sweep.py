"""A search: a run for each trial, bad ones given up, an interrupted one taken up again, a bad plan in one sentence."""

import importlib.util
import json
from typing import ClassVar

import pytest
import torch
import yaml
from tiny import accelerate_on, tiny_gpt2, tiny_tokenizer

import rlhf_fast as rf
from rlhf_fast.cli import main
from rlhf_fast.sweep import read_plan, search, sweep

TOKENIZER = tiny_tokenizer()
DEMOS = [{"prompt": "the movie", "response": f" was {w}"} for w in ("good", "bad", "great", "awful")]
PLAN = {
    "metric": "loss",
    "direction": "minimize",
    "trials": 4,
    "last": 1,
    "pruner": "none",
    "fields": {"learning_rate": {"low": "1e-5", "high": 1, "log": True}, "batch_size": {"choices": [2, 4]}},
}
CONFIG = rf.SFTConfig(epochs=2, save_every=1, quiet=True)


@pytest.fixture(autouse=True)
def on_the_cpu():
    with accelerate_on("cpu"):
        yield


def written(path, **changes):
    path.write_text(yaml.safe_dump(PLAN | changes))
    return path


class Fake:
    """A trainer of ten steps whose loss is the distance of the rate from 0.1; ``stops`` says what a run raises."""

    stops: ClassVar[dict] = {}
    made: ClassVar[list] = []

    def __init__(self, config, folder):
        self.config, self.folder, self.done, self.updates = config, folder, 0, 0
        self.made.append((folder.name, config))

    def train(self, *, resume):
        from rlhf_fast.trainers.drive import drive
        from rlhf_fast.trainers.run import Run

        run = Run("sft", self.folder, self.config, keep=1, quiet=True)
        return drive(self, run, total=10, save_every=1, live=(), resume=resume)

    def batches(self):
        return iter(range(self.done + 1, 11))

    def step(self, batch):
        if (self.folder.name, batch) in self.stops:
            raise self.stops.pop((self.folder.name, batch))
        self.done += 1
        self.updates += 1
        return {"loss": abs(self.config.learning_rate - 0.1) + 1 / batch}

    def after(self, step, run):
        return {}

    def save(self, folder):
        (folder / "done.txt").write_text(str(self.done))

    def restore(self, folder):
        self.done = self.updates = int((folder / "done.txt").read_text())

    save_model = save


@pytest.fixture
def fake():
    Fake.made, Fake.stops = [], {}
    return Fake


def ends(results):
    return [(row["trial"], row["ended"]) for row in results["trials"]]


def test_a_sweep_of_a_real_trainer(tmp_path):
    def make(config, folder):
        return rf.SFTTrainer(tiny_gpt2(TOKENIZER), data=DEMOS, output_dir=folder, config=config, tokenizer=TOKENIZER)

    results = sweep(make, CONFIG, written(tmp_path / "sweep.yaml"), tmp_path / "out")
    assert ends(results) == [(i, "finished") for i in range(4)]
    for row in results["trials"]:
        folder = tmp_path / "out" / f"trial-{row['trial']}"
        config = json.loads((folder / "run.json").read_text())["config"]
        assert {name: config[name] for name in row["params"]} == row["params"]
        assert row["params"]["batch_size"] in (2, 4)
        assert 1e-5 <= row["params"]["learning_rate"] <= 1
        assert row["loss"] == json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
        assert (folder / "model.safetensors").is_file()
    assert results["best"] == min(results["trials"], key=lambda row: row["loss"])
    assert len({row["params"]["learning_rate"] for row in results["trials"]}) == 4
    best = yaml.safe_load((tmp_path / "out/best.yaml").read_text())
    assert rf.SFTConfig(**best).learning_rate == results["best"]["params"]["learning_rate"]
    assert json.loads((tmp_path / "out/results.json").read_text()) == results
    assert "trial-3" in (tmp_path / "out/report.html").read_text()


def test_the_same_seed_tries_the_same_and_finds_the_place(tmp_path, fake):
    a, b = (
        sweep(fake, CONFIG, written(tmp_path / "sweep.yaml", trials=trials), tmp_path / str(trials))
        for trials in (25, 5)
    )
    assert [row["params"] for row in a["trials"][:5]] == [row["params"] for row in b["trials"]]
    assert abs(a["best"]["params"]["learning_rate"] - 0.1) < 0.05  # of 1e-5 to 1
    other = sweep(fake, CONFIG, written(tmp_path / "other.yaml", seed=1, trials=2), tmp_path / "c")
    assert other["trials"][0]["params"] != a["trials"][0]["params"]


def test_a_trial_without_hope_is_given_up(tmp_path, fake):
    """The rates are tried in their order: the third is worse than both before it, at the first look already."""
    plan = written(
        tmp_path / "sweep.yaml", trials=3, pruner="median", startup_trials=2, prune_every=2, warmup_steps=3,
        fields={"learning_rate": {"choices": [0.1, 0.2, 0.9]}},
    )  # fmt: skip
    rates = iter([0.1, 0.2, 0.9])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.Plan, "suggest", lambda self, trial, kinds: {"learning_rate": next(rates)})
        results = sweep(fake, CONFIG, plan, tmp_path / "out")
    assert ends(results) == [(0, "finished"), (1, "finished"), (2, "given up")]
    steps = (tmp_path / "out/trial-2/metrics.jsonl").read_text().splitlines()
    assert len(steps) == 4  # not at 2, within the warm-up
    assert results["trials"][2]["loss"] == pytest.approx(0.8 + 1 / 4)
    assert results["best"]["trial"] == 0
    assert "Ended by TrialPruned (loss 1.05 at step 4)" in (tmp_path / "out/trial-2/report.html").read_text()


def test_what_is_better_depends_on_the_direction(tmp_path, fake):
    results = sweep(fake, CONFIG, written(tmp_path / "sweep.yaml", direction="maximize"), tmp_path / "out")
    assert results["best"] == max(results["trials"], key=lambda row: row["loss"])


def test_the_value_is_the_mean_of_the_last(tmp_path, fake):
    results = sweep(fake, CONFIG, written(tmp_path / "sweep.yaml", last=2, trials=1), tmp_path / "out")
    row = results["trials"][0]
    assert row["loss"] == pytest.approx(abs(row["params"]["learning_rate"] - 0.1) + (1 / 9 + 1 / 10) / 2)


def test_a_trial_that_fails_does_not_end_the_search(tmp_path, fake):
    fake.stops = {("trial-1", 3): FloatingPointError("loss is nan"), ("trial-2", 3): torch.OutOfMemoryError("no room")}
    results = sweep(fake, CONFIG, written(tmp_path / "sweep.yaml"), tmp_path / "out")
    assert ends(results) == [(0, "finished"), (1, "failed"), (2, "failed"), (3, "finished")]
    assert results["trials"][1]["why"].startswith("step 3: loss is nan; last good checkpoint")
    assert results["trials"][1]["loss"] is None
    fake.stops = {("trial-0", 3): KeyError("a bug")}
    with pytest.raises(KeyError):
        sweep(fake, CONFIG, written(tmp_path / "sweep.yaml"), tmp_path / "other")


def test_numbers_that_do_not_fit_each_other_are_a_failed_trial(tmp_path, fake):
    config = rf.PPOConfig(batch_size=8, minibatch_size=4, quiet=True)
    plan = written(tmp_path / "sweep.yaml", fields={"minibatch_size": {"low": 8, "high": 16}}, trials=6)
    results = sweep(fake, config, plan, tmp_path / "out")
    for row in results["trials"]:
        assert row["ended"] == ("finished" if row["params"]["minibatch_size"] == 8 else "failed")
        assert ("exceeds batch_size 8" in row.get("why", "")) == (row["ended"] == "failed")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_search_goes_on(tmp_path, fake, error):
    plan = written(tmp_path / "sweep.yaml")
    fake.stops = {("trial-1", 6): error}
    with pytest.raises(type(error)):
        sweep(fake, CONFIG, plan, tmp_path / "out")
    tried = json.loads((tmp_path / "out/trial-1/run.json").read_text())["config"]["learning_rate"]
    with pytest.raises(ValueError, match="out already holds a sweep: choose another output_dir, or resume it"):
        sweep(fake, CONFIG, plan, tmp_path / "out")
    results = sweep(fake, CONFIG, plan, tmp_path / "out", resume=True)
    assert ends(results) == [(i, "finished") for i in (0, 1, 3, 4)]  # trial 2 is the rest of trial 1
    assert results["trials"][1]["params"]["learning_rate"] == tried
    steps = [json.loads(x)["step"] for x in (tmp_path / "out/trial-1/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11))
    assert len({row["params"]["learning_rate"] for row in results["trials"]}) == 4
    made = len(fake.made)
    assert sweep(fake, CONFIG, plan, tmp_path / "out", resume=True) == results  # nothing is left to do
    more = sweep(fake, CONFIG, written(plan, trials=5), tmp_path / "out", resume=True)  # but for a longer plan
    assert len(more["trials"]) == 5
    assert len(fake.made) == made + 1
    with pytest.raises(ValueError, match="holds a sweep of another plan or config"):
        sweep(fake, CONFIG, written(plan, metric="eval_loss"), tmp_path / "out", resume=True)


def test_a_search_killed_between_a_run_and_its_verdict_does_not_train_again(tmp_path, fake, monkeypatch):
    plan = written(tmp_path / "sweep.yaml", trials=2)
    with monkeypatch.context() as patch:
        patch.setattr(search._Listener, "value", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(search._Listener, "__call__", lambda self, step, stats: self.keep({"step": step, **stats}))
        with pytest.raises(KeyboardInterrupt):
            sweep(fake, CONFIG, plan, tmp_path / "out")
    results = sweep(fake, CONFIG, plan, tmp_path / "out", resume=True)
    assert [name for name, _ in fake.made] == ["trial-0", "trial-2"]
    rate = results["trials"][0]["params"]["learning_rate"]
    assert results["trials"][0]["loss"] == pytest.approx(abs(rate - 0.1) + 0.1)


def test_a_metric_that_no_step_has(tmp_path, fake):
    with pytest.raises(ValueError, match=r"sweep.yaml: no step of the run has the metric eval_loss"):
        sweep(fake, CONFIG, written(tmp_path / "sweep.yaml", metric="eval_loss"), tmp_path / "out")


def test_a_folder_with_anything_else_is_refused(tmp_path, fake):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("x")
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"out is not empty \(it holds thesis.tex\)"):
            sweep(fake, CONFIG, written(tmp_path / "sweep.yaml"), tmp_path / "out", resume=resume)


def rate(**room):
    return {"fields": {"learning_rate": room}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrik": 1}, 'unknown key "metrik" (did you mean "metric"?)'),
        ({"metric": "los"}, "there is no metric 'los' (did you mean loss?)"),
        ({"metric": [1]}, "there is no metric [1]"),
        ({"direction": "up"}, "direction must be one of maximize, minimize, got 'up'"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"pruner": "hope"}, "pruner must be one of median, halving, none, got 'hope'"),
        ({"fields": {}}, "fields must name config fields"),
        ({"fields": {"lerning_rate": {}}}, "no field 'lerning_rate' to search (did you mean learning_rate?)"),
        ({"fields": {"quiet": {"choices": [True]}}}, "SFTConfig has no field 'quiet' to search"),
        ({"fields": {"learning_rate": 3}}, "learning_rate must have low and high, or choices"),
        (rate(low=1e-5), "learning_rate must have low and high, or choices"),
        (rate(low=1e-5, hight=1e-3), "learning_rate has no entry 'hight' (did you mean high?)"),
        (rate(low=-1.0, high=1.0), "SFTConfig.learning_rate must be at least 0, got -1.0"),
        (rate(low="fast", high=1.0), "SFTConfig.learning_rate must be a finite number, got 'fast'"),
        (rate(low=0.1, high=0.01), "learning_rate must go from low to high"),
        (rate(low=0.0, high=0.01, log=True), "learning_rate with log: true must be above 0, got 0.0"),
        (rate(low=0.1, high=0.2, log="yes"), "learning_rate must go from low to high, and log be true or false"),
        (rate(choices=[]), "the choices of learning_rate must be a list"),
        (rate(choices=[0.1], low=0.1), "the choices of learning_rate must be a list, without low and high"),
        ({"fields": {"batch_size": {"low": 1.5, "high": 4}}}, "SFTConfig.batch_size must be a whole number, got 1.5"),
        ({"fields": {"schedule": {"low": 1, "high": 4}}}, "schedule must have choices"),
        ({"fields": {"schedule": {"choices": ["fast"]}}}, "SFTConfig.schedule must be one of constant, linear, cosine"),
    ],
)  # fmt: skip
def test_a_bad_plan_is_one_sentence(tmp_path, changes, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are compared below)
        read_plan(written(tmp_path / "sweep.yaml", **changes), CONFIG)
    assert str(caught.value).startswith(f"{tmp_path / 'sweep.yaml'}: ")
    assert words in str(caught.value)


def test_what_a_plan_needs(tmp_path):
    for key in ("metric", "direction", "fields"):
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({k: v for k, v in PLAN.items() if k != key}))
        with pytest.raises(ValueError, match=f"sweep.yaml: {key} is missing"):
            read_plan(tmp_path / "sweep.yaml", CONFIG)


def test_optuna_may_be_absent(tmp_path, monkeypatch, fake):
    find = importlib.util.find_spec
    monkeypatch.setattr(search, "find_spec", lambda name: None if name == "optuna" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"optuna is not installed: pip install 'rlhf-fast\[sweep\]'"):
        sweep(fake, CONFIG, written(tmp_path / "sweep.yaml"), tmp_path / "out")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_gpt2(TOKENIZER).save_pretrained("model")
    TOKENIZER.save_pretrained("model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the movie"}\n{"prompt": "I like"}\n')
    (tmp_path / "judge.py").write_text("def score(prompts, responses, **_):\n    return [len(r) for r in responses]\n")
    written(
        tmp_path / "sweep.yaml",
        metric="scores",
        direction="maximize",
        trials=2,
        fields={"kl_coef": {"low": 0, "high": 1}},
    )
    command = (
        "ppo --model model --prompts prompts.jsonl --reward judge.py:score --output_dir out --steps 2 --batch_size 2 "
        "--minibatch_size 2 --max_new_tokens 4 --sample_every 0 --sweep sweep.yaml"
    )
    capsys.readouterr()
    assert main(command.split()) == 0
    shown = capsys.readouterr().out
    assert "trial-1" in shown
    assert "kl_coef" in shown
    assert "the best config: out/best.yaml" in shown
    again = "ppo --config out/best.yaml --model model --prompts prompts.jsonl --reward judge.py:score --output_dir run"
    assert main(f"{again} --quiet true".split()) == 0  # the best config as a file of settings
    kept = json.loads((tmp_path / "run/run.json").read_text())["config"]["kl_coef"]
    assert kept == json.loads((tmp_path / "out/results.json").read_text())["best"]["params"]["kl_coef"]
    capsys.readouterr()
    for wrong, words in [(command, "out already holds a sweep"), (f"{command[:-1]}x", "sweep.yamx: No such file")]:
        assert main(wrong.split()) == 2
        assert words in capsys.readouterr().err
