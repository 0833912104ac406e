"""RRHF against PPO on the demo's task: ``python benchmarks/bench_rrhf.py DEMO [--json FILE] [--seeds 0 1 2]``

DEMO is the folder of a finished demo, whose SFT and reward model both begin with. PPO trains as the demo does; RRHF in
rounds, each on answers that the model of the last one gives and the reward model ranks. The demo's gold judge reads
the answers of both to the held-out prompts. Each trains in a process of its own; memory is the most that it holds
beyond what the imports and one forward pass took. The figures are those of docs/rrhf.md.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

STATUS = Path("/proc/self/status")
#: What is freed leaves the process at once, so that it holds what it uses; nor does oneDNN keep the code of a thousand
#: products of different shapes, 100 to 200 MB beside models of 2 MB.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
ALLOCATOR |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}


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
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=128, help="of a round")
    parser.add_argument("--k", type=int, default=4, help="answers to a prompt")
    parser.add_argument("--epochs", type=int, default=2, help="of a round")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--sft-weight", type=float, default=1.0)
    parser.add_argument("--only", choices=("ppo", "rrhf"))
    return parser.parse_args()


def ppo(args: argparse.Namespace, config, sft, tokenizer, seed: int):
    """The demo's PPO; returns the policy and how many responses it learned from."""
    import rlhf_fast as rf
    from rlhf_fast.demo.grammar import prompts

    reward, count = str(args.demo / "reward"), config.ppo_steps * config.ppo_batch_size
    asked = [{"prompt": p.text} for p in random.Random(seed + 17).choices(prompts("train"), k=count)]
    numbers = rf.PPOConfig(
        steps=config.ppo_steps, batch_size=config.ppo_batch_size, minibatch_size=config.ppo_minibatch_size,
        ppo_epochs=config.ppo_epochs, learning_rate=config.ppo_learning_rate, vf_coef=1.0,
        critic_learning_rate=config.critic_learning_rate, cliprange_value=1.0, kl_coef=config.kl_coef,
        max_new_tokens=config.max_new_tokens, seed=seed, quiet=True,
    )  # fmt: skip
    trainer = rf.PPOTrainer(sft, reward=reward, prompts=asked, tokenizer=tokenizer, config=numbers, critic=reward)
    trainer.train()
    return trainer.policy, count


def rrhf(args: argparse.Namespace, config, sft, tokenizer, seed: int):
    """RRHF in rounds, 16 responses per forward pass as in PPO; returns the policy and how many responses it saw."""
    import rlhf_fast as rf
    from rlhf_fast.demo.grammar import prompts

    draw, policy, count = random.Random(seed + 17), sft, 0
    for turn in range(args.rounds):
        asked = [{"prompt": p.text} for p in draw.choices(prompts("train"), k=args.prompts)]
        ranked = rf.sample_and_rank(
            policy, asked, str(args.demo / "reward"), k=args.k, tokenizer=tokenizer,
            max_new_tokens=config.max_new_tokens, seed=1000 * seed + turn, batch_size=config.ppo_batch_size,
        )  # fmt: skip
        numbers = rf.RRHFConfig(
            epochs=args.epochs, batch_size=config.ppo_minibatch_size, micro_batch_size=config.ppo_minibatch_size,
            learning_rate=args.learning_rate, sft_weight=args.sft_weight, schedule="constant",
            max_length=config.max_new_tokens + 64, seed=turn, save_every=0, quiet=True,
        )  # fmt: skip
        trainer = rf.RRHFTrainer(policy, data=ranked, tokenizer=tokenizer, config=numbers)
        trainer.train()
        policy, count = trainer.model, count + sum(len(line["responses"]) for line in ranked)
    return policy, count


def measure(args: argparse.Namespace, name: str, seed: int) -> dict:
    """Train by ``name`` in this process and judge the policy."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch
    import torch.utils.tensorboard

    import rlhf_fast as rf
    from rlhf_fast import models
    from rlhf_fast.demo import evaluate, stages
    from rlhf_fast.demo.config import DemoConfig
    from rlhf_fast.demo.grammar import prompts

    torch.set_num_threads(args.threads)
    config = DemoConfig(**json.loads((args.demo / "run.json").read_text())["config"])
    sft, tokenizer = models.load_policy(str(args.demo / "sft")), models.load_tokenizer(str(args.demo / "sft"))
    reference, asked = models.frozen_copy(sft), prompts("held_out")[: config.held_out_prompts]
    rf.RRHFTrainer(sft, data=[{"prompt": "a", "responses": ["b", "c"], "scores": [0, 1]}], tokenizer=tokenizer)
    rf.generate(sft, ["a"], tokenizer=tokenizer, max_new_tokens=2, seed=0)
    before, start = held("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the most held so far is what is held now
    policy, responses = {"ppo": ppo, "rrhf": rrhf}[name](args, config, sft, tokenizer, seed)
    peak, seconds = held("VmHWM") - before, time.perf_counter() - start
    texts = stages.answer(policy, tokenizer, asked, config, config.seed + 23)
    found = evaluate.judge_answers(asked, texts).figures
    found["sequence_kl"] = evaluate.sequence_kl(policy, reference, tokenizer, asked, texts)
    return found | {"peak_mb": peak, "import_mb": before, "seconds": seconds, "responses": responses}


def main() -> None:
    """Measure both, print a table and what RRHF reaches of PPO."""
    args, rows = arguments(), []
    if args.only:
        print(json.dumps(measure(args, args.only, args.seeds[0])))
        return
    for seed in args.seeds:
        for name in ("ppo", "rrhf"):
            command = [sys.executable, *sys.argv, "--only", name, "--seeds", str(seed)]
            done = subprocess.run(command, env=os.environ | ALLOCATOR, stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"trainer": name, "seed": seed} | json.loads(done.stdout.splitlines()[-1]))
            print(" ".join(f"{key}={v:.3f}" if isinstance(v, float) else f"{key}={v}" for key, v in rows[-1].items()),
                  flush=True)  # fmt: skip
    mean = {
        name: {key: sum(r[key] for r in rows if r["trainer"] == name) / len(args.seeds) for key in rows[0]
               if key not in ("trainer", "seed")}
        for name in ("ppo", "rrhf")
    }  # fmt: skip
    score, memory = (mean["rrhf"][key] / mean["ppo"][key] for key in ("gold_score", "peak_mb"))
    print(f"RRHF: {score:.3f} of PPO's gold score (goal ≥ 0.95), {memory:.3f} of its memory (goal ≤ 0.6)")
    if args.json:
        numbers = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        result = {"config": numbers, "rows": rows, "mean": mean, "gold_score": score, "memory": memory}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
