"""The raw functions of `_cpu` (docs/kernels.md): what is no tensor of theirs is refused, and nothing is written."""

import pytest
import torch

import rlhf_fast as rf
from rlhf_fast import dispatch

if isinstance(dispatch.extension("_cpu"), str):
    pytest.skip("_cpu was not compiled", allow_module_level=True)
from rlhf_fast import _cpu

B, T, V = 3, 5, 17
CODES = {torch.float32: 0, torch.float64: 1, torch.int32: 4, torch.int64: 5, torch.bool: 6, torch.int8: 7}


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


MASK = torch.arange(T) < torch.tensor([[5], [3], [4]])
IDS, KEPT = torch.tensor([1, 4, 2]), torch.tensor([True, False, True])
KNOBS = [torch.full((B,), x, dtype=torch.float64) for x in (0.9, 0.9, 0.01, 1.1, 0.1, 0.1)]
PER_TOKEN = [torch.zeros(B, V, dtype=torch.int32), numbers(B, V), torch.ones(B, V, dtype=torch.bool)]
LOSS = [0.2, 0.2, 0.2, 0.1, 0.01, 0.05, "k3", None, 20.0, "token_mean"]

#: Op → arguments, those of them that may be absent, its outputs: shapes of float32, or dtypes of a number per row.
CALLS = {
    "gae": ([numbers(B, T), numbers(B, T), MASK, numbers(B), None, 1.0, 0.95, "skip"], {3}, [(B, T)] * 2),
    "gae packed": (
        [numbers(15), numbers(15), MASK.flatten(), numbers(3), torch.tensor([0, 5, 9, 15]), 1.0, 0.95, "skip"],
        {3, 4},
        [(15,)] * 2,
    ),
    "logprobs": ([numbers(B, V), IDS, KEPT, 1.0, None], {2}, [(B,)] * 3),
    "logprobs row": ([numbers(V), torch.tensor(3), torch.tensor(True), 1.0, None], {2}, [()] * 3),
    "logprobs_backward": (
        [*[numbers(B)] * 3, numbers(B, V), IDS, *[numbers(B)] * 2, KEPT, 1.0, None],
        {7},
        [(B, V)],
    ),
    "kl": ([numbers(B, V), numbers(B, V), IDS, KEPT, 1.0], {2, 3}, [(B,)] * 6),
    "kl_backward": (
        [*[numbers(B)] * 3, *[numbers(B, V)] * 2, *[numbers(B)] * 4, IDS, KEPT, 1.0],
        {9, 10},
        [(B, V)],
    ),
    "ppo_loss": (
        [*[numbers(B, T)] * 3, MASK, *[numbers(B, T)] * 5, torch.tensor(4.0), *LOSS],
        {5, 7, 8, 9},
        [(), (9,), *[(B, T)] * 3],
    ),
    "ppo_loss_backward": ([torch.tensor(1.0), *[numbers(B, T)] * 3], set(), [(B, T)] * 3),
    "advantages": (
        [numbers(B), *[numbers(B, T)] * 3, MASK, numbers(B), torch.tensor(0.1), 0.05, "k1", "last", None, 1.0, 0.95,
         "skip", True, True, False],
        {5, 6},
        [(B, T)] * 3,
    ),
    "sample": (
        [numbers(B, V), IDS, IDS, KNOBS[0], torch.tensor([5, 5, 5]), *KNOBS[1:], *PER_TOKEN],
        set(range(3, 13)),
        [torch.int64, *[torch.float32] * 4, torch.int64, torch.int8],
    ),
}  # fmt: skip


def view(x):
    return (x.data_ptr(), CODES[x.dtype], tuple(x.shape), x.stride()) if isinstance(x, torch.Tensor) else x


def call(name, arguments):
    return getattr(_cpu, name.split()[0])(*arguments)


def outputs(shapes):
    """Each in a room of its own, for a call that is not refused may write past its end."""
    return [room((B,), s) if isinstance(s, torch.dtype) else room(s) for s in shapes]


def room(shape, dtype=torch.float32):
    return torch.zeros(4096, dtype=dtype)[: torch.Size(shape).numel()].view(shape)


def spoiled(x):
    """What is no such tensor; addresses are real ones, with room behind them."""
    where, code, shape, strides = view(x)
    yield 0, code, shape, strides
    yield where, -1, shape, strides
    yield where, 8, shape, strides
    yield where, 2 if code == 6 else 6, shape, strides
    yield where, code, (1, *shape), (1, *strides)
    yield where, code, tuple(-n for n in shape) or (-1,), strides or (1,)
    yield where, code, [*shape], strides
    yield where, code, shape, (*strides, 1)
    yield where, code, (1,) * 9, (1,) * 9
    yield torch.Tensor
    yield "tensor"
    if shape:
        yield where, code, shape[1:], strides[1:]


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_tensor_of_the_call_is_refused(name):
    given, optional, shapes = CALLS[name]
    made = outputs(shapes)
    valid = [view(x) for x in (*given, *made)]
    call(name, valid)
    expected = [x.clone() for x in made]
    for wrong in (valid[:-1], [*valid, None], []):
        with pytest.raises(TypeError):
            call(name, wrong)
    for i, x in enumerate((*given, *made)):
        if not isinstance(x, torch.Tensor):
            continue
        bad = [*spoiled(x), *([] if i in optional else [None])]
        if x.dim() and i >= len(given):
            wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
            bad.append(view(wide[..., ::2]))
        for other in bad:
            with pytest.raises((ValueError, TypeError)):
                call(name, [*valid[:i], other, *valid[i + 1 :]])
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))  # nothing was written


def test_a_tensor_without_elements_needs_no_address():
    empty = (0, 0, (0, T), (T, 1))
    _cpu.gae(empty, empty, (0, 6, (0, T), (T, 1)), None, None, 1.0, 0.95, "skip", empty, empty)


def test_raw_inputs_may_have_any_strides():
    logits, ids = numbers(B, V), IDS.numpy()
    other = numbers(V, 2 * B).t()[::2]
    other.copy_(logits)
    made = outputs([(B,)] * 3)
    turned = ids[::-1].copy()[::-1]  # of NumPy, with a negative stride
    assert turned.strides == (-8,)
    at = (turned.ctypes.data, 5, (B,), (-1,))
    _cpu.logprobs(view(other), at, None, 1.0, None, *map(view, made))
    expected = logits.double().log_softmax(-1).gather(-1, IDS[:, None])[:, 0]
    assert torch.allclose(made[0].double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(rf.logprobs(logits, IDS).logprobs, made[0])
