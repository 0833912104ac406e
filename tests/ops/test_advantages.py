"""advantages: every form of it against the composition of shape_rewards, gae and whiten, and by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import shape_rewards
from rlhf_fast import whiten as whitened
from rlhf_fast.dispatch import IMPLEMENTATIONS
from rlhf_fast.ops import advantages, gae
from rlhf_fast.ops.ppo_loss import KL_ESTIMATES

NOT_BUILT = "the C++ kernels were not built (RLHF_FAST_CPP=OFF): runs in every other build"
FLOATS = (torch.float32, torch.float64)
EPSILON = {torch.float32: 1e-6, torch.float64: 1e-13}
TENSORS = ("scores", "logprobs", "ref_logprobs", "values", "mask", "last_values", "price")


def case(shape, dtype=torch.float32, density=0.8, seed=0, *, dense=False, last=False):
    """Random inputs, with NaN and inf wherever the mask is False."""
    generator = torch.Generator().manual_seed(seed)

    def random(shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    mask = torch.rand(shape, generator=generator) < density
    given = {"scores": random(shape if dense else shape[:1], 2.0), "logprobs": random(shape), "values": random(shape)}
    given["ref_logprobs"] = given["logprobs"] + random(shape, 0.3)
    for name in ("logprobs", "values", *(["scores"] if dense else [])):
        given[name] = given[name].masked_fill(~mask, torch.nan)
    given["ref_logprobs"] = given["ref_logprobs"].masked_fill(~mask, torch.inf)
    return given | {"mask": mask, "last_values": random(shape[:1]) if last else None, "price": None}


def call(run, device, given, **numbers):
    """The form ``run`` of the op on ``device``; results on the CPU."""
    tensors = [None if given[name] is None else given[name].to(device) for name in TENSORS]
    return [x.cpu() for x in run(*tensors, **numbers)]


def composed(given, *, kl_coef=0.0, kl="k1", at="last", clip_scores=None, whiten=True, shift_mean=True, unbiased=True,
             gamma=1.0, lam=0.95, holes="skip"):  # fmt: skip
    """The three public functions, one after the other, in float64 on the same rounded inputs; and the scan alone."""
    x = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in given.items()}
    price = kl_coef if x["price"] is None else x["price"]
    rewards = shape_rewards(x["scores"], x["logprobs"], x["ref_logprobs"], x["mask"],
                            kl_coef=price, kl=kl, at=at, clip_scores=clip_scores)  # fmt: skip
    scanned, returns = gae(
        rewards, x["values"], x["mask"], gamma=gamma, lam=lam, last_values=x["last_values"], holes=holes
    )
    white = whitened(scanned, x["mask"], shift_mean=shift_mean, unbiased=unbiased) if whiten else scanned
    return (white, returns, rewards), scanned


def expect_composed(out, given, *, dtype, **numbers):
    """The scan rounds log2(T) times on sums as large as its largest result; whitening divides that by the deviation."""
    (white, returns, rewards), scanned = composed(given, **numbers)
    tokens, mask = white.shape[1], given["mask"]
    error = EPSILON[dtype] * (4 + tokens**0.5) * (1 + torch.maximum(scanned.abs().max(), rewards.abs().max()))
    scale = 1.0
    if numbers.get("whiten", True):
        count = max(int(mask.sum()) - (1 if numbers.get("unbiased", True) else 0), 1)
        valid = scanned[mask]
        variance = ((valid - valid.mean()) ** 2).sum() / count if len(valid) else torch.zeros(())
        scale = (1 + white.abs().max()) * torch.rsqrt(variance + 1e-8)
    for x in out:
        assert x.dtype == dtype
        assert x.shape == mask.shape
    assert (out[0] - white).abs().max() <= error * scale + EPSILON[dtype] * (1 + white.abs().max())
    assert (out[1] - returns).abs().max() <= error
    assert (out[2] - rewards).abs().max() <= error
    assert (out[0][~mask] == 0).all()
    assert (out[1][~mask] == 0).all()


# By hand: k1 with 0.1 a nat; the scores 1 and -2 land on tokens 2 and 1 of their rows.
#   rewards    -.1*.5, 0, 1 + .1*.2             -.05  0     1.02   |  0.03  -2.01
#   gamma 1, lam .5, values .5 .4 .2 | .1 .3
#   deltas     -.05+.4-.5, .2-.4, 1.02-.2       -.15  -.2   .82    |  .23   -2.31
#   advantages                                  -.045 .21   .82    |  -.925 -2.31
HAND = {
    "scores": torch.tensor([1.0, -2.0]),
    "logprobs": torch.tensor([[-1.0, -2.0, -1.5, 9.0], [-0.7, -0.5, 9.0, 9.0]]),
    "ref_logprobs": torch.tensor([[-1.5, -2.0, -1.3, 9.0], [-0.4, -0.6, 9.0, 9.0]]),
    "values": torch.tensor([[0.5, 0.4, 0.2, 9.0], [0.1, 0.3, 9.0, 9.0]]),
    "mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool(),
    "last_values": None,
    "price": None,
}
SCANNED = torch.tensor([[-0.045, 0.21, 0.82, 0.0], [-0.925, -2.31, 0.0, 0.0]])


def test_hand_computed(run, device):
    plain, returns, rewards = call(run, device, HAND, kl_coef=0.1, gamma=1.0, lam=0.5, whiten=False)
    assert torch.allclose(rewards, torch.tensor([[-0.05, 0.0, 1.02, 0.0], [0.03, -2.01, 0.0, 0.0]]), atol=1e-6)
    assert torch.allclose(plain, SCANNED, atol=1e-6)
    assert torch.allclose(returns, torch.where(HAND["mask"], SCANNED + HAND["values"], 0), atol=1e-6)
    # The mean is -.45, the variance 5.89775 / 4.
    white, *_ = call(run, device, HAND, kl_coef=0.1, gamma=1.0, lam=0.5)
    expected = torch.where(HAND["mask"], (SCANNED + 0.45) / (5.89775 / 4) ** 0.5, 0)
    assert torch.allclose(white, expected, atol=1e-6)
    kept, *_ = call(run, device, HAND, kl_coef=0.1, gamma=1.0, lam=0.5, shift_mean=False, unbiased=False)
    expected = torch.where(HAND["mask"], (SCANNED + 0.45) / (5.89775 / 5) ** 0.5 - 0.45, 0)
    assert torch.allclose(kept, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("density", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 15), (2, 16), (2, 17), (3, 130), (2, 1025), (7, 3), (1, 2100)])
def test_shapes(run, device, dtype, density, shape):
    given = case(shape, dtype, density, last=True)
    numbers = {"kl_coef": 0.1, "gamma": 0.99}
    expect_composed(call(run, device, given, **numbers), given, dtype=dtype, **numbers)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kl", KL_ESTIMATES)
@pytest.mark.parametrize("at", ["last", "next"])
def test_rewards_of_every_kind(run, device, dtype, dense, kl, at):
    given = case((4, 37), dtype, dense=dense)
    given["mask"][:, 30:] = torch.tensor([[1, 0, 1, 0, 0, 0, 1], [1] + 6 * [0], 7 * [1], 7 * [0]]).bool()
    for name in ("logprobs", "ref_logprobs", "values"):
        given[name] = torch.where(given["mask"], given[name].nan_to_num(0.5, 0.5, 0.5), torch.nan)
    given["scores"] = given["scores"].nan_to_num() if dense else given["scores"]
    numbers = {"kl_coef": 0.1, "kl": kl, "at": at, "clip_scores": 0.5 if dtype == torch.float32 else None}
    expect_composed(call(run, device, given, **numbers), given, dtype=dtype, **numbers)


@pytest.mark.parametrize("holes", ["skip", "zero"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.0, 0.9), (0.9, 0.0), (0.99, 0.95)])
def test_factors(run, device, holes, gamma, lam):
    given = case((3, 40), last=True)
    numbers = {"kl_coef": 0.1, "gamma": gamma, "lam": lam, "holes": holes}
    expect_composed(call(run, device, given, **numbers), given, dtype=torch.float32, **numbers)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("shift_mean", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("valid", [0, 1, 2])
def test_whitening_of_none_one_and_two_tokens(run, device, whiten, shift_mean, unbiased, valid):
    given = case((3, 5), density=1.0)
    given["mask"] = torch.zeros(3, 5, dtype=torch.bool)
    given["mask"].view(-1)[[7, 12][:valid]] = True
    numbers = {"kl_coef": 0.1, "whiten": whiten, "shift_mean": shift_mean, "unbiased": unbiased}
    out = call(run, device, given, **numbers)
    expect_composed(out, given, dtype=torch.float32, **numbers)
    if whiten and shift_mean and valid < 2:
        assert (out[0] == 0).all()


def test_whitening_does_not_cancel(run, device):
    """A mean of 2^20 times the deviation: sums of squares, even of float64, would keep little of the variance."""
    given = case((4, 90), density=1.0)
    given["values"] = torch.zeros(4, 90)
    given["scores"] = 2.0**20 + torch.randint(0, 8, (4, 90), generator=torch.Generator().manual_seed(3)) / 8
    numbers = {"gamma": 0.0, "lam": 0.0}  # what is whitened is the scores, exactly
    (white, _, _), scanned = composed(given, **numbers)
    assert torch.equal(scanned, given["scores"].double())
    assert (call(run, device, given, **numbers)[0] - white).abs().max() < 1e-6


def test_a_price_of_nothing_is_none_even_of_an_infinite_kl(run, device):
    given = case((3, 9), density=1.0)
    given["ref_logprobs"][:, 4] = -torch.inf
    for price in (None, torch.tensor(0.0)):
        out = call(run, device, given | {"price": price}, kl_coef=0.0)
        expect_composed(out, given | {"price": price}, dtype=torch.float32)
        assert all(x.isfinite().all() for x in out)


def test_an_infinite_reward_is_no_crash_and_reaches_what_it_reaches_in_the_composition(run, device):
    given = case((3, 9), density=1.0)
    given["ref_logprobs"][1, 4] = -torch.inf
    out, (expected, _) = call(run, device, given, kl_coef=0.1), composed(given, kl_coef=0.1)
    for ours, theirs in zip(out, expected, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_price_may_be_a_tensor(run, device, dtype):
    given = case((3, 20), dtype)
    by_number = call(run, device, given, kl_coef=0.25, kl="k3")
    by_tensor = call(run, device, given | {"price": torch.tensor(0.25, dtype=dtype)}, kl="k3")
    for a, b in zip(by_number, by_tensor, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("dense", [False, True])
def test_empty(run, device, shape, dense):
    for x in call(run, device, case(shape, dense=dense), kl_coef=0.1):
        assert x.shape == shape


@pytest.mark.parametrize("dense", [False, True])
def test_strided_views(run, device, dense):
    given = case((3, 40), dense=dense)
    numbers = {"kl_coef": 0.1, "kl": "k3", "at": "next"}
    expected = call(run, device, given, **numbers)

    def changed(change):
        tensors = [None if given[n] is None else change(given[n].to(device)) for n in TENSORS]
        assert not any(x.is_contiguous() for x in tensors if x is not None and x.dim() == 2)
        return [x.cpu() for x in run(*tensors, **numbers)]

    transposed = changed(lambda x: x.t().contiguous().t() if x.dim() == 2 else x)
    wide = changed(lambda x: torch.stack([x, x.flip(0)], -1)[..., 0])
    rows = changed(lambda x: torch.stack([x, x.flip(0)], 1)[:, 0])
    for views in (transposed, wide, rows):
        for ours, theirs in zip(views, expected, strict=True):
            assert torch.equal(ours, theirs)


def test_rewards_and_returns_of_a_row_do_not_depend_on_its_batch(run, device):
    given = case((3, 150), density=0.9)
    order = torch.tensor([2, 0])
    some = {name: x if x is None else x[order] for name, x in given.items()}
    for whiten in (True, False):
        whole, part = (call(run, device, x, kl_coef=0.1, kl="k3", whiten=whiten) for x in (given, some))
        for ours, theirs in list(zip(whole, part, strict=True))[whiten:]:
            assert torch.equal(ours[order], theirs)


def test_the_scan_is_that_of_gae_bit_for_bit(run, device, request):
    _, name = request.node.callspec.params["run"]
    if name == "simt":
        from simt.build import simt_implementation

        scan = simt_implementation("gae")
    elif name in IMPLEMENTATIONS["gae"]:
        scan = IMPLEMENTATIONS["gae"][name]
    for shape, density in (((3, 150), 0.9), ((2, 33), 1.0), ((2, 1100), 1.0)):
        given = case(shape, density=density, last=True)
        out = call(run, device, given, kl_coef=0.1, gamma=0.99, whiten=False)
        found = scan(
            *(x.to(device) for x in (out[2], given["values"], given["mask"], given["last_values"])), gamma=0.99
        )
        for ours, theirs in zip(out, found, strict=False):
            assert torch.equal(ours, theirs.cpu())


@pytest.fixture
def poisoned():
    """PyTorch fills new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("at", ["last", "next"])
def test_every_token_is_written(run, device, poisoned, whiten, at):
    given = case((5, 300), density=0.9)
    given["mask"][0, 200:], given["mask"][1], given["mask"][2, :250] = False, False, False
    numbers = {"kl_coef": 0.1, "at": at, "whiten": whiten}
    given |= {name: given[name].masked_fill(~given["mask"], torch.nan) for name in ("values", "logprobs")}
    expect_composed(call(run, device, given, **numbers), given, dtype=torch.float32, **numbers)


def test_more_rows_than_each_block_puts_together(run, device, request, monkeypatch):
    rows = 1030
    if request.node.callspec.params["run"][1] == "triton" and device == "cpu":  # the interpreter takes long over a row
        from rlhf_fast.triton_kernels import advantages as kernels

        monkeypatch.setattr(kernels, "MANY_ROWS", 4)
        monkeypatch.setattr(kernels, "BLOCK_B", 2)
        rows = 5
    given = case((rows, 2), density=0.6)
    expect_composed(call(run, device, given, kl_coef=0.1), given, dtype=torch.float32, kl_coef=0.1)


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS["advantages"], reason=NOT_BUILT)
def test_threads_change_no_bit():
    given = case((33, 600))  # enough tokens for the kernel to share out its rows
    expected = call(IMPLEMENTATIONS["advantages"]["cpp"], "cpu", given, kl_coef=0.1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        out = call(IMPLEMENTATIONS["advantages"]["cpp"], "cpu", given, kl_coef=0.1)
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(out, expected, strict=True):
        assert torch.equal(ours, theirs)


def public(given, **numbers):
    tensors = {name: x for name, x in given.items() if name != "price"}
    return advantages(**tensors, **{"kl_coef": 0.1, **numbers})


@settings(max_examples=150)
@given(
    rows=st.lists(st.lists(st.sampled_from([True, True, False]), min_size=0, max_size=40), min_size=1, max_size=5),
    kl_coef=st.sampled_from([0.0, 0.1, -0.5, 3.0]),
    kl=st.sampled_from(KL_ESTIMATES),
    at=st.sampled_from(["last", "next"]),
    clip=st.sampled_from([None, 0.7]),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    holes=st.sampled_from(["skip", "zero"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dense=st.booleans(),
    last=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    tensor=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_case_equals_the_composition(
    rows, kl_coef, kl, at, clip, gamma, lam, holes, flags, dense, last, dtype, tensor, seed
):
    width = max(1, *(len(row) for row in rows))
    given = case((len(rows), width), dtype, density=1.0, seed=seed, dense=dense, last=last)
    given["mask"] = torch.tensor([row + [False] * (width - len(row)) for row in rows]).bool()
    for name in ("logprobs", "ref_logprobs", "values"):
        given[name] = given[name].masked_fill(~given["mask"], torch.nan)
    numbers = {"kl": kl, "at": at, "clip_scores": clip, "gamma": gamma, "lam": lam, "holes": holes}
    numbers |= dict(zip(("whiten", "shift_mean", "unbiased"), flags, strict=True))
    out = public(given, kl_coef=torch.tensor(kl_coef) if tensor else kl_coef, **numbers)
    exact = {"kl_coef": torch.tensor(kl_coef).item() if tensor else kl_coef, **numbers}
    expect_composed(out, given, dtype=dtype, **exact)
    if dtype == torch.float64:
        (white, returns, rewards), scanned = composed(given, **exact)
        assert torch.allclose(out.rewards, rewards, rtol=1e-12, atol=1e-12)
        assert torch.allclose(out.returns, returns, rtol=1e-12, atol=1e-12)
        spread = scanned[given["mask"]].std() if given["mask"].sum() > 1 else torch.ones(())
        if not numbers["whiten"] or spread > 1e-2:  # else the rounding of the scan is blown up
            assert torch.allclose(out.advantages, white, rtol=1e-12, atol=1e-12 / min(float(spread), 1.0))


def test_bfloat16_logprobs_are_promoted():
    given = case((2, 20))
    low = given | {name: given[name].bfloat16() for name in ("logprobs", "ref_logprobs", "values", "scores")}
    exact = low | {name: low[name].float() for name in ("logprobs", "ref_logprobs", "values", "scores")}
    for ours, theirs in zip(public(low), public(exact), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_one_float64_input_makes_float64_results():
    given = case((2, 5), last=True)
    for name in ("scores", "logprobs", "ref_logprobs", "values", "last_values"):
        assert {x.dtype for x in public(given | {name: given[name].double()})} == {torch.float64}


def test_it_has_no_derivative():
    given = case((2, 5), density=1.0)
    given["values"].requires_grad_()
    out = public(given)
    with pytest.raises(NotImplementedError, match="advantages has no derivative"):
        out.advantages.sum().backward()


@pytest.mark.parametrize("dense", [False, True])
def test_opcheck(dense):
    given = case((3, 12), dense=dense, last=True)
    args = [given[name] if given[name] is None else given[name].nan_to_num(0, 0, 0) for name in TENSORS]
    args[TENSORS.index("mask")], args[-1] = given["mask"], torch.tensor(0.1)
    op = torch.ops.rlhf_fast.advantages.default
    torch.library.opcheck(op, tuple(args), {"kl": "k3", "clip_scores": 1.0, "holes": "zero", "unbiased": False})
    torch.library.opcheck(op, tuple(args[:5]), {"kl_coef": 0.1, "whiten": False})


@pytest.mark.parametrize("coef", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_compiles_without_a_graph_break_for_any_length(coef):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, coef: public(x, kl_coef=coef)[0] * 2, fullgraph=True, dynamic=True)
    for tokens in (9, 16, 33):
        given = case((2, tokens))
        assert torch.equal(compiled(given, coef), public(given, kl_coef=coef)[0] * 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros(2, 4)}, ValueError, r"advantages: values must be like logprobs, got \[2, 4\]"),
        ({"mask": torch.ones(2, 3)}, TypeError, "advantages: mask must be bool, got float32"),
        ({"logprobs": torch.zeros(3)}, ValueError, r"advantages: logprobs must be \[B, T\], got \[3\]"),
        ({"scores": torch.zeros(3)}, ValueError, r"advantages: scores must be \[B\] or \[B, T\] of"),
        ({"scores": [0.0, 0.0]}, TypeError, "advantages: scores must be a tensor, got list"),
        ({"last_values": torch.zeros(3)}, ValueError, r"advantages: last_values must be \[B\]"),
        ({"gamma": 1.5}, ValueError, "advantages: gamma must be between 0 and 1, got 1.5"),
        ({"kl": "k4"}, ValueError, "advantages: kl must be one of k1, k2, k3, abs, got 'k4'"),
        ({"at": "end"}, ValueError, "advantages: at must be one of last, next, got 'end'"),
        ({"holes": "carry"}, ValueError, "advantages: holes must be one of skip, zero, got 'carry'"),
        ({"clip_scores": 0.0}, ValueError, "advantages: clip_scores must be above 0, got 0.0"),
        ({"kl_coef": torch.zeros(1)}, ValueError, r"advantages: kl_coef must be a number or 0-d, got \[1\]"),
        ({"clip_scores": "1"}, TypeError, "advantages: clip_scores must be a number, got str"),
        ({"kl_coef": float("nan")}, ValueError, "advantages: kl_coef must be finite, got nan"),
        ({"kl_coef": None}, TypeError, "advantages: kl_coef must be a number, got NoneType"),
    ],
)
def test_bad_input_names_op_argument_and_rule(change, error, message):
    zeros = {name: torch.zeros(2, 3) for name in ("logprobs", "ref_logprobs", "values")}
    given = {"scores": torch.zeros(2), **zeros, "mask": torch.ones(2, 3).bool(), "kl_coef": 0.1} | change
    with pytest.raises(error, match=message):
        advantages(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2, 3, dtype=torch.float64)}, "must have the dtype of logprobs"),
        ({"logprobs": torch.zeros(2, 3).bfloat16()}, "logprobs must be float32 or float64"),
        ({"mask": torch.ones(2, 3)}, "mask must be bool"),
        ({"mask": torch.ones(2, 4).bool()}, "must have the shape of logprobs"),
        ({"scores": torch.zeros(3)}, r"scores must be \[B\] or \[B, T\]"),
        ({"scores": torch.zeros(2, dtype=torch.float64)}, "must have the dtype of logprobs"),
        ({"last_values": torch.zeros(3)}, r"last_values must be \[B\]"),
        ({"price": torch.zeros(1)}, "price must be 0-d"),
        ({"price": torch.zeros((), dtype=torch.float64)}, "must have the dtype of logprobs"),
        ({"kl": "k4"}, "kl must be k1, k2, k3 or abs"),
        ({"at": "end"}, "at must be last or next"),
        ({"holes": "carry"}, "holes must be skip or zero"),
    ],
)
def test_a_compiled_kernel_called_directly_checks_its_addresses(run, request, device, change, message):
    if not any(name in request.node.callspec.id for name in ("cpp", "simt", "cuda-cuda")):
        pytest.skip("PyTorch and Triton check what they are given: runs for cpp, simt and cuda")
    zeros = {name: torch.zeros(2, 3) for name in ("logprobs", "ref_logprobs", "values")}
    given = {"scores": torch.zeros(2), **zeros, "mask": torch.ones(2, 3).bool()} | change
    given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    tensors = [given.pop(name, None) for name in TENSORS]
    with pytest.raises(ValueError, match=message):
        run(*tensors, **given)
