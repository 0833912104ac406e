"""Sampling the next token: every filter, one draw and the logprobs of what was drawn, row by row independent."""

from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.dispatch import define
from rlhf_fast.ops.checks import FLOATS, INTEGERS, check_tensor
from rlhf_fast.ops.sample.draw import at, invert, row_sum, sum_tree, uniform
from rlhf_fast.ops.sample.filters import divided, greedy, kept, processed
from rlhf_fast.ops.sample.knobs import PENALTIES, knob, out_of_range, per_token

#: The reference works on so many logits at a time: its float64 scratch stays below about 300 MB.
CHUNK = 1 << 22


class SampleOutput(NamedTuple):
    """What `sample` returns; every field is ``[B]``."""

    ids: Tensor  # int64; -1 where status is not 0
    logprobs: Tensor  # under the distribution that was drawn from
    policy_logprobs: Tensor  # under the unfiltered softmax at that temperature
    kept_logmass: Tensor  # policy_logprobs - logprobs
    entropy: Tensor  # of the unfiltered softmax at that temperature
    kept: Tensor  # int64: how many tokens could have been drawn
    status: Tensor  # int8: 0 ok, 1 NaN or +inf logits, 2 nothing left to draw from


def sample(
    logits: Tensor,  # [B, V]
    *,
    temperature: float | Tensor = 1.0,  # number or [B]
    top_k: int | Tensor = 0,  # number or [B], integer
    top_p: float | Tensor = 1.0,  # number or [B]
    min_p: float | Tensor = 0.0,  # number or [B]
    repetition_penalty: float | Tensor = 1.0,  # number or [B]
    presence_penalty: float | Tensor = 0.0,  # number or [B]
    frequency_penalty: float | Tensor = 0.0,  # number or [B]
    token_counts: Tensor | None = None,  # [B, V], integer
    logit_bias: Tensor | None = None,  # [B, V] or [V]
    allowed: Tensor | None = None,  # [B, V] or [V], bool
    seeds: Tensor | None = None,  # [B], integer
    positions: int | Tensor | None = None,  # number or [B], integer
) -> SampleOutput:
    """Draw one token per row by inverse CDF; the filters and their ties are those of transformers, in its order.

    Order: bias, penalties, ``/temperature``, ``allowed``, top-k, top-p (on the renormalised top-k), min-p. Top-k keeps
    every token that ties with the k-th; top-p removes, from the least likely up, while the removed mass is at most
    ``1 - top_p``; min-p removes what is less likely than ``min_p`` times the likeliest. Row ``i`` depends on its own
    logits, ``seeds[i]`` and ``positions[i]`` alone, to the last bit: its one 53-bit uniform comes from Philox4x32-10
    (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), the seed as key and the position as counter.

    Args:
        logits: ``[B, V]``, float; -inf is a token that cannot be drawn.
        temperature: divides the logits; 0 takes the likeliest token (the first of equals).
        top_k: so many tokens are kept; off at ``<= 0`` and ``>= V``.
        top_p: the mass of the nucleus (Holtzman et al. 2020); ``<= 0`` takes the likeliest token, ``>= 1`` is off.
        min_p: threshold relative to the likeliest token, in [0, 1]; 0 is off.
        repetition_penalty: a token with a count has its logit divided by this if positive, else multiplied.
        presence_penalty: subtracted from the logit of every token with a count.
        frequency_penalty: subtracted from the logit once per count.
        token_counts: how often each token occurred so far; needed by the three penalties.
        logit_bias: added to the logits.
        allowed: False where a token may not be drawn.
        seeds: one per row; drawn from torch's generator if absent.
        positions: which draw of its seed a row takes, such as the position in the sequence; 0 if absent.

    Returns:
        `SampleOutput`, detached. Floats are float32 (float64 for float64 logits). ``policy_logprobs`` is what
        ``logprobs(logits, ids, temperature=temperature)`` gives later, and ``entropy`` belongs to it: no bias, penalty
        or filter; where the temperature is 0 both are taken at 1. ``logprobs`` is 0 for a token that was taken as the
        likeliest. Where ``status`` is not 0, ``ids`` is -1, ``kept`` 0 and the floats NaN; other rows do not notice.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or knob. The values of knob tensors are looked at on the
            CPU only; on a GPU and under ``torch.compile`` a row with a knob out of range gets status 2.
    """
    check_tensor("sample", "logits", logits, dtypes=FLOATS)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"sample: logits must be [B, V] with V at least 1, got {list(logits.shape)}")
    given = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }  # fmt: skip
    knobs = {name: knob(name, value, logits) for name, value in given.items()}
    for name in PENALTIES:
        if knobs[name] is not None and token_counts is None:
            raise ValueError(f"sample: {name} needs token_counts")
    counts = per_token("token_counts", token_counts, INTEGERS, logits)
    bias = per_token("logit_bias", logit_bias, FLOATS, logits)
    permitted = per_token("allowed", allowed, (torch.bool,), logits)
    rows, device = logits.shape[0], logits.device
    if seeds is None:
        seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), device=device)
    check_tensor("sample", "seeds", seeds, dtypes=INTEGERS, shape=(rows,), rule="[B]", device=device)
    if not isinstance(positions, Tensor):
        positions = torch.full((rows,), positions or 0, dtype=torch.int64, device=device)
    check_tensor("sample", "positions", positions, dtypes=INTEGERS, shape=(rows,), rule="[B]", device=device)
    keys = seeds.to(torch.int64), positions.to(torch.int64)
    all_of_them = (logits, *keys, *knobs.values(), counts, bias, permitted)
    return SampleOutput(*_sample(*(None if x is None else x.detach() for x in all_of_them)))


def reference(
    logits: Tensor,  # [B, V]
    seeds: Tensor,  # [B], int64
    positions: Tensor,  # [B], int64
    temperature: Tensor | None = None,  # [B], float64, as the other knobs; None is off
    top_k: Tensor | None = None,  # [B], int64
    top_p: Tensor | None = None,  # [B]
    min_p: Tensor | None = None,  # [B]
    repetition_penalty: Tensor | None = None,  # [B]
    presence_penalty: Tensor | None = None,  # [B]
    frequency_penalty: Tensor | None = None,  # [B]
    token_counts: Tensor | None = None,  # [B, V]
    logit_bias: Tensor | None = None,  # [B, V]
    allowed: Tensor | None = None,  # [B, V], bool
) -> tuple[Tensor, ...]:
    """The formula of `sample`, on a few rows at a time."""
    tensors = {
        "logits": logits, "seeds": seeds, "positions": positions, "temperature": temperature, "top_k": top_k,
        "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty,
        "counts": token_counts, "bias": logit_bias, "allowed": allowed,
    }  # fmt: skip
    step = max(1, CHUNK // logits.shape[1])
    starts = range(0, max(1, logits.shape[0]), step)
    parts = [_rows({n: None if t is None else t[i : i + step] for n, t in tensors.items()}) for i in starts]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]


def _rows(given: dict[str, Any]) -> tuple[Tensor, ...]:
    logits, allowed = given["logits"], given["allowed"]
    temperature, top_k, top_p, min_p = (given[name] for name in ("temperature", "top_k", "top_p", "min_p"))
    penalties = {name: given[name] for name in PENALTIES}
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    raw = logits.to(dtype)
    scores = processed(raw, given["bias"], given["counts"], penalties)
    top = scores.amax(-1)
    broken = torch.isnan(top) | (top == inf)
    if allowed is not None:
        scores = torch.where(allowed, scores, -inf)
        top = scores.amax(-1)
    policy = _softmax(raw, temperature)
    drawn = policy if scores is raw else _softmax(scores, temperature)
    keep = kept(scores, drawn.logits, drawn.weights, temperature, top_k, top_p, min_p)
    tree = drawn.tree if keep is None else sum_tree(torch.where(keep, drawn.weights, 0))
    total = tree[-1][:, 0]
    ids = invert(tree, uniform(given["seeds"], given["positions"]) * total)
    support = scores > -inf if keep is None else (scores > -inf) & keep
    count, logprobs = support.sum(-1), at(drawn.logits, ids) - total.log()
    if temperature is not None or top_p is not None:
        likeliest = greedy(top, temperature, top_p)
        ids = torch.where(likeliest, scores.argmax(-1), ids)
        count, logprobs = torch.where(likeliest, 1, count), torch.where(likeliest, 0.0, logprobs)
    knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, **penalties}
    empty = (top == -inf) | out_of_range(knobs, top)
    status = torch.where(broken, 1, torch.where(empty, 2, 0)).to(torch.int8)
    log_total = policy.tree[-1][:, 0].log()
    spread = torch.where(policy.weights > 0, policy.weights * policy.logits, 0)  # 0 * -inf counts 0
    entropy = log_total - row_sum(spread) / policy.tree[-1][:, 0]
    of_ids = at(policy.logits, ids) - log_total
    logprobs, of_ids, entropy = (torch.where(status == 0, f, torch.nan).to(dtype) for f in (logprobs, of_ids, entropy))
    ids, count = torch.where(status == 0, ids, -1), torch.where(status == 0, count, 0)
    return ids, logprobs, of_ids, of_ids - logprobs, entropy, count, status


class _Softmax(NamedTuple):
    logits: Tensor  # [B, V], divided by the temperature and shifted so that the largest is 0, float64
    weights: Tensor  # [B, V], exp of it
    tree: list[Tensor]  # their sums


def _softmax(scores: Tensor, temperature: Tensor | None) -> _Softmax:
    logits = divided(scores.double() - scores.amax(-1, keepdim=True).double(), temperature)
    weights = logits.exp()
    return _Softmax(logits, weights, sum_tree(weights))


def _fake(logits: Tensor, seeds: Tensor, positions: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    rows, dtype = logits.shape[:1], torch.float64 if logits.dtype == torch.float64 else torch.float32
    ids, kept = (logits.new_empty(rows, dtype=torch.int64) for _ in range(2))
    drawn, policy, mass, entropy = (logits.new_empty(rows, dtype=dtype) for _ in range(4))
    return ids, drawn, policy, mass, entropy, kept, logits.new_empty(rows, dtype=torch.int8)


def _scratch(logits: Tensor, *others: Tensor | None, **named: Tensor | None) -> Tensor:
    # What the CUDA kernel keeps of 1024 tokens, twice where the scores are not the logits, and a number for each 256.
    per_token = (*others[9:], *(named.get(name) for name in ("token_counts", "logit_bias", "allowed")))
    kinds = 1 if all(t is None for t in per_token) else 2
    words = (8 if logits.dtype == torch.float64 else 4) * kinds + 4
    return logits.new_empty(logits.shape[0] * -(-logits.shape[1] // 1024) * words, dtype=torch.float64)


_sample = define(
    "sample(Tensor logits, Tensor seeds, Tensor positions, Tensor? temperature=None, Tensor? top_k=None, "
    "Tensor? top_p=None, Tensor? min_p=None, Tensor? repetition_penalty=None, Tensor? presence_penalty=None, "
    "Tensor? frequency_penalty=None, Tensor? token_counts=None, Tensor? logit_bias=None, Tensor? allowed=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference,
    _fake,
    scratch=_scratch,
)
