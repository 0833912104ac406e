"""kl: every form of it against float64 sums over the vocabulary by torch's own functions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.ops import kl, logprobs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (1, 7), (5, 31), (3, 1000), (2, 32001)]


def case(shape, dtype=torch.float32, seed=0, scale=3.0, apart=1.0):
    """Logits of two models that are ``apart`` from each other, and chosen ids."""
    generator = torch.Generator().manual_seed(seed)
    logits, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    return (logits * scale).to(dtype), (logits * scale + noise * apart).to(dtype), ids


def oracle(logits, ref_logits, ids, temperature=1.0):
    """The four in float64, differentiable; no -inf logits."""
    logp, ref_logp = (x.double().div(temperature).log_softmax(-1) for x in (logits, ref_logits))
    divergence = torch.nn.functional.kl_div(ref_logp, logp, reduction="none", log_target=True).sum(-1)
    chosen = (x.gather(-1, ids[..., None].long())[..., 0] for x in (logp, ref_logp))
    return divergence, *chosen, -(logp.exp() * logp).sum(-1)


@pytest.fixture
def gradient(run, run_backward, device):
    """The gradient of the logits, forward and backward both by the implementation under test."""

    def compute(logits, ref_logits, ids, mask=None, *, upstream, temperature=1.0):
        tensors = [None if t is None else t.to(device) for t in (logits, ref_logits, ids, mask)]
        divergence, _, _, entropy, lse, ref_lse = run(*tensors, temperature=temperature)
        grads = (u.to(device, lse.dtype) for u in upstream)
        saved = divergence, entropy, lse, ref_lse
        return run_backward(*grads, *tensors[:2], *saved, *tensors[2:], temperature=temperature).cpu()

    return compute


def test_hand_computed(run, device):
    # pi = 1/4 1/2 1/4, ref = 1/2 1/4 1/4: KL = -1/4 log 2 + 1/2 log 2.
    logits = torch.tensor([[0.0, math.log(2), 0.0]], device=device)
    ref_logits = torch.tensor([[math.log(2), 0.0, 0.0]], device=device)
    out = run(logits, ref_logits, torch.tensor([1], device=device))
    expected = [0.25 * math.log(2), -math.log(2), -math.log(4), 1.5 * math.log(2), math.log(4), math.log(4)]
    assert torch.allclose(torch.cat(out).cpu(), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("numbers", [{}, {"temperature": 0.7}], ids=str)
def test_forward(run, device, dtype, shape, numbers):
    logits, ref_logits, ids = case(shape, dtype)
    before = logits.clone(), ref_logits.clone()
    out = run(logits.to(device), ref_logits.to(device), ids.to(device), **numbers)
    for ours, theirs in zip(out, oracle(logits, ref_logits, ids, **numbers), strict=False):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        assert (ours.cpu() - theirs).abs().max() <= tolerance * (1 + theirs.abs().max())
    assert torch.equal(logits, before[0])
    assert torch.equal(ref_logits, before[1])


@pytest.mark.parametrize("apart", [0.0, 0.03, 10.0])
def test_near_and_far_models(run, device, apart):
    # Estimates from top-k terms come out negative for near models (verl#7856): the exact sum must not.
    logits, ref_logits, ids = case((20, 500), seed=1, apart=apart)
    ours = run(logits.to(device), ref_logits.to(device), ids.to(device))[0].cpu()
    theirs = oracle(logits, ref_logits, ids)[0]
    # float32 rounds each of the two logprobs, of about 10 nats, by up to 5e-7.
    assert torch.allclose(ours.double(), theirs, rtol=1e-6, atol=1e-6)
    assert apart == 0 or bool((ours > 1e-5).all())
    assert apart != 0 or bool((ours == 0).all())


def test_the_same_numbers_as_logprobs(run, device):
    logits, ref_logits, ids = (t.to(device) for t in case((6, 333), seed=2))
    out = run(logits, ref_logits, ids, temperature=0.8)
    for field, x in ((1, logits), (2, ref_logits)):
        alone = logprobs(x, ids, temperature=0.8)
        assert torch.allclose(out[field], alone.logprobs, atol=2e-6)
        assert torch.allclose(out[3 + field], alone.lse, atol=2e-6)
    assert torch.allclose(out[3], logprobs(logits, ids, temperature=0.8).entropy, atol=2e-6)


def test_peaks_after_the_first_tiles(run, device):
    # A kernel that takes the maxima of the tiles before as its references: exp overflows, or digits are lost.
    rises = torch.tensor([0.5, 3.75, 4.25, 8.0, 30.0, 100.0, 500.0])
    logits, ref_logits, ids = case((len(rises), 9000), seed=11, scale=0.5, apart=0.2)
    logits[:, 5000], ref_logits[:, 5000] = rises, rises.flip(0)
    ref_logits[:, 8500] = 6.0
    ids[::2] = 5000
    out = run(logits.to(device), ref_logits.to(device), ids.to(device))
    for ours, theirs in zip(out, oracle(logits, ref_logits, ids), strict=False):
        error = (ours.cpu() - theirs).abs()
        assert bool((error <= 2e-6 * (1 + theirs.abs())).all()), error


def test_minus_inf(run, device):
    logits, ref_logits, ids = case((5, 40), seed=3)
    ids[:] = 30
    logits[:, :8], ref_logits[:, :8] = -math.inf, -math.inf  # in both: 0, and not -inf + inf
    logits[1, 8:20] = -math.inf  # in the policy only: these terms are 0
    ref_logits[2, 35] = -math.inf  # in the reference only: infinite
    logits[3, 35], ref_logits[3, 35] = -900.0, -math.inf  # and so it is where pi underflows: it is not 0
    out = [o.cpu() for o in run(logits.to(device), ref_logits.to(device), ids.to(device))]
    assert out[0].isinf().tolist() == [False, False, True, True, False]
    assert (out[0][2:4] == math.inf).all()
    for row, start in ((0, 8), (4, 8)):
        rest = oracle(logits[row, start:], ref_logits[row, start:], ids[row] - start)
        for ours, theirs in zip(out, rest, strict=False):
            assert torch.allclose(ours[row].double(), theirs, atol=5e-6)
    logp, ref_logp = logits[1, 20:].double().log_softmax(0), ref_logits[1].double().log_softmax(0)[20:]
    assert torch.allclose(out[0][1].double(), (logp.exp() * (logp - ref_logp)).sum(), atol=5e-6)
    assert out[3].isfinite().all()


def test_pitfall_13_nothing_leaks_from_masked_rows(run, device, gradient):
    logits, ref_logits, ids = case((5, 50), seed=4)
    mask = torch.tensor([True, False, True, False, True])
    expected = [torch.where(mask, o, 0) for o in oracle(logits, ref_logits, ids)]
    logits[1], ref_logits[1], logits[3], ref_logits[3] = torch.nan, 0, 0, math.inf
    ids[1], ids[3] = -100, 50
    out = run(*(t.to(device) for t in (logits, ref_logits, ids, mask)))
    for ours, theirs in zip(out, expected, strict=False):
        assert (ours.cpu()[~mask] == 0).all()
        assert torch.allclose(ours.cpu().double(), theirs, atol=5e-6)
    upstream = [torch.full((5,), torch.nan).masked_fill(mask, 1.0) for _ in range(3)]
    grad = gradient(logits, ref_logits, ids, mask, upstream=upstream)
    assert (grad[~mask] == 0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (11,), (2, 3, 2, 7)], ids=str)
def test_any_leading_shape(run, device, shape):
    logits, ref_logits, ids = (t.to(device) for t in case(shape))
    flat = run(logits.reshape(-1, shape[-1]), ref_logits.reshape(-1, shape[-1]), ids.reshape(-1))
    for ours, theirs in zip(run(logits, ref_logits, ids), flat, strict=True):
        assert ours.shape == shape[:-1]
        assert torch.equal(ours.flatten(), theirs)


def test_strided_views_are_taken_as_they_are(run, device):
    wide, ref_wide, _ = (t.to(device) for t in case((3, 7, 20), seed=5))
    other = ref_wide.transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in ((wide[:, :-1], ref_wide[:, :-1]), (wide, other), (wide[:, 1:, ::2], ref_wide[:, :-1, 10:])):
        ids = torch.zeros(a.shape[:-1], dtype=torch.int32, device=device)
        for ours, theirs in zip(run(a, b, ids), run(a.contiguous(), b.contiguous(), ids), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [31, 32001])
def test_a_row_does_not_depend_on_its_batch(run, device, size):
    tensors = [t.to(device) for t in case((6, size), seed=6)]
    whole = run(*tensors, temperature=0.7)
    order = torch.tensor([5, 0, 3], device=device)
    some = run(*(t[order] for t in tensors), temperature=0.7)
    for ours, theirs in zip(whole, some, strict=True):
        assert torch.equal(ours[order], theirs)
    for row in range(6):
        alone = run(*(t[row : row + 1] for t in tensors), temperature=0.7)
        assert all(torch.equal(ours[row : row + 1], theirs) for ours, theirs in zip(whole, alone, strict=True))


def test_without_ids_there_are_no_logprobs(run, device):
    logits, ref_logits, ids = (t.to(device) for t in case((4, 9)))
    out = kl(logits, ref_logits)
    assert out.logprobs is None
    assert out.ref_logprobs is None
    assert torch.equal(out.kl, kl(logits, ref_logits, ids).kl)
    bare = run(logits, ref_logits)
    assert [o.shape for o in bare] == [(4,), (0,), (0,), (4,), (4,), (4,)]
    assert torch.equal(bare[0], run(logits, ref_logits, ids)[0])


def test_two_dtypes(run, device):
    logits, ref_logits, ids = case((4, 50))
    half = ref_logits.bfloat16()
    out = run(logits.to(device), half.to(device), ids.to(device))
    for ours, theirs in zip(out, oracle(logits, half, ids), strict=False):
        assert torch.allclose(ours.cpu().double(), theirs, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_row_has_the_same_bits_at_any_address(run, device, gradient, dtype):
    # Misaligned pointers miscompile in Triton (flash-attn, CCE), and 16 bytes are loaded in another way than one logit.
    *values, chosen = case((2, 5000), dtype, seed=11)
    expected = None
    for offset, gap in ((0, 0), (8, 8), (1, 0), (4, 8), (0, 3), (7, 1)):
        moved = [torch.zeros(offset + 2 * (5000 + gap), dtype=dtype, device=device)[offset:] for _ in values]
        moved = [x.view(2, -1)[:, :5000].copy_(value) for x, value in zip(moved, values, strict=True)]
        ids = torch.zeros(2 + offset, dtype=torch.int32, device=device)[offset:].copy_(chosen)
        upstream = torch.tensor([[0.3, -2.0], [1.1, 0.5], [-0.7, 0.2]])
        out = [*(o.cpu() for o in run(*moved, ids)), gradient(*moved, ids, upstream=upstream)]
        expected = expected or out
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(out, expected, strict=True)), (offset, gap)


def test_an_id_out_of_range(run, device, looks_at_ids):
    logits, ids = torch.zeros(3, 5, device=device), torch.tensor([0, 5, 2], device=device)
    if not looks_at_ids:
        assert run(logits, logits, ids)[1].isnan().tolist() == [False, True, False]
    else:
        with pytest.raises(IndexError, match=r"kl: ids must be in \[0, 5\), got 5 in row 1"):
            run(logits, logits, ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient(run, device, gradient, dtype, shape, temperature):
    logits, ref_logits, ids = case(shape, dtype, seed=7)
    generator = torch.Generator().manual_seed(8)
    upstream = [torch.randn(shape[:-1], generator=generator) for _ in range(3)]
    exact = logits.double().clone().requires_grad_()
    divergence, chosen, _, entropy = oracle(exact, ref_logits, ids, temperature)
    sum((u * o).sum() for u, o in zip(upstream, (divergence, chosen, entropy), strict=True)).backward()
    ours = gradient(logits, ref_logits, ids, upstream=upstream, temperature=temperature)
    assert ours.dtype == dtype
    rounding = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    error = (ours.double() - exact.grad).abs()
    assert bool((error <= rounding * exact.grad.abs() + (1e-13 if dtype == torch.float64 else 6e-6)).all())


@pytest.mark.parametrize("temperature", [0.7, 0.3])
@pytest.mark.parametrize("size", [1, 64, 5000])
def test_a_certain_token_is_certain_at_any_temperature(run, device, gradient, temperature, size):
    """Its logit, fused with the division by the temperature, would miss the logsumexp by what was rounded there."""
    logits, ids = torch.zeros(3, size), torch.full((3,), size // 2)
    logits[torch.arange(3), ids] = torch.tensor([29.0, 47.0, 60.0])
    models = logits, 0.9 * logits
    expected = oracle(*models, ids, temperature)
    found = run(*(t.to(device) for t in (*models, ids)), temperature=temperature)
    for ours, theirs in zip(found, expected, strict=False):
        assert (ours.cpu() - theirs).abs().max() <= 1e-10
    ones = torch.ones(3)
    assert gradient(*models, ids, upstream=(ones, ones, ones), temperature=temperature).abs().max() <= 1e-10


def test_an_infinite_kl_that_nobody_asks_about_has_no_gradient(run, device, gradient):
    logits, ref_logits, ids = case((2, 9), seed=9)
    ref_logits[0, 3] = -math.inf
    ids[0] = 1
    one, nothing = torch.ones(2), torch.zeros(2)
    exact = logits.double().requires_grad_()
    oracle(exact, logits, ids)[1].sum().backward()
    ours = gradient(logits, ref_logits, ids, upstream=(nothing, one, nothing))
    assert torch.allclose(ours.double(), exact.grad, atol=2e-6)


def test_gradcheck():
    logits, ref_logits, _ = case((2, 4, 6), torch.float64, seed=10, scale=1.0)
    ids = torch.tensor([[0, 5, 2], [1, 1, 4]])
    mask = torch.tensor([[True, True, False], [True, False, True]])

    def f(x):
        out = kl(x[:, :-1], ref_logits[:, 1:], ids, mask=mask, temperature=0.6)
        return out.kl, out.logprobs, out.entropy

    assert torch.autograd.gradcheck(f, (logits.requires_grad_(),), atol=1e-7, rtol=1e-6)
    assert torch.autograd.gradcheck(lambda x: kl(x, ref_logits).kl, (logits,), atol=1e-7, rtol=1e-6)


def test_the_reference_model_gets_no_gradient():
    logits, ref_logits, ids = case((2, 6), torch.float64)
    ref_logits.requires_grad_()
    out = kl(logits.requires_grad_(), ref_logits, ids)
    assert not out.ref_logprobs.requires_grad
    (out.kl.sum() + out.logprobs.sum() + out.entropy.sum()).backward()
    assert ref_logits.grad is None


def test_pitfall_10_a_second_derivative_raises():
    logits, ref_logits, _ = case((2, 5), torch.float64)
    logits.requires_grad_()
    (first,) = torch.autograd.grad((kl(logits, ref_logits).kl ** 2).sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="kl_backward has no derivative"):
        first.sum().backward()


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 4), size=st.integers(1, 70), temperature=st.floats(0.1, 5), seed=st.integers(0, 10**6))
def test_any_size_and_temperature(rows, size, temperature, seed):
    tensors = case((rows, size), torch.float64, seed)
    for ours, theirs in zip(kl(*tensors, temperature=temperature), oracle(*tensors, temperature), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-11, rtol=1e-12)


def test_opcheck():
    logits, ref_logits, ids = case((2, 3, 12))
    mask = torch.tensor([[True, False, True], [True, True, True]])
    for arguments in ((), (ids, mask)):
        inputs = (logits.clone().requires_grad_(), ref_logits, *arguments)
        torch.library.opcheck(torch.ops.rlhf_fast.kl.default, inputs, {"temperature": 0.7})


def test_compiles_without_a_graph_break_for_any_length():
    torch._dynamo.reset()

    def f(logits, ref_logits, ids):
        out = kl(logits, ref_logits, ids, temperature=0.7)
        return out.kl + out.logprobs

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for tokens in (5, 9, 16):
        logits, ref_logits, ids = case((2, tokens, 33))
        grads = []
        for function in (compiled, f):
            leaf = logits.clone().requires_grad_()
            out = function(leaf, ref_logits, ids)
            out.sum().backward()
            grads.append((out.detach(), leaf.grad))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 0)}, ValueError, r"kl: logits must be \[..., V\] with V at least 1, got \[2, 0\]"),
        ({"ref_logits": torch.zeros(2, 4)}, ValueError, "kl: ref_logits must be like logits, got"),
        ({"ref_logits": None}, TypeError, "kl: ref_logits must be a tensor, got NoneType"),
        ({"ids": torch.zeros(2)}, TypeError, "kl: ids must be int64, int32, got float32"),
        ({"mask": torch.ones(3).bool()}, ValueError, "kl: mask must be like logits without its last dimension"),
        ({"temperature": 0.0}, ValueError, "kl: temperature must be finite and above 0, got 0.0"),
    ],
)
def test_bad_input_names_op_argument_and_rule(change, error, message):
    with pytest.raises(error, match=message):
        kl(**{"logits": torch.zeros(2, 3), "ref_logits": torch.zeros(2, 3), **change})
