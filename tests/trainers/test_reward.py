"""Reward modelling: the loss against float64, exact accumulation, a preference that is learned."""

import copy
import json
import random

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

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


def build(data, *, make=tiny_gpt2, pad_is_eos=False, eval_data=None, **config):
    tokenizer = tiny_tokenizer(pad_is_eos)
    settings = {"batch_size": 8, "quiet": True, "learning_rate": 3e-3, **config}
    return RewardTrainer(
        make(tokenizer), data=data, tokenizer=tokenizer, config=RewardConfig(**settings), eval_data=eval_data
    )


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("margins", [False, True])
def test_loss_and_gradient_are_bradley_terry(make, pad_is_eos, micro, margins):
    data = [pair | ({"margin": 0.5 * i} if margins else {}) for i, pair in enumerate(pairs(8))]
    trainer = build(data, make=make, pad_is_eos=pad_is_eos, micro_batch_size=micro, center_coef=0.1, max_grad_norm=1e9)
    model = copy.deepcopy(trainer.model).double()
    terms, right = [], 0
    for i, pair in enumerate(trainer.pairs):
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
    stats = trainer.step(trainer.pairs)
    assert stats["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert stats["accuracy"] == right / 8
    # float32 passes against float64 ones: some 1e-6 of the largest entry.
    assert (taken[0] - expected).abs().max() < 1e-5 * expected.abs().max()


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
