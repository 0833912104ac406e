"""Given answers read without their padding: losses, gradients and scores are those of the padded ones."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

import rlhf_fast as rf
from rlhf_fast import models, packing, preferences
from rlhf_fast.packing import ROUND, pack_places, spots
from rlhf_fast.trainers import offline

CPU = torch.device("cpu")
TOKENIZER = tiny_tokenizer()
MAKERS = [tiny_gpt2, tiny_llama]
#: With holes, without a token that counts, of a single token.
SEQUENCES = [[5, 6, 7, 8, 9], [4, 3], [8, 8, 8], [7]]
MASKS = [[False, False, True, False, True], [True, True], [False] * 3, [True]]
PAIRS = [
    {"prompt": "the movie was", "chosen": " great and very fun", "rejected": " bad", "margin": 0.5},
    {"prompt": "the", "chosen": " bad", "rejected": " plot is dull"},
    {"prompt": "", "chosen": " good", "rejected": " not good and not very fun"},  # no prompt
    {"prompt": "I like this movie and I", "chosen": " like the plot", "rejected": " hate it"},
    {"prompt": "a", "chosen": " fun movie", "rejected": " dull movie"},
]
RANKED = [
    {"prompt": "the movie was", "responses": [" great and very fun", " bad", " dull"], "scores": [4, -1, 0]},
    {"prompt": "the", "responses": [" plot"], "scores": [7]},
    {"prompt": "", "responses": [" hate this plot", " like it"], "scores": [1, 2]},
    {"prompt": "this is a", "responses": [" dull awful bad plot", " very", " fun"], "scores": [1, 1, 3]},
]
LABELLED = [{"prompt": p["prompt"], "response": p["chosen"], "label": i % 2} for i, p in enumerate(PAIRS)]
STEPS = [
    {"prompt": "the movie", "steps": [" was", " very", " fun"], "labels": [1, None, 0.25]},
    {"prompt": "", "steps": [" good"], "labels": [True]},
    {"prompt": "a plot is", "steps": [" not", " dull and not awful"], "labels": [0, 1]},
]
DEMOS = [{"prompt": p["prompt"], "response": p["chosen"]} for p in PAIRS]
PROMPTS = [{"prompt": p["prompt"] or "a"} for p in PAIRS]
COMMON = {"batch_size": 5, "quiet": True, "max_grad_norm": 1e9}


@pytest.fixture
def one_is_empty(monkeypatch):
    """No token is left of an answer in the last record, which the files of a user cannot have."""

    def emptied(example):
        if isinstance(example, rf.data.Pair):
            return dataclasses.replace(example, chosen=example.chosen[: example.prompt_length])
        if isinstance(example, rf.data.Ranked):
            answers = [*example.answers[:-1], example.answers[-1][: example.prompt_length]]
            return dataclasses.replace(example, answers=answers)
        return dataclasses.replace(example, mask=[False] * len(example.mask))

    for name in ("pair_examples", "ranked_examples", "sft_examples"):
        read = getattr(rf.data, name)

        def some(*given, read=read, **options):
            found = read(*given, **options)
            return found if len(found) == 1 else [*found[:-1], emptied(found[-1])]

        monkeypatch.setattr(rf.data, name, some)


def per_token(prompts, responses):
    rows = [torch.arange(len(TOKENIZER(r)["input_ids"]) + 1) % 3 - 1.0 for r in responses]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def length(prompts, responses):
    return [float(len(r)) for r in responses]


def distill(make, packing, given, reward=None, **numbers):
    config = rf.DistillConfig(packing=packing, max_new_tokens=5, **COMMON, **numbers)
    student = make(TOKENIZER)
    if "prompts" in given:
        student.generation_config.eos_token_id = [*range(1, 100)]  # responses of 1 to 5 tokens
    teacher = make(TOKENIZER, seed=5)
    return rf.DistillTrainer(student, teacher=teacher, reward=reward, tokenizer=TOKENIZER, config=config, **given)


def dpo(make, packing, data=PAIRS, **numbers):
    config = rf.DPOConfig(packing=packing, **COMMON, **numbers)
    reference = make(TOKENIZER, seed=3)
    return rf.DPOTrainer(make(TOKENIZER), data=data, reference=reference, tokenizer=TOKENIZER, config=config)


def rrhf(make, packing, data=RANKED, **numbers):
    config = rf.RRHFConfig(packing=packing, **COMMON, **numbers)
    return rf.RRHFTrainer(make(TOKENIZER), data=data, tokenizer=TOKENIZER, config=config)


def reward(make, packing, data, **numbers):
    config = rf.RewardConfig(packing=packing, **COMMON, **numbers)
    return rf.RewardTrainer(make(TOKENIZER), data=data, tokenizer=TOKENIZER, config=config)


RUNS = {
    "dpo": dpo,
    "dpo, one pair": lambda make, packing: dpo(make, packing, PAIRS[:1]),
    "dpo, pair by pair, the reference read before": lambda make, packing: dpo(
        make, packing, micro_batch_size=1, precompute_reference=True, kind="ipo"
    ),
    "dpo, layers apart": lambda make, packing: dpo(make, packing, share="hydra:1", gradient_checkpointing=True),
    "rrhf": rrhf,
    "rrhf, two responses at a time": lambda make, packing: rrhf(make, packing, micro_batch_size=2),
    "rrhf, one prompt": lambda make, packing: rrhf(make, packing, RANKED[:1]),
    "pairs": lambda make, packing: reward(make, packing, PAIRS, center_coef=0.1),
    "one pair": lambda make, packing: reward(make, packing, PAIRS[:1]),
    "rankings": lambda make, packing: reward(make, packing, RANKED, ranking="plackett_luce"),
    "rankings, two prompts at a time": lambda make, packing: reward(make, packing, RANKED, micro_batch_size=2),
    "labels": lambda make, packing: reward(make, packing, LABELLED),
    "steps": lambda make, packing: reward(make, packing, STEPS),
    "distill": lambda make, packing: distill(make, packing, {"data": DEMOS}, kind="jsd", soft_temperature=2.0),
    "distill, one response": lambda make, packing: distill(make, packing, {"data": DEMOS[1:2]}),
    "distill, scored": lambda make, packing: distill(make, packing, {"data": DEMOS}, length, micro_batch_size=2),
    "distill, scored by the token": lambda make, packing: distill(
        make, packing, {"data": DEMOS}, per_token, kind="reverse", alpha=0.5, micro_batch_size=3
    ),
    "distill, own": lambda make, packing: distill(make, packing, {"prompts": PROMPTS}, kind="reverse"),
    "distill, own and scored": lambda make, packing: distill(
        make, packing, {"prompts": PROMPTS}, length, micro_batch_size=2
    ),
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.usefixtures("one_is_empty")
def test_packed_or_padded_it_is_the_same_step(make, run):
    seen = []
    for packed in (False, True):
        trainer = RUNS[run](make, packed)
        taken = []
        trainer.optimizer.step = lambda trainer=trainer, taken=taken: taken.extend(
            (name, p.grad.clone()) for name, p in trainer.model.named_parameters() if p.grad is not None
        )
        seen.append((trainer.step(next(trainer.batches())), taken))
    (stats, gradients), (packed_stats, packed_gradients) = seen
    norm = stats.pop("grad_norm")
    assert norm > 1e-3
    assert packed_stats.pop("grad_norm") == pytest.approx(norm, rel=1e-4)
    assert packed_stats == pytest.approx(stats, rel=1e-5, abs=1e-5, nan_ok=True)
    largest = max(gradient.abs().max() for _, gradient in gradients)
    assert len(gradients) >= 10
    for (name, packed), (_, padded) in zip(packed_gradients, gradients, strict=True):
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5 * float(largest), msg=name)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("kind", "data"), [("dpo", PAIRS), ("rrhf", RANKED), ("reward", PAIRS), ("distill", DEMOS)])
def test_packed_evaluation_is_the_padded_one(make, kind, data):
    config = {"dpo": rf.DPOConfig, "rrhf": rf.RRHFConfig, "reward": rf.RewardConfig, "distill": rf.DistillConfig}[kind]
    trainer = {"dpo": rf.DPOTrainer, "rrhf": rf.RRHFTrainer, "reward": rf.RewardTrainer, "distill": rf.DistillTrainer}
    found = []
    for packed in (False, True):
        more = {"teacher": make(TOKENIZER, seed=5)} if kind == "distill" else {}
        more |= {"reference": make(TOKENIZER, seed=5)} if kind == "dpo" else {}
        settings = config(packing=packed, batch_size=2, quiet=True)
        given = {"data": data, "eval_data": data, "tokenizer": TOKENIZER, "config": settings}
        found.append(trainer[kind](make(TOKENIZER), **given, **more).evaluate())
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_logprobs_are_those_of_input_padded_on_either_side(make, rows, count):
    model = make(TOKENIZER).double().eval()
    packed = SimpleNamespace(packing=True, precision="fp32")
    prepared = packing.prepare([model], CPU, packed, rows=rows)
    assert packing.uses_varlen(model) == rows
    found = offline.logprobs(model, offline.collate(SEQUENCES[:count], MASKS[:count], 0, CPU), packed)
    packing.put_back(prepared)
    for side in ("left", "right"):
        ids, mask = rf.data.pad(SEQUENCES[:count], 0, side=side)
        logprobs = models.token_logits(model, ids, mask)[:, :-1].log_softmax(-1)
        logprobs = logprobs.gather(2, ids[:, 1:, None])[..., 0]
        counts = rf.data.pad(MASKS[:count], False, side=side)[0][:, 1:] & mask[:, :-1]
        expected = [row[there] for row, there in zip(logprobs, counts, strict=True)]
        got = [row[row != 0] for row in found]
        assert [len(row) for row in got] == [2, 1, 0, 0][:count]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_tokens_that_do_not_count_are_not_predicted():
    """8, in the midst of the first answer, is read and not predicted."""
    answers = offline.collate(SEQUENCES, MASKS, 0, CPU)
    for packed in (answers.spots.packed, answers.flat_spots.packed):
        assert packed.targets[:3].tolist() == [7, 9, 3]
        assert packed.ids.flatten()[packed.at[:3]].tolist() == [6, 8, 4]
        assert (packed.at[3:] == 0).all()


@pytest.mark.parametrize("flat", [False, True])
def test_a_single_token_is_a_sequence_without_an_answer(flat):
    mask = torch.zeros(1, 1, dtype=torch.bool)
    got = spots(torch.tensor([[7, 0]]), mask, torch.tensor([1]), torch.tensor([0]), flat=flat)
    assert got.packed.ids[0, 0] == 7
    assert got.spread(torch.full(got.packed.targets.shape, 5.0)).tolist() == [[0.0]]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("kind", "data"), [("pairwise", PAIRS), ("process", STEPS)])
def test_scores_are_those_of_input_padded_on_either_side(make, rows, kind, data):
    model = models.load_scalar_model(make(TOKENIZER)).double().eval()
    examples = preferences.reward_examples(rf.data.read_records(data), TOKENIZER, kind=kind)
    judged = preferences.collate(examples, 0)
    prepared = packing.prepare([model], CPU, SimpleNamespace(packing=True, precision="fp32"), rows=rows)
    packed, order = preferences.packed(examples, CPU, flat=packing.uses_varlen(model))
    found = packing.packed_values(model, packed)[order]
    packing.put_back(prepared)
    sequences = [ids for example in examples for ids in preferences.sequences(example)]
    for side in ("left", "right"):
        ids, mask = rf.data.pad(sequences, 0, side=side)
        before = (ids.shape[1] - mask.sum(1)) * (side == "left")
        expected = models.token_values(model, ids, mask)[judged.rows, judged.places + before[judged.rows]]
        torch.testing.assert_close(found[judged.mask], expected[judged.mask], rtol=0, atol=1e-10)


@pytest.mark.parametrize("flat", [False, True])
def test_places_by_hand(flat):
    packed = pack_places([[5, 6], [7, 8, 9], [4]], [[1], [0, 2], [0]], CPU, flat=flat)
    rows = [[7, 8, 9, 5, 6, 4]] if flat else [[7, 8, 9], [5, 6, 4]]
    assert [row[: len(known)].tolist() for row, known in zip(packed.ids, rows, strict=True)] == rows
    assert packed.ids.flatten()[packed.at][:4].tolist() == [6, 7, 9, 4]
    assert packed.positions.flatten()[packed.at][:4].tolist() == [1, 0, 2, 0]
    assert len(packed.at) == ROUND


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("run", ["dpo", "rrhf", "distill", "distill, own"])
def test_only_the_logits_of_tokens_that_count_are_computed(make, run):
    trainer = RUNS[run](make, True)
    shapes = []
    for model in [trainer.model, *(m for m in (getattr(trainer, n, None) for n in ("teacher", "reference")) if m)]:
        model.lm_head.register_forward_hook(lambda _, given, logits: shapes.append(logits.shape))
    batch = next(trainer.batches())
    parts = [p for p, _ in trainer.written(batch)[0]] if run == "distill, own" else [trainer.collate(batch)]
    shapes.clear()  # of the student's decode loop
    if run.startswith("distill"):
        trainer.loss(parts[0], None, 1)
    elif run == "dpo":
        trainer.loss(batch, 1.0)
    else:
        trainer.read(parts[0])
    count = int(parts[0].mask.sum())
    assert {shape[:2].numel() for shape in shapes} == {-(-count // ROUND) * ROUND}


def test_teacher_and_student_may_attend_in_different_ways():
    """A window of attention is not for a single row: the teacher reads several."""
    found = []
    for packed in (False, True):
        trainer = distill(tiny_llama, packed, {"data": DEMOS}, length)
        if packed:
            packing.put_back(trainer.attention[1:])
            assert [packing.uses_varlen(m) for m in (trainer.model, trainer.teacher)] == [True, False]
        found.append(trainer.step(next(trainer.batches())))
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)
