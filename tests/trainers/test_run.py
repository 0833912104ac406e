"""The folder of a run: refusal, checkpoints, NaN, interruption. The trainers here are stand-ins of a few lines."""

import json
import math
import os
import signal
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast.trainers import drive as drive_module
from rlhf_fast.trainers import folder as folder_module
from rlhf_fast.trainers import learning
from rlhf_fast.trainers.drive import drive
from rlhf_fast.trainers.options import option, validate
from rlhf_fast.trainers.run import Run, check_folder, epochs, stream


@dataclass(frozen=True)
class Config:
    rate: float = option(0.5, "a rate", low=0.0, high=1.0)
    count: int = option(3, "a count", low=1)
    limit: float | None = option(None, "a limit", above=0.0)
    kind: str = option("a", "a kind", choices=("a", "b"))
    loud: bool = option(False, "a switch")

    def __post_init__(self):
        validate(self)


class Counter:
    """Adds the numbers it is given; ``bad`` maps a step to what it raises or does there."""

    def __init__(self, steps, at=None):
        self.steps, self.at = steps, at or {}
        self.total = self.done = self.updates = 0

    def batches(self):
        return iter(range(1, self.steps + 1))

    def step(self, batch):
        if batch in self.at:
            self.at[batch](self)
        self.total += batch
        self.done, self.updates = self.done + 1, self.updates + 1
        return {"loss": 1.0 / batch, "odd": math.nan}

    def after(self, step, run):
        return {"eval_loss": 0.5} if step == 2 else {}

    def save(self, folder):
        (folder / "total.txt").write_text(str(self.total))

    save_model = save


def start(folder, trainer, *, save_every=2, keep=2):
    run = Run("test", folder, Config(), keep=keep, quiet=True)
    return drive(trainer, run, total=trainer.steps, save_every=save_every, live=("loss",))


def steps_kept(folder):
    return sorted(os.listdir(folder / "checkpoints"))


def test_a_run_leaves_figures_the_last_checkpoints_and_the_model(tmp_path):
    folder = tmp_path / "new" / "run"
    metrics = start(folder, Counter(7))
    assert metrics["loss"] == 1 / 7
    assert metrics["eval_loss"] == 0.5
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert [line.get("eval_loss") for line in lines] == [None, 0.5, None, None, None, None, None]
    assert lines[3]["loss"] == 0.25
    assert lines[3]["odd"] is None  # JSON has no NaN
    assert steps_kept(folder) == ["step-4", "step-6"]
    assert (folder / "checkpoints/step-4/total.txt").read_text() == "10"
    assert (folder / "total.txt").read_text() == "28"
    record = json.loads((folder / "run.json").read_text())
    assert record["trainer"] == "test"
    assert record["config"] == {"rate": 0.5, "count": 3, "limit": None, "kind": "a", "loud": False}
    assert record["versions"]["torch"] == torch.__version__


def test_tensorboard_holds_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start(tmp_path / "run", Counter(3))
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 5)) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 0.33333)]


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert start(None, Counter(3))["loss"] == 1 / 3
    assert os.listdir(tmp_path) == []


def test_a_folder_with_a_run_or_anything_else_is_refused(tmp_path):
    start(tmp_path / "run", Counter(1))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"run already holds a run \(run.json\): choose another output_dir"):
        start(tmp_path / "run", Counter(1))
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"other is not empty \(it holds thesis.tex\)"):
        start(tmp_path / "other", Counter(1))
    with pytest.raises(OSError, match=r"thesis.tex is a file"):
        start(tmp_path / "other/thesis.tex", Counter(1))
    (tmp_path / "empty").mkdir()
    start(tmp_path / "empty", Counter(1))


def nan(trainer):
    raise FloatingPointError("loss is nan")


def test_nan_names_the_step_and_the_last_good_checkpoint(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"^step 6: loss is nan; last good checkpoint: .*run/checkpoints/step-5$"
    ):
        start(tmp_path / "run", Counter(9, {6: nan}))
    assert steps_kept(tmp_path / "run") == ["step-4", "step-5"]  # the weights before step 6 are good: they are kept
    assert (tmp_path / "run/checkpoints/step-5/total.txt").read_text() == "15"
    assert not (tmp_path / "run/total.txt").exists()


def test_weights_that_a_failing_step_has_touched_are_not_called_good(tmp_path):
    def half_done(trainer):
        trainer.updates += 1
        nan(trainer)

    with pytest.raises(FloatingPointError, match=r"step 6: loss is nan; last good checkpoint: .*step-4"):
        start(tmp_path / "run", Counter(9, {6: half_done}))
    with pytest.raises(FloatingPointError, match="step 1: loss is nan; there is no checkpoint yet"):
        start(tmp_path / "second", Counter(9, {1: half_done}))


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_finishes_the_step_saves_and_stops(tmp_path, number, error):
    before = signal.getsignal(number)
    with pytest.raises(error) as caught:
        start(tmp_path / "run", Counter(9, {3: lambda _: os.kill(os.getpid(), number)}))
    if error is SystemExit:
        assert caught.value.code == 143
    assert steps_kept(tmp_path / "run") == ["step-2", "step-3"]
    assert (tmp_path / "run/checkpoints/step-3/total.txt").read_text() == "6"
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        trainer.total = -1000

    trainer = Counter(9, {3: twice})
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", trainer)
    assert trainer.total == 3
    assert steps_kept(tmp_path / "run") == ["step-2"]


def test_of_several_processes_each_takes_the_launchers_echo_for_one_signal(monkeypatch):
    """A terminal sends Ctrl-C to all of them and to their launcher, which passes it on."""
    run = Run("test", None, Config(), keep=1, quiet=True)
    monkeypatch.setattr(drive_module.processes, "count", lambda: 2)
    deafen = drive_module._listen(run)
    try:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert run.stop_signal == signal.SIGINT
        monkeypatch.setattr(drive_module, "ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        deafen()


def test_a_crash_while_saving_leaves_the_older_checkpoints(tmp_path):
    class Full(Counter):
        def save(self, folder):
            super().save(folder)
            if self.total > 5:
                raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        start(tmp_path / "run", Full(6), keep=1)
    run = Run("test", None, Config(), keep=1, quiet=True)
    run.folder = tmp_path / "run"
    assert [path.name for path in run.checkpoints()] == ["step-2"]


def test_a_failure_of_any_kind_keeps_the_good_weights(tmp_path):
    def fail(error):
        def raising(trainer):
            raise error

        return raising

    for name, error in (("key", KeyError("x")), ("memory", RuntimeError("out of memory"))):
        with pytest.raises(type(error)) as caught:
            start(tmp_path / name, Counter(9, {6: fail(error)}))
        assert caught.value is error
        assert steps_kept(tmp_path / name) == ["step-4", "step-5"]
    with pytest.raises(TypeError, match=r"^step 6: no number; last good checkpoint: .*step-5$"):
        start(tmp_path / "type", Counter(9, {6: fail(TypeError("no number"))}))


def test_the_model_appears_once_it_is_whole(tmp_path):
    class Full(Counter):
        def save_model(self, folder):
            (folder / "config.json").write_text("{}")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        start(tmp_path / "run", Full(3))
    assert not (tmp_path / "run/config.json").exists()


def test_of_two_runs_that_start_together_one_gets_the_folder(tmp_path, monkeypatch):
    first, second = (Run("test", tmp_path / "run", Config(), keep=1, quiet=True) for _ in range(2))
    first.open(1)
    before = (tmp_path / "run/run.json").read_text()
    looks = iter([lambda folder, **how: None])  # the second one looked before the first one wrote
    monkeypatch.setattr(folder_module, "check_folder", lambda folder, **how: next(looks, check_folder)(folder, **how))
    with pytest.raises(ValueError, match="holds a run that is under way"):
        second.open(1)
    assert (tmp_path / "run/run.json").read_text() == before
    first.close()


def test_a_run_that_failed_in_its_first_step_leaves_the_folder_free(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(FloatingPointError):
        start(folder, Counter(3, {1: nan}))
    left = {entry.name for entry in folder.iterdir()}
    assert left == {"run.json", "metrics.jsonl", "report.html", "tensorboard"}
    run = Run("test", folder, Config(rate=0.25), keep=2, quiet=True)  # another config, as one may try after a failure
    drive(Counter(3), run, total=3, save_every=2, live=())
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    record = json.loads((folder / "run.json").read_text())
    assert (record["config"]["rate"], record["finished"]) == (0.25, True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_in_its_first_step_keeps_others_out(tmp_path, resume):
    folder = tmp_path / "run"

    def second(_):
        with pytest.raises(ValueError, match="run holds a run that is under way"):
            Run("test", folder, Config(), keep=1, quiet=True).open(1, resume=resume)
        if not resume:
            with pytest.raises(ValueError, match="run holds a run that is under way"):
                check_folder(folder)

    assert start(folder, Counter(2, {1: second}))["loss"] == 0.5


@pytest.mark.parametrize("more", ["notes.txt", "checkpoints", "samples.jsonl", "data"])
def test_a_run_that_left_more_is_not_overwritten(tmp_path, more):
    with pytest.raises(FloatingPointError):
        start(tmp_path, Counter(3, {1: nan}))
    (tmp_path / more).mkdir()
    for attempt in (check_folder, lambda folder: start(folder, Counter(1))):
        with pytest.raises(
            ValueError, match=r"already holds a run \(run.json\): choose another output_dir or remove it"
        ):
            attempt(tmp_path)


def test_a_run_killed_while_it_wrote_its_record_leaves_the_folder_free(tmp_path):
    (tmp_path / "run.json").write_text('{"trainer": "te')
    start(tmp_path, Counter(1))
    assert json.loads((tmp_path / "run.json").read_text())["trainer"] == "test"


def test_epochs_visit_every_example_once_in_an_order_of_their_own():
    examples = list(range(10))
    batches = list(epochs(examples, 4, 3, seed=5))
    assert [len(b) for b in batches] == [4, 4, 2] * 3
    passes = [[x for b in batches[i : i + 3] for x in b] for i in (0, 3, 6)]
    assert all(sorted(p) == examples for p in passes)
    assert passes[0] != passes[1] != passes[2]
    assert list(epochs(examples, 4, 3, seed=5)) == batches
    assert list(epochs(examples, 4, 3, seed=6)) != batches


def test_streams_depend_on_the_seed_and_the_key_alone():
    keys = [(0, 0), (0, 1), (1, 0), (2**40, 0), (0, 2**40), (0, 1, 1)]
    draws = [torch.rand((), generator=stream(*key)).item() for key in keys]
    torch.rand(3)
    assert len(set(draws)) == len(keys)
    assert [torch.rand((), generator=stream(*key)).item() for key in keys] == draws


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"rate": 1.5}, "Config.rate must be at most 1, got 1.5"),
        ({"rate": math.nan}, "Config.rate must be a finite number, got nan"),
        ({"rate": "fast"}, "Config.rate must be a finite number, got 'fast'"),
        ({"rate": None}, "Config.rate must be a finite number, got None"),
        ({"count": 0}, "Config.count must be at least 1, got 0"),
        ({"count": 2.5}, "Config.count must be a whole number, got 2.5"),
        ({"count": True}, "Config.count must be a whole number, got True"),
        ({"limit": 0.0}, "Config.limit must be above 0, got 0.0"),
        ({"kind": "c"}, "Config.kind must be one of a, b, got 'c'"),
        ({"loud": 1}, "Config.loud must be true or false, got 1"),
    ],
)
def test_a_value_out_of_range_is_named(bad, words):
    with pytest.raises(ValueError, match="^" + words.replace("(", r"\(") + "$"):
        Config(**bad)


def test_values_at_the_edge_are_taken():
    assert Config(rate=1, limit=None, count=1).rate == 1


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        # 10 steps of which 2 warm up: 1/3, 2/3, then the decay over the other 8.
        ("constant", [1 / 3, 2 / 3] + [1.0] * 8),
        ("linear", [1 / 3, 2 / 3] + [1 - i / 8 for i in range(8)]),
        ("cosine", [1 / 3, 2 / 3] + [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]),
    ],
)
def test_learning_rates(schedule, rates):
    layers = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    optimizer = learning.adamw([(layers[0], 0.1), (layers[1], 0.3)], 0.01)
    for step, share in enumerate(rates):
        assert learning.set_rate(optimizer, schedule, step, 10, 0.2) == pytest.approx(0.1 * share)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 * share] * 2 + [0.3 * share] * 2)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0, 0.01, 0.0]


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        ({"distributed_type": "MEGATRON_LM"}, "Accelerate was set up for MEGATRON_LM"),
        ({"gradient_accumulation_steps": 4}, "leave Accelerate's gradient_accumulation_steps at 1"),
        ({"mixed_precision": "fp16"}, "use precision=bf16, not fp16"),
    ],
)
def test_what_the_trainers_cannot_do_is_refused(monkeypatch, setup, words):
    import accelerate

    plain = {"distributed_type": "NO", "num_processes": 1, "gradient_accumulation_steps": 1, "mixed_precision": "no"}
    monkeypatch.setattr(accelerate, "Accelerator", lambda: SimpleNamespace(**plain | setup))
    with pytest.raises(ValueError, match=words):
        learning.accelerator()


@pytest.mark.parametrize(
    ("version", "offload", "words"),
    [(1, None, "fsdp_version 2"), (2, SimpleNamespace(offload_params=True), "no offload_params")],
)
def test_fsdp_other_than_the_trainers_own_is_refused(monkeypatch, version, offload, words):
    import accelerate

    plugin = SimpleNamespace(fsdp_version=version, cpu_offload=offload)
    found = SimpleNamespace(
        distributed_type="FSDP", num_processes=2, gradient_accumulation_steps=1, mixed_precision="no",
        state=SimpleNamespace(fsdp_plugin=plugin), device=torch.device("cuda"),
    )  # fmt: skip
    monkeypatch.setattr(accelerate, "Accelerator", lambda: found)
    with pytest.raises(ValueError, match=words):
        learning.accelerator()
    plugin.fsdp_version, plugin.cpu_offload = 2, None
    assert learning.accelerator() is found
    assert learning.home(found).type == "cpu"
    monkeypatch.setattr(learning.packing, "prepare", lambda *given, **options: (*given[1:], options))
    config = SimpleNamespace(packing=True, precision="fp32")
    device, _, options = learning.prepare_packing(found, [None], config)
    assert (device.type, options) == ("cpu", {"rows": False})  # rows are what a CPU attends to, not this GPU


def test_fsdp_is_seen_where_accelerate_counts_one_process(monkeypatch):
    """It does so without a GPU where nobody has asked for the CPU, and torch has connected all of them."""
    import accelerate

    found = SimpleNamespace(
        distributed_type="NO", num_processes=1, gradient_accumulation_steps=1, mixed_precision="no",
        state=SimpleNamespace(fsdp_plugin=None),
    )  # fmt: skip
    monkeypatch.setattr(accelerate, "Accelerator", lambda: found)
    monkeypatch.setattr(learning.processes, "count", lambda: 2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="fsdp_version 2"):
        learning.accelerator()
