"""One step of PPO and of GRPO against TRL's and TRL's patched, from the same random weights and prompts, by phase.

``python benchmarks/bench_trainers.py [ppo|grpo ...]`` in an environment that has both (docs/trainers-benchmark.md).
Each side is a process of its own, so that its peak of memory is its own; they take turns, a step each, and one waits
while the other runs. Printed are medians of the steps after the first, their ratios, and how far the memory of a
process rose beyond what it held before the models were built and the models themselves.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from trainer_sides import PHASES, Turns, ours, theirs

SIDES = ("ours", "TRL", "patched")
TRL_VERSION = "1.10.0"


class Worker:
    """A side, in a process of its own."""

    def __init__(self, side: str, algorithm: str, flags: list[str]) -> None:
        command = [sys.executable, __file__, algorithm, "--side", side, *flags]
        variables = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads would fill)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True,
            env=os.environ | variables,
        )  # fmt: skip

    def step(self) -> dict[str, float]:
        """What one step took; raises ``RuntimeError`` with the last words of a worker that ended."""
        try:
            print("step", file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.said.seek(0)
            raise RuntimeError(f"a worker ended:\n{self.said.read()[-3000:]}")
        return json.loads(line)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(algorithm: str, args: argparse.Namespace, flags: list[str]) -> dict:
    """Steps of the sides in turn; the first of each, in which caches are filled, is not counted."""
    workers = {side: Worker(side, algorithm, flags) for side in SIDES}
    steps: dict[str, list[dict]] = {side: [] for side in SIDES}
    try:
        for turn in range(args.rounds + 1):
            for side in SIDES[:: 1 if turn % 2 else -1]:
                steps[side].append(workers[side].step())
    finally:
        for worker in workers.values():
            worker.end()
    medians = {
        side: {name: statistics.median(step[name] for step in taken[1:]) for name in (*PHASES, "step", "cpu")}
        | {"MiB": taken[-1]["MiB"]}
        for side, taken in steps.items()
    }
    return medians | {"steps": steps}


def show(algorithm: str, found: dict) -> None:
    """A table: each phase of the sides in seconds, and how many times ours, and the patched TRL's, TRL takes."""
    print(f"\n{algorithm}: one step, medians of {len(found['steps']['ours']) - 1} each, in turn")
    print(f"{'':12}" + "".join(f"{side:>10}" for side in SIDES) + f"{'TRL / ours':>12}{'TRL / patched':>15}")
    for name in (*PHASES, "step", "cpu", "MiB"):
        mine, other, patched = taken = [found[side][name] for side in SIDES]
        ratios = f"{other / mine:12.2f}{other / patched:15.2f}" if min(taken) > 1e-3 else ""
        print(f"{name + (' s' if name != 'MiB' else ''):12}" + "".join(f"{x:10.3f}" for x in taken) + ratios)


#: What is measured, by default the case of the docs; a model of another size, other prompts, other batches.
SIZES = {
    "layers": 4, "width": 128, "vocab": 50257, "prompts": 32, "prompt_tokens": 16, "new_tokens": 48, "epochs": 4,
    "micro": 8, "group": 8, "rollout": 0, "threads": 0,
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("algorithm", nargs="*", default=["ppo", "grpo"], help="ppo, grpo or both")
    parser.add_argument("--rounds", type=int, default=5, help="steps that count, of each side")
    parser.add_argument("--out", help="a .json file for every step")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"[{size}]")
    args = parser.parse_args()
    if unknown := set(args.algorithm) - {"ppo", "grpo"}:
        parser.error(f"unknown algorithm {min(unknown)!r}: there are ppo and grpo")
    for name, size in SIZES.items():
        if getattr(args, name) < (size > 0):
            parser.error(f"--{name} must be at least {int(size > 0)}, got {getattr(args, name)}")
    if args.prompts % args.micro or ("grpo" in args.algorithm and args.prompts % args.group):
        parser.error("--prompts must be a multiple of --micro, and with grpo of --group")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    return args


def main() -> int:
    args = arguments()
    if args.side:
        import torch

        torch.set_num_threads(args.threads or torch.get_num_threads())
        args.algorithm = args.algorithm[0]
        args.epochs = args.epochs if args.algorithm == "ppo" else 1  # as the TRL side takes it
        (ours if args.side == "ours" else theirs)(args, Turns())
        return 0
    for package in ("trl", "rlhf-fast"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            print(f"bench_trainers: {package} is not installed: docs/trainers-benchmark.md says how", file=sys.stderr)
            return 2
        if package == "trl" and version != TRL_VERSION:
            print(f"note: this is TRL {version}; the benchmark was written against {TRL_VERSION}")
    flags = [word for name in SIZES for word in (f"--{name}", str(getattr(args, name)))]
    found = {}
    for algorithm in args.algorithm:
        found[algorithm] = compare(algorithm, args, flags)
        show(algorithm, found[algorithm])
    if args.out:
        sizes = {name: getattr(args, name) for name in SIZES}
        Path(args.out).write_text(json.dumps({"sizes": sizes} | found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
