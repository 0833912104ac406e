"""docs/from-trl-ppo.md against TRL's last PPO trainer: its script runs, its tables name what is there.

test_trl_ppo.py runs this file, in a process that finds a TRL with that trainer.
"""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import trl
from test_doc_pages import BLOCK, GIVEN, model, page, table
from transformers import TrainingArguments
from trl.experimental.ppo import PPOConfig, PPOTrainer

import rlhf_fast as rf

BEFORE, AFTER = (block["code"] for block in list(BLOCK.finditer(page("from-trl-ppo.md")))[:2])
ROWS = [(re.findall(r"`(\w+)`", cell), re.findall(r"\((.*)\)", cell)) for cell, *_ in table("TRL's `PPOConfig`")]


def fields(config) -> dict:
    return {field.name: field.default for field in dataclasses.fields(config)}


def test_the_page_is_about_this_version():
    assert f"1.10 to {trl.__version__}" in page("from-trl-ppo.md")


def test_the_table_has_every_field_and_no_other():
    """Every one that TRL adds to TrainingArguments, or gives another default; and each is TRL's."""
    theirs, inherited = fields(PPOConfig), fields(TrainingArguments)
    listed = [name for names, _ in ROWS for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) <= theirs.keys()
    assert {name for name in theirs if theirs[name] != inherited.get(name, ...)} - set(listed) == set()


def test_the_defaults_of_the_table_are_those_of_a_config(tmp_path):
    config = PPOConfig(output_dir=str(tmp_path), use_cpu=True)
    for names, (said,) in ROWS:
        for name in names:
            value = getattr(config, name)
            if said == "a pythia":
                assert "pythia" in value
            elif said in GIVEN:
                assert (value or None if said == "none" else value) == GIVEN[said], name
            else:
                assert value == (said if isinstance(value, str) else float(said)), name


def test_the_table_has_every_argument():
    listed = {name for cell, *_ in table("TRL's `PPOTrainer`") for name in re.findall(r"`(\w+)`", cell)}
    assert listed == inspect.signature(PPOTrainer).parameters.keys()
    assert [*inspect.signature(PPOTrainer.train).parameters] == ["self"]  # no checkpoint


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The names that the script of the page leaves, run as it is printed but for one batch, and on the CPU."""
    folder = tmp_path_factory.mktemp("script")
    shorter = re.sub(r"total_episodes=\d+", "total_episodes=64, use_cpu=True", BEFORE)
    assert shorter != BEFORE
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model("runs/sft")
        model("runs/reward", scalar=True)
        lines = [json.dumps({"prompt": f" the movie was{' very' * (i % 3)} good"}) for i in range(64)]
        Path("prompts.jsonl").write_text("\n".join(lines))
        exec(shorter, names)
        assert len(rf.generate("runs/ppo", [" the movie"], max_new_tokens=2)) == 1  # the policy alone was saved
    return names


def test_the_script_runs_and_the_table_has_every_figure(ran):
    (logged,) = ran["trainer"].state.log_history
    listed = {name for cell, *_ in table("TRL logs") for name in re.findall(r"`([\w/]+)`", cell)}
    assert listed == logged.keys() - {"step"}


def test_its_precision_and_checkpointing_are_not_read(ran):
    trainer = ran["trainer"]
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    assert trainer.accelerator.mixed_precision == "no"
    assert not trainer.policy_model.is_gradient_checkpointing


#: TRL's field → ours, where both mean the same.
PLAIN = {
    "per_device_train_batch_size": "micro_batch_size", "batch_size": "batch_size", "num_ppo_epochs": "ppo_epochs",
    "response_length": "max_new_tokens", "temperature": "temperature", "missing_eos_penalty": "missing_eos_penalty",
    "whiten_rewards": "whiten_rewards", "kl_coef": "kl_coef", "kl_estimator": "kl", "cliprange": "cliprange",
    "cliprange_value": "cliprange_value", "vf_coef": "vf_coef", "gamma": "gamma", "lam": "lam",
    "learning_rate": "learning_rate", "lr_scheduler_type": "schedule", "weight_decay": "weight_decay",
}  # fmt: skip


def test_the_script_after_has_the_numbers_of_the_script_before(ran):
    names: dict = {}
    exec(AFTER[: AFTER.index("rf.PPOTrainer(")], names)
    ours, theirs = names["config"], ran["config"]
    assert {mine: getattr(ours, mine) for mine in PLAIN.values()} == {
        mine: getattr(theirs, its) for its, mine in PLAIN.items()
    }
    assert ours.steps * ours.batch_size == int(re.search(r"total_episodes=(\d+)", BEFORE)[1])
    assert ours.minibatch_size == ours.batch_size  # a step per pass
    assert ours.warmup_ratio == theirs.warmup_steps == 0
    assert (ours.old_logprobs, ours.precision, ours.gradient_checkpointing) == ("sampler", "fp32", False)


def test_our_script_has_the_settings_that_the_table_gives():
    rows = {names[0]: ours for (names, _), (_, ours, _) in zip(ROWS, table("TRL's `PPOConfig`"), strict=True)}
    for its, mine in PLAIN.items():
        assert its == "batch_size" or rows[its].startswith(f"`{mine}`"), its
