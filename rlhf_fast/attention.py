"""Attention over a row of sequences without padding, for models that flash-attn cannot serve.

All of a model but its attention takes a token for itself, and there a row without padding saves what the padding would
cost. Attention alone gets the sequences one below the other, padded on the right, and gives its output back as a row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.pretrained import unwrap

NAME = "rlhf_fast_rows"  # as transformers' registries of attention functions and masks know it


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

    Where ``mask`` is a ``layout``, B is 1 and each sequence attends to itself, causally; otherwise this is sdpa.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    sdpa: Callable = sdpa_attention_forward
    if mask is None or mask.dtype != torch.int64:
        return sdpa(module, query, key, value, mask, **options)
    spots = (mask.flatten() >= 0).nonzero().flatten()  # of the tokens of the row, in their order
    shape = mask.shape[2:]
    wide = torch.promote_types(query.dtype, torch.float32)  # in bfloat16 the CPU's backward takes three times as long
    with torch.autocast(query.device.type, enabled=False):
        below = [_Spread.apply(x[0].transpose(0, 1).to(wide), spots, shape.numel()) for x in (query, key, value)]
        below = [x.unflatten(0, shape).transpose(1, 2) for x in below]
        found = sdpa(module, *below, None, **{**options, "is_causal": True})[0]
    return _Gather.apply(found.flatten(0, 1), spots)[None].to(query.dtype), None


class _Spread(torch.autograd.Function):
    """Rows ``[N, ...]`` at ``spots`` of ``[size, ...]`` zeros; unlike that of an index, its gradient only copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spots: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(spots)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, spots, x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return slope.index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """The rows at ``spots``, none of which is named twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spots: Tensor) -> Tensor:
        ctx.save_for_backward(spots)
        ctx.size = x.shape[0]
        return x.index_select(0, spots)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        zeros = slope.new_zeros(ctx.size, *slope.shape[1:])
        return zeros.index_copy_(0, ctx.saved_tensors[0], slope), None
