"""rf.patch("verl"): every replaced function against verl's own, and verl's pipeline of losses with and without."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import agree, import_with_stubs, needs
from torch._subclasses.fake_tensor import FakeTensorMode

import rlhf_fast as rf

needs("verl")
needs("tensordict")
MODULES = ["verl.trainer.ppo.core_algos", "verl.utils.torch_functional", "verl.workers.utils.losses"]
import_with_stubs(MODULES, "ray", "torchdata", "hydra", "codetiming", "orjson")

import verl.trainer.ppo.core_algos as algos  # noqa: E402
import verl.utils.torch_functional as functional  # noqa: E402
import verl.workers.utils.losses as losses  # noqa: E402
from tensordict import NonTensorData, TensorDict  # noqa: E402
from verl.workers.config import ActorConfig, CriticConfig  # noqa: E402

NAMES = ("logprobs_from_logits", "entropy_from_logits", "entropy_from_logits_with_chunking")
ALGOS = ("compute_gae_advantage_return", "compute_policy_loss_vanilla", "compute_value_loss")
THEIRS = {name: getattr(functional, name) for name in NAMES} | {name: getattr(algos, name) for name in ALGOS}
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
COUNTS = {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 9}


@pytest.fixture(scope="module")
def ours():
    """verl's functions as a patch leaves them, by name."""
    with rf.patch("verl"):
        return {name: getattr(functional, name) for name in NAMES} | {name: getattr(algos, name) for name in ALGOS}


def batch(seed, rows=3, tokens=7, holes=False, n=3):
    """Tensors ``[rows, tokens]`` and a mask with at least two valid tokens, the first of each row among them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(rows, tokens, generator=generator) for _ in range(n)]
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    mask = torch.arange(tokens) < lengths
    if holes:
        mask &= torch.rand(rows, tokens, generator=generator) < 0.6
    mask[:, 0] = True
    return *tensors, mask


def config(mode="token-mean", info=None, **options):
    options = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0, "rollout_n": 1} | options
    made = ActorConfig(strategy="fsdp", use_dynamic_bsz=True, loss_agg_mode=mode, **options)
    made.global_batch_info.update(info or {})
    return made


@settings(max_examples=40)
@given(rows=st.integers(1, 6), vocab=st.integers(1, 40), seed=st.integers(0, 2**20), scale=st.sampled_from([1.0, 5.0]))
def test_logprobs_and_entropy(ours, rows, vocab, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, vocab, generator=generator)
    ids = torch.randint(vocab, (rows,), generator=generator)
    for name in NAMES:
        rest = (ids,) if name.startswith("logprobs") else ()
        agree(lambda z, f=name, r=rest: ours[f](z, *r), lambda z, f=name, r=rest: THEIRS[f](z, *r), logits)


@pytest.mark.parametrize("name", NAMES[1:])
def test_entropy_compiles_as_verls_engines_compile_it(ours, name):
    compiled = torch.compile(ours[name], dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        agree(compiled, THEIRS[name], torch.randn(rows, 11, generator=torch.Generator().manual_seed(rows)))


def test_half_precision_keeps_its_dtype(ours):
    logits, ids = torch.randn(2, 3, 20, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.int64)
    assert ours[NAMES[0]](logits, ids).dtype == THEIRS[NAMES[0]](logits, ids).dtype == torch.bfloat16
    assert ours[NAMES[1]](logits).dtype == THEIRS[NAMES[1]](logits).dtype == torch.bfloat16
    assert ours[NAMES[2]](logits[0]).dtype == THEIRS[NAMES[2]](logits[0]).dtype == torch.float32


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**20),
    holes=st.booleans(),
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    kind=st.sampled_from([torch.int64, torch.float32]),
)
def test_gae(ours, seed, holes, gamma, lam, kind):
    rewards, values, _, mask = batch(seed, holes=holes)
    f = "compute_gae_advantage_return"
    (a, r), (b, s) = (g[f](rewards, values, mask.to(kind), torch.tensor(gamma), lam) for g in (ours, THEIRS))
    torch.testing.assert_close(a[mask], b[mask], rtol=1e-6, atol=2e-6)  # whitening divides by a deviation below 1
    torch.testing.assert_close(r[mask], s[mask], rtol=1e-6, atol=1e-6)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    mode=st.sampled_from(MODES),
    counts=st.sampled_from([{}, COUNTS]),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
)
def test_policy_loss(ours, seed, mode, counts, scale):
    logp, old, advantages, mask = batch(seed, holes=True)
    old = logp + scale * old
    f = "compute_policy_loss_vanilla"

    def call(functions, metrics):
        def run(x):
            loss, found = functions[f](old, x, advantages, mask.long(), mode, config(mode, counts))
            metrics.update(found)
            return loss

        return run

    mine, its = {}, {}
    agree(call(ours, mine), call(THEIRS, its), logp)
    assert mine == pytest.approx(its, rel=1e-5, abs=1e-6)
    assert len(mine) == 3


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    mode=st.sampled_from(MODES),
    counts=st.sampled_from([{}, COUNTS, {"loss_scale_factor": 5}]),
)
def test_value_loss(ours, seed, mode, counts):
    values, returns, old, mask = batch(seed, holes=True)
    f = "compute_value_loss"

    def call(functions):
        return lambda v: functions[f](v, returns, old, mask.long(), 0.5, mode, **counts)

    agree(call(ours), call(THEIRS), values)


def test_a_denominator_that_is_needed_and_a_mode_that_is_none(ours):
    logp, old, advantages, mask = batch(0)
    for functions in (ours, THEIRS):
        with pytest.raises(ValueError, match="batch_num_tokens"):
            functions["compute_value_loss"](logp, old, advantages, mask.long(), 0.5, dp_size=2)
        with pytest.raises(ValueError, match="loss_agg_mode"):
            functions["compute_value_loss"](logp, old, advantages, mask.long(), 0.5, "mean")


def test_weights_of_the_rollouts_run_verls_own(ours):
    logp, old, advantages, mask = batch(0)
    given = (old, logp, advantages, mask.long(), "token-mean", config(), torch.full_like(logp, 0.5))
    (a, _), (b, _) = (g["compute_policy_loss_vanilla"](*given) for g in (ours, THEIRS))
    assert a == b


def test_gradients_of_other_inputs_are_verls(ours):
    """No loss of verl asks for them. Where somebody does its own runs, and so it does for what broadcasts oddly."""
    given = batch(0)
    mask = given[3].long()
    f, g = "compute_policy_loss_vanilla", "compute_value_loss"
    for name, rest in ((f, ("token-mean", config())), (g, (0.5,))):
        for i in range(3):
            agree(*(
                lambda x, h=h, i=i, rest=rest, name=name: h[name](*given[:i], x, *given[i + 1 : 3], mask, *rest)[0]
                for h in (ours, THEIRS)
            ), given[i])  # fmt: skip
        x = given[0].clone().requires_grad_()
        loss = ours[name](x, x, *given[2:3], mask, *rest)[0]  # one tensor in two places
        expected = THEIRS[name](x, x, *given[2:3], mask, *rest)[0]
        torch.testing.assert_close(*(torch.autograd.grad(a, x) for a in (loss, expected)))
    logp, old, advantages, _ = given
    odd = {"old": (old[:, :1], logp, advantages), "three": (old[None], logp[None], advantages[None]),
           "signs": (old, logp, advantages.sign().long()), "narrow": (old, logp[:, :1], advantages)}  # fmt: skip
    for tensors in odd.values():
        m = mask[None] if tensors[0].dim() == 3 else mask
        agree(*(lambda x, h=h, t=tensors, m=m: h[f](t[0], x, t[2], m, "seq-mean-token-mean", config())[0]
                for h in (ours, THEIRS)), tensors[1])  # fmt: skip
    with pytest.raises(AssertionError, match="greater than 1"):
        ours[f](old, logp, advantages, mask, "token-mean", config(clip_ratio_c=1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_a_gpu_makes_float32(ours, dtype):
    """verl's engine runs under it. No GPU is needed to ask for dtypes."""
    with FakeTensorMode():
        logits = torch.empty(2, 3, 5, dtype=dtype, device="cuda")
        ids = torch.zeros(2, 3, dtype=torch.int64, device="cuda")
        torch.set_autocast_enabled("cuda", True)
        try:
            for name, rest in ((NAMES[0], (ids,)), (NAMES[1], ())):
                assert ours[name](logits, *rest).dtype == THEIRS[name](logits, *rest).dtype == torch.float32
        finally:
            torch.set_autocast_enabled("cuda", False)


def test_the_registries_hold_ours_and_then_verls_again():
    with rf.patch("verl"):
        assert algos.get_policy_loss_fn("vanilla") is algos.compute_policy_loss_vanilla
        assert algos.get_policy_loss_fn("vanilla") is not THEIRS["compute_policy_loss_vanilla"]
        assert algos.get_adv_estimator_fn("gae") is algos.compute_gae_advantage_return
        assert losses.compute_value_loss is algos.compute_value_loss is not THEIRS["compute_value_loss"]
    assert algos.get_policy_loss_fn("vanilla") is THEIRS["compute_policy_loss_vanilla"]
    assert algos.get_adv_estimator_fn("gae") is THEIRS["compute_gae_advantage_return"]
    assert losses.compute_value_loss is THEIRS["compute_value_loss"]


def test_a_loss_of_another_body_stays(monkeypatch):
    """verl's parameters stay the same while its config, which one of them is, gains options."""

    def compute_policy_loss_vanilla(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None,
        rollout_is_weights=None,
    ):  # fmt: skip
        return "a newer verl's"

    with rf.patch("verl") as patch:
        assert patch.kept == {}
    monkeypatch.setattr(algos, "compute_policy_loss_vanilla", compute_policy_loss_vanilla)
    with pytest.warns(UserWarning, match="compute_policy_loss_vanilla stays verl's own: its body"):
        patch = rf.patch("verl")
    with patch:
        assert algos.compute_policy_loss_vanilla is compute_policy_loss_vanilla
        assert len(patch.replaced) == 5


def test_nan_in_the_padding_stays_there(ours):
    """verl multiplies by its mask, and NaN times 0 is NaN."""
    rewards, values, old, mask = batch(3)
    assert not mask.all()
    clean = [torch.where(mask, x, 0) for x in (rewards, values, old)]
    dirty = [torch.where(mask, x, math.nan) for x in (rewards, values, old)]
    f, g = "compute_gae_advantage_return", "compute_policy_loss_vanilla"
    assert THEIRS[f](*dirty[:2], mask.long(), 1.0, 0.95)[0][mask].isnan().any()
    for a, b in zip(
        ours[f](*dirty[:2], mask.long(), 1.0, 0.95), ours[f](*clean[:2], mask.long(), 1.0, 0.95), strict=True
    ):
        assert torch.equal(a, b)
    setting = config("seq-mean-token-mean")
    assert THEIRS[g](*dirty, mask.long(), "seq-mean-token-mean", setting)[0].isnan()
    found = [ours[g](*given, mask.long(), "seq-mean-token-mean", setting) for given in (dirty, clean)]
    assert found[0] == found[1]
    assert not any(math.isnan(x) for x in found[0][1].values())


def test_an_empty_mask_is_a_loss_of_zero(ours):
    logp, old, advantages, mask = batch(0)
    none = torch.zeros_like(mask).long()
    f = "compute_policy_loss_vanilla"
    assert THEIRS[f](old, logp, advantages, none, "token-mean", config())[0].isnan()
    for counts in ({}, {"batch_num_tokens": 0}, {"batch_num_tokens": torch.tensor(0)}):  # nor in the whole batch
        assert ours[f](old, logp, advantages, none, "token-mean", config(info=counts))[0] == 0
    one = torch.zeros_like(mask).long()
    one[0, 0] = 1
    g = "compute_gae_advantage_return"
    for few in (none, one):
        with pytest.raises(ValueError, match="mask"):
            THEIRS[g](logp, old, few, 1.0, 0.95)
        assert not ours[g](logp, old, few, 1.0, 0.95)[0].any()


def test_masked_positions_are_zero(ours):
    rewards, values, _, mask = batch(3, holes=True)
    f = "compute_gae_advantage_return"
    for a, b in zip(*(g[f](rewards, values, mask.long(), 1.0, 0.95) for g in (ours, THEIRS)), strict=True):
        assert not a[~mask].any()
        assert b[~mask].any()


class Step(torch.nn.Module):
    """A policy and a critic of one layer each, on which verl's losses are minimised."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.policy, self.critic = torch.nn.Linear(6, 30), torch.nn.Linear(6, 1)


def minimise(mode):
    """verl's advantages, its ppo_loss and value_loss for three steps on one batch: losses and parameters."""
    rows, prompt, tokens = 4, 3, 5
    model = Step()
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, prompt + tokens, 6, generator=generator)
    ids = torch.randint(30, (rows, prompt + tokens), generator=generator)
    lengths = torch.tensor([5, 3, 1, 4])
    mask = torch.arange(tokens) < lengths[:, None]
    seen = torch.cat([torch.ones(rows, prompt, dtype=torch.bool), mask], 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    actor = config(mode, use_kl_loss=True, kl_loss_coef=0.1, entropy_coeff=0.01)
    critic = CriticConfig(strategy="fsdp", use_dynamic_bsz=True, cliprange_value=0.3, loss_agg_mode=mode)
    numbers, fixed = [], None
    for _ in range(3):
        logits, values = model.policy(hidden[seen])[:], model.critic(hidden[seen])[:, 0]
        logp = functional.logprobs_from_logits(logits, ids.roll(-1, 1)[seen])
        entropy = functional.entropy_from_logits(logits)
        data = TensorDict(
            {"prompts": ids[:, :prompt], "responses": ids[:, prompt:], "attention_mask": seen.long()}, [rows]
        )
        if fixed is None:
            old, old_values = (losses.no_padding_2_padding(x.detach(), data) for x in (logp, values))
            rewards = torch.randn(rows, tokens, generator=generator) * mask
            estimate = algos.get_adv_estimator_fn("gae")
            advantages, returns = estimate(rewards, old_values, mask.long(), 1.0, 0.95)
            fixed = {"old_log_probs": old + 0.3 * rewards, "ref_log_prob": old - 0.1, "advantages": advantages,
                     "returns": returns, "values": old_values, "response_mask": mask}  # fmt: skip
        nested = {k: torch.nested.as_nested_tensor([x[i, : lengths[i]] for i in range(rows)], layout=torch.jagged)
                  for k, x in fixed.items()}  # fmt: skip
        data = TensorDict(dict(data.items()) | nested, [rows])
        for name in ("dp_size", "batch_num_tokens", "global_batch_size"):
            data[name] = NonTensorData(1 if name == "dp_size" else None)
        policy, metrics = losses.ppo_loss(actor, {"log_probs": logp, "entropy": entropy}, data)
        value, more = losses.value_loss(critic, {"values": values}, data)
        optimizer.zero_grad()
        (policy + value).backward()
        optimizer.step()
        shown = [
            metrics["actor/pg_clipfrac"].aggregate(),
            metrics["actor/ppo_kl"].aggregate(),
            more["critic/vf_clipfrac"],
        ]
        numbers.append(torch.tensor([policy.item(), value.item(), *shown]))
    return torch.stack(numbers), torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_the_pipeline_of_losses_takes_the_same_steps(mode):
    expected, before = minimise(mode)
    with rf.patch("verl"):
        numbers, after = minimise(mode)
    assert expected[:, 2].max() > 0  # something is clipped
    torch.testing.assert_close(numbers, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
