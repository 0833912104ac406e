"""The steps of TRL's last PPO trainer: as docs/from-trl-ppo.md says, like ours, and the same under rf.patch("trl").

test_trl_ppo.py runs this file, in a process that finds a TRL with that trainer.
"""

import copy
import gc
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_doc_pages import BLOCK, page
from tiny import tiny_gpt2, tiny_tokenizer
from torch import Tensor
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

import rlhf_fast as rf
from rlhf_fast.generate import Generation
from rlhf_fast.models import load_scalar_model, token_values

WORDS = ["good", "bad", "dull", "fun", "great", "awful", "a", "hate"]
TEXTS = [f" the {a} movie was{' ' + b if i % 2 else ''}" for i, a in enumerate(WORDS) for b in WORDS[:4]]
NO_DROPOUT = {f"{name}_pdrop": 0.0 for name in ("resid", "embd", "attn")}


@pytest.fixture(scope="module", autouse=True)
def quick_garbage():
    """TRL collects garbage twice a batch, which takes longer than its steps here: let it not look at the libraries."""
    gc.freeze()
    yield
    gc.unfreeze()


def trl_trainer(folder, *, pad_is_eos=False, prompts=24, **options):
    """TRL's trainer of a tiny model: 8 responses to a batch, read 4 at a time. SGD, so that rounding stays rounding."""
    torch.manual_seed(0)  # the scalar heads are new
    tokenizer = tiny_tokenizer(pad_is_eos)
    tokenizer.padding_side = "left"
    sizes = {"output_dir": str(folder), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    sizes |= {"total_episodes": 16, "num_ppo_epochs": 2, "response_length": 6, "temperature": 0.7}
    quiet = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "optim": "sgd"}
    scorers = [load_scalar_model(tiny_gpt2(tokenizer, seed=seed, **NO_DROPOUT)) for seed in (3, 4)]
    return PPOTrainer(
        args=PPOConfig(**(sizes | quiet | {"learning_rate": 0.1} | options)),
        processing_class=tokenizer,
        model=tiny_gpt2(tokenizer, seed=1, **NO_DROPOUT),
        ref_model=tiny_gpt2(tokenizer, seed=2, **NO_DROPOUT),
        reward_model=scorers[0],
        value_model=scorers[1],
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(TEXTS[:prompts])["input_ids"]}),
    )


def ending(trainer, logit=5.0):
    """Let its policy draw the end token in about one of five tokens, and the pad token in none."""
    tokenizer, head = trainer.processing_class, trainer.policy_model.lm_head.weight.detach()
    for token, more in ((tokenizer.eos_token_id, logit), (tokenizer.convert_tokens_to_ids("<pad>"), -9.0)):
        trainer.policy_model.transformer.ln_f.bias.data += more * head[token] / head[token].square().sum()


def train(trainer):
    """Its updates, from the same random numbers each time; returns what it logged, without the times."""
    np.random.seed(0)  # TRL shuffles with NumPy, and seeds PyTorch alone
    torch.manual_seed(0)
    trainer.train()
    return [{k: v for k, v in row.items() if k != "eps"} for row in trainer.state.log_history]


def parameters(*models) -> Tensor:
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])


def watch(monkeypatch, name) -> list[SimpleNamespace]:
    """The tensors that TRL's ``train`` holds whenever it calls ``name`` of its module, with the result of that call."""
    function, kept = getattr(ppo_trainer, name), []

    def watching(*args, **kwargs):
        found = function(*args, **kwargs)
        frame = sys._getframe(1)
        if frame.f_code.co_name == "train":
            held = {k: torch.tensor(v) for k, v in frame.f_locals.items() if isinstance(v, np.ndarray)}
            held |= {k: v.detach().clone() for k, v in frame.f_locals.items() if isinstance(v, Tensor)}
            kept.append(SimpleNamespace(**held, found=found))
        return found

    monkeypatch.setattr(ppo_trainer, name, watching)
    return kept


@pytest.mark.parametrize("options", [{}, {"kl_estimator": "k3", "stop_token": "eos", "missing_eos_penalty": 1.0}])
def test_the_trainer_takes_the_same_steps_with_a_patch(tmp_path, options, monkeypatch):
    theirs = trl_trainer(tmp_path, **options)
    start = parameters(theirs.policy_model, theirs.value_model)
    expected = train(theirs)
    calls = []
    monkeypatch.setattr("rlhf_fast.integrations.trl.logprobs", lambda *a, **k: calls.append(1) or rf.logprobs(*a, **k))
    ours, own = trl_trainer(tmp_path, **options), ppo_trainer.selective_log_softmax
    with rf.patch("trl"):
        assert ppo_trainer.selective_log_softmax is not own
        found = train(ours)
    assert ppo_trainer.selective_log_softmax is own
    assert len(calls) == 2 * (2 + 2 * 2)  # batches: policy and reference, then two passes in two micro-batches
    assert len(found) == len(expected) == 2
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-4)
    after, before = (parameters(t.policy_model, t.value_model) for t in (ours, theirs))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert (after - start).abs().max() > 0.01


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Two updates on responses of several lengths: the trainer, what it logged, its batches and its micro-batches."""
    with pytest.MonkeyPatch.context() as patch:
        batches, means = watch(patch, "masked_whiten"), watch(patch, "masked_mean")
        folder = tmp_path_factory.mktemp("ragged")
        trainer = trl_trainer(folder, stop_token="eos", response_length=12, gamma=0.9, kl_coef=0.3, temperature=1.0)
        ending(trainer)
        logged = train(trainer)
    micro = means[3::4]  # of its four means the last
    assert (len(batches), len(micro)) == (2, 8)
    return SimpleNamespace(trainer=trainer, logged=logged, batches=batches, micro=micro)


def masks(trainer, responses) -> tuple[Tensor, Tensor]:
    """What counts, up to and including the end token; and one column more."""
    ends = responses == trainer.processing_class.eos_token_id
    mask = ends.cumsum(1) - ends.long() == 0
    return mask, torch.arange(responses.shape[1]) <= mask.sum(1, keepdim=True)


def test_its_masks_rewards_and_advantages_are_those_of_the_function_of_the_page(ragged):
    names = {"rf": rf}
    exec(next(block["code"] for block in BLOCK.finditer(page("from-trl-ppo.md")) if "def " in block["code"]), names)
    lengths = set()
    for b in ragged.batches:
        mask, wider = masks(ragged.trainer, b.responses)
        lengths |= set(mask.sum(1).tolist())
        assert torch.equal(mask, ~b.padding_mask)
        assert torch.equal(wider, ~b.padding_mask_p1)
        given = (b.scores, b.logprobs, b.ref_logprobs)
        torch.testing.assert_close(rf.shape_rewards(*given, mask, kl_coef=0.3, at="next"), b.rewards)
        advantages, returns, found = names["trl_advantages"](*given, b.values, mask, kl_coef=0.3, gamma=0.9)
        assert torch.equal(found, wider)
        torch.testing.assert_close(advantages, b.found.masked_fill(~mask, 0), rtol=0, atol=1e-5)
        torch.testing.assert_close(returns, torch.where(wider, b.returns, 0))
        more = 9.0 * (mask.sum(1) < mask.shape[1])  # of a score behind the mask `advantages` sees nothing
        some = [
            rf.advantages(x, *given[1:], b.values, mask, kl_coef=0.3, at="next") for x in (given[0], given[0] + more)
        ]
        assert torch.equal(some[0].advantages, some[1].advantages)
    assert len(lengths) > 3
    assert min(lengths) < 12


def test_it_reads_the_score_at_the_last_token(ragged):
    for b in ragged.batches:
        mask, _ = masks(ragged.trainer, b.responses)
        ids = torch.cat([b.queries, torch.where(mask, b.responses, 0)], 1)  # the pad token is 0
        read = token_values(ragged.trainer.reward_model, ids, ids != 0)[:, b.queries.shape[1] :]
        torch.testing.assert_close(read.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0], b.scores)


def test_its_losses_are_ours_with_those_masks(ragged):
    for m in ragged.micro:
        mask, wider = ~m.padding_mask[m.micro_batch_inds], ~m.padding_mask_p1[m.micro_batch_inds]
        given = (m.new_logprobs, m.mb_logprobs, m.mb_advantage)
        now = {"values": m.vpred, "old_values": m.mb_values, "returns": m.mb_return}
        policy, value = (rf.ppo_loss(*given, tokens, **now).stats for tokens in (mask, wider))
        found = (policy["policy_loss"], policy["clipfrac"], value["value_loss"], value["value_clipfrac"])
        torch.testing.assert_close(found, (m.pg_loss, m.found, m.vf_loss, m.vf_clipfrac))


def test_its_figures_are_means_over_the_padding_too(ragged):
    for row, some in zip(ragged.logged, (ragged.micro[:4], ragged.micro[4:]), strict=True):
        assert any(m.padding_mask[m.micro_batch_inds].any() for m in some)
        each = {
            "policy/approxkl_avg": [0.5 * (m.new_logprobs - m.mb_logprobs).square().mean() for m in some],
            "policy/entropy_avg": [torch.distributions.Categorical(logits=m.logits).entropy().mean() for m in some],
            "val/ratio": [m.ratio.mean() for m in some],
            "loss/policy_avg": [m.pg_loss for m in some],  # a mean over the tokens that count
        }
        for name, numbers in each.items():
            assert row[name] == pytest.approx(torch.stack(numbers).mean().item(), rel=1e-4, abs=1e-6)
        assert row["val/ratio_var"] == pytest.approx(torch.stack(each["val/ratio"]).var().item(), rel=1e-3)


def test_it_whitens_rewards_with_one_column_more(tmp_path, monkeypatch):
    calls = watch(monkeypatch, "masked_whiten")
    trainer = trl_trainer(tmp_path, stop_token="eos", response_length=12, temperature=1.0, whiten_rewards=True)
    ending(trainer)
    train(trainer)
    for b in calls[::2]:  # in turn with the advantages
        mask, wider = masks(trainer, b.responses)
        assert not torch.equal(mask, wider)
        torch.testing.assert_close(b.found.masked_fill(~wider, 0), rf.whiten(b.rewards, wider, shift_mean=False))


class Written:
    """A generator that writes what TRL's trainer wrote."""

    def __init__(self, batches, eos) -> None:
        self.batches, self.eos = iter(batches), eos

    def sync(self, policy) -> None: ...

    def write(self, policy, prompt_ids, prompt_mask, **_) -> Generation:
        b = next(self.batches)
        assert torch.equal(torch.where(prompt_mask, prompt_ids, 0), torch.where(b.queries != 0, b.queries, 0))
        mask = torch.ones_like(b.responses, dtype=torch.bool)
        return Generation(b.responses, mask, b.logprobs, (b.responses == self.eos).any(1))


SAME = {  # TRL's figure → ours, where the page names no difference for responses of full length
    "objective/rlhf_reward": "rewards", "policy/approxkl_avg": "approx_kl",
    "val/ratio": "ratio_mean", "policy/entropy_avg": "entropy", "policy/clipfrac_avg": "clipfrac",
    "val/clipfrac_avg": "value_clipfrac", "loss/policy_avg": "policy_loss", "loss/value_avg": "value_loss", "lr": "lr",
}  # fmt: skip


@pytest.mark.parametrize(("estimator", "whitens"), [("k1", False), ("k3", True)])
def test_our_trainer_takes_its_steps_with_the_fields_of_the_table(tmp_path, estimator, whitens, monkeypatch):
    """Two steps on the same responses with the same scores: the same figures and weights, where TRL stops nowhere."""
    batches = watch(monkeypatch, "masked_whiten")
    both = {"missing_eos_penalty": 0.5, "gamma": 0.95, "lam": 0.9, "vf_coef": 0.3, "whiten_rewards": whitens}
    theirs = trl_trainer(tmp_path, kl_estimator=estimator, **both)
    ending(theirs, logit=4.0)
    copies = [copy.deepcopy(m) for m in (theirs.policy_model, theirs.ref_model, theirs.value_model)]
    logged, eos = train(theirs), theirs.processing_class.eos_token_id
    batches = batches[1::2] if whitens else batches
    scores = iter([b.scores + 0.5 * ~b.contain_eos_token for b in batches])
    config = rf.PPOConfig(
        steps=2, batch_size=8, minibatch_size=8, micro_batch_size=4, ppo_epochs=2, max_new_tokens=6, temperature=0.7,
        kl=estimator, learning_rate=0.1, warmup_ratio=0.0, old_logprobs="sampler", max_grad_norm=1e9, **both,
    )  # fmt: skip
    ours = rf.PPOTrainer(
        copies[0], reference=copies[1], critic=copies[2], reward=lambda prompts, responses: next(scores),
        prompts=[{"prompt": text} for text in TEXTS], tokenizer=theirs.processing_class, config=config,
        generator=Written(batches, eos),
    )  # fmt: skip
    assert {group["betas"] for group in ours.optimizer.param_groups} == {(0.9, 0.95)}
    ours.optimizer = torch.optim.SGD([group | {"peak": 0.1} for group in ours.optimizer.param_groups], lr=0.1)
    known = {tuple(prompt.ids): prompt for prompt in ours.prompts}
    for b, row in zip(batches, logged, strict=True):
        stats = ours.step([known[tuple(i for i in query.tolist() if i)] for query in b.queries])
        found, expected = ({a: of[n] for a, n in SAME.items()} for of in (stats, {SAME[k]: row[k] for k in SAME}))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        # With k3 the estimate in the rewards, where ours is the difference of the logprobs.
        price = row["objective/kl"] if estimator == "k1" else (b.logprobs - b.ref_logprobs).sum(1).mean().item()
        assert stats["kl"] == pytest.approx(price, abs=1e-4)
        assert row["objective/non_score_reward"] == pytest.approx(-0.05 * row["objective/kl"])
        assert row["objective/entropy"] == pytest.approx(-b.logprobs.sum(1).mean().item())
        assert row["val/num_eos_tokens"] == (b.responses == eos).sum()
        assert stats["scores"] == pytest.approx(row["objective/scores"] + 0.5 * (1 - stats["ended"]), abs=1e-5)
    assert sum((b.responses[:, :-1] == eos).sum() for b in batches) > 2  # and TRL wrote on
    for mine, its in ((ours.policy, theirs.policy_model), (ours.critic, theirs.value_model)):
        torch.testing.assert_close(parameters(mine), parameters(its), rtol=0, atol=1e-4)


@pytest.mark.parametrize("minibatches", [1, 2, 4])
def test_the_optimizer_steps_once_a_pass_whatever_the_minibatches(tmp_path, minibatches, monkeypatch):
    """But after every micro-batch in the last batch of a pass over the prompts; and no gradient is clipped."""
    trainer = trl_trainer(
        tmp_path, prompts=32, total_episodes=32, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        num_mini_batches=minibatches, response_length=2, max_grad_norm=1e-6, learning_rate=1e-3,
    )  # fmt: skip
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", None)
    steps = []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(len(trainer.state.log_history)))
    logged = train(trainer)
    assert [steps.count(batch) for batch in range(4)] == [2, 2, 2, 8]
    assert [row["val/ratio"] for row in logged] == pytest.approx([1 / minibatches] * 4, rel=0.05)


def test_a_tokenizer_that_pads_with_its_end_token_hides_every_end(tmp_path, monkeypatch):
    batches = watch(monkeypatch, "masked_whiten")
    trainer = trl_trainer(tmp_path, pad_is_eos=True, stop_token="eos", response_length=12)
    ending(trainer, logit=6.0)
    train(trainer)
    for b in batches:
        ends = b.responses == trainer.processing_class.eos_token_id
        assert ends.any(1).sum() > 2
        assert b.padding_mask[ends].all()


def test_what_trl_computes_and_what_the_page_says_of_it(tmp_path):
    state = np.random.get_state()[1].copy()
    args = trl_trainer(tmp_path, total_episodes=17).args
    assert (np.random.get_state()[1] == state).all()  # not seeded
    assert args.num_total_batches == 3  # rounded up
    sizes = ("batch_size", "local_batch_size", "mini_batch_size", "local_mini_batch_size")
    assert [getattr(args, name) for name in (*sizes, "micro_batch_size", "world_size")] == [8, 8, 8, 8, 4, 1]
    trainer = trl_trainer(tmp_path, total_episodes=None, optim=PPOConfig(str(tmp_path), use_cpu=True).optim)
    assert trainer.args.total_episodes == 3 * 24
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    group = trainer.optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.999), 0.0)
