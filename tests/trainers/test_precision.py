"""bf16 rounds the products of the models and nothing else: the weights, and sums over them, stay in float32."""

import copy

import pytest
import torch
from tiny import tiny_gpt2, tiny_tokenizer

import rlhf_fast as rf

TOKENIZER = tiny_tokenizer()
DEMOS = [{"prompt": "the movie was", "response": f" {w} and very fun"} for w in ("great", "good", "not dull")]
PAIRS = [{"prompt": "the movie is", "chosen": f" good{' and fun' * i}", "rejected": " bad"} for i in range(3)]
RANKED = [{"prompt": p, "responses": [" good and fun", " bad", " dull"], "scores": [2, 1, 0]} for p in ("the", "a")]
TRAINERS = {
    "packed": (rf.SFTTrainer, rf.SFTConfig, {"data": DEMOS}, {"packing": True}),
    "rrhf": (rf.RRHFTrainer, rf.RRHFConfig, {"data": RANKED}, {}),
    "rrhf in two passes": (rf.RRHFTrainer, rf.RRHFConfig, {"data": RANKED}, {"micro_batch_size": 2}),
    "dpo": (rf.DPOTrainer, rf.DPOConfig, {"data": PAIRS, "reference": tiny_gpt2(seed=1)}, {}),
    "distill": (rf.DistillTrainer, rf.DistillConfig, {"data": DEMOS, "teacher": tiny_gpt2(seed=1)}, {}),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_bfloat16_has_the_numbers_of_float32_to_its_three_digits(name):
    trainer_class, config_class, given, options = TRAINERS[name]
    found = []
    for precision in ("fp32", "bf16"):
        config = config_class(precision=precision, learning_rate=1e-3, quiet=True, max_grad_norm=1e9, **options)
        trainer = trainer_class(tiny_gpt2(), tokenizer=TOKENIZER, config=config, **given)
        before, taken = copy.deepcopy(trainer.model.state_dict()), []
        update = trainer.optimizer.step
        trainer.optimizer.step = lambda: (taken.append(flat(trainer.model)), update())  # noqa: B023
        stats = trainer.step(next(trainer.batches()))
        after = trainer.model.state_dict()
        assert {weight.dtype for weight in after.values()} == {torch.float32}
        assert any(not torch.equal(before[name], weight) for name, weight in after.items())
        found.append((stats["loss"], taken[0]))
    (loss, slope), (rounded, rough) = found
    assert rounded == pytest.approx(loss, rel=2e-2)
    assert rounded != loss
    assert torch.nn.functional.cosine_similarity(slope, rough, dim=0) > 0.99


def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])
