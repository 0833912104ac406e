"""What a reward model learns from: pairs, rankings, labelled answers or labelled steps, told apart by their columns.

Whatever the kind, a record becomes some sequences, the tokens at which their scores are read, and a target for each.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import columns, data
from rlhf_fast.data import DataError, Pair, Ranked, Record, encode
from rlhf_fast.losses.reward import better
from rlhf_fast.packing import Packed, pack_places

#: kind → the two columns beside the prompt that tell it.
KINDS = {
    "pairwise": ("chosen", "rejected"),
    "ranking": ("responses", "scores"),
    "process": ("steps", "labels"),
    "pointwise": ("response", "label"),
}


@dataclass(frozen=True)
class Labelled:
    """A prompt with its answer, and how good it is after some of its tokens: the last one, or that of every step."""

    ids: list[int]
    ends: list[int]  # the places of those tokens
    labels: list[float | None]  # in [0, 1]; None is not learned
    place: str


class Judged(NamedTuple):
    """``N`` sequences of ``B`` records, with at most ``K`` scores each, and what they are held to.

    The last three are places in the flattened ``[B, K]``, found on the host, for they need no wait for the device.
    """

    ids: Tensor  # [N, L], int64
    attention: Tensor  # [N, L], bool, True on tokens
    rows: Tensor  # [B, K], the sequence of each score
    places: Tensor  # [B, K], its token in that
    mask: Tensor  # [B, K], bool, True where there is a score to learn
    targets: Tensor  # [B, K], labels; of answers that compete their rank: larger = better
    margins: Tensor  # [B], by how much the chosen answer of a pair is better
    there: Tensor  # [M], where the mask is True
    over: Tensor  # [P], the better of each two answers that compete
    under: Tensor  # [P], the worse

    def to(self, device: torch.device) -> "Judged":
        """The same on ``device``."""
        return Judged(*(x.to(device, non_blocking=True) for x in self))


def kind_of(records: list[Record], like: str | None = None) -> str:
    """The kind of ``records``, a key of ``KINDS``, by the columns of the first; all must have it.

    With ``like``, that of other data, it must be this one. Raises ``DataError`` that names the first record without.
    """
    found = [_kinds(record) for record in records]
    if not found[0]:
        every = "; ".join(f"prompt, {a} and {b}" for a, b in KINDS.values())
        raise DataError(f"{records[0].place}: no columns that a reward model learns from, which are {every}")
    first = like if like is not None else found[0][0]
    wrong = next((i for i, kinds in enumerate(found) if kinds and first not in kinds), None)
    if wrong is not None:
        has, other = (" and ".join(KINDS[kind]) for kind in (found[wrong][0], first))
        before = "the records before it" if wrong or like is None else "the training data"
        raise DataError(f"{records[wrong].place}: it has {has}, and {before} {other}: give records of one kind")
    return first


def reward_examples(
    records: list[Record],
    tokenizer: Any,
    *,
    kind: str,
    max_length: int | None = None,
    overlong: str = "error",
    separator: str = "\n",
) -> list[Any]:
    """``records`` of ``kind`` as ``Pair``, ``Ranked`` or ``Labelled``.

    ``overlong`` as in ``sft_examples``, ``separator`` as in ``step_examples``. Raises ``DataError``, also where the
    records teach nothing: where all are ties, or no step has a label.
    """
    limits: dict[str, Any] = {"max_length": max_length, "overlong": overlong}
    if kind == "process":
        limits["separator"] = separator
    readers = {"pairwise": data.pair_examples, "ranking": data.ranked_examples, "process": step_examples}
    examples = readers.get(kind, labelled_examples)(records, tokenizer, **limits)
    if not any(map(terms, examples)):
        nothing = "no two answers to one prompt have different scores" if kind == "ranking" else "no step has a label"
        raise DataError(f"{records[0].place}: in this and all other records {nothing}")
    return examples


def labelled_examples(
    records: list[Record], tokenizer: Any, *, max_length: int | None = None, overlong: str = "error"
) -> list[Labelled]:
    """Labelled answers: ``{"prompt", "response", "label"}``, the label true, false or a number from 0 to 1.

    ``overlong`` as in ``sft_examples``. Raises ``DataError``.
    """
    found = []
    for record in records:
        prompt = columns.prompt_text(record, tokenizer)
        answer = columns.answer_text(record, "response", prompt, tokenizer)
        if record.get("label") is None:
            raise DataError(f'{record.place}: "label" is missing')
        label, before = _label(record, "label", record["label"]), encode(tokenizer, prompt)
        ids = before + encode(tokenizer, answer, start=False, end=True)
        if data.fits(record, len(ids), len(before), max_length, overlong):
            ids = ids[:max_length]
            found.append(Labelled(ids, [len(ids) - 1], [label], record.place))
    return data.nonempty(found, records, max_length)


def step_examples(
    records: list[Record],
    tokenizer: Any,
    *,
    separator: str = "\n",
    max_length: int | None = None,
    overlong: str = "error",
) -> list[Labelled]:
    """Labelled steps: ``{"prompt", "steps", "labels"}``, a list of texts and one of labels, in CSV as JSON text.

    The answer is the steps with ``separator`` between them. Each step is tokenised apart with the separator that
    follows it, and its score is read at the last of these tokens; that of the last step at the end token. A label is
    true, false or a number from 0 to 1; a step whose label is None is read and not learned. Of an answer that
    ``overlong="truncate"`` cuts, the steps remain that end before. Raises ``DataError``.
    """
    found = []
    for record in records:
        prompt, steps = columns.prompt_text(record, tokenizer), _steps(record, separator)
        said = columns.entries(record, "labels")
        if len(said) != len(steps):
            raise DataError(f'{record.place}: {len(steps)} "steps" and {len(said)} "labels": give one for each')
        labels = [None if v is None else _label(record, f"label {i}", v) for i, v in enumerate(said, 1)]
        joined = separator.join(steps)
        answer = columns.answer_text(Record(record | {"steps": joined}, record.place), "steps", prompt, tokenizer)
        if not answer.startswith(joined):
            raise DataError(f'{record.place}: the chat template changes "steps": give "prompt" as text')
        before = encode(tokenizer, prompt)
        ids, ends = step_tokens(tokenizer, [*steps[:-1], steps[-1] + answer[len(joined) :]], separator)
        ids, ends = before + ids, [len(before) + end for end in ends]
        if data.fits(record, len(ids), ends[0], max_length, overlong):
            kept = sum(max_length is None or end < max_length for end in ends)
            found.append(Labelled(ids[:max_length], ends[:kept], labels[:kept], record.place))
    return data.nonempty(found, records, max_length)


def step_tokens(tokenizer: Any, steps: list[str], separator: str) -> tuple[list[int], list[int]]:
    """The tokens of an answer in ``steps``, the separator after each but the last, and where each step ends."""
    ids: list[int] = []
    ends = []
    for step in steps[:-1]:
        ids += encode(tokenizer, step + separator, start=False)
        ends.append(len(ids) - 1)
    ids += encode(tokenizer, steps[-1], start=False, end=True)
    return ids, [*ends, len(ids) - 1]


def split_steps(response: str, separator: str) -> list[str]:
    """The steps of ``response``, blank ones left out; one that is empty where there is none."""
    return [step for step in response.split(separator) if step.strip()] or [""]


def terms(example: Pair | Ranked | Labelled) -> int:
    """How many terms of the loss ``example`` gives: labels, or 1 where answers of different ranks compete."""
    if isinstance(example, Labelled):
        return sum(label is not None for label in example.labels)
    return 1 if isinstance(example, Pair) else int(len(set(example.scores)) > 1)


def sequences(example: Pair | Ranked | Labelled) -> list[list[int]]:
    """The token sequences of ``example``."""
    if isinstance(example, Labelled):
        return [example.ids]
    return [example.chosen, example.rejected] if isinstance(example, Pair) else example.answers


def ends(example: Pair | Ranked | Labelled) -> list[list[int]]:
    """The places in each of the ``sequences`` at which a score is read."""
    return [example.ends] if isinstance(example, Labelled) else [[len(ids) - 1] for ids in sequences(example)]


def collate(examples: list[Any], pad_id: int) -> Judged:
    """``examples`` of one kind, padded, all answers to a prompt side by side."""
    every = [ids for example in examples for ids in sequences(example)]
    rows, places, targets, first = [], [], [], 0
    for example in examples:
        answers = sequences(example)
        labelled = isinstance(example, Labelled)
        places.append([place for some in ends(example) for place in some])
        rows.append([first] * len(example.ends) if labelled else list(range(first, first + len(answers))))
        targets.append(_targets(example))
        first += len(answers)
    ids, attention = data.pad(every, pad_id)
    target, mask = data.pad(targets, math.nan)
    mask &= ~target.isnan()
    compete = better(target, mask & (not isinstance(examples[0], Labelled)))
    b, i, j = compete.nonzero(as_tuple=True)
    margins = torch.tensor([getattr(example, "margin", None) or 0.0 for example in examples])
    return Judged(
        ids, attention, data.pad(rows, 0)[0], data.pad(places, 0)[0], mask, torch.where(mask, target, 0), margins,
        there=mask.flatten().nonzero().squeeze(1), over=b * mask.shape[1] + i, under=b * mask.shape[1] + j,
    )  # fmt: skip


def packed(examples: list[Any], device: torch.device, *, flat: bool) -> tuple[Packed, Tensor]:
    """The sequences of ``examples`` without padding, and which of the scores read there are the ``[B, K]``.

    Where ``collate`` has no score stands any other.
    """
    places = [some for example in examples for some in ends(example)]
    order = torch.arange(sum(map(len, places))).split([sum(map(len, ends(example))) for example in examples])
    every = [ids for example in examples for ids in sequences(example)]
    return pack_places(every, places, device, flat=flat), data.pad(order, 0)[0].to(device, non_blocking=True)


def _targets(example: Pair | Ranked | Labelled) -> Tensor:
    """Labels, NaN for None, or ranks, which the float64 scores of a prompt become without a loss."""
    if isinstance(example, Labelled):
        return torch.tensor([math.nan if label is None else label for label in example.labels])
    if isinstance(example, Pair):
        return torch.tensor([1.0, 0.0])
    return torch.tensor(example.scores, dtype=torch.float64).unique(return_inverse=True)[1].float()


def _kinds(record: Record) -> list[str]:
    """The kinds both of whose columns ``record`` has; if there are none, those of which it has one."""
    there = [(kind, sum(record.get(name) is not None for name in names)) for kind, names in KINDS.items()]
    return [kind for kind, n in there if n == 2] or [kind for kind, n in there if n]


def _steps(record: Record, separator: str) -> list[str]:
    """The column ``steps``, each without the separator behind it."""
    found = []
    for i, value in enumerate(columns.entries(record, "steps"), 1):
        step = columns.text(Record({f"step {i}": value}, record.place), f"step {i}").removesuffix(separator)
        if separator in step:
            raise DataError(f"{record.place}: step {i} holds the separator {separator!r}: choose another one")
        found.append(step)
    return found


def _label(record: Record, name: str, value: Any) -> float:
    """``value`` as a number from 0 to 1; a CSV file has it as text."""
    words = {"true": 1.0, "false": 0.0}
    try:
        label = float(words.get(value.strip().lower(), value) if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError):
        label = math.nan
    if not 0 <= label <= 1:
        raise DataError(f'{record.place}: "{name}" must be true, false or a number from 0 to 1, got {value!r}')
    return label
