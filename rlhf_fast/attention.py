"""Attention over a row of sequences without padding, for models that flash-attn cannot serve.

All of a model but its attention takes a token for itself, and there a row without padding saves what the padding would
cost. Attention alone gets the sequences one below the other, padded on the right, and gives its output back as a row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.pretrained import unwrap

NAME = "rlhf_fast_rows"  # as transformers' registries of attention functions and masks know it
SHORT = 128  # tokens up to which two batched products take less time than PyTorch's flash kernel for the CPU


def use_rows(model: Any) -> None:
    """Let ``model`` attend by ``attend``: with any other mask than a ``layout`` it attends as by sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    unwrap(model).set_attn_implementation(NAME)


def leave_rows(model: Any) -> None:
    """Undo ``use_rows``."""
    unwrap(model).set_attn_implementation("sdpa")


def uses_rows(model: Any) -> bool:
    """Whether ``model`` was prepared by ``use_rows``."""
    return getattr(unwrap(model).config, "_attn_implementation", None) == NAME


def can_use_rows(model: Any) -> bool:
    """Whether all that ``model`` attends to are the tokens before, at any distance: so far, what ``attend`` does."""
    config = unwrap(model).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    windows = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    plain = all(window is None for window in windows) and getattr(config, "attn_logit_softcapping", None) is None
    return plain and bool(getattr(unwrap(model), "_supports_sdpa", False)) and config._attn_implementation == "sdpa"


def layout(
    positions: Tensor,  # [1, L], int64, 0 where a sequence begins
) -> Tensor:
    """``[1, 1, S, M]`` int64: for S sequences of at most M tokens the place of each token in the row, -1 for none."""
    starts = (positions[0] == 0).nonzero().flatten()
    ends = torch.cat([starts[1:], starts.new_tensor([positions.shape[1]])])
    columns = torch.arange(int((ends - starts).max()), device=positions.device)
    places = starts[:, None] + columns
    return torch.where(places < ends[:, None], places, -1)[None, None]


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """Attention of transformers' interface: ``[B, heads, L, D]`` → ``[B, L, heads, D]`` and no weights.

    Where ``mask`` is a ``layout``, B is 1 and each sequence attends to itself, causally; otherwise this is sdpa. Rows
    and single tokens attend in float32 at least: a CPU whose products of bfloat16 are fast takes three times as long
    for this in bfloat16.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    sdpa: Callable = sdpa_attention_forward
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    if mask is not None and mask.dtype == torch.int64:
        with torch.autocast(query.device.type, enabled=False):
            found = _attend_rows(query.to(wide), key.to(wide), value.to(wide), mask[0, 0], scale, partial(sdpa, module))
    elif query.shape[2] == 1 and _of_tokens(mask) and not options.get("dropout"):
        with torch.autocast(query.device.type, enabled=False):
            found = _attend_token(query.to(wide), key.to(wide), value.to(wide), mask, scale)
    else:
        return sdpa(module, query, key, value, mask, **options)
    return found.to(query.dtype), None


def _attend_rows(
    query: Tensor,  # [1, heads, L, D]
    key: Tensor,  # [1, heads or fewer, L, D]
    value: Tensor,
    places: Tensor,  # [S, M], int64, a ``layout``
    scale: float,
    sdpa: Callable,
) -> Tensor:  # [1, L, heads, D]
    spots = (places.flatten() >= 0).nonzero().flatten()  # of the tokens of the row, in their order
    (count, longest), heads = places.shape, query.shape[1]
    below = [_Spread.apply(x[0], spots, places.numel()) for x in (query, key, value)]
    if longest <= SHORT and key.shape[1] == heads:
        flat = [x.view(heads * count, longest, -1) for x in below]
        later = torch.full((longest, longest), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
        found = _products(*flat, later, scale).view(heads, places.numel(), -1)
    else:
        parts = [x.unflatten(1, places.shape).transpose(0, 1) for x in below]
        found = sdpa(*parts, None, scaling=scale, is_causal=True)[0].flatten(0, 1).transpose(0, 1)
    return _Gather.apply(found, spots).transpose(0, 1)[None]


def _of_tokens(mask: Tensor | None) -> bool:
    """Whether ``mask`` is None, or bool ``[B, 1, 1, M]``: the tokens that are there, for all heads."""
    return mask is None or (mask.dtype == torch.bool and mask.shape[1:3] == (1, 1))


def _attend_token(
    query: Tensor,  # [B, heads, 1, D]
    key: Tensor,  # [B, heads or fewer, M, D]
    value: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:  # [B, 1, heads, D]
    few = key.shape[1]  # heads that share a key are the queries of one product
    flat = query.unflatten(1, (few, -1)).squeeze(3).flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    bias = query.new_zeros(1, 1, 1)
    if mask is not None:
        bias = torch.where(mask[:, :, 0], 0.0, -torch.inf).to(query.dtype).repeat_interleave(few, 0)
    return _products(*flat, bias, scale).view(query.shape[0], 1, query.shape[1], -1)


def _products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention of ``[N, L, D]`` to ``[N, M, D]`` by two products; ``bias`` is added to the ``[N, L, M]`` scores."""
    scores = bias.expand(query.shape[0], query.shape[1], key.shape[1])
    return torch.baddbmm(scores, query, key.transpose(1, 2), alpha=scale).softmax(-1) @ value


class _Spread(torch.autograd.Function):
    """``[heads, L, D]`` at ``spots`` of ``[heads, size, D]`` zeros; unlike an index's, its gradient only copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spots: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(spots)
        return x.new_zeros(x.shape[0], size, x.shape[2]).index_copy_(1, spots, x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return slope.index_select(1, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """``[heads, size, D]`` at ``spots``, none of which is named twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spots: Tensor) -> Tensor:
        ctx.save_for_backward(spots)
        ctx.size = x.shape[1]
        return x.index_select(1, spots)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        zeros = slope.new_zeros(slope.shape[0], ctx.size, slope.shape[2])
        return zeros.index_copy_(1, ctx.saved_tensors[0], slope), None
