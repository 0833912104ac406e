"""The trainers on a GPU against the same on the CPU, which the other tests hold to float64 and to the papers."""

import copy
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from tiny import accelerate_on, tiny_gpt2, tiny_llama, tiny_tokenizer

from rlhf_fast.generate import decode, generate
from rlhf_fast.models import load_policy, load_scalar_model, sequence_scores, token_logits
from rlhf_fast.trainers import online
from rlhf_fast.trainers.distill import DistillConfig, DistillTrainer
from rlhf_fast.trainers.dpo import DPOConfig, DPOTrainer
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer
from rlhf_fast.trainers.reward import RewardConfig, RewardTrainer
from rlhf_fast.trainers.rrhf import RRHFConfig, RRHFTrainer
from rlhf_fast.trainers.sft import SFTConfig, SFTTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: runs in `make gpu-check`")
TOKENIZER = tiny_tokenizer()
DEMOS = [
    {"prompt": "the movie was", "response": " great and very fun"},
    {"prompt": "the", "response": " plot"},
    {"prompt": "I like this movie and I", "response": " hate this plot"},
    {"text": "this is good"},
]
PAIRS = [{"prompt": "the movie is", "chosen": f" good{' and fun' * i}", "rejected": " bad"} for i in range(4)]
RANKED = [{"prompt": p, "responses": [" good and fun", " bad", " dull"], "scores": [2, 1, 1]} for p in ("the", "a")]
RANKINGS = [
    {"prompt": "the", "responses": [" good", " bad", " fun"][: i + 1], "scores": [2, 0, 1][: i + 1]} for i in range(4)
]
STEPS = [{"prompt": "the", "steps": [" good", " bad"], "labels": [i % 2, None if i else 0.5]} for i in range(4)]
JUDGED = {"reward": PAIRS, "ranking": RANKINGS, "process": STEPS}
PADDED = ["sft", *JUDGED, "rrhf", "dpo", "distill", "own", "ppo"]
KINDS = PADDED + [f"{kind} packed" for kind in PADDED]
PROMPTS = [{"prompt": p} for p in ("the movie", "a plot was very", "I like this", "the")]


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    with accelerate_on("cuda"):
        yield


def length_score(prompts, responses, **columns):
    return [float(len(text) % 7) - 3.0 for text in responses]


def build(kind, make=tiny_gpt2, precision="fp32"):
    kind, packing = kind.removesuffix(" packed"), kind.endswith(" packed")
    common = {"learning_rate": 1e-3, "precision": precision, "quiet": True, "packing": packing}
    if kind == "sft":
        config = SFTConfig(batch_size=4, micro_batch_size=3, **common)
        return SFTTrainer(make(TOKENIZER), data=DEMOS, tokenizer=TOKENIZER, config=config, eval_data=DEMOS)
    if kind in JUDGED:
        config = RewardConfig(batch_size=4, micro_batch_size=3, **common)
        given = {"data": JUDGED[kind], "eval_data": JUDGED[kind]}
        return RewardTrainer(make(TOKENIZER), tokenizer=TOKENIZER, config=config, **given)
    given = {"tokenizer": TOKENIZER}
    if kind == "rrhf":  # the three answers to a prompt do not fit in one pass
        config = RRHFConfig(batch_size=2, micro_batch_size=2, **common)
        return RRHFTrainer(make(TOKENIZER), data=RANKED, config=config, eval_data=RANKED, **given)
    if kind == "dpo":
        config = DPOConfig(batch_size=4, micro_batch_size=3, **common)
        return DPOTrainer(make(TOKENIZER), data=PAIRS, config=config, eval_data=PAIRS, **given)
    if kind in ("distill", "own"):
        config = DistillConfig(batch_size=4, micro_batch_size=3, max_new_tokens=8, **common)
        given |= {"teacher": make(TOKENIZER, seed=1), "reward": length_score, "eval_data": DEMOS[:3]}
        given |= {"prompts": PROMPTS} if kind == "own" else {"data": DEMOS[:3]}
        return DistillTrainer(make(TOKENIZER), config=config, **given)
    config = PPOConfig(
        batch_size=4, minibatch_size=4, micro_batch_size=3, ppo_epochs=1, max_new_tokens=8, steps=3,
        entropy_coef=0.01, whiten_rewards=True, missing_eos_penalty=1.0, **common,
    )  # fmt: skip
    return PPOTrainer(make(TOKENIZER), reward=length_score, prompts=PROMPTS, tokenizer=TOKENIZER, config=config)


def first_step(kind, make, device):
    """The statistics of one step and of an evaluation after it."""
    with accelerate_on(device):
        trainer = build(kind, make)
        assert trainer.accelerator.device.type == device
        stats = trainer.step(next(trainer.batches()))
        return stats if kind.startswith("ppo") else stats | trainer.evaluate()


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_numbers_of_the_cpu(kind, make):
    expected, found = (first_step(kind, make, device) for device in ("cpu", "cuda"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # float32 sums in another order; a gradient's norm adds up thousands of them.
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_steps_and_keeps_float32_weights(kind):
    trainer = build(kind, precision="bf16")
    model = trainer.policy if kind.startswith("ppo") else trainer.model
    before = copy.deepcopy(model.state_dict())
    assert math.isfinite(trainer.step(next(trainer.batches()))["loss"])
    after = model.state_dict()
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert {weight.device.type for weight in after.values()} == {"cuda"}
    assert any(not torch.equal(before[name], weight) for name, weight in after.items())


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_padding_moves_no_number_and_no_gradient(make):
    """The attention kernels of a GPU are others: rows that are masked as a whole must not leak NaN."""
    torch.manual_seed(0)
    ids = torch.randint(3, len(TOKENIZER), (2, 9), device="cuda")
    wide = torch.nn.functional.pad(ids, (5, 3), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(ids, dtype=torch.bool), (5, 3))
    policy = load_policy(make(TOKENIZER)).cuda()
    scalar = load_scalar_model(policy)
    found = []
    for given, there, span in ((ids, torch.ones_like(ids).bool(), slice(0, 9)), (wide, mask, slice(5, 14))):
        logits, scores = token_logits(policy, given, there)[:, span], sequence_scores(scalar, given, there)
        (logits.logsumexp(-1).sum() + scores.sum()).backward()
        found.append([logits, scores, policy.get_input_embeddings().weight.grad])
        policy.zero_grad(set_to_none=True)
    for padded, plain in zip(found[1], found[0], strict=True):
        assert padded.isfinite().all()
        torch.testing.assert_close(padded, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_greedy_decoding_equals_transformers(make):
    model = load_policy(make(TOKENIZER)).cuda().eval()
    ids = torch.tensor([[0, 0, 20, 30], [40, 50, 60, 70]], device="cuda")
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], device="cuda").bool()
    theirs = model.generate(ids, attention_mask=mask.long(), max_new_tokens=12, do_sample=False, pad_token_id=0)[:, 4:]
    ours = decode(model, ids, mask, max_new_tokens=12, stop_ids=[TOKENIZER.eos_token_id], pad_id=0, temperature=0)
    for row, other, there in zip(ours.responses, theirs, ours.mask, strict=True):
        assert torch.equal(row[there], other[: len(there)][there])
    for device in ("cuda", "cpu"):  # a module stays where it is
        assert len(generate(model.to(device), ["the movie"], tokenizer=TOKENIZER, max_new_tokens=4, seed=0)) == 1
        assert next(model.parameters()).device.type == device


def test_a_minibatch_waits_once_for_the_gpu():
    """Not counted: what transformers looks at to make its attention mask."""
    trainer = build("ppo")
    rollout = trainer.rollout(trainer.prompts)
    rewards, rows = trainer.score(rollout), torch.arange(4)
    online.accumulate(trainer, rollout, (rewards, rewards), rows)  # the first one allocates
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            online.accumulate(trainer, rollout, (rewards, rewards), rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]
    assert len([place for place in waits if "rlhf_fast/" in place]) == 1, waits


def test_the_demo_runs(tmp_path):
    from rlhf_fast.demo import run_demo
    from rlhf_fast.demo.config import quick

    results = run_demo(quick(str(tmp_path / "demo"), seed=7))
    assert all(math.isfinite(value) for value in results["figures"].values())
    assert results["environment"]["processor"] == torch.cuda.get_device_name()
