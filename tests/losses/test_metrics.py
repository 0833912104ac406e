"""Accuracy and calibration of a reward model: by hand, with loops, and on data of a known model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.losses import calibration_error, pairwise_accuracy, pairwise_calibration_error


def test_accuracy_counts_ties_as_half():
    chosen, rejected = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 5.0, 3.0])
    assert pairwise_accuracy(chosen, rejected) == 2.5 / 4
    assert pairwise_accuracy(chosen, chosen) == 0.5
    # Half precision makes ties; a difference that it can hold is none.
    assert pairwise_accuracy(chosen.bfloat16(), (chosen - 2**-7).bfloat16()) == 3 / 4  # 3 and 4 less 2^-7 are 3 and 4
    assert pairwise_accuracy(torch.tensor([torch.nan]), torch.zeros(1)).isnan()
    assert pairwise_accuracy(torch.zeros(0), torch.zeros(0)).isnan()


def test_calibration_by_hand():
    # Two bins: p = .2 and .4 with labels 0 and 1, p = .9 with 1.
    scores = torch.logit(torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64))
    error = calibration_error(scores, torch.tensor([0, 1, 1]), bins=2)
    assert error.item() == pytest.approx((2 * abs(0.5 - 0.3) + abs(1 - 0.9)) / 3, abs=1e-14)
    # In one bin the errors cancel, in many none do.
    assert calibration_error(scores, torch.tensor([0, 1, 1]), bins=1).item() == pytest.approx(0.5 / 3, abs=1e-14)
    assert calibration_error(scores, torch.tensor([0, 1, 1]), bins=100).item() == pytest.approx(0.9 / 3, abs=1e-14)
    # Soft labels that are the probabilities; the last bin holds 1.
    assert calibration_error(scores, scores.sigmoid()) == 0
    assert calibration_error(torch.tensor([100.0, 90.0]), torch.tensor([True, False])) == 0.5


def test_pairwise_calibration_by_hand():
    gap = math.log(3)  # sure to 3/4
    pairs = [[gap, gap, gap, 0, 5], [0, 0, 0, gap, 5]]
    chosen, rejected = torch.tensor(pairs, dtype=torch.float64)
    # Right in three of four, as sure as it should be; and a tie, of which it is sure to 1/2 and half right.
    assert pairwise_calibration_error(chosen, rejected).item() == pytest.approx(0, abs=1e-15)
    assert pairwise_calibration_error(chosen[:3], rejected[:3]).item() == pytest.approx(1 / 4, abs=1e-15)
    assert pairwise_calibration_error(rejected[:3], chosen[:3]).item() == pytest.approx(3 / 4, abs=1e-15)


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(st.floats(-8, 8), st.sampled_from([0.0, 0.3, 1.0])), min_size=1, max_size=20),
    bins=st.integers(1, 12),
)
def test_calibration_is_the_loop(rows, bins):
    held = {}
    for score, label in rows:
        p = 1 / (1 + math.exp(-score))
        held.setdefault(min(int(p * bins), bins - 1), []).append((p, label))
    error = 0.0
    for members in held.values():
        confidence, share = (sum(column) / len(members) for column in zip(*members, strict=True))
        error += len(members) / len(rows) * abs(share - confidence)
    scores, labels = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    assert calibration_error(scores, labels, bins=bins).item() == pytest.approx(error, abs=1e-12)


def test_the_model_that_wrote_the_preferences_is_calibrated_and_a_surer_one_is_not():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 40_000, generator=generator)
    prefers = torch.rand(40_000, generator=generator) < (scores[0] - scores[1]).sigmoid()
    chosen, rejected = torch.where(prefers, scores, scores.flip(0))
    assert pairwise_calibration_error(chosen, rejected) < 0.01  # sampling noise: 5 bins of ~8000, 0.005 each
    assert pairwise_calibration_error(3 * chosen, 3 * rejected) > 0.1
    assert pairwise_accuracy(3 * chosen, 3 * rejected) == pairwise_accuracy(chosen, rejected)


def test_neither_nan_nor_nothing_makes_a_number_and_no_gradient_flows():
    scores = torch.tensor([0.3, torch.nan], requires_grad=True)
    assert calibration_error(scores, torch.ones(2)).isnan()
    assert pairwise_calibration_error(scores, torch.zeros(2)).isnan()
    assert calibration_error(torch.zeros(0), torch.zeros(0)).isnan()
    assert not calibration_error(scores[:1], torch.ones(1)).requires_grad


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: pairwise_accuracy(x[None], x), ValueError, r"pairwise_accuracy: chosen must be \[B\], got \[1, 3\]"),
        (lambda x: pairwise_accuracy(x, x[:2]), ValueError, "pairwise_accuracy: rejected must be like chosen"),
        (
            lambda x: pairwise_calibration_error(x, x, bins=0),
            ValueError,
            "pairwise_calibration_error: bins must be bet",
        ),
        (lambda x: calibration_error(x, x, bins=2.5), ValueError, "calibration_error: bins must be a whole number"),
        (lambda x: calibration_error(x, x - 1), ValueError, r"calibration_error: labels must be in \[0, 1\], got -1.0"),
        (lambda x: calibration_error(x, [0, 1, 1]), TypeError, "calibration_error: labels must be a tensor, got list"),
    ],
)
def test_bad_input_names_function_argument_and_rule(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(3))
