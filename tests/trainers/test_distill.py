"""Distillation: the loss against float64 one sequence at a time, on given responses and on the student's own."""

import copy
import json

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

import rlhf_fast as rf
from rlhf_fast.trainers.distill import DistillConfig, DistillTrainer

DEMOS = [
    {"prompt": "the movie was", "response": " great and very fun", "wish": "fun"},
    {"prompt": "the", "response": " plot", "wish": "plot"},
    {"prompt": "I like this movie and I", "response": " hate this plot", "wish": ""},
    {"prompt": "", "response": " dull awful bad plot", "wish": None},  # no prompt
]
PROMPTS = [{"prompt": f"{w} {v}"} for w in (" the movie", " this plot", " I", " a Bot") for v in ("was", "is not")]


def build(*, make=tiny_gpt2, pad_is_eos=False, teacher=None, tokenizer=None, model=None, **config):
    tokenizer = tokenizer or tiny_tokenizer(pad_is_eos)
    sources = {n: config.pop(n) for n in ("data", "prompts", "eval_data", "reward", "output_dir") if n in config}
    sources = sources if {"data", "prompts"} & set(sources) else {"data": DEMOS} | sources
    settings = {"batch_size": 4, "quiet": True, "learning_rate": 1e-3, **config}
    return DistillTrainer(
        model or make(tokenizer), teacher=teacher or make(tokenizer, seed=5), tokenizer=tokenizer,
        config=DistillConfig(**settings), **sources,
    )  # fmt: skip


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def by_hand(trainer, examples, *, kind="forward", soft_temperature=1.0, alpha=1.0, advantages=None):
    """The formulas in float64, one sequence at a time: loss, divergence and gradient."""
    student, teacher = (copy.deepcopy(m).double() for m in (trainer.model, trainer.teacher))
    student.zero_grad()
    divergences, gains = [], []
    for n, example in enumerate(examples):
        ids = torch.tensor([example.ids])
        z, w = student(ids).logits[0], teacher(ids).logits[0].detach()
        for i in range(1, len(example.ids)):
            if not example.mask[i]:
                continue
            p, q = ((x[i - 1] / soft_temperature).softmax(-1) for x in (z, w))
            m = (p + q) / 2
            divergences.append({
                "forward": (q * (q / p).log()).sum(),
                "reverse": (p * (p / q).log()).sum(),
                "jsd": (p * (p / m).log()).sum() / 2 + (q * (q / m).log()).sum() / 2,
            }[kind])  # fmt: skip
            if advantages is not None:
                gain = advantages[n] if advantages.dim() == 1 else advantages[n, sum(example.mask[1:i])]
                gains.append(gain * z[i - 1].log_softmax(-1)[example.ids[i]])
    divergence = torch.stack(divergences).mean()
    loss = alpha * soft_temperature**2 * divergence - (torch.stack(gains).mean() if gains else 0)
    loss.backward()
    return loss.item(), divergence.item(), gradient(student)


def step_of(trainer, batch):
    taken = []
    trainer.optimizer.step = lambda: taken.append(gradient(trainer.model))
    return trainer.step(batch), taken[0]


OPTIONS = [{}, {"kind": "reverse", "soft_temperature": 2.0}, {"kind": "jsd", "alpha": 0.5, "soft_temperature": 0.7}]


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("micro", [None, 1, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_loss_and_gradient_whatever_the_micro_batches(make, pad_is_eos, micro, options):
    trainer = build(make=make, pad_is_eos=pad_is_eos, micro_batch_size=micro, max_grad_norm=1e9, **options)
    loss, divergence, slope = by_hand(trainer, trainer.examples, **options)
    stats, taken = step_of(trainer, trainer.examples)
    assert (stats["loss"], stats["divergence"]) == pytest.approx((loss, divergence), rel=1e-5)
    assert stats["tokens"] == sum(sum(e.mask[1:]) for e in trainer.examples)
    # float32 passes against float64 ones: some 1e-6 of the largest entry.
    assert (taken - slope).abs().max() < 1e-5 * slope.abs().max()


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_reward_is_an_advantage(micro, options):
    seen = []

    def reward(prompts, responses, wish):
        seen.append((prompts, responses, wish))
        return [3.0, -1.0, 0.5, 7.5]

    trainer = build(reward=reward, micro_batch_size=micro, max_grad_norm=1e9, **options)
    scores = torch.tensor([3.0, -1.0, 0.5, 7.5]).double()
    advantages = (scores - scores.mean()) / scores.std()
    loss, divergence, slope = by_hand(trainer, trainer.examples, advantages=advantages, **options)
    stats, taken = step_of(trainer, trainer.examples)
    assert (stats["loss"], stats["divergence"], stats["scores"]) == pytest.approx((loss, divergence, 2.5), rel=2e-5)
    assert (taken - slope).abs().max() < 2e-5 * slope.abs().max()
    assert seen == [tuple([d[name] for d in DEMOS] for name in ("prompt", "response", "wish"))]


@pytest.mark.parametrize("micro", [None, 1])
def test_a_reward_per_token_is_an_advantage(micro):
    """What is still to come at each of the 5, 2, 4 and 4 tokens, end tokens included, standardised over all of them."""
    rewards = torch.tensor([[1.0, 0, -2, 0, 4], [3, 1, 9, 9, 9], [0, 0, 0, 5, 9], [-1, -1, -1, -1, 9]])
    trainer = build(reward=lambda p, r, **_: rewards, micro_batch_size=micro, max_grad_norm=1e9)
    to_go = [[3.0, 2, 2, 4, 4], [4, 1], [5, 5, 5, 5], [-4, -3, -2, -1]]
    assert [sum(example.mask[1:]) for example in trainer.examples] == [5, 2, 4, 4]
    flat = torch.tensor([x for row in to_go for x in row]).double()
    standard = [(torch.tensor(row) - flat.mean()) / flat.std() for row in to_go]
    advantages = torch.nn.utils.rnn.pad_sequence(standard, batch_first=True)
    loss, divergence, slope = by_hand(trainer, trainer.examples, advantages=advantages)
    stats, taken = step_of(trainer, trainer.examples)
    assert (stats["loss"], stats["divergence"], stats["scores"]) == pytest.approx((loss, divergence, 2.0), rel=2e-5)
    assert (taken - slope).abs().max() < 2e-5 * slope.abs().max()


def test_an_ensemble_says_how_much_it_disagrees():
    members = [lambda p, r, **_: [0.0, 1, 2, 3], lambda p, r, **_: [2.0, 1, 2, 7]]
    trainer = build(reward=members)
    stats = trainer.step(trainer.examples)
    assert stats["scores"] == pytest.approx((1 + 1 + 2 + 5) / 4)
    assert stats["uncertainty"] == pytest.approx((2 + 4) / 4 / 2**0.5)
    own = build(
        reward=[lambda p, r: [1.0] * 3, lambda p, r: [2.0] * 3], prompts=PROMPTS, batch_size=3, max_new_tokens=4
    )
    assert own.step(own.examples[:3])["uncertainty"] == pytest.approx(0.5**0.5)


def test_the_reward_model_leaves_room_for_an_end_token():
    reward = rf.models.load_scalar_model(tiny_gpt2(n_positions=12))
    own = {"reward": reward, "max_new_tokens": 6, "batch_size": 1}
    stats = (trainer := build(prompts=[{"prompt": " the" * 5}], **own)).step(trainer.examples)
    assert {"scores", "divergence"} < set(stats)
    with pytest.raises(ValueError, match="record 1: the prompt is 6 tokens long, and 5 fit"):
        build(prompts=[{"prompt": " the" * 6}], **own)


def test_equal_scores_and_one_response_are_no_advantage():
    plain = step_of(*(lambda t: (t, t.examples))(build()))[1]
    for score in (0.1, -3e7):
        trainer = build(reward=lambda p, r, score=score, **_: [score] * len(p))
        assert torch.allclose(step_of(trainer, trainer.examples)[1], plain, atol=1e-6)
    alone = build(data=DEMOS[:1], reward=lambda p, r, **_: [5.0])
    assert alone.step(alone.examples)["scores"] == 5


def test_its_own_responses_are_sampled_scored_and_learned_from():
    seen = []

    def reward(prompts, responses):
        seen.append(responses)
        return [float(len(r)) for r in responses]

    options = {"prompts": PROMPTS, "max_new_tokens": 6, "kind": "reverse", "max_grad_norm": 1e9}
    trainer = build(reward=reward, micro_batch_size=3, **options)
    batch = next(trainer.batches())
    rollout = rf.trainers.online.write(
        trainer.model, batch, trainer.tokenizer, trainer.config, stop_ids=trainer.stop_ids, step=0
    )
    examples = []
    for prompt, ids, there in zip(batch, rollout.responses, rollout.mask, strict=True):
        said = prompt.ids + ids[there].tolist()
        mask = [False] * len(prompt.ids) + [True] * int(there.sum())
        examples.append(rf.data.Example(said, mask, ""))
    scores = torch.tensor([len(t) for t in rollout.texts]).double()
    advantages = (scores - scores.mean()) / scores.std()
    loss, divergence, slope = by_hand(trainer, examples, kind="reverse", advantages=advantages)
    stats, taken = step_of(trainer, batch)
    assert seen == [rollout.texts]
    assert (stats["loss"], stats["divergence"]) == pytest.approx((loss, divergence), rel=2e-5)
    assert (taken - slope).abs().max() < 2e-5 * slope.abs().max()
    assert stats["response_length"] == rollout.mask.sum(1).float().mean()


def test_evaluation_is_the_mean_over_all_tokens_whatever_the_batches():
    trainer = build(soft_temperature=2.0)
    expected = by_hand(trainer, trainer.examples, soft_temperature=2.0)[1]
    for size in (1, 3):
        found = build(soft_temperature=2.0, eval_data=DEMOS, batch_size=size, reward=lambda p, r, **_: [0.0] * len(p))
        assert found.evaluate()["eval_divergence"] == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A model that answers with two of the words of its prompt the other way round."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    tokenizer = tiny_tokenizer()
    data = [{"prompt": f" {a} {b}", "response": f" {b} {a}"} for a in ("good", "bad") for b in ("movie", "plot", "Bot")]
    config = rf.SFTConfig(epochs=60, batch_size=3, learning_rate=1e-2, quiet=True)
    rf.SFTTrainer(tiny_gpt2(tokenizer), data=data, tokenizer=tokenizer, config=config, output_dir=folder).train()
    return folder, data


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_teacher_is_learned(tmp_path, teacher, kind):
    folder, demos = teacher
    options = {"kind": kind, "learning_rate": 1e-2, "epochs": 100, "batch_size": 3, "eval_data": demos}
    trainer = build(model=tiny_gpt2(seed=8), teacher=str(folder), data=demos, output_dir=tmp_path / "run", **options)
    before = trainer.evaluate()["eval_divergence"]
    metrics = trainer.train()
    assert metrics["eval_divergence"] < 0.05 * before
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"loss", "divergence", "tokens", "lr", "grad_norm"} < set(lines[0])
    prompts = [demo["prompt"] for demo in demos]
    written = rf.generate(str(tmp_path / "run"), prompts, max_new_tokens=4, temperature=0.0)
    assert written == [demo["response"] for demo in demos]


def test_a_teacher_is_learned_on_the_student_s_own_responses_and_a_reward_with_it(teacher):
    folder, demos = teacher

    def reward(prompts, responses):
        return [float(r.startswith(" plot")) for r in responses]

    prompts = [{"prompt": demo["prompt"]} for demo in demos]
    options = {"prompts": prompts, "learning_rate": 1e-2, "steps": 60, "batch_size": 12, "max_new_tokens": 3}
    plain = build(model=tiny_gpt2(seed=8), teacher=str(folder), eval_data=demos, **options)
    before = plain.evaluate()["eval_divergence"]
    assert plain.train()["eval_divergence"] < 0.2 * before
    paid = build(model=tiny_gpt2(seed=8), teacher=str(folder), reward=reward, alpha=0.1, **options)
    paid.train()
    asked = [demo["prompt"] for demo in demos] * 10
    shares = [
        sum(reward(asked, rf.generate(t.model, asked, tokenizer=t.tokenizer, max_new_tokens=3, seed=1))) / len(asked)
        for t in (plain, paid)
    ]
    assert shares[0] < 0.5
    assert shares[1] > 0.9


def test_what_cannot_be_distilled(tmp_path):
    with pytest.raises(ValueError, match="either from data, given responses, or from prompts"):
        build(data=DEMOS, prompts=PROMPTS)
    more = tiny_gpt2()
    more.resize_token_embeddings(400)
    with pytest.raises(ValueError, match="must share the vocabulary: they have 400 and 327 tokens"):
        build(teacher=more)
    other = tiny_tokenizer()
    other.add_tokens(["<more>"])
    tiny_gpt2(other).save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must share the vocabulary: the tokenizer of .* has other tokens"):
        build(teacher=str(tmp_path))
    with pytest.raises(rf.data.DataError, match='record 1: "prompt" is missing'):
        build(data=[{"text": "a movie"}], reward=lambda p, r: [0.0])
    bad = build(reward=lambda p, r, **_: torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"must return \[B\] or \[B, T\] of \[4, 5\], got shape \[4, 2\]"):
        bad.step(bad.examples)


def test_a_head_may_have_rows_for_no_token(tmp_path):
    """The same tokenizer under heads of 327 and of 384 rows: what no token has plays no part."""
    tokenizer = tiny_tokenizer()
    padded = tiny_gpt2(tokenizer, seed=5)
    padded.resize_token_embeddings(384)
    padded.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = build(teacher=str(tmp_path)).step(build().examples)
    expected = build().step(build().examples)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_reward_that_raises_names_the_prompt_and_its_batch_can_be_skipped():
    def reward(prompts, responses, **_):
        return [1 / (len(p) - 3) for p in prompts]  # of "the"

    trainer = build(reward=reward)
    with pytest.raises(ValueError, match=r"the reward raised ZeroDivisionError.*prompt 2 of 4: 'the'"):
        trainer.step(trainer.examples)
    trainer = build(reward=reward, skip_failed_rewards=True)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.warns(UserWarning, match="step 1 is skipped: the reward raised ZeroDivisionError"):
        assert trainer.step(trainer.examples) == {"skipped": 1.0}
    assert (trainer.done, trainer.updates) == (1, 0)
    assert all(torch.equal(before[name], weight) for name, weight in trainer.model.state_dict().items())
    assert trainer.step(trainer.examples[2:])["skipped"] == 1.0
