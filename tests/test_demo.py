import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import accelerate_on

from rlhf_fast.demo import DemoConfig, evaluate, grammar, judge, run_demo, stages
from rlhf_fast.demo.config import quick
from rlhf_fast.demo.rules import DOMAINS
from rlhf_fast.evaluation import intervals

MOODS = st.sampled_from(sorted(grammar.MOODS))
PROMPTS = st.sampled_from(grammar.prompts("train"))


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """The same seed gives the same bits on a CPU; a GPU adds up in any order."""
    with accelerate_on("cpu"):
        yield


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
    assert judge.gold_scores([" good.", " bad."]).tolist() == [1.0, -1.0]


@pytest.mark.parametrize("gap", [-3.0, 0.0, 1.0, 5.0])
def test_annotators_follow_bradley_and_terry(gap):
    n, temperature = 40_000, 2.0
    generator = torch.Generator().manual_seed(3)
    wins = judge.prefers_first(torch.full((n,), gap), torch.zeros(n), temperature=temperature, generator=generator)
    expected = 1 / (1 + math.exp(-gap / temperature))
    assert abs(wins.double().mean().item() - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


def test_annotators_need_a_temperature():
    with pytest.raises(ValueError, match="temperature"):
        judge.prefers_first(torch.zeros(1), torch.zeros(1), temperature=0.0)


def test_win_rate_and_its_interval():
    """Wilson's interval for 8 of 10 is [0.4902, 0.9433] (Newcombe 1998, method 3 without continuity correction)."""
    assert intervals.wilson(0.8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=5e-5)
    share, low, high = intervals.win_rate(torch.tensor([2.0, 1.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 3.0, 0.0]))
    assert share == 2.5 / 4
    assert 0 < low < share < high < 1
    assert intervals.wilson(1.0, 256)[2] == pytest.approx(1.0)


@pytest.fixture(scope="module")
def tokenizer():
    return stages.train_tokenizer([text(review) for review in some_reviews(1500)], 1024)


@pytest.fixture(scope="module")
def models(tokenizer):
    """Two random models of which the second is the first, pushed a little."""
    config = DemoConfig(layers=1, width=32)
    first, second = (stages.new_model(config, tokenizer).eval() for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in second.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return first, second


def test_reviews_for_sft_are_balanced_and_reproducible():
    reviews = stages.write_reviews(2000, seed=4)
    held_out = {p.text for p in grammar.prompts("held_out")}
    assert not held_out & {review.prompt.text for review in reviews}
    assert 0.42 < (judge.gold_scores([review.response for review in reviews]) > 0).float().mean() < 0.55
    assert reviews == stages.write_reviews(2000, seed=4) != stages.write_reviews(2000, seed=5)


def test_tokenizer_gives_the_text_back(tokenizer):
    for review in some_reviews(50, seed=9):
        ids = tokenizer(text(review))["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text(review)
        apart = (
            tokenizer(review.prompt.text)["input_ids"]
            + tokenizer(review.response, add_special_tokens=False)["input_ids"]
        )
        assert ids == apart  # so that a response tokenised alone is the one that the model writes
    assert tokenizer.decode(tokenizer("naïve ☃")["input_ids"], skip_special_tokens=True) == "naïve ☃"
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_pairs_follow_the_verdict(tokenizer, models):
    asked, config = grammar.prompts("train")[:40], DemoConfig(max_new_tokens=16)
    gold = stages.compare(models[1], tokenizer, asked, config, 3, stages.gold_verdict)
    assert gold
    for pair in gold:
        assert judge.gold_score(pair["chosen"]) > judge.gold_score(pair["rejected"])
    assert stages.label_agreement(gold) == 1.0
    turned = stages.compare(models[1], tokenizer, asked, config, 3, lambda a, b: 1 - stages.gold_verdict(a, b))
    assert [(p["prompt"], p["rejected"], p["chosen"]) for p in turned] == [
        (p["prompt"], p["chosen"], p["rejected"]) for p in gold
    ]


def test_sequence_kl_against_float64_one_text_at_a_time(tokenizer, models):
    first, second = models
    reviews = some_reviews(5, seed=2)
    expected = 0.0
    for review in reviews:
        before = tokenizer(review.prompt.text)["input_ids"]
        ids = before + tokenizer(review.response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        p, q = (
            m(torch.tensor([ids])).logits[0, len(before) - 1 : -1].detach().double().log_softmax(-1)
            for m in (second, first)
        )
        expected += float((p.exp() * (p - q)).sum()) / len(reviews)
    arguments = (tokenizer, [r.prompt for r in reviews], [r.response for r in reviews])
    assert expected > 1
    assert evaluate.sequence_kl(second, first, *arguments, batch_size=2) == pytest.approx(expected, rel=1e-4)
    assert evaluate.sequence_kl(first, first, *arguments) == pytest.approx(0.0, abs=1e-4)


def test_answers_are_judged_by_hand():
    asked = [grammar.Prompt("I saw this comedy on my own on Friday.", "film")] * 2
    good = " It was an excellent film. The acting was superb, the music quite dull. See it and be happy."
    figures = evaluate.judge_answers(asked, [good, " terrible"]).figures
    assert figures == {"positive_share": 0.5, "gold_score": (6 - 2 + 2 - 3) / 2, "grammar_share": 0.5,
                       "distinct_share": 1.0, "words": 9.5}  # fmt: skip


def test_reward_is_watched_not_changed():
    watched = stages.Watched(lambda prompts, responses, **columns: torch.arange(len(prompts)).float())
    assert watched(["p", "q"], [" superb.", " awful, awful."]).tolist() == [0.0, 1.0]
    assert watched.gold == [{"step": 1, "gold_score": -1.5, "gold_positive": 0.5}]


@pytest.mark.parametrize("native", [True, False])
def test_ppo_multiplies_in_bfloat16_where_that_is_native(monkeypatch, native):
    monkeypatch.setattr(stages, "bfloat16_is_native", lambda device: native)
    assert stages.ppo_precision(DemoConfig()) == ("bf16" if native else "fp32")
    assert stages.ppo_precision(DemoConfig(ppo_precision="fp32")) == "fp32"


def test_verdicts_know_both_ends():
    figures = {"sft_positive_share": 0.5, "ppo_positive_share": 0.9, "win_rate": 0.8, "reward_accuracy": 0.85,
               "sequence_kl": 20.0, "grammar_drop": 0.09}  # fmt: skip
    assert all(evaluate.verdicts(figures).values())
    wrong = {"sft_positive_share": 0.7, "ppo_positive_share": 0.89, "win_rate": 0.79, "reward_accuracy": 0.84,
             "sequence_kl": 20.1, "grammar_drop": 0.1}  # fmt: skip
    assert not any(evaluate.verdicts(wrong).values())


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("width", 100, "multiple of 32"), ("noise", 0.0, "above 0"), ("ppo_minibatch_size", 65, "at most ppo_batch_size")],
)
def test_bad_numbers_are_refused(field, value, says):
    with pytest.raises(ValueError, match=f"DemoConfig.{field}.*{says}"):
        DemoConfig(**{field: value})


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("demo") / "run" for _ in range(2)]
    return [(folder, run_demo(quick(str(folder), seed=7))) for folder in folders]


def test_demo_runs_end_to_end(two_runs):
    folder, results = two_runs[0]
    assert json.loads((folder / "results.json").read_text()) == results
    figures = {f"{model}_{what}" for model in ("sft", "ppo") for what in
               ("positive_share", "gold_score", "grammar_share", "distinct_share", "words")}  # fmt: skip
    figures |= {"win_rate", "win_rate_low", "win_rate_high", "grammar_drop", "sequence_kl"}
    figures |= {"reward_accuracy", "reward_accuracy_low", "reward_accuracy_high"}
    assert set(results["figures"]) == figures
    assert all(math.isfinite(value) for value in results["figures"].values())
    assert results["figures"]["sequence_kl"] > 0
    assert set(results["thresholds"]) == set(evaluate.THRESHOLDS)
    assert results["counts"]["held_out_prompts"] == 16
    assert set(results["seconds"]) == {"sft", "reward", "ppo", "evaluate", "total"}
    page = (folder / "report.html").read_text()
    for heading in ("Figures", "Before and after", "Gold score", "Clip fraction", "Entropy", "Samples", "torch"):
        assert heading in page
    for name in ("sft/model.safetensors", "reward/model.safetensors", "ppo/model.safetensors", "data/pairs.jsonl"):
        assert (folder / name).exists()
    gold = [json.loads(line) for line in (folder / "ppo/gold.jsonl").read_text().splitlines()]
    assert [line["step"] for line in gold] == [1, 2, 3]


def test_same_seed_same_figures(two_runs):
    (first, one), (second, other) = two_runs
    assert one["figures"] == other["figures"]
    for name in ("ppo/model.safetensors", "reward/model.safetensors", "ppo/gold.jsonl", "data/pairs.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_refuses_a_folder_that_holds_a_run(two_runs):
    folder, _ = two_runs[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ValueError, match="already holds a run"):
        run_demo(quick(str(folder)))
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
