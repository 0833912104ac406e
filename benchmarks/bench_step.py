"""One PPO step of the demo, of this source tree and another: ``python benchmarks/bench_step.py DEMO --against TREE``

DEMO is the folder of a finished demo, whose SFT and reward model both begin with; TREE the root of a checkout whose
``_cpu`` is built. Each step is taken in a process per tree, which take turns step by step, so that what else the
machine does befalls both. The figures are medians over the steps; ``--profile`` adds what PyTorch's profiler says of
the last one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PHASES = ("write", "read", "score", "update", "step")


def arguments() -> argparse.Namespace:
    """Which trees to compare, and how."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--against", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def trainer(args: argparse.Namespace):
    """The trainer of the demo, as the demo of this tree makes it, with the models of ``args.demo``."""
    import rlhf_fast as rf
    from rlhf_fast.demo import stages
    from rlhf_fast.demo.config import DemoConfig

    made = []

    class Kept(rf.PPOTrainer):
        def train(self, **_: object) -> dict:
            made.append(self)
            return {}

        def __init__(self, model: str, **options: object) -> None:
            reward = str(args.demo / "reward")
            known = {"prompts": str(args.demo / "data/prompts.jsonl"), "reward": reward, "critic": reward}
            super().__init__(str(args.demo / "sft"), **{**options, **known, "output_dir": None})

    stages.PPOTrainer, stages.write_lines = Kept, lambda path, records: str(path)
    stages.optimise(DemoConfig(quiet=True), args.demo)
    made[0].reward = made[0].reward.reward  # without the gold judge's notes
    return made[0]


def clocked(holder: object, name: str, spent: dict[str, float], phase: str) -> None:
    """Add the seconds of each call of ``holder.name`` to ``spent[phase]``."""
    inner = getattr(holder, name)

    def timed(*given: object, **named: object) -> object:
        start = time.perf_counter()
        try:
            return inner(*given, **named)
        finally:
            spent[phase] = spent.get(phase, 0.0) + time.perf_counter() - start

    setattr(holder, name, timed)


def work(args: argparse.Namespace) -> None:
    """Take a step for every line of input, and answer with its seconds as a line of JSON."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch

    import rlhf_fast
    from rlhf_fast.trainers import ppo

    assert Path(rlhf_fast.__file__).is_relative_to(args.worker), rlhf_fast.__file__
    torch.set_num_threads(args.threads)
    learner, spent = trainer(args), {}
    writer = ppo if hasattr(ppo, "decode") else ppo.online
    clocked(writer, "decode" if writer is ppo else "write", spent, "write")
    for name, phase in (("rollout", "read"), ("score", "score"), ("update", "update"), ("step", "step")):
        clocked(learner, name, spent, phase)
    batches = learner.batches()
    for line in sys.stdin:
        spent.clear()
        if line.strip() == "profile":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                stats = learner.step(next(batches))
            table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15)
        else:
            stats, table = learner.step(next(batches)), ""
        spent["read"] -= spent["write"]
        print(json.dumps({**spent, "scores": stats["scores"], "profile": table}), flush=True)


def main() -> None:
    """Let both trees take turns and print their medians and ratios."""
    args = arguments()
    if args.worker:
        work(args)
        return
    trees = {"this": ROOT, "other": args.against.resolve()}
    workers = {}
    for name, tree in trees.items():
        environment = os.environ | {"PYTHONPATH": str(tree)}
        command = [sys.executable, *sys.argv, "--worker", json.dumps(str(tree))]
        workers[name] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # fmt: skip
    taken: dict[str, list[dict]] = {name: [] for name in trees}
    for step in range(args.steps + 2 + args.profile):
        for name, worker in workers.items():
            worker.stdin.write("profile\n" if step >= args.steps + 2 else "step\n")
            worker.stdin.flush()
            taken[name].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    timed = {name: steps[2 : args.steps + 2] for name, steps in taken.items()}  # the first two warm up
    median = {name: {p: statistics.median(s[p] for s in steps) for p in PHASES} for name, steps in timed.items()}
    ratios = {p: statistics.median(b[p] / a[p] for a, b in zip(*timed.values(), strict=True)) for p in PHASES}
    for p in PHASES:
        print(f"{p:8} {median['this'][p]:8.3f} s, other {median['other'][p]:8.3f} s: {ratios[p]:.2f} times as fast")
    if args.profile:
        for name, steps in taken.items():
            print(f"{name}:\n{steps[-1]['profile']}")
    if args.json:
        result = {"threads": args.threads, "median": median, "ratios": ratios, "steps": timed}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
