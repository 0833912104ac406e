"""Sampling the next token: every filter, one draw and the logprobs of what was drawn, row by row independent."""

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.dispatch import define
from rlhf_fast.ops.checks import FLOATS, INTEGERS, check_tensor

#: knob → (the rule, the test of it, the value that turns the knob off).
KNOBS: dict[str, tuple[str, Callable[[Any], Any], float | None]] = {
    "temperature": ("finite and not negative", lambda v: (v >= 0) & (v < inf), 1.0),
    "top_k": ("an integer", lambda v: v == v, None),
    "top_p": ("a number", lambda v: v == v, None),
    "min_p": ("between 0 and 1", lambda v: (v >= 0) & (v <= 1), 0.0),
    "repetition_penalty": ("finite and above 0", lambda v: (v > 0) & (v < inf), 1.0),
    "presence_penalty": ("finite", lambda v: abs(v) < inf, 0.0),
    "frequency_penalty": ("finite", lambda v: abs(v) < inf, 0.0),
}
#: The reference works on so many logits at a time: its float64 scratch stays below about 200 MB.
CHUNK = 1 << 22
WORD = 0xFFFFFFFF


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
        ``logprobs(logits, ids, temperature=temperature)`` gives later, and ``entropy`` belongs to it: no bias, penalty or
        filter; where the temperature is 0 both are taken at 1. ``logprobs`` is 0 for a token that was taken as the
        likeliest. Where ``status`` is not 0, ``ids`` is -1, ``kept`` 0 and the floats NaN; the other rows do not notice.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or knob. The values of knob tensors are looked at on the
            CPU only; on a GPU and under ``torch.compile`` a row with a knob out of range gets status 2.
    """
    check_tensor("sample", "logits", logits, dtypes=FLOATS)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"sample: logits must be [B, V] with V at least 1, got {list(logits.shape)}")
    knobs = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }  # fmt: skip
    given = {name: _knob(name, value, logits) for name, value in knobs.items()}
    if token_counts is None:
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            if given[name] is not None:
                raise ValueError(f"sample: {name} needs token_counts")
    counts = _per_token("token_counts", token_counts, INTEGERS, logits)
    bias = _per_token("logit_bias", logit_bias, FLOATS, logits)
    permitted = _per_token("allowed", allowed, (torch.bool,), logits)
    rows, device = logits.shape[0], logits.device
    if seeds is None:
        seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), device=device)
    check_tensor("sample", "seeds", seeds, dtypes=INTEGERS, shape=(rows,), rule="[B]", device=device)
    if not isinstance(positions, Tensor):
        positions = torch.full((rows,), positions or 0, dtype=torch.int64, device=device)
    check_tensor("sample", "positions", positions, dtypes=INTEGERS, shape=(rows,), rule="[B]", device=device)
    keys = seeds.to(torch.int64), positions.to(torch.int64)
    return SampleOutput(*_sample(logits.detach(), *keys, *given.values(), counts, bias, permitted))


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
    """`_rows` on a few rows at a time."""
    arguments = (
        logits, seeds, positions, temperature, top_k, top_p, min_p,
        repetition_penalty, presence_penalty, frequency_penalty, token_counts, logit_bias, allowed,
    )  # fmt: skip
    step = max(1, CHUNK // logits.shape[1])
    if logits.shape[0] <= step:
        return _rows(*arguments)
    starts = range(0, logits.shape[0], step)
    parts = [_rows(*(None if a is None else a[start : start + step] for a in arguments)) for start in starts]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class _Softmax(NamedTuple):
    """A distribution over the vocabulary, unnormalised and in float64."""

    logits: Tensor  # [B, V], divided by the temperature, the largest is 0
    weights: Tensor  # [B, V], exp of it
    tree: list[Tensor]  # sums of the weights, see `_tree`

    @property
    def total(self) -> Tensor:
        return self.tree[-1][:, 0]


def _rows(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    *rest: Tensor | None,
) -> tuple[Tensor, ...]:
    *penalties, counts, bias, allowed = rest
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    raw = logits.to(dtype)
    scores = _processed(raw, bias, counts, *penalties)
    top = scores.amax(-1)
    broken = torch.isnan(top) | (top == inf)
    if allowed is not None:
        scores = torch.where(allowed, scores, -inf)
        top = scores.amax(-1)
    policy = _softmax(raw, temperature)
    drawn = policy if scores is raw else _softmax(scores, temperature)
    keep = _keep(scores, drawn, temperature, top_k, top_p, min_p)
    tree = drawn.tree if keep is None else _tree(torch.where(keep, drawn.weights, 0))
    total = tree[-1][:, 0]
    ids = _invert(tree, _uniform(seeds, positions) * total)
    support = scores > -inf
    kept = (support if keep is None else support & keep).sum(-1)
    logprobs = _at(drawn.logits, ids) - total.log()
    if temperature is not None or top_p is not None:
        greedy = _greedy(top, temperature, top_p)
        ids = torch.where(greedy, scores.argmax(-1), ids)
        logprobs, kept = torch.where(greedy, 0.0, logprobs), torch.where(greedy, 1, kept)
    wrong = _out_of_range(top, (temperature, top_k, top_p, min_p, *penalties))
    status = torch.where(broken, 1, torch.where(wrong | (top == -inf), 2, 0)).to(torch.int8)
    policy_logprobs = _at(policy.logits, ids) - policy.total.log()
    spread = torch.where(policy.weights > 0, policy.weights * policy.logits, 0)  # 0 * -inf is 0 here
    entropy = policy.total.log() - _tree(spread)[-1][:, 0] / policy.total
    drawn_at, policy_at, entropy = (
        torch.where(status == 0, f, torch.nan).to(dtype) for f in (logprobs, policy_logprobs, entropy)
    )
    ids, kept = torch.where(status == 0, ids, -1), torch.where(status == 0, kept, 0)
    return ids, drawn_at, policy_at, policy_at - drawn_at, entropy, kept, status


def _processed(
    scores: Tensor,
    bias: Tensor | None,
    counts: Tensor | None,
    repetition: Tensor | None,
    presence: Tensor | None,
    frequency: Tensor | None,
) -> Tensor:
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if counts is None:
        return scores
    repetition, presence, frequency = (
        None if p is None else p.to(scores.dtype)[:, None] for p in (repetition, presence, frequency)
    )
    seen = counts > 0
    if repetition is not None:
        scores = torch.where(seen, torch.where(scores < 0, scores * repetition, scores / repetition), scores)
    if frequency is not None:
        scores = scores - frequency * counts
    return scores if presence is None else scores - presence * seen


def _softmax(scores: Tensor, temperature: Tensor | None) -> _Softmax:
    logits = scores.double() - scores.amax(-1, keepdim=True).double()
    if temperature is not None:
        logits = logits / _divisor(temperature)[:, None]
    weights = logits.exp()
    return _Softmax(logits, weights, _tree(weights))


def _keep(
    scores: Tensor,
    drawn: _Softmax,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> Tensor | None:
    """Which tokens the filters leave; None for all."""
    keep, weights = None, drawn.weights
    # transformers compares after the division, in the logits' own precision: distinct logits may tie there.
    scaled = scores if temperature is None else scores / _divisor(temperature).to(scores.dtype)[:, None]
    if top_k is not None:
        keep = scaled >= _kth_largest(scaled, top_k)[:, None]
        weights = torch.where(keep, weights, 0)
    if top_p is not None:
        nucleus = _nucleus(weights, top_p, scores.dtype)
        keep = nucleus if keep is None else keep & nucleus
    if min_p is not None:
        likely = weights >= min_p[:, None]
        keep = likely if keep is None else keep & likely
    return keep


def _kth_largest(scaled: Tensor, top_k: Tensor) -> Tensor:
    """The smallest value that top-k keeps, -inf where it is off."""
    size = scaled.shape[1]
    on = (top_k > 0) & (top_k < size)
    k = torch.where(on, top_k, 1)
    largest = scaled.topk(int(k.max()) if scaled.device.type == "cpu" else size, dim=-1).values
    return torch.where(on, _at(largest, k - 1), -inf)


def _nucleus(weights: Tensor, top_p: Tensor, dtype: torch.dtype) -> Tensor:
    """Which tokens top-p keeps: all but the longest tail, in ascending order, whose mass is at most ``1 - top_p``.

    transformers compares a float32 sum with a float32 threshold: that is to compare the exact sum with the middle
    between that threshold and the next float32. Among equal weights the last ids are kept.
    """
    tail = (1 - top_p).to(dtype)
    if dtype == torch.float32:
        middle = (tail.double() + torch.nextafter(tail, torch.full_like(tail, inf)).double()) / 2
    else:
        middle = tail
    size = weights.shape[1]
    total = _tree(weights)[-1][:, 0]
    if weights.device.type == "cpu":
        # Tokens lighter than their share of half the tail weigh less than the tail even all together: never kept.
        heavy = (weights * (2 * size) >= ((1 - top_p) * total)[:, None]).sum(-1).max()
        size = min(size, 1 << int(heavy).bit_length())
    largest = weights.topk(size, dim=-1).values if size < weights.shape[1] else weights.sort(-1, descending=True).values
    # The first token whose sum from the top reaches total - tail is the last one kept.
    reach = torch.nextafter(total * (1 - middle), torch.full_like(total, -inf))
    last = _invert(_tree(largest), reach)
    edge = _at(largest, last)
    above, ties = weights > edge[:, None], weights == edge[:, None]
    rank = ties.flip(-1).cumsum(-1).flip(-1)  # 1 for the last of the ties
    keep = above | (ties & (rank <= (last + 1 - above.sum(-1))[:, None]))
    return keep | (top_p >= 1)[:, None]


def _greedy(top: Tensor, temperature: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Rows that take the likeliest token."""
    greedy = torch.zeros_like(top, dtype=torch.bool)
    if temperature is not None:
        # A temperature so small that the largest logit overflows is as good as 0.
        overflow = torch.isinf(top / _divisor(temperature).to(top.dtype)) & torch.isfinite(top)
        greedy = (temperature == 0) | overflow
    return greedy if top_p is None else greedy | (top_p <= 0)


def _out_of_range(top: Tensor, knobs: tuple[Tensor | None, ...]) -> Tensor:
    wrong = torch.zeros_like(top, dtype=torch.bool)
    for (_, test, _), knob in zip(KNOBS.values(), knobs, strict=True):
        if knob is not None:
            wrong = wrong | ~test(knob)
    return wrong


def _divisor(temperature: Tensor) -> Tensor:
    return torch.where(temperature == 0, 1.0, temperature)


def _at(table: Tensor, index: Tensor) -> Tensor:
    return table.gather(1, index[:, None])[:, 0]


def _tree(weights: Tensor) -> list[Tensor]:
    """Sums of neighbouring pairs, of pairs of pairs, … up to the total, with the weights first.

    Only elementwise additions: unlike those of `Tensor.sum` and `Tensor.cumsum`, their bits depend neither on the
    number of rows nor on the threads nor on the device.
    """
    levels = [weights]
    while levels[-1].shape[1] > 1:
        if levels[-1].shape[1] % 2:
            levels[-1] = torch.nn.functional.pad(levels[-1], (0, 1))
        levels.append(levels[-1][:, 0::2] + levels[-1][:, 1::2])
    return levels


def _invert(tree: list[Tensor], target: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds ``target``; never one of weight 0, the last one if none does."""
    index = torch.zeros_like(target, dtype=torch.int64)
    for level in reversed(tree[:-1]):
        left, right = _at(level, 2 * index), _at(level, 2 * index + 1)
        beyond = (target >= left) & (right > 0)
        target = torch.where(beyond, target - left, target)
        index = 2 * index + beyond
    return index


def _philox(seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The first two 32-bit words of Philox4x32-10 with key ``seeds`` and counter ``positions``, in int64 arithmetic."""
    c0, c1, c2, c3 = positions & WORD, positions >> 32 & WORD, torch.zeros_like(seeds), torch.zeros_like(seeds)
    k0, k1 = seeds & WORD, seeds >> 32 & WORD
    for _ in range(10):
        # The products wrap around in int64, bits and all: the shift is arithmetic, hence the masks.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & WORD) ^ c1 ^ k0, b & WORD, (a >> 32 & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0, c1


def _uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """One float64 in [0, 1) per row, a multiple of 2^-53."""
    high, low = _philox(seeds, positions)
    return ((high >> 5 << 26) + (low >> 6)).double() * 2.0**-53


def _knob(name: str, value: object, logits: Tensor) -> Tensor | None:
    """``value`` as ``[B]``, float64 or int64; None where it changes nothing."""
    rule, test, off = KNOBS[name]
    integer = name == "top_k"
    rows, device = logits.shape[0], logits.device
    if isinstance(value, Tensor):
        dtypes = INTEGERS if integer else FLOATS + INTEGERS
        check_tensor("sample", name, value, dtypes=dtypes, shape=(rows,), rule="a number or [B]", device=device)
        if device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = torch.nonzero(~test(value))
            if len(wrong):
                row = int(wrong[0])
                raise ValueError(f"sample: {name} must be {rule}, got {value[row].item()} in row {row}")
        return value.to(torch.int64 if integer else torch.float64)
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        kind = "an integer" if integer else "a number"
        raise TypeError(f"sample: {name} must be {kind} or a [B] tensor, got {type(value).__name__}")
    if not test(value):
        raise ValueError(f"sample: {name} must be {rule}, got {value}")
    if integer:
        return None if value <= 0 or value >= logits.shape[1] else torch.full((rows,), value, device=device)
    if value == off or (name == "top_p" and value >= 1):
        return None
    return torch.full((rows,), value, dtype=torch.float64, device=device)


def _per_token(name: str, value: Tensor | None, dtypes: tuple[torch.dtype, ...], logits: Tensor) -> Tensor | None:
    """``value`` as ``[B, V]``, a stride of 0 where all rows share it."""
    if value is None:
        return None
    shape = logits.shape if getattr(value, "ndim", 2) == 2 else logits.shape[1:]
    check_tensor("sample", name, value, dtypes=dtypes, shape=shape, rule="[B, V] or [V]", device=logits.device)
    return value.expand(logits.shape)


def _fake(logits: Tensor, seeds: Tensor, positions: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    rows, dtype = logits.shape[:1], torch.float64 if logits.dtype == torch.float64 else torch.float32
    ids, kept = (logits.new_empty(rows, dtype=torch.int64) for _ in range(2))
    drawn, policy, mass, entropy = (logits.new_empty(rows, dtype=dtype) for _ in range(4))
    return ids, drawn, policy, mass, entropy, kept, logits.new_empty(rows, dtype=torch.int8)


_sample = define(
    "sample(Tensor logits, Tensor seeds, Tensor positions, Tensor? temperature=None, Tensor? top_k=None, "
    "Tensor? top_p=None, Tensor? min_p=None, Tensor? repetition_penalty=None, Tensor? presence_penalty=None, "
    "Tensor? frequency_penalty=None, Tensor? token_counts=None, Tensor? logit_bias=None, Tensor? allowed=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference,
    _fake,
)
