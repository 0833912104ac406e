"""The C++ kernels of the ops over logits on every size, dtype and range that they are for.

Oracle: float64 on the same rounded inputs. Tolerance: twice the largest error of the reference in the dtype at hand,
and an epsilon for the cases of one row, where that may be nothing: two units in the last place of float32, of the
result or of the largest scaled logit, whose rounding no float32 code escapes.
"""

import itertools

import pytest
import torch

from rlhf_fast.dispatch import IMPLEMENTATIONS
from rlhf_fast.ops.sample.draw import uniform
from rlhf_fast.ops.sample.knobs import KNOBS, knob

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOP_K, TOP_P, MIN_P = {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.02}

AXES = {
    "V": [7, 31, 1000, 32000, 32001, 50257, 128256, 151936, 256000, 262145],
    "N": [0, 1, 7, 512, 8192, 65537],
    "dtype": [F32, BF16, F16],
    "temperature": [0.5, 0.7, 1.0, 1.5],
    "softcap": [None, 30.0],
    "deviation": [1, 3, 10],
    "shift": [0, -20, 80],
    "filters": [{}, TOP_K, TOP_P, MIN_P],
}
#: V, N, dtype, temperature, softcap, standard deviation and shift of the logits, filters of `sample`.
TABLE = [
    (7, 0, F16, 0.7, None, 3, 0, TOP_P),
    (7, 7, F32, 1.5, None, 3, -20, TOP_P),
    (7, 512, F32, 1.0, None, 3, 0, MIN_P),
    (7, 8192, BF16, 1.5, None, 10, 80, {}),
    (7, 65537, F16, 0.5, 30.0, 1, -20, MIN_P),
    (31, 1, BF16, 0.7, 30.0, 1, 0, MIN_P),
    (31, 7, BF16, 1.0, None, 1, 80, {}),
    (31, 512, F32, 0.7, None, 3, 0, TOP_K),
    (31, 8192, F16, 0.7, None, 10, -20, TOP_P),
    (1000, 1, F32, 0.5, None, 1, 80, TOP_P),
    (1000, 7, F16, 1.5, None, 1, 0, TOP_K),
    (1000, 512, BF16, 0.7, None, 10, -20, MIN_P),
    (32000, 1, F32, 1.5, 30.0, 10, 0, MIN_P),
    (32000, 7, BF16, 0.7, 30.0, 10, 80, TOP_K),
    (32000, 7, F16, 1.0, None, 10, 0, TOP_K),
    (32001, 1, F16, 0.5, 30.0, 3, 0, {}),
    (32001, 1, F32, 1.0, 30.0, 1, -20, TOP_K),
    (32001, 7, BF16, 0.5, 30.0, 10, 80, TOP_K),
    (50257, 1, BF16, 1.0, 30.0, 3, 0, TOP_P),
    (50257, 1, F16, 1.0, 30.0, 10, -20, {}),
    (50257, 7, F32, 1.0, 30.0, 10, -20, TOP_K),
    (128256, 1, F16, 0.7, None, 3, -20, TOP_P),
    (128256, 1, F32, 0.7, None, 10, 80, TOP_P),
    (128256, 7, BF16, 1.0, None, 3, -20, TOP_P),
    (151936, 1, BF16, 0.5, None, 3, -20, {}),
    (151936, 1, F32, 0.7, None, 10, 0, MIN_P),
    (151936, 7, F16, 1.0, None, 3, 80, MIN_P),
    (256000, 1, F32, 0.7, 30.0, 1, 80, {}),
    (256000, 1, F16, 1.5, None, 3, -20, TOP_P),
    (256000, 7, BF16, 0.7, None, 10, -20, TOP_P),
    (262145, 1, F16, 1.0, 30.0, 1, 0, {}),
    (262145, 1, BF16, 0.5, None, 3, 80, MIN_P),
    (262145, 7, F32, 0.7, 30.0, 3, -20, MIN_P),
]
cases = pytest.mark.parametrize(
    ("size", "rows", "dtype", "temperature", "softcap", "deviation", "shift", "filters"), TABLE
)


def normal(rows, size, dtype, deviation, shift, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, size, generator=generator) * deviation + shift).to(dtype)


def both(op):
    """The kernel and the reference whose error is the measure."""
    return [IMPLEMENTATIONS[op][name] for name in ("cpp", "reference")]


def largest(x):
    """The magnitude of ``x``, at least 1."""
    return max(1.0, float(x.detach().abs().max())) if x.numel() else 1.0


def assert_near(ours, reference, exact, unit):
    """The rule at the head of this file; ``unit``: the number whose rounding to float32 is the epsilon."""
    assert ours.dtype == reference.dtype
    if exact.numel():
        error, allowed = ((t.double() - exact).abs().max() for t in (ours, reference))
        assert error <= 2 * allowed + 2.0**-22 * unit


def test_the_table_has_every_value_and_every_pair_that_matters():
    columns = dict(zip(AXES, zip(*TABLE, strict=True), strict=True))
    for name, values in AXES.items():
        assert all(value in columns[name] for value in values), name
    for a, b in itertools.combinations(list(AXES)[2:], 2):
        found = list(zip(columns[a], columns[b], strict=True))
        assert all(pair in found for pair in itertools.product(AXES[a], AXES[b])), (a, b)
    found = set(zip(columns["V"], columns["dtype"], strict=True))
    assert found == set(itertools.product(AXES["V"], AXES["dtype"]))


@cases
def test_logprobs(size, rows, dtype, temperature, softcap, deviation, shift, filters):
    logits, numbers = normal(rows, size, dtype, deviation, shift), {"temperature": temperature, "softcap": softcap}
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(size, (rows,), generator=generator)
    upstream = list(torch.randn(3, rows, generator=generator))
    exact = logits.double().requires_grad_()
    z = (exact if softcap is None else softcap * torch.tanh(exact / softcap)) / temperature
    logp = z.log_softmax(1)
    expected = logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(1), z.logsumexp(1)
    sum((u * o).sum() for u, o in zip(upstream, expected, strict=True)).backward()
    outputs = [forward(logits, ids, **numbers) for forward in both("logprobs")]
    for ours, reference, theirs in zip(*outputs, expected, strict=True):
        assert_near(ours, reference, theirs.detach(), max(largest(z), largest(theirs)))
    grads = [
        backward(*upstream, logits, ids, out[1], out[2], **numbers)
        for backward, out in zip(both("logprobs_backward"), outputs, strict=True)
    ]
    assert_near(*grads, exact.grad, largest(z) * float(exact.grad.abs().max()) if rows else 1.0)


@cases
def test_kl(size, rows, dtype, temperature, softcap, deviation, shift, filters):
    logits = normal(rows, size, dtype, deviation, shift)
    ref_logits = (logits.float() + normal(rows, size, F32, 0.3, 0, seed=2)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(size, (rows,), generator=generator)
    upstream = list(torch.randn(3, rows, generator=generator))
    exact = logits.double().requires_grad_()
    z, w = exact / temperature, ref_logits.double() / temperature
    logp, ref_logp = z.log_softmax(1), w.log_softmax(1)
    chosen, ref_chosen = (x.gather(1, ids[:, None])[:, 0] for x in (logp, ref_logp))
    divergence = (logp.exp() * (logp - ref_logp)).sum(1)
    expected = divergence, chosen, ref_chosen, -(logp.exp() * logp).sum(1), z.logsumexp(1), w.logsumexp(1)
    sum((u * o).sum() for u, o in zip(upstream, (divergence, chosen, expected[3]), strict=True)).backward()
    outputs = [forward(logits, ref_logits, ids, temperature=temperature) for forward in both("kl")]
    for ours, reference, theirs in zip(*outputs, expected, strict=True):
        assert_near(ours, reference, theirs.detach(), max(largest(z), largest(theirs)))
    grads = [
        backward(*upstream, logits, ref_logits, out[0], *out[3:], ids, temperature=temperature)
        for backward, out in zip(both("kl_backward"), outputs, strict=True)
    ]
    assert_near(*grads, exact.grad, largest(z) * float(exact.grad.abs().max()) if rows else 1.0)


@cases
def test_sample(size, rows, dtype, temperature, softcap, deviation, shift, filters):
    logits, seeds = normal(rows, size, dtype, deviation, shift), torch.arange(rows)
    numbers = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    knobs = [knob(name, numbers.get(name, 0.0), logits) for name in list(KNOBS)[:4]]
    arguments = logits, seeds, torch.zeros_like(seeds), *knobs
    (ids, *floats, count, status), (ref_ids, *ref_floats, _, _) = (form(*arguments) for form in both("sample"))
    assert bool((status == 0).all())

    z = logits.double() / temperature
    logp = z.log_softmax(1)
    falling, order = logp.sort(dim=1, descending=True, stable=True)
    mass = falling.exp().cumsum(1)
    last = (count - 1)[:, None]
    kept_mass = mass.gather(1, last)[:, 0]
    policy = logp.gather(1, ids[:, None])[:, 0]
    expected = policy - kept_mass.log(), policy, kept_mass.log(), -(logp.exp() * logp).sum(1)
    # What the reference is off is known only where it drew the same; it need not where u is at a boundary.
    same = (ids == ref_ids) & (floats[2] - ref_floats[2]).abs().lt(1e-4)
    assert int((~same).sum()) <= 1 + rows // 1000
    for ours, reference, theirs in zip(floats, ref_floats, expected, strict=True):
        assert_near(ours, torch.where(same, reference, theirs.float()), theirs, max(largest(z), largest(theirs)))

    # The kept are the likeliest; one more or one fewer would break the rule of the filter.
    edge, beyond = falling.gather(1, last)[:, 0], falling.gather(1, count.clamp(max=size - 1)[:, None])[:, 0]
    rest = count < size
    if "top_k" in filters and size > 50:
        assert bool((edge == falling[:, 49]).all())
        assert bool((beyond < edge)[rest].all())
    elif "top_p" in filters:
        assert bool((kept_mass >= 0.9 - 1e-6).all())
        assert bool((kept_mass - edge.exp() < 0.9 + 1e-6).all())
    elif "min_p" in filters:
        threshold = falling[:, 0] + torch.tensor(0.02).log()
        assert bool((edge >= threshold - 1e-5).all())
        assert bool((beyond < threshold + 1e-5)[rest].all())
    else:
        assert bool((count == size).all())
    assert bool((policy >= edge).all())

    # Inverse CDF in the order of the ids, where no tie at the edge leaves open which ones are kept.
    clear = (~rest | (beyond < edge)) & (status == 0)
    kept = torch.where(torch.arange(size) < count[:, None], falling.exp(), 0)
    reached = torch.zeros_like(z).scatter_(1, order, kept).cumsum(1) / kept_mass[:, None]
    u = uniform(seeds, torch.zeros_like(seeds))
    below = torch.where(ids > 0, reached.gather(1, (ids - 1).clamp(min=0)[:, None])[:, 0], 0)
    above = reached.gather(1, ids[:, None])[:, 0]
    assert bool(((below - 2.0**-20 <= u) & (u < above + 2.0**-20))[clear].all())
