"""Several answers to each prompt, from the model itself, other models and people, scored by a reward: RRHF's data."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from rlhf_fast import columns, data, models
from rlhf_fast.beams import diverse_beams
from rlhf_fast.dispatch import require
from rlhf_fast.generate import generate, spoken, stop_tokens
from rlhf_fast.rewards import ask, check_scores, load_reward


def sample_and_rank(
    model: Any,
    prompts: Any,
    reward: Any,
    k: int = 4,
    *,
    tokenizer: Any = None,
    beams: int = 0,
    beam_groups: int | None = None,
    diversity: float = 1.0,
    others: Sequence[Any] = (),
    human: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Answers to every prompt with their scores, as ``RRHFTrainer`` learns from them.

    Args:
        model: a path, a Hub id or a causal language model, which stays where it is.
        prompts: a path, a list of dicts or a ``datasets.Dataset`` with the column ``prompt``; the others reach the
            reward.
        reward: a path or module with a scalar head, or ``callable(prompts, responses, **columns)``, which returns one
            score per response.
        k: answers that the model samples to each prompt.
        tokenizer: needed if ``model`` is a module.
        beams, beam_groups, diversity: further answers of the model by ``diverse_beams``.
        others: further models, which sample one answer to each prompt: a path or Hub id, which brings its tokenizer, a
            module with the model's own, or a ``callable(prompts)`` that returns texts.
        human: the column that holds people's answers to the prompt: a string or a list of them; none where it is empty.
        max_new_tokens, temperature, top_k, top_p: of the sampling, as in ``generate``.
        seed: of all samples; new ones each time if absent.
        batch_size: responses at a time.

    Returns:
        A dict per prompt: ``prompt`` as the model reads it, ``responses``, ``scores``, and ``sources``, which says of
        each response who gave it first: sample, beam, other 1 … or human. Equal responses stand once, empty ones not at
        all; a prompt without any is left out with a warning. A response that was cut at ``max_new_tokens`` stands as
        it is, and RRHF would learn that it ends there: leave room for the answers, or let the reward punish it.

    Raises:
        ValueError: what ``generate`` and ``diverse_beams`` raise; a score that is NaN or infinite, with its prompt;
            nobody to answer; not a single response.
        TypeError: ``prompts`` or the scores are nothing of the kind.
    """
    if k < 0 or beams < 0 or k + beams + len(others) + (human is not None) == 0:
        raise ValueError(f"sample_and_rank: nobody answers with k={k}, beams={beams}, no others and no human")
    require("transformers", "accelerate")
    records = data.read_records(prompts)
    tokenizer = models.load_tokenizer(model, tokenizer)
    if not isinstance(model, nn.Module):
        from accelerate import PartialState

        model = models.load_policy(model, dtype="auto").to(PartialState().device)
    examples = data.prompt_examples(records, tokenizer)
    knobs: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
    knobs |= {"top_p": top_p, "seed": seed, "batch_size": batch_size}
    found: list[dict[str, str]] = [{} for _ in records]  # response → who gave it
    if k:
        texts = generate(model, [r for r in records for _ in range(k)], tokenizer=tokenizer, **knobs)
        _add(found, "sample", [texts[i * k : i * k + k] for i in range(len(records))])
    if beams:
        options = {"beams": beams, "groups": beam_groups, "diversity": diversity, "max_new_tokens": max_new_tokens}
        _add(found, "beam", _search(model, examples, tokenizer, max(1, batch_size // beams), options))
    for i, other in enumerate(others, 1):
        _add(found, f"other {i}", [[text] for text in _ask_other(other, records, examples, tokenizer, knobs)])
    if human is not None:
        _add(found, "human", [_human(record, human) for record in records])
    device = next(model.parameters()).device
    judge = load_reward(reward, tokenizer, batch_size=batch_size, device=device)
    return _ranked(judge, examples, found, batch_size)


def _add(found: list[dict[str, str]], source: str, texts: list[list[str]]) -> None:
    for answers, more in zip(found, texts, strict=True):
        for text in more:
            if text.strip():
                answers.setdefault(text, source)


def _search(
    model: Any, examples: list[data.Prompt], tokenizer: Any, size: int, options: dict[str, Any]
) -> list[list[str]]:
    """The responses of ``diverse_beams`` to ``size`` prompts at a time, as text."""
    device, stop_ids = next(model.parameters()).device, stop_tokens(model, tokenizer)
    texts: list[list[str]] = [[] for _ in examples]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))  # neighbours of one length need no padding
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        ids, mask = data.pad([examples[i].ids for i in rows], tokenizer.pad_token_id, side="left")
        beams = diverse_beams(
            model, ids.to(device), mask.to(device), stop_ids=stop_ids, pad_id=tokenizer.pad_token_id, **options
        )
        said = spoken(beams.responses.flatten(0, 1), beams.mask.flatten(0, 1), tokenizer)
        for at, i in enumerate(rows):
            texts[i] = said[at * options["beams"] : (at + 1) * options["beams"]]
    return texts


def _ask_other(
    other: Any, records: list[data.Record], examples: list[data.Prompt], tokenizer: Any, knobs: dict[str, Any]
) -> list[str]:
    """One text of another model to each prompt."""
    if callable(other) and not isinstance(other, nn.Module):
        texts = list(other([example.prompt for example in examples]))
        if len(texts) != len(examples) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"one of others must return {len(examples)} texts, one per prompt, got {len(texts)} things"
            )
        return texts
    return generate(other, records, tokenizer=tokenizer if isinstance(other, nn.Module) else None, **knobs)


def _human(record: data.Record, name: str) -> list[str]:
    value = record.get(name)
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        return [columns.text(record, name)]
    if not all(isinstance(text, str) for text in value):
        raise data.DataError(f'{record.place}: "{name}" must be a string or a list of strings')
    return value


def _ranked(
    judge: Callable[..., Any], examples: list[data.Prompt], found: list[dict[str, str]], size: int
) -> list[dict[str, Any]]:
    """The responses with the scores of ``judge``, who reads ``size`` at a time."""
    rows = [(i, text) for i, answers in enumerate(found) for text in answers]
    if not rows:
        raise ValueError("sample_and_rank: every response is empty")
    scores: list[float] = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        asked, texts = [examples[i].prompt for i, _ in part], [text for _, text in part]
        named = {name: [examples[i].columns[name] for i, _ in part] for name in examples[0].columns}
        said = check_scores(ask(judge, asked, texts, named), len(part), texts, prompts=asked)
        if said.dim() != 1:
            raise ValueError(f"sample_and_rank: the reward must return one score per response, got {list(said.shape)}")
        scores += said.tolist()
    silent = sum(not answers for answers in found)
    if silent:
        warnings.warn(f"{silent} of {len(found)} prompts got empty responses only and are left out", stacklevel=3)
    left = iter(scores)
    return [
        {"prompt": example.prompt, "responses": list(answers), "scores": [next(left) for _ in answers],
         "sources": list(answers.values())}
        for example, answers in zip(examples, found, strict=True)
        if answers
    ]  # fmt: skip
