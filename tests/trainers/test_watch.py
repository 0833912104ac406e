"""What the figures of a run say: each warning fires on its history and is silent on a healthy one."""

import itertools
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import tiny_gpt2, tiny_tokenizer
from trainers.killed_runs import make

import rlhf_fast as rf
from rlhf_fast import metrics
from rlhf_fast.commands import TRAINERS
from rlhf_fast.rewards import load_reward
from rlhf_fast.trainers.drive import drive
from rlhf_fast.trainers.run import Run
from rlhf_fast.trainers.watch import AGAIN, Watch, training_range

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Config:
    precision: str = "fp32"
    old_logprobs: str = "recomputed"


def healthy(step):
    """The figures of the demo's PPO run, as it was measured: fast at first, then flat, with its noise."""
    noise = random.Random(step)
    return {
        "first_approx_kl": 1e-9,
        "mismatch": 2e-6,
        "kl": 0.0 if step == 1 else 1.5 * (1 - math.exp(-step / 5)) + noise.gauss(0, 0.2),
        "entropy": 0.56 + 0.08 * math.exp(-step / 8) + noise.gauss(0, 0.01),
        "ended": 1.0 if step % 7 else 0.98,
        "zero_variance": 0.1 + 0.1 * noise.random(),
        "value_loss": 0.02 + 1.5 * math.exp(-step / 4) + 0.02 * noise.random(),
        "scores": 4.0 - 4.0 * math.exp(-step / 4) + noise.gauss(0, 0.3),
    }


def told(change, *, steps=120, config=None, training_range=(0.3, 3.0)):
    """``(step, cause)`` of all warnings on the healthy figures, changed by ``change(step)``."""
    watch, found = Watch(config or Config(), training_range), []
    for step in range(1, steps + 1):
        for cause, sentence in watch.look(step, healthy(step) | change(step)):
            assert re.search(r"[a-z]\. [A-Z]|: .*(take|set|raise|Set|resample|turn)", sentence)  # cause, then remedy
            found.append((step, cause))
    return found


def test_a_healthy_run_is_silent():
    assert told(lambda step: {}, steps=500) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: {"first_approx_kl": 1e-4}, (1, "ratio")),  # √(2e-4) = 0.014 nats
        (lambda s: {"mismatch": 0.05}, (5, "mismatch")),
        (lambda s: {"kl": -0.6 + random.Random(s).gauss(0, 0.2)}, (10, "negative_kl")),
        (lambda s: {"entropy": 0.6 * math.exp(-s / 10)}, (22, "entropy_collapse")),
        (lambda s: {"ended": 0.4}, (5, "no_eos")),
        (lambda s: {"zero_variance": 0.6}, (5, "zero_variance")),
        (lambda s: {"value_loss": 0.05 if s < 40 else 2.0}, (40, "value_loss")),
        (lambda s: {"scores": 0.5 * s}, (21, "reward_drift")),  # half of the mean of 17..21 exceeds 0.3 + 3 · 3
        (lambda s: {"scores": -9.0}, (5, "reward_drift")),
    ],
)
def test_each_cause_is_named_once_in_a_while(change, expected):
    found = told(change)
    assert found[0] == expected
    assert {cause for _, cause in found} == {expected[1]}
    steps = [step for step, _ in found]
    assert all(after - before >= AGAIN for before, after in itertools.pairwise(steps))
    if expected[1] != "value_loss":  # after it has stayed high it is what later steps are compared with
        assert steps == [expected[0] + i * AGAIN for i in range(len(steps))]
        assert len(steps) > 1


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {"first_approx_kl": 4e-5},  # 0.009 nats
        lambda s: {"mismatch": 0.04 if s % 10 == 0 else 0.0},  # one odd step
        lambda s: {"kl": random.Random(s).gauss(0, 0.5)},  # a KL of 0, and its noise
        lambda s: {"kl": -1e-7},  # rounding
        lambda s: {"entropy": 0.0 if s <= 20 else 0.6},  # the critic learns first
        lambda s: {"entropy": 0.6 - 0.4 * min(s / 100, 1)},  # to a third
        lambda s: {"ended": 0.0 if s % 5 == 0 else 0.8},
        lambda s: {"value_loss": 0.5 if s == 50 else 0.05},  # a spike
        lambda s: {"scores": None, "kl": None, "entropy": math.nan},  # no value, or JSON's null
        lambda s: {"value_loss": 0.0},  # a trainer without a critic
    ],
)
def test_what_is_no_symptom(change):
    assert told(change) == []


def test_what_the_config_allows():
    apart = {"first_approx_kl": 1e-3, "mismatch": 0.05}
    assert {cause for _, cause in told(lambda s: apart)} == {"ratio", "mismatch"}
    assert told(lambda s: apart, config=Config(precision="bf16")) == []
    assert {c for _, c in told(lambda s: apart, config=Config(old_logprobs="sampler"))} == {"mismatch"}
    assert told(lambda s: {"scores": 1e6}, training_range=None) == []  # a reward that is no model


def test_a_resumed_run_goes_on_where_it_was():
    """What it says after step 30 does not depend on whether it was stopped there."""

    def figures(step):
        return healthy(step) | {"ended": 0.1, "entropy": 0.6 * math.exp(-step / 10)}

    whole = Watch(Config())
    said = {step: whole.look(step, figures(step)) for step in range(1, 121)}
    resumed = Watch(Config()).replay(
        json.loads(json.dumps({"step": s, "time": 1.0, **figures(s)})) for s in range(1, 31)
    )
    assert {step: resumed.look(step, figures(step)) for step in range(31, 121)} == {s: said[s] for s in range(31, 121)}
    assert [s for s in said if any(cause == "no_eos" for cause, _ in said[s])] == [5, 55, 105]


class Ender:
    """Responses that never end; ``at`` maps a step to what it raises there."""

    def __init__(self, at=None):
        self.at, self.done, self.updates = at or {}, 0, 0

    def batches(self):
        return iter(range(self.done + 1, 11))

    def step(self, batch):
        if batch in self.at:
            raise self.at[batch]
        self.done, self.updates = self.done + 1, self.updates + 1
        return {"ended": 0.0, "loss": 1.0 / batch}

    def after(self, step, run):
        return {"eval_loss": 2.0} if step == 10 else {}

    def save(self, folder):
        (folder / "done.txt").write_text(str(self.done))

    def restore(self, folder):
        self.done = int((folder / "done.txt").read_text())

    save_model = save


def start(folder, trainer, *, resume=False, quiet=True):
    run = Run("test", folder, Config(), keep=2, quiet=quiet)
    return drive(trainer, run, total=10, save_every=3, live=(), resume=resume)


def warned(folder):
    return [(w["step"], w["cause"]) for w in map(json.loads, (folder / "warnings.jsonl").read_text().splitlines())]


def test_a_run_says_it_and_writes_it_down(tmp_path, capsys):
    start(tmp_path / "run", Ender(), quiet=False)
    assert warned(tmp_path / "run") == [(5, "no_eos")]
    assert "step 5: only 0% of the responses end" in capsys.readouterr().err
    start(None, Ender())
    assert capsys.readouterr().err == ""


def test_a_stopped_and_resumed_run_warns_once(tmp_path):
    with pytest.raises(KeyError):
        start(tmp_path / "run", Ender({6: KeyError("x")}))
    assert warned(tmp_path / "run") == [(5, "no_eos")]
    start(tmp_path / "run", Ender(), resume=True)
    assert warned(tmp_path / "run") == [(5, "no_eos")]
    (tmp_path / "late").mkdir()
    with pytest.raises(KeyError):
        start(tmp_path / "late", Ender({5: KeyError("x")}))
    assert not (tmp_path / "late/warnings.jsonl").exists()
    start(tmp_path / "late", Ender(), resume=True)
    assert warned(tmp_path / "late") == [(5, "no_eos")]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (None, "Finished after 10 steps and 0 min 0 s, with 1 warning."),
        (KeyError("x"), "Ended by KeyError ('x') after 6 steps"),
        (FloatingPointError("loss is nan"), "Ended by FloatingPointError (step 7: loss is nan; last good checkpoint"),
        (KeyboardInterrupt(), "Interrupted after 6 steps"),
        (SystemExit(143), "Stopped by a signal after 6 steps"),
    ],
)
def test_the_page_is_there_however_a_run_ends(tmp_path, error, words):
    folder = tmp_path / "run"
    if error is None:
        start(folder, Ender())
    else:
        with pytest.raises(type(error)):
            start(folder, Ender({7: error}))
    page = (folder / "report.html").read_text()
    assert words.replace("'", "&#x27;") in page
    assert "only 0% of the responses end" in page  # the warning
    assert 'aria-label="loss"' in page  # the curve
    assert metrics.METRICS["loss"].meaning in page
    assert 'aria-label="ended"' not in page  # never changed: a line of a table
    assert "recomputed" in page  # the config
    assert torch.__version__ in page


def test_a_run_without_a_step_has_a_page_too(tmp_path):
    with pytest.raises(KeyError):
        start(tmp_path / "run", Ender({1: KeyError("x")}))
    assert "after 0 steps" in (tmp_path / "run/report.html").read_text()


def test_a_page_that_cannot_be_written_hides_no_error(tmp_path):
    class Blocked(Ender):
        def after(self, step, run):
            (run.folder / "report.html").mkdir(exist_ok=True)
            return {}

    with pytest.warns(UserWarning, match="report.html was not written"), pytest.raises(KeyError):
        start(tmp_path / "run", Blocked({6: KeyError("x")}))


def test_the_page_of_a_long_run_is_small_and_soon_written(tmp_path):
    """100 000 steps of 25 figures and samples of 10 000 characters."""
    import time

    from rlhf_fast.trainers.page import write_page

    (tmp_path / "run.json").write_text(json.dumps({"config": {}, "versions": {}}))
    shift = {name: i for i, name in enumerate(list(metrics.METRICS)[1:])}
    line = "".join(f', "{name}": {i}.1234567890#' for name, i in shift.items())
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for i in range(1, 100_001):
            held_out = f', "eval_loss": {i}' if i in (7, 77_777) else ""
            file.write(f'{{"step": {i}, "time": {i}{line.replace("#", str(i % 997))}{held_out}}}\n')
    text = {"step": 100_000, "prompt": "p" * 10_000, "response": "r" * 10_000, "score": 1.0}
    (tmp_path / "samples.jsonl").write_text((json.dumps(text) + "\n") * 8)
    start = time.perf_counter()
    path = write_page(tmp_path, "ppo")
    seconds = time.perf_counter() - start
    assert path.stat().st_size < 1e6
    assert seconds < 5  # 0.5 s on an idle core; other processes may be at work
    page = path.read_text()
    assert page.count('class="line') == len(shift) + 1
    chart = page.split('aria-label="eval_loss"')[1].split("</svg>")[0]
    assert re.search(r'd="M52.0 [\d.]+L406.0 ', chart)  # both evaluations are there


@pytest.mark.parametrize("kind", sorted(TRAINERS))
def test_every_trainer_writes_the_figures_of_the_schema(tmp_path, kind):
    """Distillation on its own responses; of the rewards an ensemble."""
    trainer = make("distill own" if kind == "distill" else kind, tmp_path / "run")
    if hasattr(trainer, "reward"):
        trainer.reward = load_reward([trainer.reward] * 2, None)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    written = {name for line in lines for name in line} - {"step", "time"}
    known = {n for n, m in metrics.METRICS.items() if kind in m.trainers.split(", ") or m.trainers == metrics.ALL}
    assert {name.removeprefix("eval_") for name in written} == known
    assert (tmp_path / "run/report.html").stat().st_size < 1e6


def test_the_schema_is_the_table_of_the_docs():
    assert metrics.table() in (ROOT / "docs/metrics.md").read_text()
    causes = set(re.findall(r"^\| `(\w+)` \| [^|]+ \|$", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE))
    assert causes == set(Watch().checks)


def test_a_reward_model_remembers_the_range_of_its_scores(tmp_path):
    """Against the scores of its training pairs, asked for one by one."""
    tokenizer = tiny_tokenizer()
    pairs = [{"prompt": f"the {w}", "chosen": " was good", "rejected": f" was {w}"} for w in ("movie", "plot", "Bot")]
    config = rf.RewardConfig(epochs=2, batch_size=2, learning_rate=1e-3, quiet=True)
    rf.RewardTrainer(
        tiny_gpt2(tokenizer), data=pairs, tokenizer=tokenizer, output_dir=tmp_path / "reward", config=config
    ).train()
    reward = load_reward(tmp_path / "reward", None)
    scores = [float(reward([pair["prompt"]], [pair[name]])[0]) for pair in pairs for name in ("chosen", "rejected")]
    mean, std = torch.tensor(scores).double().mean(), torch.tensor(scores).double().std()
    assert reward.training_range == pytest.approx((float(mean), float(std)), rel=1e-4)
    assert load_reward(rf.models.load_scalar_model(tiny_gpt2(tokenizer)), tokenizer).training_range is None


def test_a_process_reward_model_remembers_the_range_of_its_lowest_scores(tmp_path):
    tokenizer = tiny_tokenizer()
    steps = [{"prompt": f"the {w}", "steps": [" was", f" {w}", " good"], "labels": [1, None, 0]} for w in ("a", "bad")]
    config = rf.RewardConfig(epochs=2, batch_size=2, learning_rate=1e-2, normalise=True, quiet=True)
    rf.RewardTrainer(
        tiny_gpt2(tokenizer), data=steps, tokenizer=tokenizer, output_dir=tmp_path / "reward", config=config
    ).train()
    reward = load_reward(tmp_path / "reward", None)
    scores = torch.cat([reward([record["prompt"]], ["\n".join(record["steps"])]) for record in steps]).double()
    assert reward.training_range == pytest.approx((float(scores.mean()), float(scores.std())), rel=1e-4)


def test_the_range_of_an_ensemble_is_that_of_its_members():
    class Member:
        def __init__(self, mean, std):
            self.training_range = (mean, std)

        def __call__(self, prompts, responses):
            return [0.0] * len(prompts)

    members = [Member(1.0, 2.0), Member(3.0, 1.0)]
    for combine, mean in (("mean", 2.0), ("worst", 1.0), ("mean_minus_std", 2.0)):
        ensemble = load_reward(rf.rewards.EnsembleReward(members, combine=combine), None)
        assert ensemble.training_range == (mean, 1.5)
    assert load_reward([*members, lambda prompts, responses: [0.0]], None).training_range is None
    trainer = make("grpo", None)
    trainer.reward = ensemble
    assert training_range(trainer) == (2.0, 1.5)


def test_a_step_can_be_listened_to(tmp_path):
    trainer, heard = Ender(), []
    trainer.on_step = lambda step, stats: heard.append((step, stats.get("eval_loss")))
    start(tmp_path / "run", trainer)
    assert heard == [(i, 2.0 if i == 10 else None) for i in range(1, 11)]
