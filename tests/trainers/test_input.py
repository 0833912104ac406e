"""What every trainer refuses before it starts: another trainer's config, another model's tokenizer, no room."""

import pytest
from tiny import tiny_gpt2, tiny_tokenizer

import rlhf_fast as rf

TOKENIZER = tiny_tokenizer()
DEMOS = {"data": [{"prompt": "the movie", "response": " was good"}]}
PAIRS = {"data": [{"prompt": "the movie", "chosen": " was good", "rejected": " was bad"}]}
PROMPTS = {"prompts": [{"prompt": "the movie"}], "reward": lambda prompts, responses: [0.0] * len(prompts)}
RANKED = {"data": [{"prompt": "the movie", "responses": [" was good", " was bad"], "scores": [1, 0]}]}
TRAINERS = [
    (rf.SFTTrainer, DEMOS),
    (rf.RewardTrainer, PAIRS),
    (rf.PPOTrainer, PROMPTS),
    (rf.GRPOTrainer, PROMPTS),
    (rf.RRHFTrainer, RANKED),
    (rf.DPOTrainer, PAIRS),
    (rf.DistillTrainer, DEMOS | {"teacher": tiny_gpt2(TOKENIZER)}),
    (rf.DistillTrainer, {"prompts": [{"prompt": "the movie"}], "teacher": tiny_gpt2(TOKENIZER)}),
]


@pytest.mark.parametrize(("trainer", "given"), TRAINERS)
def test_the_config_of_another_trainer(trainer, given):
    name = trainer.__name__.replace("Trainer", "Config")
    for config in ({"batch_size": 3}, rf.RewardConfig() if trainer is rf.SFTTrainer else rf.SFTConfig()):
        with pytest.raises(TypeError, match=f"config must be a {name}, got {type(config).__name__}"):
            trainer(tiny_gpt2(TOKENIZER), tokenizer=TOKENIZER, config=config, **given)


@pytest.mark.parametrize(("trainer", "given"), TRAINERS)
def test_a_tokenizer_whose_tokens_the_model_does_not_have(trainer, given):
    small = tiny_gpt2(TOKENIZER)
    small.resize_token_embeddings(100)
    with pytest.raises(ValueError, match=r"the tokenizer's token \d+ is none of the model's 100"):
        trainer(small, tokenizer=TOKENIZER, **given)


@pytest.mark.parametrize(
    ("trainer", "config", "given"),
    [
        (rf.SFTTrainer, rf.SFTConfig, DEMOS),
        (rf.RewardTrainer, rf.RewardConfig, PAIRS),
        (rf.RRHFTrainer, rf.RRHFConfig, RANKED),
        (rf.DPOTrainer, rf.DPOConfig, PAIRS),
    ],
)
def test_a_length_beyond_the_context(trainer, config, given):
    model = tiny_gpt2(TOKENIZER, n_positions=16)
    with pytest.raises(ValueError, match="max_length 17 exceeds the model's context of 16"):
        trainer(model, tokenizer=TOKENIZER, config=config(max_length=17), **given)
    assert trainer(model, tokenizer=TOKENIZER, config=config(max_length=16), **given).max_length == 16
    assert trainer(model, tokenizer=TOKENIZER, config=config(), **given).max_length == 16


@pytest.mark.parametrize(("trainer", "given"), TRAINERS)
def test_what_is_no_model_and_no_tokenizer(trainer, given):
    with pytest.raises(TypeError, match="a model must be a path, a Hub id or a module, got int"):
        trainer(3, tokenizer=TOKENIZER, **given)
    with pytest.raises(TypeError, match="a tokenizer must be a path, a Hub id or one of transformers, got float"):
        trainer(tiny_gpt2(TOKENIZER), tokenizer=0.5, **given)


@pytest.mark.parametrize(("trainer", "given"), [t for t in TRAINERS if hasattr(t[0], "evaluate")])
def test_an_evaluation_without_data(trainer, given):
    with pytest.raises(ValueError, match="there is nothing to evaluate on: eval_data is absent"):
        trainer(tiny_gpt2(TOKENIZER), tokenizer=TOKENIZER, **given).evaluate()


def test_a_column_that_has_another_name_elsewhere():
    for record in (
        {"prompt": "the movie", "completion": " was good"},
        {"prompt": "the", "completion": "a", "label": 1},
    ):
        trainer = rf.RewardTrainer if "label" in record else rf.SFTTrainer
        with pytest.raises(ValueError, match='record 1: "response" is missing: rename "completion"'):
            trainer(tiny_gpt2(TOKENIZER), tokenizer=TOKENIZER, data=[record])


def test_a_student_with_nothing_to_learn():
    trainer, given = TRAINERS[-2]
    with pytest.raises(ValueError, match=r"DistillConfig\.alpha is 0 and there is no reward"):
        trainer(tiny_gpt2(TOKENIZER), tokenizer=TOKENIZER, config=rf.DistillConfig(alpha=0.0), **given)


def test_a_reference_that_nobody_asks():
    reference = tiny_gpt2(TOKENIZER)
    with pytest.warns(UserWarning, match="the reference is not used: GRPOConfig.kl_coef is 0"):
        trainer = rf.GRPOTrainer(tiny_gpt2(TOKENIZER), tokenizer=TOKENIZER, reference=reference, **PROMPTS)
    assert trainer.reference is None


@pytest.mark.parametrize(("trainer", "given"), TRAINERS)
@pytest.mark.parametrize("absent", ["transformers", "accelerate", "rich"])
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, trainer, given, absent):
    from rlhf_fast import dispatch

    there = dispatch.find_spec
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None if name == absent else there(name))
    with pytest.raises(ModuleNotFoundError, match=rf"{absent} is not installed: pip install 'rlhf-fast\[train\]'"):
        trainer(tiny_gpt2(TOKENIZER), tokenizer=TOKENIZER, **given)
    if absent != "rich":
        with pytest.raises(ModuleNotFoundError, match=rf"{absent} is not installed: pip install 'rlhf-fast\[train\]'"):
            rf.generate("nowhere", ["the"])
