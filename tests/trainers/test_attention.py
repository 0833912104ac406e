"""A model attends to packed sequences in its own way while a run lasts, and afterwards as before."""

import json

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

import rlhf_fast as rf
from rlhf_fast import models
from rlhf_fast.attention import NAME

TOKENIZER = tiny_tokenizer()
PAIRS = [{"prompt": "the", "chosen": " plot was fun", "rejected": f" {w}"} for w in ("bad", "dull", "not good", "I")]
RANKED = [{"prompt": p["prompt"], "responses": [p["chosen"], p["rejected"]], "scores": [1, 0]} for p in PAIRS]
DEMOS = [{"prompt": p["prompt"], "response": p["rejected"]} for p in PAIRS]
PROMPTS = [{"prompt": p["rejected"]} for p in PAIRS]
STEPS = 2


def length(prompts, responses):
    return [float(len(r)) for r in responses]


def build(kind, folder=None, **numbers):
    numbers = {"packing": True, "quiet": True, "batch_size": 2, "save_every": 1} | numbers
    model, common = tiny_llama(TOKENIZER), {"output_dir": folder, "tokenizer": TOKENIZER}
    online = numbers | {"steps": STEPS, "max_new_tokens": 4, "minibatch_size": 2}
    if kind == "ppo":
        return rf.PPOTrainer(model, reward=length, prompts=PROMPTS, config=rf.PPOConfig(**online), **common)
    if kind == "grpo":
        config = rf.GRPOConfig(**online, kl_coef=0.1)
        return rf.GRPOTrainer(model, reward=length, prompts=PROMPTS, config=config, **common)
    if kind == "dpo":
        return rf.DPOTrainer(model, data=PAIRS, config=rf.DPOConfig(**numbers), **common)
    if kind == "rrhf":
        return rf.RRHFTrainer(model, data=RANKED, config=rf.RRHFConfig(**numbers), **common)
    if kind == "reward":
        scorer = models.load_scalar_model(model, zero_head=True)
        return rf.RewardTrainer(scorer, data=PAIRS, eval_data=PAIRS, config=rf.RewardConfig(**numbers), **common)
    config, teacher = rf.DistillConfig(**numbers), tiny_llama(TOKENIZER, seed=1)
    return rf.DistillTrainer(model, teacher=teacher, data=DEMOS, eval_data=DEMOS, config=config, **common)


def attending(trainer):
    return {model.config._attn_implementation for model, _, _ in trainer.attention}


@pytest.mark.parametrize("kind", ["ppo", "grpo", "dpo", "rrhf", "reward", "distill"])
def test_after_a_run_every_model_attends_as_before(tmp_path, kind):
    trainer = build(kind, tmp_path / "run")
    count = {"ppo": 3, "rrhf": 1, "reward": 1}.get(kind, 2)
    assert [(before, now) for _, before, now in trainer.attention] == [("sdpa", NAME)] * count
    seen, step = [], trainer.step
    trainer.step = lambda batch: seen.append(attending(trainer)) or step(batch)
    metrics = trainer.train()
    assert seen == [{NAME}] * STEPS
    assert attending(trainer) == {"sdpa"}
    assert NAME not in (tmp_path / "run" / "config.json").read_text()
    if kind in ("reward", "distill"):  # a packed row is then read with a mask
        again = trainer.evaluate()
        assert again == pytest.approx({name: metrics[name] for name in again}, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["ppo", "distill"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, kind, error):
    whole = build(kind, tmp_path / "whole")
    whole.train()
    trainer, once = build(kind, tmp_path / "run"), []
    step = trainer.step

    def stopped(batch):
        if trainer.done == 1 and not once:
            once.append(attending(trainer))
            raise error("no more")
        return step(batch)

    trainer.step = stopped
    with pytest.raises(error):
        trainer.train()
    assert once == [{NAME}]
    assert attending(trainer) == {"sdpa"}
    trainer.train(resume=True)
    assert attending(trainer) == {"sdpa"}
    of = [t.policy if kind == "ppo" else t.model for t in (whole, trainer)]
    for (name, weight), other in zip(of[0].state_dict().items(), of[1].state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


def test_the_models_of_a_refused_trainer_attend_as_before(monkeypatch):
    policy, reference = tiny_llama(TOKENIZER), tiny_gpt2(TOKENIZER)
    forward = reference.transformer.forward

    def leaking(*given, **options):
        output = forward(*given, **options)
        output.last_hidden_state = output.last_hidden_state.cumsum(1)
        return output

    monkeypatch.setattr(reference.transformer, "forward", leaking)
    monkeypatch.setattr(models, "frozen_copy", lambda model, *_: model.eval().requires_grad_(False))
    common = {"tokenizer": TOKENIZER, "reference": reference, "config": rf.DPOConfig(packing=True, quiet=True)}
    with pytest.raises(ValueError, match="the sequences of GPT2LMHeadModel see each other when they are packed"):
        rf.DPOTrainer(policy, data=PAIRS, **common)
    assert {m.config._attn_implementation for m in (policy, reference)} == {"sdpa"}


def test_a_reference_that_was_read_before_attends_as_before():
    reference = tiny_llama(TOKENIZER, seed=1)
    config = rf.DPOConfig(packing=True, precompute_reference=True, quiet=True)
    trainer = rf.DPOTrainer(
        tiny_llama(TOKENIZER), data=PAIRS, reference=reference, tokenizer=TOKENIZER, config=config
    )  # fmt: skip
    assert reference.config._attn_implementation == "sdpa"
    assert [model is trainer.model for model, _, _ in trainer.attention] == [True]


def test_without_packing_nothing_is_prepared():
    assert build("ppo", packing=False).attention == []


def test_a_model_that_attends_eagerly_does_so_before_and_after():
    model = tiny_llama(TOKENIZER)
    model.set_attn_implementation("eager")
    config = rf.RRHFConfig(packing=True, quiet=True)
    trainer = rf.RRHFTrainer(model, data=RANKED, tokenizer=TOKENIZER, config=config)
    assert attending(trainer) == {"eager"}
    trainer.train()
    assert attending(trainer) == {"eager"}


@pytest.mark.parametrize("scored", [True, False])
def test_what_a_student_writes_is_shown_like_what_a_policy_writes(tmp_path, capsys, scored):
    config = rf.DistillConfig(steps=4, batch_size=4, max_new_tokens=4, sample_every=2, save_every=0)
    trainer = rf.DistillTrainer(
        tiny_llama(TOKENIZER), teacher=tiny_llama(TOKENIZER, seed=1), prompts=PROMPTS, output_dir=tmp_path / "run",
        reward=length if scored else None, tokenizer=TOKENIZER, config=config,
    )  # fmt: skip
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2] * 4 + [4] * 4
    asked = {record["prompt"] for record in PROMPTS}
    assert {line["prompt"] for line in lines} == asked
    assert [line["score"] for line in lines] == [len(line["response"]) if scored else None for line in lines]
    said = capsys.readouterr().err
    assert "step 4" in said
    assert "response" in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<dt>step 4") == 4
    assert ("<b class=" in page) == scored


@pytest.mark.parametrize("trainer", [rf.PPOTrainer, rf.GRPOTrainer, rf.DistillTrainer])
def test_a_step_that_is_skipped_shows_nothing(tmp_path, trainer):
    asked = []

    def reward(prompts, responses):
        asked.append(prompts)
        if len(asked) == 2:
            raise OSError("no connection")
        return length(prompts, responses)

    kind = {rf.PPOTrainer: rf.PPOConfig, rf.GRPOTrainer: rf.GRPOConfig, rf.DistillTrainer: rf.DistillConfig}[trainer]
    more = {} if trainer is rf.DistillTrainer else {"minibatch_size": 2}
    config = kind(
        steps=3, batch_size=2, max_new_tokens=4, sample_every=1, skip_failed_rewards=True, quiet=True, **more
    )  # fmt: skip
    given = {"teacher": tiny_llama(TOKENIZER, seed=1)} if trainer is rf.DistillTrainer else {}
    with pytest.warns(UserWarning, match="step 2 is skipped"):
        trainer(
            tiny_llama(TOKENIZER), prompts=PROMPTS, reward=reward, output_dir=tmp_path / "run", tokenizer=TOKENIZER,
            config=config, **given,
        ).train()  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {1, 3}


def test_of_given_responses_there_is_no_table(tmp_path, capsys):
    config = rf.DistillConfig(sample_every=1, batch_size=2)
    trainer = rf.DistillTrainer(
        tiny_llama(TOKENIZER), teacher=tiny_llama(TOKENIZER, seed=1), data=DEMOS, output_dir=tmp_path / "run",
        tokenizer=TOKENIZER, config=config,
    )  # fmt: skip
    trainer.train()
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    assert "score" not in capsys.readouterr().err
