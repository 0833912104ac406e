"""One model's answers to all prompts, and the figures that follow from them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast import data, models, ops
from rlhf_fast.evaluation import intervals
from rlhf_fast.evaluation.config import EvaluateConfig
from rlhf_fast.generate import decode, stop_tokens, texts_of
from rlhf_fast.rewards import ask, check_scores
from rlhf_fast.rollout import Rollout


@dataclass
class Answers:
    """What a model wrote to ``B`` prompts."""

    texts: list[str]  # [B]
    lengths: Tensor  # [B] tokens, the end token included
    ended: Tensor  # [B], bool, before max_new_tokens
    kl: Tensor | None  # [B] nats, from the reference where there is one
    scores: Tensor | None = None  # [B], from the reward where there is one

    def figures(self) -> dict[str, float]:
        """Length statistics, the share of responses that end and of different ones; reward and KL with intervals."""
        lengths = self.lengths.double()
        found = {
            "tokens": float(lengths.mean()), "tokens_median": float(lengths.quantile(0.5)),
            "tokens_p95": float(lengths.quantile(0.95)), "tokens_max": float(lengths.max()),
            "ended": float(self.ended.double().mean()), "distinct": len(set(self.texts)) / len(self.texts),
        }  # fmt: skip
        for name, values in (("reward", self.scores), ("kl", self.kl)):
            if values is not None:
                found |= dict(zip((name, f"{name}_low", f"{name}_high"), intervals.mean(values), strict=True))
        return found


def load(source: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The causal LM at ``source`` and its tokenizer; a module stays where it is, others go to the accelerator."""
    tokenizer = models.load_tokenizer(source, tokenizer)
    if isinstance(source, nn.Module):
        return source, tokenizer
    from accelerate import PartialState

    return models.load_policy(source, dtype="auto").to(PartialState().device), tokenizer


def answer(
    model: Any, prompts: list[data.Prompt], tokenizer: Any, config: EvaluateConfig, *, reference: Any = None
) -> Answers:
    """Let ``model`` answer ``prompts``; a response depends on its prompt and on ``config.seed`` alone."""
    count, device = len(prompts), next(model.parameters()).device
    models.check_tokens(model, tokenizer, (prompt.ids for prompt in prompts))
    seeds = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(config.seed))
    stop_ids, order = stop_tokens(model, tokenizer), sorted(range(count), key=lambda i: len(prompts[i].ids))
    said = Answers([""] * count, torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.bool), None)
    kl = torch.zeros(count, dtype=torch.float64)
    for rows in torch.tensor(order).split(config.batch_size):
        batch = [prompts[i] for i in rows.tolist()]
        ids, mask = (x.to(device) for x in data.pad([p.ids for p in batch], tokenizer.pad_token_id, side="left"))
        written = decode(
            model, ids, mask, max_new_tokens=config.max_new_tokens, stop_ids=stop_ids, pad_id=tokenizer.pad_token_id,
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seeds=seeds[rows],
        )  # fmt: skip
        rollout = Rollout.begin(batch, ids, mask, written, texts_of(written, tokenizer))
        said.lengths[rows], said.ended[rows] = rollout.lengths, rollout.ended.cpu()
        for i, text in zip(rows.tolist(), rollout.texts, strict=True):
            said.texts[i] = text
        if reference is not None:
            kl[rows] = sequence_kl(model, reference, rollout, config.temperature).double().cpu()
    said.kl = None if reference is None else kl
    return said


@torch.no_grad()
def sequence_kl(model: Any, reference: Any, rollout: Rollout, temperature: float) -> Tensor:
    """``[B]``, Σ_t KL(model ‖ reference) over each response, over the whole vocabulary, in nats.

    At the temperature of the sampling, or at 1 where that is 0.
    """
    keep = rollout.mask.shape[1] + 1
    with models.evaluating(model), models.evaluating(reference):
        read = (rollout.ids, rollout.attention)
        both = [models.token_logits(m, *read, keep=keep, final=False) for m in (model, reference)]
    return ops.kl(*both, temperature=temperature or 1.0, mask=rollout.mask).kl.sum(1)


def score(reward: Callable[..., Any], prompts: list[data.Prompt], texts: list[str]) -> Tensor:
    """``[B]`` scores of ``texts`` on the CPU. Raises ``ValueError`` where there is not one finite number for each."""
    asked = [prompt.prompt for prompt in prompts]
    columns = {name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns}
    found = check_scores(ask(reward, asked, texts, columns), len(texts), texts, prompts=asked)
    if found.dim() != 1:
        raise ValueError(f"evaluate needs one score per response, and the reward returned shape {list(found.shape)}")
    return found.cpu()


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, examples: list[data.Example], batch_size: int) -> float:
    """``exp`` of the mean over the response tokens of ``-log p``."""
    device, total = next(model.parameters()).device, 0.0
    with models.evaluating(model):
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            ids, there = data.pad([example.ids for example in part], tokenizer.pad_token_id)
            counts, _ = data.pad([example.mask for example in part], False)
            logits = models.token_logits(model, ids.to(device), there.to(device))
            said = ops.logprobs(logits[:, :-1], ids[:, 1:].to(device), mask=counts[:, 1:].to(device, torch.bool))
            total -= float(said.logprobs.double().sum())
    return math.exp(total / sum(sum(example.mask[1:]) for example in examples))
