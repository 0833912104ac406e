"""``evaluate``: one model, its rivals and its checkpoints on the same prompts."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_fast import columns, data
from rlhf_fast.dispatch import require
from rlhf_fast.evaluation import intervals
from rlhf_fast.evaluation.answers import Answers, answer, load, perplexity, score
from rlhf_fast.evaluation.config import EvaluateConfig
from rlhf_fast.evaluation.overlap import overlap
from rlhf_fast.evaluation.pages import show, write
from rlhf_fast.models import context_length
from rlhf_fast.records import DataError, Record
from rlhf_fast.rewards import load_reward
from rlhf_fast.trainers import checkpoint
from rlhf_fast.trainers.options import chosen
from rlhf_fast.trainers.run import check_folder, versions


def evaluate(
    model: Any,
    prompts: Any,
    *,
    baseline: Any = None,
    reward: Any = None,
    reference: Any = None,
    checkpoints: Any = None,
    tokenizer: Any = None,
    output_dir: str | Path | None = None,
    config: EvaluateConfig | None = None,
) -> dict[str, Any]:
    """Let ``model`` answer ``prompts`` and say how good, how long and how far from ``reference`` the answers are.

    Args:
        model: a path, a Hub id or a causal LM.
        prompts: a path, a list of dicts or a ``datasets.Dataset`` with the column ``prompt``. With ``response`` or
            ``references`` (a list of texts) in every record: BLEU, ROUGE, the perplexity of the first one and, with a
            reward, the win rate over it. Other columns reach the reward.
        baseline: another model that answers the same prompts; with a reward, the win rate over it.
        reward: a path or module with a scalar head, or ``callable(prompts, responses, **columns)`` → ``[B]``.
        reference: the model that the KL is taken from; the baseline if absent.
        checkpoints: the folder of a run or a list of models: reward against KL of each. Needs both.
        tokenizer: of the model, and of all that are modules.
        output_dir: a new folder for results.json, responses.jsonl and report.html; nothing is written without it.
        config: an ``EvaluateConfig``.

    Returns:
        What results.json holds: ``figures`` of ``model``, ``baseline`` and ``references``, ``win_rate`` over the last
        two, ``frontier``, ``notes`` (what could not be measured, a sentence each), ``prompts``, ``config``,
        ``versions``. An interval is ``name_low`` to ``name_high``, 95 %.

    Raises:
        ValueError: bad data, models that do not fit, or a folder that is not empty; it names the place.
    """
    require("transformers", "accelerate")
    check_folder(output_dir)
    config, later = chosen(config, EvaluateConfig), _checkpoints(checkpoints)
    if later and (reward is None or (reference is None and baseline is None)):
        raise ValueError("checkpoints need a reward, and a reference or baseline that the KL is taken from")
    contest = _Contest(data.read_records(prompts), config, tokenizer)
    policy, own = load(model, tokenizer)
    contest.begin(own, reward, next(policy.parameters()).device)
    rival = None if baseline is None else load(baseline, contest.tokenizer_of(baseline))
    frozen = rival if reference is None else load(reference, contest.tokenizer_of(reference))
    if frozen is not None and frozen[1].get_vocab() != own.get_vocab():
        if reference is not None or later:
            raise ValueError("the model and its reference have different vocabularies: there is no KL between them")
        contest.notes.append("no KL: model and baseline have different vocabularies")
        frozen = None
    answers = {"model": contest.judge("model", policy, own, frozen)}
    del policy
    if rival is not None:
        answers["baseline"] = contest.judge("baseline", *rival, None)
    contest.compare(answers)
    results = contest.results() | {"frontier": contest.frontier(later, frozen)}
    results |= {"config": dataclasses.asdict(config), "versions": versions()}
    if output_dir is not None:
        write(Path(output_dir), results, contest.examples, answers, config.samples)
    if not config.quiet:
        show(results, output_dir)
    return results


class _Contest:
    """The prompts, the reward and what was found so far."""

    def __init__(self, records: list[Record], config: EvaluateConfig, tokenizer: Any) -> None:
        self.records, self.config, self.given = records, config, tokenizer
        self.figures: dict[str, dict[str, float]] = {}
        self.rates: dict[str, dict[str, float]] = {}
        self.notes: list[str] = []
        self.reward: Callable[..., Any] | None = None

    def begin(self, tokenizer: Any, reward: Any, device: torch.device) -> None:
        """Read prompts and references with the model's tokenizer and load the reward."""
        self.own, self.examples = tokenizer, data.prompt_examples(self.records, tokenizer)
        self.references = _references(self.records, tokenizer)
        self.reward = None if reward is None else load_reward(reward, tokenizer, device=device)

    def tokenizer_of(self, source: Any) -> Any:
        """What to read a rival with: its own, if it is no module."""
        return (self.given or self.own) if isinstance(source, nn.Module) else None

    def judge(self, name: str, model: Any, tokenizer: Any, frozen: tuple[Any, Any] | None) -> Answers:
        """The answers of ``model``; their figures are kept under ``name``."""
        examples = data.prompt_examples(self.records, tokenizer)
        found = answer(model, examples, tokenizer, self.config, reference=frozen[0] if frozen else None)
        if self.reward is not None:
            found.scores = score(self.reward, self.examples, found.texts)
        self.figures[name] = found.figures()
        if self.references:
            both = zip(examples, self.references, strict=True)
            kept = [Record({"prompt": e.prompt, "response": texts[0]}, e.place) for e, texts in both]
            shown = data.sft_examples(kept, tokenizer, max_length=context_length(model))
            self.figures[name]["perplexity"] = perplexity(model, tokenizer, shown, self.config.batch_size)
            figures, notes = overlap(found.texts, self.references)
            self.figures[name] |= figures
            self.notes += [note for note in notes if note not in self.notes]
        return found

    def compare(self, answers: dict[str, Answers]) -> None:
        """Win rates of the model over the baseline and over the first references."""
        ours = answers["model"].scores
        if self.reward is None or ours is None:
            return
        rivals = {"baseline": answers["baseline"].scores} if "baseline" in answers else {}
        if self.references:
            rivals["references"] = theirs = score(self.reward, self.examples, [texts[0] for texts in self.references])
            named = zip(("reward", "reward_low", "reward_high"), intervals.mean(theirs), strict=True)
            self.figures["references"] = dict(named)
        for name, theirs in rivals.items():
            share, low, high = intervals.win_rate(ours, theirs)
            ties = float((ours == theirs).double().mean())
            self.rates[name] = {"share": share, "low": low, "high": high, "ties": ties}

    def frontier(self, later: dict[str, Any], frozen: tuple[Any, Any] | None) -> list[dict[str, Any]]:
        """Reward and KL of each checkpoint; ``best`` where no other has more reward at no more KL."""
        rows: list[dict[str, Any]] = []
        for name, source in later.items():
            self.judge(name, *load(source, self.tokenizer_of(source)), frozen)
            rows.append({"checkpoint": name, **self.figures.pop(name)})
        for row in rows:
            beaten = (o["reward"] >= row["reward"] and o["kl"] <= row["kl"] for o in rows if o != row)
            row["best"] = not any(beaten)
        return rows

    def results(self) -> dict[str, Any]:
        """What was found, as results.json holds it."""
        return {"prompts": len(self.records), "figures": self.figures, "win_rate": self.rates, "notes": self.notes}


def _checkpoints(source: Any) -> dict[str, Any]:
    """Name → model of ``source``: the checkpoints of a run, or a list of models."""
    if source is None:
        return {}
    if isinstance(source, (str, Path)):
        folder = Path(source) / "checkpoints"
        found = [path for path in folder.glob("step-*") if path.suffix == "" and checkpoint.is_whole(path)]
        if not found:
            raise ValueError(f"{source}: no run with checkpoints (checkpoints/step-N)")
        return {path.name: str(path) for path in sorted(found, key=lambda path: int(path.name.removeprefix("step-")))}
    names = [Path(s).name if isinstance(s, (str, Path)) else f"model {i}" for i, s in enumerate(source, 1)]
    alike = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]
    return dict(zip(alike, source, strict=True))


def _references(records: list[Record], tokenizer: Any) -> list[list[str]]:
    """The texts that each answer is compared with; none at all where no record has any."""
    name = next((n for n in ("references", "response") if any(n in record for record in records)), None)
    if name is None:
        return []
    found = []
    for record in records:
        if name == "response":
            found.append([columns.answer_text(record, name, columns.prompt_text(record, tokenizer), tokenizer)])
            continue
        texts = record.get(name)
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise DataError(f'{record.place}: "references" must be a list of one or more texts')
        found.append(texts)
    return found
