"""What only a GPU can show, of every op in every form: host syncs, CUDA graphs, streams, compiles, sizes past 2^31.

All of it is driven by the table in calls.py. Without a GPU the same code runs on the C++ kernels and the references,
with a device that has no streams and whose graphs are calls, so that a mistake in a test shows here.
"""

import contextlib
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from calls import BIG, CALLS, LONG, PUBLIC, SMALL, USUAL, Arguments, call_of
from torch import Tensor

from rlhf_fast.dispatch import IMPLEMENTATIONS

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NEEDS_GPU = pytest.mark.skipif(not GPU, reason="no GPU here: runs in `make gpu-check`")
KERNELS = ("cuda", "triton") if GPU else ("cpp",)
#: Every call in every form that runs here; "served" is what the dispatcher takes.
FORMS = [(call, name) for call in CALLS for name in (*KERNELS, "reference") if name in IMPLEMENTATIONS[call.op]]
FORMS += [(call, "served") for call in CALLS]
BIG_FORMS = [(call, name) for call in BIG for name in KERNELS if name in IMPLEMENTATIONS[call.op]]
every_form = pytest.mark.parametrize(("call", "name"), FORMS, ids=[f"{call.name} {name}" for call, name in FORMS])
every_public = pytest.mark.parametrize("call", [c for c in CALLS if c.op in PUBLIC], ids=lambda call: call.name)


def form(op: str, name: str) -> Callable:
    """One form of ``op``, as a function whose outputs are a tuple."""
    run = getattr(torch.ops.rlhf_fast, op).default if name == "served" else IMPLEMENTATIONS[op][name]

    def call(*args: Any, **numbers: Any) -> tuple[Tensor, ...]:
        outputs = run(*args, **numbers)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return call


def tensors_of(values: Sequence[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def moved(values: Sequence[Any], device: str | torch.device) -> list[Any]:
    return [value.to(device) if isinstance(value, Tensor) else value for value in values]


def widened(values: Sequence[Any]) -> list[Any]:
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def same_bits(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """NaN is equal to NaN here, and 0 not to -0."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def close_to_float64(ours: Sequence[Tensor], theirs: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Within twice the error of the reference itself in that dtype, and some of the last bits of the largest number."""
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.isnan(), e.isnan())
        last_bit = torch.finfo(a.dtype).eps * (1 + e.nan_to_num().abs().max()) if e.numel() else 0
        error = (a.double() - e).abs().nan_to_num()
        assert bool((error <= 2 * (b.double() - e).abs().nan_to_num() + 8 * last_bit).all()), float(error.max())


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Whoever waits for the GPU in here raises."""
    if not GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def recorded(call: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Callable[[], None]]:
    """Outputs of ``call`` in a CUDA graph, and what runs that graph again."""
    if GPU:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
        return outputs, graph.replay
    outputs = call()

    def replay() -> None:
        for to, new in zip(outputs, call(), strict=True):
            to.copy_(new)

    return outputs, replay


def overwrite(given: Arguments, new: Arguments) -> None:
    for to, value in zip(tensors_of(given[0]), tensors_of(new[0]), strict=True):
        to.copy_(value)


@every_form
@pytest.mark.parametrize("sizes", [SMALL, USUAL, LONG], ids=["small", "usual", "long"])
def test_agrees_with_the_reference(call, name, sizes):
    args, numbers = call.at(*sizes[call.kind], DEVICE)
    ours, reference = form(call.op, name)(*args, **numbers), form(call.op, "reference")
    theirs = reference(*args, **numbers)
    if call.op != "sample":
        close_to_float64(ours, theirs, reference(*widened(args), **numbers))
        return
    # A uniform may fall within rounding of a token's boundary, a token's mass within rounding of the nucleus's.
    ids, kept, status = (ours[i] == theirs[i] for i in (0, 5, 6))
    assert bool(status.all())
    assert float(ids.float().mean()) >= 0.98
    assert float(kept.float().mean()) >= 0.98
    for a, b in zip(ours[1:5], theirs[1:5], strict=True):
        assert torch.allclose(a[ids & kept], b[ids & kept], atol=1e-4)


@every_form
@pytest.mark.parametrize("sizes", [USUAL, LONG], ids=["usual", "long"])
def test_the_same_bits_twice_without_a_sync(call, name, sizes):
    args, numbers = call.at(*sizes[call.kind], DEVICE)
    run = form(call.op, name)
    expected = run(*args, **numbers)  # the first call may compile and allocate
    with no_sync():
        again = run(*args, **numbers)
    same_bits(again, expected)


@every_form
@pytest.mark.parametrize("sizes", [USUAL, LONG], ids=["usual", "long"])
def test_a_cuda_graph_reads_its_inputs_anew(call, name, sizes):
    given, other = (call.at(*sizes[call.kind], DEVICE, seed) for seed in (0, 1))
    run = form(call.op, name)
    expected = run(*other[0], **other[1])
    outputs, replay = recorded(lambda: run(*given[0], **given[1]))
    overwrite(given, other)
    for output in outputs:
        output.zero_()
    replay()
    same_bits(outputs, expected)


@every_public
def test_public_function_and_its_gradient_without_a_sync_and_in_a_graph(call):
    function, differentiable = PUBLIC[call.op]
    args, numbers = call.at(*USUAL[call.kind], DEVICE)
    leaves = [args[i].requires_grad_() for i in differentiable if args[i] is not None]

    def step() -> tuple[Tensor, ...]:
        outputs = function(*args, **numbers)
        smooth = [o for o in outputs if o.requires_grad]
        grads = torch.autograd.grad(smooth, leaves, [torch.full_like(o, 0.5) for o in smooth]) if leaves else ()
        return *(o.detach() for o in outputs), *grads

    expected = step()
    assert len(expected) > len(leaves)
    assert all(bool((grad != 0).any()) for grad in expected[len(expected) - len(leaves) :])
    with no_sync():
        again = step()
    same_bits(again, expected)
    outputs, replay = recorded(step)
    for output in outputs:
        output.zero_()
    replay()
    same_bits(outputs, expected)


@pytest.mark.parametrize(("call", "name"), BIG_FORMS, ids=[f"{call.name} {name}" for call, name in BIG_FORMS])
def test_offsets_past_two_to_the_31(call, name):
    """A row's bits do not depend on where it lies, so that the last rows alone say what those of all must be."""
    if GPU and torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB of free memory")
    width = {"tokens": 2**20, "logits": 2**17}[call.kind] if GPU else 1000
    rows = (2**31 if GPU else 2**16) // width + 2
    args, numbers = call.at(rows, width, DEVICE)
    run = form(call.op, name)
    last = [x[-3:].clone() if isinstance(x, Tensor) and x.shape[:1] == (rows,) else x for x in args]
    whole, alone = run(*args, **numbers), run(*last, **numbers)
    by_row = [(a[-3:], b) for a, b in zip(whole, alone, strict=True) if a.shape[:1] == (rows,)]
    assert by_row
    same_bits(*zip(*by_row, strict=True))


MANY_ROWS = [(call.op, name) for call, name in BIG_FORMS if call.kind == "logits"]


@pytest.mark.parametrize(("op", "name"), MANY_ROWS)
def test_more_rows_than_a_grid_has_in_its_second_dimension(op, name):
    args, numbers = call_of(op).at(65540, 33, DEVICE)
    last = [x[-3:].clone() if isinstance(x, Tensor) and x.shape[:1] == (65540,) else x for x in args]
    run = form(op, name)
    same_bits([output[-3:] for output in run(*args, **numbers)], run(*last, **numbers))


@every_form
def test_the_current_stream_is_used_and_the_current_device_left_alone(call, name):
    new = call.at(*SMALL[call.kind], DEVICE)
    run = form(call.op, name)
    expected = run(*new[0], **new[1])
    given = [torch.zeros_like(x) if isinstance(x, Tensor) else x for x in new[0]], new[1]
    if not GPU:
        overwrite(given, new)
        same_bits(run(*given[0], **given[1]), expected)
        return
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # about 30 ms: on any other stream the zeros would be read
        overwrite(given, new)
        outputs = run(*given[0], **given[1])
    stream.synchronize()
    same_bits(outputs, expected)
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU, or none")
def test_a_second_device():
    for call, name in FORMS:
        args, numbers = call.at(*SMALL[call.kind], "cuda:0")
        expected = form(call.op, name)(*args, **numbers)
        outputs = form(call.op, name)(*moved(args, "cuda:1"), **numbers)
        assert torch.cuda.current_device() == 0
        assert {output.device.index for output in outputs} == {1}
        same_bits(moved(outputs, "cuda:0"), expected)


def compiles(run: Callable[[], None]) -> Counter:
    """How often Triton compiled which kernel during ``run``, before which it forgets all that it compiled."""
    import triton

    for module in [m for name, m in sys.modules.items() if name.startswith("rlhf_fast.triton_kernels.")]:
        for function in vars(module).values():
            if isinstance(function, triton.runtime.JITFunction):
                function.device_caches.clear()
    found: Counter = Counter()
    triton.knobs.runtime.jit_post_compile_hook = lambda *_, fn, **__: found.update([fn.name])
    try:
        run()
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    return found


TRITON = [call for call in CALLS if "triton" in IMPLEMENTATIONS[call.op]]


@NEEDS_GPU
@pytest.mark.parametrize("call", TRITON, ids=lambda call: call.name)
def test_one_compile_for_fifty_lengths(call):
    run = form(call.op, "triton")

    def every_length() -> None:
        for length in random.Random(0).sample(range(1, 3000), 50):
            args, numbers = call.of_length(length, DEVICE)
            run(*args, **numbers)

    assert set(compiles(every_length).values()) == {1}


@NEEDS_GPU
def test_a_sync_is_seen():
    with pytest.raises(RuntimeError, match="synchronizing"), no_sync():
        torch.ones(1, device=DEVICE).item()


def test_the_lengths_of_packed_sequences_are_those_of_the_offsets():
    args, _ = call_of("gae", "packed").of_length(7, "cpu")
    assert [b - a for a, b in pairwise(args[4].tolist())] == [7] * 4
    assert args[0].shape == (28,)
