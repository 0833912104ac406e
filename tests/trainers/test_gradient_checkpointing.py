"""Activations computed anew for the backward pass are the same activations."""

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

import rlhf_fast as rf
from rlhf_fast.models import unwrap

TOKENIZER = tiny_tokenizer()
DEMOS = [{"prompt": "the movie", "response": f" was {w}"} for w in ("good", "bad", "great", "not good")]
PAIRS = [{"prompt": f"the {w}", "chosen": " was good", "rejected": " was awful"} for w in ("movie", "plot", "Bot")]
RANKED = [{"prompt": p["prompt"], "responses": [p["chosen"], p["rejected"]], "scores": [2, 1]} for p in PAIRS]
PROMPTS = [{"prompt": f"the {w} was"} for w in ("movie", "plot")]
ONLINE = {"max_new_tokens": 6, "minibatch_size": 2, "micro_batch_size": 1, "kl_coef": 0.1}


def build(kind, **numbers):
    numbers = {"batch_size": 2, "learning_rate": 1e-3} | numbers
    if kind == "sft":
        return rf.SFTTrainer(tiny_llama(), data=DEMOS, tokenizer=TOKENIZER, config=rf.SFTConfig(**numbers))
    if kind == "reward":
        return rf.RewardTrainer(tiny_llama(), data=PAIRS, tokenizer=TOKENIZER, config=rf.RewardConfig(**numbers))
    if kind == "rrhf":
        return rf.RRHFTrainer(tiny_llama(), data=RANKED, tokenizer=TOKENIZER, config=rf.RRHFConfig(**numbers))
    if kind == "dpo":
        return rf.DPOTrainer(tiny_llama(), data=PAIRS, tokenizer=TOKENIZER, config=rf.DPOConfig(**numbers))
    if kind == "distill":
        config = rf.DistillConfig(max_new_tokens=6, **numbers)
        teacher = {"teacher": tiny_llama(seed=1), "prompts": PROMPTS}
        return rf.DistillTrainer(tiny_llama(), **teacher, tokenizer=TOKENIZER, config=config)
    trainer, config = (rf.PPOTrainer, rf.PPOConfig) if kind == "ppo" else (rf.GRPOTrainer, rf.GRPOConfig)
    common = {"reward": lambda prompts, responses: [len(r) for r in responses], "prompts": PROMPTS}
    return trainer(tiny_llama(), **common, tokenizer=TOKENIZER, config=config(**ONLINE, **numbers))


def run(kind, checkpointing, share="none"):
    """A trainer after two steps, and how often the first layers of its models went forward with a gradient."""
    config = {"gradient_checkpointing": checkpointing} | ({} if share == "none" else {"share": share})
    trainer = build(kind, **config)
    calls = 0

    def count(*_):
        nonlocal calls
        calls += torch.is_grad_enabled()

    learned = [getattr(trainer, name) for name in ("model", "policy", "critic") if hasattr(trainer, name)]
    for model in learned:
        layers = next(m for m in unwrap(model).modules() if isinstance(m, torch.nn.ModuleList))
        layers[0].self_attn.register_forward_pre_hook(count)
    batches = trainer.batches()
    stats = [trainer.step(next(batches)) for _ in range(2)]
    return [p.detach() for model in learned for p in model.parameters()], stats, calls


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("sft", "none"), ("reward", "none"), ("rrhf", "none"), ("dpo", "none"), ("dpo", "lora"), ("distill", "none"),
        ("ppo", "none"), ("ppo", "hydra:1"), ("ppo", "lora"), ("grpo", "none"), ("grpo", "hydra:1"), ("grpo", "lora"),
    ],
)  # fmt: skip
def test_the_numbers_are_the_same_and_every_layer_runs_twice(kind, share):
    weights, stats, calls = run(kind, False, share)
    again, stats_again, more = run(kind, True, share)
    assert calls > 0
    assert more > calls if share == "hydra:1" else more == 2 * calls  # below hydra's trained layers nothing goes back
    assert stats_again == stats
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


def test_a_model_that_cannot_is_refused():
    model = tiny_gpt2()
    model.supports_gradient_checkpointing = False
    config = rf.SFTConfig(gradient_checkpointing=True)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no gradient checkpointing"):
        rf.SFTTrainer(model, data=DEMOS, tokenizer=TOKENIZER, config=config)
