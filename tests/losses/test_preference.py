"""RRHF and DPO: the paper's cases by hand, loops in float64, invariances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.losses import RRHFLossOutput, dpo_loss, rrhf_loss


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rrhf_loop(logprobs, mask, scores, length_norm, sft_weight):
    """The paper's formula, one prompt, one pair, one token at a time."""
    rank = sft = prompts = 0
    for prompt in range(len(scores)):
        responses = []
        for k in range(scores.shape[1]):
            tokens = [x for x, m in zip(logprobs[prompt, k].tolist(), mask[prompt, k].tolist(), strict=True) if m]
            if tokens:
                responses.append((scores[prompt, k].item(), sum(tokens) / len(tokens) ** length_norm, sum(tokens)))
        for r_i, p_i, _ in responses:
            for r_j, p_j, _ in responses:
                rank += max(0, p_i - p_j) if r_i < r_j else 0
        if responses:
            sft -= max(responses, key=lambda response: response[0])[2]  # the first of equals
            prompts += 1
    rank, sft = rank / max(prompts, 1), sft / max(prompts, 1)
    return rank + sft_weight * sft, rank, sft


def test_rrhf_by_hand():
    # p = 1, 2, 3, 4 and the scores the other way round: gaps of 1, 2, 3, 1, 2 and 1.
    logprobs = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]]])
    mask, scores = torch.ones(1, 4, 2).bool(), torch.tensor([[4, 3, 2, 1]])
    loss, rank, sft = rrhf_loss(logprobs, mask, scores)
    assert (loss.item(), rank.item(), sft.item()) == (8, 10, -2)
    assert rrhf_loss(logprobs, mask, scores.flip(1)) == (-8, 0, -8)
    # Without the division by the length every p is twice as large; the best response is a sum in any case.
    assert rrhf_loss(logprobs, mask, scores, length_norm=0.0, sft_weight=0.0) == (20, 20, -2)
    assert rrhf_loss(logprobs, mask, scores, sft_weight=0.5).loss == 9


def test_rrhf_divides_by_the_length_of_the_response_not_of_the_padding():
    logprobs = torch.tensor([[[-3.0, torch.nan, torch.inf], [-1.0, -2.0, -3.0]]], requires_grad=True)
    mask = torch.tensor([[[True, False, False], [True, True, True]]])
    output = rrhf_loss(logprobs, mask, torch.tensor([[0.2, 0.1]]))
    assert isinstance(output, RRHFLossOutput)
    assert (output.rank_loss.item(), output.sft_loss.item()) == (1, 3)  # means -3 and -2
    output.loss.backward()
    third = 1 / 3
    assert torch.allclose(logprobs.grad, torch.tensor([[[-2.0, 0, 0], [third, third, third]]]))


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4)),
    length_norm=st.sampled_from([0.0, 0.5, 1.0, 1.3]),
    sft_weight=st.sampled_from([0.0, 1.0, 0.3]),
    filled=st.sampled_from([0.2, 0.6, 1.0]),
    seed=st.integers(0, 1000),
)
def test_rrhf_is_the_loop(shape, length_norm, sft_weight, filled, seed):
    generator = torch.Generator().manual_seed(seed)
    logprobs = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < filled  # empty responses and prompts, holes
    scores = torch.randint(0, 4, shape[:2], generator=generator)  # ties
    expected = rrhf_loop(logprobs, mask, scores, length_norm, sft_weight)
    dirty = logprobs.masked_fill(~mask, torch.nan).requires_grad_()
    dirty_scores = scores.double().masked_fill(~mask.any(2), torch.nan)
    options = {"length_norm": length_norm, "sft_weight": sft_weight}
    output = rrhf_loss(dirty, mask, dirty_scores, **options)
    assert [x.item() for x in output] == pytest.approx(expected, abs=1e-12)
    output.loss.backward()
    assert dirty.grad.isfinite().all()
    assert (dirty.grad[~mask] == 0).all()
    # More padding, of tokens and of responses, changes nothing.
    wider, more = (torch.nn.functional.pad(x, (2, 1, 0, 2), value=v) for x, v in ((dirty, torch.nan), (mask, False)))
    padded = torch.nn.functional.pad(dirty_scores, (0, 2), value=9)
    assert torch.allclose(rrhf_loss(wider, more, padded, **options).loss, output.loss, atol=1e-13)
    # The order of the responses neither, but for which of two equally good ones is the best.
    order = torch.randperm(shape[1], generator=generator)
    moved = rrhf_loss(dirty[:, order], mask[:, order], 3 * dirty_scores[:, order] - 100, **options)
    assert torch.allclose(moved.rank_loss, output.rank_loss, atol=1e-12)


def test_rrhf_of_ties_of_one_and_of_none():
    logprobs, mask = random(3, 2, 3).requires_grad_(), torch.ones(3, 2, 3).bool()
    mask[1, 1] = mask[2] = False  # a group of one response, and one of none
    output = rrhf_loss(logprobs, mask, torch.tensor([[5.0, 5.0], [1.0, 9.0], [1.0, 2.0]]))
    assert output.rank_loss == 0
    assert output.sft_loss.item() == pytest.approx(-(logprobs[0, 0].sum() + logprobs[1, 0].sum()).item() / 2)
    output.loss.backward()
    expected = torch.zeros(3, 2, 3).double()
    expected[:2, 0] = -0.5
    assert torch.equal(logprobs.grad, expected)
    logprobs.grad = None
    nothing = rrhf_loss(logprobs, torch.zeros_like(mask), torch.full((3, 2), torch.nan))
    nothing.loss.backward()
    assert nothing == (0, 0, 0)
    assert torch.equal(logprobs.grad, torch.zeros(3, 2, 3).double())
    assert rrhf_loss(torch.zeros(0, 4, 5), torch.zeros(0, 4, 5).bool(), torch.zeros(0, 4)) == (0, 0, 0)
    assert rrhf_loss(torch.zeros(2, 4, 0), torch.zeros(2, 4, 0).bool(), torch.zeros(2, 4)) == (0, 0, 0)


def test_rrhf_of_micro_batches_adds_up_and_gradcheck():
    logprobs, scores = random(4, 3, 5).requires_grad_(), random(4, 3, seed=1)
    mask = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(2)) < 0.7
    mask[3] = False
    whole = rrhf_loss(logprobs, mask, scores)
    parts = [rrhf_loss(logprobs[i : i + 2], mask[i : i + 2], scores[i : i + 2], denominator=3) for i in (0, 2)]
    assert torch.allclose(parts[0].loss + parts[1].loss, whole.loss, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: rrhf_loss(x, mask, scores, sft_weight=0.2), logprobs)
    half = rrhf_loss(logprobs.bfloat16(), mask, scores)
    assert half.loss.dtype == torch.float32
    assert torch.allclose(half.loss.double(), rrhf_loss(logprobs.bfloat16().double(), mask, scores).loss, atol=1e-5)


def dpo_loop(chosen, rejected, ref_chosen, ref_rejected, beta, kind, smoothing):
    """The formulas of the papers, a pair at a time."""
    losses = []
    for c, r, rc, rr in zip(chosen, rejected, ref_chosen, ref_rejected, strict=True):
        h = math.log((math.exp(c) * math.exp(rr)) / (math.exp(r) * math.exp(rc)))
        right = 1 / (1 + math.exp(-beta * h))
        losses.append(
            {
                "sigmoid": -(1 - smoothing) * math.log(right) - smoothing * math.log(1 - right),
                "ipo": (h - 1 / (2 * beta)) ** 2,
                "hinge": max(0, 1 - beta * h),
            }[kind]
        )
    return sum(losses) / len(losses)


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize(("kind", "smoothing"), [("sigmoid", 0), ("sigmoid", 0.2), ("ipo", 0), ("hinge", 0)])
def test_dpo_is_the_loop(kind, smoothing, beta):
    columns = [2 * random(9, seed=i) - 3 for i in range(4)]
    expected = dpo_loop(*(x.tolist() for x in columns), beta, kind, smoothing)
    options = {"beta": beta, "kind": kind, "label_smoothing": smoothing}
    assert dpo_loss(*columns, **options).item() == pytest.approx(expected, rel=1e-12)
    assert dpo_loss(*(x.float() for x in columns), **options).item() == pytest.approx(expected, rel=1e-5)
    leaves = [x.requires_grad_() for x in columns]
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, **options), leaves)


def test_dpo_by_hand():
    zero, two = torch.zeros(1), torch.full((1,), 2.0)
    assert dpo_loss(zero, zero, zero, zero).item() == pytest.approx(math.log(2))
    assert dpo_loss(two, zero, zero, zero, beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert dpo_loss(zero, zero, zero, two, beta=0.5, kind="hinge") == 0
    assert dpo_loss(two, two, zero, two, beta=0.25, kind="hinge") == 0.5
    assert dpo_loss(zero, two, zero, zero, beta=0.25, kind="ipo") == 16
    # The gradient is the paper's: -beta sigmoid(-beta h) for the chosen, its opposite for the rejected.
    chosen, rejected = two.clone().requires_grad_(), zero.clone().requires_grad_()
    dpo_loss(chosen, rejected, zero, zero, beta=0.5).backward()
    slope = 0.5 / (1 + math.e)
    assert chosen.grad.item() == pytest.approx(-slope)
    assert rejected.grad.item() == pytest.approx(slope)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(["sigmoid", "ipo", "hinge"]),
    seed=st.integers(0, 1000),
    moves=st.tuples(*[st.floats(-20, 20)] * 2),
)
def test_dpo_knows_ratios_only(kind, seed, moves):
    c, r, rc, rr = (random(5, seed=seed + i) for i in range(4))
    a, b = moves
    assert torch.allclose(
        dpo_loss(c + a, r + b, rc + a, rr + b, kind=kind), dpo_loss(c, r, rc, rr, kind=kind), atol=1e-10
    )
    if kind == "sigmoid":  # half of the labels wrong: it does not matter which is the chosen one
        options = {"label_smoothing": 0.5, "beta": 2.0}
        assert torch.allclose(dpo_loss(c, r, rc, rr, **options), dpo_loss(r, c, rr, rc, **options), atol=1e-13)


def test_dpo_of_far_logprobs_and_of_nothing():
    far = torch.tensor([-3e4], dtype=torch.bfloat16, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.bfloat16)
    loss = dpo_loss(far, zero, zero, zero, beta=1.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(3e4, rel=2**-8)
    assert far.grad.item() == -1
    empty = torch.zeros(0, requires_grad=True)
    nothing = dpo_loss(empty, *[torch.zeros(0)] * 3)
    nothing.backward()
    assert nothing == 0


BOOLS = torch.ones(2, 3, 4).bool()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: rrhf_loss(x[0], BOOLS[0], x[0, 0]),
            ValueError,
            r"rrhf_loss: logprobs must be \[B, K, T\] with K at",
        ),
        (lambda x: rrhf_loss(x, x, x[..., 0]), TypeError, "rrhf_loss: mask must be bool, got float32"),
        (lambda x: rrhf_loss(x, BOOLS[:1], x[..., 0]), ValueError, "rrhf_loss: mask must be like logprobs, got"),
        (lambda x: rrhf_loss(x, BOOLS, x), ValueError, r"rrhf_loss: scores must be \[B, K\] of logprobs"),
        (lambda x: rrhf_loss(x, BOOLS, x[..., 0] / 0), ValueError, "rrhf_loss: scores must be a number, got nan at"),
        (
            lambda x: rrhf_loss(x, BOOLS, x[..., 0], length_norm=-1),
            ValueError,
            "rrhf_loss: length_norm must be between",
        ),
        (lambda x: rrhf_loss(x, BOOLS, x[..., 0], sft_weight=math.nan), ValueError, "rrhf_loss: sft_weight must be"),
        (
            lambda x: rrhf_loss(x, BOOLS, x[..., 0], denominator="3"),
            TypeError,
            "rrhf_loss: denominator must be a number",
        ),
        (lambda x: dpo_loss(x, x, x, x), ValueError, r"dpo_loss: chosen must be \[B\], got \[2, 3, 4\]"),
        (lambda x: dpo_loss(x[0, 0], x[0, 0], x[0, 0], x[0, :, 0]), ValueError, "dpo_loss: ref_rejected must be like"),
        (
            lambda x: dpo_loss(*[x[0, 0]] * 2, None, x[0, 0]),
            TypeError,
            "dpo_loss: ref_chosen must be a tensor, got None",
        ),
        (lambda x: dpo_loss(*[x[0, 0]] * 4, beta=0), ValueError, "dpo_loss: beta must be finite and above 0, got 0"),
        (
            lambda x: dpo_loss(*[x[0, 0]] * 4, kind="kto"),
            ValueError,
            "dpo_loss: kind must be one of sigmoid, ipo, hinge",
        ),
        (
            lambda x: dpo_loss(*[x[0, 0]] * 4, label_smoothing=0.6),
            ValueError,
            "label_smoothing must be between 0 and 0.5",
        ),
        (
            lambda x: dpo_loss(*[x[0, 0]] * 4, kind="ipo", label_smoothing=0.1),
            ValueError,
            "dpo_loss: label_smoothing must be 0 with kind 'ipo', got 0.1",
        ),
    ],
)
def test_bad_input_names_function_argument_and_rule(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3, 4))
