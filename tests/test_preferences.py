"""What a reward model learns from: its kind, its labels, its steps, and the tensors that they become."""

import csv
import itertools
import json
import math

import pytest
import torch
from tiny import tiny_tokenizer

from rlhf_fast import preferences
from rlhf_fast.data import DataError, encode, read_records
from rlhf_fast.preferences import collate, kind_of, reward_examples, split_steps

TOKENIZER = tiny_tokenizer()
CHAT = tiny_tokenizer(pad_is_eos=True, chat=True, bos=True)
EOS = TOKENIZER.eos_token_id
PAIR = {"prompt": "the movie was", "chosen": " good", "rejected": " bad"}
RANKED = {"prompt": "the movie was", "responses": [" good", " bad", " not very fun"], "scores": [2, -1.5, 0]}
LABELLED = {"prompt": "the movie was", "response": " good", "label": 1}
STEPS = {"prompt": "the movie was", "steps": [" good", " not bad", " fun"], "labels": [True, None, 0.25]}
ALL = {"pairwise": PAIR, "ranking": RANKED, "pointwise": LABELLED, "process": STEPS}


def examples(*records, tokenizer=TOKENIZER, **limits):
    read = read_records(list(records))
    return reward_examples(read, tokenizer, kind=kind_of(read), **limits)


@pytest.mark.parametrize("kind", ALL)
def test_the_kind_follows_from_the_columns(kind):
    assert kind_of(read_records([ALL[kind], ALL[kind] | {"margin": None}])) == kind
    # A column of another kind beside both of its own does not change it, nor does one that is empty.
    assert kind_of(read_records([ALL[kind] | dict.fromkeys({"chosen", "label", "steps"} - set(ALL[kind]))])) == kind
    assert kind_of(read_records([ALL[kind] | ({"labels": [1]} if kind != "process" else {"label": 1})])) == kind
    assert kind_of(read_records([ALL[kind]]), like=kind) == kind


@pytest.mark.parametrize(("kind", "other"), itertools.permutations(ALL, 2))
def test_records_of_two_kinds(tmp_path, monkeypatch, kind, other):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prefs.jsonl").write_text("\n".join(map(json.dumps, [ALL[kind], ALL[kind], ALL[other]])))
    has, before = (" and ".join(preferences.KINDS[k]) for k in (other, kind))
    words = rf"^prefs.jsonl:3: it has {has}, and the records before it {before}: give records of one kind$"
    with pytest.raises(DataError, match=words):
        kind_of(read_records("prefs.jsonl"))
    with pytest.raises(DataError, match=rf"record 1: it has {has}, and the training data {before}"):
        kind_of(read_records([ALL[other]]), like=kind)


def test_records_of_no_kind():
    with pytest.raises(DataError, match="record 1: no columns that a reward model learns from, which are prompt, chos"):
        kind_of(read_records([{"prompt": "a", "text": "b"}, PAIR]))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, '"chosen" is missing'),
        (PAIR | {"rejected": None}, '"rejected" is missing'),
        (RANKED | {"scores": None}, '"scores" is missing'),
        (RANKED | {"responses": None}, '"responses" is missing'),
        (LABELLED | {"label": None}, '"label" is missing'),
        (LABELLED | {"response": None}, '"response" is missing'),
        (LABELLED | {"prompt": None}, '"prompt" is missing'),
        (LABELLED | {"response": " "}, '"response" is empty'),
        (LABELLED | {"label": 1.5}, '"label" must be true, false or a number from 0 to 1, got 1.5'),
        (LABELLED | {"label": -1}, '"label" must be true, false or a number from 0 to 1, got -1'),
        (LABELLED | {"label": math.nan}, '"label" must be true, false or a number from 0 to 1, got nan'),
        (LABELLED | {"label": "good"}, "\"label\" must be true, false or a number from 0 to 1, got 'good'"),
        (LABELLED | {"label": [1]}, '"label" must be true, false or a number from 0 to 1, got [1]'),
        (STEPS | {"labels": [1, 0]}, '3 "steps" and 2 "labels": give one for each'),
        (STEPS | {"labels": [1, 0, 2]}, '"label 3" must be true, false or a number from 0 to 1, got 2'),
        (STEPS | {"labels": None}, '"labels" is missing'),
        (STEPS | {"labels": 1}, '"labels" must be a list, got a number'),
        (STEPS | {"steps": None}, '"steps" is missing'),
        (STEPS | {"steps": "one"}, '"steps" must be a list, got a text that is not one in JSON'),
        (STEPS | {"steps": []}, '"steps" is empty'),
        (STEPS | {"steps": ["a", " ", "b"]}, '"step 2" is empty'),
        (STEPS | {"steps": ["a", "b", 3]}, '"step 3" must be a string, got a number'),
        (STEPS | {"steps": ["a", "b\nc", "d"]}, "step 2 holds the separator '\\n': choose another one"),
        (STEPS | {"prompt": "a" * 200}, "leave no room for it"),
    ],
)
def test_a_broken_record_is_named_with_its_place(tmp_path, monkeypatch, record, message):
    monkeypatch.chdir(tmp_path)
    name = {"steps": STEPS, "label": LABELLED, "scores": RANKED}
    good = next((g for key, g in name.items() if key in record), PAIR)
    (tmp_path / "prefs.jsonl").write_text("\n".join(map(json.dumps, [good, good, record])))
    read = read_records("prefs.jsonl")
    with pytest.raises(DataError) as caught:
        reward_examples(read, TOKENIZER, kind=kind_of(read), max_length=100)
    assert str(caught.value).startswith("prefs.jsonl:3: ")
    assert message in str(caught.value)


def test_data_that_teach_nothing():
    with pytest.raises(DataError, match="record 1: in this and all other records no two answers to one prompt have"):
        examples(RANKED | {"scores": [1, 1, 1]}, {"prompt": "a", "responses": ["b"], "scores": [1]})
    with pytest.raises(DataError, match="record 1: in this and all other records no step has a label"):
        examples(STEPS | {"labels": [None, None, None]})
    assert len(examples(RANKED | {"scores": [1, 1, 1]}, RANKED)) == 2


def test_labels_in_every_form(tmp_path):
    forms = [1, 0, True, False, 0.25, "1", "0.5", "True", "false "]
    found = examples(*[LABELLED | {"label": label} for label in forms])
    assert [example.labels for example in found] == [[v] for v in (1.0, 0.0, 1.0, 0.0, 0.25, 1.0, 0.5, 1.0, 0.0)]
    ids = encode(TOKENIZER, "the movie was") + encode(TOKENIZER, " good", start=False, end=True)
    assert (found[0].ids, found[0].ends) == (ids, [len(ids) - 1])
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "response", "label"], ["a", " b", "1.0"], ["a", " c", "FALSE"]])
    read = read_records(tmp_path / "labels.csv")
    assert [e.labels for e in reward_examples(read, TOKENIZER, kind=kind_of(read))] == [[1.0], [0.0]]


def test_steps_end_where_their_last_token_stands(tmp_path):
    (found,) = examples(STEPS)
    assert TOKENIZER.decode(found.ids) == "the movie was good\n not bad\n fun<eos>"
    newline = TOKENIZER("\n", add_special_tokens=False)["input_ids"]
    assert [found.ids[end] for end in found.ends] == [*newline, *newline, EOS]
    assert found.ends[-1] == len(found.ids) - 1
    assert found.labels == [1.0, None, 0.25]
    # A step that ends with the separator ends with one; a CSV file has lists as JSON text.
    assert examples(STEPS | {"steps": [" good\n", " not bad\n", " fun\n"]})[0].ids == found.ids
    with open(tmp_path / "steps.csv", "w", newline="") as file:
        row = [STEPS["prompt"], json.dumps(STEPS["steps"]), json.dumps(STEPS["labels"])]
        csv.writer(file).writerows([["prompt", "steps", "labels"], row])
    read = read_records(tmp_path / "steps.csv")
    (again,) = reward_examples(read, TOKENIZER, kind=kind_of(read))
    assert (again.ids, again.ends, again.labels) == (found.ids, found.ends, found.labels)
    (other,) = examples(STEPS | {"steps": ["a\nb", "c"], "labels": [0, 1]}, separator="\n\n")
    assert TOKENIZER.decode(other.ids) == "the movie wasa\nb\n\nc<eos>"


def test_steps_of_a_conversation():
    talk = [{"role": "user", "content": "is it good"}]
    (found,) = examples(STEPS | {"prompt": talk}, tokenizer=CHAT)
    assert CHAT.decode(found.ids) == "<bos><|user|>is it good<|assistant|> good\n not bad\n fun<eos>"
    assert found.ids[found.ends[-1]] == CHAT.eos_token_id
    assert len(found.ends) == 3


def test_steps_beyond_the_longest_length():
    (whole,) = examples(STEPS)
    with pytest.raises(DataError, match="it would be cut"):
        examples(STEPS, max_length=whole.ends[1] + 1)
    (cut,) = examples(STEPS, max_length=whole.ends[1] + 1, overlong="truncate")
    assert (cut.ids, cut.ends, cut.labels) == (whole.ids[: whole.ends[1] + 1], whole.ends[:2], [1.0, None])
    (cut,) = examples(STEPS, max_length=whole.ends[1], overlong="truncate")
    assert (cut.ends, cut.labels) == (whole.ends[:1], [1.0])
    with pytest.raises(DataError, match="leave no room"):
        examples(STEPS, max_length=whole.ends[0], overlong="truncate")
    short = {"prompt": "a", "steps": ["b"], "labels": [1]}
    assert [e.place for e in examples(STEPS, short, max_length=4, overlong="drop")] == ["record 2"]


@pytest.mark.parametrize(
    ("response", "steps"),
    [("a\nb\n", ["a", "b"]), ("a\n \n\nb", ["a", "b"]), ("a", ["a"]), ("", [""]), ("\n", [""])],
)
def test_a_response_in_steps(response, steps):
    assert split_steps(response, "\n") == steps


def test_the_tensors_of_each_kind():
    judged = collate(examples(PAIR | {"margin": 2}, PAIR), 0)
    assert (judged.ids.shape[0], judged.targets.tolist()) == (4, [[1, 0], [1, 0]])
    assert (judged.rows.tolist(), judged.margins.tolist()) == ([[0, 1], [2, 3]], [2, 0])
    assert (judged.over.tolist(), judged.under.tolist()) == ([0, 2], [1, 3])
    two = RANKED | {"responses": [" a", " b"], "scores": [1e300, 1e301]}  # their order survives float32
    judged = collate(examples(RANKED, two, RANKED | {"scores": [1, 1, 3]}), 0)
    assert judged.targets.tolist() == [[2, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert judged.mask.tolist() == [[True] * 3, [True, True, False], [True] * 3]
    pairs = list(zip(judged.over.tolist(), judged.under.tolist(), strict=True))
    assert sorted(pairs) == [(0, 1), (0, 2), (2, 1), (4, 3), (8, 6), (8, 7)]
    judged = collate(examples(STEPS, {"prompt": "a", "steps": ["b"], "labels": [0]}), 0)
    assert judged.rows[judged.mask].tolist() == [0, 0, 1]
    assert judged.targets.tolist() == [[1, 0, 0.25], [0, 0, 0]]
    assert judged.mask.tolist() == [[True, False, True], [True, False, False]]
    assert (judged.there.tolist(), judged.over.tolist()) == ([0, 2, 3], [])
    for example, row in zip(examples(STEPS), judged.places, strict=False):
        assert row.tolist() == example.ends
    assert torch.equal(judged.attention.sum(1), torch.tensor([len(examples(STEPS)[0].ids), judged.places[1, 0] + 1]))
