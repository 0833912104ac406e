"""sample: every form of it against transformers' own processors, a float64 oracle and what the peers get wrong."""

import math

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as drawn
from hypothesis import strategies as st

from rlhf_fast.ops import logprobs, sample
from rlhf_fast.ops.sample import CHUNK, SampleOutput, reference
from rlhf_fast.ops.sample.draw import invert, philox, sum_tree, uniform
from rlhf_fast.ops.sample.filters import kept
from rlhf_fast.ops.sample.knobs import KNOBS, knob

SETTINGS = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_p": 0.99},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
]
#: How near to a boundary of the CDF the uniform must be for a kernel to be free to draw the token beyond it.
BOUND = {torch.float32: 2.0**-20, torch.float64: 2.0**-40}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def rows(shape, dtype=torch.float32, seed=0, scale=2.5):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


@pytest.fixture
def fewer(request):
    """What becomes of a number of rows: a tenth in the SIMT shim, where one takes the time of a thousand elsewhere."""
    return lambda count: count // 10 if "simt" in request.node.callspec.id else count


def call(run, device, logits, seeds=None, positions=None, **given):
    """One form of the op with the arguments of the public function, which are numbers or tensors."""
    size = logits.shape[0]
    seeds = torch.arange(size) if seeds is None else seeds
    positions = torch.zeros(size, dtype=torch.int64) if positions is None else positions
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    defaults |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert set(defaults) == set(KNOBS)
    knobs = [knob(name, given.pop(name, default), logits) for name, default in defaults.items()]
    rest = [given.pop(name, None) for name in ("token_counts", "logit_bias", "allowed")]
    assert not given
    arguments = (logits, seeds, positions, *knobs, *rest)
    out = run(*(None if a is None else a.to(device) for a in arguments))
    return SampleOutput(*(o.cpu() for o in out))


def transformers_scores(logits, temperature=None, top_k=None, top_p=None, min_p=None):
    """What transformers' generate leaves of float32 (float64) logits, in the order of its processors."""
    transformers = pytest.importorskip("transformers")
    scores = logits if logits.dtype == torch.float64 else logits.float()
    ids = torch.zeros(len(logits), 1, dtype=torch.int64)
    for value, warper in (
        (temperature, transformers.TemperatureLogitsWarper),
        (top_k, transformers.TopKLogitsWarper),
        (top_p, transformers.TopPLogitsWarper),
        (min_p, transformers.MinPLogitsWarper),
    ):
        if value is not None:
            scores = warper(value)(ids, scores)
    return scores


def interpreted(request):
    """Whether the form is Triton's interpreter, where a row takes milliseconds: fewer rows, enough to see a bug."""
    return "triton-cpu" in request.node.callspec.id


def words(*numbers):
    return tuple(torch.tensor([n]) for n in numbers)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # The known answers that Random123 ships for philox4x32-10.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert tuple(int(word) for word in philox(words(*counter), words(*key))) == expected


def test_pitfall_12_a_uniform_has_53_bits():
    seeds, positions = torch.arange(4096) - 2048, torch.arange(4096) * (1 << 33)
    u = uniform(seeds, positions)
    assert u.dtype == torch.float64
    assert bool(((u >= 0) & (u < 1)).all())
    scaled = u * 2.0**53
    assert torch.equal(scaled, scaled.round())
    # 24-bit uniforms lose the tail (vllm#43150): about half of these must be odd multiples of 2^-53.
    assert 1800 < int((scaled.to(torch.int64) % 2).sum()) < 2300
    assert len(u.unique()) == 4096


def test_seed_and_position_are_64_bits_and_not_interchangeable():
    def one(seed, position):
        return float(uniform(torch.tensor([seed]), torch.tensor([position])))

    pairs = [(0, 0), (1, 0), (0, 1), (1 << 32, 0), (0, 1 << 32), (-1, 0), (0, -1), (-(2**63), 0)]
    assert len({one(*pair) for pair in pairs}) == len(pairs)
    words_of_zero = ((0x6627E8D5 >> 5) << 26) + (0xE169C58D >> 6)
    assert one(0, 0) == words_of_zero / 2**53


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_invert_is_the_inverse_of_the_cumulative_sum(size):
    generator = torch.Generator().manual_seed(size)
    # Whole numbers, so that every sum is exact and the answer has no tolerance.
    weights = torch.randint(0, 5, (200, size), generator=generator).double()
    weights[:, size // 2] += 1
    targets = torch.rand(200, generator=generator, dtype=torch.float64) * weights.sum(1)
    targets[::3] = targets[::3].floor()  # on a boundary too
    expected = torch.searchsorted(weights.cumsum(1), targets[:, None], right=True)[:, 0]
    assert torch.equal(invert(sum_tree(weights), targets), expected)
    # However far the target is, the answer is in range and has weight.
    last = invert(sum_tree(weights), torch.full((200,), math.inf, dtype=torch.float64))
    assert bool((weights.gather(1, last[:, None]) > 0).all())


def test_hand_computed(run, device):
    # Seed 0, position 0 draws u = .39905; the masses .1 .2 .3 .4 reach .1, .3, .6: the third token.
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    out = call(run, device, logits)
    assert out.ids.tolist() == [2]
    assert out.kept.tolist() == [4]
    assert out.status.tolist() == [0]
    entropy = -sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4))
    assert torch.allclose(torch.cat(out[1:5]), torch.tensor([math.log(0.3), math.log(0.3), 0, entropy]), atol=1e-6)
    # Of the two likeliest, .3 and .4 of .7, u takes the first until .4286.
    out = call(run, device, logits, top_k=2)
    assert out.ids.tolist() == [2]
    assert out.kept.tolist() == [2]
    expected = torch.tensor([math.log(3 / 7), math.log(0.3), math.log(0.7), entropy])
    assert torch.allclose(torch.cat(out[1:5]), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [50, 1003])
@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_keeps_what_transformers_keeps(run, device, given, size, dtype, request):
    logits = rows((4 if interpreted(request) else 40, size), dtype)
    scores = transformers_scores(logits, **given)
    out = call(run, device, logits, **given)
    assert out.kept.tolist() == (scores > -math.inf).sum(1).tolist()
    expected = scores.double().log_softmax(1).gather(1, out.ids[:, None])[:, 0]
    # Where bfloat16 ties at the edge of top-p, transformers' unstable sort may keep another one of the equals.
    other = expected == -math.inf
    assert "top_p" in given or not other.any()
    assert int(other.sum()) <= (2 if dtype in (torch.bfloat16, torch.float16) else 0)
    assert torch.allclose(out.logprobs[~other].double(), expected[~other], atol=2e-6)
    assert (out.logprobs.dtype, out.ids.dtype, out.status.dtype) == (scores.dtype, torch.int64, torch.int8)


@pytest.mark.parametrize("given", SETTINGS[2:], ids=str)
def test_the_kept_set_is_that_of_transformers(given):
    logits = rows((64, 301), torch.float64, seed=3)
    expected = transformers_scores(logits, **given) > -math.inf
    temperature, *filters = (knob(n, given.get(n, d), logits) for n, d in zip(KNOBS, (1.0, 0, 1.0, 0.0), strict=False))
    x = logits if temperature is None else logits / temperature[:, None]
    x = x - x.amax(1, keepdim=True)
    assert torch.equal(kept(logits, x, x.exp(), temperature, *filters), expected)


@pytest.mark.parametrize("given", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}], ids=str)
def test_draws_all_of_the_support_and_nothing_else(run, device, given, fewer, request):
    logits, draws = rows((1, 40), seed=5), 60 if interpreted(request) else fewer(3000)
    scores = transformers_scores(logits, **given)
    probabilities = scores[0].double().softmax(0)
    out = call(run, device, logits.expand(draws, 40), **given)
    counts = torch.bincount(out.ids, minlength=40)
    assert bool((counts[probabilities == 0] == 0).all())
    assert bool((counts[probabilities > 60 / draws] > 0).all())  # each missed with a chance of e^-60


@pytest.mark.parametrize("vary", ["seeds", "positions"])
def test_frequencies_are_the_probabilities(run, device, vary, fewer, request):
    logits, draws = rows((1, 12), seed=7, scale=1.0), 300 if interpreted(request) else fewer(20000)
    many = torch.arange(draws) * 7919 - 10**6
    fixed = torch.full((draws,), 123456789)
    seeds, positions = (many, fixed) if vary == "seeds" else (fixed, many)
    out = call(run, device, logits.expand(draws, 12), seeds, positions)
    counts = torch.bincount(out.ids, minlength=12)
    expected = logits[0].double().softmax(0) * draws
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), chi_square / 2) > 1e-4


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_pitfall_12_a_row_does_not_depend_on_its_batch(run, device, given, request):
    logits = rows((9, 257), seed=11)
    seeds, positions = torch.arange(9) * 31, torch.arange(9) * 17
    whole = call(run, device, logits, seeds, positions, **given)
    order = torch.tensor([4, 8, 0, 3])
    some = call(run, device, logits[order], seeds[order], positions[order], **given)
    poisoned = torch.cat([torch.full((3, 257), torch.nan), logits, torch.full((1, 257), -math.inf)])
    pad = torch.nn.functional.pad
    among = call(run, device, poisoned, pad(seeds, (3, 1)), pad(positions, (3, 1)), **given)
    for field, ours in enumerate(whole):
        assert torch.equal(ours[order], some[field])
        assert torch.equal(ours, among[field][3:12])
    for row in range(0, 9, 4 if interpreted(request) else 1):
        one = slice(row, row + 1)
        alone = call(run, device, logits[one], seeds[one], positions[one], **given)
        assert all(torch.equal(ours[one], mine) for ours, mine in zip(whole, alone, strict=True))


def test_a_row_does_not_depend_on_other_rows_knobs(run, device):
    logits = rows((6, 129), seed=12)
    mixed = {
        "temperature": torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.7]),
        "top_k": torch.tensor([0, 5, 3, 500, 50, 1]),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 0.95, 0.0, 1.5]),
        "min_p": torch.tensor([0.0, 0.1, 0.0, 0.05, 1.0, 0.2]),
    }
    whole = call(run, device, logits, **mixed)
    for row in range(6):
        one = slice(row, row + 1)
        numbers = {name: value[row].item() for name, value in mixed.items()}
        for given in ({name: value[one] for name, value in mixed.items()}, numbers):
            alone = call(run, device, logits[one], torch.tensor([row]), **given)
            for ours, theirs in zip(whole, alone, strict=True):
                assert torch.equal(ours[one], theirs)
    assert whole.kept[[1, 4, 5]].tolist() == [1, 1, 1]


@pytest.mark.parametrize("given", [{}, {"top_p": 0.9}, {"top_k": 50, "min_p": 0.01}], ids=str)
def test_threads_change_no_bit(run, device, given, request):
    # Tensor.sum of one long row adds in another order than of many, once there is more than one thread.
    if interpreted(request):
        pytest.skip("Triton's interpreter has no threads")
    logits, seeds = rows((6, 9001), torch.float64, seed=13), torch.arange(6)
    before, expected = torch.get_num_threads(), call(run, device, logits, seeds, **given)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            whole = call(run, device, logits, seeds, **given)
            alone = [call(run, device, logits[i : i + 1], seeds[i : i + 1], **given) for i in range(6)]
            for field, theirs in enumerate(expected):
                assert torch.equal(whole[field], theirs)
                assert torch.equal(torch.cat([out[field] for out in alone]), theirs)
    finally:
        torch.set_num_threads(before)


def test_chunks_of_rows_change_no_bit():
    size = CHUNK // 3 + 1  # three rows do not fit at once
    logits = rows((5, 64), seed=14).repeat(1, size // 64 + 1)[:, :size]
    keys, temperature = torch.arange(5), torch.full((5,), 0.8, dtype=torch.float64)
    whole = reference(logits, keys, keys, temperature)
    for row in (1, 4):
        alone = reference(*(x[row : row + 1] for x in (logits, keys, keys, temperature)))
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(whole, alone, strict=True))


PATTERNS = {
    "normal": lambda x: x,
    "ties": lambda x: (x * 2).round() / 2,
    "equal": lambda x: x * 0 + 1.5,
    "nearly equal": lambda x: 3 + x * 1e-6,
    "half forbidden": lambda x: torch.where(x > 0, x, -math.inf),
    "one far above": lambda x: torch.where(torch.arange(x.shape[1]) == 700, 60.0, x),
    "rising": lambda x: torch.linspace(-9, 9, x.shape[1]).to(x).expand_as(x),
    "two heaps": lambda x: torch.where(x > 1, 1e-3 * x, 1e-3 * x - 12),
}


@pytest.mark.parametrize("given", [*SETTINGS, {"top_k": 700}, {"top_k": 3000, "top_p": 0.6}, {"min_p": 1e-7},
                                   {"top_p": 0.999999}, {"top_p": 0.9, "min_p": 0.4}], ids=str)  # fmt: skip
@pytest.mark.parametrize("pattern", PATTERNS)
def test_long_rows_of_any_shape_are_those_of_the_reference(run, device, pattern, given, request):
    """Several chunks of tokens, more than are sorted at once, and a pruning that finds nothing to prune."""
    logits = PATTERNS[pattern](rows((1, 4611) if interpreted(request) else (3, 20011), seed=30))
    ours, theirs = (call(form, where, logits, **given) for form, where in ((run, device), (reference, "cpu")))
    for field in ("ids", "kept", "status"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
    for field in ("logprobs", "policy_logprobs", "kept_logmass", "entropy"):
        assert torch.allclose(getattr(ours, field), getattr(theirs, field), atol=2e-6), field


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_1000_rows_keep_what_transformers_keeps(run, device, given, fewer, request):
    logits = rows((8 if interpreted(request) else fewer(1000), 301), torch.float64, seed=31)
    keeps = transformers_scores(logits, **given) > -math.inf
    out = call(run, device, logits, **given)
    assert torch.equal(out.kept, keeps.sum(1))
    assert bool(keeps.gather(1, out.ids[:, None]).all())
    mass = ((logits / given.get("temperature", 1.0)).softmax(1) * keeps).sum(1)
    assert torch.allclose(out.kept_logmass, mass.log(), atol=1e-12)


def cumulative(logits, **given):
    """Cumulative probabilities of the filtered row ``[1, V]``, in float64."""
    return transformers_scores(logits, **given)[0].double().softmax(0).cumsum(0)


@pytest.mark.parametrize("given", [{}, {"top_k": 20}, {"temperature": 0.7, "top_p": 0.9}, {"min_p": 0.05}], ids=str)
@pytest.mark.parametrize(("size", "draws"), [(40, 20000), (1003, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_preimage_of_a_token_is_an_interval_of_its_probability(
    run, device, dtype, size, draws, given, fewer, request
):
    draws = 12 if interpreted(request) else fewer(draws)
    logits, seeds = rows((1, size), dtype, seed=32), torch.arange(draws) * 1013
    u = uniform(seeds, torch.zeros_like(seeds))
    out = call(run, device, logits.expand(draws, size), seeds, **given)
    reached = cumulative(logits.double(), **given)
    near = (reached - u[:, None]).abs().amin(1) < BOUND[dtype]  # may fall on either side
    assert near.sum() <= ((10 if draws >= 1000 else 3) if dtype == torch.float32 else 0)
    assert torch.equal(out.ids[~near], torch.searchsorted(reached, u, right=True)[~near])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [2, 700])
def test_across_a_boundary_of_the_cdf(run, device, size, dtype, request):
    """The bound that the kernels state: only a uniform nearer than that to a boundary may fall on its other side."""
    seeds = torch.arange(20 if interpreted(request) else 100) + 5
    u, shape = uniform(seeds, torch.zeros_like(seeds)), (len(seeds), size)
    later = (torch.arange(size) * 2 >= size).expand(shape)
    logits = rows(shape, torch.float64, seed=33)
    odds = logits.masked_fill(~later, -math.inf).logsumexp(1) - logits.masked_fill(later, -math.inf).logsumexp(1)
    differ = 0
    bound = int(math.log2(BOUND[dtype]))
    for exponent in (-12, bound + 1, bound - 12):
        for sign in (-1, 1):
            boundary = u + sign * 2.0**exponent  # where the first half of the tokens shall end
            there = logits + later * ((1 - boundary).log() - boundary.log() - odds)[:, None]
            there = there.to(dtype)
            boundary = torch.where(later, 0, there.double().softmax(1)).sum(1)  # where they do
            decided = ((boundary - u).abs() > BOUND[dtype]) & ((boundary > u) == (sign > 0))
            ours, theirs = (call(form, where, there, seeds).ids
                            for form, where in ((run, device), (reference, "cpu")))  # fmt: skip
            assert bool(((ours >= size // 2) == (sign < 0))[decided].all())
            assert bool(((theirs >= size // 2) == (sign < 0))[decided].all())
            assert int(decided.sum()) >= (0.9 * len(seeds) if exponent > bound else 0)
            differ += int((ours != theirs).sum())
    assert differ <= 2 * len(seeds)


def test_pitfall_12_the_tail_at_a_logit_gap_of_18(run, device):
    # vllm#51367: 24-bit uniforms never reach the last of it. Of 2^20 seeds those whose uniform lies in the tail.
    logits = torch.zeros(1, 4001)
    logits[0, 0] = 18.0
    seeds = torch.arange(1 << 20)
    u = uniform(seeds, torch.zeros_like(seeds))
    reached = cumulative(logits)
    seeds, u = seeds[u > reached[0]], u[u > reached[0]]
    assert 40 < len(seeds) < 90  # 2^20 * 4000 * e^-18 = 63.9
    out = call(run, device, logits.expand(len(seeds), 4001), seeds)
    assert torch.equal(out.ids, torch.searchsorted(reached, u, right=True))
    assert torch.allclose(out.logprobs, torch.tensor(-18.0), atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 7), (3, 1), (1, 2), (2, 31)])
def test_sizes(run, device, shape):
    out = call(run, device, rows(shape), temperature=0.9, top_p=0.95, top_k=3)
    assert all(field.shape == shape[:1] for field in out)
    assert bool(((out.ids >= 0) & (out.ids < shape[1])).all())


def test_strided_views(run, device, request):
    wide = rows((6, 5, 40), seed=15)
    views = (wide[:, 2], wide[:, :, 0], wide[0].t(), wide[:, 1, 3:])
    for view in [v[:2] for v in views] if interpreted(request) else views:
        assert not view.is_contiguous()
        before = view.clone()
        ours = call(run, device, view, top_p=0.8)
        theirs = call(run, device, view.contiguous(), top_p=0.8)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert torch.equal(view, before)


@pytest.mark.parametrize("given", [{}, {"temperature": 0.7, "top_k": 4, "top_p": 0.9, "min_p": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_policy_logprobs_are_what_logprobs_gives_later(run, device, dtype, given):
    logits = rows((30, 301), dtype, seed=16)
    out = call(run, device, logits, **given)
    later = logprobs(logits, out.ids, temperature=given.get("temperature", 1.0))
    assert torch.allclose(out.policy_logprobs, later.logprobs, atol=2e-6)
    assert torch.allclose(out.entropy, later.entropy, atol=2e-6)
    assert torch.allclose(out.logprobs, out.policy_logprobs - out.kept_logmass, atol=1e-6)
    if given:
        assert bool((out.kept_logmass < 0).all())
        kept_mass = (transformers_scores(logits, **given) > -math.inf) * (logits.double() / 0.7).softmax(1)
        assert torch.allclose(out.kept_logmass.double().exp(), kept_mass.sum(1), atol=2e-6 if dtype != DTYPES[1] else 1)
    else:
        assert bool((out.kept_logmass == 0).all())


def test_argmax(run, device):
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, -math.inf, 1.0, 2.0]])
    for given in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_p": -1.0}, {"temperature": 0.0, "top_k": 3}):
        out = call(run, device, logits, **given)
        assert out.ids.tolist() == [1, 0]  # the first of equals
        assert out.kept.tolist() == [1, 1]
        assert out.logprobs.tolist() == [0, 0]
        expected = logits.log_softmax(1)[[0, 1], [1, 0]]  # at temperature 1
        assert torch.allclose(out.policy_logprobs, expected, atol=1e-6)
        assert torch.allclose(out.kept_logmass, expected, atol=1e-6)
        entropy = torch.distributions.Categorical(logits=logits[0]).entropy()
        assert torch.allclose(out.entropy[0], entropy, atol=1e-6)


def test_a_temperature_that_overflows_takes_the_likeliest(run, device):
    logits = torch.tensor([[1.0, 5.0, 2.0], [-1.0, -7.0, -2.0], [0.0, -1.0, -2.0]])
    for given in (
        {"temperature": 1e-44},
        {"temperature": 1e-50},
        {"temperature": 1e-50, "top_k": 1},
    ):  # 1e-50: float32 0
        out = call(run, device, logits, **given)
        assert out.ids.tolist() == [1, 0, 0]
        assert out.status.tolist() == [0, 0, 0]
        assert out.logprobs.tolist() == [0, 0, 0]


def test_pitfall_12_one_bad_row_leaves_the_others_alone(run, device):
    good = rows((3, 50), seed=17)
    bad = rows((4, 50), seed=18)
    bad[0, 7], bad[1, 49], bad[2, 0] = torch.nan, math.inf, math.inf
    bad[2, 1], bad[3] = torch.nan, -math.inf
    logits = torch.cat([good[:1], bad, good[1:]])
    seeds = torch.tensor([5, 0, 0, 0, 0, 6, 7])
    for given in SETTINGS[:4]:
        out = call(run, device, logits, seeds, **given)
        alone = call(run, device, good, torch.tensor([5, 6, 7]), **given)
        assert out.status.tolist() == [0, 1, 1, 1, 2, 0, 0]
        assert out.ids[1:5].tolist() == [-1] * 4
        assert out.kept[1:5].tolist() == [0] * 4
        assert all(bool(field[1:5].isnan().all()) for field in out[1:5])
        for ours, theirs in zip(out, alone, strict=True):
            assert torch.equal(ours[[0, 5, 6]], theirs)


def test_pitfall_12_a_token_of_no_probability_is_never_drawn(run, device, fewer, request):
    # vllm#50843: an id outside of the vocabulary, or a token of -inf, where a whole tile is -inf.
    logits = torch.full((40 if interpreted(request) else fewer(500), 1003), -math.inf)
    logits[:, 1002], logits[:, 640] = 0.0, -1.0
    for given in ({}, {"top_p": 0.99}, {"top_k": 700}, {"min_p": 0.01}):
        out = call(run, device, logits, **given)
        assert set(out.ids.tolist()) == {640, 1002}
        assert out.kept.tolist() == [2] * len(logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pitfall_12_top_k_keeps_every_tie(run, device, dtype):
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]], dtype=dtype)
    assert call(run, device, logits, top_k=2).kept.tolist() == [4, 6]
    assert call(run, device, logits, top_k=1).kept.tolist() == [1, 6]
    assert call(run, device, logits, top_k=5).kept.tolist() == [5, 6]
    for off in (0, -1, 6, 99):
        assert call(run, device, logits, top_k=off).kept.tolist() == [6, 6]


def test_top_p_on_a_boundary_is_exact(run, device):
    # The k likeliest of n equal tokens weigh exactly k/n: the tail of (n - k)/n is at most 1 - k/n and goes.
    for size in range(2, 13):
        for count in range(1, size):
            logits = torch.zeros(1, size)
            assert int(call(run, device, logits, top_p=count / size).kept) == count
            # transformers means the same, but its float32 sum may round to the other side of its threshold.
            theirs = int((transformers_scores(logits, top_p=count / size) > -math.inf).sum())
            assert theirs - count in ((0, 1) if size in (6, 7, 10, 11, 12) else (0,))


def test_top_p_on_a_boundary_is_exact_in_float64(run, device):
    for size in (2, 4, 8, 16):  # masses and thresholds that have no rounding
        for count in range(1, size):
            logits = torch.zeros(1, size, dtype=torch.float64)
            assert int((transformers_scores(logits, top_p=count / size) > -math.inf).sum()) == count
            assert int(call(run, device, logits, top_p=count / size).kept) == count


def test_top_k_ties_after_the_temperature_as_in_transformers(run, device):
    # Neighbouring float32 whose thirds are one float32: two logits before the division, one after it.
    neighbours = [torch.tensor(1.75)]
    while neighbours[-1] / 3 != neighbours[0] / 3 or len(neighbours) == 1:
        neighbours = [*neighbours, torch.nextafter(neighbours[-1], torch.tensor(2.0))][-2:]
    low, high = neighbours
    assert low < high
    logits = torch.stack([torch.tensor(0.0), high, low, torch.tensor(1.0)])[None]
    assert int((transformers_scores(logits, temperature=3.0, top_k=1) > -math.inf).sum()) == 2
    assert int(call(run, device, logits, temperature=3.0, top_k=1).kept) == 2


def test_of_tied_tokens_top_p_keeps_the_last(run, device, request):
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0]]).expand(40 if interpreted(request) else 400, 4)
    assert set(call(run, device, logits, top_p=0.6).ids.tolist()) == {1, 2, 3}


def test_pitfall_12_min_p_keeps_every_tie_with_the_likeliest(run, device):
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert int(call(run, device, logits, min_p=1.0).kept) == 2


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_min_p_on_a_boundary_keeps_what_transformers_keeps(run, device, temperature):
    logits = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16], [1 / 3, 1 / 6, 1 / 6, 1 / 6, 1 / 6]]).log()
    for min_p in (1 / 2, 1 / 4, 1 / 8):
        scores = transformers_scores(logits, temperature, min_p=min_p)
        out = call(run, device, logits, temperature=temperature, min_p=min_p)
        assert out.kept.tolist() == (scores > -math.inf).sum(1).tolist(), min_p


def test_filters_come_in_the_order_of_transformers(run, device):
    # Top-p acts on the renormalised top-k: of .5 .3 .2 the two largest are .625 .375, and .6 keeps one, not two.
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert int(call(run, device, logits, top_k=2, top_p=0.6).kept) == 1
    assert int(call(run, device, logits, top_p=0.6).kept) == 2
    # The temperature comes before: at 1/2 the masses are .658 .237 .105.
    assert int(call(run, device, logits, temperature=0.5, top_p=0.6).kept) == 1


def test_bias_penalties_and_allowed(run, device):
    logits = rows((8, 60), seed=19)
    ids = torch.randint(0, 60, (8, 12), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(8, 60, dtype=torch.int64).scatter_add_(1, ids, torch.ones_like(ids))
    bias = rows((8, 60), seed=20, scale=0.5)
    allowed = rows((8, 60), seed=21) > 0
    scores = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor(1.3)(ids, logits + bias)
    scores = scores - 0.2 * counts - 0.1 * (counts > 0)
    scores = torch.where(allowed, scores / 0.8, -math.inf)
    expected = transformers_scores(scores, top_p=0.9)
    given = {
        "repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1, "temperature": 0.8,
        "top_p": 0.9, "logit_bias": bias, "allowed": allowed,
    }  # fmt: skip
    for dtype in (torch.int64, torch.int32):
        out = call(run, device, logits, token_counts=counts.to(dtype), **given)
        assert out.kept.tolist() == (expected > -math.inf).sum(1).tolist()
        drawn = expected.double().log_softmax(1).gather(1, out.ids[:, None])[:, 0]
        assert torch.allclose(out.logprobs.double(), drawn, atol=2e-6)
        # The policy is the model's own: no bias, penalty or filter.
        policy = (logits.double() / 0.8).log_softmax(1).gather(1, out.ids[:, None])[:, 0]
        assert torch.allclose(out.policy_logprobs.double(), policy, atol=2e-6)
        assert torch.allclose(out.logprobs, out.policy_logprobs - out.kept_logmass, atol=1e-6)


def test_nothing_allowed_is_status_2_and_a_bias_can_be_broken(run, device):
    logits = rows((3, 9), seed=22)
    allowed = torch.ones(3, 9, dtype=torch.bool)
    allowed[1] = False
    out = call(run, device, logits, allowed=allowed)
    assert out.status.tolist() == [0, 2, 0]
    bias = torch.zeros(3, 9)
    bias[2, 3] = math.inf
    assert call(run, device, logits, logit_bias=bias).status.tolist() == [0, 0, 1]


def test_one_bias_for_all_rows():
    logits, bias = rows((4, 20), seed=23), rows((20,), seed=24)
    allowed = torch.arange(20) % 2 == 0
    ours = sample(logits, logit_bias=bias, allowed=allowed, seeds=torch.arange(4))
    theirs = sample(logits, logit_bias=bias.repeat(4, 1), allowed=allowed.repeat(4, 1), seeds=torch.arange(4))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert bool((ours.ids % 2 == 0).all())


def plain(row, u, temperature, top_k, top_p, min_p):
    """The rules in Python floats: (id, logprob, how many kept)."""
    z = [x / temperature for x in row]
    z = [x - max(z) for x in z]  # as in softmax, where what differs by next to nothing ties
    weights = [math.exp(x) for x in z]
    keep = set(range(len(z)))
    if 0 < top_k < len(z):
        keep = {i for i in keep if z[i] >= sorted(z)[-top_k]}
    if top_p < 1:
        total, tail = sum(weights[i] for i in keep), 0.0
        for i in sorted(keep, key=lambda i: (z[i], i))[:-1]:
            tail += weights[i]
            if tail > (1 - top_p) * total:
                break
            keep.remove(i)
    keep = sorted(i for i in keep if weights[i] >= min_p)
    total, reached = math.fsum(weights[i] for i in keep), 0.0
    for i in keep:
        reached += weights[i]
        if reached > u * total:
            break
    return i, math.log(weights[i] / total), len(keep)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@drawn(
    # On a grid: two logits tie both before and after the shift by the maximum, or in neither place.
    row=st.lists(st.integers(-9216, 9216).map(lambda i: i / 1024), min_size=1, max_size=25),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(-1, 26),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_row_against_plain_python(run, device, request, row, temperature, top_k, top_p, min_p, seed):
    if interpreted(request) and seed % 6:
        return  # one example of six, for the time it takes
    logits, seeds = torch.tensor([row], dtype=torch.float64), torch.tensor([seed])
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    out = call(run, device, logits, seeds, **given)
    u = float(uniform(seeds, torch.zeros_like(seeds)))
    around = [plain(row, x, temperature, top_k, top_p + y, min_p) for x in (u - 1e-12, u, u + 1e-12)
              for y in (-1e-12, 0, 1e-12)]  # fmt: skip
    assert (int(out.ids), int(out.kept)) in [(i, kept) for i, _, kept in around]
    assert any(math.isclose(float(out.logprobs), logprob, abs_tol=1e-10) for _, logprob, _ in around)


def test_seeds_from_torchs_generator():
    logits = rows((64, 100), seed=25)
    torch.manual_seed(1)
    first, second = sample(logits), sample(logits)
    torch.manual_seed(1)
    again = sample(logits)
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, second.ids)


def test_rows_of_one_prompt_get_their_own_noise():
    # vllm#50440: one seed for the whole batch gives every row the same token.
    logits = rows((1, 100), seed=26).expand(64, 100)
    assert len(sample(logits, seeds=torch.arange(64)).ids.unique()) > 10
    assert len(sample(logits, seeds=torch.zeros(64, dtype=torch.int64), positions=torch.arange(64)).ids.unique()) > 10
    assert len(sample(logits, seeds=torch.zeros(64, dtype=torch.int64), positions=3).ids.unique()) == 1


def test_outputs_are_detached_and_logits_untouched():
    logits = rows((3, 20)).requires_grad_()
    before = logits.detach().clone()
    out = sample(logits, temperature=0.5, top_k=3, top_p=0.9, logit_bias=torch.ones(20))
    assert not any(field.requires_grad for field in out)
    assert torch.equal(logits.detach(), before)


def test_opcheck():
    logits = rows((4, 30))
    given = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1}
    knobs = [knob(name, given.get(name, 0.1), logits) for name in KNOBS]
    rest = torch.ones(4, 30, dtype=torch.int64), torch.zeros(4, 30), torch.ones(4, 30, dtype=torch.bool)
    for arguments in ((), (*knobs, *rest)):
        keys = torch.arange(4), torch.arange(4)
        torch.library.opcheck(torch.ops.rlhf_fast.sample.default, (logits, *keys, *arguments))


def test_compiles_without_a_graph_break_for_any_batch():
    torch._dynamo.reset()

    def step(logits, temperature, seeds):
        return tuple(sample(logits * 2, temperature=temperature, top_p=0.9, seeds=seeds))

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for size in (3, 5, 8):
        inputs = rows((size, 33)), torch.full((size,), 0.7), torch.arange(size)
        assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), step(*inputs), strict=True))


def test_a_knob_that_nobody_could_check_gives_status_2():
    # What happens on a GPU and under torch.compile, where a look at the value would cost a synchronisation.
    logits, keys = rows((3, 10)), torch.arange(3)
    temperature = torch.tensor([1.0, -1.0, torch.nan], dtype=torch.float64)
    assert reference(logits, keys, keys, temperature)[6].tolist() == [0, 2, 2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3)}, ValueError, r"sample: logits must be \[B, V\] with V at least 1, got \[3\]"),
        ({"logits": torch.zeros(3, 0)}, ValueError, r"sample: logits must be \[B, V\] with V at least 1"),
        ({"logits": torch.zeros(3, 4).int()}, TypeError, "sample: logits must be float32, .* got int32"),
        ({"temperature": -0.1}, ValueError, "sample: temperature must be finite and not negative, got -0.1"),
        ({"temperature": math.inf}, ValueError, "sample: temperature must be finite and not negative, got inf"),
        ({"temperature": math.nan}, ValueError, "sample: temperature must be finite and not negative, got nan"),
        (
            {"temperature": torch.tensor([1.0, -2.0, 1.0])},
            ValueError,
            "sample: temperature must be finite and not negative, got -2.0 in row 1",
        ),
        ({"temperature": torch.ones(2)}, ValueError, r"sample: temperature must be a number or \[B\], got \[2\]"),
        ({"temperature": "hot"}, TypeError, r"sample: temperature must be a number or a \[B\] tensor, got str"),
        ({"top_k": 2.5}, TypeError, r"sample: top_k must be an integer or a \[B\] tensor, got float"),
        ({"top_k": math.nan}, ValueError, "sample: top_k must be an integer, got nan"),
        ({"top_k": torch.ones(3)}, TypeError, "sample: top_k must be int64, int32, got float32"),
        ({"top_p": math.nan}, ValueError, "sample: top_p must be a number, got nan"),
        ({"top_p": torch.full((3,), math.nan)}, ValueError, "sample: top_p must be a number, got nan in row 0"),
        ({"min_p": 1.5}, ValueError, "sample: min_p must be between 0 and 1, got 1.5"),
        ({"repetition_penalty": 0.0}, ValueError, "sample: repetition_penalty must be finite and above 0, got 0.0"),
        ({"presence_penalty": math.inf}, ValueError, "sample: presence_penalty must be finite, got inf"),
        ({"frequency_penalty": 0.5}, ValueError, "sample: frequency_penalty needs token_counts"),
        ({"token_counts": torch.ones(3, 4)}, TypeError, "sample: token_counts must be int64, int32, got float32"),
        ({"logit_bias": torch.ones(3)}, ValueError, r"sample: logit_bias must be \[B, V\] or \[V\], got \[3\]"),
        ({"allowed": torch.ones(3, 4)}, TypeError, "sample: allowed must be bool, got float32"),
        ({"seeds": torch.arange(4)}, ValueError, r"sample: seeds must be \[B\], got \[4\] instead of \[3\]"),
        ({"seeds": 7}, TypeError, "sample: seeds must be a tensor, got int"),
        ({"positions": torch.zeros(3)}, TypeError, "sample: positions must be int64, int32, got float32"),
    ],
)
def test_bad_input_names_op_argument_and_rule(change, error, message):
    given = {"logits": torch.zeros(3, 4), **change}
    with pytest.raises(error, match=message):
        sample(given.pop("logits"), **given)


LOW = torch.finfo(torch.float32).min
ODD_ROWS = {
    # name → (the row, the knobs); each was wrong in a kernel once
    "zeros of both signs, top-k": (lambda z: torch.where(torch.arange(3000) < 100, 0.0, -0.0), {"top_k": 3}),
    "zeros of both signs, top-p": (lambda z: torch.where(torch.arange(3000) < 100, 0.0, -0.0), {"top_p": 0.5}),
    "negative zeros": (lambda z: torch.full((10,), -0.0), {"top_p": 0.5}),
    "more ties than fit at the edge of top-p": (
        lambda z: torch.where(torch.arange(6000) == 77, 5.0, 0.0), {"top_p": 0.99, "min_p": 0.1},
    ),
    "top-p below float32": (lambda z: z[:3000], {"top_k": 50, "top_p": 1e-9}),
    "top-p below float32 and min-p": (lambda z: z[:3000], {"top_k": 50, "top_p": 1e-12, "min_p": 0.5}),
    "an edge that the temperature makes infinite": (
        lambda z: torch.where(z[:1024] < 0, LOW, 0.0), {"temperature": 0.3, "top_k": 1000, "top_p": 0.9},
    ),
    "a temperature near the largest float": (lambda z: z[:100], {"temperature": 1e38, "min_p": 0.1}),
    "masked by the lowest float": (lambda z: torch.where(z[:1000] < 1, LOW, z[:1000]), {"top_p": 0.7}),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_ROWS)
def test_odd_rows_are_sampled_as_by_the_reference(run, device, name):
    make, given = ODD_ROWS[name]
    logits = make(rows((3000,) if "ties" not in name else (6000,), seed=41, scale=1.0))[None]
    seeds = torch.tensor([5])
    ours, theirs = call(run, device, logits, seeds, **given), call(reference, "cpu", logits, seeds, **given)
    assert (int(ours.ids), int(ours.kept), int(ours.status)) == (int(theirs.ids), int(theirs.kept), 0)
    torch.testing.assert_close(ours.logprobs.cpu(), theirs.logprobs, rtol=1e-4, atol=1e-5)
