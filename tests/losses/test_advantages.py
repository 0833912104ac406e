"""Advantages over a group: hand-computed cases, loops over dictionaries, invariances bit for bit."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.losses import group_advantages, whiten

KINDS = ("grpo", "dr_grpo", "rloo", "reinforce_pp")


def loop(scores, groups, kind, eps):
    """The formulas, one response at a time."""
    out = []
    for score, group in zip(scores, groups, strict=True):
        own = [s for s, g in zip(scores, groups, strict=True) if g == group or kind == "reinforce_pp"]
        if len(own) == 1 or len(set(own)) == 1:
            out.append(0.0)
        elif kind == "rloo":
            out.append(score - (math.fsum(own) - score) / (len(own) - 1))
        elif kind == "dr_grpo":
            out.append(score - statistics.fmean(own))
        else:
            out.append((score - statistics.fmean(own)) / (statistics.stdev(own) + eps))
    return torch.tensor(out, dtype=torch.float64)


def test_by_hand():
    scores, groups = torch.tensor([1.0, 5.0, 3.0, 9.0, 7.0, 7.0]), torch.tensor([7, -2, 7, 100, 3, 3])
    root = math.sqrt(2)  # of the unbiased variance of 1 and 3
    expected = {
        "grpo": [-1 / root, 0, 1 / root, 0, 0, 0],
        "dr_grpo": [-1, 0, 1, 0, 0, 0],
        "rloo": [-2, 0, 2, 0, 0, 0],
    }
    for kind, values in expected.items():
        out = group_advantages(scores, groups, kind=kind, eps=0.0)
        assert torch.allclose(out, torch.tensor(values).float(), atol=1e-7), kind
        assert out.dtype == torch.float32
    assert torch.allclose(
        group_advantages(scores, groups, eps=root), torch.tensor([-1 / (2 * root), 0, 1 / (2 * root), 0, 0, 0])
    )
    three = group_advantages(torch.tensor([0.0, 0.0, 6.0]), torch.zeros(3, dtype=torch.int32), kind="rloo")
    assert three.tolist() == [-3, -3, 6]
    four = group_advantages(torch.tensor([0.0, 0.0, 0.0, 4.0]).double(), torch.zeros(4).long(), kind="rloo")
    assert four.tolist() == pytest.approx([-4 / 3, -4 / 3, -4 / 3, 4.0], rel=1e-15)


@settings(max_examples=80)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, 0.1, -2.5]) | st.floats(-100, 100), st.integers(-3, 3)), max_size=12
    ),
    eps=st.sampled_from([1e-6, 1e-4, 0.5]),
)
def test_is_the_loop(kind, rows, eps):
    scores = torch.tensor([score for score, _ in rows], dtype=torch.float64)
    groups = torch.tensor([group for _, group in rows], dtype=torch.int64)
    out = group_advantages(scores, groups, kind=kind, eps=eps)
    expected = loop(scores.tolist(), groups.tolist(), kind, eps)
    # Relative to the scores: the loop's own rounding, over an eps of 1e-6.
    assert torch.allclose(out, expected, rtol=1e-9, atol=1e-7)
    assert out.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_responses_and_the_names_of_the_groups_change_no_bit(kind):
    generator = torch.Generator().manual_seed(0)
    scores, groups = torch.randn(500, generator=generator), torch.randint(0, 90, (500,), generator=generator)
    out = group_advantages(scores, groups, kind=kind)
    for seed in range(5):
        order = torch.randperm(500, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(group_advantages(scores[order], 7 - 3 * groups[order], kind=kind), out[order])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_scores_are_exactly_0_however_far(kind):
    for score in (0.1, 1e8 / 3, -1e-30):
        for dtype in (torch.float32, torch.float64):
            scores = torch.full((7,), score, dtype=dtype)
            assert torch.equal(
                group_advantages(scores, torch.zeros(7).long(), kind=kind, eps=0.0), torch.zeros(7).to(dtype)
            )


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_changes_nothing_and_a_scale_only_what_keeps_it(kind):
    scores, groups = torch.tensor([0.0, 1.0, 3.0, 2.0, 5.0]), torch.tensor([0, 0, 0, 1, 1])
    out = group_advantages(scores, groups, kind=kind)
    assert torch.equal(group_advantages(scores + 4096, groups, kind=kind), out)
    assert torch.allclose(
        group_advantages(scores * 8, groups, kind=kind), out * (8 if kind in ("dr_grpo", "rloo") else 1)
    )
    # Each group's advantages add up to 0, those of reinforce_pp over the batch.
    assert out.sum().item() == pytest.approx(0, abs=1e-5)


def test_reinforce_pp_is_whiten_over_the_batch():
    scores = torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    out = group_advantages(scores, torch.arange(40), kind="reinforce_pp")
    assert torch.allclose(out, whiten(scores, torch.ones(40).bool()), atol=1e-5)  # eps is not in the same place


def test_a_score_of_nan_stays_in_its_group_and_no_gradient_flows():
    scores = torch.tensor([1.0, torch.nan, 2.0, 4.0], requires_grad=True)
    out = group_advantages(scores, torch.tensor([5, 5, 1, 1]), kind="dr_grpo")
    assert out.isnan().tolist() == [True, True, False, False]
    assert out[2:].tolist() == [-1, 1]
    assert not out.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_one_and_half_precision(kind):
    assert group_advantages(torch.zeros(0), torch.zeros(0).long(), kind=kind).shape == (0,)
    assert group_advantages(torch.tensor([3.0]), torch.tensor([4]), kind=kind).tolist() == [0]
    half = torch.tensor([0.0, 1.0, 5.0], dtype=torch.bfloat16)
    groups = torch.zeros(3).long()
    assert torch.equal(group_advantages(half, groups, kind=kind), group_advantages(half.float(), groups, kind=kind))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x, g: group_advantages(x[None], g),
            ValueError,
            r"group_advantages: scores must be \[B\], got \[1, 3\]",
        ),
        (lambda x, g: group_advantages(g, g), TypeError, "group_advantages: scores must be float32, .*, got int64"),
        (lambda x, g: group_advantages(x, x), TypeError, "group_advantages: groups must be int64, int32, got float32"),
        (lambda x, g: group_advantages(x, g[:2]), ValueError, r"group_advantages: groups must be \[B\] like scores"),
        (
            lambda x, g: group_advantages(x, g, kind="gae"),
            ValueError,
            "group_advantages: kind must be one of grpo, dr_",
        ),
        (lambda x, g: group_advantages(x, g, eps=-1), ValueError, "group_advantages: eps must be between 0"),
        (lambda x, g: group_advantages(x, g, eps="0"), TypeError, "group_advantages: eps must be a number, got str"),
    ],
)
def test_bad_input_names_function_argument_and_rule(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
