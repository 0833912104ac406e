"""Records to tokens: file formats, the columns of each kind of training data, tokenising and padding.

A mask is True on the tokens that count: those of the response, its end token included. An error names its place,
``prefs.jsonl:17: "rejected" is missing``. Nothing is cut or left out unless ``overlong`` asks for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import columns
from rlhf_fast.records import DataError, Record, read_records

__all__ = [
    "DataError", "Example", "Pair", "Prompt", "Ranked", "Record", "encode", "pad", "pair_examples", "prompt_examples",
    "ranked_examples", "read_records", "sft_examples",
]  # fmt: skip
OVERLONG = ("error", "truncate", "drop")


@dataclass(frozen=True)
class Example:
    """A sequence to learn from."""

    ids: list[int]
    mask: list[bool]  # True on the tokens to learn
    place: str


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, each with the prompt before it."""

    chosen: list[int]
    rejected: list[int]
    prompt_length: int  # in tokens; the rest of both is the answer
    margin: float | None  # by how much the chosen answer is better, if the data says so
    place: str


@dataclass(frozen=True)
class Ranked:
    """K answers to one prompt, each with the prompt before it."""

    answers: list[list[int]]
    scores: list[float]  # larger = better
    prompt_length: int  # in tokens; the rest of each is the answer
    place: str


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer; ``columns`` are the other columns of its record, for the reward."""

    prompt: str
    ids: list[int]
    columns: dict[str, Any]
    place: str


def sft_examples(
    records: list[Record], tokenizer: Any, *, max_length: int | None = None, overlong: str = "error"
) -> list[Example]:
    """Demonstrations: ``{"text"}``, ``{"prompt", "response"}`` or ``{"messages"}``.

    Of a text every token is learned, of a prompt with its response the response, of a conversation (rendered by the
    tokenizer's chat template) the turns of the assistant. A sequence longer than ``max_length`` tokens raises, or is
    cut at its end (``overlong="truncate"``) or left out (``"drop"``). Raises ``DataError``.
    """
    found = []
    for record in records:
        if "messages" in record:
            ids, mask = _join(tokenizer, columns.turns(record, tokenizer))
        elif "text" in record:
            ids = encode(tokenizer, columns.text(record, "text"), end=True)
            mask = [i > 0 or token != tokenizer.bos_token_id for i, token in enumerate(ids)]
        elif "prompt" in record or "response" in record:
            prompt = columns.prompt_text(record, tokenizer)
            answer = columns.answer_text(record, "response", prompt, tokenizer)
            ids, mask = _join(tokenizer, [(prompt, False), (answer, True)])
        else:
            raise DataError(f'{record.place}: it has no "text", no "prompt" and "response", and no "messages"')
        if fits(record, len(ids), mask.index(True), max_length, overlong):
            found.append(Example(ids[:max_length], mask[:max_length], record.place))
    return nonempty(found, records, max_length)


def pair_examples(
    records: list[Record], tokenizer: Any, *, max_length: int | None = None, overlong: str = "error"
) -> list[Pair]:
    """Preferences: ``{"prompt", "chosen", "rejected"}``, or the last two alone if they begin alike; maybe ``"margin"``.

    Without a prompt it is what both answers begin with: of two conversations the messages they share; of two texts
    the part up to and with the last ``"\\n\\nAssistant:"`` of the shared beginning (Anthropic's HH format), or, if
    there is none, the shared words up to the space before the first word that differs. ``overlong`` as in
    ``sft_examples``. Raises ``DataError``.
    """
    found = []
    for record in records:
        if record.get("prompt") is None or (
            isinstance(record["prompt"], str) and isinstance(record.get("chosen"), list)
        ):
            record = columns.split_pair(record)
        prompt = columns.prompt_text(record, tokenizer)
        said = [columns.answer_text(record, name, prompt, tokenizer) for name in ("chosen", "rejected")]
        if said[0] == said[1]:
            raise DataError(f'{record.place}: "chosen" and "rejected" are the same')
        before = encode(tokenizer, prompt)
        chosen, rejected = (before + encode(tokenizer, answer, start=False, end=True) for answer in said)
        if fits(record, max(len(chosen), len(rejected)), len(before), max_length, overlong):
            chosen, rejected = chosen[:max_length], rejected[:max_length]
            if chosen == rejected:
                raise DataError(f"{record.place}: the two answers are the same up to max_length={max_length}")
            found.append(Pair(chosen, rejected, len(before), _margin(record), record.place))
    return nonempty(found, records, max_length)


def ranked_examples(
    records: list[Record], tokenizer: Any, *, max_length: int | None = None, overlong: str = "error"
) -> list[Ranked]:
    """Scored answers: ``{"prompt", "responses", "scores"}``, the last two lists of one length, in CSV as JSON text.

    A response is a string or what the assistant says, one message or several; their number may differ between prompts.
    ``overlong`` as in ``sft_examples``, for the longest of a prompt. Raises ``DataError``.
    """
    found = []
    for record in records:
        prompt, said = columns.prompt_text(record, tokenizer), columns.entries(record, "responses")
        numbers = columns.entries(record, "scores")
        if len(said) != len(numbers):
            raise DataError(f'{record.place}: {len(said)} "responses" and {len(numbers)} "scores": give one for each')
        scores = [_number(record, f"score {i}", value) for i, value in enumerate(numbers, 1)]
        before, answers = encode(tokenizer, prompt), []
        for i, value in enumerate(said, 1):
            one = Record(record | {f"response {i}": [value] if isinstance(value, dict) else value}, record.place)
            text = columns.answer_text(one, f"response {i}", prompt, tokenizer)
            answers.append(before + encode(tokenizer, text, start=False, end=True))
        longest = max(map(len, answers))
        if fits(record, longest, len(before), max_length, overlong):
            cut = f" up to max_length={max_length}" if max_length is not None and longest > max_length else ""
            answers = [answer[:max_length] for answer in answers]
            _check_alike(record, answers, scores, cut)
            found.append(Ranked(answers, scores, len(before), record.place))
    return nonempty(found, records, max_length)


def prompt_examples(
    records: list[Record], tokenizer: Any, *, max_length: int | None = None, overlong: str = "error"
) -> list[Prompt]:
    """Prompts: ``{"prompt"}``, a string or a list of messages; the other columns are kept for the reward.

    Every prompt gets every column, None where its record has none. A prompt longer than ``max_length`` tokens raises
    ``DataError`` or is left out (``overlong="drop"``): cut short it would be another prompt.
    """
    names = list(dict.fromkeys(name for record in records for name in record if name != "prompt"))
    found = []
    for record in records:
        for name in ("prompts", "responses"):
            if name in record:
                raise DataError(f'{record.place}: a column "{name}" would hide what the reward is given: rename it')
        prompt = columns.prompt_text(record, tokenizer)
        ids = encode(tokenizer, prompt)
        if not ids:
            raise DataError(f'{record.place}: "prompt" is empty')
        if max_length is not None and len(ids) > max_length and overlong != "drop":
            raise DataError(
                f"{record.place}: the prompt is {len(ids)} tokens long, and {max_length} fit: shorten it, or leave "
                "more of the context by a lower max_new_tokens"
            )
        if max_length is None or len(ids) <= max_length:
            found.append(Prompt(prompt, ids, {name: record.get(name) for name in names}, record.place))
    return nonempty(found, records, max_length)


def pad(
    sequences: Sequence[Any],
    value: Any,
    *,
    side: str = "right",
) -> tuple[Tensor, Tensor]:
    """``(padded [B, L], mask [B, L])`` of ``B`` lists or 1-d tensors; the mask is True where a sequence is."""
    if side not in ("right", "left"):
        raise ValueError(f"pad: side must be right or left, got {side!r}")
    rows = [torch.as_tensor(sequence) for sequence in sequences]
    kinds = [row.dtype for row in rows if row.numel()] or [torch.tensor(value).dtype]
    length = max((row.numel() for row in rows), default=0)
    padded = torch.full((len(rows), length), value, dtype=kinds[0], device=rows[0].device if rows else None)
    mask = torch.zeros(padded.shape, dtype=torch.bool, device=padded.device)
    for i, row in enumerate(rows):
        span = slice(0, row.numel()) if side == "right" else slice(length - row.numel(), length)
        padded[i, span], mask[i, span] = row, True
    return padded, mask


def encode(tokenizer: Any, text: str, *, start: bool = True, end: bool = False) -> list[int]:
    """The tokens of ``text``; a prompt is the ``start`` of a sequence and a response its ``end``.

    The two are tokenised apart, so that the tokens of a prompt never depend on its response. At the start stands the
    special token that the tokenizer begins with, once, at the end the end token, once.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ended = text.rstrip().endswith(tokenizer.eos_token)
    if end and ended:
        text = text.rstrip()
    ids = list(tokenizer(text, add_special_tokens=start, verbose=False)["input_ids"])
    if start and len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
        ids = ids[1:]
    if start and not ended and len(ids) > (bos == eos) and ids[-1] == eos:
        ids = ids[:-1]  # the tokenizer ends what it is given, and this is not the end
    return [*ids, eos] if end and not ended else ids


def _join(tokenizer: Any, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """Tokens and mask of pieces of text, True with those to learn; the last of them ends the sequence."""
    ids: list[int] = []
    mask: list[bool] = []
    for i, (text, learned) in enumerate(pieces):
        tokens = encode(tokenizer, text, start=i == 0, end=i == len(pieces) - 1)
        ids, mask = ids + tokens, mask + [learned] * len(tokens)
    return ids, mask


def fits(record: Record, length: int, first: int, max_length: int | None, overlong: str) -> bool:
    """Whether ``record`` of ``length`` tokens is kept. Raises ``DataError`` if it is too long and must stay whole."""
    if overlong not in OVERLONG:
        raise ValueError(f"overlong must be one of {', '.join(OVERLONG)}, got {overlong!r}")
    if max_length is None or length <= max_length:
        return True
    if overlong == "drop":
        return False
    if overlong == "truncate" and first < max_length:
        return True
    what = f"the {first} tokens before the answer leave no room for it" if first >= max_length else "it would be cut"
    raise DataError(
        f"{record.place}: {length} tokens where max_length allows {max_length}, {what}: shorten it, raise max_length "
        "(at most the model's context) or leave it out"
    )


def _check_alike(record: Record, answers: list[list[int]], scores: list[float], cut: str) -> None:
    """Raise ``DataError`` where one answer has two scores."""
    first: dict[tuple[int, ...], int] = {}
    for i, answer in enumerate(answers):
        j = first.setdefault(tuple(answer), i)
        if scores[i] != scores[j]:
            raise DataError(f"{record.place}: responses {j + 1} and {i + 1} are the same{cut}, and their scores differ")


def _margin(record: Record) -> float | None:
    """The number in the column ``margin``, None where there is none; a CSV file has it as text."""
    value = record.get("margin")
    return None if value is None or value == "" else _number(record, "margin", value)


def _number(record: Record, name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f'{record.place}: "{name}" must be a finite number, got {value!r}')
    return number


def nonempty(found: list[Any], records: list[Record], max_length: int | None) -> list[Any]:
    """``found``, the examples of ``records``. Raises ``DataError`` if all of them were left out."""
    if not found and records:
        raise DataError(f"{records[0].place}: this and all other records are longer than max_length={max_length}")
    return found
