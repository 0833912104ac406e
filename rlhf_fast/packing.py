"""Several sequences in one row, without padding between them: positions begin again, none attends to another."""

import itertools
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_fast import dispatch
from rlhf_fast.attention import can_use_rows, layout, leave_rows, use_rows, uses_rows
from rlhf_fast.data import pad
from rlhf_fast.models import accepts, context_length, evaluating, scalar_head
from rlhf_fast.pretrained import silent, unwrap

#: A single row has a multiple of so many tokens: oneDNN and compilers prepare a product for each new shape.
ROUND = 64


class Packed(NamedTuple):
    """``R`` rows of sequences that stand one after the other, and the ``N`` tokens that count in them.

    Of ``spots`` N is rounded up to a multiple of ``ROUND``, by tokens that nobody reads.
    """

    ids: Tensor  # [R, L], int64
    positions: Tensor  # [R, L], int64, 0 where a sequence begins, and on padding
    at: Tensor  # [N], int64, where in R * L the tokens before those that count stand: what predicts them
    targets: Tensor  # [N], int64, the tokens that count


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """The sequences of ``lengths``, by their index, in rows of at most ``room`` tokens: first fit decreasing.

    The longest come first, each into the first row with room for it; at most 11/9 of the fewest rows there could be,
    and one more (Johnson 1973). A sequence longer than ``room`` has a row of its own.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((row for row, free in enumerate(left) if free >= lengths[i]), len(rows))
        if at == len(rows):
            rows.append([])
            left.append(room)
        rows[at].append(i)
        left[at] -= lengths[i]
    return rows


def pack(
    rows: Sequence[Sequence[tuple[list[int], list[bool]]]], pad_id: int, device: torch.device, *, flat: bool = False
) -> Packed:
    """``(ids, mask)`` of every sequence of every row; ``flat`` puts all rows behind each other, without padding.

    The first token of a sequence never counts, for nothing predicts it.
    """
    rows = [[sequence for row in rows for sequence in row]] if flat else rows
    ids, _ = pad([[token for ids, _ in row for token in ids] for row in rows], pad_id)
    positions, _ = pad([[i for ids, _ in row for i in range(len(ids))] for row in rows], 0)
    mask, _ = pad([[m and i > 0 for _, mask in row for i, m in enumerate(mask)] for row in rows], False)
    counted = mask.flatten().nonzero().squeeze(1)
    found = ids, positions, counted - 1, ids.flatten()[counted]
    return Packed(*(x.to(device, non_blocking=True) for x in found))


class Spots(NamedTuple):
    """Packed sequences of prompt and response, of which the response tokens count."""

    packed: Packed
    place: Tensor  # [B, T], int64, which of the N tokens that count each response token is; 0 where masked
    mask: Tensor  # [B, T], bool

    def spread(self, values: Tensor) -> Tensor:
        """``[N]`` values of the tokens that count as ``[B, T]``, 0 where masked."""
        return torch.where(self.mask, values.index_select(0, self.place.flatten()).view(self.place.shape), 0)

    def gather(self, values: Tensor) -> Tensor:
        """``[B, T]`` values as ``[N]``, of the tokens that count; 0 at those that only round N up."""
        count = len(self.packed.at)
        place = torch.where(self.mask, self.place, count).flatten()
        return values.new_zeros(count + 1).scatter(0, place, values.flatten())[:count]


def spots(
    ids: Tensor,  # [B, P + T]
    mask: Tensor,  # [B, T], bool
    prompt_lengths: Tensor,  # [B], int64, on the CPU
    lengths: Tensor,  # [B], int64, on the CPU
    *,
    counts: Tensor | None = None,  # [B, T], bool, on the CPU
    flat: bool = False,
) -> Spots:
    """The sequences of ``ids``, prompts padded to the left and responses to the right, without that padding.

    They share rows as long as the longest of them (``first_fit``), or, ``flat``, a single one, which is filled up to a
    multiple of ``ROUND``. Only what the CPU knows is looked at, so that nothing waits for the device: that is the mask
    itself, ``counts``, where tokens of a response may not count, and the lengths alone where all of them do.
    """
    width, before, column = ids.shape[1], ids.shape[1] - mask.shape[1], torch.arange(mask.shape[1])
    counts = column < lengths[:, None] if counts is None else counts
    starts = torch.arange(len(ids)) * width + before - prompt_lengths
    source, positions, first = _lay(starts, prompt_lengths + lengths, flat=flat)
    at = (first + prompt_lengths - 1)[:, None] + column  # the prompt's last token predicts the first of the answer
    place = torch.where(counts, counts.flatten().cumsum(0).view(counts.shape) - 1, 0)
    laid = source, positions, _filled(at[counts]), place
    source, positions, at, place = (x.to(ids.device, non_blocking=True) for x in laid)
    rows = ids.flatten()[source]
    return Spots(Packed(rows, positions, at, rows.flatten().roll(-1)[at]), place, mask)


def pack_places(
    sequences: Sequence[list[int]], places: Sequence[Sequence[int]], device: torch.device, *, flat: bool = False
) -> Packed:
    """``sequences`` in rows like those of ``spots``; what stands ``at`` are their ``places``, sequence by sequence.

    For what is read at a token and not before it: ``packed_values`` are then the scores at those places.
    """
    lengths = torch.tensor([len(ids) for ids in sequences], dtype=torch.long)
    source, positions, first = _lay(lengths.cumsum(0) - lengths, lengths, flat=flat)
    told = [start + place for start, some in zip(first.tolist(), places, strict=True) for place in some]
    at = _filled(torch.tensor(told, dtype=torch.long))
    ids = torch.tensor([token for ids in sequences for token in ids])[source]
    found = ids, positions, at, ids.flatten()[at]
    return Packed(*(x.to(device, non_blocking=True) for x in found))


def _lay(starts: Tensor, lengths: Tensor, *, flat: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``[R, L]`` where each token of the rows stands among all, ``[R, L]`` their positions, ``[S]`` where in R * L each
    of the sequences begins that have ``lengths [S]`` and stood from ``starts [S]`` on.
    """
    sizes, total = lengths.tolist(), int(lengths.sum())
    longest = max(*sizes, 1) if sizes else 1
    room = _rounded(total) if flat else longest
    rows, begin = first_fit(sizes, room), [0] * len(sizes)
    for r, row in enumerate(rows):
        for i, start in zip(row, itertools.accumulate((sizes[i] for i in row), initial=r * room), strict=False):
            begin[i] = start
    first = torch.tensor(begin, dtype=torch.long)
    inside = torch.arange(total) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    here = first.repeat_interleave(lengths) + inside
    source, positions = torch.zeros(2, len(rows) * room, dtype=torch.long)  # what is too much nobody sees
    source[here] = starts.repeat_interleave(lengths) + inside
    positions[here] = inside
    if flat:  # what is left of the one row is filled with sequences no longer than the others
        positions[total:] = torch.arange(len(positions) - total) % longest
    return source.view(-1, room), positions.view(-1, room), first


def _filled(at: Tensor) -> Tensor:
    """``at`` with as many zeros as make its length a multiple of ``ROUND``."""
    return nn.functional.pad(at, (0, _rounded(len(at)) - len(at)))


def _rounded(count: int) -> int:
    return max(1, -(-count // ROUND)) * ROUND


def packed_values(model: Any, packed: Packed) -> Tensor:
    """``[N]``, the scalar head before every token that counts, in float32."""
    return scalar_head(model, _predicting(_packed_hidden(model, packed), packed))


def _packed_hidden(model: Any, packed: Packed) -> Tensor:
    hidden: Tensor = _through(unwrap(model).base_model, model, packed).last_hidden_state
    return hidden


def packed_logits(model: Any, packed: Packed) -> Tensor:
    """``[N, V]`` logits of the tokens that count.

    No others are computed: the head of the model, within its own scaling and softcap, reads those N tokens alone. Where
    no mask is given transformers tells the sequences from the positions: by a block-diagonal mask, or by flash-attn's
    kernels for sequences of different lengths.
    """
    head = unwrap(model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (_predicting(hidden[0], packed)[None],))
    try:
        logits: Tensor = _through(model, model, packed).logits
    finally:
        hook.remove()
    return logits[0]


def _predicting(hidden: Tensor, packed: Packed) -> Tensor:
    """``[N, H]``, of ``[R, L, H]`` those from which the tokens that count are predicted."""
    return hidden.flatten(0, 1).index_select(0, packed.at)


def _through(module: Any, model: Any, packed: Packed) -> Any:
    """What ``module``, ``model`` or its backbone, makes of the rows."""
    given = {"input_ids": packed.ids, "position_ids": packed.positions, "use_cache": False, "return_dict": True}
    if uses_rows(model):
        return module(**given, attention_mask=layout(packed.positions))
    with silent():  # it warns of padding without a mask, which no sequence sees
        return module(**given)


def prefer_varlen(model: Any, device: torch.device, precision: str) -> None:
    """Let ``model`` attend by flash-attn where that is installed and can: on a GPU, in bfloat16."""
    able = getattr(unwrap(model), "_supports_flash_attn", False)
    if able and device.type == "cuda" and precision == "bf16" and dispatch.find_spec("flash_attn") is not None:
        unwrap(model).set_attn_implementation("flash_attention_2")


class Attention(NamedTuple):
    """How a model attends to packed sequences, by transformers' names."""

    model: Any
    before: str | None
    now: str | None


def prepare(readers: Sequence[Any], device: torch.device, config: Any, *, rows: bool = True) -> list[Attention]:
    """Where ``config.packing`` asks for it, see to it that the sequences of no reader see each other in a row.

    Each attends as it is fastest: by flash-attn, or on a CPU, with ``rows``, by ``attention.attend``. ``put_back``
    takes what is returned. Raises ``ValueError`` like ``check_packing``, and all attend as before.
    """
    prepared: list[Attention] = []
    try:
        for model in readers if config.packing else ():
            before = _attention(model)
            prepared.append(Attention(model, before, before))
            _choose(model, device, config.precision, rows=rows)
            prepared[-1] = Attention(model, before, _attention(model))
    except BaseException:
        put_back([Attention(model, before, _attention(model)) for model, before, _ in prepared])
        raise
    return prepared


def _choose(model: Any, device: torch.device, precision: str, *, rows: bool) -> None:
    prefer_varlen(model, device, precision)
    if rows and device.type == "cpu" and can_use_rows(model):
        before = None
        with suppress(Exception):  # the check below says why
            before = _trial(model)[0]
        use_rows(model)
        with suppress(ValueError):
            return check_packing(model, before=before)
        leave_rows(model)  # a model that makes its own mask, or attends to other tokens than those before
    check_packing(model)


def put_back(prepared: Sequence[Attention]) -> None:
    """Let every model attend as before ``prepare``; packed sequences are then told apart by a mask."""
    for model, before, now in reversed(prepared):
        if before != now:
            unwrap(model).set_attn_implementation(before)


def take_up(prepared: Sequence[Attention]) -> None:
    """Let every model attend as ``prepare`` chose, also after ``put_back``."""
    for model, _, now in prepared:
        if now != _attention(model):
            unwrap(model).set_attn_implementation(now)


def _attention(model: Any) -> str | None:
    return getattr(unwrap(model).config, "_attn_implementation", None)


def uses_varlen(model: Any) -> bool:
    """Whether ``model`` reads sequences of any length from a single row."""
    return uses_rows(model) or "flash" in str(getattr(unwrap(model).config, "_attn_implementation", ""))


def check_packing(model: Any, *, before: Tensor | None = None) -> None:
    """Raise ``ValueError`` where a sequence of ``model`` would see the others of its row, or it cannot read rows.

    ``before``: what its backbone gave for the sequence of ``_trial`` when it attended in another way.
    """
    name = type(unwrap(model)).__name__
    if "position_ids" not in accepts(model):
        raise ValueError(f"{name} takes no position_ids, so that its sequences cannot be packed")
    try:
        alone, beside, error = _trial(model)
    except Exception as fault:  # of code that is not ours: a mask made otherwise, a model without a base model
        first = str(fault).partition("\n")[0]
        raise ValueError(f"{name} cannot read packed sequences ({first}): use packing=false") from fault
    alone = alone if before is None else before
    if not (alone - beside).abs().max() <= error * alone.abs().max():
        raise ValueError(f"the sequences of {name} see each other when they are packed: use packing=false")


@torch.no_grad()
def _trial(model: Any) -> tuple[Tensor, Tensor, float]:
    """The hidden states of a sequence that stands alone, and behind another, and what rounding may be of the largest.

    It has more than 128 tokens where the context does, but in half precision, whose noise grows with them.
    """
    weight, flash = next(model.parameters()), uses_varlen(model) and not uses_rows(model)
    rough = flash or weight.dtype in (torch.bfloat16, torch.float16)
    long = ([2, 1, 3, 1] * 40)[: 4 if rough else max((context_length(model) or 163) - 3, 1)]
    both = [([1, 2, 3], [True] * 3), (long, [True] * len(long))]
    with evaluating(model), torch.autocast(weight.device.type, torch.bfloat16, enabled=flash):
        alone, row = (_packed_hidden(model, pack([some], 0, weight.device))[0].float() for some in (both[1:], both))
    return alone, row[3:], 3e-2 if rough else 1e-3
