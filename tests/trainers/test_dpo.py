"""DPO: the loss against float64 one answer at a time, exact accumulation, a preference that is learned."""

import copy
import json
import math
import random

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

from rlhf_fast.trainers.dpo import DPOConfig, DPOTrainer

PAIRS = [
    {"prompt": "the movie was", "chosen": " great and very fun", "rejected": " bad"},
    {"prompt": "the", "chosen": " plot", "rejected": " a very dull plot"},
    {"prompt": "I like this movie and I", "chosen": " like it", "rejected": " hate this plot"},
    {"prompt": "", "chosen": " good movie", "rejected": " awful"},  # no prompt
    {"chosen": "a movie is good", "rejected": "a movie is bad and awful"},
]


def build(data=PAIRS, *, make=tiny_gpt2, pad_is_eos=False, eval_data=None, reference=None, **config):
    tokenizer = tiny_tokenizer(pad_is_eos)
    settings = {"batch_size": len(data), "quiet": True, "learning_rate": 1e-3, **config}
    return DPOTrainer(
        make(tokenizer), data=data, tokenizer=tokenizer, config=DPOConfig(**settings), eval_data=eval_data,
        reference=reference,
    )  # fmt: skip


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def logprob(model, ids, start):
    table = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    return sum(table[i - 1, ids[i]] for i in range(max(start, 1), len(ids)))


def by_hand(trainer, reference, *, beta, kind="sigmoid", label_smoothing=0.0):
    """The formula of each paper in float64: the statistics and the gradient."""
    model, reference = (copy.deepcopy(m).double() for m in (trainer.model, reference))
    model.zero_grad()
    losses, chosen, rejected = [], [], []
    for pair in trainer.examples:
        now, ref = ([logprob(m, ids, pair.prompt_length) for ids in (pair.chosen, pair.rejected)]
                    for m in (model, reference))  # fmt: skip
        a, b = now[0] - ref[0].detach(), now[1] - ref[1].detach()
        right, wrong = torch.sigmoid(beta * (a - b)), torch.sigmoid(beta * (b - a))
        losses.append({
            "sigmoid": -(1 - label_smoothing) * torch.log(right) - label_smoothing * torch.log(wrong),
            "ipo": (a - b - 1 / (2 * beta)) ** 2,
            "hinge": torch.clamp(1 - beta * (a - b), min=0),
        }[kind])  # fmt: skip
        chosen.append(beta * a.item())
        rejected.append(beta * b.item())
    loss = torch.stack(losses).mean()
    loss.backward()
    count = len(losses)
    stats = {
        "loss": loss.item(),
        "accuracy": sum(a > b for a, b in zip(chosen, rejected, strict=True)) / count,
        "margin": (sum(chosen) - sum(rejected)) / count,
        "chosen_reward": sum(chosen) / count,
        "rejected_reward": sum(rejected) / count,
    }
    return stats, gradient(model)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize(("micro", "known"), [(None, False), (2, False), (1, True)])
@pytest.mark.parametrize(
    "options", [{"beta": 0.1}, {"beta": 0.3, "label_smoothing": 0.2}, {"beta": 0.5, "kind": "ipo"},
                {"beta": 0.05, "kind": "hinge"}]
)  # fmt: skip
def test_loss_and_gradient_are_the_papers_whatever_the_micro_batches(make, pad_is_eos, micro, known, options):
    reference = make(tiny_tokenizer(pad_is_eos), seed=9)
    trainer = build(
        make=make, pad_is_eos=pad_is_eos, micro_batch_size=micro, reference=reference, precompute_reference=known,
        max_grad_norm=1e9, **options,
    )  # fmt: skip
    expected, slope = by_hand(trainer, reference, **options)
    taken = []
    trainer.optimizer.step = lambda: taken.append(gradient(trainer.model))
    stats = trainer.step(trainer.examples)
    assert {name: stats[name] for name in expected} == pytest.approx(expected, rel=2e-5, abs=2e-5)
    # float32 passes against float64 ones: some 1e-6 of the largest entry; ipo squares what those differ in.
    assert (taken[0] - slope).abs().max() < 2e-5 * slope.abs().max()


@pytest.mark.parametrize("share", ["none", "hydra:1", "lora"])
@pytest.mark.parametrize("known", [False, True])
def test_the_policy_starts_as_its_reference(share, known):
    trainer = build(share=share, precompute_reference=known, lora_rank=2)
    stats = trainer.step(trainer.examples)
    assert stats["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert stats["margin"] == pytest.approx(0, abs=1e-5)
    after = trainer.step(trainer.examples)
    assert after["loss"] < stats["loss"]
    assert after["margin"] > 0.001
    assert (trainer.reference is None) == known


def test_what_is_shared_weighs_once():
    def weight(trainer):
        found = {p.data_ptr(): p.numel() for m in (trainer.model, trainer.reference) for p in m.parameters()}
        return sum(found.values()) / sum(p.numel() for p in trainer.reference.parameters())

    def make(tokenizer):
        return tiny_gpt2(tokenizer, n_layer=12)

    assert weight(build(make=make)) == 2
    assert 1 < weight(build(make=make, share="hydra:1")) < 1.15
    assert 1 < weight(build(make=make, share="lora", lora_rank=2)) < 1.15


def test_evaluation_is_the_mean_over_all_pairs_whatever_the_batches():
    reference = tiny_gpt2(seed=9)
    expected, _ = by_hand(build(beta=0.2, reference=reference), reference, beta=0.2)
    for size, known in ((1, False), (2, True), (5, False)):
        trainer = build(beta=0.2, reference=reference, eval_data=PAIRS, batch_size=size, precompute_reference=known)
        found = trainer.evaluate()
        assert {n: found[f"eval_{n}"] for n in expected} == pytest.approx(expected, rel=2e-5, abs=2e-5)


def pairs(count, seed=0):
    draw = random.Random(seed)
    praise, blame, neutral = ["good", "great", "fun"], ["bad", "dull", "awful"], ["movie", "plot", "very", "this"]

    def answer(words):
        return "".join(f" {w}" for w in draw.choices(words, k=draw.randint(1, 3)))

    prompts = (" ".join(["the", *draw.choices(neutral, k=2), "is"]) for _ in range(count))
    return [{"prompt": p, "chosen": answer(praise), "rejected": answer(blame)} for p in prompts]


def test_a_preference_is_learned_and_the_saved_model_has_it(tmp_path):
    held_out = pairs(40, seed=1)
    trainer = build(pairs(128), eval_data=held_out, batch_size=16, epochs=4, learning_rate=2e-3)
    trainer.output_dir = tmp_path / "run"
    metrics = trainer.train()
    assert metrics["eval_accuracy"] > 0.95
    assert metrics["eval_margin"] > 1
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "lr", "grad_norm"} < set(lines[0])
    again = DPOTrainer(
        str(tmp_path / "run"), data=held_out, reference=tiny_gpt2(tiny_tokenizer()), config=DPOConfig(quiet=True),
        eval_data=held_out,
    )  # fmt: skip
    assert again.evaluate() == pytest.approx({n: v for n, v in metrics.items() if n.startswith("eval_")}, rel=1e-4)


def test_bad_numbers():
    with pytest.raises(ValueError, match=r"DPOConfig.label_smoothing must be 0 with kind=ipo, got 0.1"):
        DPOConfig(kind="ipo", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"DPOConfig.share must be none, lora or hydra:k"):
        DPOConfig(share="all")
    with pytest.raises(ValueError, match="max_length 65 exceeds the model's context of 64"):
        build(reference=tiny_gpt2(n_positions=64), max_length=65)
