"""RRHF against PPO on the demo's task: ``python benchmarks/bench_rrhf.py DEMO [--json FILE] [--seeds 0 1 2]``

DEMO is the folder of a finished demo, whose SFT and reward model both begin with. PPO trains as the demo does; RRHF in
rounds, each on answers that the model of the last one gives and the reward model ranks. The demo's gold judge reads
the answers of both to the held-out prompts; with ``--tune``, by which the numbers of RRHF were chosen, to training
prompts that neither then learns from. Each trains in a process of its own, which counts the bytes of its live tensors
and what the system holds for it. The figures are those of docs/rrhf.md.
"""

import argparse
import copy
import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

STATUS = Path("/proc/self/status")
#: What is freed leaves the process at once, so that it holds what it uses; nor does oneDNN keep the code of a thousand
#: products of different shapes, 100 to 200 MB beside models of 2 MB.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
ALLOCATOR |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}
NAMES = ("ppo", "rrhf")
MB = 2**20


class Task(NamedTuple):
    """What both learn on."""

    folder: Path
    config: Any  # the demo's
    tokenizer: Any
    prompts: list[Any]  # to draw from


def held(name: str) -> float:
    """``VmRSS``, what this process holds, or ``VmHWM``, the most that it ever held, in MB of 2**20 bytes."""
    return int(STATUS.read_text().split(f"{name}:")[1].split()[0]) / 1024


def arguments() -> argparse.Namespace:
    """What to compare, and the numbers of RRHF."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=256, help="of a round")
    parser.add_argument("--k", type=int, default=4, help="answers to a prompt")
    parser.add_argument("--epochs", type=int, default=1, help="of a round")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--sft-weight", type=float, default=1.0)
    parser.add_argument(
        "--micro-batch-size", type=int, help="responses per forward pass of both; the demo's minibatch if absent"
    )
    parser.add_argument("--write-batch-size", type=int, help="responses that RRHF writes at a time; PPO's if absent")
    parser.add_argument("--tune", action="store_true", help="judge on training prompts that are kept apart")
    parser.add_argument("--only", choices=NAMES)
    args = parser.parse_args()
    if not (args.demo / "run.json").is_file():
        parser.error(f"{args.demo} is no folder of a finished demo: it has no run.json")
    for name in ("threads", "rounds", "prompts", "k", "epochs", "micro_batch_size", "write_batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    return args


def ppo(args: argparse.Namespace, task: Task, model: Any, seed: int, live: Any, steps: int) -> tuple[Any, int]:
    """``steps`` steps of the demo's PPO; returns the policy and how many responses it learned from."""
    import rlhf_fast as rf

    c, reward = task.config, str(task.folder / "reward")
    asked = [{"prompt": p.text} for p in random.Random(seed + 17).choices(task.prompts, k=steps * c.ppo_batch_size)]
    numbers = rf.PPOConfig(
        steps=steps, batch_size=c.ppo_batch_size, minibatch_size=c.ppo_minibatch_size,
        micro_batch_size=args.micro_batch_size or c.ppo_minibatch_size,
        ppo_epochs=c.ppo_epochs, learning_rate=c.ppo_learning_rate, vf_coef=1.0,
        critic_learning_rate=c.critic_learning_rate, cliprange_value=1.0, kl_coef=c.kl_coef,
        max_new_tokens=c.max_new_tokens, seed=seed, quiet=True,
    )  # fmt: skip
    with live:
        trainer = rf.PPOTrainer(
            model, reward=reward, prompts=asked, tokenizer=task.tokenizer, config=numbers, critic=reward
        )
        update = trainer.update

        def marked(*given: Any) -> Any:
            live.mark("update")
            try:
                return update(*given)
            finally:
                live.mark("write")

        trainer.update = marked
        trainer.train()
    return trainer.policy, len(asked)


def rrhf(args: argparse.Namespace, task: Task, model: Any, seed: int, live: Any, rounds: int) -> tuple[Any, int]:
    """``rounds`` rounds of RRHF; returns the policy and how many answers it learned from."""
    import rlhf_fast as rf

    c, draw, count = task.config, random.Random(seed + 17), 0
    for turn in range(rounds):
        asked = [{"prompt": p.text} for p in draw.choices(task.prompts, k=args.prompts)]
        numbers = rf.RRHFConfig(
            epochs=args.epochs, batch_size=c.ppo_minibatch_size, learning_rate=args.learning_rate,
            micro_batch_size=args.micro_batch_size or c.ppo_minibatch_size, sft_weight=args.sft_weight,
            schedule="constant", max_length=c.max_new_tokens + 64, seed=turn, save_every=0, quiet=True,
        )  # fmt: skip
        with live:
            live.mark("write")
            ranked = rf.sample_and_rank(
                model, asked, str(task.folder / "reward"), k=args.k, tokenizer=task.tokenizer,
                max_new_tokens=c.max_new_tokens, seed=1000 * seed + turn,
                batch_size=args.write_batch_size or c.ppo_batch_size,
            )  # fmt: skip
            live.mark("update")
            rf.RRHFTrainer(model, data=ranked, tokenizer=task.tokenizer, config=numbers).train()
        count += sum(len(line["responses"]) for line in ranked)
    return model, count


def measure(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Train by ``name`` in this process and judge the policy."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch
    import torch.utils.tensorboard
    from tensor_memory import LiveBytes

    from rlhf_fast import models
    from rlhf_fast.demo.config import DemoConfig
    from rlhf_fast.demo.grammar import prompts

    torch.set_num_threads(args.threads)
    config = DemoConfig(**json.loads((args.demo / "run.json").read_text())["config"])
    sft, tokenizer = models.load_policy(str(args.demo / "sft")), models.load_tokenizer(str(args.demo / "sft"))
    pool, asked = prompts("train"), prompts("held_out")[: config.held_out_prompts]
    if args.tune:
        pool, asked = pool[: -config.held_out_prompts], pool[-config.held_out_prompts :]
    task = Task(args.demo, config, tokenizer, pool)
    train, length = {"ppo": (ppo, config.ppo_steps), "rrhf": (rrhf, args.rounds)}[name]
    small = argparse.Namespace(**vars(args) | {"prompts": config.ppo_batch_size})
    for warm in (ppo, rrhf):  # a step of each, so that neither pays for what any first step leaves behind
        warm(small, task, copy.deepcopy(sft), seed, LiveBytes("write"), 1)
    policy, live = copy.deepcopy(sft), LiveBytes("write")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, start = held("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the most held so far is what is held now
    policy, responses = train(args, task, policy, seed, live, length)
    found = {"resident_mb": held("VmHWM") - before, "before_mb": before, "seconds": time.perf_counter() - start}
    found |= {f"{phase}_mb": peak / MB for phase, peak in live.peaks.items()}
    found |= {"tensor_mb": max(live.peaks.values()) / MB, "responses": responses}
    return found | judge(task, sft, policy, asked)


def judge(task: Task, sft: Any, policy: Any, asked: list[Any]) -> dict[str, float]:
    """The demo's figures of ``policy``, with what it moved from ``sft`` and what grammar it lost."""
    from rlhf_fast.demo import evaluate, stages

    c = task.config
    first = evaluate.judge_answers(asked, stages.answer(sft, task.tokenizer, asked, c, c.seed + 19)).figures
    texts = stages.answer(policy, task.tokenizer, asked, c, c.seed + 23)
    found = evaluate.judge_answers(asked, texts).figures
    found["grammar_drop"] = first["grammar_share"] - found["grammar_share"]
    found["sequence_kl"] = evaluate.sequence_kl(policy, sft, task.tokenizer, asked, texts)
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The means of both over the seeds, RRHF's share of PPO's gold score and memory, and which goals hold."""
    from rlhf_fast.demo.evaluate import THRESHOLDS

    mean: dict[str, dict[str, float]] = {}
    for name in NAMES:
        mine = [row for row in rows if row["trainer"] == name]
        keys = [key for key in mine[0] if key not in ("trainer", "seed")]
        mean[name] = {key: sum(row[key] for row in mine) / len(mine) for key in keys}
    share = {key: mean["rrhf"][key] / mean["ppo"][key] for key in ("gold_score", "tensor_mb", "resident_mb")}
    goals = {"gold_score": share["gold_score"] >= 0.95, "tensor_mb": share["tensor_mb"] <= 0.6}
    for key in ("grammar_drop", "sequence_kl"):
        low, high, _ = THRESHOLDS[key]
        goals[key] = all(low <= row[key] <= high for row in rows if row["trainer"] == "rrhf")
    return {"mean": mean, "share": share, "goals": goals}


def main() -> None:
    """Measure both, print a table and what RRHF reaches of PPO."""
    args, rows = arguments(), []
    if args.only:
        print(json.dumps(measure(args, args.only, args.seeds[0])))
        return
    for seed in args.seeds:
        for name in NAMES:
            command = [sys.executable, *sys.argv, "--only", name, "--seeds", str(seed)]
            done = subprocess.run(command, env=os.environ | ALLOCATOR, stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"trainer": name, "seed": seed} | json.loads(done.stdout.splitlines()[-1]))
            print(" ".join(f"{key}={v:.3f}" if isinstance(v, float) else f"{key}={v}" for key, v in rows[-1].items()),
                  flush=True)  # fmt: skip
    found = summary(rows)
    share = found["share"]
    print(f"RRHF of PPO: gold score {share['gold_score']:.3f} (goal ≥ 0.95), live tensors {share['tensor_mb']:.3f} "
          f"(goal ≤ 0.6), resident {share['resident_mb']:.3f}")  # fmt: skip
    print("goals: " + ", ".join(f"{key} {'holds' if holds else 'FAILS'}" for key, holds in found["goals"].items()))
    if args.json:
        numbers = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        args.json.write_text(json.dumps({"config": numbers, "rows": rows, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
