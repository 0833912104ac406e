"""rf.patch("openrlhf"): every replaced function against OpenRLHF's own, its actor and its maker with both."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import agree, import_with_stubs, needs
from tiny import tiny_llama
from torch._subclasses.fake_tensor import FakeTensorMode

import rlhf_fast as rf

needs("openrlhf")
needs("peft")
MODULES = ["openrlhf.models", "openrlhf.trainer.ppo_utils.experience_maker"]
import_with_stubs(MODULES, "ray", "deepspeed", "vllm", "flash_attn", "pylatexenc", "aiohttp", "torchdata")

import openrlhf.models.actor as actor  # noqa: E402
import openrlhf.models.loss as loss  # noqa: E402
import openrlhf.models.utils as utils  # noqa: E402
import openrlhf.trainer.ppo_utils.experience_maker as maker  # noqa: E402
from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402

Maker = maker.RemoteExperienceMaker
PLACES = {"log_probs_from_logits": utils, "compute_entropy": utils}
METHODS = {"gae": (Maker, "get_advantages_and_returns"), "policy": (loss.PolicyLoss, "forward"),
           "value": (loss.ValueLoss, "forward")}  # fmt: skip


def functions():
    """OpenRLHF's functions as they are now, by name."""
    found = {name: getattr(place, name) for name, place in PLACES.items()}
    return found | {name: getattr(*place) for name, place in METHODS.items()}


THEIRS = functions()


@pytest.fixture(scope="module")
def ours():
    with rf.patch("openrlhf"):
        return functions()


@pytest.fixture(autouse=True, scope="module")
def _eager():
    """OpenRLHF compiles its entropy: here its body runs as it is written."""
    with torch.compiler.set_stance("force_eager"):
        yield


def batch(seed, holes=False, rows=3, tokens=7):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(rows, tokens, generator=generator) for _ in range(3)]
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    if holes:
        mask &= torch.rand(rows, tokens, generator=generator) < 0.6
    mask[:, 0] = True
    return *tensors, mask


@settings(max_examples=40)
@given(
    rows=st.integers(1, 6),
    vocab=st.integers(1, 40),
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([1.0, 5.0]),
    temperature=st.sampled_from([1.0, 0.7]),
)
def test_logprobs_and_entropy(ours, rows, vocab, seed, scale, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(1, rows, vocab, generator=generator)
    ids = torch.randint(vocab, (1, rows), generator=generator)
    f, g = "log_probs_from_logits", "compute_entropy"
    # A copy for OpenRLHF, which divides the logits where they are.
    agree(lambda z: ours[f](z, ids, temperature), lambda z: THEIRS[f](z.clone(), ids, temperature), logits)
    agree(ours[g], THEIRS[g], logits)


def test_the_logits_are_left_alone(ours):
    logits = torch.randn(1, 3, 20)
    before = logits.clone()
    ours["log_probs_from_logits"](logits, torch.zeros(1, 3, dtype=torch.int64), 0.5)
    assert torch.equal(logits, before)
    half = logits.bfloat16()
    assert ours["compute_entropy"](half).dtype == THEIRS["compute_entropy"](half).dtype == torch.bfloat16


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**20),
    holes=st.booleans(),
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    masked=st.booleans(),
)
def test_gae(ours, seed, holes, gamma, lam, masked):
    values, rewards, _, mask = batch(seed, holes)
    given = mask.long() if masked else None
    seen = mask if masked else torch.ones_like(mask)
    found = [f["gae"](None, values, rewards, given, gamma, lam) for f in (ours, THEIRS)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a[seen], b[seen], rtol=1e-6, atol=2e-6)


COUNTS = {"dp_size": 2, "batch_num_tokens": 31.0, "global_batch_size": 9.0}


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    token_level=st.booleans(),
    counts=st.sampled_from([{}, COUNTS]),
    dual=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
)
def test_policy_loss(ours, seed, token_level, counts, dual, scale):
    logp, old, advantages, mask = batch(seed, holes=True)
    old = logp + scale * old
    module = loss.PolicyLoss(0.2, 0.28, dual_clip=dual, token_level_loss=token_level)

    def call(functions):
        return lambda x: functions["policy"](module, x, old, advantages, mask.long(), **counts)

    agree(call(ours), call(THEIRS), logp)
    assert len(call(ours)(logp)) == 5


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    token_level=st.booleans(),
    counts=st.sampled_from([{}, COUNTS]),
    clip=st.sampled_from([None, 0.3]),
)
def test_value_loss(ours, seed, token_level, counts, clip):
    values, old, returns, mask = batch(seed, holes=True)
    module = loss.ValueLoss(clip, token_level_loss=token_level)

    def call(functions):
        return lambda v: functions["value"](module, v, old, returns, mask.long(), **counts)

    agree(call(ours), call(THEIRS), values)


@pytest.mark.parametrize("options", [{"policy_loss_type": "gspo"}, {"is_correction_level": "token"}])
def test_what_the_op_has_not_runs_openrlhfs_own(ours, options):
    logp, old, advantages, mask = batch(0)
    module = loss.PolicyLoss(**options)
    found = [f["policy"](module, logp, old, advantages, mask.long(), old + 0.1) for f in (ours, THEIRS)]
    assert [x if x is None else x.item() for x in found[0]] == [x if x is None else x.item() for x in found[1]]


@pytest.mark.parametrize("name", ["policy", "value"])
def test_gradients_of_other_inputs_and_what_broadcasts_are_openrlhfs(ours, name):
    given = batch(0)
    module, mask = {"policy": loss.PolicyLoss(), "value": loss.ValueLoss(0.2)}[name], given[3].long()

    def call(functions, *x, m=mask):
        found = functions[name](module, *x, m)
        return found[0] if name == "policy" else found

    for i in range(3):
        agree(*(lambda x, f=f, i=i: call(f, *given[:i], x, *given[i + 1 : 3]) for f in (ours, THEIRS)), given[i])
    agree(*(lambda x, f=f: call(f, x, x, given[2]) for f in (ours, THEIRS)), given[0])  # one tensor in two places
    agree(*(lambda x, f=f: call(f, x, given[1][:, :1], given[2][:1]) for f in (ours, THEIRS)), given[0])
    three = [x[None] for x in given[1:3]]
    agree(*(lambda x, f=f: call(f, x[None], *three, m=mask[None]) for f in (ours, THEIRS)), given[0])


def test_autocast_on_a_gpu_makes_float32(ours):
    """No GPU is needed to ask for dtypes."""
    with FakeTensorMode():
        logits = torch.empty(2, 3, 5, dtype=torch.bfloat16, device="cuda")
        ids = torch.zeros(2, 3, dtype=torch.int64, device="cuda")
        torch.set_autocast_enabled("cuda", True)
        try:
            for name, rest in (("log_probs_from_logits", (ids,)), ("compute_entropy", ())):
                assert ours[name](logits, *rest).dtype == THEIRS[name](logits, *rest).dtype == torch.float32
        finally:
            torch.set_autocast_enabled("cuda", False)


def test_nan_in_the_padding_stays_there(ours):
    """OpenRLHF multiplies by its mask, and NaN times 0 is NaN."""
    first, second, third, mask = batch(3)
    assert not mask.all()
    dirty = [torch.where(mask, x, math.nan) for x in (first, second, third)]
    clean = [torch.where(mask, x, 0) for x in (first, second, third)]
    assert THEIRS["gae"](None, *dirty[:2], mask.long(), 1.0, 0.95)[0][mask].isnan().any()
    modules = {"policy": loss.PolicyLoss(), "value": loss.ValueLoss(0.2)}
    calls = [("gae", lambda f, x: f(None, *x[:2], mask.long(), 1.0, 0.95)),
             ("policy", lambda f, x: f(modules["policy"], *x, mask.long())[:3]),
             ("value", lambda f, x: (f(modules["value"], *x, mask.long()),))]  # fmt: skip
    for name, call in calls:
        assert any(x.isnan().any() for x in call(THEIRS[name], dirty))
        for a, b in zip(call(ours[name], dirty), call(ours[name], clean), strict=True):
            assert torch.equal(a, b)
            assert not a.isnan().any()


def test_an_empty_mask_is_a_loss_of_zero(ours):
    first, second, third, mask = batch(0)
    none = torch.zeros_like(mask).long()
    for name, module in (("policy", loss.PolicyLoss()), ("value", loss.ValueLoss(0.2))):
        found = [f[name](module, first, second, third, none) for f in (ours, THEIRS)]
        mine, its = (x[0] if isinstance(x, tuple) else x for x in found)
        assert mine == 0
        assert its.isnan()
        found = ours[name](module, first, second, third, none, batch_num_tokens=0)  # nor in the whole batch
        assert (found[0] if isinstance(found, tuple) else found) == 0


def test_masked_positions_are_zero(ours):
    values, rewards, _, mask = batch(3, holes=True)
    for a, b in zip(*(f["gae"](None, values, rewards, mask.long(), 1.0, 0.95) for f in (ours, THEIRS)), strict=True):
        assert not a[~mask].any()
        assert b[~mask].any()


def experiences(seed):
    """Two experiences of four responses, as the workers of OpenRLHF hand them to its maker."""
    made = []
    for i in range(2):
        values, kl, _, mask = batch(seed + i, rows=4)
        fields = {"values": values, "kl": kl * mask, "action_mask": mask.long(), "rewards": torch.arange(4.0)}
        made.append(Experience(index=list(range(4 * i, 4 * i + 4)), info={}, **fields))
    return made


def advantages():
    """What the real maker computes of experiences: KL-shaped rewards, GAE, whitening over all of them."""
    names = SimpleNamespace
    args = names(
        rollout=names(n_samples_per_prompt=1),
        algo=names(advantage=names(estimator="gae", gamma=1.0, lambd=0.95, no_std_norm=False)),
        reward=names(clip_range=(-10, 10)),
    )
    self = Maker.__new__(Maker)
    self.args, self.advantage_estimator, self.kl_ctl = args, "gae", names(value=0.1)
    self.strategy = names(args=args)
    return self.compute_advantages_and_returns(experiences(5))


def test_the_experience_maker_makes_the_same_experiences():
    expected = advantages()
    with rf.patch("openrlhf"):
        found = advantages()
    assert len(found) == 2
    for a, b in zip(found, expected, strict=True):
        seen = a.action_mask.bool()
        torch.testing.assert_close(a.advantages[seen], b.advantages[seen], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a.returns[seen], b.returns[seen], rtol=1e-5, atol=1e-5)


def steps():
    """OpenRLHF's actor and its losses for three steps on one batch: losses and parameters."""
    model = actor.Actor(tiny_llama(seed=1), temperature=0.8)
    model.packing_samples = False  # the actor itself sets it only for a model that it loads by name
    value_head = torch.nn.Linear(7, 1)
    torch.nn.init.ones_(value_head.weight)
    generator = torch.Generator().manual_seed(2)
    sequences = torch.randint(3, 300, (4, 12), generator=generator)
    _, returns, noise, action_mask = batch(7, rows=4)
    attention = torch.cat([torch.ones(4, 5, dtype=torch.bool), action_mask], 1).long()
    policy_loss, value_loss = loss.PolicyLoss(dual_clip=3.0), loss.ValueLoss(0.2)
    optimizer = torch.optim.SGD([*model.parameters(), *value_head.parameters()], lr=0.05)
    old, numbers = None, []
    for _ in range(3):
        logp, output = model(sequences, action_mask, attention_mask=attention, return_output=True, return_entropy=True)
        old = logp.detach() + 0.3 * noise if old is None else old
        total, clipped, kl, *_ = policy_loss(logp, old, returns, action_mask.long())
        value = value_loss(value_head.weight * noise, noise, returns, action_mask.long())
        entropy = utils.masked_mean(output.entropy[:, -7:], action_mask)
        optimizer.zero_grad()
        (total + value - 0.01 * entropy).backward()
        optimizer.step()
        numbers.append(torch.stack([total, value, entropy, clipped, kl]).detach())
    return torch.stack(numbers), torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_actor_and_the_losses_take_the_same_steps():
    expected, before = steps()
    with rf.patch("openrlhf"):
        numbers, after = steps()
    assert expected[:, 3].max() > 0  # something is clipped
    torch.testing.assert_close(numbers, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
