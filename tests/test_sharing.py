"""Policy, reference and critic that share weights: what they weigh, compute and learn."""

import copy

import pytest
import torch
from tiny import accelerate_on, tiny_gpt2, tiny_llama, tiny_tokenizer

import rlhf_fast as rf
from rlhf_fast.models import load_policy, token_logits
from rlhf_fast.sharing import check_share, freeze, shared_copy

TOKENIZER = tiny_tokenizer()
PROMPTS = [{"prompt": f"the {w} was"} for w in ("movie", "plot", "good", "dull")]
NUMBERS = {"steps": 2, "batch_size": 4, "minibatch_size": 2, "max_new_tokens": 6, "quiet": True, "learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def on_the_cpu():
    with accelerate_on("cpu"):
        yield


def build(share, model=None, folder=None, **numbers):
    def reward(prompts, responses):
        return [float(len(r)) for r in responses]

    return rf.PPOTrainer(
        model or tiny_gpt2(n_layer=12), reward=reward, prompts=PROMPTS, tokenizer=TOKENIZER, output_dir=folder,
        config=rf.PPOConfig(**{**NUMBERS, "share": share, "lora_rank": 2} | numbers),
    )  # fmt: skip


def unique_bytes(*models):
    found = {p.data_ptr(): p.numel() * p.element_size() for m in models for p in m.parameters()}
    return sum(found.values())


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize(("share", "most"), [("none", 3.01), ("hydra:1", 1.35), ("hydra:2", 1.35), ("lora", 1.35)])
def test_three_models_weigh_little_more_than_one(make, share, most):
    sizes = {"n_layer": 12} if make is tiny_gpt2 else {"num_hidden_layers": 12}
    model = make(TOKENIZER, **sizes)
    alone = unique_bytes(model)
    trainer = build(share, model)
    weight = unique_bytes(trainer.policy, trainer.reference, trainer.critic) / alone
    assert weight <= most
    assert weight > (2.9 if share == "none" else 1.0)


@pytest.mark.parametrize("share", ["hydra:2", "lora"])
def test_a_step_moves_policy_and_critic_and_nothing_else(share):
    trainer = build(share)
    ids, mask = torch.arange(3, 9)[None], torch.ones(1, 6).bool()
    before = [token_logits(m, ids, mask).detach() for m in (trainer.policy, trainer.reference)]
    torch.testing.assert_close(*before, rtol=0, atol=1e-5)  # the policy starts as the reference
    values = rf.models.token_values(trainer.critic, ids, mask).detach()
    assert values.abs().max() == 0  # the head starts at zero
    frozen = {n: p.clone() for n, p in trainer.policy.named_parameters() if not p.requires_grad}
    trainer.step(trainer.prompts)
    assert torch.equal(token_logits(trainer.reference, ids, mask), before[1])
    assert not torch.equal(token_logits(trainer.policy, ids, mask), before[0])
    assert rf.models.token_values(trainer.critic, ids, mask).abs().max() > 0
    assert frozen
    assert all(torch.equal(dict(trainer.policy.named_parameters())[n], p) for n, p in frozen.items())


def test_the_gradient_of_the_top_layers_is_that_of_the_whole_model():
    """Freezing the trunk changes which weights move, not how the others would."""
    whole, part = tiny_gpt2(n_layer=4, seed=3), tiny_gpt2(n_layer=4, seed=3)
    freeze(load_policy(part), "hydra:2")
    load_policy(whole)
    ids, mask = torch.arange(3, 9)[None], torch.ones(1, 6).bool()
    for model in (whole, part):
        token_logits(model, ids, mask).square().sum().backward()
    expected = dict(whole.named_parameters())
    trained = {n: p.grad for n, p in part.named_parameters() if p.requires_grad}
    assert {n.split(".")[2] for n in trained if ".h." in n} == {"2", "3"}
    assert {n for n in trained if ".h." not in n} == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    for name, grad in trained.items():
        torch.testing.assert_close(grad, expected[name].grad)


def test_a_copy_has_the_frozen_weights_and_its_own_others():
    model = tiny_gpt2(n_layer=3)
    freeze(model, "hydra:1")
    other = shared_copy(model)
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (a is b) == (not a.requires_grad), name
        assert torch.equal(a, b)


@pytest.mark.parametrize("share", ["hydra:2", "lora"])
def test_what_is_saved_is_a_whole_model_with_the_policys_numbers(share, tmp_path):
    trainer = build(share, folder=tmp_path / "run")
    trainer.train()
    loaded = load_policy(tmp_path / "run")
    ids, mask = torch.arange(3, 9)[None], torch.ones(1, 6).bool()
    torch.testing.assert_close(token_logits(loaded, ids, mask), token_logits(trainer.policy, ids, mask))


@pytest.mark.parametrize("share", ["hydra:2", "lora"])
def test_a_checkpoint_restores_what_was_trained(share, tmp_path):
    trainer, other = build(share), build(share)
    trainer.step(trainer.prompts)
    trainer.save(tmp_path)
    other.restore(tmp_path)
    for one, two in ((trainer.policy, other.policy), (trainer.critic, other.critic)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    stats = [t.step(t.prompts)["loss"] for t in (trainer, other)]
    assert stats[0] == stats[1]


@pytest.mark.parametrize("share", ["hydra", "hydra:0", "hydra:-1", "hydra:x", "LoRA", ""])
def test_a_word_that_names_no_way_of_sharing(share):
    with pytest.raises(ValueError, match=r"PPOConfig.share must be none, lora or hydra:k"):
        rf.PPOConfig(share=share)
    check_share("x", "hydra:12")


def test_more_layers_than_there_are():
    with pytest.raises(ValueError, match="hydra:3 trains 3 layers, and GPT2LMHeadModel has 2"):
        build("hydra:3", tiny_gpt2(n_layer=2))


def test_a_reward_model_is_not_trained_along(tmp_path):
    """Its weights would start the critic, but shared are the policy's."""
    scorer = rf.models.load_scalar_model(tiny_gpt2(seed=5, n_layer=12))
    before = copy.deepcopy(scorer.state_dict())
    trainer = rf.PPOTrainer(
        tiny_gpt2(n_layer=12), reward=scorer, prompts=PROMPTS, tokenizer=TOKENIZER,
        config=rf.PPOConfig(**NUMBERS, share="hydra:1"),
    )  # fmt: skip
    trainer.step(trainer.prompts)
    assert all(torch.equal(before[k], v) for k, v in scorer.state_dict().items())
    shared = {id(p) for p in trainer.policy.parameters()} & {id(p) for p in trainer.critic.parameters()}
    assert shared
