"""KL estimates and masked statistics: hand-computed cases, float64, two processes against one."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.losses import AdaptiveKL, kl_estimate, masked_mean, whiten


def masked(seed=0, shape=(4, 9), dtype=torch.float32, loc=0.0):
    """Numbers with NaN and inf where the mask is False."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).add(loc).to(dtype)
    mask = torch.rand(shape, generator=generator) < 0.6
    return x.masked_fill(~mask, torch.nan if seed % 2 else math.inf), mask


def test_kl_estimates_by_hand():
    logprobs, ref = torch.tensor([-1.0, -2.0, -1.5]), torch.tensor([-2.0, -1.0, -1.5])
    expected = {
        "k1": [1, -1, 0],
        "k2": [0.5, 0.5, 0],
        "k3": [math.exp(-1), math.e - 2, 0],
        "abs": [1, 1, 0],
    }
    for kind, values in expected.items():
        assert torch.allclose(kl_estimate(logprobs, ref, kind=kind), torch.tensor(values).float(), atol=1e-7)
    assert torch.equal(kl_estimate(logprobs, ref), logprobs - ref)


def test_k3_is_the_exact_kl_on_average():
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(20, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        assert torch.allclose((p.exp() * kl_estimate(p, q, kind=kind)).sum(), exact, atol=1e-12)
    assert bool((kl_estimate(p, q, kind="k3") >= 0).all())
    # And it stays a square where exp(-D) - 1 would cancel.
    small = torch.full((1,), 1e-5)
    assert torch.allclose(kl_estimate(small, small * 0, kind="k3"), small**2 / 2, rtol=0.3)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_kl_estimates_are_differentiable(kind):
    generator = torch.Generator().manual_seed(2)
    logprobs, ref = (torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: kl_estimate(a, b, kind=kind), (logprobs, ref))


@pytest.mark.parametrize("dim", [None, 0, 1, (0, 1), -1])
def test_masked_mean(dim):
    x, mask = masked(dtype=torch.float64)
    mask[2] = False
    clean = torch.where(mask, x, 0).numpy()
    total, count = clean.sum(axis=dim), mask.numpy().sum(axis=dim)
    expected = torch.as_tensor(total / count.clip(1))
    assert torch.allclose(masked_mean(x, mask, dim=dim), expected, atol=1e-14)
    assert dim != 1 or masked_mean(x, mask, dim=1)[2] == 0


def test_masked_mean_of_nothing_has_a_graph_and_nothing_leaks():
    x, mask = masked()
    leaf = x.clone().requires_grad_()
    masked_mean(leaf, torch.zeros_like(mask)).backward()
    assert torch.equal(leaf.grad, torch.zeros_like(x))
    leaf.grad = None
    masked_mean(leaf, mask).backward()
    assert torch.equal(leaf.grad, mask / mask.sum())


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_whiten(unbiased, shift_mean, seed):
    x, mask = masked(seed, loc=3.0)
    valid = x[mask].double()
    expected = (valid - valid.mean()) / (valid.var(unbiased=unbiased) + 1e-8).sqrt()
    out = whiten(x, mask, shift_mean=shift_mean, unbiased=unbiased)
    assert torch.allclose(out[mask].double(), expected + (0 if shift_mean else valid.mean()), atol=1e-6)
    assert (out[~mask] == 0).all()
    assert out.dtype == torch.float32


def test_whiten_by_hand():
    x, mask = torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False])
    root = math.sqrt(0.5)  # of the unbiased variance 2
    assert torch.allclose(whiten(x, mask), torch.tensor([-root, root, 0]))
    assert torch.allclose(whiten(x, mask, unbiased=False), torch.tensor([-1.0, 1.0, 0]))
    assert torch.allclose(whiten(x, mask, unbiased=False, shift_mean=False), torch.tensor([1.0, 3.0, 0]))


def test_whiten_of_none_of_one_and_of_equals():
    x = torch.tensor([[5.0, torch.nan], [7.0, 7.0]])
    none = torch.zeros(2, 2, dtype=torch.bool)
    assert torch.equal(whiten(x, none), torch.zeros(2, 2))
    one = torch.tensor([[True, False], [False, False]])
    assert torch.equal(whiten(x, one), torch.zeros(2, 2))
    assert torch.equal(whiten(x, one, shift_mean=False), torch.tensor([[5.0, 0], [0, 0]]))
    equal = torch.tensor([[False, False], [True, True]])
    assert torch.equal(whiten(x, equal), torch.zeros(2, 2))


def test_whiten_does_not_cancel_far_from_0():
    x, mask = masked(2, shape=(64, 64), loc=0.0)
    moved = whiten(x + 4096, mask)  # float32 keeps 2^-11 of it; a sum of squares would keep nothing
    assert torch.allclose(moved, whiten(x, mask), atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.booleans()), min_size=1, max_size=30), st.booleans())
def test_whiten_any(tokens, unbiased):
    x, mask = (torch.tensor(column) for column in zip(*tokens, strict=True))
    x = x.double()
    out = whiten(x, mask, unbiased=unbiased)
    assert out.isfinite().all()
    count = int(mask.sum())
    if count > 1 and x[mask].var() > 1e-3:
        assert abs(float(out[mask].mean())) < 1e-6
        assert float(out[mask].var(unbiased=unbiased)) == pytest.approx(1, abs=1e-4)


def rank_whitens(rank: int, folder: str) -> None:
    """One of two processes: whiten its half of the batch together with the other."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    x, mask = masked(5, shape=(6, 9), loc=10.0)
    mask[:2] = False  # one rank has a row of nothing
    rows = slice(0, 2) if rank == 0 else slice(2, 6)
    group = torch.distributed.group.WORLD
    out = {
        (shift, unbiased, case): whiten(x[rows], m[rows], shift_mean=shift, unbiased=unbiased, group=group)
        for shift in (True, False)
        for unbiased in (True, False)
        for case, m in (("half", masked(5, shape=(6, 9))[1]), ("one rank is empty", mask))
    }
    torch.save(out, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo: runs where it is built in")
def test_whiten_over_two_processes_is_whiten_of_the_whole(tmp_path: Path):
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    x, half = masked(5, shape=(6, 9), loc=10.0)
    empty = half.clone()
    empty[:2] = False
    for shift in (True, False):
        for unbiased in (True, False):
            for case, mask in (("half", half), ("one rank is empty", empty)):
                whole = whiten(x, mask, shift_mean=shift, unbiased=unbiased)
                both = torch.cat([part[shift, unbiased, case] for part in parts])
                assert torch.allclose(both, whole, atol=1e-7), (shift, unbiased, case)


def test_adaptive_kl_by_hand():
    controller = AdaptiveKL(0.2, target=6.0, horizon=10000)
    # KL 9 is 50 % too high, which counts as 20 %: .2 (1 + .2 * 256 / 10000).
    assert controller.update(9.0, 256) == pytest.approx(0.2 * 1.00512)
    assert controller.update(torch.tensor(6.6), 100) == pytest.approx(0.2 * 1.00512 * 1.001)
    before = controller.value
    assert controller.update(-50.0, 500) == pytest.approx(before * 0.99)
    assert controller.update(math.inf, 500) == pytest.approx(before * 0.99 * 1.01)
    other = AdaptiveKL(1.0, 6.0, 10000)
    other.load_state_dict(controller.state_dict())
    assert other.update(7.0, 10) == controller.update(7.0, 10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, m: kl_estimate(x, x, kind="k9"), ValueError, "kl_estimate: kind must be one of k1, k2, k3, abs"),
        (lambda x, m: kl_estimate(x, x[:1]), ValueError, "kl_estimate: ref_logprobs must be like logprobs"),
        (lambda x, m: masked_mean(x, x), TypeError, "masked_mean: mask must be bool, got float32"),
        (lambda x, m: whiten(x, m[:1]), ValueError, "whiten: mask must be like x"),
        (lambda x, m: whiten(x.requires_grad_(), m, group=0), ValueError, "whiten: x must be detached where a group"),
        (lambda x, m: AdaptiveKL(0.1, 0, 10), ValueError, "AdaptiveKL: target must be finite and above 0, got 0"),
        (lambda x, m: AdaptiveKL(-1, 6, 10), ValueError, "AdaptiveKL: init must be finite and not negative, got -1"),
        (lambda x, m: AdaptiveKL(1, 6, 10).update(math.nan, 1), ValueError, "AdaptiveKL: kl must be a number, got nan"),
    ],
)
def test_bad_input_names_function_argument_and_rule(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))


if __name__ == "__main__":  # one of the two processes above
    rank_whitens(int(sys.argv[1]), sys.argv[2])
