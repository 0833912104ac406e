import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.demo import grammar, judge
from rlhf_fast.demo.rules import DOMAINS

MOODS = st.sampled_from(sorted(grammar.MOODS))
PROMPTS = st.sampled_from(grammar.prompts("train"))


def text(review):
    return review.prompt.text + review.response


def some_reviews(count, seed=0):
    draw, beginnings = random.Random(seed), grammar.prompts("train")
    return [
        grammar.write_review(draw, draw.choice(beginnings), draw.choice(sorted(grammar.MOODS))) for _ in range(count)
    ]


@settings(max_examples=200, deadline=None)
@given(PROMPTS, MOODS, st.integers(0, 2**32))
def test_accepts_what_it_writes(prompt, mood, seed):
    review = grammar.write_review(random.Random(seed), prompt, mood)
    assert review.response.startswith(" ")
    assert grammar.accepts(text(review))
    assert "  " not in text(review)


@settings(max_examples=200, deadline=None)
@given(PROMPTS, MOODS, st.integers(0, 2**32), st.data())
def test_rejects_corruptions(prompt, mood, seed, data):
    """A missing or doubled word, a lost full stop, a wrong capital, two sentences about another place."""
    right = text(grammar.write_review(random.Random(seed), prompt, mood))
    words = right.split(" ")
    i = data.draw(st.integers(0, len(words) - 1))
    optional = {"really", "truly", "quite"}  # the only words that may come or go
    assert not grammar.accepts(" ".join(words[: i + 1] + words[i:]))
    if words[i] not in optional:
        assert not grammar.accepts(" ".join(words[:i] + words[i + 1 :]))
    assert not grammar.accepts(right[:-1])
    assert not grammar.accepts(right + " ")
    assert not grammar.accepts(right.swapcase())
    assert not grammar.accepts(right.replace(". ", ".  ", 1))
    assert not grammar.accepts(right[0].lower() + right[1:])
    assert not grammar.accepts(right + right)


def test_rejects_what_is_no_review():
    for wrong in ("", " ", ".", "I", "I loved it.", "\n", "I watched this film on my own last night and"):
        assert not grammar.accepts(wrong)


def test_knows_a_review_by_heart():
    """Written by hand from rules.py, and the same with one word from the wrong domain."""
    right = (
        "I saw this comedy with my brother on Friday and it was an excellent film. The acting was superb, the music "
        "quite dull. I thought the villain was funny. I sat near the exit. I would gladly watch it again."
    )
    assert grammar.accepts(right)
    assert not grammar.accepts(right.replace("an excellent", "a excellent"))
    assert not grammar.accepts(right.replace("watch it", "eat it"))
    assert not grammar.accepts(right.replace("the music", "the pillows"))
    assert judge.gold_score(right) == 3 + 3 - 2 + 2 + 2


def test_counts_the_reviews_exactly(monkeypatch):
    """By hand: 2 · 2 sentences without choice, and "b" written in two ways is one word sequence."""
    tiny = "review = {a} {b}.\na = x | y\nb = x {c} | z | x q\nc = q | r"
    rules = {}
    for line in tiny.splitlines():
        name, alternatives = line.split(" = ")
        rules["{d." + name + "}"] = [grammar._alternative(a, "d") for a in alternatives.split(" | ")]
    monkeypatch.setattr(grammar, "RULES", rules)
    grammar._next.cache_clear()
    grammar.count.cache_clear()
    try:
        assert grammar.count(frozenset({("{d.review}",)})) == 2 * 3  # x or y, then "x q", "x r" or "z"
    finally:
        grammar._next.cache_clear()
        grammar.count.cache_clear()


def test_is_rich():
    assert grammar.count() >= 10**6
    reviews = some_reviews(20_000)
    assert len({text(review) for review in reviews}) >= 19_990
    assert len({review.response for review in reviews}) >= 19_900


def test_prompts_are_disjoint_neutral_and_enough():
    train, held_out = grammar.prompts("train"), grammar.prompts("held_out")
    assert len(held_out) >= 768  # 256 prompts for the judge, 512 for the reward model
    assert len({p.text for p in train} | {p.text for p in held_out}) == len(train) + len(held_out)
    assert all(judge.gold_score(p.text) == 0 for p in train + held_out)
    assert {p.domain for p in held_out} == set(DOMAINS)
    with pytest.raises(ValueError, match="split"):
        grammar.prompts("test")


def test_signs_agree_with_the_judge():
    """What the grammar calls praise the judge likes, what it calls blame he dislikes, and he sees nothing else."""
    for name, alternatives in grammar.RULES.items():
        leaves = name.split(".")[-1].strip("}")
        for alternative in alternatives:
            here = judge.gold_score(" ".join(s for s in alternative.symbols if s not in grammar.RULES))
            if leaves in ("good", "real", "helpful", "loved", "a_good"):
                assert here > 0, alternative
            elif leaves in ("bad", "unreal", "rude", "hated", "a_bad"):
                assert here < 0, alternative
            elif alternative.praise != alternative.blame and leaves == "close":
                assert here * (alternative.praise - alternative.blame) > 0, alternative
            else:
                assert here == 0, alternative
    written = {s for alternatives in grammar.RULES.values() for a in alternatives for s in a.symbols}
    assert set(judge.LEXICON) <= written  # no dead entry


@pytest.mark.parametrize(
    ("mood", "low", "high"), [("positive", 0.9, 1.0), ("negative", 0.0, 0.1), ("mixed", 0.3, 0.65)]
)
def test_moods_carry_to_the_score(mood, low, high):
    draw, beginnings = random.Random(1), grammar.prompts("train")
    scores = judge.gold_scores([grammar.write_review(draw, draw.choice(beginnings), mood).response for _ in range(500)])
    assert low <= (scores > 0).float().mean() <= high


def test_a_prompt_or_mood_that_is_not_there():
    prompt = grammar.prompts("train")[0]
    with pytest.raises(ValueError, match="mood"):
        grammar.write_review(random.Random(0), prompt, "furious")
    with pytest.raises(ValueError, match="begins"):
        grammar.write_review(random.Random(0), grammar.Prompt("No  such prompt", "film"), "mixed")


def test_gold_score_by_hand():
    assert judge.gold_score("") == 0
    assert judge.gold_score(" The room was really superb, the lounge quite poor.") == 3 - 2
    assert judge.gold_score(" SUPERB, superb. superbly") == 6  # any case, whole words only
    assert judge.gold_score(" I would gladly stay there again.") == 2
    assert judge.gold_scores([" good.", " bad."]).tolist() == [1.0, -2.0]


@pytest.mark.parametrize("gap", [-3.0, 0.0, 1.0, 5.0])
def test_annotators_follow_bradley_and_terry(gap):
    n, temperature = 40_000, 2.0
    generator = torch.Generator().manual_seed(3)
    wins = judge.prefers_first(torch.full((n,), gap), torch.zeros(n), temperature=temperature, generator=generator)
    expected = 1 / (1 + math.exp(-gap / temperature))
    assert abs(wins.double().mean().item() - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


def test_annotators_are_as_good_as_expected():
    first, second = torch.tensor([4.0, 0.0, 1.0]), torch.tensor([0.0, 2.0, 1.0])
    by_hand = (1 / (1 + math.exp(-4 / 2)) + 1 / (1 + math.exp(-2 / 2))) / 2  # the tie is left out
    assert judge.agreement(first, second, temperature=2.0) == pytest.approx(by_hand, rel=1e-6)
    with pytest.raises(ValueError, match="temperature"):
        judge.prefers_first(first, second, temperature=0.0)


def test_win_rate_and_its_interval():
    """Wilson's interval for 8 of 10 is [0.4902, 0.9433] (Newcombe 1998, method 3 without continuity correction)."""
    assert judge.wilson(0.8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=5e-5)
    share, low, high = judge.win_rate(torch.tensor([2.0, 1.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 3.0, 0.0]))
    assert share == 2.5 / 4
    assert 0 < low < share < high < 1
    assert judge.wilson(1.0, 256)[2] == pytest.approx(1.0)
