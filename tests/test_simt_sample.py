"""sample in CUDA, run on the CPU through the SIMT shim: orders of the threads, addresses, strides, bounds."""

import pytest
import torch
from simt import build
from torch import Tensor

from rlhf_fast import dispatch
from rlhf_fast.ops.sample import _fake, _scratch

pytestmark = pytest.mark.skipif(build.absence() is not None, reason=str(build.absence()))

#: Unfiltered, a nucleus that fits in shared memory, one that does not, and top-k, which needs a histogram or not.
SAMPLE_KNOBS: list[dict[str, float]] = [
    {}, {"top_p": 0.3}, {"temperature": 1.5, "top_p": 0.99}, {"top_k": 20, "top_p": 0.9},
    {"top_k": 9000, "min_p": 1e-4},
]  # fmt: skip
SAMPLE_ORDER = ("temperature", "top_k", "top_p", "min_p")


def sample_arguments(logits: Tensor, **knobs: float) -> tuple[Tensor | None, ...]:
    rows = logits.shape[0]
    columns = [
        torch.full((rows,), knobs[n], dtype=torch.int64 if n == "top_k" else torch.float64) if n in knobs else None
        for n in SAMPLE_ORDER
    ]
    return logits, torch.arange(rows) * 7 + 3, torch.arange(rows) % 3, *columns


def sample_logits(rows: int, size: int, dtype: torch.dtype = torch.float32, scale: float = 2.5) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return (torch.randn(rows, size, generator=generator, dtype=torch.float64) * scale).to(dtype)


def expect_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("knobs", SAMPLE_KNOBS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sample_in_every_order(dtype: torch.dtype, knobs: dict[str, float]) -> None:
    """The same bits whichever warp and block comes first, with all tokens of a row at the edge of top-p too."""
    sample = build.simt_implementation("sample")
    logits = sample_logits(3, 20011, dtype)
    logits[1] = 1.5
    logits[2, 20010] = torch.nan
    results = []
    for seed in range(4):
        build.set_order(build.cuda_module(), seed)
        results.append(sample(*sample_arguments(logits, **knobs)))
    build.set_order(build.cuda_module(), 0)
    assert results[0][6].tolist() == [0, 0, 1]
    for other in results[1:]:
        expect_same(other, results[0])


@pytest.mark.parametrize("size", [1, 2, 7, 31, 1000, 1024, 2048, 32001])
def test_sample_takes_any_rows(size: int) -> None:
    """Rows on any address, rows that are not contiguous, alone or among others: the same bits."""
    sample = build.simt_implementation("sample")
    for dtype in (torch.float32, torch.bfloat16):
        logits = sample_logits(4, size, dtype)
        knobs = {"temperature": 0.8, "top_k": 40, "top_p": 0.9} if size < 32000 else {"top_p": 0.9}
        arguments = sample_arguments(logits, **knobs)
        expected = sample(*arguments)
        wide = torch.full((4, size + 9), torch.nan, dtype=dtype)
        for offset in (1, 3, 8):
            view = wide[:, offset : offset + size]
            view.copy_(logits)
            expect_same(sample(view, *arguments[1:]), expected)
            wide.fill_(torch.nan)
        spread = torch.stack([logits, logits + 1], -1)[..., 0]
        expect_same(sample(spread, *arguments[1:]), expected)
        expect_same(sample(logits.t().contiguous().t(), *arguments[1:]), expected)
        order = torch.tensor([2, 0])
        some = sample(*(None if a is None else a[order] for a in arguments))
        expect_same(some, tuple(e[order] for e in expected))


def test_sample_writes_its_rows_and_room_alone() -> None:
    """Outputs and scratch between fences, for the filters that write to scratch once more; too little of it raises."""
    op, rows, size, guard = torch.ops.rlhf_fast.sample.default, 3, 5000, 64
    module = build.cuda_module()
    for dtype in (torch.float32, torch.float64):
        for knobs in SAMPLE_KNOBS:
            for bias in (None, torch.zeros(rows, size)):
                given = [
                    *sample_arguments(sample_logits(rows, size, dtype), **knobs),
                    None,
                    None,
                    None,
                    None,
                    bias,
                    None,
                ]
                assert len(given) == len(op._schema.arguments)
                filled = [*_fake(*given), _scratch(*given)]
                fences = [torch.full((2 * guard + o.numel(),), 9).to(o.dtype) for o in filled]
                inner = [f[guard:-guard] for f in fences]
                views = [None if a is None else dispatch._view(a) for a in (*given, *inner)]
                module.sample(*views)
                for fence, out in zip(fences, inner, strict=True):
                    assert (fence[:guard] == 9).all()
                    assert (fence[-guard:] == 9).all()
                    assert out.numel() >= rows
                assert inner[6].tolist() == [0] * rows
                expected = op(*given)
                assert torch.equal(inner[0], expected[0])
                assert torch.equal(inner[5], expected[5])
                with pytest.raises(ValueError, match="sample: scratch is too small"):
                    module.sample(*views[:-1], dispatch._view(inner[-1][:-1]))


def test_sample_of_no_rows_and_of_a_row_with_nothing_finite() -> None:
    sample = build.simt_implementation("sample")
    assert all(o.shape == (0,) for o in sample(*sample_arguments(torch.empty(0, 5))))
    logits = torch.full((3, 3000), -torch.inf)
    logits[1, 2999], logits[2, 5] = 0.0, torch.inf
    for knobs in SAMPLE_KNOBS:
        ids, _, _, mass, _, kept, status = sample(*sample_arguments(logits, **knobs))
        assert (ids.tolist(), kept.tolist(), status.tolist()) == ([-1, 2999, -1], [0, 1, 0], [2, 0, 1])
        assert float(mass[1]) == 0


@pytest.mark.parametrize(
    "knobs", [{"top_p": 0.5}, {"top_p": 0.9}, {"top_p": 0.9, "min_p": 1e-3}, {"top_k": 300}], ids=str
)
@pytest.mark.parametrize("sorted_ids", [False, True])
def test_sample_of_a_wide_nucleus(knobs: dict[str, float], sorted_ids: bool) -> None:
    """Thousands of tokens: an eighth of the row tells where top-p ends, and nothing where the ids are in order."""
    logits = sample_logits(1, 100_003)
    if sorted_ids:
        logits = logits.sort(-1).values
    arguments = sample_arguments(logits, **knobs)
    ours, theirs = build.simt_implementation("sample")(*arguments), torch.ops.rlhf_fast.sample.default(*arguments)
    for field in (0, 5, 6):
        assert torch.equal(ours[field], theirs[field])
    assert int(theirs[5]) >= 300
    for field in (1, 2, 3, 4):
        assert torch.allclose(ours[field], theirs[field], atol=2e-6)
