"""ppo_loss: every form of it against autograd of the plain formula in float64, and against what the peers get wrong."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.dispatch import IMPLEMENTATIONS
from rlhf_fast.ops import ppo_loss
from rlhf_fast.ops.ppo_loss import AGGREGATES, KL_ESTIMATES, STATS

NUMBERS = {
    "cliprange_low": 0.2, "cliprange_high": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "entropy_coef": 0.0,
    "kl_coef": 0.0, "kl": "k3", "dual_clip": None, "log_ratio_clamp": 20.0, "aggregate": "token_mean",
}  # fmt: skip
ALL = {"entropy_coef": 0.02, "kl_coef": 0.3, "vf_coef": 0.5}
TENSORS = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "entropy", "ref_logprobs")


def case(shape, dtype=torch.float32, seed=0, density=0.7, poison=True):
    """Random tensors by name, with NaN and inf wherever the mask is False."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    scale = {"logprobs": 0.4, "old_logprobs": 0.4, "ref_logprobs": 0.4}
    out = {n: (torch.randn(shape, generator=generator) * scale.get(n, 1.0)).to(dtype) for n in TENSORS}
    if poison:
        out = {n: t.masked_fill(~mask, torch.nan if i % 2 else math.inf) for i, (n, t) in enumerate(out.items())}
    return {**out, "mask": mask}


def clamp(x, low, high):
    """With a gradient of 1 at both ends, as torch.clamp of PyTorch 2.13 has; that of 2.15 has 0 there."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def plain(t, *, denominator=None, **numbers):
    """The formula of formulas.md as one writes it in PyTorch, masked tokens taken out: (loss, stats)."""
    n = {**NUMBERS, **numbers}
    mask = t["mask"]

    def agg(x):
        full = torch.zeros(mask.shape, dtype=x.dtype).masked_scatter(mask, x)
        if n["aggregate"].startswith("token"):
            count = mask.sum() if n["aggregate"] == "token_mean" else 1
            return full.sum() / (count if denominator is None else denominator)
        rows = [full[b].sum() / (mask[b].sum() if "token_mean" in n["aggregate"] else 1)
                for b in range(len(mask)) if mask[b].any()]  # fmt: skip
        return sum(rows) / (len(rows) if denominator is None else denominator)

    v = {name: x[mask] for name, x in t.items() if x is not None}
    log_ratio = v["logprobs"] - v["old_logprobs"]
    ratio = torch.exp(clamp(log_ratio, -n["log_ratio_clamp"], n["log_ratio_clamp"]))
    unclipped = -v["advantages"] * ratio
    clipped = -v["advantages"] * clamp(ratio, 1 - n["cliprange_low"], 1 + n["cliprange_high"])
    policy = torch.maximum(unclipped, clipped)
    if n["dual_clip"] is not None:
        policy = torch.where(
            v["advantages"] < 0, torch.minimum(policy, -v["advantages"] * n["dual_clip"]), policy
        )  # fmt: skip
    zero = torch.zeros_like(log_ratio)
    value = value_clip = entropy = kl = zero
    if "values" in v:
        error = (v["values"] - v["returns"]) ** 2
        value = error / 2
        if "old_values" in v:
            low, high = v["old_values"] - n["cliprange_value"], v["old_values"] + n["cliprange_value"]
            clipped_error = (clamp(v["values"], low, high) - v["returns"]) ** 2
            value, value_clip = torch.maximum(error, clipped_error) / 2, (clipped_error > error).to(error.dtype)
    if "entropy" in v:
        entropy = v["entropy"]
    if "ref_logprobs" in v:
        d = v["logprobs"] - v["ref_logprobs"]
        kl = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) + d - 1, "abs": d.abs()}[n["kl"]]
    terms = [agg(x) for x in (policy, value, entropy, kl)]
    loss = terms[0] + n["vf_coef"] * terms[1] - n["entropy_coef"] * terms[2] + n["kl_coef"] * terms[3]
    rest = (log_ratio**2 / 2, (clipped > unclipped).to(ratio.dtype), value_clip, ratio)
    return loss, torch.stack([x.detach() for x in (*terms, *(agg(x) for x in rest), ratio.max())])


def both(run, device, t, *, denominator=None, **numbers):
    """Loss, statistics and three gradients: ours and those of autograd, in float64 on the same rounded inputs."""
    order = [t.get(n) for n in (*TENSORS[:3], "mask", *TENSORS[3:])]
    extra = None if denominator is None else torch.tensor(denominator, dtype=t["logprobs"].dtype)
    ours = run(*(None if x is None else x.to(device) for x in (*order, extra)), **{**NUMBERS, **numbers})
    exact = {n: x if n == "mask" or x is None else x.detach().double().clone() for n, x in t.items()}
    leaves = [exact[n].requires_grad_() for n in ("logprobs", "values", "entropy") if exact.get(n) is not None]
    loss, stats = plain(exact, denominator=denominator, **numbers)
    loss.backward()
    grads = [x.grad for x in leaves]
    given = [o.cpu() for o in ours[2:] if o.numel()] if t["logprobs"].numel() else []
    return [ours[0].cpu(), ours[1].cpu(), *given], [loss.detach(), stats, *grads]


def close(ours, theirs, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert torch.allclose(a.double(), b, rtol=tolerance, atol=tolerance), (a, b)


def test_hand_computed(run, device):
    # Ratios e^.5, 1, e^-.5 with advantages 1, -2, -1: -1.2 (clipped), 2, .8 (clipped); their mean is 1.6/3.
    t = {
        "logprobs": torch.tensor([[0.5, 0.0, -0.5, 9.0]]),
        "old_logprobs": torch.zeros(1, 4),
        "advantages": torch.tensor([[1.0, -2.0, -1.0, 9.0]]),
        "mask": torch.tensor([[True, True, True, False]]),
        "values": torch.tensor([[1.0, 2.0, 0.0, 9.0]]),
        "old_values": torch.tensor([[0.0, 2.0, 0.1, 9.0]]),
        "returns": torch.tensor([[2.0, 1.0, 0.0, 9.0]]),
    }
    order = [t.get(n) for n in (*TENSORS[:3], "mask", *TENSORS[3:])]
    loss, stats, grad, grad_values, grad_entropy = run(*(None if x is None else x.to(device) for x in order), **NUMBERS)
    # Values: max(1, 1.8^2) = 3.24 (clipped), 1, 0; half of their mean is 4.24/6.
    named = dict(zip(STATS, stats.tolist(), strict=True))
    expected = {
        "policy_loss": 1.6 / 3, "value_loss": 4.24 / 6, "entropy": 0, "kl": 0, "approx_kl": 0.25 / 3,
        "clipfrac": 2 / 3, "value_clipfrac": 1 / 3, "ratio_mean": (math.exp(0.5) + 1 + math.exp(-0.5)) / 3,
        "ratio_max": math.exp(0.5),
    }  # fmt: skip
    assert named == pytest.approx(expected, abs=1e-6)
    assert loss.item() == pytest.approx(1.6 / 3 + 0.1 * 4.24 / 6, abs=1e-6)
    assert grad.tolist()[0] == pytest.approx([0, 2 / 3, 0, 0], abs=1e-6)
    assert grad_values.tolist()[0] == pytest.approx([0, 0.1 / 3, 0, 0], abs=1e-6)
    assert grad_entropy.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("kl", KL_ESTIMATES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (5, 130)], ids=str)
def test_against_autograd(run, device, dtype, aggregate, kl, shape):
    t = case(shape, dtype, density=1.0 if shape == (1, 1) else 0.6)
    for numbers in (
        {},
        {"dual_clip": 1.1, "cliprange_low": 0.1, "cliprange_high": 0.4},
        {"denominator": 7.0, "log_ratio_clamp": 0.3},
    ):
        close(*both(run, device, t, aggregate=aggregate, kl=kl, **ALL, **numbers), dtype)


@pytest.mark.parametrize(
    "absent", [("values", "old_values", "returns"), ("entropy",), ("ref_logprobs",), ("old_values",)]
)
def test_what_is_absent_counts_nothing(run, device, absent):
    t = {**case((4, 9)), **dict.fromkeys(absent)}
    close(*both(run, device, t, **ALL), torch.float32)


@pytest.mark.parametrize("aggregate", AGGREGATES[:2])
def test_packed_tokens(run, device, aggregate):
    close(*both(run, device, case((53,)), aggregate=aggregate, **ALL), torch.float32)


def test_ties_and_clip_boundaries_have_autograds_gradient(run, device):
    # Ratios exactly 1, at both bounds, a hair beside them, and at both ends of the clamp; tied values and dual clip.
    ratio = torch.tensor([1.0, 0.5, 1.5, 1.5 - 2**-50, 1.5 + 2**-50, 4.0, 0.25, 3.0, 2.0], dtype=torch.float64)
    count = len(ratio)
    logprobs = ratio.log().repeat(3)[None]
    t = {
        "logprobs": logprobs,
        "old_logprobs": torch.zeros_like(logprobs),
        "advantages": torch.tensor([1.0, -1.0, 0.0]).double().repeat_interleave(count)[None],
        "mask": torch.ones(1, 3 * count, dtype=torch.bool),
        "values": torch.tensor([0.0, 0.25, -0.25, 1.0, 1.0, 0.5, 0.3, 0.25 + 2**-50, 2.0]).double().repeat(3)[None],
        "old_values": torch.zeros(1, 3 * count, dtype=torch.float64),
        "returns": torch.tensor([0.0, 1.0, 1.0, 0.625, 0.5, 0.375, 0.3, 1.0, 1.125]).double().repeat(3)[None],
        "ref_logprobs": logprobs.clone(),
    }
    clamp = float(torch.tensor(4.0, dtype=torch.float64).log())
    for kl in KL_ESTIMATES:
        numbers = {"cliprange_low": 0.5, "cliprange_high": 0.5, "cliprange_value": 0.25, "log_ratio_clamp": clamp}
        ours, theirs = both(run, device, t, **numbers, dual_clip=2.0, kl=kl, vf_coef=1.0, kl_coef=0.1)
        close(ours, theirs, torch.float64)
    assert t["values"][0, 3] - t["returns"][0, 3] == t["returns"][0, 3] - 0.25  # a real tie of the two value losses


def test_a_hundred_nats_do_not_overflow(run, device):
    # At a log ratio of 100 and a negative advantage TRL's loss is inf; the clamp makes it e^20, the dual clip 3.
    t = {"logprobs": torch.tensor([[100.0]]), "old_logprobs": torch.tensor([[0.0]]), "mask": torch.tensor([[True]])}
    t["advantages"] = torch.tensor([[-1.0]])
    ours, theirs = both(run, device, t)
    close(ours, theirs, torch.float32)
    assert ours[0].item() == pytest.approx(math.exp(20), rel=1e-5)
    assert ours[2].item() == 0
    assert both(run, device, t, dual_clip=3.0)[0][0].item() == 3


def test_a_statistic_without_weight_may_be_infinite(run, device):
    t = case((1, 2), density=1.0, poison=False)
    t["ref_logprobs"] = t["logprobs"] + 200  # k3 is e^200
    order = [t.get(n) for n in (*TENSORS[:3], "mask", *TENSORS[3:])]
    loss, stats, grad, *_ = run(*(x.to(device) for x in order), **NUMBERS)
    assert stats[STATS.index("kl")] == math.inf
    assert loss.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 5)], ids=str)
@pytest.mark.parametrize("denominator", [None, 0.0, 4.0])
def test_an_empty_mask_is_0_with_a_graph(aggregate, shape, denominator):
    nothing = torch.full(shape, torch.nan)
    leaf = nothing.clone().requires_grad_()
    total = None if denominator is None else torch.tensor(denominator)
    out = ppo_loss(
        leaf, nothing, nothing, torch.zeros(shape, dtype=torch.bool), values=leaf * 1, returns=nothing,
        entropy=nothing, entropy_coef=0.1, ref_logprobs=nothing, kl_coef=0.1, aggregate=aggregate, denominator=total,
    )  # fmt: skip
    assert out.loss.item() == 0
    assert all(s.item() == 0 for s in out.stats.values())
    out.loss.backward()
    assert torch.equal(leaf.grad, torch.zeros(shape))


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_pitfall_11_micro_batches_add_up_to_the_full_batch(aggregate):
    # A denominator that follows the micro-batch gives gradients 0.5 to 4 times off (TRL, open-instruct, Liger).
    t = case((6, 11), torch.float64, seed=3)
    t["mask"][1] = False
    count = {"token_mean": t["mask"].sum(), "token_sum": torch.tensor(1)}.get(aggregate, t["mask"].any(1).sum())

    def loss(rows, denominator):
        leaf = t["logprobs"][rows].clone().requires_grad_()
        given = {n: t[n][rows] for n in ("values", "old_values", "returns", "ref_logprobs")}
        out = ppo_loss(
            leaf, t["old_logprobs"][rows], t["advantages"][rows], t["mask"][rows], **given, kl_coef=0.1,
            aggregate=aggregate, denominator=denominator,
        )  # fmt: skip
        out.loss.backward()
        return out, leaf.grad

    whole, grad = loss(slice(None), None)
    parts = [loss(rows, count) for rows in (slice(0, 1), slice(1, 2), slice(2, 6))]
    assert torch.allclose(sum(p.loss for p, _ in parts), whole.loss, rtol=1e-12)
    assert torch.allclose(torch.cat([g for _, g in parts]), grad, rtol=1e-12, atol=1e-15)
    for name in STATS[:-1]:
        assert torch.allclose(sum(p.stats[name] for p, _ in parts), whole.stats[name], rtol=1e-12)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_padding_and_empty_rows_change_nothing(aggregate):
    t = case((4, 9), torch.float64, seed=4)
    wide = {n: torch.nn.functional.pad(x, (2, 5, 0, 3), value=False if n == "mask" else math.nan) for n, x in t.items()}
    outputs = []
    for tensors in (t, wide):
        rest = {n: tensors[n] for n in ("values", "old_values", "returns", "entropy", "ref_logprobs")}
        outputs.append(ppo_loss(*(tensors[n] for n in (*TENSORS[:3], "mask")), **rest, **ALL, aggregate=aggregate))
    assert torch.allclose(outputs[0].loss, outputs[1].loss, rtol=1e-13)
    for name in STATS:
        assert torch.allclose(outputs[0].stats[name], outputs[1].stats[name], rtol=1e-13)


def test_strided_views_and_one_advantage_per_sequence(run, device):
    t = case((6, 8), seed=5)
    t["advantages"] = t["advantages"].nan_to_num(0, 0, 0)[:, :1].expand(6, 8)
    expected, _ = both(run, device, {n: x.contiguous() for n, x in t.items()}, **ALL)
    strided, _ = both(run, device, {n: torch.stack([x, x], 2)[:, :, 0] for n, x in t.items()}, **ALL)
    expanded, _ = both(run, device, t, **ALL)
    for ours in (strided, expanded):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    rest = t["logprobs"], t["old_logprobs"]
    everywhere = {n: x if n == "mask" else x.nan_to_num(0, 0, 0) for n, x in t.items()}
    everywhere["mask"] = torch.ones(1, 1, dtype=torch.bool).expand(6, 8)
    close(*both(run, device, everywhere, **ALL), torch.float32)
    one = ppo_loss(*rest, t["advantages"][:, 0], t["mask"])
    assert torch.equal(one.loss, ppo_loss(*rest, t["advantages"], t["mask"]).loss)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_gradcheck(aggregate):
    t = case((3, 6), torch.float64, seed=6, poison=False)

    def f(logprobs, values, entropy):
        return ppo_loss(
            logprobs, t["old_logprobs"], t["advantages"], t["mask"], values=values, old_values=t["old_values"],
            returns=t["returns"], entropy=entropy, ref_logprobs=t["ref_logprobs"], dual_clip=1.2, **ALL,
            aggregate=aggregate,
        ).loss  # fmt: skip

    leaves = [t[n].requires_grad_() for n in ("logprobs", "values", "entropy")]
    assert torch.autograd.gradcheck(f, leaves, atol=1e-8, rtol=1e-6)
    # And nothing reaches the constants.
    others = [t[n].requires_grad_() for n in ("old_logprobs", "advantages", "old_values", "returns", "ref_logprobs")]
    f(*leaves).backward()
    assert all(x.grad is None for x in others)


def test_statistics_are_detached_scalars():
    t = case((3, 6), seed=7)
    out = ppo_loss(t["logprobs"].requires_grad_(), t["old_logprobs"], t["advantages"], t["mask"])
    assert tuple(out.stats) == STATS
    assert not any(s.requires_grad or s.dim() for s in out.stats.values())
    assert out.loss.requires_grad


def test_pitfall_10_a_second_derivative_raises():
    t = case((2, 5), torch.float64, density=1.0)
    leaf = t["logprobs"].requires_grad_()
    loss = ppo_loss(leaf, t["old_logprobs"], t["advantages"], t["mask"]).loss
    (first,) = torch.autograd.grad(loss**2, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="ppo_loss_backward has no derivative"):
        first.sum().backward()


def test_bfloat16_is_computed_in_float32():
    t = case((3, 6), seed=8)
    half = {n: x.bfloat16() for n, x in t.items() if n != "mask"}
    leaf = half["logprobs"].clone().requires_grad_()
    out = ppo_loss(leaf, half["old_logprobs"], half["advantages"], t["mask"])
    exact = ppo_loss(*(half[n].float() for n in TENSORS[:3]), t["mask"])
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.loss.detach(), exact.loss)
    out.loss.backward()
    assert leaf.grad.dtype == torch.bfloat16


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(
        st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(-5, 5), st.booleans()), min_size=1, max_size=12
    ),
    low=st.floats(0, 0.9),
    high=st.floats(0, 2),
    dual_clip=st.none() | st.floats(1, 4),
    clamp=st.floats(0.1, 5),
)
def test_any_token_against_autograd(tokens, low, high, dual_clip, clamp):
    logprobs, old, advantages, mask = (torch.tensor(column)[None] for column in zip(*tokens, strict=True))
    if not mask.any():
        return
    t = {"logprobs": logprobs.double(), "old_logprobs": old.double(), "advantages": advantages.double(), "mask": mask}
    numbers = {"cliprange_low": low, "cliprange_high": high, "dual_clip": dual_clip, "log_ratio_clamp": clamp}
    for name in ("reference", "cpp"):
        if name in IMPLEMENTATIONS["ppo_loss"]:
            close(*both(IMPLEMENTATIONS["ppo_loss"][name], "cpu", t, **numbers), torch.float64)


def test_opcheck():
    t = case((2, 7), poison=False)
    for name in ("logprobs", "values", "entropy"):
        t[name].requires_grad_()
    order = [t[n] for n in (*TENSORS[:3], "mask", *TENSORS[3:])]
    torch.library.opcheck(torch.ops.rlhf_fast.ppo_loss.default, (*order[:4],), NUMBERS)
    torch.library.opcheck(torch.ops.rlhf_fast.ppo_loss.default, (*order, torch.tensor(3.0)), {**NUMBERS, **ALL})


def test_compiles_without_a_graph_break_for_any_length():
    torch._dynamo.reset()

    def f(logprobs, old, advantages, mask, values, returns):
        out = ppo_loss(logprobs, old, advantages, mask, values=values, returns=returns, cliprange=(0.1, 0.3))
        return out.loss, out.stats["clipfrac"]

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for tokens in (5, 9, 16):
        t = case((2, tokens))
        inputs = [t[n] for n in (*TENSORS[:3], "mask", "values", "returns")]
        grads = []
        for function in (compiled, f):
            leaf = inputs[0].clone().requires_grad_()
            loss, clipfrac = function(leaf, *inputs[1:])
            loss.backward()
            grads.append((loss.detach(), clipfrac, leaf.grad))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"logprobs": torch.zeros(2, 3, 4)},
            ValueError,
            r"ppo_loss: logprobs must be \[B, T\] or \[N\], got \[2, 3, 4\]",
        ),
        ({"logprobs": [0.0]}, TypeError, "ppo_loss: logprobs must be a tensor, got list"),
        ({"old_logprobs": torch.zeros(2, 4)}, ValueError, "ppo_loss: old_logprobs must be like logprobs"),
        ({"advantages": torch.zeros(3)}, ValueError, "ppo_loss: advantages must be like logprobs"),
        ({"advantages": None}, TypeError, "ppo_loss: advantages must be a tensor, got NoneType"),
        ({"mask": torch.ones(2, 3)}, TypeError, "ppo_loss: mask must be bool, got float32"),
        ({"values": torch.zeros(2, 3)}, ValueError, "ppo_loss: values and returns must be given together"),
        ({"returns": torch.zeros(2, 3)}, ValueError, "ppo_loss: values and returns must be given together"),
        ({"cliprange": -0.1}, ValueError, "ppo_loss: cliprange must be between 0 and inf, got -0.1"),
        ({"cliprange": (0.1, math.nan)}, ValueError, "ppo_loss: cliprange must be between 0 and inf, got nan"),
        ({"cliprange": (0.1, 0.2, 0.3)}, ValueError, r"ppo_loss: cliprange must be a number or \(low, high\), got \("),
        ({"cliprange": "0.2"}, TypeError, "ppo_loss: cliprange must be a number, got str"),
        ({"vf_coef": "0.1"}, TypeError, "ppo_loss: vf_coef must be a number, got str"),
        ({"denominator": "4"}, TypeError, "ppo_loss: denominator must be a number, got str"),
        ({"dual_clip": 0.5}, ValueError, "ppo_loss: dual_clip must be between 1 and inf, got 0.5"),
        ({"vf_coef": math.nan}, ValueError, "ppo_loss: vf_coef must be finite, got nan"),
        ({"kl": "k4"}, ValueError, "ppo_loss: kl must be one of k1, k2, k3, abs, got 'k4'"),
        ({"aggregate": "mean"}, ValueError, "ppo_loss: aggregate must be one of token_mean, .*, got 'mean'"),
        ({"denominator": 0}, ValueError, "ppo_loss: denominator must be finite and above 0, got 0"),
        ({"denominator": torch.ones(2)}, ValueError, r"ppo_loss: denominator must be a number or 0-d, got \[2\]"),
    ],
)
def test_bad_input_names_op_argument_and_rule(change, error, message):
    given = {"logprobs": torch.zeros(2, 3), "old_logprobs": torch.zeros(2, 3), "advantages": torch.zeros(2, 3)}
    given |= {"mask": torch.ones(2, 3).bool(), **change}
    with pytest.raises(error, match=message):
        ppo_loss(**given)


def test_sequences_cannot_be_counted_in_packed_tokens():
    x, mask = torch.zeros(5), torch.ones(5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"ppo_loss: aggregate 'seq_mean_token_sum' needs \[B, T\], got \[5\]"):
        ppo_loss(x, x, x, mask, aggregate="seq_mean_token_sum")


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("shape", [(3, 1500), (1, 4097), (9, 511)], ids=str)
def test_more_tokens_than_a_block_takes(run, device, aggregate, shape):
    t = case(shape, seed=9)
    t["mask"][0, :300] = True  # in a row that is longer than a block both kinds of block
    t = {n: x.nan_to_num(0, 0, 0) for n, x in t.items()}
    ours, theirs = both(run, device, t, aggregate=aggregate, **ALL)
    close(ours, theirs, torch.float32)
    if run is IMPLEMENTATIONS["ppo_loss"]["reference"]:
        return  # the order of PyTorch's sums follows the strides
    wide = {n: torch.nn.functional.pad(x, (3, 2))[:, 3:-2] for n, x in t.items()}
    flipped = {n: x.t().contiguous().t() for n, x in t.items()}
    for again in (wide, flipped):
        same, _ = both(run, device, again, aggregate=aggregate, **ALL)
        assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS["ppo_loss"], reason="the C++ kernels were not built")
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_threads_change_no_bit(aggregate):
    t = case((70, 1001), seed=10)
    order = [t[n].nan_to_num(0, 0, 0) for n in (*TENSORS[:3], "mask", *TENSORS[3:])]
    kernel, numbers, before = IMPLEMENTATIONS["ppo_loss"]["cpp"], {**NUMBERS, **ALL}, torch.get_num_threads()
    expected = kernel(*order, **{**numbers, "aggregate": aggregate})
    torch.set_num_threads(2)
    try:
        got = kernel(*order, **{**numbers, "aggregate": aggregate})
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_ratio_is_exact_to_an_ulp(run, device):
    # Without a clip and with A = -1 the gradient of a token is its ratio.
    log_ratio = torch.cat([torch.linspace(-87, 88.7, 3001), torch.logspace(-30, 0, 500), -torch.logspace(-30, 0, 500)])
    zero, mask = torch.zeros_like(log_ratio), torch.ones(log_ratio.shape, dtype=torch.bool)
    given = [x.to(device) for x in (log_ratio, zero, zero - 1, mask)]
    free = {"cliprange_low": math.inf, "cliprange_high": math.inf, "log_ratio_clamp": math.inf}
    ratio = run(*given, **{**NUMBERS, **free, "aggregate": "token_sum"})[2].cpu()
    exact = log_ratio.double().exp()
    ulp = torch.nextafter(exact.float(), torch.tensor(math.inf)).double() - exact.float().double()
    assert ((ratio.double() - exact).abs() / ulp).max() < 1.3
    overflow = run(*(x[:1] for x in (given[0] + 300, *given[1:])), **{**NUMBERS, **free})  # e^213
    assert overflow[0].item() == math.inf


@pytest.mark.parametrize("name", TENSORS)
def test_nan_at_a_valid_token_shows(run, device, name):
    t = case((2, 40), density=1.0, seed=11)
    t["mask"][1, 3] = False
    t[name][1, 3] = math.nan  # does not count
    order = [t[n].to(device) for n in (*TENSORS[:3], "mask", *TENSORS[3:])]
    assert run(*order, **{**NUMBERS, **ALL})[0].isfinite()
    t[name][0, 17] = math.nan  # does
    order = [t[n].to(device) for n in (*TENSORS[:3], "mask", *TENSORS[3:])]
    loss, stats, *_ = run(*order, **{**NUMBERS, **ALL})
    assert loss.isnan()
    assert stats[STATS.index("ratio_max")].isnan() == (name in ("logprobs", "old_logprobs"))


@pytest.mark.parametrize("name", IMPLEMENTATIONS["ppo_loss_backward"])
@pytest.mark.parametrize("shape", [(3, 7), (11,), (2, 20_000)], ids=str)
def test_backward_scales_any_layout(name, shape):
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        pytest.skip("no GPU: test_simt.py runs it through the shim")
    device = "cuda" if gpu and name in ("cuda", "triton") else "cpu"
    backward = IMPLEMENTATIONS["ppo_loss_backward"][name]
    whole = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(12)).to(device)
    grads = whole[..., 0], whole[..., 1].contiguous(), whole.new_empty(0)
    factor = torch.tensor(-0.3, device=device)
    for inputs in (grads, (grads[0].t(), *grads[1:])):
        for got, x in zip(backward(factor, *inputs), inputs, strict=True):
            assert torch.equal(got, factor * x)


def test_a_retained_graph_gives_the_same_gradient_again():
    t = case((4, 30), density=1.0, seed=13)
    logprobs, values = t["logprobs"].requires_grad_(), t["values"].requires_grad_()
    loss = ppo_loss(logprobs, t["old_logprobs"], t["advantages"], t["mask"], values=values, returns=t["returns"]).loss
    loss.backward(retain_graph=True)
    first = logprobs.grad.clone(), values.grad.clone()
    logprobs.grad.mul_(100)  # as clipping gradients does
    values.grad.zero_()
    again = torch.autograd.grad(loss, (logprobs, values))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": torch.zeros(2, 3, dtype=torch.bfloat16)}, "logprobs must be float32 or float64"),
        ({"logprobs": torch.zeros(2, 3, 1)}, r"logprobs must be \[B, T\] or \[N\]"),
        ({"advantages": torch.zeros(2)}, "all tensors must have the shape of logprobs"),
        ({"returns": torch.zeros(2, 3).double()}, "all tensors must have the dtype of logprobs"),
        ({"mask": torch.ones(2, 3)}, "mask must be bool"),
        ({"returns": None}, "values and returns must be given together"),
        ({"denominator": torch.ones(3)}, "denominator must be 0-d"),
    ],
)
def test_a_compiled_kernel_called_directly_checks_its_addresses(run, request, device, change, message):
    if not any(form in request.node.callspec.id for form in ("cpp", "simt", "cuda-")):
        pytest.skip("only what takes raw addresses")
    names = ("logprobs", "old_logprobs", "advantages", "mask", "values", "old_values", "returns", "denominator")
    given = {n: torch.zeros(2, 3) for n in names[:-1]} | {"mask": torch.ones(2, 3).bool(), **change}
    given = {n: None if x is None else x.to(device) for n, x in given.items()}
    with pytest.raises(ValueError, match=f"ppo_loss: {message}"):
        run(*(given[n] for n in names[:7]), None, None, given.get("denominator"), **NUMBERS)
