import csv
import gzip
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from rlhf_fast.data import (
    DataError,
    encode,
    pad,
    pair_examples,
    prompt_examples,
    ranked_examples,
    read_records,
    sft_examples,
)

TOKENIZER = tiny_tokenizer()
CHAT = tiny_tokenizer(pad_is_eos=True, chat=True, bos=True)
EOS = TOKENIZER.eos_token_id
PAIR = {"prompt": "the movie was", "chosen": " good", "rejected": " bad"}
RANKED = {"prompt": "the movie was", "responses": [" good", " bad", " not very fun"], "scores": [2, -1.5, 0]}
TALK = [
    {"role": "user", "content": "is it good"},
    {"role": "assistant", "content": "not bad"},
    {"role": "user", "content": "fun"},
    {"role": "assistant", "content": "very fun"},
]


def spell(ids, mask=None, tokenizer=CHAT):
    mask = [True] * len(ids) if mask is None else mask
    return tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


def write(folder, name, content):
    path = folder / name
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


LETTERS = st.characters(codec="utf-8")
HH = "\n\nHuman: Is it good?\n\nAssistant: Yes.\n\nHuman: Why?\n\nAssistant:"
ROWS = [{"prompt": "a\nb", "n": "1"}, {"prompt": 'é, "c"', "n": "2"}]


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_records(tmp_path, monkeypatch, form, zipped):
    monkeypatch.chdir(tmp_path)
    if form == "jsonl":
        content = "\ufeff" + json.dumps(ROWS[0]) + "\r\n\n" + json.dumps(ROWS[1], ensure_ascii=False)
    elif form == "json":
        content = json.dumps(ROWS, indent=1)
    elif form == "csv":
        with open("x.csv", "w", newline="") as file:
            table = csv.DictWriter(file, ["prompt", "n"])
            table.writeheader()
            table.writerows(ROWS)
        content = (tmp_path / "x.csv").read_bytes()
    else:
        import pandas

        pandas.DataFrame(ROWS).to_parquet("x.parquet")
        content = (tmp_path / "x.parquet").read_bytes()
    name = write(tmp_path, f"data.{form}{zipped}", content).name
    records = read_records(name)
    assert records == ROWS
    places = {"jsonl": [":1", ":3"], "csv": [":2", ":4"]}.get(form, [": record 1", ": record 2"])
    assert [r.place for r in records] == [name + place for place in places]


def test_lists_and_datasets():
    datasets = pytest.importorskip("datasets", reason="not installed: runs wherever the extra [test] is")
    for source in (ROWS, tuple(ROWS), datasets.Dataset.from_list(ROWS)):
        assert read_records(source) == ROWS
        assert [r.place for r in read_records(source)] == ["record 1", "record 2"]
    for wrong in (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), {"prompt": ["a"]}, 3):
        with pytest.raises(TypeError, match="data must be a path, a list of dicts or"):
            read_records(wrong)


GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", GOOD * 2 + '{"a": \n', "p.jsonl:3: not valid JSON: Expecting value (column 7)"),
        ("p.jsonl", GOOD + "\n\n[1]\n", "p.jsonl:4: a record must be a JSON object, got a list"),
        ("p.jsonl", GOOD.encode() + b'{"a": "\xff"}', "p.jsonl:2: not valid UTF-8 at byte 8"),
        ("p.jsonl.gz", "\n \n", "p.jsonl.gz: no records"),
        ("p.jsonl", "", "p.jsonl: no records"),
        ("p.json", "", "p.json: no records"),
        ("p.json", "[]", "p.json: no records"),
        ("p.json", '[{"a": 1},\n x]', "p.json:2: not valid JSON: Expecting value (column 2)"),
        ("p.json", '{"a": 1}', "p.json: it must hold a list of records, got a dict"),
        ("p.json", '[{"a": 1}, 2]', "p.json: record 2: a record must be a JSON object, got a number"),
        ("p.json", GOOD + "{\n", "p.json:2: not valid JSON: Expecting property name"),
        ("p.json", b'[{"a":\n"\xff"}]', "p.json:2: not valid UTF-8 at byte 2"),
        ("p.csv", "a,b\n1,2\n3\n", "p.csv:3: 1 fields where the header has 2"),
        ("p.csv", "a,b,a\n1,2,3\n", 'p.csv:1: the column "a" stands there twice'),
        ("p.jsonl", '{"a": 1}\n{"a": ' + "9" * 5000 + "}\n", "p.jsonl:2: a number of thousands of digits"),
        ("p.jsonl", "[" * 100_000, "p.jsonl:1: a number of thousands of digits, or brackets in thousands of brackets"),
        ("p.json", "[" * 100_000, "p.json: a number of thousands of digits, or brackets in thousands of brackets"),
        ("p.csv", 'a,b\n1,"2\n', "p.csv:2: not valid CSV"),
        ("p.csv", b"a,b\n1,\xff\n", "p.csv:2: not valid UTF-8 at byte 3"),
        ("p.csv", "a,b\n", "p.csv: no records"),
        ("p.parquet", "not parquet", "p.parquet: not valid parquet: "),
        ("p.txt", "x", "p.txt: the name must end in .jsonl, .json, .csv, .parquet, or in .gz after one of these"),
        ("p.gz", "x", "p.gz: the name must end in .jsonl"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read_records(name)
    assert str(caught.value).startswith(message)


def test_a_file_that_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD.encode())[:-9])
    (tmp_path / "plain.jsonl.gz").write_text(GOOD)
    (tmp_path / "folder.jsonl").mkdir()
    for name, message in [
        ("none.jsonl", "none.jsonl: there is no such file"),
        ("folder.jsonl", "folder.jsonl: it is a folder"),
        ("cut.jsonl.gz", "cut.jsonl.gz: not a whole gzip file"),
        ("plain.jsonl.gz", "plain.jsonl.gz: not a whole gzip file"),
    ]:
        with pytest.raises(DataError, match=message):
            read_records(name)


def test_a_long_csv_field(tmp_path):
    path = write(tmp_path, "long.csv", "text\n" + "x" * 200_000 + "\n")
    assert len(read_records(path)[0]["text"]) == 200_000
    assert csv.field_size_limit() == 131072


@pytest.mark.parametrize(
    ("make", "record", "message"),
    [
        (pair_examples, {"prompt": "a", "chosen": "b"}, '"rejected" is missing'),
        (pair_examples, PAIR | {"rejected": None}, '"rejected" is missing'),
        (pair_examples, PAIR | {"rejected": 3}, '"rejected" must be a string, got a number'),
        (pair_examples, PAIR | {"rejected": " \n"}, '"rejected" is empty'),
        (pair_examples, PAIR | {"rejected": " good"}, '"chosen" and "rejected" are the same'),
        (pair_examples, PAIR | {"rejected": "\ud800"}, '"rejected" holds half of a surrogate pair'),
        (pair_examples, PAIR | {"margin": "big"}, "\"margin\" must be a finite number, got 'big'"),
        (pair_examples, PAIR | {"margin": math.nan}, '"margin" must be a finite number, got nan'),
        (pair_examples, PAIR | {"margin": True}, '"margin" must be a finite number, got True'),
        (
            pair_examples,
            {"chosen": "good", "rejected": "bad"},
            '"prompt" is missing, and "chosen" and "rejected" begin',
        ),
        (pair_examples, {"chosen": "a b", "rejected": "a b"}, '"chosen" and "rejected" are the same'),
        (pair_examples, {"chosen": HH, "rejected": HH + " It is."}, '"chosen" is empty'),
        (pair_examples, PAIR | {"chosen": []}, '"chosen" is empty'),
        (pair_examples, PAIR | {"chosen": TALK[1:2]}, '"rejected" must be a list of messages, got a string'),
        (sft_examples, {"label": 1}, 'it has no "text", no "prompt" and "response", and no "messages"'),
        (sft_examples, {"prompt": "a"}, '"response" is missing'),
        (sft_examples, {"response": "a"}, '"prompt" is missing'),
        (sft_examples, {"text": ""}, '"text" is empty'),
        (sft_examples, {"text": ["a"]}, '"text" must be a string, got a list'),
        (sft_examples, {"messages": "hi"}, '"messages" must be a list of messages, got a string'),
        (sft_examples, {"messages": []}, '"messages" is empty'),
        (sft_examples, {"messages": [{"content": "hi"}]}, 'message 1 of "messages" must have a "role"'),
        (sft_examples, {"messages": [{"role": "user", "content": 3}]}, 'the "content" of message 1 of "messages" must'),
        (sft_examples, {"messages": TALK[:1]}, '"messages" has no turn of the assistant'),
        (ranked_examples, RANKED | {"prompt": None}, '"prompt" is missing'),
        (ranked_examples, RANKED | {"responses": None}, '"responses" is missing'),
        (ranked_examples, RANKED | {"responses": []}, '"responses" is empty'),
        (ranked_examples, RANKED | {"responses": " good"}, '"responses" must be a list, got a text that is not one'),
        (ranked_examples, RANKED | {"responses": "3"}, '"responses" must be a list, got a number'),
        (ranked_examples, RANKED | {"responses": [" good", 3, ""]}, '"response 2" must be a string, got a number'),
        (ranked_examples, RANKED | {"responses": [" good", " bad", " "]}, '"response 3" is empty'),
        (ranked_examples, RANKED | {"scores": [1, 2]}, '3 "responses" and 2 "scores": give one for each'),
        (ranked_examples, RANKED | {"scores": [1, math.nan, 2]}, '"score 2" must be a finite number, got nan'),
        (ranked_examples, RANKED | {"scores": [1, True, 2]}, '"score 2" must be a finite number, got True'),
        (ranked_examples, RANKED | {"scores": [1, 2, "hi"]}, "\"score 3\" must be a finite number, got 'hi'"),
        (ranked_examples, RANKED | {"scores": 3.0}, '"scores" must be a list, got a number'),
        (ranked_examples, RANKED | {"responses": [" a", " b", " a"]}, "responses 1 and 3 are the same, and their"),
        (prompt_examples, {"text": "a"}, '"prompt" is missing'),
        (prompt_examples, {"prompt": "a", "responses": 1}, 'a column "responses" would hide'),
    ],
)
def test_a_broken_record_is_named_with_its_place(tmp_path, monkeypatch, make, record, message):
    monkeypatch.chdir(tmp_path)
    good = {sft_examples: {"text": "a good movie"}, pair_examples: PAIR, prompt_examples: {"prompt": "the"}}
    good = (good | {ranked_examples: RANKED})[make]
    write(tmp_path, "prefs.jsonl", "\n".join(["", *[json.dumps(good)] * 15, json.dumps(record)]))
    with pytest.raises(DataError) as caught:
        make(read_records("prefs.jsonl"), CHAT, max_length=100)
    assert str(caught.value).startswith(f"prefs.jsonl:17: {message}")
    with pytest.raises(DataError) as caught:
        make(read_records([good, record]), CHAT, max_length=100)
    assert str(caught.value).startswith(f"record 2: {message}")


def test_sft_learns_the_response_and_its_end():
    (example,) = sft_examples(read_records([{"prompt": "the movie", "response": " was good"}]), TOKENIZER, max_length=9)
    prompt, response = (TOKENIZER(x)["input_ids"] for x in ("the movie", " was good"))
    assert example.ids == prompt + response + [EOS]
    assert example.mask == [False] * len(prompt) + [True] * (len(response) + 1)
    (example,) = sft_examples(read_records([{"text": "the movie"}]), TOKENIZER, max_length=9)
    assert example.ids == [*prompt, EOS]
    assert all(example.mask)


def test_sft_learns_the_turns_of_the_assistant():
    (example,) = sft_examples(read_records([{"messages": TALK}]), CHAT, max_length=200)
    assert spell(example.ids) == (
        "<bos><|user|>is it good<|assistant|>not bad<eos><|user|>fun<|assistant|>very fun<eos>"
    )
    assert spell(example.ids, example.mask) == "not bad<eos>very fun<eos>"
    (cut,) = sft_examples(read_records([{"messages": TALK[:3]}]), CHAT, max_length=200)
    assert cut.ids == example.ids[: len(cut.ids)]
    assert spell(cut.ids, cut.mask) == "not bad<eos>"
    (same,) = sft_examples(read_records([{"prompt": TALK[:1], "response": TALK[1:2]}]), CHAT, max_length=200)
    assert (same.ids, same.mask) == (cut.ids, cut.mask)
    (same,) = sft_examples(read_records([{"prompt": TALK[:1], "response": "not bad"}]), CHAT, max_length=200)
    assert (same.ids, same.mask) == (cut.ids, cut.mask)


def test_templates_that_end_a_turn_in_their_own_way():
    tokenizer = tiny_tokenizer(chat=True)
    # What follows the end token of a turn (Qwen's newline) is read, not learned; at the very end it is left out.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (example,) = sft_examples(read_records([{"messages": TALK}]), tokenizer, max_length=200)
    assert spell(example.ids, example.mask) == "not bad<eos>very fun<eos>"
    assert spell(example.ids).endswith("assistant: not bad<eos>\nuser: fun<eos>\nassistant: very fun<eos>")
    # A template without an end token: it is added once, where the model must stop.
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "")
    (example,) = sft_examples(read_records([{"messages": TALK}]), tokenizer, max_length=200)
    assert spell(example.ids, example.mask) == "not bad\nvery fun\n<eos>"
    # A template that forgets earlier turns has no prefixes to compare.
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(DataError, match="record 1: the chat template writes turn 2 in another way"):
        sft_examples(read_records([{"messages": TALK}]), tokenizer, max_length=200)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="record 1: the chat template refuses the conversation: roles must alternate"):
        prompt_examples(read_records([{"prompt": TALK[:1]}]), tokenizer, max_length=200)
    with pytest.raises(DataError, match="record 1: a conversation needs a chat template and the tokenizer has none"):
        sft_examples(read_records([{"messages": TALK}]), TOKENIZER, max_length=200)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (HH + " It is fun.", HH + " It is great.", HH),
        (HH + " It was.\n\nHuman: And?\n\nAssistant: No.", HH + " It is.", HH),
        ("the movie was good", "the movie was great", "the movie was"),
        ("the movie was\ngood", "the movie was bad", "the movie was"),
        ("the movie was good, fun", "the movie was goody", "the movie was"),
        ("the movie was", "the movie is", "the movie"),
    ],
)
def test_the_prompt_is_the_shared_beginning(chosen, rejected, prompt):
    (pair,) = pair_examples(read_records([{"chosen": chosen, "rejected": rejected}]), TOKENIZER, max_length=200)
    assert spell(pair.chosen[: pair.prompt_length]) == prompt
    assert pair.chosen[: pair.prompt_length] == pair.rejected[: pair.prompt_length] == encode(TOKENIZER, prompt)
    assert (spell(pair.chosen), spell(pair.rejected)) == (chosen + "<eos>", rejected + "<eos>")
    (given,) = pair_examples(
        read_records([{"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}]),
        TOKENIZER, max_length=200,
    )  # fmt: skip
    assert given == pair


def test_conversational_pairs():
    good, bad = TALK[1], {"role": "assistant", "content": "awful"}
    forms = [
        {"prompt": TALK[:1], "chosen": [good], "rejected": [bad]},
        {"chosen": [TALK[0], good], "rejected": [TALK[0], bad]},
        {"prompt": "is it good", "chosen": [TALK[0], good], "rejected": [TALK[0], bad]},
        {"prompt": TALK[:1], "chosen": "not bad", "rejected": "awful"},
    ]
    pairs = [pair_examples(read_records([form]), CHAT, max_length=200)[0] for form in forms]
    assert all(pair == pairs[0] for pair in pairs)
    assert spell(pairs[0].rejected) == "<bos><|user|>is it good<|assistant|>awful<eos>"
    assert spell(pairs[0].rejected[pairs[0].prompt_length :]) == "awful<eos>"


def test_margin_and_prompt_columns(tmp_path):
    (pair,) = pair_examples(read_records([PAIR | {"margin": 2}]), TOKENIZER)
    assert pair.margin == 2
    file = write(tmp_path, "p.csv", "prompt,chosen,rejected,margin\na, b, c,0.5\na, b, c,\n")
    assert [pair.margin for pair in pair_examples(read_records(file), TOKENIZER)] == [0.5, None]
    first, second = prompt_examples(read_records([{"prompt": "the", "gold": 1}, {"prompt": TALK[:1], "k": [2]}]), CHAT)
    assert first.prompt == "the"
    assert first.columns == {"gold": 1, "k": None}
    assert second.columns == {"gold": None, "k": [2]}
    assert second.prompt == "<|user|>is it good<|assistant|>"
    assert second.ids == CHAT(second.prompt)["input_ids"]


def test_too_long_is_said_or_asked_for():
    records = read_records([{"prompt": "a good", "response": " movie" * 5}, {"prompt": "a good", "response": " movie"}])
    whole = [3, 4]  # tokens of the prompt, of the second record
    assert [len(e.ids) for e in sft_examples(records, TOKENIZER)] == [8, 4]
    with pytest.raises(DataError, match="record 1: 8 tokens where max_length allows 6, it would be cut"):
        sft_examples(records, TOKENIZER, max_length=6)
    cut = sft_examples(records, TOKENIZER, max_length=6, overlong="truncate")
    assert [len(e.ids) for e in cut] == [len(e.mask) for e in cut] == [6, whole[1]]
    assert [e.place for e in sft_examples(records, TOKENIZER, max_length=6, overlong="drop")] == ["record 2"]
    with pytest.raises(DataError, match=r"record 1: 8 tokens .*the 2 tokens before the answer leave no room"):
        sft_examples(records, TOKENIZER, max_length=2, overlong="truncate")
    with pytest.raises(DataError, match="record 1: this and all other records are longer than max_length=2"):
        sft_examples(records, TOKENIZER, max_length=2, overlong="drop")
    with pytest.raises(ValueError, match="overlong must be one of error, truncate, drop, got 'cut'"):
        sft_examples(records, TOKENIZER, max_length=2, overlong="cut")
    pairs = read_records([{"prompt": "a", "chosen": " good movie", "rejected": " good plot"}])
    with pytest.raises(DataError, match="record 1: the two answers are the same up to max_length=2"):
        pair_examples(pairs, TOKENIZER, max_length=2, overlong="truncate")
    with pytest.raises(DataError, match="record 1: the prompt is 2 tokens long, and 1 fit"):
        prompt_examples(records, TOKENIZER, max_length=1)
    with pytest.raises(DataError, match='record 1: "prompt" is empty'):
        prompt_examples(read_records([{"prompt": ""}]), TOKENIZER)


def test_ranked_answers(tmp_path):
    one, two = ranked_examples(read_records([RANKED, {"prompt": "a", "responses": [" b"], "scores": [3]}]), TOKENIZER)
    assert one.scores == [2.0, -1.5, 0.0]
    assert (one.prompt_length, one.place, two.scores) == (5, "record 1", [3.0])  # "the" without a space is spelt
    for answer, text in zip(one.answers, RANKED["responses"], strict=True):
        assert answer == encode(TOKENIZER, "the movie was") + encode(TOKENIZER, text, start=False, end=True)
        assert answer[-1] == EOS
    with open(tmp_path / "ranked.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "responses", "scores"], ["the movie was", *map(json.dumps, _lists())]])
    (read,) = ranked_examples(read_records(tmp_path / "ranked.csv"), TOKENIZER)
    assert (read.answers, read.scores) == (one.answers, one.scores)
    # Equal answers with equal scores are no contradiction, nor are equal scores.
    same = RANKED | {"responses": [" good", " good", " bad"], "scores": [1, 1, 1]}
    assert len(ranked_examples(read_records([same]), TOKENIZER)[0].answers) == 3


def _lists():
    return RANKED["responses"], RANKED["scores"]


def test_ranked_conversations():
    said = [{"role": "assistant", "content": "not bad"}, "very fun", [{"role": "assistant", "content": "dull"}]]
    record = {"prompt": TALK[:1], "responses": said, "scores": [1, 2, 3]}
    (found,) = ranked_examples(read_records([record]), CHAT)
    assert [spell(answer[found.prompt_length :]) for answer in found.answers] == [
        f"{text}<eos>" for text in ("not bad", "very fun", "dull")
    ]


def test_ranked_answers_that_are_too_long():
    records = read_records([RANKED, {"prompt": "the", "responses": [" good"], "scores": [1]}])
    with pytest.raises(DataError, match="record 1: 9 tokens where max_length allows 8"):
        ranked_examples(records, TOKENIZER, max_length=8)
    cut = ranked_examples(records, TOKENIZER, max_length=8, overlong="truncate")
    assert [[len(answer) for answer in each.answers] for each in cut] == [[7, 7, 8], [5]]
    assert [e.place for e in ranked_examples(records, TOKENIZER, max_length=8, overlong="drop")] == ["record 2"]
    alike = read_records([RANKED | {"responses": [" very good", " very bad", " very fun"]}])
    with pytest.raises(DataError, match="record 1: responses 1 and 2 are the same up to max_length=6, and their"):
        ranked_examples(alike, TOKENIZER, max_length=6, overlong="truncate")


def test_special_tokens_stand_once():
    for tokenizer in (TOKENIZER, CHAT):
        bos = [2] if tokenizer is CHAT else []
        body = tokenizer("the movie", add_special_tokens=False)["input_ids"]
        assert encode(tokenizer, "the movie") == bos + body
        assert encode(tokenizer, "<bos>the movie") == [2, *body]
        assert encode(tokenizer, "the movie<eos>") == [*bos, *body, EOS]
        assert encode(tokenizer, "the movie", start=False, end=True) == [*body, EOS]
        assert encode(tokenizer, "the movie<eos>\n", start=False, end=True) == [*body, EOS]
        assert encode(tokenizer, "the movie", end=True) == [*bos, *body, EOS]
    ender = tiny_tokenizer()
    from tokenizers.processors import TemplateProcessing

    ender.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    assert ender("the")["input_ids"][-1] == EOS
    assert encode(ender, "the") == TOKENIZER("the")["input_ids"]
    assert encode(ender, "the", end=True) == [*TOKENIZER("the")["input_ids"], EOS]


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(LETTERS, max_size=20), response=st.text(LETTERS, min_size=1, max_size=20).filter(str.strip))
def test_the_tokens_of_a_prompt_do_not_depend_on_its_response(prompt, response):
    record = {"prompt": prompt, "response": response}
    (example,) = sft_examples(read_records([record]), CHAT)
    before = encode(CHAT, prompt)
    assert example.ids[: len(before)] == before
    assert example.mask == [False] * len(before) + [True] * (len(example.ids) - len(before))
    assert spell(example.ids, example.mask) == response + "<eos>"


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 9), max_size=7), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
)
def test_pad(rows, side):
    for sequences in (rows, [torch.tensor(row, dtype=torch.long) for row in rows]):
        ids, mask = pad(sequences, 99, side=side)
        assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
        assert mask.dtype == torch.bool
        assert [row[m].tolist() for row, m in zip(ids, mask, strict=True)] == rows
        assert (ids[~mask] == 99).all()
        edge = mask.long().diff(dim=1)
        assert ((edge >= 0) if side == "left" else (edge <= 0)).all()


def test_pad_of_masks():
    flags, there = pad([[True], [False, True]], False)
    assert flags.dtype == torch.bool
    assert flags.tolist() == [[True, False], [False, True]]
    assert there.tolist() == [[True, False], [True, True]]
    with pytest.raises(ValueError, match="side must be right or left"):
        pad([[1]], 0, side="top")
