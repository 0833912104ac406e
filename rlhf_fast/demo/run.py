"""The demo from start to report."""

import contextlib
import dataclasses
import json
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rlhf_fast import dispatch, models
from rlhf_fast.demo import evaluate, stages
from rlhf_fast.demo.config import DemoConfig
from rlhf_fast.demo.grammar import count, prompts
from rlhf_fast.report import Curve, Sample, Table, read_lines, series, write_report
from rlhf_fast.trainers.run import RECORD, check_folder, versions

SHOWN = 6  # held-out prompts in the report, the first ones


def run_demo(config: DemoConfig | None = None) -> dict[str, Any]:
    """SFT, reward model and PPO on made-up reviews, judged by a gold judge; returns what ``results.json`` holds.

    Writes into ``config.output_dir``: ``data/`` (what the trainers read), ``sft/``, ``reward/``, ``ppo/``,
    ``results.json`` and ``report.html``. Raises ``ValueError`` if that folder holds another run.
    """
    config = config or DemoConfig()
    folder = Path(config.output_dir)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"trainer": "demo", "config": dataclasses.asdict(config), "versions": versions()}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    with _settings(config):
        results, samples = _run(config, folder)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    report = _report(folder, results, samples)
    if not config.quiet:
        _print(results, samples, report)
    return results


def _run(config: DemoConfig, folder: Path) -> tuple[dict[str, Any], list[Sample]]:
    clock = _Clock(config.quiet)
    with clock.stage(
        "sft", f"1/3 SFT on {config.sft_steps * config.sft_batch_size:,} reviews out of {_power(count())}"
    ):
        stages.finetune(config, folder)
    tokenizer = models.load_tokenizer(str(folder / "sft"))
    sft = _load(folder / "sft")
    with clock.stage("reward", f"2/3 reward model on {config.pairs:,} pairs, labelled with noise"):
        reward = stages.learn_reward(config, folder, sft, tokenizer)
    precision = stages.ppo_precision(config)
    with clock.stage("ppo", f"3/3 PPO against the reward model, {config.ppo_steps} steps in {precision}"):
        stages.optimise(config, folder)
    asked = prompts("held_out")[: config.held_out_prompts]
    with clock.stage("evaluate", f"the gold judge reads the answers to {len(asked)} held-out prompts"):
        judged = evaluate.compare_models(config, sft, _load(folder / "ppo"), tokenizer, asked)
    figures = judged["figures"] | evaluate.reward_figures(reward)
    held = evaluate.verdicts(figures)
    results = {
        "passed": all(held.values()),
        "figures": figures,
        "thresholds": {
            name: {"low": low, "high": high, "holds": held[name]}
            for name, (low, high, _) in evaluate.THRESHOLDS.items()
        },
        "counts": {
            "distinct_reviews": count(), "parameters": sum(p.numel() for p in sft.parameters()),
            "vocabulary": len(tokenizer), "held_out_prompts": len(asked),
            "pairs": reward["pairs"], "held_out_pairs": reward["held_out_pairs"],
        },
        "label_agreement": reward["label_agreement"],
        "seconds": clock.seconds | {"total": sum(clock.seconds.values())},
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3),
        "environment": environment() | {"ppo_precision": precision},
    }  # fmt: skip
    samples = [
        Sample(
            prompt.text,
            {name.upper(): (judged[name].texts[i], float(judged[name].scores[i])) for name in ("sft", "ppo")},
        )
        for i, prompt in enumerate(asked[:SHOWN])
    ]
    return results, samples


def _load(folder: Path) -> Any:
    """The policy in ``folder``, on the device that the trainers use."""
    from accelerate import PartialState

    return models.load_policy(str(folder)).to(PartialState().device)


class _Clock:
    """Seconds of each stage, announced on the terminal."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, sentence: str) -> Iterator[None]:
        if not self.quiet:
            print(sentence, flush=True)
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 2)


@contextlib.contextmanager
def _settings(config: DemoConfig) -> Iterator[None]:
    """The threads of the config and no progress bars for files of a megabyte; both are put back."""
    from transformers.utils import logging

    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(min(config.threads, threads))
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()


def environment() -> dict[str, Any]:
    """Processor, threads, versions and which implementation served the ops."""
    from accelerate import PartialState

    device = "CUDA" if PartialState().device.type == "cuda" else "CPU"
    ops = [name for name in dispatch.IMPLEMENTATIONS if not name.endswith("_backward")]
    return {
        "processor": torch.cuda.get_device_name() if device == "CUDA" else _processor(),
        "threads": torch.get_num_threads(),
        **versions(),
        "ops": {name: dispatch.serving(name, device) for name in ops},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _power(number: int) -> str:
    """4548230444482560 as 4.5 × 10¹⁵."""
    digits, exponent = f"{number:.1e}".split("e+")
    return f"{digits} × 10{str(int(exponent)).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def _rows(results: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    figures, rows = results["figures"], []
    for name, (low, high, sentence) in evaluate.THRESHOLDS.items():
        value = f"{figures[name]:.3f}"
        if f"{name}_low" in figures:
            value += f"  [{figures[f'{name}_low']:.3f}, {figures[f'{name}_high']:.3f}]"
        goal = {
            "sequence_kl": f"≤\u00a0{high:g}",
            "grammar_drop": "<\u00a00.10",
            "sft_positive_share": f"{low:.2f}–{high:.2f}",
        }
        rows.append((sentence, value, goal.get(name, f"≥\u00a0{low:.2f}"), results["thresholds"][name]["holds"]))
    return rows


def _more_rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    figures = results["figures"]
    names = {
        "positive_share": "gold-positive share", "gold_score": "mean gold score",
        "grammar_share": "share the grammar accepts", "distinct_share": "share of different responses",
        "words": "words per response",
    }  # fmt: skip
    return [(what, f"{figures[f'sft_{n}']:.3f}", f"{figures[f'ppo_{n}']:.3f}") for n, what in names.items()]


def _line(results: dict[str, Any]) -> str:
    e, s = results["environment"], results["seconds"]
    stages_line = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in s.items())
    served = ", ".join(f"{op} {by}" for op, by in e["ops"].items())
    return (
        f"{e['processor']}, {e['threads']} threads, torch {e['torch']}, transformers {e['transformers']}. "
        f"{stages_line}. PPO in {e['ppo_precision']}. Peak memory {results['peak_memory_gb']:.2f} GB. Ops: {served}."
    )


def _report(folder: Path, results: dict[str, Any], samples: list[Sample]) -> Path:
    sft, reward, ppo, gold = (
        read_lines(folder / name)
        for name in ("sft/metrics.jsonl", "reward/metrics.jsonl", "ppo/metrics.jsonl", "ppo/gold.jsonl")
    )
    n = results["counts"]
    note = (
        "Gold-positive: the gold judge's score is above 0. The win rate compares the two models' answers to the same "
        f"prompt. The reward model is tested on {n['held_out_pairs']} pairs labelled by the gold score without noise, "
        "ties left out. In brackets: 95 % Wilson intervals."
    )
    summary = (
        f"A GPT-2 of {n['parameters']:,} parameters learned to write reviews (SFT). From {n['pairs']:,} pairs of its "
        "reviews a reward model learned which of the two an annotator prefers; the annotators toss a coin weighted by "
        f"the gold scores and side with the better review in {results['label_agreement']:.0%} of the pairs. PPO then "
        "optimised the reward model. Nothing ever learned from the gold score itself, a lexicon of opinions: it judges "
        f"the answers to {n['held_out_prompts']} prompts that no stage has seen. The grammar behind the reviews holds "
        f"{_power(n['distinct_reviews'])} different ones."
    )
    curves = [
        Curve("Reward model's score", {"score": series(ppo, "scores")}, "PPO step", "what PPO climbs"),
        Curve("Gold score", {"gold score": series(gold, "gold_score")}, "PPO step", "what nobody optimises"),
        Curve("KL from the SFT model", {"kl": series(ppo, "kl")}, "PPO step", "nats per response"),
        Curve("Entropy", {"entropy": series(ppo, "entropy")}, "PPO step", "nats per token"),
        Curve("Clip fraction", {"clipfrac": series(ppo, "clipfrac")}, "PPO step", "tokens whose ratio was clipped"),
        Curve("Response length", {"length": series(ppo, "response_length")}, "PPO step", "tokens"),
        Curve("SFT loss", {"loss": series(sft, "loss")}, "SFT step", "nats per response token"),
        Curve("Reward model's loss", {"loss": series(reward, "loss")}, "reward step", "nats per pair"),
    ]
    tables = [
        Table("Figures", ("figure", "value", "goal", ""), _rows(results), note),
        Table("Before and after", ("", "SFT", "PPO"), _more_rows(results)),
    ]
    return write_report(
        folder, title="RLHF on made-up reviews", summary=summary, tables=tables, curves=curves, samples=samples,
        environment=_line(results),
    )  # fmt: skip


def _print(results: dict[str, Any], samples: list[Sample], report: Path) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(markup=False, highlight=False)
    table = RichTable("figure", "value [95 % interval]", "goal", "", title="The gold judge's verdict")
    for sentence, value, goal, holds in _rows(results):
        table.add_row(sentence, value, goal, "✓" if holds else "✗")
    console.print(table)
    table = RichTable("", "SFT", "PPO")
    for row in _more_rows(results):
        table.add_row(*row)
    console.print(table)
    for sample in samples[:2]:
        console.print(sample.prompt)
        for name, (text, score) in sample.answers.items():
            console.print(f"  {name} ({score:+.0f}):{text}")
    console.print(_line(results))
    console.print(f"report: {report}")
