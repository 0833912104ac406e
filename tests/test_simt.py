"""The CUDA sources, run on the CPU through the SIMT shim, and what the shim itself must find."""

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from simt import build
from torch import Tensor

from rlhf_fast import dispatch
from rlhf_fast.ops.gae import reference
from rlhf_fast.ops.ppo_loss import AGGREGATES

pytestmark = pytest.mark.skipif(build.absence() is not None, reason=str(build.absence()))
CHUNK = 1024  # tokens per step of a block (kernels/cuda/gae_scan.cuh)


@pytest.fixture(scope="module")
def block_sum() -> ModuleType:
    return build.build("block_sum", [build.SIMT / "block_sum.cu"])


@pytest.fixture
def gae() -> Iterator[Callable]:
    build.set_order(build.cuda_module(), 1)
    yield build.simt_implementation("gae")
    build.set_order(build.cuda_module(), 0)


def sums(module: ModuleType, flaw: str, seed: int) -> tuple[list[int], list[int]]:
    numbers = torch.arange(1, 129 * 3 - 2, dtype=torch.int32)
    result = torch.zeros(3, dtype=torch.int32)
    build.set_order(module, seed)
    getattr(module, flaw)(numbers.data_ptr(), result.data_ptr(), 3)
    return result.tolist(), numbers.view(3, 128).sum(1).tolist()


def test_sound_kernel_is_right_in_every_order(block_sum: ModuleType) -> None:
    for seed in range(8):
        got, expected = sums(block_sum, "none", seed)
        assert got == expected


@pytest.mark.parametrize("flaw", ["no_barrier", "half_warp"])
def test_shim_shows_wrong_numbers(block_sum: ModuleType, flaw: str) -> None:
    wrong = [got != expected for got, expected in (sums(block_sum, flaw, seed) for seed in range(8))]
    assert any(wrong)


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("divergent_shuffle", "different warp operations"),
        ("divergent_barrier", "different barriers"),
        ("partial_warp", "part of a warp"),
        ("deep_stack", "stack overflowed"),
    ],
)
def test_shim_refuses(block_sum: ModuleType, flaw: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        sums(block_sum, flaw, 0)


def problem(shape: tuple[int, ...], share: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape) + int(100 * share))
    mask = torch.rand(shape, generator=generator) < share
    rewards, values = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return {
        "rewards": rewards.masked_fill(~mask, torch.nan),
        "values": values.masked_fill(~mask, torch.inf),
        "mask": mask,
    }


def expect_reference(
    gae: Callable,
    arguments: dict[str, Tensor],
    last: Tensor | None,
    offsets: Tensor | None,
    tolerance: float,
    **numbers,
) -> tuple[Tensor, Tensor]:
    got = gae(*arguments.values(), last, offsets, **numbers)
    wide = {name: a.double() if a.is_floating_point() else a for name, a in arguments.items()}
    expected = reference(*wide.values(), None if last is None else last.double(), offsets, **numbers)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance)
    return got


@pytest.mark.parametrize("holes", ["skip", "zero"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("tokens", [1, 33, 127, 129, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
def test_gae_in_every_order(gae: Callable, tokens: int, dtype: torch.dtype, tolerance: float, holes: str) -> None:
    last = torch.tensor([0.7, -0.2, 0.1], dtype=dtype)
    for share in (1.0, 0.6, 0.0):
        arguments = problem((3, tokens), share, dtype)
        build.set_order(build.cuda_module(), 0)
        first = expect_reference(gae, arguments, last, None, tolerance, gamma=0.98, lam=0.95, holes=holes)
        for seed in (1, 2, 3):
            build.set_order(build.cuda_module(), seed)
            again = gae(*arguments.values(), last, None, gamma=0.98, lam=0.95, holes=holes)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("holes", ["skip", "zero"])
@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ends", [[0, 5, 5, 40, 300], [0, 20_000], [0, 3, 18_000, 18_000, 40_000], [7, 2 * CHUNK + 7]])
def test_gae_packed(gae: Callable, ends: list[int], offset_dtype: torch.dtype, holes: str) -> None:
    """Both paths (a block per sequence, a block per chunk), empty sequences and tokens outside of every sequence."""
    spare = 5000 if ends[0] else 0  # tokens after the last sequence
    arguments = problem((ends[-1] + spare,), 0.7)
    inside = slice(ends[0], ends[-1])
    offsets = torch.tensor(ends, dtype=offset_dtype)
    last = torch.linspace(-1, 1, len(ends) - 1)
    got = gae(*arguments.values(), last, offsets, gamma=1.0, lam=0.9, holes=holes)
    within = {name: a[inside] for name, a in arguments.items()}
    expected = expect_reference(gae, within, last, offsets - ends[0], 1e-5, gamma=1.0, lam=0.9, holes=holes)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g[inside], e)
        assert g[: ends[0]].abs().sum() == 0
        assert g[ends[-1] :].abs().sum() == 0


@pytest.mark.parametrize("holes", ["skip", "zero"])
@pytest.mark.parametrize("length", [100, 1500, 17 * CHUNK + 3])
def test_gae_bits_depend_on_the_row_alone(gae: Callable, length: int, holes: str) -> None:
    """Alone, in a batch, packed, padded on either side, a block per sequence or per chunk: the same bits."""
    numbers = {"gamma": 0.99, "lam": 0.97, "holes": holes}
    row = problem((1, length), 0.8)
    alone = gae(*row.values(), None, None, **numbers)
    for left, right, rows in ((0, 40, 1), (1, 0, 3), (777, 1999, 66), (3 * CHUNK, 17 * CHUNK, 2)):
        padded = {name: torch.nn.functional.pad(a, (left, right)).repeat(rows, 1) for name, a in row.items()}
        got = gae(*padded.values(), None, None, **numbers)
        assert all(
            torch.equal(g[i, left : left + length], a[0]) for g, a in zip(got, alone, strict=True) for i in (0, -1)
        )
    for sequences in (1, 7, 70):
        packed = {name: a.repeat(1, sequences).squeeze(0) for name, a in row.items()}
        got = gae(*packed.values(), None, torch.arange(sequences + 1) * length, **numbers)
        assert all(torch.equal(g[-length:], a[0]) for g, a in zip(got, alone, strict=True))


def test_gae_takes_any_strides(gae: Callable) -> None:
    arguments = problem((40, 6), 0.7)
    transposed = {name: a.t() for name, a in arguments.items()}
    transposed["rewards"] = torch.stack([transposed["rewards"]] * 3, -1)[..., 1]
    last = torch.randn(12)[::2]
    got = gae(*transposed.values(), last, None, gamma=0.9, lam=0.8)
    plain = gae(*(a.contiguous() for a in transposed.values()), last.contiguous(), None, gamma=0.9, lam=0.8)
    assert all(torch.equal(g, p) for g, p in zip(got, plain, strict=True))
    wide = torch.zeros(10, dtype=torch.int64)
    wide[::3] = torch.tensor([0, 9, 9, 40])
    row = {name: a[:, 2] for name, a in arguments.items()}
    got = gae(*row.values(), None, wide[::3], gamma=0.9, lam=0.8)
    plain = gae(*(a.contiguous() for a in row.values()), None, wide[::3].contiguous(), gamma=0.9, lam=0.8)
    assert all(torch.equal(g, p) for g, p in zip(got, plain, strict=True))


@pytest.mark.parametrize("shape", [(3, 50), (2, 5 * CHUNK), (2, 20 * CHUNK)])
@pytest.mark.parametrize("offsets", [None, [0.2, 0.9], [0.3, 0.3, 0.95]])
def test_gae_writes_every_token(shape: tuple[int, int], offsets: list[float] | None) -> None:
    """Long padding on both sides and tokens outside of every sequence, on outputs that hold NaN."""
    arguments = problem(shape, 0.9)
    arguments["mask"][:, : shape[1] // 4] = False
    arguments["mask"][:, shape[1] // 2 :] = False
    cu_seqlens = None
    if offsets is not None:
        arguments = {name: a.flatten() for name, a in arguments.items()}
        cu_seqlens = (torch.tensor(offsets) * arguments["mask"].numel()).long()
    outputs = [torch.full_like(arguments["rewards"], torch.nan) for _ in range(2)]
    views = [None if a is None else dispatch._view(a) for a in (*arguments.values(), None, cu_seqlens)]
    build.cuda_module().gae(*views, 1.0, 0.95, "zero", *map(dispatch._view, outputs))
    for output in outputs:
        assert output.isfinite().all()
        assert (output[~arguments["mask"]] == 0).all()


@pytest.mark.parametrize("length", [128, 3000])
def test_gae_bits_depend_on_later_tokens_alone(gae: Callable, length: int) -> None:
    """A warp full of tokens is scanned by a shorter way; a hole in front forbids it and changes nothing behind."""
    whole = problem((1, length), 1.0)
    holed = whole | {"mask": whole["mask"].clone()}
    holed["mask"][:, 0] = False
    for a, b in zip(*(gae(*x.values(), None, None, gamma=0.99, lam=0.9) for x in (whole, holed)), strict=True):
        assert torch.equal(a[:, 1:], b[:, 1:])


@pytest.mark.parametrize("length", [6, 20 * CHUNK])
def test_gae_with_lam_zero_reads_no_neighbour(gae: Callable, length: int) -> None:
    """With gamma * lam = 0 an infinite reward stays where it is."""
    arguments = {name: torch.zeros(1, length) for name in ("rewards", "values")} | {
        "mask": torch.ones(1, length).bool()
    }
    arguments["rewards"][0, length // 2] = torch.inf
    advantages, _ = gae(*arguments.values(), None, None, gamma=1.0, lam=0.0)
    assert advantages[0, length // 2] == torch.inf
    assert advantages[0].isfinite().sum() == length - 1


@pytest.mark.parametrize("ends", [[5, 3, 8], [-4, 12], [0, 99], [9, 2], [0, 40_000, 3, 90_000, -1]])
def test_gae_stays_in_bounds_with_wrong_offsets(gae: Callable, ends: list[int]) -> None:
    tokens = 10 if max(ends) < 1000 else 30_000
    guard = 64
    arguments = problem((tokens,), 0.9)
    fences = [torch.full((tokens + 2 * guard,), 7.0) for _ in range(2)]
    views = [dispatch._view(a) for a in arguments.values()]
    outputs = [dispatch._view(f[guard:-guard]) for f in fences]
    offsets = torch.tensor(ends)
    build.cuda_module().gae(*views, None, dispatch._view(offsets), 1.0, 0.95, "skip", *outputs)
    for fence in fences:
        assert (fence[:guard] == 7).all()
        assert (fence[-guard:] == 7).all()


def test_gae_of_nothing(gae: Callable) -> None:
    empty = torch.empty(0)
    for shape in ((0, 5), (5, 0), (0, 0)):
        advantages, returns = gae(empty.view(shape), empty.view(shape), empty.view(shape).bool(), None, None)
        assert advantages.shape == returns.shape == shape
    advantages, _ = gae(empty, empty, empty.bool(), None, torch.tensor([0, 0]))
    assert advantages.shape == (0,)
    advantages, _ = gae(torch.ones(3), torch.ones(3), torch.ones(3).bool(), None, torch.tensor([3]))
    assert advantages.tolist() == [0, 0, 0]


def test_gae_host_keeps_to_devices_that_exist() -> None:
    module = build.cuda_module()
    x, m = torch.ones(2, 3), torch.ones(2, 3).bool()
    view = dispatch._view
    good = [view(x), view(x), view(m), None, None, 1.0, 0.95, "skip", view(x), view(x)]
    with pytest.raises(RuntimeError, match="cudaSetDevice: cudaErrorInvalidDevice: invalid device ordinal"):
        module.gae(*good, 7, 0)
    module.gae(*good, 1, 0)
    assert module.device_count() == 2


@pytest.mark.parametrize("shape", [(3, CHUNK + 5), (1030, 3)])
def test_advantages_in_every_order(shape: tuple[int, int]) -> None:
    """Rows of more than a chunk, and more rows than each block puts together: the same bits in every order."""
    arguments = problem(shape, 0.7)
    refs, scores = torch.zeros(shape), torch.linspace(-1, 1, shape[0])
    given = (scores, arguments["rewards"], refs, arguments["values"], arguments["mask"])
    results = []
    for seed in range(4):
        build.set_order(build.cuda_module(), seed)
        results.append(build.simt_implementation("advantages")(*given, kl_coef=0.1, kl="k3"))
    build.set_order(build.cuda_module(), 0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_ppo_loss_in_every_order(aggregate: str) -> None:
    """More tokens than a block takes, with holes: the same bits whichever thread and block comes first."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, CHUNK + 5, generator=generator) * 0.4 for _ in range(8)]
    mask = torch.rand(3, CHUNK + 5, generator=generator) < 0.7
    mask[1] = False
    numbers = {
        "cliprange_low": 0.2, "cliprange_high": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "entropy_coef": 0.1,
        "kl_coef": 0.1, "kl": "k3", "dual_clip": 1.5, "log_ratio_clamp": 20.0, "aggregate": aggregate,
    }  # fmt: skip
    ppo_loss, backward = (build.simt_implementation(op) for op in ("ppo_loss", "ppo_loss_backward"))
    results = []
    for seed in range(4):
        build.set_order(build.cuda_module(), seed)
        results.append(ppo_loss(*tensors[:3], mask, *tensors[3:], **numbers))
        scaled = backward(torch.tensor(3.0), *results[-1][2:])
        assert all(torch.equal(s, 3 * g) for s, g in zip(scaled, results[-1][2:], strict=True))
    build.set_order(build.cuda_module(), 0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_ppo_loss_backward_of_nothing_and_of_strides() -> None:
    backward, none = build.simt_implementation("ppo_loss_backward"), torch.empty(0)
    assert all(g.numel() == 0 for g in backward(torch.tensor(2.0), none, none, none))
    turned = torch.arange(6.0).view(3, 2).t()
    assert torch.equal(backward(torch.tensor(2.0), turned, turned[:, ::2], none)[1], 2 * turned[:, ::2])
