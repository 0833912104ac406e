"""verl's own trainers take the same steps with ``rf.patch("verl")`` as without: what they log, and their parameters.

RayPPOTrainer, the newer PPOTrainer and SFTTrainer, each three steps on the CPU, in a process of their own
(verl_steps.py, which says what is stood in for).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peers import needs

for name in ("verl", "tensordict", "hydra", "torchdata", "codetiming", "cachetools", "orjson", "pydantic"):
    needs(name)
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch without gloo: runs where it is built in"
)
RUNS = ("legacy", "v1", "sft")
MEASURED = ("timing", "perf/", "mfu")  # of the machine
# 3 steps: 2 epochs of 2 mini-batches, of 2 micro-batches for the actor, one for the critic; 2 micro-batches for the old
# logprobs, and 2 for the reference's, which have no entropy.
PPO_CALLS = {
    "logprobs_from_logits": 3 * (8 + 2 + 2),
    "compute_gae_advantage_return": 3,
    "compute_policy_loss_vanilla": 3 * 8,
    "compute_value_loss": 3 * 4,
}
CALLS = {
    "legacy": PPO_CALLS | {"entropy_from_logits": 3 * (8 + 2)},
    "v1": PPO_CALLS | {"entropy_from_logits_with_chunking": 3 * (8 + 2)},
    "sft": {"logprobs_from_logits": 3 * 2},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By trainer and by whose functions: ``metrics`` of each step, ``parameters`` at the end and the ``calls``."""
    folder = tmp_path_factory.mktemp("verl")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VERL_", "RAY_"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("verl_steps.py")), str(folder)],
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt")


def logged(run):
    """What a trainer logs but for times, by step and name."""
    return [{k: v for k, v in step.items() if not any(part in k for part in MEASURED)} for step in run["metrics"]]


@pytest.mark.parametrize("name", RUNS)
def test_the_trainer_takes_the_same_steps(results, name):
    ours, theirs = logged(results[name]["ours"]), logged(results[name]["verl"])
    assert len(ours) == len(theirs) == 3
    for mine, its in zip(ours, theirs, strict=True):
        assert len(its) > (4 if name == "sft" else 70)
        assert mine == pytest.approx(its, rel=1e-4, abs=1e-5)
        losses = {metric: value for metric, value in its.items() if metric.endswith("loss")}
        assert len(losses) == (1 if name == "sft" else 6 if name == "legacy" else 5)
        assert {metric: mine[metric] for metric in losses} == pytest.approx(losses, rel=1e-5, abs=1e-5)
    after, expected = (results[name][who]["parameters"] for who in ("ours", "verl"))
    assert len(expected) == (12 if name == "sft" else 12 + 13)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_ours_were_called_and_only_under_the_patch(results, name):
    assert results[name]["ours"]["calls"] == CALLS[name]
    assert results[name]["verl"]["calls"] == {}


@pytest.mark.parametrize("name", ["legacy", "v1"])
def test_the_steps_clip_and_learn(results, name):
    """Else anything would agree."""
    steps = logged(results[name]["verl"])
    for metric in ("actor/pg_clipfrac", "critic/vf_clipfrac"):
        assert max(step[metric] for step in steps) > 0.1
    assert (max(step["actor/pg_clipfrac_lower"] for step in steps) > 0) == (name == "v1")  # the dual clip
    assert all(step["response_length/min"] < step["response_length/mean"] for step in steps)
    assert len({step["critic/score/mean"] for step in steps}) == 3
    assert steps[-1]["critic/vf_loss"] < steps[0]["critic/vf_loss"] / 2
    kl = "actor/kl_loss" if name == "legacy" else "actor/reward_kl_penalty"
    assert steps[-1][kl] > 0.1


def test_fine_tuning_learns(results):
    losses = [step["train/loss"] for step in logged(results["sft"]["verl"])]
    assert losses[2] < losses[1] < losses[0] - 1
