"""Runs that are killed and taken up again, each in a process of its own; started by test_resume.py with a folder.

Every process is forked from this one, which has imported all that they need, so that one start is paid for.
"""

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

import torch.utils.tensorboard  # noqa: E402
from tiny import tiny_gpt2, tiny_tokenizer  # noqa: E402

import rlhf_fast as rf  # noqa: E402
from rlhf_fast.trainers import checkpoint  # noqa: E402

TOKENIZER = tiny_tokenizer()
DEMOS = [{"prompt": "the movie", "response": f" was {w}"} for w in ("good", "bad", "great", "awful", "not good")]
PAIRS = [{"prompt": f"the {w}", "chosen": " was good", "rejected": " was awful"} for w in ("movie", "plot", "Bot")]
RANKED = [
    {"prompt": f"the {w}", "responses": [" was good", " awful", " was not bad"][:k], "scores": [1.0, 0.5, 2.0][:k]}
    for w, k in (("movie", 3), ("plot", 2), ("Bot", 3), ("good", 1))
]
STEPS = [{"prompt": f"the {w}", "steps": [" was", " good"], "labels": [None, i % 2]} for i, w in enumerate("abc")]
PROMPTS = [{"prompt": f"the {w} was"} for w in ("movie", "plot", "bad", "good", "dull")]


def noisy_reward(prompts, responses):
    """Draws from every global generator: they too must be where they were."""
    return [len(r) / 10 + random.random() + np.random.rand() + torch.rand(()).item() for r in responses]


def make(kind: str, folder: Path):
    """A trainer of six steps with a checkpoint every third."""
    common = {"output_dir": folder, "tokenizer": TOKENIZER}
    numbers = {"save_every": 3, "quiet": True, "batch_size": 2, "learning_rate": 1e-3}
    if kind.startswith("sft"):
        config = rf.SFTConfig(epochs=2, packing=kind == "sft packed", **numbers)
        return rf.SFTTrainer(tiny_gpt2(), data=DEMOS, config=config, **common)
    if kind == "reward":
        return rf.RewardTrainer(tiny_gpt2(), data=PAIRS, config=rf.RewardConfig(epochs=3, **numbers), **common)
    if kind.startswith("distill"):
        given = {"data": DEMOS} if kind == "distill" else {"prompts": PROMPTS}
        config = rf.DistillConfig(epochs=2, steps=6, max_new_tokens=6, **numbers)
        teacher = tiny_gpt2(seed=1)
        return rf.DistillTrainer(tiny_gpt2(), teacher=teacher, reward=noisy_reward, config=config, **given, **common)
    if kind.startswith("dpo"):
        config = rf.DPOConfig(epochs=3, precompute_reference=kind == "dpo known", **numbers)
        return rf.DPOTrainer(tiny_gpt2(), data=PAIRS, config=config, **common)
    if kind == "rrhf":
        return rf.RRHFTrainer(tiny_gpt2(), data=RANKED, config=rf.RRHFConfig(epochs=3, **numbers), **common)
    if kind == "process":
        config = rf.RewardConfig(epochs=3, normalise=True, eval_every=1, **numbers)
        return rf.RewardTrainer(tiny_gpt2(), data=STEPS, eval_data=STEPS, config=config, **common)
    if kind == "grpo":
        numbers |= {"share": "hydra:1", "packing": True, "gradient_checkpointing": True, "precision": "bf16"}
        config = rf.GRPOConfig(steps=6, group_size=2, max_new_tokens=6, kl_coef=0.1, scale_scores="std", **numbers)
        return rf.GRPOTrainer(tiny_gpt2(), reward=noisy_reward, prompts=PROMPTS, config=config, **common)
    config = rf.PPOConfig(
        steps=6, minibatch_size=1, ppo_epochs=2, max_new_tokens=6, kl_target=0.1, kl_horizon=20.0, **numbers
    )
    return rf.PPOTrainer(tiny_gpt2(), reward=noisy_reward, prompts=PROMPTS, config=config, **common)


def die(*_args, **_options):
    """What no handler and no finally survives."""
    os.kill(os.getpid(), signal.SIGKILL)


def train(kind: str, folder: Path, moment: str) -> None:
    """Train to the end, or until the ``moment`` at which this process dies."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(moment == "resume")  # a resumed run must not live on the generators that it finds
    trainer = make(kind, folder)
    if moment == "step":  # the fifth: its checkpoint is that after the third, and figures were written since
        step = trainer.step
        trainer.step = lambda batch: die() if trainer.done == 4 else step(batch)
    seal = checkpoint.seal
    if moment == "during save":  # the second one: the first is what is left to go on from
        checkpoint.seal = lambda path: die() if path.name.startswith("step-6") else seal(path)
    elif moment == "after save":
        checkpoint.seal = lambda path: (seal(path), os.replace(path, path.with_suffix("")), die())
    trainer.train(resume=moment == "resume")
    state = folder / "state"
    state.mkdir()
    trainer.save(state)


def forked(*task) -> int:
    """Run ``train(*task)`` in a process of its own; returns its status."""
    child = os.fork()
    if child == 0:
        try:
            train(*task)
        except BaseException as error:
            print(task, repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    root = Path(sys.argv[1])
    make("ppo", None)  # transformers imports its parts when they are first used
    for kind in sys.argv[2:]:
        print(kind, "whole", forked(kind, root / f"{kind} whole", "never"))
        for moment in ("step", "during save", "after save"):
            folder = root / f"{kind} {moment}"
            print(kind, moment, forked(kind, folder, moment), forked(kind, folder, "resume"))
