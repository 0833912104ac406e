"""The loss inside transformers' own Trainer, and the sampler inside its own generate."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
    TopKLogitsWarper,
    TopPLogitsWarper,
    Trainer,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss

import rlhf_fast as rf
from rlhf_fast.integrations.transformers import Sampler, causal_lm_loss

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def records(count, size, seed=0):
    """Rows of 8 to 19 tokens padded on the right to 19, a random part of each excluded, one excluded altogether."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(3, size, (19,), generator=generator)
        length = int(torch.randint(8, 20, (), generator=generator))
        labels = torch.where(torch.rand(19, generator=generator) < 0.3, -100, ids)
        labels[length:] = -100
        if i == 3:
            labels[:] = -100
        mask = (torch.arange(19) < length).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def trained(build, rows, folder, *, loss=None, batch=4, accumulate=1, steps=6, **arguments):
    model = build()
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=steps,
        learning_rate=1e-2, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        optim="sgd", eval_strategy="steps", eval_steps=steps, dataloader_pin_memory=False, **arguments,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:7], compute_loss_func=loss)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return model, losses, evaluated


def assert_same(one, other, tolerance=1e-5):
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=tolerance), name


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("build", [partial(tiny_gpt2, **NO_DROPOUT), tiny_llama], ids=["gpt2", "llama"])
def test_the_trainer_trains_as_with_its_own_loss(build, accumulate, tmp_path):
    rows = records(16, len(tiny_tokenizer()))
    theirs, losses, evaluated = trained(build, rows, tmp_path, accumulate=accumulate)
    ours, our_losses, our_evaluated = trained(build, rows, tmp_path, loss=causal_lm_loss, accumulate=accumulate)
    assert len(losses) == 6
    assert our_losses == pytest.approx(losses, abs=1e-5)
    assert our_evaluated == pytest.approx(evaluated, abs=1e-5)
    assert_same(theirs, ours)
    start = build()
    assert max((a - b).abs().max() for a, b in zip(start.parameters(), ours.parameters(), strict=True)) > 1e-3


def test_accumulated_micro_batches_are_the_whole_batch(tmp_path):
    rows = records(16, len(tiny_tokenizer()), seed=1)
    build = partial(tiny_gpt2, **NO_DROPOUT)
    whole, losses, _ = trained(build, rows, tmp_path, loss=causal_lm_loss, batch=8)
    parts, part_losses, _ = trained(build, rows, tmp_path, loss=causal_lm_loss, batch=2, accumulate=4)
    assert part_losses == pytest.approx(losses, abs=1e-5)
    assert_same(whole, parts)


def test_an_encoder_decoder_s_labels_are_not_shifted(tmp_path):
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (3, 9), generator=generator)
    labels = torch.where(torch.rand(3, 9, generator=generator) < 0.3, -100, ids)
    outputs = model(input_ids=ids, labels=labels)
    assert float(causal_lm_loss(outputs, labels, shift=False).detach()) == pytest.approx(
        float(outputs.loss.detach()), abs=1e-5
    )


def case(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(3, 11, 501, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, 501, (3, 11), generator=generator)
    return logits, torch.where(torch.rand(3, 11, generator=generator) < 0.4, -100, labels)


class Allocations(TorchDispatchMode):
    """The dtype and size of every tensor that an op returns."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        self.made += [(o.dtype, o.numel()) for o in outputs if isinstance(o, torch.Tensor)]
        return result


def test_no_float32_copy_of_the_logits_exists():
    logits, labels = case(torch.bfloat16)

    def widest(loss):
        with Allocations() as seen:
            loss().backward()
        return max(size for dtype, size in seen.made if dtype == torch.float32), [
            dtype for dtype, size in seen.made if size >= logits.numel()
        ]

    ours, copies = widest(lambda: causal_lm_loss({"logits": logits}, labels))
    theirs, _ = widest(lambda: ForCausalLMLoss(logits, labels, 501))
    assert theirs >= logits.numel()  # what this test would see
    assert ours <= labels.numel()
    assert set(copies) == {torch.bfloat16}  # the gradient, and no copy of it
    assert len(copies) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loss_and_gradient_are_those_of_transformers(dtype):
    logits, labels = case(dtype)
    exact = logits.detach().double().requires_grad_()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    oracle = torch.nn.functional.cross_entropy(exact.flatten(0, 1), shifted.flatten(), reduction="sum") / 7
    (expected,) = torch.autograd.grad(oracle, exact)
    for outputs in ({"logits": logits}, (logits, "cache"), SimpleNamespace(logits=logits)):
        for items in (7, torch.tensor(7), torch.full((2, 1), 7.0)):
            loss = causal_lm_loss(outputs, labels, num_items_in_batch=items)
            assert loss.dim() == 0
            assert float(loss.detach()) == pytest.approx(float(oracle.detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(gradient.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
    assert gradient.dtype == dtype


def test_a_batch_without_labels_that_count_has_loss_0_and_gradient_0():
    logits, labels = case()
    for items in (None, 0, torch.tensor(0)):
        loss = causal_lm_loss((logits,), torch.full_like(labels, -100), items)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert float(loss.detach()) == 0
        assert gradient.abs().max() == 0


def test_the_loss_of_the_experts_is_not_forgotten():
    logits, labels = case()
    outputs = {"logits": logits, "aux_loss": torch.tensor(2.0)}
    with pytest.raises(ValueError, match="the model returns an aux_loss: pass aux_loss_coef"):
        causal_lm_loss(outputs, labels)
    plain = causal_lm_loss({"logits": logits}, labels).detach()
    assert float(causal_lm_loss(outputs, labels, aux_loss_coef=0.5).detach() - plain) == pytest.approx(1, abs=1e-5)


def test_what_the_loss_cannot_use_is_named():
    logits, labels = case()
    with pytest.raises(ValueError, match="the batch has no labels"):
        causal_lm_loss((logits,), None)
    with pytest.raises(ValueError, match="the model returned no logits"):
        causal_lm_loss({"loss": 1}, labels)
    with pytest.raises(ValueError, match=r"logits \[3, 10, 501\] and labels \[3, 11\] do not fit"):
        causal_lm_loss((logits[:, 1:],), labels)
    with pytest.raises(IndexError, match="got 501 in row"):
        causal_lm_loss((logits,), torch.full_like(labels, 501))


@pytest.fixture(scope="module")
def model():
    return tiny_llama().eval()


def prompts(model, *lengths):
    """Prompts of these lengths, padded on the left, and their mask."""
    width, rows, masks = max(lengths), [], []
    for i, length in enumerate(lengths):
        ids = torch.randint(3, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(i))
        rows.append(torch.nn.functional.pad(ids, (width - length, 0), value=0))
        masks.append(torch.arange(width) >= width - length)
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks).long()}


def write(model, batch, sampler, tokens=12, sampling=False, **arguments):
    output = model.generate(
        **batch, do_sample=sampling, logits_processor=[sampler], max_new_tokens=tokens, eos_token_id=None,
        pad_token_id=0, **arguments,
    )  # fmt: skip
    return output[:, batch["input_ids"].shape[1] :]


def test_generate_draws_from_the_distribution_that_transformers_filters_leave(model):
    rows, batch = 6000, prompts(model, 5)
    with torch.no_grad():
        scores = model(**batch).logits[:, -1].float() / 0.9
    for warp in (TopKLogitsWarper(40), TopPLogitsWarper(0.8), MinPLogitsWarper(0.02)):
        scores = warp(None, scores)
    p = scores.softmax(-1)[0].double()
    sampler = Sampler(temperature=0.9, top_k=40, top_p=0.8, min_p=0.02, seeds=torch.arange(rows))
    many = {name: value.expand(rows, -1) for name, value in batch.items()}
    drawn = write(model, many, sampler, tokens=1)[:, 0]
    seen = torch.bincount(drawn, minlength=len(p)).double()
    assert seen[p == 0].sum() == 0
    kept = p > 0
    assert 10 < int(kept.sum()) == int(sampler.draws[0].kept[0])
    assert stats.chisquare(seen[kept], p[kept] / p[kept].sum() * rows).pvalue > 1e-3
    logprobs = sampler.draws[0].logprobs.double()
    assert torch.allclose(logprobs, p[drawn].log(), atol=1e-4)


def test_a_row_is_the_same_in_any_batch_and_position(model):
    seeds, batch = torch.tensor([11, 22, 33]), prompts(model, 7, 4, 9)
    together = write(model, batch, Sampler(temperature=1.3, top_p=0.95, seeds=seeds))
    for i, length in enumerate((7, 4, 9)):
        one = slice(i, i + 1)
        alone = {name: value[one, 9 - length :] for name, value in batch.items()}
        response = write(model, alone, Sampler(temperature=1.3, top_p=0.95, seeds=seeds[one]))
        assert torch.equal(response, together[one])
    order = torch.tensor([2, 0, 1])
    moved = {name: value[order] for name, value in batch.items()}
    assert torch.equal(write(model, moved, Sampler(temperature=1.3, top_p=0.95, seeds=seeds[order])), together[order])
    others = write(model, batch, Sampler(temperature=1.3, top_p=0.95, seeds=seeds + 1))
    assert not (others == together).all(1).any()


def test_without_seeds_torch_s_generator_decides(model):
    batch = prompts(model, 6, 6)

    def text(seed):
        torch.manual_seed(seed)
        return write(model, batch, Sampler())

    assert torch.equal(text(1), text(1))
    assert not torch.equal(text(1), text(2))


def test_the_logprobs_are_those_of_the_model_under_the_loss(model):
    batch, sampler = prompts(model, 6, 6), Sampler(temperature=0.7, top_k=30, seeds=[3, 4])
    response = write(model, batch, sampler)
    ids = torch.cat([batch["input_ids"], response], 1)
    with torch.no_grad():
        later = rf.logprobs(model(ids).logits[:, 5:-1], response, temperature=0.7).logprobs
    said = torch.stack([draw.policy_logprobs for draw in sampler.draws], 1)
    assert torch.allclose(said, later, atol=1e-4)


@pytest.mark.parametrize("sampling", [False, True])
def test_temperature_0_and_the_penalty_are_transformers_own(model, sampling):
    batch = prompts(model, 7, 4, 9)
    mask = batch["attention_mask"]
    expected = model.generate(
        **batch, do_sample=False, repetition_penalty=1.7, max_new_tokens=20, eos_token_id=None, pad_token_id=0
    )[:, 9:]
    sampler = Sampler(temperature=0, repetition_penalty=1.7, prompt_mask=mask)
    output = model.generate(
        **batch, do_sample=sampling, logits_processor=[sampler], max_new_tokens=20, eos_token_id=None, pad_token_id=0
    )  # fmt: skip
    assert torch.equal(output[:, 9:], expected)  # also after do_sample's own filters: one token is left to them
    plain = model.generate(**batch, do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
    assert not torch.equal(plain[:, 9:], expected)


def test_penalties_see_what_they_are_told_to():
    ids, scores = torch.tensor([[5, 5, 2]]), torch.zeros(1, 8)
    for prompt, mask, counts in (
        (True, None, {2: 1, 5: 2}),
        (True, torch.tensor([[0, 1, 1]]), {2: 1, 5: 1}),
        (False, None, {}),
    ):
        sampler = Sampler(frequency_penalty=1.0, count_prompt=prompt, prompt_mask=mask, temperature=0)
        sampler(ids, scores)
        assert {int(i): int(sampler.counts[0, i]) for i in sampler.counts[0].nonzero()[:, 0]} == counts
        sampler(torch.tensor([[5, 5, 2, 7]]), scores)
        assert int(sampler.counts[0, 7]) == 1
    expected = RepetitionPenaltyLogitsProcessor(2.0)(ids, torch.ones(1, 8)).argmax(-1)
    sampler = Sampler(repetition_penalty=2.0, temperature=0)
    assert int(sampler(ids, torch.ones(1, 8)).argmax(-1)) == int(expected)


def test_other_processors_come_first_and_several_responses_per_prompt(model):
    banned = [[i] for i in range(10, model.config.vocab_size)]
    sampler = Sampler(seeds=torch.arange(6), prompt_mask=prompts(model, 5, 3)["attention_mask"], presence_penalty=0.5)
    drawn = write(model, prompts(model, 5, 3), sampler, bad_words_ids=banned, sampling=True, num_return_sequences=3)
    assert drawn.shape == (6, 12)
    assert int(drawn.max()) < 10
    assert len({tuple(row.tolist()) for row in drawn}) == 6


def test_ended_rows_are_padded(model):
    batch = prompts(model, 5, 5, 5, 5)
    seeds = torch.arange(4)
    free = write(model, batch, Sampler(seeds=seeds, temperature=2.0))
    end = int(free[0, 3])
    output = model.generate(
        **batch, do_sample=False, logits_processor=[Sampler(seeds=seeds, temperature=2.0)], max_new_tokens=12,
        eos_token_id=end, pad_token_id=0,
    )[:, 5:]  # fmt: skip
    for row, whole in zip(output, free, strict=True):
        stops = (whole == end).nonzero()[:, 0]
        length = int(stops[0]) + 1 if len(stops) else len(whole)
        assert torch.equal(row[:length], whole[:length])
        assert not row[length:].any()


def test_what_the_sampler_cannot_do_is_named(model):
    batch, ids, scores = prompts(model, 5, 5), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 8)
    sampler = Sampler()
    write(model, batch, sampler, tokens=3)
    with pytest.raises(ValueError, match="serves one call of generate"):
        write(model, batch, sampler)
    for seeds in ([1.5, 2.5], "12", torch.tensor([True, False])):
        with pytest.raises(TypeError, match="seeds must be integers, got"):
            Sampler(seeds=seeds)
    for mask in ([[1, 1, 1]], torch.ones(3)):
        with pytest.raises(TypeError, match=r"prompt_mask must be a \[B, P\] tensor"):
            Sampler(prompt_mask=mask)
    with pytest.raises(TypeError, match="no such argument: top_x; it has temperature, top_k"):
        Sampler(top_x=1)
    with pytest.raises(ValueError, match=r"seeds must be \[2\], one per row, got \[3\]"):
        write(model, batch, Sampler(seeds=[1, 2, 3]))
    with pytest.raises(ValueError, match=r"prompt_mask must be \[2, 3\], got \[2, 4\]"):
        Sampler(prompt_mask=torch.ones(2, 4))(ids, scores)
    with pytest.raises(ValueError, match="temperature"):
        Sampler(temperature=-1)(ids, scores)
    scores[1, 4] = torch.nan
    with pytest.raises(ValueError, match="the logits are NaN or infinite in row 1 at token 0 of the response"):
        Sampler()(ids, scores)
    scores[1] = -torch.inf
    with pytest.raises(ValueError, match="no token is left to draw in row 1"):
        Sampler()(ids, scores)


def test_the_page_s_examples_run(model, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    given = {"model": tiny_gpt2(), "rows": records(4, 60), "inputs": prompts(model, 5, 3)}
    given |= {"arguments": TrainingArguments("runs", max_steps=1, use_cpu=True, report_to=[], save_strategy="no")}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(snippet, given)
    assert given["trainer"].state.global_step == 1
    assert given["logprobs"].shape == (2, 64)
