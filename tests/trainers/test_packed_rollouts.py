"""Prompts and responses read without their padding: the numbers and gradients are those of the padded ones."""

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

import rlhf_fast as rf
from rlhf_fast.packing import ROUND, prepare, spots
from rlhf_fast.trainers import online

TOKENIZER = tiny_tokenizer()
PROMPTS = [
    {"prompt": p} for p in ("the", "the plot was very", "I like this movie and I hate", "a good", "not very fun")
]


def build(make, kind, packing):
    numbers = {
        "steps": 2,
        "max_new_tokens": 12,
        "minibatch_size": 5,
        "batch_size": 5,
        "quiet": True,
        "packing": packing,
    }
    common = {"reward": lambda prompts, responses: [float(len(r)) for r in responses], "prompts": PROMPTS}
    if kind == "grpo":
        config = rf.GRPOConfig(group_size=2, kl_coef=0.1, entropy_coef=0.01, temperature=0.9, **numbers)
        return rf.GRPOTrainer(make(TOKENIZER), tokenizer=TOKENIZER, config=config, **common)
    kl = "exact" if kind == "ppo exact" else "k1"
    config = rf.PPOConfig(ppo_epochs=1, kl=kl, entropy_coef=0.01, temperature=0.9, **numbers)
    return rf.PPOTrainer(make(TOKENIZER), tokenizer=TOKENIZER, config=config, **common)


@pytest.mark.parametrize("kind", ["ppo", "ppo exact", "grpo"])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_packed_or_padded_it_is_the_same_step(make, kind):
    seen = []
    for packing in (False, True):
        trainer = build(make, kind, packing)
        for model in trainer.learners.values():
            with torch.no_grad():  # another policy than the reference, another critic than zero
                for p in model.parameters():
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.02)
        rollout = trainer.rollout(trainer.prompts)
        rollout, scores = rollout[:2] if kind == "grpo" else (rollout, None)
        rollout.lengths = torch.arange(len(rollout)) % 5 * 3  # a model without an idea never ends
        rollout.mask = torch.arange(12) < rollout.lengths[:, None]
        if kind == "grpo":
            targets = (trainer.advantages(rollout, scores),)
        else:
            rewards = trainer.score(rollout)
            targets = rf.gae(rewards, rollout.values, rollout.mask)
        stats = online.accumulate(trainer, rollout, tuple(targets), torch.arange(len(rollout)))
        gradients = [p.grad for m in trainer.learners.values() for p in m.parameters() if p.grad is not None]
        seen.append((rollout, stats, gradients))
    (padded, stats, gradients), (packed, packed_stats, packed_gradients) = seen
    for name in ("responses", "mask", "old_logprobs", "ref_logprobs", "kl", "values"):
        torch.testing.assert_close(getattr(packed, name), getattr(padded, name), rtol=0, atol=1e-5)
    assert packed.kl.abs().max() > 1e-3 or kind == "ppo"
    assert packed_stats == pytest.approx(stats, rel=1e-4, abs=1e-5)
    for a, b in zip(packed_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("flat", [False, True])
def test_where_the_tokens_go_by_hand(flat):
    """Prompts of 2, 1 and 3 tokens padded to the left, responses of 1, 0 and 2 padded to the right with 99."""
    ids = torch.tensor([[99, 1, 2, 3, 99], [99, 99, 4, 99, 99], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    got = spots(ids, mask, torch.tensor([2, 1, 3]), torch.tensor([1, 0, 2]), flat=flat)
    rows = [[5, 6, 7, 8, 9, 1, 2, 3, 4]] if flat else [[5, 6, 7, 8, 9], [1, 2, 3, 4]]
    places = [[0, 1, 2, 3, 4, 0, 1, 2, 0]] if flat else [[0, 1, 2, 3, 4], [0, 1, 2, 0]]
    for r, (row, place) in enumerate(zip(rows, places, strict=True)):
        assert got.packed.ids[r, : len(row)].tolist() == row
        assert got.packed.positions[r, : len(row)].tolist() == place
    predicting = got.packed.ids.flatten()[got.packed.at]
    assert got.spread(predicting).tolist() == [[2, 0], [0, 0], [7, 8]]
    assert got.spread(got.packed.targets).tolist() == [[3, 0], [0, 0], [8, 9]]
    assert got.gather(torch.tensor([[11, 0], [0, 0], [12, 13]])).tolist() == [11, 12, 13] + [0] * 61
    assert got.gather(mask).tolist() == [True] * 3 + [False] * 61
    assert len(got.packed.targets) == 64  # rounded up


@pytest.mark.parametrize("flat", [False, True])
def test_no_response_has_a_token(flat):
    got = spots(torch.tensor([[1, 2, 0]]), torch.tensor([[False]]), torch.tensor([2]), torch.tensor([0]), flat=flat)
    assert got.spread(torch.full(got.packed.targets.shape, 5.0)).tolist() == [[0.0]]


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_only_the_logits_of_responses_are_computed(make, monkeypatch):
    trainer = build(make, "grpo", True)
    rollout = trainer.rollout(trainer.prompts)[0]
    shapes = []
    trainer.policy.lm_head.register_forward_hook(lambda _, given, logits: shapes.append(logits.shape))
    online.read(trainer.policy, rollout, trainer.config)
    assert [shape[:2].numel() for shape in shapes] == [-(-int(rollout.mask.sum()) // ROUND) * ROUND]


def test_a_model_whose_sequences_see_each_other_is_refused(monkeypatch):
    trainer = build(tiny_gpt2, "ppo", False)
    forward = trainer.policy.transformer.forward

    def leaking(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state.cumsum(1)
        return output

    monkeypatch.setattr(trainer.policy.transformer, "forward", leaking)
    with pytest.raises(ValueError, match="the sequences of GPT2LMHeadModel see each other when they are packed"):
        prepare([trainer.policy], torch.device("cpu"), rf.PPOConfig(packing=True))
