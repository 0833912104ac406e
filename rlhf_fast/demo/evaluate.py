"""What the gold judge and the grammar say about two models, on prompts that neither has seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_fast import data, models, ops
from rlhf_fast.demo.config import DemoConfig
from rlhf_fast.demo.grammar import Prompt, accepts
from rlhf_fast.demo.judge import gold_scores
from rlhf_fast.demo.stages import answer
from rlhf_fast.evaluation.intervals import wilson, win_rate

#: Figure → the least and the most that it may be, and what it says.
THRESHOLDS = {
    "sft_positive_share": (0.35, 0.65, "gold-positive share after SFT"),
    "ppo_positive_share": (0.90, 1.0, "gold-positive share after PPO"),
    "win_rate": (0.80, 1.0, "win rate of PPO over SFT, ties half"),
    "reward_accuracy": (0.85, 1.0, "reward model's accuracy"),
    "sequence_kl": (0.0, 20.0, "KL of PPO from SFT, nats a response"),
    "grammar_drop": (-1.0, 0.0999, "grammar acceptance lost by PPO"),
}


@dataclass(frozen=True)
class Answers:
    """A model's responses to the held-out prompts and what they are worth."""

    texts: list[str]
    scores: torch.Tensor  # [B] gold scores
    figures: dict[str, float]


def judge_answers(asked: Sequence[Prompt], texts: list[str]) -> Answers:
    """Mean gold score, share above 0, share of grammatical ones, share of different ones, words per response."""
    scores = gold_scores(texts)
    figures = {
        "positive_share": float((scores > 0).double().mean()),
        "gold_score": float(scores.double().mean()),
        "grammar_share": sum(accepts(p.text + t) for p, t in zip(asked, texts, strict=True)) / len(texts),
        "distinct_share": len(set(texts)) / len(texts),
        "words": sum(len(t.split()) for t in texts) / len(texts),
    }
    return Answers(texts, scores, figures)


@torch.no_grad()
def sequence_kl(
    policy: Any, reference: Any, tokenizer: Any, asked: Sequence[Prompt], texts: Sequence[str], batch_size: int = 64
) -> float:
    """The mean over the policy's own responses of Σ_t KL(policy ‖ reference), over the whole vocabulary, in nats."""
    device, total = next(policy.parameters()).device, 0.0
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        before = [data.encode(tokenizer, p.text) for p in asked[part]]
        after = [data.encode(tokenizer, t, start=False, end=True) for t in texts[part]]
        ids, mask = data.pad([b + a for b, a in zip(before, after, strict=True)], tokenizer.pad_token_id)
        counts, _ = data.pad([[False] * len(b) + [True] * len(a) for b, a in zip(before, after, strict=True)], False)
        ids, mask = ids.to(device), mask.to(device)
        both = (models.token_logits(model, ids, mask)[:, :-1] for model in (policy, reference))
        total += float(ops.kl(*both, mask=counts[:, 1:].to(device)).kl.sum())
    return total / len(texts)


def compare_models(config: DemoConfig, sft: Any, ppo: Any, tokenizer: Any, asked: Sequence[Prompt]) -> dict[str, Any]:
    """Both models answer every prompt; returns ``{"figures", "sft", "ppo"}``, the last two as ``Answers``."""
    texts = {
        "sft": answer(sft, tokenizer, asked, config, config.seed + 19),
        "ppo": answer(ppo, tokenizer, asked, config, config.seed + 23),
    }
    answers = {name: judge_answers(asked, text) for name, text in texts.items()}
    figures = {f"{name}_{what}": value for name, a in answers.items() for what, value in a.figures.items()}
    rate = win_rate(answers["ppo"].scores, answers["sft"].scores)
    figures |= dict(zip(("win_rate", "win_rate_low", "win_rate_high"), rate, strict=True))
    figures["grammar_drop"] = figures["sft_grammar_share"] - figures["ppo_grammar_share"]
    figures["sequence_kl"] = sequence_kl(ppo, sft, tokenizer, asked, texts["ppo"])
    return {"figures": figures, **answers}


def reward_figures(metrics: dict[str, float]) -> dict[str, float]:
    """The reward model's accuracy on held-out pairs, with the ends of its 95 % Wilson interval."""
    share, low, high = wilson(metrics["accuracy"], int(metrics["held_out_pairs"]))
    return {"reward_accuracy": share, "reward_accuracy_low": low, "reward_accuracy_high": high}


def verdicts(figures: dict[str, float]) -> dict[str, bool]:
    """Which of the ``THRESHOLDS`` hold."""
    return {name: low <= figures[name] <= high for name, (low, high, _) in THRESHOLDS.items()}
