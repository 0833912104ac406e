"""RRHF: the loss against float64 one response at a time, exact accumulation, a ranking that is learned."""

import copy
import json
import math
import random

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

from rlhf_fast.trainers.rrhf import RRHFConfig, RRHFTrainer

RANKED = [
    {
        "prompt": "the movie was",
        "responses": [" great and very fun", " bad", " dull", " good"],
        "scores": [4, -1, 0, 2],
    },
    {"prompt": "the", "responses": [" plot"], "scores": [7]},  # a group of one
    {"prompt": "I like this movie and I", "responses": [" hate this plot", " like it"], "scores": [1, 1]},  # a tie
    {"prompt": "a", "responses": [" dull awful bad plot is not good", " very", " fun"], "scores": [1e9 + 1, 1e9, -2.5]},
    {"prompt": "", "responses": [" good movie", " plot"], "scores": [0, 1]},  # no prompt
]


def build(data=RANKED, *, make=tiny_gpt2, pad_is_eos=False, eval_data=None, **config):
    tokenizer = tiny_tokenizer(pad_is_eos)
    settings = {"batch_size": len(data), "quiet": True, "learning_rate": 1e-3, **config}
    return RRHFTrainer(
        make(tokenizer), data=data, tokenizer=tokenizer, config=RRHFConfig(**settings), eval_data=eval_data
    )


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def by_hand(trainer, length_norm=1.0, sft_weight=1.0):
    """The paper's formula in float64: loss, its two terms, the accuracy and the gradient."""
    model = copy.deepcopy(trainer.model).double()
    model.zero_grad()
    rank = sft = right = pairs = 0
    for example in trainer.examples:
        means, sums = [], []
        for ids in example.answers:
            table = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
            said = [table[i - 1, ids[i]] for i in range(max(example.prompt_length, 1), len(ids))]
            sums.append(sum(said))
            means.append(sum(said) / len(said) ** length_norm)
        for r_i, p_i in zip(example.scores, means, strict=True):
            for r_j, p_j in zip(example.scores, means, strict=True):
                if r_i < r_j:
                    rank = rank + (p_i - p_j).clamp(min=0)
                    pairs, right = pairs + 1, right + int(p_i < p_j)
        sft = sft - sums[example.scores.index(max(example.scores))]
    rank, sft = rank / len(trainer.examples), sft / len(trainer.examples)
    loss = rank + sft_weight * sft
    loss.backward()
    return loss.item(), rank.item(), sft.item(), right / pairs, gradient(model)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("micro", [None, 1, 2, 5])
def test_loss_and_gradient_are_the_paper_s_whatever_the_micro_batches(make, pad_is_eos, micro):
    """With 1 and 2 the group of four does not fit in one pass."""
    trainer = build(make=make, pad_is_eos=pad_is_eos, micro_batch_size=micro, max_grad_norm=1e9)
    *numbers, expected = by_hand(trainer)
    taken = []
    trainer.optimizer.step = lambda: taken.append(gradient(trainer.model))
    stats = trainer.step(trainer.examples)
    names = ("loss", "rank_loss", "sft_loss", "accuracy")
    assert [stats[name] for name in names] == pytest.approx(numbers, rel=1e-5)
    assert 0 < stats["accuracy"] < 1
    assert stats["rank_loss"] > 0
    # float32 passes against float64 ones: some 1e-6 of the largest entry.
    assert (taken[0] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("length_norm", "sft_weight"), [(0.0, 0.0), (0.5, 2.0)])
def test_the_weights_of_the_terms(length_norm, sft_weight):
    trainer = build(length_norm=length_norm, sft_weight=sft_weight, micro_batch_size=3)
    loss, _, _, accuracy, expected = by_hand(trainer, length_norm, sft_weight)
    stats = trainer.step(trainer.examples)
    assert (stats["loss"], stats["accuracy"]) == pytest.approx((loss, accuracy), rel=1e-5)
    assert stats["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)


def test_evaluation_is_the_mean_over_all_prompts_whatever_the_batches():
    expected = by_hand(build())
    for size, micro in ((1, 1), (2, None), (5, 3)):
        found = build(eval_data=RANKED, batch_size=size, micro_batch_size=micro).evaluate()
        numbers = [found[f"eval_{name}"] for name in ("loss", "rank_loss", "sft_loss", "accuracy")]
        assert numbers == pytest.approx(expected[:4], rel=1e-5)


def test_without_two_scores_that_differ_there_is_no_accuracy():
    trainer = build(RANKED[1:3])
    stats = trainer.step(trainer.examples)
    assert math.isnan(stats["accuracy"])
    assert stats["rank_loss"] == 0
    assert stats["loss"] > 0


def ranked(count, seed=0):
    """Answers with more praise score higher; which praise, and how long they are, differs."""
    draw = random.Random(seed)
    praise, blame, neutral = ["good", "great", "fun"], ["bad", "dull", "awful"], ["movie", "plot", "this", "very"]
    found = []
    for _ in range(count):
        prompt = " ".join(["the", *draw.choices(neutral, k=2), "is"])
        answers = {}
        while len(answers) < 4:
            words = draw.choices(praise + blame, k=draw.randint(1, 3))
            answers[f" {' '.join(words)}"] = sum(w in praise for w in words) - sum(w in blame for w in words)
        found.append({"prompt": prompt, "responses": list(answers), "scores": list(answers.values())})
    return found


def test_a_ranking_is_learned_and_the_saved_model_has_it(tmp_path):
    held_out = ranked(50, seed=1)
    trainer = build(ranked(120), eval_data=held_out, batch_size=12, epochs=3, learning_rate=3e-3, sft_weight=0.1)
    trainer.output_dir = tmp_path / "run"
    before = trainer.evaluate()["eval_accuracy"]
    metrics = trainer.train()
    assert before < 0.65
    assert metrics["eval_accuracy"] > 0.9
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"loss", "rank_loss", "sft_loss", "accuracy", "lr", "grad_norm"} < set(lines[0])
    again = RRHFTrainer(str(tmp_path / "run"), data=held_out, config=RRHFConfig(quiet=True), eval_data=held_out)
    assert again.evaluate()["eval_accuracy"] == pytest.approx(metrics["eval_accuracy"])
