"""Reward modelling of every kind: the loss against float64, exact accumulation, what is learned and saved."""

import copy
import json
import math
import random

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

from rlhf_fast import models, preferences
from rlhf_fast.data import DataError
from rlhf_fast.rewards import load_reward
from rlhf_fast.trainers.margins import histogram, seen, statistics
from rlhf_fast.trainers.reward import RewardConfig, RewardTrainer

PRAISE, BLAME, NEUTRAL = ["good", "great", "fun"], ["bad", "dull", "awful"], ["movie", "plot", "the", "is", "very"]


def pairs(count, seed=0):
    """Answers with more praise are preferred; lengths and places differ."""
    draw = random.Random(seed)

    def answer(words):
        words = draw.choices(words, k=draw.randint(1, 3)) + draw.choices(NEUTRAL, k=draw.randint(0, 4))
        return " " + " ".join(draw.sample(words, len(words)))

    return [
        {"prompt": " ".join(draw.choices(NEUTRAL, k=3)), "chosen": answer(PRAISE), "rejected": answer(BLAME)}
        for _ in range(count)
    ]


def rankings(count, seed=0):
    """As many answers as there are, ranked by their share of praise; some tie."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        said = [draw.choices(PRAISE + BLAME, k=3) for _ in range(draw.randint(1, 5))]
        scores = [sum(word in PRAISE for word in words) for words in said]
        texts = [" " + " ".join(words) for words in said]
        found.append({"prompt": " ".join(draw.choices(NEUTRAL, k=3)), "responses": texts, "scores": scores})
    return found


def labels(count, seed=0):
    """Answers of three words, labelled with their share of praise."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        words = draw.choices(PRAISE + BLAME, k=3)
        prompt, share = " ".join(draw.choices(NEUTRAL, k=draw.randint(1, 3))), sum(w in PRAISE for w in words) / 3
        found.append({"prompt": prompt, "response": " " + " ".join(words), "label": share})
    return found


def processes(count, seed=0):
    """Steps of two words, good as long as none before blamed; some are not labelled."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        steps = [draw.choices([*PRAISE, *PRAISE, *BLAME], k=2) for _ in range(draw.randint(1, 4))]
        good = [not any(word in BLAME for step in steps[: i + 1] for word in step) for i in range(len(steps))]
        said = [None if i and draw.random() < 0.2 else value for i, value in enumerate(good)]
        texts = [" " + " ".join(step) for step in steps]
        found.append({"prompt": " ".join(draw.choices(NEUTRAL, k=2)), "steps": texts, "labels": said})
    return found


KINDS = {"pairwise": pairs, "ranking": rankings, "pointwise": labels, "process": processes}


def build(data, *, make=tiny_gpt2, pad_is_eos=False, eval_data=None, calibration_data=None, **config):
    tokenizer = tiny_tokenizer(pad_is_eos)
    settings = {"batch_size": 8, "quiet": True, "learning_rate": 3e-3, **config}
    return RewardTrainer(
        make(tokenizer), data=data, tokenizer=tokenizer, config=RewardConfig(**settings), eval_data=eval_data,
        calibration_data=calibration_data,
    )  # fmt: skip


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("margins", [False, True])
def test_loss_and_gradient_are_bradley_terry(make, pad_is_eos, micro, margins):
    data = [pair | ({"margin": 0.5 * i} if margins else {}) for i, pair in enumerate(pairs(8))]
    trainer = build(data, make=make, pad_is_eos=pad_is_eos, micro_batch_size=micro, center_coef=0.1, max_grad_norm=1e9)
    model = copy.deepcopy(trainer.model).double()
    terms, right = [], 0
    for i, pair in enumerate(trainer.examples):
        chosen, rejected = (
            model.score(model.base_model(torch.tensor([ids])).last_hidden_state)[0, -1, 0]
            for ids in (pair.chosen, pair.rejected)
        )
        margin = 0.5 * i if margins else 0.0
        terms.append(-torch.log(torch.sigmoid(chosen - rejected - margin)) + 0.1 * (chosen + rejected) ** 2)
        right += int(chosen > rejected)
    loss = torch.stack(terms).mean()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    taken = []
    trainer.optimizer.step = lambda: taken.append(
        torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    )
    stats = trainer.step(trainer.examples)
    assert stats["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert stats["accuracy"] == right / 8
    # float32 passes against float64 ones: some 1e-6 of the largest entry.
    assert (taken[0] - expected).abs().max() < 1e-5 * expected.abs().max()


def read_alone(model, ids, end=-1):
    """The score of one sequence, read by itself."""
    return model.score(model.base_model(torch.tensor([ids])).last_hidden_state)[0, end, 0]


def expected_loss(trainer, model, examples):
    """The loss of ``examples`` by its formula, sequence by sequence; and the margins of all predictions."""
    log, sigmoid = torch.log, torch.sigmoid
    losses, margins = [], []
    for example in examples:
        if trainer.kind == "ranking":
            scores = [read_alone(model, ids) for ids in example.answers]
            ahead = [(i, j) for i, a in enumerate(example.scores) for j, b in enumerate(example.scores) if a > b]
            margins += [scores[i] - scores[j] for i, j in ahead]
            if ahead and trainer.config.ranking == "pairs":
                losses.append(sum(-log(sigmoid(scores[i] - scores[j])) for i, j in ahead) / len(ahead))
            elif ahead:
                below = {i: [scores[i], *(scores[j] for k, j in ahead if k == i)] for i in range(len(scores))}
                losses.append(sum(log(sum(s.exp() for s in below[i])) - scores[i] for i in range(len(scores))))
        else:
            for end, y in zip(example.ends, example.labels, strict=True):
                if y is not None:
                    score = read_alone(model, example.ids, end)
                    losses.append(-y * log(sigmoid(score)) - (1 - y) * log(1 - sigmoid(score)))
                    margins.append(score * (0 if y == 0.5 else math.copysign(1, y - 0.5)))
    return torch.stack(losses).mean(), margins


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("kind", ["pairs", "plackett_luce", "pointwise", "process"])
def test_loss_and_gradient_of_the_other_kinds(kind, micro, pad_is_eos):
    make, config = (tiny_llama, tiny_gpt2)[pad_is_eos], {"ranking": kind} if kind in ("pairs", "plackett_luce") else {}
    data = KINDS["ranking" if config else kind](8, seed=2)
    trainer = build(data, make=make, pad_is_eos=pad_is_eos, micro_batch_size=micro, max_grad_norm=1e9, **config)
    model = copy.deepcopy(trainer.model).double()
    loss, margins = expected_loss(trainer, model, trainer.examples)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    taken = []
    trainer.optimizer.step = lambda: taken.append(
        torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    )
    stats = trainer.step(trainer.examples)
    assert stats["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert stats["accuracy"] == pytest.approx(sum(0.5 if m == 0 else float(m > 0) for m in margins) / len(margins))
    assert stats["margin_mean"] == pytest.approx(torch.stack(margins).mean().item(), abs=1e-5)
    # float32 passes against float64 ones: some 1e-6 of the largest entry.
    assert (taken[0] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_padded_does_not_count(kind):
    """The statistics of records together are those of the same records read one by one."""
    data = KINDS[kind](12, seed=3)
    together, alone = (build(data, eval_data=data, micro_batch_size=size) for size in (12, 1))
    expected = alone.evaluate()
    assert {"eval_loss", "eval_accuracy", "eval_ece", "eval_margin_mean", "eval_score_std"} < set(expected)
    assert together.evaluate() == pytest.approx(expected, abs=1e-5)


def test_the_statistics_by_hand():
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    judged = preferences.collate(build(pairs(2)).examples, 0)
    stats, margins = statistics("pairwise", seen(judged, torch.tensor([[2.0, 0.0], [0.0, 1.0]])))
    assert margins.tolist() == [2, -1]
    expected = {"accuracy": 0.5, "margin_mean": 0.5, "score_mean": 0.75, "score_std": math.sqrt(2.75 / 4)}
    expected["ece"] = ((1 - sigmoid(2)) + sigmoid(1)) / 2  # each alone in its bin
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(expected)
    data = [{"prompt": "a", "response": "b", "label": label} for label in (1, 0, 0.5)]
    judged = preferences.collate(build(data).examples, 0)
    stats, margins = statistics("pointwise", seen(judged, torch.tensor([[1.0], [-2.0], [0.5]])))
    assert margins.tolist() == [1, 2, 0]
    expected = {"accuracy": 2.5 / 3, "margin_mean": 1.0, "score_mean": -0.5 / 3}
    expected["score_std"] = math.sqrt((1 + 4 + 0.25) / 3 - (0.5 / 3) ** 2)
    expected["ece"] = ((1 - sigmoid(1)) + sigmoid(-2) + (sigmoid(0.5) - 0.5)) / 3
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(expected)


def test_the_answers_to_a_prompt_are_read_in_one_forward_pass():
    trainer, calls = build(rankings(4), micro_batch_size=1), []
    trainer.model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.step(trainer.examples)
    assert len(calls) == 4


def test_a_model_that_cannot_tell_is_half_right():
    """Equal scores are neither right nor wrong, and a confidence of a half in them is calibrated."""
    for kind, make in KINDS.items():
        trainer = build(make(8))
        torch.nn.init.zeros_(trainer.model.score.weight)
        stats = trainer.step(trainer.examples)
        assert (stats["accuracy"], stats["margin_mean"], stats["score_std"]) == (0.5, 0.0, 0.0)
        assert stats["ece"] == 0.0 or kind in ("pointwise", "process")  # there the labels' mean is not a half


@pytest.mark.parametrize(
    ("kind", "config", "least"),
    [
        ("ranking", {}, 0.9),
        ("ranking", {"ranking": "plackett_luce"}, 0.9),
        ("pointwise", {}, 0.9),
        ("process", {}, 0.9),
    ],
)
def test_each_kind_is_learned(kind, config, least):
    trainer = build(KINDS[kind](400), eval_data=KINDS[kind](100, seed=1), epochs=2, **config)
    before = trainer.evaluate()["eval_loss"]
    metrics = trainer.train()
    assert metrics["eval_accuracy"] > least
    assert metrics["eval_loss"] < before
    assert metrics["eval_ece"] < 0.15


def test_a_preference_is_learned_and_the_saved_model_has_it(tmp_path):
    held_out = pairs(100, seed=1)
    trainer = build(pairs(300), eval_data=held_out, epochs=2)
    trainer.output_dir = tmp_path / "run"
    metrics = trainer.train()
    assert metrics["eval_accuracy"] > 0.95
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert {"loss", "accuracy", "score_mean", "score_std", "lr", "grad_norm"} < set(line)
    again = RewardTrainer(str(tmp_path / "run"), data=held_out, config=RewardConfig(quiet=True), eval_data=held_out)
    assert again.evaluate()["eval_accuracy"] == pytest.approx(metrics["eval_accuracy"])


def test_the_same_seed_gives_the_same_head():
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(heads))
        heads.append(build(pairs(2), seed=seed).model.score.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("kind", KINDS)
def test_normalised_scores_have_mean_0_wherever_they_are_read(tmp_path, kind):
    data, other = KINDS[kind](8), KINDS[kind](9, seed=4)
    trainer = build(data, calibration_data=other, eval_data=other, normalise=True)
    trainer.output_dir = tmp_path / "run"
    plain = build(data, eval_data=other)
    raw, metrics = plain.train(), trainer.train()
    assert abs(raw["eval_score_mean"]) > 1e-2
    assert metrics["eval_score_mean"] == pytest.approx(0, abs=1e-6)
    assert metrics["eval_score_std"] == pytest.approx(raw["eval_score_std"], rel=1e-5)
    if kind in ("pairwise", "ranking"):
        assert metrics["eval_loss"] == pytest.approx(raw["eval_loss"], abs=1e-6)
    again = build(data, make=lambda _: models.load_scalar_model(tmp_path / "run"), eval_data=other)
    assert again.evaluate()["eval_score_mean"] == pytest.approx(0, abs=1e-6)
    (prompt, response) = "the movie", " good fun"
    shift = trainer.model.config.score_shift
    assert shift == pytest.approx(-raw["eval_score_mean"], abs=1e-6)
    shifted, before = (load_reward(source, trainer.tokenizer) for source in (tmp_path / "run", plain.model))
    torch.testing.assert_close(shifted([prompt], [response]), before([prompt], [response]) + shift)
    trainer.normalise()  # once more changes nothing
    assert trainer.model.config.score_shift == shift


def test_the_training_data_are_the_calibration_data_if_there_are_no_others():
    trainer = build(labels(20), eval_data=labels(20), normalise=True)
    assert trainer.train()["eval_score_mean"] == pytest.approx(0, abs=1e-6)


def test_a_run_counts_the_steps_that_were_taken_before_it(tmp_path):
    trainer = build(labels(20), eval_data=labels(20), normalise=True, epochs=2, save_every=1)
    trainer.output_dir = tmp_path / "run"
    trainer.step(next(trainer.batches()))
    assert trainer.train()["eval_score_mean"] == pytest.approx(0, abs=1e-6)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(2, trainer.steps + 1))
    assert (tmp_path / "run" / "checkpoints" / f"step-{trainer.steps}").is_dir()


def test_the_margins_of_every_evaluation_are_kept(tmp_path):
    trainer = build(pairs(16), eval_data=pairs(10, seed=1), eval_every=1)
    trainer.output_dir = tmp_path / "run"
    metrics = trainer.train()
    first, last = (json.loads(line) for line in (tmp_path / "run/margins.jsonl").read_text().splitlines())
    assert (first["step"], last["step"]) == (1, 2)
    assert (sum(last["counts"]), len(last["counts"]), len(last["edges"])) == (10, 20, 21)
    assert sum(last["counts"][10:]) / 10 == pytest.approx(metrics["eval_accuracy"])
    page = (tmp_path / "run/report.html").read_text()
    assert 'aria-label="eval_margins"' in page
    assert "held-out pairs or labels at step 2: those above 0 are told right" in page
    made = histogram(torch.tensor([-2.0, -0.1, 0.0, 0.3, 2.0, math.nan]), bins=4)
    assert made == {"edges": [-2, -1, 0, 1, 2], "counts": [1, 1, 2, 1]}
    assert sum(histogram(torch.tensor([]))["counts"]) == 0


def test_a_batch_that_teaches_nothing_changes_nothing():
    ties = {"prompt": "the", "responses": [" good", " bad"], "scores": [1, 1]}
    trainer = build([ties, *rankings(3)], schedule="constant", weight_decay=0.1, warmup_ratio=0.0)
    assert trainer.step(trainer.examples[1:])["grad_norm"] > 0  # AdamW has moments now
    before = copy.deepcopy(trainer.model.state_dict())
    stats = trainer.step([trainer.examples[0]])
    assert (stats["loss"], stats["grad_norm"]) == (0.0, 0.0)
    assert math.isnan(stats["accuracy"])
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_what_does_not_fit_together_is_said():
    with pytest.raises(TypeError, match=r"data must be a path, a list of dicts or a datasets.Dataset, got NoneType"):
        build(None)
    with pytest.raises(ValueError, match="there is nothing to evaluate on"):
        build(labels(2)).evaluate()
    with pytest.raises(ValueError, match="center_coef is for pairs, and these are data of the kind pointwise"):
        build(labels(2), center_coef=0.1)
    with pytest.raises(ValueError, match=r"calibration_data is for RewardConfig.normalise, which is false"):
        build(labels(2), calibration_data=labels(2))
    with pytest.raises(DataError, match="record 1: it has chosen and rejected, and the training data response and"):
        build(labels(2), eval_data=pairs(2))
    with pytest.raises(ValueError, match=r"RewardConfig.separator must not be empty"):
        RewardConfig(separator="")
    with pytest.raises(ValueError, match=r"RewardConfig.ranking must be one of pairs, plackett_luce, got 'best'"):
        RewardConfig(ranking="best")
