"""Evaluation: figures against hand-computed ones, the folder it leaves, and bad input in one sentence."""

import importlib.util
import json
import math
import re

import pytest
import torch
from scipy import stats
from tiny import accelerate_on, tiny_gpt2, tiny_tokenizer

import rlhf_fast as rf
from rlhf_fast import data
from rlhf_fast.cli import main
from rlhf_fast.evaluation import intervals
from rlhf_fast.evaluation.answers import answer
from rlhf_fast.evaluation.overlap import overlap
from rlhf_fast.generate import decode

TOKENIZER = tiny_tokenizer()
PROMPTS = [
    {"prompt": p, "response": r, "likes": len(r)}
    for p, r in (("the movie", " was good fun"), ("I like", " this"), ("this plot is", " very dull"), ("a", " plot"))
]
QUIET = rf.EvaluateConfig(max_new_tokens=6, quiet=True)


@pytest.fixture(autouse=True)
def on_the_cpu():
    with accelerate_on("cpu"):
        yield


def length(prompts, responses, **columns):
    return [float(len(text)) for text in responses]


def shaken(seed=1, size=0.05):
    model = tiny_gpt2(TOKENIZER)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += size * torch.randn(weight.shape, generator=generator)
    return model


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_interval_of_a_mean_is_that_of_scipy():
    values = torch.tensor([1.0, 4.0, -2.0, 0.5, 3.0])
    found = intervals.mean(values)
    expected = stats.norm.interval(0.95, float(values.double().mean()), stats.sem(values.double().numpy()))
    assert found == pytest.approx((1.3, *expected))
    assert intervals.mean(torch.tensor([2.0])) == (2.0, -math.inf, math.inf)


def test_bleu_and_rouge_by_hand():
    """5 of 6 words, 3 of 5 pairs, 1 of 4 triples, no quadruple of 3: that counts half of one."""
    figures, notes = overlap(["the cat sat on the mat"], [["the cat is on the mat"]])
    assert notes == []
    assert figures["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)
    assert figures["rouge1"] == pytest.approx(5 / 6)
    assert figures["rouge2"] == pytest.approx(3 / 5)
    assert figures["rougeL"] == pytest.approx(5 / 6)


def test_the_best_of_several_references_counts():
    figures, _ = overlap(["a b c d", "e f g h"], [["x", "a b c d", "y"], ["e f g h"]])
    assert figures == pytest.approx({"bleu": 100.0, "rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0})


def test_a_missing_package_is_a_note(monkeypatch):
    find = importlib.util.find_spec
    import rlhf_fast.evaluation.overlap as module

    monkeypatch.setattr(module, "find_spec", lambda name: None if name in ("sacrebleu", "rouge_score") else find(name))
    results = rf.evaluate(tiny_gpt2(TOKENIZER), PROMPTS, tokenizer=TOKENIZER, config=QUIET)
    assert len(results["notes"]) == 2
    assert all("pip install 'rlhf-fast[evaluate]'" in note for note in results["notes"])
    assert "bleu" not in results["figures"]["model"]
    assert results["figures"]["model"]["perplexity"] > 1


def test_the_answers_do_not_depend_on_the_batch_size():
    prompts = data.prompt_examples(data.read_records(PROMPTS), TOKENIZER)
    one, all_at_once = (
        answer(tiny_gpt2(TOKENIZER), prompts, TOKENIZER, rf.EvaluateConfig(batch_size=size, max_new_tokens=6))
        for size in (1, 4)
    )
    assert one.texts == all_at_once.texts
    assert one.lengths.tolist() == all_at_once.lengths.tolist()
    other = answer(tiny_gpt2(TOKENIZER), prompts, TOKENIZER, rf.EvaluateConfig(seed=1, max_new_tokens=6))
    assert other.texts != one.texts


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_the_kl_of_a_response_is_the_sum_over_its_tokens(temperature):
    """Against float64 softmaxes of one sequence at a time, without padding."""
    prompts = data.prompt_examples(data.read_records(PROMPTS), TOKENIZER)
    model, reference = shaken(), tiny_gpt2(TOKENIZER)  # in training mode, with dropout: an evaluation has none
    config = rf.EvaluateConfig(max_new_tokens=5, temperature=temperature)
    found = answer(model, prompts, TOKENIZER, config, reference=reference)
    texts = rf.generate(model, PROMPTS_ALONE, tokenizer=TOKENIZER, max_new_tokens=5, temperature=temperature, seed=0)
    assert texts == found.texts
    model.eval(), reference.eval()
    for i, prompt in enumerate(prompts):
        # The tokens of a text need not be those drawn: the model is asked again for them.
        ids = torch.tensor([prompt.ids])
        seeds = torch.randint(2**62, (len(prompts),), generator=torch.Generator().manual_seed(0))
        written = decode(
            model, ids, torch.ones_like(ids).bool(), max_new_tokens=5, stop_ids=[TOKENIZER.eos_token_id],
            pad_id=TOKENIZER.pad_token_id, temperature=temperature, seeds=seeds[i : i + 1],
        )  # fmt: skip
        whole = torch.cat([ids, written.responses], 1)
        with torch.no_grad():
            p, q = (
                (m.double()(whole).logits[0, ids.shape[1] - 1 : -1] / (temperature or 1.0)).log_softmax(-1)
                for m in (model, reference)
            )
        model.float(), reference.float()
        assert found.kl[i] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)


PROMPTS_ALONE = [record["prompt"] for record in PROMPTS]


def test_perplexity_is_that_of_the_cross_entropy():
    model = tiny_gpt2(TOKENIZER).eval()
    results = rf.evaluate(model, PROMPTS, tokenizer=TOKENIZER, config=QUIET)
    total = count = 0
    for record in PROMPTS:
        before = TOKENIZER(record["prompt"])["input_ids"]
        ids = torch.tensor(before + TOKENIZER(record["response"])["input_ids"] + [TOKENIZER.eos_token_id])
        with torch.no_grad():
            logits = model.double()(ids[None]).logits[0]
        total += torch.nn.functional.cross_entropy(
            logits[len(before) - 1 : -1], ids[len(before) :], reduction="sum"
        ).item()
        count += len(ids) - len(before)
    assert results["figures"]["model"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_what_it_writes_and_returns(tmp_path):
    seen = []

    def reward(prompts, responses, likes, **columns):
        seen.append(likes)
        return length(prompts, responses)

    results = rf.evaluate(
        shaken(size=0.2), PROMPTS, baseline=tiny_gpt2(TOKENIZER), reward=reward, tokenizer=TOKENIZER,
        output_dir=tmp_path / "out", config=QUIET,
    )  # fmt: skip
    assert json.loads((tmp_path / "out/results.json").read_text()) == results
    said = lines(tmp_path / "out/responses.jsonl")
    assert [line["prompt"] for line in said] == PROMPTS_ALONE
    assert all(line["model_score"] == len(line["model"]) for line in said)
    wins = [
        1.0 if line["model_score"] > line["baseline_score"] else 0.5 * (line["model_score"] == line["baseline_score"])
        for line in said
    ]
    rate = results["win_rate"]["baseline"]
    assert rate["share"] == sum(wins) / 4
    assert (rate["low"], rate["high"]) == intervals.wilson(sum(wins) / 4, 4)[1:]
    figures = results["figures"]["model"]
    assert figures["reward"] == pytest.approx(sum(line["model_score"] for line in said) / 4)
    assert figures["reward_low"] < figures["reward"] < figures["reward_high"]
    assert figures["kl"] > 0
    assert "kl" not in results["figures"]["baseline"]
    assert figures["distinct"] == len({line["model"] for line in said}) / 4
    assert results["figures"]["references"]["reward"] == sum(len(r["response"]) for r in PROMPTS) / 4
    assert results["win_rate"]["references"]["share"] <= 1
    assert set(map(tuple, seen)) == {tuple(r["likes"] for r in PROMPTS)}
    page = (tmp_path / "out/report.html").read_text()
    assert "win rate over it" in page
    assert "the movie" in page
    assert len(page) < 1e6


def test_a_model_against_itself_wins_half_and_has_no_kl():
    results = rf.evaluate(
        tiny_gpt2(TOKENIZER), PROMPTS, baseline=tiny_gpt2(TOKENIZER), reward=length, tokenizer=TOKENIZER, config=QUIET
    )
    assert results["win_rate"]["baseline"]["share"] == 0.5
    assert results["win_rate"]["baseline"]["ties"] == 1.0
    assert results["figures"]["model"]["kl"] == pytest.approx(0, abs=1e-6)


def test_the_frontier_of_the_checkpoints_of_a_run(tmp_path):
    config = rf.PPOConfig(
        steps=3, batch_size=4, minibatch_size=2, max_new_tokens=6, learning_rate=1e-2, save_every=1, keep=3, quiet=True
    )
    rf.PPOTrainer(
        tiny_gpt2(TOKENIZER), reward=length, prompts=PROMPTS, tokenizer=TOKENIZER, output_dir=tmp_path / "run",
        config=config,
    ).train()  # fmt: skip
    results = rf.evaluate(
        tmp_path / "run", PROMPTS, reference=tiny_gpt2(TOKENIZER), reward=length, checkpoints=tmp_path / "run",
        tokenizer=TOKENIZER, output_dir=tmp_path / "out", config=QUIET,
    )  # fmt: skip
    rows = results["frontier"]
    assert [row["checkpoint"] for row in rows] == ["step-1", "step-2", "step-3"]
    assert rows[2]["kl"] == results["figures"]["model"]["kl"]  # the last checkpoint is the result
    assert rows[2]["reward"] == results["figures"]["model"]["reward"]
    assert rows[0]["kl"] > 0
    for row in rows:
        beaten = [o for o in rows if o is not row and o["reward"] >= row["reward"] and o["kl"] <= row["kl"]]
        assert row["best"] == (not beaten)
    assert "Reward against KL" in (tmp_path / "out/report.html").read_text()


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_gpt2(TOKENIZER).save_pretrained("model")
    TOKENIZER.save_pretrained("model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in PROMPTS))
    (tmp_path / "judge.py").write_text("def score(prompts, responses, **_):\n    return [len(r) for r in responses]\n")
    capsys.readouterr()
    command = "evaluate --model model --prompts prompts.jsonl --reward judge.py:score --max_new_tokens 6"
    assert main(f"{command} --baseline model --output_dir out".split()) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert re.search(r"win rate over it.* 0\.5 \[0\.15, 0\.85\]", shown.out)
    assert "BLEU" in shown.out
    assert "out/report.html" in shown.out
    assert json.loads((tmp_path / "out/results.json").read_text())["config"]["max_new_tokens"] == 6
    for more, words in [
        ("--output_dir out", "out is not empty"),
        ("--checkpoints model --baseline model --output_dir b", "model: no run with checkpoints"),
        ("--temperature -1 --output_dir b", "EvaluateConfig.temperature must be at least 0, got -1.0"),
        ("--baseline nowhere/ --output_dir b", "nowhere/ holds no tokenizer"),
        ("--max_new_tokens 127 --output_dir b", "127"),
    ]:
        assert main(f"{command} {more}".split()) == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error.splitlines()) == 1
        assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reward": lambda prompts, responses, **_: [1.0]}, "one score for each of 4 prompts"),
        ({"reward": lambda prompts, responses, **_: [[1.0, 2.0]] * 4}, "one score per response"),
        ({"reward": lambda prompts, responses, **_: [math.nan] * 4}, "the reward of prompt 1 of 4 is nan"),
        ({"prompts": [{"prompt": "the"}, {"response": "x"}]}, 'record 2: "prompt" is missing'),
        ({"prompts": [*PROMPTS, {"prompt": "the"}]}, 'record 5: "response" is missing'),
        ({"prompts": [{"prompt": "the", "references": "x"}]}, 'record 1: "references" must be a list'),
        ({"checkpoints": ["a"]}, "checkpoints need a reward, and a reference or baseline"),
    ],
)
def test_bad_input_is_one_sentence(change, words):
    arguments = {"prompts": PROMPTS, "tokenizer": TOKENIZER, "config": QUIET} | change
    with pytest.raises(ValueError, match=words):
        rf.evaluate(tiny_gpt2(TOKENIZER), arguments.pop("prompts"), **arguments)


def test_models_of_different_vocabularies_have_no_kl(tmp_path):
    other = tiny_tokenizer(bos=True)
    other.add_tokens(["zebra"])
    tiny_gpt2(other).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    arguments = {"reward": length, "tokenizer": TOKENIZER, "config": QUIET}
    results = rf.evaluate(tiny_gpt2(TOKENIZER), PROMPTS, baseline=tmp_path / "other", **arguments)
    assert results["notes"] == ["no KL: model and baseline have different vocabularies"]
    assert "kl" not in results["figures"]["model"]
    with pytest.raises(ValueError, match="different vocabularies"):
        rf.evaluate(tiny_gpt2(TOKENIZER), PROMPTS, reference=tmp_path / "other", **arguments)
