"""gae: every form of it against hand-computed cases, a float64 loop and what the peers get wrong."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast.dispatch import IMPLEMENTATIONS
from rlhf_fast.ops import gae

HOLES = ("skip", "zero")
NOT_BUILT = "the C++ kernels were not built (RLHF_FAST_CPP=OFF): runs in every other build"
FLOATS = (torch.float32, torch.float64)
EPSILON = {torch.float32: 1e-6, torch.float64: 1e-13}


def loop(rewards, values, mask, last_values=None, cu_seqlens=None, *, gamma, lam, holes):
    """The textbook loop, a token at a time, in Python floats (float64)."""
    advantages, returns = torch.zeros(mask.shape, dtype=torch.float64), torch.zeros(mask.shape, dtype=torch.float64)
    if cu_seqlens is None:
        spans = [((b, slice(None)), b) for b in range(mask.shape[0])]
    else:
        spans = [(slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1])), b) for b in range(len(cu_seqlens) - 1)]
    for span, b in spans:
        r, v, m = rewards[span].tolist(), values[span].tolist(), mask[span].tolist()
        advantage, next_value = 0.0, 0.0 if last_values is None else float(last_values[b])
        seen = False
        for t in reversed(range(len(m))):
            if not m[t]:
                if holes == "zero" and seen:
                    advantage, next_value = gamma * next_value + gamma * lam * advantage, 0.0
                continue
            advantage = r[t] + gamma * next_value - v[t] + (gamma * lam * advantage if gamma * lam else 0.0)
            next_value, seen = v[t], True
            advantages[span][t], returns[span][t] = advantage, advantage + v[t]
    return advantages, returns


def case(shape, dtype=torch.float32, density=0.8, seed=0, poison=True):
    """Random inputs with NaN and inf wherever the mask is False."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    rewards, values = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    if poison:
        rewards, values = rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.inf)
    return rewards, values, mask


def bound(expected: Tensor, dtype: torch.dtype, tokens: int) -> Tensor:
    """An error bound: each of the scan's log2(T) merges rounds once, on sums as large as the largest result."""
    return EPSILON[dtype] * (4 + tokens**0.5) * (1 + expected.abs().max().nan_to_num())


@pytest.mark.parametrize(
    ("holes", "expected"),
    [
        # By hand, gamma 1, lam .95: the last token gets 1 - .2, the one before .2 - .3 + .95 * .8, and so on.
        ("skip", [0.40065, 0.527, 0.0, 0.0, 0.0, 0.66, 0.8]),
        ("zero", [0.2750473, 0.3947866, 0.0, 0.0, 0.0, 0.66, 0.8]),
    ],
)
def test_hand_computed(run, device, holes, expected):
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 1]], device=device).bool()
    rewards = torch.tensor([[0.0, 0, 7, 7, 7, 0, 1]], device=device)
    values = torch.tensor([[0.5, 0.4, 9, 9, 9, 0.3, 0.2]], device=device)
    advantages, returns = run(rewards, values, mask, gamma=1.0, lam=0.95, holes=holes)
    expected = torch.tensor([expected])
    assert torch.allclose(advantages.cpu(), expected, atol=1e-6)
    assert torch.allclose(returns.cpu(), torch.where(mask.cpu(), expected + values.cpu(), 0), atol=1e-6)


SHAPES = [(1, 1), (3, 2), (2, 15), (2, 16), (2, 17), (3, 130), (2, 1025), (1, 2100)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.7, 1.0])
def test_padded(run, device, dtype, holes, shape, density):
    rewards, values, mask = case(shape, dtype, density)
    last = torch.randn(shape[0], dtype=dtype)
    numbers = {"gamma": 0.99, "lam": 0.95, "holes": holes}
    expected = loop(rewards, values, mask, last, **numbers)
    out = run(*(x.to(device) for x in (rewards, values, mask, last)), **numbers)
    for ours, theirs in zip(out, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.cpu() - theirs).abs().max() <= bound(theirs, dtype, shape[1])
        assert (ours.cpu()[~mask] == 0).all()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.0, 0.9), (0.9, 0.0), (0.0, 0.0), (1.0, 0.95)])
@pytest.mark.parametrize("holes", HOLES)
def test_corner_factors(run, device, gamma, lam, holes):
    rewards, values, mask = case((3, 40), torch.float64)
    numbers = {"gamma": gamma, "lam": lam, "holes": holes}
    expected = loop(rewards, values, mask, **numbers)
    out = run(*(x.to(device) for x in (rewards, values, mask)), **numbers)
    for ours, theirs in zip(out, expected, strict=True):
        assert (ours.cpu() - theirs).abs().max() <= bound(theirs, torch.float64, 40)


def test_gamma_and_lam_one_is_the_reward_to_go(run, device):
    rewards, values, mask = case((4, 64), torch.float64, density=1.0)
    advantages, returns = run(*(x.to(device) for x in (rewards, values, mask)), gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(returns.cpu(), to_go, atol=1e-12)
    assert torch.allclose(advantages.cpu(), to_go - values, atol=1e-12)


OFFSETS = [[0, 37], [0, 0, 5, 5, 21, 37], [0, 1, 2, 3, 37], [0, 37, 37]]


@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_equals_padded_bit_for_bit(run, device, holes, offsets, index):
    rewards, values, mask = case((37,), density=0.8)
    last = torch.randn(len(offsets) - 1)
    numbers = {"gamma": 0.99, "lam": 0.95, "holes": holes}
    cu_seqlens = torch.tensor(offsets, dtype=index)
    packed = run(*(x.to(device) for x in (rewards, values, mask, last, cu_seqlens)), **numbers)
    expected = loop(rewards, values, mask, last, cu_seqlens, **numbers)
    for ours, theirs in zip(packed, expected, strict=True):
        assert (ours.cpu() - theirs).abs().max() <= bound(theirs, torch.float32, 37)
    for b, (start, end) in enumerate(pairwise(offsets)):
        if start == end:
            continue
        row = (x[start:end][None].to(device) for x in (rewards, values, mask))
        alone = run(*row, last[b : b + 1].to(device), **numbers)
        for ours, theirs in zip(alone, packed, strict=True):
            assert torch.equal(ours[0], theirs[start:end])


def test_nothing_crosses_from_one_packed_sequence_into_another(run, device):
    rewards, values, mask = case((40,), density=1.0)
    rewards[20:], values[20:] = torch.nan, torch.inf
    cu_seqlens = torch.tensor([0, 20, 40], device=device)
    advantages, returns = run(*(x.to(device) for x in (rewards, values, mask)), None, cu_seqlens, gamma=1.0, lam=0.9)
    assert advantages[:20].isfinite().all()
    assert returns[:20].isfinite().all()


@pytest.mark.parametrize("holes", HOLES)
def test_a_row_does_not_depend_on_its_batch_or_its_padding(run, device, holes):
    rewards, values, mask = case((5, 150), density=0.9)
    numbers = {"gamma": 0.99, "lam": 0.95, "holes": holes}
    whole = run(*(x.to(device) for x in (rewards, values, mask)), **numbers)
    order = torch.tensor([3, 0, 4])
    some = run(*(x[order].to(device) for x in (rewards, values, mask)), **numbers)
    wide = run(*(torch.nn.functional.pad(x, (7, 35)).to(device) for x in (rewards, values, mask)), **numbers)
    for ours, theirs, padded in zip(whole, some, wide, strict=True):
        assert torch.equal(ours[order.to(device)], theirs)
        assert torch.equal(ours, padded[:, 7:157])


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS["gae"], reason=NOT_BUILT)
def test_threads_change_no_bit():
    given = case((33, 600))  # enough tokens for the kernel to share out its rows
    expected = gae(*given)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        out = gae(*given)
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(out, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_strided_views(run, device):
    rewards, values, mask = case((6, 40))
    expected = run(*(x.to(device) for x in (rewards, values, mask)))
    transposed = run(*(x.t().contiguous().t().to(device) for x in (rewards, values, mask)))
    wide = [torch.stack([x, x.flip(1)], 2).to(device)[:, :, 0] for x in (rewards, values, mask)]
    rows = [torch.stack([x, x.flip(1)], 1).to(device)[:, 0] for x in (rewards, values, mask)]
    for views in (wide, rows):
        assert not views[0].is_contiguous()
        for ours, theirs in zip(run(*views), expected, strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(transposed, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(run, device, shape):
    for out in run(*(x.to(device) for x in case(shape))):
        assert out.shape == shape
    none = torch.zeros(1, dtype=torch.int32, device=device)
    for out in run(*(x.to(device) for x in case((0,))), None, none):
        assert out.shape == (0,)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.sampled_from([True, True, False]), min_size=0, max_size=40), min_size=1, max_size=5),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    holes=st.sampled_from(HOLES),
    seed=st.integers(0, 1000),
)
def test_any_mask_padded_and_packed(rows, gamma, lam, holes, seed):
    width = max(len(row) for row in rows)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([row + [False] * (width - len(row)) for row in rows]).bool().reshape(len(rows), width)
    rewards, values = (torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    last = torch.randn(len(rows), generator=generator, dtype=torch.float64)
    numbers = {"gamma": gamma, "lam": lam, "holes": holes}
    out = gae(rewards, values, mask, last_values=last, **numbers)
    for ours, theirs in zip(out, loop(rewards, values, mask, last, **numbers), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10, rtol=1e-10)
    inside = torch.tensor([[t < len(row) for t in range(width)] for row in rows]).bool().reshape(mask.shape)
    cu_seqlens = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    flat = (x[inside] for x in (rewards, values, mask))
    packed = gae(*flat, last_values=last, cu_seqlens=cu_seqlens, **numbers)
    for ours, theirs in zip(packed, out, strict=True):
        assert torch.equal(ours, theirs[inside])


@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("offsets", [None, [0, 3, 3, 9, 20]])
def test_gradcheck(holes, offsets):
    shape = (3, 9) if offsets is None else (20,)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    rewards, values, mask = case(shape, torch.float64, density=0.6, poison=False)
    last = torch.randn(3 if offsets is None else 4, dtype=torch.float64)

    def f(rewards, values, last_values):
        return gae(
            rewards, values, mask, gamma=0.9, lam=0.7, last_values=last_values, cu_seqlens=cu_seqlens, holes=holes
        )

    inputs = [x.requires_grad_() for x in (rewards, values, last)]
    assert torch.autograd.gradcheck(f, inputs)
    # gradcheck allows 1e-3: the derivative of a linear map can be held to the last digits.
    for out in range(2):
        exact = torch.autograd.functional.jacobian(lambda *x, out=out: f(*x)[out], tuple(inputs))
        for i, x in enumerate(inputs):
            basis = torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)
            zeros = [torch.zeros_like(y) for y in inputs]
            for k, direction in enumerate(basis):
                column = f(*(direction if j == i else zeros[j] for j in range(3)))[out]
                assert torch.allclose(exact[i].reshape(-1, len(basis))[:, k], column.flatten(), atol=1e-12)


def test_pitfall_13_gradients_do_not_leak_from_masked_tokens():
    rewards, values, mask = case((2, 12), torch.float64, density=0.5)
    rewards.requires_grad_(), values.requires_grad_()
    sum(x.sum() for x in gae(rewards, values, mask)).backward()
    assert rewards.grad.isfinite().all()
    assert (rewards.grad[~mask] == 0).all()
    assert (values.grad[~mask] == 0).all()


def test_one_float64_input_makes_float64_results():
    rewards, values, mask = case((2, 5), torch.float32)
    for at in range(3):
        given = [x.double() if i == at else x for i, x in enumerate((rewards, values, torch.ones(2)))]
        assert {x.dtype for x in gae(*given[:2], mask, last_values=given[2])} == {torch.float64}


def test_pitfall_10_a_second_derivative_raises():
    rewards, values, mask = case((2, 5), torch.float64, density=1.0)
    rewards.requires_grad_()
    (first,) = torch.autograd.grad((gae(rewards, values, mask)[0] ** 2).sum(), rewards, create_graph=True)
    with pytest.raises(NotImplementedError, match="gae_backward has no derivative"):
        first.sum().backward()


@pytest.mark.parametrize("offsets", [None, [0, 4, 12]])
def test_opcheck(offsets):
    rewards, values, mask = case((3, 12) if offsets is None else (12,), density=0.7, poison=False)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    last = torch.randn(3 if offsets is None else 2)
    args = (rewards.requires_grad_(), values.requires_grad_(), mask, last.requires_grad_(), cu_seqlens)
    torch.library.opcheck(torch.ops.rlhf_fast.gae.default, args, {"gamma": 0.9, "lam": 0.8, "holes": "zero"})


def test_the_gradient_of_nothing_is_no_view_of_its_input():
    nothing = torch.zeros(2, 0)
    args = (nothing, nothing.clone(), nothing.bool(), None)
    torch.library.opcheck(torch.ops.rlhf_fast.gae_backward.default, args, {"gamma": 0.9, "lam": 0.8})


def test_compiles_without_a_graph_break_for_any_length():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: gae(*x, gamma=0.9)[1] * 2, fullgraph=True, dynamic=True)
    for tokens in (9, 16, 33):
        inputs = case((2, tokens))
        assert torch.equal(compiled(*inputs), gae(*inputs, gamma=0.9)[1] * 2)


def test_bfloat16_values_give_float32():
    rewards, values, mask = case((2, 20))
    values = values.bfloat16()
    out = gae(rewards, values, mask)
    for ours, theirs in zip(out, gae(rewards, values.float(), mask), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("grad", [False, True])
def test_a_dispatch_mode_sees_the_call(grad):
    """The short way from autograd to the kernel is taken only where nothing else wants the call."""
    seen = []

    class Listen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    rewards = torch.randn(2, 3, requires_grad=grad)
    arguments = rewards, torch.randn(2, 3), torch.ones(2, 3).bool()
    alone = gae(*arguments)
    with Listen():
        watched = gae(*arguments)
    assert torch.ops.rlhf_fast.gae.default in seen
    assert all(torch.equal(x, y) for x, y in zip(alone, watched, strict=True))


def test_a_forward_mode_derivative_is_refused():
    """A tangent that is dropped would be a derivative of 0."""
    values, mask = torch.randn(2, 3), torch.ones(2, 3).bool()
    with pytest.raises(NotImplementedError, match="gae has no forward-mode derivative"):
        torch.func.jvp(lambda x: gae(x, values, mask)[0], (torch.randn(2, 3),), (torch.ones(2, 3),))
    with torch.autograd.forward_ad.dual_level():
        gae(torch.randn(2, 3), values, mask)
        dual = torch.autograd.forward_ad.make_dual(torch.randn(2, 3), torch.ones(2, 3))
        with pytest.raises(NotImplementedError, match="gae has no forward-mode derivative"):
            gae(dual, values, mask)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros(2, 4)}, ValueError, r"gae: values must be like rewards, got \[2, 4\] instead of"),
        ({"mask": torch.ones(2, 3)}, TypeError, "gae: mask must be bool, got float32"),
        ({"rewards": torch.zeros(3)}, ValueError, r"gae: rewards must be \[B, T\], got \[3\]"),
        ({"rewards": [[0.0]]}, TypeError, "gae: rewards must be a tensor, got list"),
        ({"last_values": torch.zeros(3)}, ValueError, r"gae: last_values must be \[B\]"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"gae: rewards must be \[N\] with cu_seqlens"),
        ({"gamma": 1.5}, ValueError, "gae: gamma must be between 0 and 1, got 1.5"),
        ({"lam": None}, TypeError, "gae: lam must be a number, got NoneType"),
        ({"lam": float("nan")}, ValueError, "gae: lam must be between 0 and 1, got nan"),
        ({"holes": "carry"}, ValueError, "gae: holes must be one of skip, zero, got 'carry'"),
    ],
)
def test_bad_input_names_op_argument_and_rule(change, error, message):
    given = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), "mask": torch.ones(2, 3).bool()} | change
    with pytest.raises(error, match=message):
        gae(given.pop("rewards"), given.pop("values"), given.pop("mask"), **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2, 3, dtype=torch.float64)}, "values and outputs must have the dtype of rewards"),
        ({"rewards": torch.zeros(2, 3).bfloat16()}, "rewards must be float32 or float64"),
        ({"mask": torch.ones(2, 3)}, "mask must be bool"),
        ({"mask": torch.ones(2, 4).bool()}, "values, mask and outputs must have the shape of rewards"),
        ({"last_values": torch.zeros(3)}, r"last_values must be \[B\]"),
        ({"last_values": torch.zeros(2, dtype=torch.float64)}, "last_values must have the dtype of rewards"),
        ({"cu_seqlens": torch.tensor([0, 6])}, r"rewards must be \[B, T\], or \[N\] with cu_seqlens"),
        ({"holes": "carry"}, "holes must be skip or zero"),
    ],
)
def test_a_compiled_kernel_called_directly_checks_its_addresses(run, request, device, change, message):
    if not any(name in request.node.callspec.id for name in ("cpp", "simt", "cuda-cuda")):
        pytest.skip("PyTorch and Triton check what they are given: runs for cpp, simt and cuda")
    given = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), "mask": torch.ones(2, 3).bool()} | change
    given = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    with pytest.raises(ValueError, match=message):
        run(given.pop("rewards"), given.pop("values"), given.pop("mask"), **given)


@pytest.mark.parametrize("offsets", [[0, 5], [1, 6], [0, 4, 3, 6], [0, 7], [0, -1, 6]])
@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_offsets_that_do_not_rise_from_0_to_n(name, offsets):
    if name not in IMPLEMENTATIONS["gae"]:
        pytest.skip(NOT_BUILT)
    with pytest.raises(ValueError, match="gae: cu_seqlens must rise from 0 to N = 6"):
        IMPLEMENTATIONS["gae"][name](*case((6,)), None, torch.tensor(offsets))


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS["gae"], reason="triton is not installed")
@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize(
    ("shape", "offsets"),
    [((2, 16.1), None), ((1, 18), None), ((17.5,), [0, 17.5]), ((19,), [0.1, 1, 1, 17.3, 18.7])],  # in chunks
)
def test_splitting_long_sequences_changes_no_bit_in_triton(monkeypatch, shape, offsets, holes):
    """A program per chunk, in three launches, against a program per sequence."""
    from rlhf_fast.triton_kernels import gae as kernels

    device, chunk = ("cuda", kernels.BLOCK_T) if torch.cuda.is_available() else ("cpu", 32)
    monkeypatch.setattr(kernels, "BLOCK_T", chunk)
    shape = (*shape[:-1], int(shape[-1] * chunk))
    offsets = None if offsets is None else [int(x * chunk) for x in offsets]
    rewards, values, mask = case(shape, seed=7)
    mask[..., -3 * chunk // 2 :] = False  # more padding than a chunk
    mask[..., 2 * chunk : 6 * chunk] = True  # chunks with and without holes
    rewards, values = rewards.nan_to_num(0, 0, 0), values.nan_to_num(0, 0, 0)
    cu_seqlens = None if offsets is None else torch.tensor(offsets, device=device)
    last = torch.linspace(-1, 1, shape[0] if offsets is None else len(offsets) - 1, device=device)
    inputs = [x.to(device) for x in (rewards, values, mask)]
    found = []
    assert kernels.few_and_long(len(last), shape[-1], mask.numel())
    for split in (True, False):
        monkeypatch.setattr(kernels, "few_and_long", lambda *_, split=split: split)
        outputs = [torch.full(shape, torch.nan, device=device) for _ in range(2)]
        kernels.gae(*inputs, last, cu_seqlens, 0.99, 0.95, holes, *outputs)
        found.append(outputs)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert not a[..., :chunk].eq(0).all()


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS["gae"], reason="triton is not installed")
def test_few_and_long_sequences_are_split_in_triton():
    from rlhf_fast.triton_kernels.gae import few_and_long

    assert few_and_long(1, 2**20, 2**20)
    assert few_and_long(64, 8192, 64 * 8192)
    assert not few_and_long(64, 1024, 64 * 1024)
    assert not few_and_long(4096, 8192, 4096 * 8192)
    assert not few_and_long(0, 0, 0)
