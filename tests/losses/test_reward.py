"""Losses of reward models: hand-computed cases, loops in float64, invariances."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.losses import pairwise_loss, pointwise_loss, ranking_loss


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_pairwise_loss_by_hand():
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
    plain = (math.log(1 + math.exp(-2)) + math.log(1 + math.e)) / 2
    assert pairwise_loss(chosen, rejected).item() == pytest.approx(plain, abs=1e-6)
    moved = (math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(1.5))) / 2
    assert pairwise_loss(chosen, rejected, margin=0.5).item() == pytest.approx(moved, abs=1e-6)
    each = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(3))) / 2
    assert pairwise_loss(chosen, rejected, margin=torch.tensor([0.0, 2.0])).item() == pytest.approx(each, abs=1e-6)
    assert pairwise_loss(chosen, rejected, center_coef=0.1).item() == pytest.approx(plain + 0.1 * 2.5, abs=1e-6)


def test_pairwise_loss_of_far_scores_and_of_nothing():
    far = torch.tensor([-1e4], dtype=torch.bfloat16, requires_grad=True)
    loss = pairwise_loss(far, torch.zeros(1, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1e4, rel=2**-8)
    loss.backward()
    assert far.grad.item() == -1
    empty = torch.zeros(0, requires_grad=True)
    nothing = pairwise_loss(empty, torch.zeros(0))
    nothing.backward()
    assert nothing.item() == 0


def test_pairwise_loss_gradcheck():
    generator = torch.Generator().manual_seed(3)
    a, b, margin = (torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(
        lambda a, b, margin: pairwise_loss(a, b, margin=margin, center_coef=0.2), (a, b, margin)
    )


@pytest.mark.parametrize(
    "labels", [torch.tensor([1.0, 0.0, 0.5]), torch.tensor([1, 0, 1]), torch.tensor([True, False, True])]
)
def test_pointwise_loss_by_hand(labels):
    scores = [2.0, -1.0, 3.0]
    each = [
        -y * math.log(sigmoid(s)) - (1 - y) * math.log(sigmoid(-s))
        for s, y in zip(scores, labels.tolist(), strict=True)
    ]
    assert pointwise_loss(torch.tensor(scores), labels).item() == pytest.approx(sum(each) / 3, rel=1e-6)


def test_pointwise_loss_is_least_at_the_logit_of_a_soft_label():
    labels = torch.tensor([0.5, 0.1, 0.8], dtype=torch.float64)
    best = torch.logit(labels).requires_grad_()
    pointwise_loss(best, labels).backward()
    assert torch.allclose(best.grad, torch.zeros(3).double(), atol=1e-15)
    entropy = -(labels * labels.log() + (1 - labels) * (1 - labels).log()).mean()
    assert torch.allclose(pointwise_loss(best, labels), entropy, atol=1e-15)
    half = torch.full((1,), 0.5)
    assert pointwise_loss(torch.tensor([4.0]), half) == pointwise_loss(torch.tensor([-4.0]), half)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pointwise_loss_of_far_scores(dtype):
    scores = torch.tensor([1e4, -1e4, 30.0], dtype=dtype, requires_grad=True)
    loss = pointwise_loss(scores, torch.tensor([0, 1, 1]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2e4 / 3, rel=2**-8)
    loss.backward()
    assert torch.allclose(scores.grad, torch.tensor([1 / 3, -1 / 3, 0], dtype=dtype))
    # And a confident right answer keeps its digits, where log(1 + e^s) - s would cancel.
    for score, label in ((30.0, 1), (-30.0, 0)):
        loss = pointwise_loss(torch.tensor([score]), torch.tensor([label]))
        assert loss.item() == pytest.approx(math.exp(-30), rel=1e-5)


def test_pointwise_loss_of_steps_leaves_out_what_is_masked():
    scores, labels = random(3, 5), torch.rand(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    expected = pointwise_loss(scores[mask], labels[mask])
    dirty = scores.masked_fill(~mask, torch.nan).requires_grad_()
    loss = pointwise_loss(dirty, labels.masked_fill(~mask, 7), mask=mask)
    assert torch.allclose(loss, expected, atol=1e-15)
    loss.backward()
    assert torch.allclose(dirty.grad, torch.where(mask, (torch.sigmoid(scores) - labels) / mask.sum(), 0), atol=1e-15)
    parts = [
        pointwise_loss(dirty[rows], labels[rows], mask=mask[rows], denominator=5) for rows in (slice(0, 1), slice(1, 3))
    ]
    assert torch.allclose(sum(parts), expected, atol=1e-15)
    nothing = pointwise_loss(dirty, labels, mask=torch.zeros_like(mask))
    dirty.grad = None
    nothing.backward()
    assert nothing == 0
    assert torch.equal(dirty.grad, torch.zeros(3, 5).double())


def pairs_loop(scores, ranking):
    """Mean over the pairs that differ of one prompt, None without any."""
    losses = [
        -math.log(sigmoid(scores[i] - scores[j]))
        for i, j in itertools.permutations(range(len(scores)), 2)
        if ranking[i] > ranking[j]
    ]
    return sum(losses) / len(losses) if losses else None


def plackett_luce_loop(scores, ranking):
    """Best first, by choosing one after another without replacement; no ties."""
    if len(set(ranking)) < 2:
        return None
    left, loss = sorted(range(len(scores)), key=lambda i: -ranking[i]), 0.0
    while left:
        loss -= math.log(math.exp(scores[left[0]]) / sum(math.exp(scores[i]) for i in left))
        left = left[1:]
    return loss


LOOPS = {"pairs": pairs_loop, "plackett_luce": plackett_luce_loop}


@pytest.mark.parametrize("kind", LOOPS)
def test_ranking_loss_by_hand(kind):
    # Two pairs of gap 1 and one of gap 2; or the first of three, then the first of the two that are left.
    scores, ranking = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[-3, 5, 9]])
    one, two = math.log(1 + math.exp(-1)), math.log(1 + math.exp(-2))
    by_hand = {"pairs": (2 * one + two) / 3, "plackett_luce": math.log(1 + math.exp(-1) + math.exp(-2)) + one}
    assert ranking_loss(scores, ranking, kind=kind).item() == pytest.approx(by_hand[kind], rel=1e-6)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(sorted(LOOPS)),
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_ranking_loss_of_ragged_prompts_is_the_loop(kind, sizes, ties, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(len(sizes), 5, generator=generator, dtype=torch.float64)
    ranking = torch.rand(len(sizes), 5, generator=generator, dtype=torch.float64)
    if ties and kind == "pairs":
        ranking = (2 * ranking).round()
    mask = torch.stack([torch.randperm(5, generator=generator) < size for size in sizes])
    each = [LOOPS[kind](s[m].tolist(), r[m].tolist()) for s, r, m in zip(scores, ranking, mask, strict=True)]
    each = [loss for loss in each if loss is not None]
    expected = sum(each) / max(len(each), 1)
    dirty = scores.masked_fill(~mask, torch.nan).requires_grad_()
    loss = ranking_loss(dirty, ranking.masked_fill(~mask, torch.nan), kind=kind, mask=mask)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    loss.backward()
    assert dirty.grad.isfinite().all()
    assert (dirty.grad[~mask] == 0).all()
    # Only gaps count: the gradient of each prompt adds up to 0.
    assert torch.allclose(dirty.grad.sum(1), torch.zeros(len(sizes)).double(), atol=1e-12)


@pytest.mark.parametrize("kind", LOOPS)
@settings(max_examples=30)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50))
def test_ranking_loss_knows_neither_the_order_of_the_answers_nor_a_shift(kind, seed, shift):
    generator = torch.Generator().manual_seed(seed)
    scores, order = torch.randn(3, 6, generator=generator, dtype=torch.float64), torch.randperm(6, generator=generator)
    ranking = torch.randint(0, 4, (3, 6), generator=generator)  # with ties, in both kinds
    loss = ranking_loss(scores, ranking, kind=kind)
    moved = ranking_loss(scores[:, order] + shift, 10 * ranking[:, order] - 7, kind=kind)
    assert torch.allclose(loss, moved, atol=1e-12)


@pytest.mark.parametrize("kind", LOOPS)
def test_ranking_two_answers_is_bradley_terry(kind):
    better, worse = random(7), random(7, seed=1)
    scores, ranking = torch.stack([better, worse], 1), torch.tensor([[1, 0]]).expand(7, 2)
    assert torch.allclose(ranking_loss(scores, ranking, kind=kind), pairwise_loss(better, worse), atol=1e-15)
    assert torch.allclose(ranking_loss(scores.flip(1), ranking.flip(1), kind=kind), pairwise_loss(better, worse))


def test_plackett_luce_lets_ties_not_compete():
    # The best beats both of the others; these do not beat each other.
    scores = torch.tensor([[0.3, 2.0, -1.0]], dtype=torch.float64)
    expected = math.log(1 + math.exp(2 - 0.3) + math.exp(-1 - 0.3))
    loss = ranking_loss(scores, torch.tensor([[1, 0, 0]]), kind="plackett_luce")
    assert loss.item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("kind", LOOPS)
def test_ranking_loss_without_a_pair_has_a_graph(kind):
    scores = torch.tensor([[1.0, torch.nan], [2.0, 5.0]], requires_grad=True)
    ranking, mask = torch.tensor([[0, 1], [4, 4]]), torch.tensor([[True, False], [True, True]])
    loss = ranking_loss(scores, ranking, kind=kind, mask=mask)
    loss.backward()
    assert loss == 0
    assert torch.equal(scores.grad, torch.zeros(2, 2))
    assert ranking_loss(torch.zeros(0, 3), torch.zeros(0, 3), kind=kind) == 0


@pytest.mark.parametrize("kind", LOOPS)
def test_ranking_loss_of_micro_batches_adds_up(kind):
    scores, ranking = random(6, 3), torch.tensor([[0, 1, 2], [1, 1, 1], [0, 0, 1], [2, 0, 1], [0, 0, 0], [1, 0, 0]])
    whole = ranking_loss(scores, ranking, kind=kind)
    for denominator in (4, torch.tensor(4)):  # two of the six prompts have nothing to compare
        parts = [
            ranking_loss(scores[i : i + 2], ranking[i : i + 2], kind=kind, denominator=denominator) for i in (0, 2, 4)
        ]
        assert torch.allclose(sum(parts), whole, atol=1e-14)


@pytest.mark.parametrize("kind", LOOPS)
def test_ranking_loss_gradcheck_and_far_scores(kind):
    ranking = torch.tensor([[3, 1, 2, 1], [0, 1, 0, 1]])
    mask = torch.tensor([[True] * 4, [True, True, False, True]])
    scores = random(2, 4, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ranking_loss(s, ranking, kind=kind, mask=mask), scores)
    far = torch.tensor([[-6e4, 6e4]], dtype=torch.float16, requires_grad=True)
    loss = ranking_loss(far, torch.tensor([[1, 0]]), kind=kind)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(12e4, rel=1e-3)
    assert far.grad.tolist() == [[-1, 1]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: pairwise_loss(x[0], x[0][:1]), ValueError, r"pairwise_loss: rejected must be \[B\]"),
        (lambda x: pairwise_loss(x, x), ValueError, r"pairwise_loss: chosen must be \[B\], got \[2, 3\]"),
        (lambda x: pairwise_loss(x[0], x[0], margin=x[0][:1]), ValueError, r"pairwise_loss: margin must be \[B\]"),
        (
            lambda x: pairwise_loss(x[0], x[0], center_coef=-1),
            ValueError,
            "pairwise_loss: center_coef must be finite",
        ),
        (
            lambda x: pointwise_loss(x, x + 1.5),
            ValueError,
            r"pointwise_loss: labels must be in \[0, 1\], got 1.5 at \[0, 0\]",
        ),
        (
            lambda x: pointwise_loss(x, x * torch.nan),
            ValueError,
            r"pointwise_loss: labels must be in \[0, 1\], got nan",
        ),
        (lambda x: pointwise_loss(x, x[:1]), ValueError, "pointwise_loss: labels must be like scores"),
        (lambda x: pointwise_loss(x, x, mask=x), TypeError, "pointwise_loss: mask must be bool, got float32"),
        (lambda x: pointwise_loss(x.long(), x), TypeError, "pointwise_loss: scores must be float32"),
        (
            lambda x: pointwise_loss(x, x, denominator=0),
            ValueError,
            "pointwise_loss: denominator must be finite and above 0",
        ),
        (
            lambda x: pointwise_loss(x, x, denominator=x),
            ValueError,
            "pointwise_loss: denominator must be a number or 0-d",
        ),
        (
            lambda x: ranking_loss(x[0], x[0]),
            ValueError,
            r"ranking_loss: scores must be \[B, K\] with K at least 1, got \[3\]",
        ),
        (lambda x: ranking_loss(x[:, :0], x[:, :0]), ValueError, r"ranking_loss: scores must be .* got \[2, 0\]"),
        (lambda x: ranking_loss(x, x[:, :2]), ValueError, "ranking_loss: ranking must be like scores"),
        (lambda x: ranking_loss(x, x > 0), TypeError, "ranking_loss: ranking must be .*, got bool"),
        (
            lambda x: ranking_loss(x, x, kind="listnet"),
            ValueError,
            "ranking_loss: kind must be one of pairs, plackett_luce",
        ),
        (lambda x: ranking_loss(x, x / 0), ValueError, r"ranking_loss: ranking must be a number, got nan at \[0, 0\]"),
        (lambda x: ranking_loss(x, x, mask=x[0] > 0), ValueError, "ranking_loss: mask must be like scores"),
    ],
)
def test_bad_input_names_function_argument_and_rule(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3))
