"""Several sequences in one row, without padding between them: positions begin again, none attends to another."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import dispatch
from rlhf_fast.attention import layout, uses_rows
from rlhf_fast.data import pad
from rlhf_fast.models import accepts, evaluating, scalar_head
from rlhf_fast.pretrained import silent, unwrap

#: A single row has a multiple of so many tokens: oneDNN and compilers prepare a product for each new shape.
ROUND = 64


class Packed(NamedTuple):
    """``R`` rows of sequences that stand one after the other."""

    ids: Tensor  # [R, L], int64
    positions: Tensor  # [R, L], int64, 0 where a sequence begins, and on padding
    mask: Tensor  # [R, L], bool, True on the tokens that count


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
    return Packed(*(x.to(device, non_blocking=True) for x in (ids, positions, mask)))


class Spots(NamedTuple):
    """Packed sequences of prompt and response, and where the response tokens are predicted."""

    packed: Packed  # its mask is True on the tokens whose next one is a response token
    keep: Tensor | None  # [K], int64, of a single row the tokens that predict; None where all L of each row stay
    targets: Tensor  # [R, L], or [1, K], int64, the next token
    counts: Tensor  # of the same shape, bool, True where that is a response token
    at: Tensor  # [B, T], int64, where in R * L, or K, each response token is predicted; 0 where masked
    mask: Tensor  # [B, T], bool

    def spread(self, values: Tensor) -> Tensor:
        """``[R, L]``, or ``[1, K]``, values of the predictions as ``[B, T]``, 0 where masked."""
        return torch.where(self.mask, values.flatten()[self.at], 0)


def spots(
    ids: Tensor,  # [B, P + T]
    mask: Tensor,  # [B, T], bool
    prompt_lengths: Tensor,  # [B], int64, on the CPU
    lengths: Tensor,  # [B], int64, on the CPU
    *,
    flat: bool = False,
) -> Spots:
    """The sequences of ``ids``, prompts padded to the left and responses to the right, without that padding.

    They share rows as long as the longest of them (``first_fit``), or, ``flat``, a single one, which is filled up to a
    multiple of ``ROUND``. Only lengths that the CPU knows are looked at, so that nothing waits for the device.
    """
    width, before = ids.shape[1], ids.shape[1] - mask.shape[1]
    whole, prompts, answers = (x.tolist() for x in (prompt_lengths + lengths, prompt_lengths, lengths))
    longest = max(whole)
    room = _rounded(sum(whole)) if flat else longest
    rows = first_fit(whole, room)
    source = torch.zeros(len(rows), room, dtype=torch.long)  # what stands behind the last sequence nobody sees
    positions = (torch.arange(room) % longest).expand(len(rows), room).clone() if flat else torch.zeros_like(source)
    predicts, at = torch.zeros_like(source, dtype=torch.bool), torch.zeros(mask.shape, dtype=torch.long)
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            end, first = start + whole[i], start + prompts[i] - 1  # the prompt's last token predicts the first answer
            source[r, start:end] = torch.arange(i * width + before - prompts[i], i * width + before + answers[i])
            positions[r, start:end] = torch.arange(whole[i])
            predicts[r, first : first + answers[i]] = True
            at[i, : answers[i]] = torch.arange(r * room + first, r * room + first + answers[i])
            start = end
        if flat:
            positions[r, start:] = torch.arange(room - start) % longest
    keep, counts = _kept(predicts) if flat else (None, predicts)
    at = at if keep is None else torch.where(mask.cpu(), predicts.flatten().cumsum(0)[at] - 1, 0)
    moved = [None if x is None else x.to(ids.device, non_blocking=True)
             for x in (source, positions, predicts, keep, counts, at)]  # fmt: skip
    source, positions, predicts, keep, counts, at = moved
    packed = Packed(ids.flatten()[source], positions, predicts)
    targets = packed.ids.roll(-1, 1)
    return Spots(packed, keep, targets if keep is None else targets[:, keep], counts, at, mask)


def _rounded(count: int) -> int:
    return max(1, -(-count // ROUND)) * ROUND


def _kept(
    predicts: Tensor,  # [1, L], bool
) -> tuple[Tensor, Tensor]:
    """Where ``predicts`` is True, up to a multiple of ``ROUND`` places, and ``[1, K]`` which of these it is."""
    found = predicts[0].nonzero().flatten()
    keep = torch.zeros(_rounded(len(found)), dtype=torch.long)
    keep[: len(found)] = found
    return keep, (torch.arange(len(keep)) < len(found))[None]


def packed_values(model: Any, packed: Packed) -> Tensor:
    """``[R, L]``, the scalar head at every token, in float32."""
    return scalar_head(model, _packed_hidden(model, packed))


def _packed_hidden(model: Any, packed: Packed) -> Tensor:
    with silent():
        output = unwrap(model).base_model(
            input_ids=packed.ids, **_places(model, packed), use_cache=False, return_dict=True
        )
    hidden: Tensor = output.last_hidden_state
    return hidden


def packed_logits(
    model: Any,
    packed: Packed,
    keep: Tensor | None = None,  # [K], int64
) -> Tensor:
    """``[R, L, V]`` logits, or those of the tokens ``keep`` alone; those at a token are of the next one.

    Where no mask is given transformers tells the sequences from the positions: by a block-diagonal mask, or by
    flash-attn's kernels for sequences of different lengths.
    """
    with silent():  # it warns of padding without a mask, which no sequence sees
        few = {"logits_to_keep": keep} if keep is not None and "logits_to_keep" in accepts(model) else {}
        output = model(input_ids=packed.ids, **_places(model, packed), **few, use_cache=False, return_dict=True)
    logits: Tensor = output.logits
    return logits if keep is None or few else logits[:, keep]


def _places(model: Any, packed: Packed) -> dict[str, Tensor]:
    """What tells ``model`` the sequences apart."""
    places = {"position_ids": packed.positions}
    return places | {"attention_mask": layout(packed.positions)} if uses_rows(model) else places


def prefer_varlen(model: Any, device: torch.device, precision: str) -> None:
    """Let ``model`` attend by flash-attn where that is installed and can: on a GPU, in bfloat16."""
    able = getattr(unwrap(model), "_supports_flash_attn", False)
    if able and device.type == "cuda" and precision == "bf16" and dispatch.find_spec("flash_attn") is not None:
        unwrap(model).set_attn_implementation("flash_attention_2")


def uses_varlen(model: Any) -> bool:
    """Whether ``model`` reads sequences of any length from a single row."""
    return uses_rows(model) or "flash" in str(getattr(unwrap(model).config, "_attn_implementation", ""))


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Raise ``ValueError`` where a sequence of ``model`` would see the others of its row."""
    name = type(unwrap(model)).__name__
    if "position_ids" not in accepts(model):
        raise ValueError(f"{name} takes no position_ids, so that its sequences cannot be packed")
    device, flash = next(model.parameters()).device, uses_varlen(model) and not uses_rows(model)
    sequences = [([1, 2, 3], [True] * 3), ([2, 1, 3, 1], [True] * 4)]
    with evaluating(model), torch.autocast(device.type, torch.bfloat16, enabled=flash):
        beside = _packed_hidden(model, pack([sequences], 0, device))[0, 3:].float()
        alone = _packed_hidden(model, pack([sequences[1:]], 0, device))[0].float()
    allowed = (3e-2 if flash else 1e-3) * alone.abs().max()
    if (alone - beside).abs().max() > allowed:
        raise ValueError(f"the sequences of {name} see each other when they are packed: use packing=false")
