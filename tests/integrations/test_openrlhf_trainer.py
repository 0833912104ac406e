"""OpenRLHF's own trainers, from its command line to the saved model, patched and not: the same figures and weights.

PPO with critic, reference and reward model, GRPO, SFT and DPO, on the real DeepSpeed (openrlhf_steps.py). Ray, vLLM,
W&B and CUDA have stand-ins (openrlhf_stand_ins.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peers import needs
from safetensors.torch import load_file

for peer in ("openrlhf", "deepspeed", "torchdata", "peft", "datasets"):
    needs(peer)
if not torch.distributed.is_gloo_available():
    pytest.skip("torch without gloo: runs where it is built in", allow_module_level=True)

ALL = {"log_probs_from_logits", "compute_entropy", "get_advantages_and_returns", "PolicyLoss", "ValueLoss"}
CALLED = {
    "ppo": ALL,
    "ppo_bf16": ALL,
    "grpo": {"log_probs_from_logits", "PolicyLoss"},
    "sft": {"log_probs_from_logits"},
    "dpo": {"log_probs_from_logits"},
}
STEPS = {"ppo": 2, "ppo_bf16": 1, "grpo": 2, "sft": 3, "dpo": 3}  # lines in the log


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of openrlhf_steps.py: a log and the models of each command, of OpenRLHF's functions and of ours."""
    root = tmp_path_factory.mktemp("openrlhf")
    script = Path(__file__).with_name("openrlhf_steps.py")
    calm = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    calm["HF_DATASETS_CACHE"] = str(root / "cache")
    command = [sys.executable, str(script), str(root)]
    done = subprocess.run(command, env=os.environ | calm, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return root


def report(runs, whose, name):
    return json.loads((runs / whose / f"{name}.json").read_text())


def figures(runs, whose, name):
    lines = report(runs, whose, name)["logged"]
    return [{key: value for key, value in line.items() if "timing/" not in key} for line in lines]


@pytest.mark.parametrize("name", CALLED)
def test_every_call_is_ours_and_as_many(runs, name):
    theirs, ours = (report(runs, whose, name)["calls"] for whose in ("theirs", "ours"))
    assert set(theirs) == {f"theirs {function}" for function in CALLED[name]}
    assert ours == {function.replace("theirs", "ours", 1): count for function, count in theirs.items()}


@pytest.mark.parametrize("name", CALLED)
def test_the_figures_are_the_same(runs, name):
    theirs, ours = (figures(runs, whose, name) for whose in ("theirs", "ours"))
    assert len(theirs) == len(ours) == STEPS[name]
    for expected, found in zip(theirs, ours, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    if name == "ppo":
        assert all(line["train/ppo_clip_ratio"] > 0.1 for line in theirs)
        assert theirs[1]["train/critic_loss"] < theirs[0]["train/critic_loss"]
        assert abs(theirs[1]["train/kl"]) > 1e-4  # the penalty of the second step
    elif name == "grpo":
        assert all(line["train/ppo_clip_ratio"] > 0.1 and line["train/kl"] > 1e-2 for line in theirs)
    elif name == "ppo_bf16":
        assert abs(theirs[0]["train/policy_loss"]) > 1e-3
    else:
        assert theirs[2]["train/loss_mean"] < theirs[0]["train/loss_mean"] - 0.05


@pytest.mark.parametrize("name", [name for name in CALLED if name != "ppo_bf16"])
def test_the_models_are_the_same(runs, name):
    models = [("actor", "")] + ([("reward", "_critic")] if name == "ppo" else [])
    for start, ending in models:
        theirs, ours = (
            load_file(runs / whose / f"{name}{ending}" / "model.safetensors") for whose in ("theirs", "ours")
        )
        before = load_file(runs / start / "model.safetensors")
        assert theirs["model.norm.weight"].dtype == torch.float32
        assert all((theirs[key] - before[key]).abs().max() > 1e-3 for key in before.keys() & theirs.keys())
        for key, weight in theirs.items():
            torch.testing.assert_close(ours[key], weight, rtol=0, atol=1e-5, msg=key)
