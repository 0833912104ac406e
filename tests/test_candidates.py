"""sample_and_rank: who answers, what is scored, and RRHF trained on it."""

import json

import pytest
import torch
from tiny import accelerate_on, tiny_gpt2, tiny_tokenizer

import rlhf_fast as rf
from rlhf_fast.data import DataError

TOKENIZER = tiny_tokenizer()
PROMPTS = [
    {"prompt": f"the {w} was", "said": h} for w, h in (("movie", " good"), ("plot", None), ("Bot", [" a", " b"]))
]
SHORT = {"tokenizer": TOKENIZER, "max_new_tokens": 5, "seed": 3}


@pytest.fixture(autouse=True)
def on_the_cpu():
    with accelerate_on("cpu"):
        yield


def length(prompts, responses, **_columns):
    return [float(len(r)) for r in responses]


def test_samples_are_those_of_generate_and_scored():
    model = tiny_gpt2()
    found = rf.sample_and_rank(model, PROMPTS, length, 6, **SHORT)
    texts = rf.generate(model, [p["prompt"] for p in PROMPTS for _ in range(6)], **SHORT)
    for i, (record, given) in enumerate(zip(found, PROMPTS, strict=True)):
        assert record["prompt"] == given["prompt"]
        assert record["responses"] == list(dict.fromkeys(t for t in texts[6 * i : 6 * i + 6] if t.strip()))
        assert record["scores"] == [len(r) for r in record["responses"]]
        assert set(record["sources"]) == {"sample"}
    assert rf.sample_and_rank(model, PROMPTS, length, 6, batch_size=2, **SHORT) == found
    assert rf.sample_and_rank(model, PROMPTS, length, 6, **SHORT | {"seed": 4}) != found


def test_every_source_and_equal_answers_once(tmp_path):
    other = tmp_path / "other"
    tiny_gpt2(seed=5).save_pretrained(other)
    TOKENIZER.save_pretrained(other)
    model = tiny_gpt2()
    found = rf.sample_and_rank(
        model, PROMPTS, length, 2, beams=4, beam_groups=2, diversity=2.0,
        others=[str(other), tiny_gpt2(seed=6), lambda prompts: [f" {p} good" for p in prompts]], human="said", **SHORT,
    )  # fmt: skip
    for record, given in zip(found, PROMPTS, strict=True):
        by = {s: [r for r, who in zip(record["responses"], record["sources"], strict=True) if who == s] for s in
              ("sample", "beam", "other 1", "other 2", "other 3", "human")}  # fmt: skip
        assert 2 <= len(by["beam"]) <= 4
        assert by["other 3"] == [f" {given['prompt']} good"]
        human = given["said"] or []
        assert by["human"] == ([human] if isinstance(human, str) else human)
        assert len(set(record["responses"])) == len(record["responses"]) == len(record["scores"])
    twice = rf.sample_and_rank(
        model, PROMPTS, length, 0, others=[lambda p: [" good"] * len(p)] * 2, human="said", **SHORT
    )
    assert [r["responses"] for r in twice] == [[" good"], [" good"], [" good", " a", " b"]]
    assert twice[0]["sources"] == ["other 1"]


def test_the_reward_sees_the_prompt_and_its_columns():
    seen = []

    def reward(prompts, responses, said):
        seen.extend(zip(prompts, responses, said, strict=True))
        return torch.arange(len(responses)).float()

    found = rf.sample_and_rank(tiny_gpt2(), PROMPTS, reward, 2, batch_size=2, **SHORT)
    assert seen == [(g["prompt"], r, g["said"]) for f, g in zip(found, PROMPTS, strict=True) for r in f["responses"]]
    assert max(s for f in found for s in f["scores"]) == 1.0  # it was asked about two at a time


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda p, r, **_: [float("nan")] * len(p), "the reward of prompt 1 of .* is nan: prompt 'the movie was'"),
        (lambda p, r, **_: [1.0], "one score for each of 4 prompts"),
        (lambda p, r, **_: torch.zeros(len(p), 3), r"one score per response, got \[4, 3\]"),
        (lambda p, r, **_: 1 / 0, "the reward raised ZeroDivisionError.*'the movie was'"),
    ],
)
def test_a_reward_that_gives_no_scores(reward, words):
    others = [lambda p: [" good"] * len(p)]
    with pytest.raises(ValueError, match=words):
        rf.sample_and_rank(tiny_gpt2(), [*PROMPTS, {"prompt": "a"}], reward, 0, others=others, **SHORT)


def test_nobody_answers_or_nothing_is_said():
    model = tiny_gpt2()
    with pytest.raises(ValueError, match="nobody answers"):
        rf.sample_and_rank(model, PROMPTS, length, 0, **SHORT)
    with pytest.raises(ValueError, match="every response is empty"):
        rf.sample_and_rank(model, PROMPTS, length, 0, others=[lambda p: [" "] * len(p)], **SHORT)
    with pytest.raises(ValueError, match="must return 3 texts, one per prompt, got 1"):
        rf.sample_and_rank(model, PROMPTS, length, 0, others=[lambda p: ["a"]], **SHORT)
    with pytest.warns(UserWarning, match="1 of 3 prompts got empty responses only"):
        found = rf.sample_and_rank(model, PROMPTS, length, 0, human="said", **SHORT)
    assert [record["prompt"] for record in found] == ["the movie was", "the Bot was"]
    with pytest.raises(DataError, match='record 1: "said" must be a string or a list of strings'):
        rf.sample_and_rank(model, [{"prompt": "a", "said": [3]}], length, 0, human="said", **SHORT)


def test_rrhf_from_its_own_samples_raises_the_reward(tmp_path):
    """Five rounds of sampling and ranking: the share of praise among the tokens that are written."""
    praise = [" good", " great", " fun", " like", " very"]

    def reward(prompts, responses):
        return [sum(r.count(w) for w in praise) / 8 for r in responses]

    def gold(model):
        found = rf.sample_and_rank(model, prompts, reward, 8, **knobs)
        return sum(sum(f["scores"]) / len(f["scores"]) for f in found) / len(found)

    prompts = [{"prompt": f"the {w} {v}"} for w in ("movie", "plot", "Bot") for v in ("was", "is")]
    knobs = {"tokenizer": TOKENIZER, "max_new_tokens": 8, "seed": 1}
    model = tiny_gpt2(initializer_range=0.05)
    before = gold(model)
    for turn in range(5):
        data = rf.sample_and_rank(model, prompts, reward, 24, **knobs | {"seed": turn})
        (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in data))
        config = rf.RRHFConfig(epochs=8, batch_size=2, learning_rate=5e-3, quiet=True, seed=turn)
        rf.RRHFTrainer(model, data=tmp_path / "ranked.jsonl", tokenizer=TOKENIZER, config=config).train()
    assert before < 0.1
    assert gold(model) > 0.6


def test_conversations_and_a_model_from_a_folder(tmp_path):
    """What comes out is read by RRHF as the tokens that the model saw, with its own answers behind them."""
    chat = tiny_tokenizer(chat=True, bos=True)
    tiny_gpt2(chat).save_pretrained(tmp_path)
    chat.save_pretrained(tmp_path)
    talk = [{"role": "user", "content": "is it good"}]
    given = {"max_new_tokens": 5, "seed": 3}
    found = rf.sample_and_rank(str(tmp_path), [{"prompt": talk}], length, 3, beams=2, **given)
    written = rf.generate(str(tmp_path), [talk] * 3, **given)
    assert found[0]["prompt"] == chat.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert {text for text in written if text.strip()} <= set(found[0]["responses"])
    trainer = rf.RRHFTrainer(str(tmp_path), data=found, config=rf.RRHFConfig(quiet=True))
    (prompt,) = rf.data.prompt_examples(rf.data.read_records([{"prompt": talk}]), chat)
    (example,) = trainer.examples
    assert all(ids[: example.prompt_length] == prompt.ids for ids in example.answers)
    assert prompt.ids[0] == chat.bos_token_id
