"""Chosen-token logprob, entropy and logsumexp of every row of logits, differentiable, and no float32 copy of them."""

from collections.abc import Iterator
from itertools import product
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.dispatch import define
from rlhf_fast.ops.checks import FLOATS, INTEGERS, check_positive, check_tensor

#: The reference works on so many logits at a time: its float32 scratch fits in the cache.
CHUNK = 1 << 19


class LogprobsOutput(NamedTuple):
    """What `logprobs` returns; every field has the shape of ``ids``."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor


def logprobs(
    logits: Tensor,  # [..., V]
    ids: Tensor,  # [...], integer
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,  # [...], bool
) -> LogprobsOutput:
    """Logprob of ``ids``, entropy (nats) and logsumexp under ``softmax(z)``, for every row of the logits.

    With ``z = softcap * tanh(logits / softcap) / temperature`` (Gemma 2's soft cap, if there is one)::

        lse     = log sum_i exp(z_i)
        logprob = z_y - lse
        entropy = lse - sum_i p_i z_i,   p = softmax(z)

    All three are differentiable with respect to the logits, in one backward. A logit of -inf is a token of
    probability 0; a row of nothing else gives what ``log_softmax`` gives, NaN.

    Args:
        logits: ``[..., V]``, any strides, taken as they are and never modified.
        ids: ``[...]``, the chosen token of each row.
        temperature: divides the logits after the cap, above 0.
        softcap: bound of the logits, above 0; None for no cap.
        mask: ``[...]``, True where a row counts; elsewhere the results are 0 and nothing that is stored there is used.

    Returns:
        `LogprobsOutput` of three ``[...]`` tensors: float32, or float64 for float64 logits.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or range.
        IndexError: an id outside ``[0, V)`` in a row that counts, on the CPU. On a GPU that row becomes NaN.
    """
    check_tensor("logprobs", "logits", logits, dtypes=FLOATS)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logprobs: logits must be [..., V] with V at least 1, got {list(logits.shape)}")
    rows, device = logits.shape[:-1], logits.device
    rule = "like logits without its last dimension"
    check_tensor("logprobs", "ids", ids, dtypes=INTEGERS, shape=rows, rule=rule, device=device)
    if mask is not None:
        check_tensor("logprobs", "mask", mask, dtypes=(torch.bool,), shape=rows, rule=rule, device=device)
    check_positive("logprobs", "temperature", temperature)
    if softcap is not None:
        check_positive("logprobs", "softcap", softcap)
    return LogprobsOutput(*_logprobs(logits, ids, mask, temperature=temperature, softcap=softcap))


def reference(
    logits: Tensor,  # [..., V]
    ids: Tensor,  # [...]
    mask: Tensor | None = None,  # [...], bool
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula on a few rows at a time."""
    chosen, valid, inside = flat_rows("logprobs", ids, mask, logits.shape[-1])
    chosen_logprobs, entropy, lse = outputs = [o.view(-1) for o in _fake(logits, ids)]
    for at, block in row_blocks(logits):
        z = scaled(block, temperature, softcap)
        shifted, weights, total, lse[at] = normalised(z)
        chosen_logprobs[at] = shifted.gather(-1, chosen[at, None])[:, 0] - total.log()
        entropy[at] = entropy_of(shifted, weights, total)
    for output in outputs:
        output.masked_fill_(~inside, torch.nan).masked_fill_(~valid, 0)
    return chosen_logprobs.view(ids.shape), entropy.view(ids.shape), lse.view(ids.shape)


def backward(
    grad_logprobs: Tensor,  # [...]
    grad_entropy: Tensor,  # [...]
    grad_lse: Tensor,  # [...]
    logits: Tensor,  # [..., V]
    ids: Tensor,  # [...]
    entropy: Tensor,  # [...]
    lse: Tensor,  # [...]
    mask: Tensor | None = None,  # [...], bool
    *,
    temperature: float,
    softcap: float | None = None,
) -> Tensor:
    """Gradient of the logits: ``g (1[i=y] - p_i) - h p_i (log p_i + H) + l p_i``, times ``dz/dlogit``.

    All in float32, rounded once at the end: ``1 - p_y`` in bfloat16 would lose a confident token's gradient.
    """
    chosen, valid, _ = flat_rows("logprobs", ids, mask, logits.shape[-1])
    g, h, l, entropy, lse = (t.reshape(-1, 1) for t in (grad_logprobs, grad_entropy, grad_lse, entropy, lse))
    grad = _fake_backward(g, h, l, logits)
    flat = grad.view(-1, logits.shape[-1])
    for at, block in row_blocks(logits):
        z = scaled(block, temperature, softcap)
        logp = z - lse[at]
        # A token of probability 0 has no gradient: a select, for 0 * -inf is NaN.
        dz = torch.where(logp == -inf, 0, logp.exp() * (l[at] - g[at] - h[at] * (logp + entropy[at])))
        dz.scatter_(-1, chosen[at, None], dz.gather(-1, chosen[at, None]) + g[at])
        if softcap is not None:
            dz *= 1 - (z * (temperature / softcap)) ** 2
        flat[at] = torch.where(valid[at, None], dz / temperature, 0).to(grad.dtype)
    return grad


def flat_rows(
    op: str,
    ids: Tensor,  # [...]
    mask: Tensor | None,  # [...], bool
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids fit for ``gather``, which rows count, and which of them have an id in ``[0, size)``; ``[N]`` each."""
    ids = ids.reshape(-1).to(torch.int64)
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.reshape(-1)
    inside = (ids >= 0) & (ids < size) | ~valid
    if ids.device.type == "cpu" and not bool(inside.all()):
        row = int(torch.nonzero(~inside)[0])
        raise IndexError(f"{op}: ids must be in [0, {size}), got {int(ids[row])} in row {row}")
    return ids.clamp(0, size - 1), valid, inside


def row_blocks(
    logits: Tensor,  # [..., V]
    *others: Tensor,  # [..., V]
) -> Iterator[tuple[Any, ...]]:
    """Views ``[n, V]`` of a few rows at a time, each with the slice of the flattened rows that it covers."""
    shape, size = logits.shape[:-1], logits.shape[-1]
    step, start = max(1, CHUNK // size), 0
    for index in product(*(range(n) for n in shape[: _outer_dims(shape, logits, *others)])):
        inner = [t[index].reshape(-1, size) for t in (logits, *others)]
        for first in range(0, inner[0].shape[0], step):
            block = [t[first : first + step] for t in inner]
            yield slice(start, start + block[0].shape[0]), *block
            start += block[0].shape[0]


def _outer_dims(shape: torch.Size, *tensors: Tensor) -> int:
    """How many leading dimensions to walk through so that what is below is ``[n, V]`` in every tensor's own strides."""
    inner = len(shape) - 1
    for outer in range(len(shape)):
        if all(t.stride(d) == t.stride(d + 1) * t.shape[d + 1] for t in tensors for d in range(outer, inner)):
            return outer
    return 0


def scaled(
    block: Tensor,  # [n, V]
    temperature: float,
    softcap: float | None = None,
) -> Tensor:
    """Logits in float32 (float64), after the cap and the temperature."""
    z = block.to(torch.float64 if block.dtype == torch.float64 else torch.float32)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z if temperature == 1 else z / temperature


def normalised(
    z: Tensor,  # [n, V]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``z`` minus its maximum, exp of that, the sum of that, and the logsumexp of ``z``."""
    top = z.amax(-1, keepdim=True)
    top = torch.where(top == -inf, 0, top)  # else -inf - -inf
    shifted = z - top
    weights = shifted.exp()
    total = row_sum(weights)
    return shifted, weights, total, top[:, 0] + total.log()


def entropy_of(
    shifted: Tensor,  # [n, V], see `normalised`
    weights: Tensor,  # [n, V]
    total: Tensor,  # [n]
) -> Tensor:
    """Entropy of the softmax; a token of probability 0 adds 0, a select, for ``0 * -inf`` is NaN."""
    return total.log() - row_sum(torch.where(weights > 0, weights * shifted, 0)) / total


def row_sum(
    values: Tensor,  # [n, V]
) -> Tensor:
    """``values.sum(-1)`` by halves: bits that depend on V alone, not on the number of rows or of threads."""
    while values.shape[-1] > 1:
        half = (values.shape[-1] + 1) // 2
        rest = values[:, half:]
        if values.shape[-1] % 2:
            rest = torch.nn.functional.pad(rest, (0, 1))
        values = values[:, :half] + rest
    return values[:, 0]


def _fake(logits: Tensor, ids: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    first, second, third = (logits.new_empty(ids.shape, dtype=dtype) for _ in range(3))
    return first, second, third


def _fake_backward(
    grad_logprobs: Tensor, grad_entropy: Tensor, grad_lse: Tensor, logits: Tensor, *_: Any, **__: Any
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple) -> None:
    logits, ids, mask = inputs
    _, entropy, lse = output
    ctx.save_for_backward(logits, ids, entropy, lse, mask)
    ctx.numbers = keyword_only_inputs


def _gradient(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, grad_lse: Tensor) -> tuple:
    return _logprobs_backward(grad_logprobs, grad_entropy, grad_lse, *ctx.saved_tensors, **ctx.numbers), None, None


_logprobs_backward = define(
    "logprobs_backward(Tensor grad_logprobs, Tensor grad_entropy, Tensor grad_lse, Tensor logits, Tensor ids, "
    "Tensor entropy, Tensor lse, Tensor? mask=None, *, float temperature, float? softcap=None) -> Tensor",
    backward,
    _fake_backward,
)
_logprobs = define(
    "logprobs(Tensor logits, Tensor ids, Tensor? mask=None, *, float temperature=1.0, float? softcap=None) "
    "-> (Tensor, Tensor, Tensor)",
    reference,
    _fake,
    backward=_gradient,
    setup_context=_setup_context,
)
