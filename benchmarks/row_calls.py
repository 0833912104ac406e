"""Arguments of the Triton functions over rows of logits, for benchmarks/resources.py to compile them."""

from collections.abc import Callable
from functools import partial

import torch


def kl_call(dtypes: str, index: torch.dtype | None, masked: bool, vocabulary: str, length: int) -> list:
    """Arguments of the Triton function ``kl``; ``dtypes`` of the two models, the same where there is one word."""
    dtype, ref_dtype = (getattr(torch, dtypes.split()[i]) for i in (0, -1))
    wide = torch.float64 in (dtype, ref_dtype)
    kl, logprobs, ref_logprobs, *rest = (
        torch.empty(4, dtype=torch.float64 if wide else torch.float32) for _ in "123456"
    )
    if index is None:
        logprobs, ref_logprobs = logprobs[:0], ref_logprobs[:0]
    size = VOCABULARIES[vocabulary](length)
    return [torch.empty(4, size, dtype=dtype), torch.empty(4, size, dtype=ref_dtype), choice(index),
            choice(torch.bool if masked else None), 0.7, kl, logprobs, ref_logprobs, *rest]  # fmt: skip


def kl_backward_call(dtypes: str, index: torch.dtype | None, masked: bool, vocabulary: str, length: int) -> list:
    """Arguments of the Triton function ``kl_backward``."""
    logits, ref_logits, ids, mask, temperature, *outputs = kl_call(dtypes, index, masked, vocabulary, length)
    kl, logprobs, _, *rest = outputs
    return [kl, logprobs, kl, logits, ref_logits, kl, *rest, ids, mask, temperature, torch.empty_like(logits)]


def logprobs_call(
    dtypes: str, index: torch.dtype, masked: bool, vocabulary: str, softcap: float | None, length: int
) -> list:
    """Arguments of the Triton function ``logprobs``."""
    logits = torch.empty(4, VOCABULARIES[vocabulary](length), dtype=getattr(torch, dtypes))
    rows = [torch.empty(4, dtype=torch.float64 if dtypes == "float64" else torch.float32) for _ in range(3)]
    return [logits, choice(index), choice(torch.bool if masked else None), 0.7, softcap, *rows]


def logprobs_backward_call(
    dtypes: str, index: torch.dtype, masked: bool, vocabulary: str, softcap: float | None, length: int
) -> list:
    """Arguments of the Triton function ``logprobs_backward``."""
    logits, ids, mask, temperature, softcap, *rows = logprobs_call(dtypes, index, masked, vocabulary, softcap, length)
    return [*rows, logits, ids, *rows[1:], mask, temperature, softcap, torch.empty_like(logits)]


def choice(dtype: torch.dtype | None) -> torch.Tensor | None:
    """An id, or whether it counts, of each of four rows."""
    return None if dtype is None else torch.empty(4, dtype=dtype)


#: Which rows are read 16 bytes at a time, and which are not.
VOCABULARIES = {"even": lambda length: 8 * length, "odd": lambda length: 8 * length + 1}
ROW_VARIANTS = (
    ("float32", torch.int64, False, "even"),
    ("float32", torch.int64, False, "odd"),
    ("bfloat16", torch.int64, True, "even"),
    ("bfloat16", torch.int64, True, "odd"),
    ("float64", torch.int64, True, "even"),
)
LOGPROBS_VARIANTS = (
    *((*variant, None) for variant in ROW_VARIANTS),
    ("float16", torch.int32, True, "even", 30.0),
    ("float16", torch.int32, True, "odd", 30.0),
)
KL_VARIANTS = (
    *ROW_VARIANTS,
    ("float16", None, True, "even"),
    ("bfloat16 float32", torch.int32, False, "even"),
    ("bfloat16 float32", torch.int32, False, "odd"),
)


def row_calls(op: str, call: Callable, variants: tuple) -> dict[str, Callable[[int], list]]:
    """A name for each variant of an op on rows of logits."""
    calls = {}
    for dtypes, index, masked, vocabulary, *softcap in variants:
        words = [op, dtypes, *["mask"] * masked, *["softcap"] * any(softcap), *["no ids"] * (index is None), vocabulary]
        calls[" ".join(words)] = partial(call, dtypes, index, masked, vocabulary, *softcap)
    return calls


#: Triton op → name of a variant → its arguments at a length: every combination that compiles to something of its own.
ROW_CALLS = {
    "kl": row_calls("kl", kl_call, KL_VARIANTS),
    "kl_backward": row_calls("kl_backward", kl_backward_call, KL_VARIANTS),
    "logprobs": row_calls("logprobs", logprobs_call, LOGPROBS_VARIANTS),
    "logprobs_backward": row_calls("logprobs_backward", logprobs_backward_call, LOGPROBS_VARIANTS),
}
