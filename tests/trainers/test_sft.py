"""SFT: the loss against float64, exact accumulation, a task that is learned."""

import copy
import json
import math

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

from rlhf_fast.data import DataError
from rlhf_fast.trainers.sft import SFTConfig, SFTTrainer

DEMOS = [
    {"prompt": "the movie was", "response": " great and very fun"},
    {"prompt": "the", "response": " plot"},
    {"prompt": "I like this movie and I", "response": " hate this plot"},
    {"prompt": "a", "response": " dull awful bad plot is not good and is not fun"},
    {"text": "this is good"},
]


def build(data=DEMOS, *, make=tiny_gpt2, pad_is_eos=False, **config):
    tokenizer = tiny_tokenizer(pad_is_eos)
    eval_data = config.pop("eval_data", None)
    settings = {"batch_size": len(data), "quiet": True, "learning_rate": 1e-3, **config}
    return SFTTrainer(
        make(tokenizer), data=data, tokenizer=tokenizer, config=SFTConfig(**settings), eval_data=eval_data
    )


def by_hand(trainer, examples):
    """Mean loss of the learned tokens, one sequence at a time, in float64."""
    model = copy.deepcopy(trainer.model).double()
    model.zero_grad()
    losses = []
    for example in examples:
        table = torch.log_softmax(model(torch.tensor([example.ids])).logits[0], -1)
        losses += [-table[i - 1, token] for i, token in enumerate(example.ids) if i and example.mask[i]]
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), len(losses), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("micro", [None, 1, 2])
def test_loss_and_gradient_are_the_mean_over_the_response_tokens(make, pad_is_eos, micro):
    trainer = build(make=make, pad_is_eos=pad_is_eos, micro_batch_size=micro, max_grad_norm=1e9)
    loss, tokens, gradient = by_hand(trainer, trainer.examples)
    taken = []
    trainer.optimizer.step = lambda: taken.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    stats = trainer.step(trainer.examples)
    assert stats["loss"] == pytest.approx(loss, abs=1e-6)
    assert stats["tokens"] == tokens
    assert stats["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    # float32 passes against float64 ones: some 1e-6 of the largest entry.
    assert (taken[0] - gradient).abs().max() < 5e-6 * gradient.abs().max()


def test_the_gradient_is_clipped():
    trainer = build(max_grad_norm=0.25)
    taken = []
    trainer.optimizer.step = lambda: taken.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert trainer.step(trainer.examples)["grad_norm"] > 0.25
    assert taken[0].norm().item() == pytest.approx(0.25, rel=1e-4)


def test_a_task_is_learned(tmp_path):
    data = [{"prompt": f"{a} {b}", "response": f" {b} {a}"} for a in ("good", "bad", "dull") for b in ("movie", "plot")]
    trainer = build(data, epochs=60, batch_size=3, learning_rate=1e-2, eval_every=40, eval_data=data, schedule="linear")
    trainer.output_dir = tmp_path / "run"
    before = trainer.evaluate()["eval_loss"]
    metrics = trainer.train()
    assert trainer.done == 120
    assert before > 3
    assert metrics["eval_loss"] < 0.05
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [40, 80, 120]
    assert lines[-1]["lr"] == pytest.approx(1e-2 / (120 * 0.97), rel=1e-6)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    prompt = tokenizer("dull plot", return_tensors="pt")
    written = model.generate(**prompt, do_sample=False, max_new_tokens=4)
    assert tokenizer.decode(written[0], skip_special_tokens=True) == "dull plot plot dull"


def test_eval_loss_is_the_mean_over_all_tokens_whatever_the_batches():
    losses = [build(eval_data=DEMOS, batch_size=size).evaluate()["eval_loss"] for size in (1, 2, 5)]
    expected, _, _ = by_hand(build(), build().examples)
    assert losses == pytest.approx([expected] * 3, abs=1e-6)


def test_nan_weights_stop_before_the_step():
    trainer = build()
    with torch.no_grad():
        trainer.model.transformer.ln_f.weight[3] = math.nan
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(FloatingPointError, match="loss is nan"):
        trainer.step(trainer.examples)
    assert all(torch.equal(before[k].isnan(), v.isnan()) for k, v in trainer.model.state_dict().items())
    assert trainer.updates == 0


def test_long_sequences_raise_are_cut_or_left_out():
    data = [*DEMOS, {"prompt": "the", "response": " movie" * 200}]
    with pytest.raises(DataError, match="128"):
        build(data)
    assert len(build(data, overlong="drop").examples) == 5
    assert max(len(e.ids) for e in build(data, overlong="truncate", max_length=16).examples) == 16


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize(("micro", "max_length"), [(None, None), (1, None), (None, 40), (2, 128)])
def test_packed_sequences_have_the_loss_and_gradient_of_those_that_stand_alone(make, pad_is_eos, micro, max_length):
    options = {"micro_batch_size": micro, "max_length": max_length, "max_grad_norm": 1e9}
    trainer = build(make=make, pad_is_eos=pad_is_eos, packing=True, **options)
    loss, tokens, gradient = by_hand(trainer, trainer.examples)
    taken, shapes = [], []
    trainer.optimizer.step = lambda: taken.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    trainer.model.register_forward_pre_hook(
        lambda _, args, given: shapes.append(given["input_ids"].shape), with_kwargs=1
    )
    stats = trainer.step(trainer.examples)
    assert stats["loss"] == pytest.approx(loss, rel=1e-6)  # two roundings of a float32 sum near 200
    assert stats["tokens"] == tokens
    # float32 passes against float64 ones: some 1e-6 of the largest entry.
    assert (taken[0] - gradient).abs().max() < 5e-6 * gradient.abs().max()
    longest = max(len(example.ids) for example in trainer.examples)
    assert sum(rows for rows, _ in shapes) < len(trainer.examples)
    assert max(width for _, width in shapes) <= (max_length or longest)


def test_packed_evaluation():
    expected, _, _ = by_hand(build(), build().examples)
    for size in (2, 5):
        found = build(eval_data=DEMOS, batch_size=size, packing=True).evaluate()
        assert found["eval_loss"] == pytest.approx(expected, abs=1e-6)


def test_a_packed_run_says_nothing_of_padding(capfd):
    from transformers.utils import logging

    logging.warning_once.cache_clear()
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        build(packing=True, max_length=40).train()
        assert logging.get_verbosity() == logging.WARNING
    finally:
        logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")
