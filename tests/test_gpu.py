"""What only a GPU can show: no host sync, CUDA graphs, one JIT compile for any length, sizes past 2^31."""

import pytest
import torch

from rlhf_fast.dispatch import IMPLEMENTATIONS
from rlhf_fast.ops import gae

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: runs in `make gpu-check`")
KERNELS = [name for name in ("cuda", "triton") if name in IMPLEMENTATIONS["gae"]]


def inputs(shape):
    torch.manual_seed(0)
    return torch.randn(shape, device="cuda"), torch.randn(shape, device="cuda"), torch.rand(shape, device="cuda") < 0.9


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", [(64, 1024), (3, 200_000)])
def test_no_host_sync_and_a_cuda_graph(name, shape):
    run, given = IMPLEMENTATIONS["gae"][name], inputs(shape)
    expect_no_sync_and_a_graph(lambda: run(*given))


@pytest.mark.parametrize("name", [name for name in ("cuda", "triton") if name in IMPLEMENTATIONS["advantages"]])
@pytest.mark.parametrize("shape", [(64, 1024), (1030, 53)])
def test_advantages_waits_for_nothing_not_even_its_price(name, shape):
    run, (logprobs, values, mask) = IMPLEMENTATIONS["advantages"][name], inputs(shape)
    scores, refs, price = logprobs[:, 0], logprobs.roll(1), torch.tensor(0.1, device="cuda")
    expect_no_sync_and_a_graph(lambda: run(scores, logprobs, refs, values, mask, None, price, kl="k3"))


def expect_no_sync_and_a_graph(run):
    expected = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in captured:
        x.zero_()
    graph.replay()
    for a, b, c in zip(expected, again, captured, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.skipif("triton" not in KERNELS, reason="triton is not installed")
def test_runtime_numbers_do_not_recompile():
    import triton

    compiles = []
    triton.knobs.runtime.jit_post_compile_hook = lambda *_, **__: compiles.append(1)
    try:
        for tokens in range(1, 51):
            IMPLEMENTATIONS["gae"]["triton"](*inputs((4, 16 * tokens + 1)), gamma=1 - tokens / 100)
        assert len(compiles) <= 8  # kernels of the op x the specialisations of its sizes
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None


def test_offsets_past_two_to_the_31():
    tokens = 2**20
    rows = 2**31 // tokens + 2
    rewards = torch.ones(rows, tokens, device="cuda")
    mask = torch.ones(1, tokens, device="cuda", dtype=torch.bool).expand(rows, tokens)
    values = torch.zeros(1, tokens, device="cuda").expand(rows, tokens)
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=0.0)
    assert bool((advantages[-1] == 1).all())


def test_the_current_device_is_left_alone_and_the_stream_is_used():
    given = inputs((8, 100))
    stream = torch.cuda.Stream()
    expected = gae(*given)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        out = gae(*given)
    stream.synchronize()
    assert torch.equal(out[0], expected[0])
    assert torch.cuda.current_device() == given[0].device.index
