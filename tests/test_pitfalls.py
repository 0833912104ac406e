"""What real libraries got wrong, a test for each, named by its number: `grep -rn test_pitfall_07 tests`.

Where a test of one op says it best, it stands with that op: 5 and 13 of `logprobs`, 10 of each op, 11 of `ppo_loss`,
12 of `sample`, 13 of `kl` and `gae`. Two do not apply yet: 9 (no gradient for a frozen head, DTensor weights) is about
the head, and so is the part of 5 where TRL's chunked one returns an entropy without a gradient; no op takes hidden
states. Of 7, test_aot.py counts what is compiled, and test_gpu.py what a GPU compiles.
"""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch

from rlhf_fast.dispatch import IMPLEMENTATIONS
from rlhf_fast.ops import gae, kl, logprobs, ppo_loss, sample

ROOT = Path(__file__).parent.parent
PPO = {
    "cliprange_low": 0.2, "cliprange_high": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "entropy_coef": 0.01,
    "kl_coef": 0.1, "kl": "k3", "dual_clip": None, "log_ratio_clamp": 20.0, "aggregate": "token_mean",
}  # fmt: skip
OVER_LOGITS = pytest.mark.ops("logprobs", "kl", "sample")
MASKED = pytest.mark.ops("logprobs", "kl", "gae", "ppo_loss")
ALL = pytest.mark.ops("logprobs", "kl", "gae", "ppo_loss", "sample")


@pytest.fixture
def op(request):
    """The name of the op under test."""
    return request.node.callspec.params["run"][0]


@pytest.fixture
def form(request):
    """The name of the implementation under test."""
    return request.node.callspec.params["run"][1]


@pytest.fixture
def gradient(op, form, run):
    """The gradient of the logits of `logprobs` or `kl`, forward and backward both by the form under test."""
    if form == "simt":
        from simt.build import simt_implementation

        backward = simt_implementation(f"{op}_backward")
    else:
        backward = IMPLEMENTATIONS[f"{op}_backward"].get(form, IMPLEMENTATIONS[f"{op}_backward"]["reference"])

    def compute(upstream, *tensors):
        out = run(*tensors)
        kept = (out[1], out[2]) if op == "logprobs" else (out[0], *out[3:])
        logits, rest = tensors[: 1 + (op == "kl")], tensors[1 + (op == "kl") :]
        return backward(*upstream, *logits, *(rest[:1] if op == "logprobs" else ()), *kept,
                        *(rest[1:] if op == "logprobs" else rest), temperature=1.0)  # fmt: skip

    return compute


def inputs(op, rows, size=6, *, dtype=torch.float32, seed=0):
    """Tensors in the order of the schema, and the numbers, of a small case without padding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    ids = torch.randint(size, (rows,), generator=generator)
    mask, masks = torch.ones(rows, dtype=torch.bool), torch.ones(rows, size, dtype=torch.bool)
    logits = (normal(rows, size) * 3).to(dtype)
    if op == "logprobs":
        return [logits, ids, mask], {}
    if op == "kl":
        return [logits, (logits.float() + normal(rows, size)).to(dtype), ids, mask], {}
    if op == "sample":
        return [logits, torch.arange(rows), torch.zeros(rows, dtype=torch.int64)], {}
    if op == "gae":
        return [normal(rows, size), normal(rows, size), masks, normal(rows)], {}
    near = [normal(rows, size) * 0.4 for _ in range(3)]
    if op == "advantages":
        return [normal(rows), *near[:2], normal(rows, size), masks, normal(rows)], {}
    return [*near[:2], normal(rows, size), masks, *(normal(rows, size) for _ in range(4)), near[2]], PPO


def on(device, tensors):
    return [None if t is None else t.to(device) for t in tensors]


def equal(ours, theirs):
    """Bit for bit, NaN included."""
    return all(torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)) for a, b in zip(ours, theirs, strict=True))


@OVER_LOGITS
@pytest.mark.parametrize("shift", [0.0, -1000.0])
@pytest.mark.parametrize("excluded", ["the first block", "the last block", "every other token"])
def test_pitfall_01_minus_infinity_logits(run, device, op, excluded, shift):
    """exp(-inf - -inf) when the first block is all -inf: NaN (Liger, flash-attn). Entropy of -inf: 0 inf (TRL)."""
    size = 8192 + 9
    there = torch.arange(size)
    kept = {"the first block": there >= 8192, "the last block": there < 9, "every other token": there % 2 == 1}[
        excluded
    ]
    tensors, _ = inputs(op, 3, size, seed=1)
    tensors = [t + shift if t.dim() == 2 else t for t in tensors]
    logits = [i for i, t in enumerate(tensors) if t.dim() == 2]
    places = kept.nonzero()[:, 0]
    if op != "sample":
        tensors[-2] = places[torch.tensor([0, 4, 8])]
    fewer = [t[:, kept] if i in logits else t for i, t in enumerate(tensors)]
    if op != "sample":
        fewer[-2] = torch.tensor([0, 4, 8])
    for i in logits:
        tensors[i][:, ~kept] = -math.inf
    ours, theirs = ([o.cpu() for o in run(*on(device, t))] for t in (tensors, fewer))
    if op == "sample":
        assert torch.equal(ours[0], places[theirs[0]])
        ours, theirs = ours[1:], theirs[1:]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.isfinite(a).all()
        assert torch.allclose(a, b, atol=5e-6)


@pytest.mark.ops("logprobs", "kl")
def test_pitfall_01_gradient_of_minus_infinity_logits(run, device, op, gradient):
    """Use select, never ``*mask``: -inf times a weight of 0 is NaN in the gradient too."""
    tensors, _ = inputs(op, 2, 5000, seed=2)
    tensors[0][:, :4500] = -math.inf
    if op == "kl":
        tensors[1][:, :4500] = -math.inf
    tensors[-2] = torch.tensor([4600, 3])
    out = run(*on(device, tensors))
    assert out[1 if op == "kl" else 0].tolist()[1] == -math.inf
    grad = gradient(torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, 1.0]], device=device), *on(device, tensors)).cpu()
    assert torch.isfinite(grad).all()
    assert bool((grad[0, :4500] == 0).all())
    assert bool((grad[:, 4500:] != 0).any(1).all())


@OVER_LOGITS
@pytest.mark.parametrize("shift", [-20.0, 80.0, -1e4])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_pitfall_02_tail_columns_are_minus_infinity(run, device, op, shift, scale):
    """Vocabulary tail columns must be -inf, not 0 (verl: 17 nats off when logits are shifted)."""
    tensors, _ = inputs(op, 4, 1001, seed=3)
    tensors[0] = tensors[0] / 3 * scale + shift
    if op == "kl":
        tensors[1] = tensors[1] / 3 * scale + shift
    out = [o.cpu() for o in run(*on(device, tensors))]
    logp = tensors[0].double().log_softmax(1)
    ids = tensors[1] if op == "logprobs" else tensors[2] if op == "kl" else out[0]
    at = {"logprobs": (0, 1), "kl": (1, 3), "sample": (2, 4)}[op]
    expected = logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(1)
    for field, theirs in zip(at, expected, strict=True):
        assert (out[field] - theirs).abs().max() <= 2e-6 * (1 + theirs.abs().max())
    if op == "kl":
        theirs = (logp.exp() * (logp - tensors[1].double().log_softmax(1))).sum(1)
        assert (out[0] - theirs).abs().max() <= 2e-6 * (1 + logp.abs().max())  # a difference of two such logprobs
    if op != "sample":
        lse = tensors[0].double().logsumexp(1)
        assert torch.allclose(out[2 if op == "logprobs" else 4].double(), lse, rtol=2e-7, atol=2e-6)


@pytest.fixture
def launches(monkeypatch):
    """Triton launches, noted down instead of made: (function, grid, its arguments, options)."""
    noted = []

    def note(kernel, *args, grid, warmup, **kwargs):
        parameters = inspect.signature(kernel.fn).parameters
        options = {name: kwargs.pop(name) for name in [*kwargs] if name not in parameters}
        arguments = dict(zip(parameters, args, strict=False)) | kwargs
        noted.append((kernel.fn, grid(arguments) if callable(grid) else grid, arguments, options))

    triton = pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", note)
    monkeypatch.setattr(triton.runtime.JITFunction, "run", note)
    return noted


@ALL
def test_pitfall_03_more_rows_than_a_grid_has_on_y(run, device, op, form, request):
    """Tokens on grid-x: grid-y ends at 65535, and Liger dies at T >= 65536."""
    rows = 65537
    tensors, numbers = inputs(op, rows, 2, seed=4)
    if form == "simt":  # minutes, as in Triton's interpreter: the grid is what matters
        sources = [p.read_text() for p in (ROOT / "kernels" / "cuda").iterdir()]
        assert all(re.search(r"blockIdx\.[yz]|\bdim3\b", text) is None for text in sources)
        return
    if form == "triton" and device == "cpu":
        noted = request.getfixturevalue("launches")
        run(*tensors, **numbers)
        assert noted
        assert all(set(grid[1:]) <= {1} for _, grid, _, _ in noted)
        assert max(grid[0] for _, grid, _, _ in noted) >= (1 if op == "ppo_loss" else rows)
        return
    out = run(*on(device, tensors), **numbers)
    if op == "ppo_loss":
        expected = IMPLEMENTATIONS[op]["reference"](
            *(t.double() if t.is_floating_point() else t for t in tensors), **numbers
        )
        assert torch.allclose(out[0].cpu().double(), expected[0], rtol=1e-5)
        tensors, out, last = tensors[2:3], out[2:3], -expected[2][-5:]
        assert torch.allclose(-out[0][-5:].cpu().double(), last, rtol=1e-4, atol=1e-9)
        return
    last = run(*on(device, [t[-5:] for t in tensors]), **numbers)
    assert equal([o[-5:] for o in out], last)


@OVER_LOGITS
def test_pitfall_03_row_offsets_past_two_to_the_31(run, device, op):
    """Row offsets in int64."""
    try:  # never touched but for the rows: no memory behind it
        storage = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    except RuntimeError:
        pytest.skip("4 GB of address space are not to be had here")
    tensors, _ = inputs(op, 3, 40, dtype=torch.bfloat16, seed=5)
    far = storage.as_strided((3, 40), (2**30, 1))
    far.copy_(tensors[0])
    assert equal(run(far, *on(device, tensors[1:])), run(*on(device, tensors)))


@pytest.mark.ops("logprobs", "kl")
def test_pitfall_04_the_true_class_of_a_confident_token_keeps_its_gradient(run, device, gradient, op):
    """softmax - 1 at the true class in bf16 cancels (Liger, TransformerEngine) to 0 or 2^-8: here it is 2.5e-4."""
    logits = torch.zeros(1, 2, dtype=torch.bfloat16, device=device)
    logits[0, 1] = -8.3125
    exact = 1 / (1 + math.exp(8.3125))
    one, nothing = torch.ones(1, device=device), torch.zeros(1, device=device)
    upstream = (one, nothing, nothing) if op == "logprobs" else (nothing, one, nothing)
    tensors = [logits] * (1 + (op == "kl"))
    grad = gradient(upstream, *tensors, torch.tensor([0], device=device), None)
    assert grad.dtype == torch.bfloat16
    assert torch.allclose(grad[0].cpu().double(), torch.tensor([exact, -exact]).double(), rtol=2**-8)


def public(op):
    """The public function on its first tensors, the names of these, and of the outputs that have a gradient."""
    tensors, _ = inputs(op, 4, seed=6)
    if op in ("logprobs", "kl"):
        names = ["logits"] if op == "logprobs" else ["logits", "ref_logits"]
        f = {"logprobs": logprobs, "kl": kl}[op]
        outputs = {"logprobs": {"logprobs", "entropy", "lse"}, "kl": {"kl", "logprobs", "entropy"}}[op]
        return (lambda *x: f(*x, tensors[-2])._asdict()), tensors[: len(names)], ["logits"], outputs
    if op == "sample":
        return (lambda x: sample(x, seeds=tensors[1])._asdict()), tensors[:1], [], set()
    if op == "gae":

        def both(rewards, values, last_values):
            return dict(zip(outputs, gae(rewards, values, tensors[2], last_values=last_values), strict=True))

        outputs = ["advantages", "returns"]
        return both, [tensors[0], tensors[1], tensors[3]], ["rewards", "values", "last_values"], set(outputs)

    def loss(logprobs, values, entropy, old_logprobs, advantages, ref_logprobs):
        out = ppo_loss(
            logprobs, old_logprobs, advantages, tensors[3], values=values, old_values=tensors[5], returns=tensors[6],
            entropy=entropy, entropy_coef=0.1, ref_logprobs=ref_logprobs, kl_coef=0.2,
        )  # fmt: skip
        return {"loss": out.loss, **out.stats}

    chosen = [tensors[i] for i in (0, 4, 7, 1, 2, 8)]
    return loss, chosen, ["logprobs", "values", "entropy"], {"loss"}


@pytest.mark.parametrize("op", ["logprobs", "kl", "gae", "ppo_loss", "sample"])
def test_pitfall_05_an_output_that_looks_differentiable_is(op):
    """An output that looks differentiable and is not: TRL's chunked head returns an entropy whose gradient is 0."""
    call, tensors, differentiable, expected = public(op)
    leaves = [t.double().requires_grad_() for t in tensors]
    out = call(*leaves)
    assert {name for name, value in out.items() if value.requires_grad} == expected
    generator = torch.Generator().manual_seed(7)
    for name in sorted(expected):
        weights = torch.randn(out[name].shape, generator=generator, dtype=torch.float64)
        grads = torch.autograd.grad((out[name] * weights).sum(), leaves, allow_unused=True, retain_graph=True)
        for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
            if i >= len(differentiable):
                assert grad is None  # a constant says so, and is not 0
                continue
            step = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                ends = [call(*(x + h * step if x is leaf else x for x in leaves))[name] for h in (-1e-6, 1e-6)]
            slope = ((ends[1] - ends[0]) / 2e-6 * weights).sum()
            assert torch.allclose((grad * step).sum(), slope, rtol=1e-5, atol=1e-7), (name, i)


@OVER_LOGITS
def test_pitfall_06_bfloat16_logits_give_float32_results(run, device, op):
    """bf16 log_softmax is off by up to 0.07 nats: compute and return fp32."""
    tensors, _ = inputs(op, 16, 5000, dtype=torch.bfloat16, seed=8)
    out = [o.cpu() for o in run(*on(device, tensors))]
    floats = [o for o in out if o.is_floating_point()]
    assert {o.dtype for o in floats} == {torch.float32}
    ids = {"logprobs": tensors[1], "kl": tensors[-2], "sample": out[0]}[op]
    chosen = out[{"logprobs": 0, "kl": 1, "sample": 2}[op]]
    expected = tensors[0].double().log_softmax(1).gather(1, ids[:, None])[:, 0]
    assert (chosen - expected).abs().max() < 1e-5
    rounded = tensors[0].log_softmax(1).gather(1, ids[:, None])[:, 0]
    assert (rounded - expected).abs().max() > 1e-2  # so that this can fail


@pytest.mark.parametrize(
    "op", [op for op in IMPLEMENTATIONS if "triton" in IMPLEMENTATIONS[op] and "backward" not in op]
)
def test_pitfall_07_runtime_numbers_are_not_compiled_in(op, launches):
    """Runtime numbers (N, T, temperature, eps) as compile-time constants recompile for each length."""
    import triton.language as tl

    compiled = []
    for rows, size, changed in ((3, 17, 0.7), (5, 49, 0.9), (1, 33, 0.3)):  # none a multiple of 8: those are a variant
        tensors, numbers = inputs(op, rows, size)
        floats = [a.name for a in getattr(torch.ops.rlhf_fast, op).default._schema.arguments if str(a.type) == "float"]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        launches.clear()
        IMPLEMENTATIONS[op]["triton"](*on(device, tensors), **(numbers | dict.fromkeys(floats, changed)))
        found = []
        for function, _, arguments, options in launches:
            parameters = inspect.signature(function).parameters
            constant = {
                n: v for n, v in arguments.items() if parameters[n].annotation in (tl.constexpr, "tl.constexpr")
            }
            found.append((function.__name__, constant, options))
        compiled.append(found)
    assert compiled[0]
    assert any(constant for _, constant, _ in compiled[0])
    assert compiled[0] == compiled[1] == compiled[2]


def test_pitfall_08_no_kernel_spills():
    """One-block-per-row kernels spill registers above 64k columns: none here, and test_aot.py compares this table."""
    text = (ROOT / "benchmarks" / "resources.md").read_text()
    spills = [line.strip("| ").split("|")[-1].strip() for line in text.splitlines() if "_kernel" in line]
    assert len(spills) > 20
    assert set(spills) == {"0"}


@pytest.mark.parametrize("op", ["logprobs", "kl", "gae", "ppo_loss", "sample"])
def test_pitfall_10_nothing_is_changed_in_place(op):
    """In-place gradients break a second use of the logits."""
    call, tensors, _, expected = public(op)
    leaves = [t.clone().requires_grad_() for t in tensors]
    versions = [x._version for x in leaves]
    out = call(*leaves)
    for _ in range(2 if expected else 0):
        sum(out[name].sum() for name in expected).backward(retain_graph=True)
    assert [x._version for x in leaves] == versions
    assert equal(leaves, tensors)
    if expected:
        once = [x.grad / 2 for x in leaves if x.grad is not None]
        again = [x.requires_grad_() for x in (t.clone() for t in tensors)]
        fresh = call(*again)
        sum(fresh[name].sum() for name in expected).backward()
        assert equal(once, [x.grad for x in again if x.grad is not None])


@MASKED
def test_pitfall_13_what_stands_in_padding_changes_no_bit(run, device, op):
    """NaN in padding leaks through x m + (1 - m) y (verl's and OpenRLHF's GAE)."""
    tensors, numbers = inputs(op, 5, 7, seed=9)
    at = next(i for i, t in enumerate(tensors) if t.dtype == torch.bool)
    tensors[at] = torch.rand(tensors[at].shape, generator=torch.Generator().manual_seed(1)) < 0.6
    expected = run(*on(device, tensors), **numbers)
    assert all(torch.isfinite(o).all() for o in expected)
    for poison in (torch.nan, math.inf, -math.inf, 3e38):
        dirty = []
        for i, t in enumerate(tensors):
            spoiled = t.clone()
            if i != at and t.shape[: tensors[at].dim()] == tensors[at].shape:
                spoiled[~tensors[at]] = poison if t.is_floating_point() else -(10**9)
            dirty.append(spoiled)
        assert equal(run(*on(device, dirty), **numbers), expected)


@ALL
def test_pitfall_14_odd_offsets(run, device, op):
    """16-byte-misaligned label pointers miscompile in Triton (noted by flash-attn and CCE): test odd offsets."""
    for dtype in (torch.float32, torch.bfloat16) if op not in ("gae", "ppo_loss") else (torch.float32,):
        tensors, numbers = inputs(op, 5, 37, dtype=dtype, seed=10)
        if op in ("logprobs", "kl"):
            tensors[-2] = tensors[-2].int()
        expected = run(*on(device, tensors), **numbers)
        for offset in (1, 3):
            moved = []
            for t in on(device, tensors):
                room = torch.zeros(t.numel() + offset, dtype=t.dtype, device=device)
                moved.append(room[offset:].view(t.shape).copy_(t))
                assert moved[-1].data_ptr() % 16 != 0
            assert equal(run(*moved, **numbers), expected)


@pytest.mark.ops("logprobs", "kl")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tokens_masked_by_the_lowest_float(run, device, op, dtype):
    """As good as -inf: a partial sum that is lifted that far down is 0, not 0 * inf; forward and gradient."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 4096, generator=generator).to(dtype)
    logits[:, 100:] = torch.finfo(dtype).min
    tensors = [logits, torch.tensor([5, 99])]
    if op == "kl":
        tensors.insert(1, (logits.float() + torch.randn(2, 4096, generator=generator)).clamp(min=-1e30).to(dtype))
    outputs = run(*on(device, [*tensors, None]), temperature=1.0)
    seen = [x[:, :100].double() for x in tensors[:-1]]
    logp = seen[0].log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    expected = {"logprobs": (logp[[0, 1], [5, 99]], entropy)}
    if op == "kl":
        ref = seen[1].log_softmax(-1)
        expected["kl"] = ((logp.exp() * (logp - ref)).sum(-1), logp[[0, 1], [5, 99]], ref[[0, 1], [5, 99]], entropy)
    for ours, theirs in zip(outputs, expected[op], strict=False):
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.ops("logprobs")
def test_gradient_beside_tokens_masked_by_the_lowest_float(run, run_backward, device):
    logits, ids = torch.randn(1, 4096, generator=torch.Generator().manual_seed(4)), torch.tensor([5])
    logits[:, 100:] = torch.finfo(torch.float32).min
    given = on(device, [torch.ones(1), torch.zeros(1), torch.zeros(1), logits, ids])
    _, entropy, lse = run(*given[3:], None)  # its own: an entropy of NaN is 0 * NaN in every element
    grad = run_backward(*given, entropy, lse, None, temperature=1.0, softcap=None).cpu()
    expected = -logits[:, :100].double().softmax(-1)
    expected[0, 5] += 1
    torch.testing.assert_close(grad[:, :100].double(), expected, rtol=1e-5, atol=1e-7)
    assert (grad[:, 100:] == 0).all()


@pytest.mark.ops("kl")
def test_kl_where_the_references_of_a_row_fall(run, device):
    """The reference model's largest logit comes first, and what follows weighs nothing against it."""
    size = 4096
    ref = torch.cat([torch.full((size,), x) for x in (100.0, 0.0, -100.0)])[None]
    logits = torch.cat([torch.full((size,), x) for x in (0.0, 10.0, 10.0)])[None]
    divergence = run(*on(device, [logits, ref, None, None]), temperature=1.0)[0]
    logp, ref_logp = logits.double().log_softmax(-1), ref.double().log_softmax(-1)
    expected = (logp.exp() * (logp - ref_logp)).sum(-1)
    torch.testing.assert_close(divergence.double().cpu(), expected, rtol=1e-5, atol=1e-5)
