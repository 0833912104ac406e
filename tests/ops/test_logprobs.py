"""logprobs: every form of it against float64 log_softmax, and against what the peers get wrong."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.ops import logprobs
from rlhf_fast.ops.logprobs import CHUNK, backward, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (1, 7), (5, 31), (3, 1000), (2, 32001)]
#: Of a result in nats: the reference's own error, which a kernel may double.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def case(shape, dtype=torch.float32, seed=0, scale=3.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift
    return logits.to(dtype), torch.randint(0, shape[-1], shape[:-1], generator=generator)


def oracle(logits, ids, temperature=1.0, softcap=None):
    """The same three in float64 by torch's own functions, differentiable; no -inf logits."""
    z = logits.double()
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    logp = z.log_softmax(-1)
    return logp.gather(-1, ids[..., None].long())[..., 0], -(logp.exp() * logp).sum(-1), z.logsumexp(-1)


@pytest.fixture
def gradient(run, run_backward, device):
    """The gradient of the logits, forward and backward both by the implementation under test."""

    def compute(logits, ids, mask=None, *, upstream, **numbers):
        logits, ids, mask = (None if t is None else t.to(device) for t in (logits, ids, mask))
        _, entropy, lse = run(logits, ids, mask, **numbers)
        grads = (u.to(device, lse.dtype) for u in upstream)
        return run_backward(*grads, logits, ids, entropy, lse, mask, **{"temperature": 1.0, **numbers}).cpu()

    return compute


@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_hand_computed(run, device, index):
    # exp of the logits: 1 2 1, so that the masses are 1/4 1/2 1/4.
    logits = torch.tensor([[0.0, math.log(2), 0.0], [0.0, math.log(2), 0.0]], device=device)
    out = run(logits, torch.tensor([1, 2], dtype=index, device=device))
    expected = [[-math.log(2), -math.log(4)], [1.5 * math.log(2)] * 2, [math.log(4)] * 2]
    assert torch.allclose(torch.stack(out).cpu(), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("numbers", [{}, {"temperature": 0.7}, {"softcap": 30.0, "temperature": 1.5}], ids=str)
def test_forward(run, device, dtype, shape, numbers):
    logits, ids = case(shape, dtype)
    before = logits.clone()
    out = run(logits.to(device), ids.to(device), **numbers)
    for ours, theirs in zip(out, oracle(logits, ids, **numbers), strict=True):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        scale = 1 + theirs.abs().max()
        assert (ours.cpu() - theirs).abs().max() <= TOLERANCE[ours.dtype] * scale
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_peak_after_the_first_tiles(run, device, dtype):
    # A kernel that takes the maximum of the tiles before as its reference: exp overflows, or digits are lost.
    rises = [0.5, 3.75, 4.25, 8.0, 50.0, 100.0, 500.0, 1e4]
    logits, ids = case((len(rises), 9000), dtype, seed=11, scale=0.5, shift=-5.0)
    logits[:, 5000] = torch.tensor(rises, dtype=dtype)
    logits[3, 4100:5000], logits[4, :4096] = -math.inf, -math.inf  # a tile of next to nothing, one of nothing at all
    ids[::2] = 5000
    ids[1::2] = 8000
    logits[logits == -math.inf] = -1e9  # its exp is 0 too, and the oracle has an entropy
    for stored in (logits, torch.where(logits == -1e9, -math.inf, logits)):
        out = run(stored.to(device), ids.to(device))
        for ours, theirs in zip(out, oracle(logits, ids), strict=True):
            error = (ours.cpu() - theirs).abs()
            assert bool((error <= 2e-6 * (1 + theirs.abs())).all()), error


def test_a_row_of_nothing_is_what_torch_makes_of_it(run, device):
    logits = torch.full((1, 9), -math.inf)
    chosen, entropy, lse = (o.cpu() for o in run(logits.to(device), torch.tensor([3], device=device)))
    assert logits.log_softmax(-1).isnan().all()
    assert chosen.isnan().all()
    assert entropy.isnan().all()
    assert lse.item() == logits.logsumexp(-1).item() == -math.inf


def test_pitfall_13_nothing_leaks_from_masked_rows(run, device):
    logits, ids = case((6, 50), seed=2)
    mask = torch.tensor([True, False, True, False, False, True])
    expected = [torch.where(mask, o, 0) for o in oracle(logits, ids)]
    logits[1], logits[3], logits[4] = torch.nan, math.inf, -math.inf
    ids[1], ids[3], ids[4] = -100, 50, 10**9
    out = run(logits.to(device), ids.to(device), mask.to(device))
    for ours, theirs in zip(out, expected, strict=True):
        assert (ours.cpu()[~mask] == 0).all()
        assert torch.allclose(ours.cpu().double(), theirs, atol=5e-6)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 1)], ids=str)
def test_empty(run, device, shape):
    logits, ids = case(shape)
    assert all(o.shape == shape[:-1] for o in run(logits.to(device), ids.to(device)))


def test_any_leading_shape(run, device):
    for shape in ((11,), (2, 11), (2, 3, 11), (2, 3, 2, 11)):
        logits, ids = case(shape)
        flat = run(logits.reshape(-1, 11).to(device), ids.reshape(-1).to(device))
        for ours, theirs in zip(run(logits.to(device), ids.to(device)), flat, strict=True):
            assert ours.shape == shape[:-1]
            assert torch.equal(ours.flatten(), theirs)


def test_strided_views_are_taken_as_they_are(run, device):
    wide, ids = case((3, 7, 20), seed=3)
    wide = wide.to(device)
    views = wide[:, :-1], wide[:, 1:, ::2], wide.transpose(0, 1), wide.permute(2, 1, 0), wide[:, ::3, 3:17]
    for view in views:
        chosen = torch.zeros(view.shape[:-1], dtype=torch.int64, device=device)
        assert not view.is_contiguous()
        for ours, theirs in zip(run(view, chosen), run(view.contiguous(), chosen), strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(run(wide, ids.t().contiguous().t().to(device)), run(wide, ids.to(device)), strict=True):
        assert torch.equal(ours, theirs)
    logits, ids = wide[:, :-1], ids[:, 1:].to(device)  # the shift of every language model: both are views
    for ours, theirs in zip(run(logits, ids), oracle(logits.cpu(), ids.cpu()), strict=True):
        assert torch.allclose(ours.cpu().double(), theirs, atol=5e-6)


@pytest.mark.parametrize("size", [31, 1000, 32001])
def test_a_row_does_not_depend_on_its_batch(run, device, size):
    logits, ids = case((9, size), seed=4)
    numbers = {"temperature": 0.7, "softcap": 20.0}
    whole = run(logits.to(device), ids.to(device), **numbers)
    order = torch.tensor([7, 0, 3, 8])
    some = run(logits[order].to(device), ids[order].to(device), **numbers)
    for field, ours in enumerate(whole):
        assert torch.equal(ours[order.to(device)], some[field])
    for row in range(9):
        one = slice(row, row + 1)
        alone = run(logits[one].to(device), ids[one].to(device), **numbers)
        assert all(torch.equal(ours[one], theirs) for ours, theirs in zip(whole, alone, strict=True))


def test_threads_change_no_bit():
    # Tensor.sum of one long row adds in another order than of many, once there is more than one thread.
    logits, ids = case((6, 60001), seed=5, scale=0.1, shift=-11.0)
    logits[:, 0] = 0  # a total of about 2: the logarithm of a large one would round the difference away

    def results(rows):
        leaf = logits[rows].clone().requires_grad_()
        out = logprobs(leaf, ids[rows])
        sum(o.sum() for o in out).backward()
        return *out, leaf.grad

    before, expected = torch.get_num_threads(), results(slice(0, 6))
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            alone = [results(slice(i, i + 1)) for i in range(6)]
            for whole, rows, theirs in zip(results(slice(0, 6)), zip(*alone, strict=True), expected, strict=True):
                assert torch.equal(whole, theirs)
                assert torch.equal(torch.cat(rows), theirs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_row_has_the_same_bits_at_any_address(run, device, gradient, dtype):
    # Misaligned pointers miscompile in Triton (flash-attn, CCE), and 16 bytes are loaded in another way than one logit.
    values, chosen = case((2, 5000), dtype, seed=11)
    expected = None
    for offset, gap in ((0, 0), (8, 8), (1, 0), (4, 8), (0, 3), (7, 1)):
        logits = torch.zeros(offset + 2 * (5000 + gap), dtype=dtype, device=device)[offset:].view(2, -1)[:, :5000]
        ids, mask = torch.zeros(2 + offset, dtype=torch.int32, device=device)[offset:], None
        logits.copy_(values), ids.copy_(chosen)
        if offset:
            mask = torch.ones(2 + offset, dtype=torch.bool, device=device)[offset:]
        upstream = torch.tensor([[0.3, -2.0], [1.1, 0.5], [-0.7, 0.2]])
        out = [*(o.cpu() for o in run(logits, ids, mask)), gradient(logits, ids, mask, upstream=upstream)]
        expected = expected or out
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(out, expected, strict=True)), (offset, gap)


def test_an_id_out_of_range(run, device, looks_at_ids):
    logits = torch.zeros(4, 5, device=device)
    for bad in (5, -1, -100):
        ids = torch.tensor([0, 1, bad, 2], device=device)
        if not looks_at_ids:
            assert run(logits, ids)[0].isnan().tolist() == [False, False, True, False]
        else:
            with pytest.raises(IndexError, match=rf"logprobs: ids must be in \[0, 5\), got {bad} in row 2"):
                run(logits, ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("numbers", [{}, {"temperature": 0.7}, {"softcap": 30.0, "temperature": 1.5}], ids=str)
def test_gradient(run, device, gradient, dtype, shape, numbers):
    logits, ids = case(shape, dtype, seed=6)
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(shape[:-1], generator=generator) for _ in range(3)]
    exact = logits.double().requires_grad_()
    sum((u * o).sum() for u, o in zip(upstream, oracle(exact, ids, **numbers), strict=True)).backward()
    ours = gradient(logits, ids, upstream=upstream, **numbers)
    assert ours.dtype == dtype
    rounding = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    error = (ours.double() - exact.grad).abs()
    assert bool((error <= rounding * exact.grad.abs() + (1e-13 if dtype == torch.float64 else 4e-6)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("numbers", [{"temperature": 0.7}, {"temperature": 0.3}, {"softcap": 50.0, "temperature": 0.3}])
@pytest.mark.parametrize("size", [1, 64, 5000])
def test_a_certain_token_is_certain_at_any_temperature(run, device, gradient, dtype, numbers, size):
    """Its logit, fused with the division by the temperature, would miss the logsumexp by what was rounded there."""
    logits, ids = torch.zeros(3, size, dtype=dtype), torch.full((3,), size // 2)
    logits[torch.arange(3), ids] = torch.tensor([29.0, 47.0, 60.0], dtype=dtype)
    found = run(logits.to(device), ids.to(device), **numbers)
    for ours, theirs in zip(found[:2], oracle(logits, ids, **numbers)[:2], strict=True):
        assert (ours.cpu() - theirs).abs().max() <= 1e-10
    ones = torch.ones(3)
    assert gradient(logits, ids, upstream=(ones, ones, 0 * ones), **numbers).abs().max() <= 1e-10


def test_pitfall_05_the_entropy_has_a_gradient(run, device, gradient):
    # TRL's chunked head returns an entropy whose gradient is silently 0.
    logits, ids = case((3, 20), torch.float64, seed=8)
    nothing = torch.zeros(3)
    exact = logits.clone().requires_grad_()
    oracle(exact, ids)[1].sum().backward()
    ours = gradient(logits, ids, upstream=(nothing, nothing + 1, nothing))
    assert exact.grad.abs().max() > 0.1
    assert torch.allclose(ours, exact.grad, atol=1e-12)


def test_gradient_of_masked_rows_and_minus_inf(run, device, gradient):
    logits, ids = case((4, 30), seed=9)
    logits[:, 7:20], ids[2] = -math.inf, 8
    mask = torch.tensor([True, False, True, True])
    logits[1], ids[1], ids[0], ids[3] = torch.nan, -5, 2, 25
    upstream = [torch.tensor([1.0, torch.nan, 2.0, -1.0]) for _ in range(3)]
    ours = gradient(logits, ids, mask, upstream=upstream)
    assert (ours[1] == 0).all()
    assert ours.isfinite().all()
    assert (ours[[0, 3], 7:20] == 0).all()
    assert ours[2, 8] == 2  # g (1 - p), and p is 0
    rest = torch.cat([logits[[0, 3], :7], logits[[0, 3], 20:]], 1).double().requires_grad_()
    index = torch.where(ids[[0, 3]] < 7, ids[[0, 3]], ids[[0, 3]] - 13)
    sum((torch.tensor([1.0, -1.0]) * o).sum() for o in oracle(rest, index)).backward()
    assert torch.allclose(torch.cat([ours[[0, 3], :7], ours[[0, 3], 20:]], 1).double(), rest.grad, atol=4e-6)


@pytest.mark.parametrize("numbers", [{}, {"temperature": 0.6, "softcap": 3.0}], ids=str)
def test_gradcheck(numbers):
    wide, _ = case((2, 4, 6), torch.float64, seed=10, scale=1.0)
    ids = torch.tensor([[0, 5, 2], [1, 1, 4]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert torch.autograd.gradcheck(
        lambda x: tuple(logprobs(x[:, :-1], ids, mask=mask, **numbers)), (wide.requires_grad_(),), atol=1e-7, rtol=1e-6
    )


def test_pitfall_10_a_second_derivative_raises():
    logits, ids = case((2, 5), torch.float64)
    logits.requires_grad_()
    (first,) = torch.autograd.grad((logprobs(logits, ids).logprobs ** 2).sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="logprobs_backward has no derivative"):
        first.sum().backward()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.dtype != torch.bfloat16:
                self.size = max(self.size, t.numel())
        return out


def test_no_full_size_float32_copy():
    logits, ids = torch.zeros(64, 2, 65537, dtype=torch.bfloat16)[:, :1], torch.zeros(64, 1, dtype=torch.int64)
    assert logits.numel() > 4 * CHUNK
    rows = torch.zeros(64, 1)
    for call in (
        lambda: reference(logits, ids),
        lambda: backward(*[rows] * 3, logits, ids, rows, rows, temperature=1.0),
    ):
        with LargestTensor() as largest:
            call()
        assert 0 < largest.size <= CHUNK


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 4),
    size=st.integers(1, 70),
    temperature=st.floats(0.1, 5),
    softcap=st.none() | st.floats(1, 50),
    seed=st.integers(0, 10**6),
)
def test_any_size_and_temperature(rows, size, temperature, softcap, seed):
    logits, ids = case((rows, size), torch.float64, seed)
    numbers = {"temperature": temperature, "softcap": softcap}
    for ours, theirs in zip(logprobs(logits, ids, **numbers), oracle(logits, ids, **numbers), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-11, rtol=1e-12)


def test_opcheck():
    logits, ids = case((2, 3, 12))
    mask = torch.tensor([[True, False, True], [True, True, True]])
    for arguments in ((ids,), (ids.int(), mask)):
        torch.library.opcheck(
            torch.ops.rlhf_fast.logprobs.default,
            (logits.clone().requires_grad_(), *arguments),
            {"temperature": 0.7, "softcap": 5.0},
        )


def test_compiles_without_a_graph_break_for_any_length():
    torch._dynamo.reset()

    def f(logits, ids, mask):
        out = logprobs(logits * 2, ids, mask=mask, temperature=0.7)
        return out.logprobs + 0.1 * out.entropy

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for tokens in (5, 9, 16):
        logits, ids = case((2, tokens, 33))
        mask = torch.arange(2 * tokens).reshape(2, tokens) % 3 > 0
        grads = []
        for function in (compiled, f):
            leaf = logits.clone().requires_grad_()
            out = function(leaf, ids, mask)
            out.sum().backward()
            grads.append((out.detach(), leaf.grad))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(())}, ValueError, r"logprobs: logits must be \[..., V\] with V at least 1, got \[\]"),
        ({"logits": torch.zeros(2, 0)}, ValueError, r"logprobs: logits must be \[..., V\] with V at least 1"),
        ({"logits": torch.zeros(2, 3).long()}, TypeError, "logprobs: logits must be float32, .*got int64"),
        ({"ids": torch.zeros(3).long()}, ValueError, r"logprobs: ids must be like logits without its last dimension"),
        ({"ids": torch.zeros(2)}, TypeError, "logprobs: ids must be int64, int32, got float32"),
        ({"ids": [0, 1]}, TypeError, "logprobs: ids must be a tensor, got list"),
        ({"mask": torch.ones(2)}, TypeError, "logprobs: mask must be bool, got float32"),
        ({"mask": torch.ones(2, 3).bool()}, ValueError, "logprobs: mask must be like logits without"),
        ({"temperature": 0.0}, ValueError, "logprobs: temperature must be finite and above 0, got 0.0"),
        ({"temperature": math.nan}, ValueError, "logprobs: temperature must be finite and above 0, got nan"),
        ({"temperature": "1"}, TypeError, "logprobs: temperature must be a number, got str"),
        ({"softcap": -1.0}, ValueError, "logprobs: softcap must be finite and above 0, got -1.0"),
    ],
)
def test_bad_input_names_op_argument_and_rule(change, error, message):
    given = {"logits": torch.zeros(2, 3), "ids": torch.zeros(2).long(), **change}
    with pytest.raises(error, match=message):
        logprobs(given.pop("logits"), given.pop("ids"), **given)
