"""The losses that rf.patch("trl") puts into GRPO, RLOO and DPO: TRL's own methods give the same on random batches."""

import math
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import needs
from trl_batches import Head, batch, pairs, trainer

import rlhf_fast as rf
from rlhf_fast.integrations import trl_dpo, trl_losses
from rlhf_fast.integrations.patching import fingerprint, release

needs("trl")

from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.rloo_trainer import RLOOTrainer  # noqa: E402

FUSED = release(version("trl")) >= (1, 15, 0)
PARTS = (
    (trl_dpo.from_head, trl_dpo.reference_from_head) if FUSED else (trl_dpo.from_logits, trl_dpo.reference_from_logits)
)
THEIRS = {"grpo": GRPOTrainer._compute_loss, "rloo": RLOOTrainer._compute_loss, "dpo": DPOTrainer._compute_loss}
REPLACE = {"grpo": trl_losses.grpo_loss, "rloo": trl_losses.rloo_loss, "dpo": trl_dpo.loss_of(*PARTS)}


def no_fallback(original):
    """In the place of TRL's own: its globals, but not to be called."""

    def stop(*_):
        raise AssertionError("TRL's own method was run")

    return type(stop)(stop.__code__, original.__globals__, closure=stop.__closure__)


OURS = {kind: REPLACE[kind](no_fallback(THEIRS[kind])) for kind in THEIRS}


def run(method, self, inputs, leaves, *rest):
    """Loss, gradients and metrics of a method, with leaves of its own."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    if "logps" in leaves:
        found = (leaves["logps"] * 1.0, leaves["entropies"] * 1.0, self.__dict__.get("aux"))
        self._get_per_token_logps_and_entropies = lambda *_, **__: found
    loss = method(self, leaves.get("model"), inputs, *rest)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), [torch.zeros(()) if g is None else g for g in grads], self._metrics


def same(first, second, tolerance=1e-6):
    """The same loss, gradients and metrics up to ``tolerance``, relative where they are beyond 1."""
    (loss, grads, metrics), (expected, expected_grads, expected_metrics) = first, second
    for a, b in zip([loss, *grads], [expected, *expected_grads], strict=True):
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a, b.expand_as(a), rtol=0, atol=tolerance * scale)
    for mode in ("train", "eval"):
        assert metrics[mode].keys() == expected_metrics[mode].keys()
        for name, numbers in metrics[mode].items():
            assert numbers == pytest.approx(expected_metrics[mode][name], rel=tolerance, abs=tolerance, nan_ok=True)
            assert all(type(x) in (int, float) for x in numbers)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 5),
    length=st.integers(1, 9),
    loss_type=st.sampled_from(["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]),
    beta=st.sampled_from([0.0, 0.04, 1.0]),
    bounds=st.sampled_from([(0.2, 0.2), (0.1, 0.28)]),
    delta=st.sampled_from([None, 1.5]),
    corrected=st.booleans(),
    mode=st.sampled_from(["train", "eval"]),
    accumulated=st.sampled_from([1, 3]),
    quantile=st.sampled_from([1.0, 0.5]),
    weights=st.sampled_from([None, "token", "sequence"]),
    shape=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_grpo(
    seed, rows, length, loss_type, beta, bounds, delta, corrected, mode, accumulated, quantile, weights, shape
):
    old, tools, wide = shape
    generator = torch.Generator().manual_seed(seed)
    inputs, leaves = batch(generator, rows, length, old=old, tools=tools, wide=wide, weights=weights)
    self = trainer(
        mode, loss_type=loss_type, beta=beta, epsilon_low=bounds[0], epsilon_high=bounds[1], delta=delta,
        current_gradient_accumulation_steps=accumulated, top_entropy_quantile=quantile, use_vllm=weights is not None,
        use_bias_correction_kl=corrected,
    )  # fmt: skip
    same(*(run(methods["grpo"], self, inputs, leaves) for methods in (OURS, THEIRS)))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 5),
    length=st.integers(1, 9),
    bounds=st.sampled_from([(0.2, 0.2), (0.1, 0.28)]),
    mode=st.sampled_from(["train", "eval"]),
)
def test_rloo(seed, rows, length, bounds, mode):
    inputs, leaves = batch(torch.Generator().manual_seed(seed), rows, length)
    self = trainer(mode, epsilon_low=bounds[0], epsilon_high=bounds[1])
    same(*(run(methods["rloo"], self, inputs, leaves) for methods in (OURS, THEIRS)))


LOSSES = [["sigmoid"], ["sigmoid_norm"], ["hinge"], ["ipo"], ["sigmoid", "ipo"]]


def dpo(methods, self, inputs, logits):
    """A run of the method on a model of these logits, and the number of tokens it counted."""
    self._total_train_tokens = 5
    wrapped = lambda trainer, z, *rest: methods["dpo"](trainer, Head(z), *rest)  # noqa: E731
    return run(wrapped, self, inputs, {"model": logits}, False), self._total_train_tokens


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 4),
    length=st.integers(2, 7),
    losses=st.sampled_from(LOSSES),
    beta=st.sampled_from([0.1, 0.5]),
    mode=st.sampled_from(["train", "eval"]),
    precomputed=st.booleans(),
)
def test_dpo(seed, rows, length, losses, beta, mode, precomputed):
    inputs, logits, ref = pairs(torch.Generator().manual_seed(seed), rows, length)
    self = trainer(
        mode, loss_types=losses, loss_weights=[1.0, 0.7][: len(losses)], beta=beta, ref_model=Head(ref),
        precompute_ref_logps=precomputed,
    )  # fmt: skip
    self.model = Head(logits).train(mode == "train")
    if precomputed:
        inputs |= {f"ref_{x}_logps": -3 * torch.rand(rows) for x in ("chosen", "rejected")}
    (ours, seen), (theirs, expected) = (dpo(methods, self, inputs, logits) for methods in (OURS, THEIRS))
    # The loss is of differences of sums over the tokens, whose rounding is relative to their size.
    size = max(abs(x) for name in ("logps/chosen", "logps/rejected") for x in theirs[2][mode][name])
    same(ours, theirs, tolerance=1e-6 * max(1.0, size / 4))
    assert seen == expected == 5 + (int(inputs["attention_mask"].sum()) if mode == "train" else 0)


class Process:
    """One of two, each a thread: accelerate's collectives over both."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, rank, held, barrier):
        self.rank, self.held, self.barrier, self.calls = rank, held, barrier, 0

    def both(self, x):
        self.calls += 1
        self.held[self.rank] = x
        self.barrier.wait(timeout=20)  # one that calls more often than the other would wait for ever
        found = list(self.held)
        self.barrier.wait(timeout=20)
        return found

    def reduce(self, x, reduction):
        assert reduction == "sum"
        return sum(self.both(x))

    def gather(self, x):
        return torch.cat([y.reshape(-1, *y.shape[1:]) for y in self.both(x)])

    gather_for_metrics = gather


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("kind", "collectives"), [("grpo", 2), ("rloo", 2), ("dpo", 3)])
def test_metrics_are_those_of_all_processes(kind, collectives, mode):
    held, barrier = [None, None], Barrier(2)

    def process(rank):
        self = trainer(mode, beta=0.1)
        self.accelerator = Process(rank, held, barrier)
        generator = torch.Generator().manual_seed(rank)
        if kind == "dpo":
            inputs, logits, ref = pairs(generator, 3, 6)
            self.ref_model, self.model = Head(ref), Head(logits).train(mode == "train")
            call = lambda methods: dpo(methods, self, inputs, logits)[0]  # noqa: E731
        else:
            inputs, leaves = batch(generator, 4, 6)
            call = lambda methods: run(methods[kind], self, inputs, leaves)  # noqa: E731
        ours, calls = call(OURS), self.accelerator.calls
        return ours, call(THEIRS), calls

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(process, (0, 1)))
    for ours, theirs, calls in results:
        same(ours, theirs, tolerance=5e-6 if kind == "dpo" else 1e-6)
        assert calls == collectives
    first, second = (ours[2] for ours, *_ in results)
    assert first == second
    assert results[0][0][0] != results[1][0][0]  # the losses are each process's own


OTHER = {
    "cispo": ("grpo", {"loss_type": "cispo", "epsilon_high": 5.0}),
    "sapo": ("grpo", {"loss_type": "sapo"}),
    "vespo": ("grpo", {"loss_type": "vespo"}),
    "gspo": ("grpo", {"importance_sampling_level": "sequence"}),
    "a bound below the range": ("grpo", {"delta": 1.1}),
    "no range": ("grpo", {"epsilon_low": 0.0}),
    "off-policy sequences": ("grpo", {"off_policy_mask_threshold": 0.01}),
    "an entropy bonus": ("grpo", {"_entropy_bonus_enabled": True}),
    "experts": ("grpo", {"aux_loss_enabled": True, "aux": torch.tensor(0.3)}),
    "experts, rloo": ("rloo", {"aux_loss_enabled": True, "aux": torch.tensor(0.3)}),
    "no range, rloo": ("rloo", {"epsilon_high": 0.0}),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_options_run_trls_own(name):
    kind, options = OTHER[name]
    calls = []
    original = THEIRS[kind]
    method = REPLACE[kind](lambda *given: calls.append(given) or original(*given))
    inputs, leaves = batch(torch.Generator().manual_seed(0), 4, 6)
    self = trainer(**options)
    same(run(method, self, inputs, leaves), run(original, self, inputs, leaves), tolerance=0)
    assert len(calls) == 1
    with pytest.raises(AssertionError, match="own method was run"):
        run(OURS[kind], self, inputs, leaves)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_types": ["sigmoid", "bco_pair", "sft"]},
        {"f_divergence_type": "js_divergence"},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"aux_loss_enabled": True},
        {"ref_model": None},
        {"beta": 0.0},
        {"use_liger_kernel": True},
    ],
    ids=lambda options: ", ".join(options),
)
def test_other_options_of_dpo_run_trls_own(options):
    self = trainer(**{"ref_model": Head(None), "beta": 0.1, **options})
    method = REPLACE["dpo"](lambda *given: given)
    assert method(self, "model", {"input_ids": 1}, False) == (self, "model", {"input_ids": 1}, False)
    assert method(trainer(ref_model=Head(None), beta=0.1), "model", {}, True)[3]  # the outputs are asked for


def test_nan_in_the_padding_stays_there():
    """TRL multiplies with its mask."""
    inputs, leaves = batch(torch.Generator().manual_seed(3), 2, 6)
    inputs["completion_mask"][:, 4:] = 0
    expected = {kind: run(THEIRS[kind], trainer(beta=0.1), inputs, leaves) for kind in ("grpo", "rloo")}
    leaves = {name: x.index_fill(1, torch.tensor([4, 5]), math.nan) for name, x in leaves.items()}
    for kind in ("grpo", "rloo"):
        assert run(THEIRS[kind], trainer(beta=0.1), inputs, leaves)[0].isnan()
        same(run(OURS[kind], trainer(beta=0.1), inputs, leaves), expected[kind])


def test_half_precision_is_float32_inside():
    inputs, leaves = batch(torch.Generator().manual_seed(0), 4, 8)
    rounded = {k: inputs[k].bfloat16() for k in ("old_per_token_logps", "ref_per_token_logps")}
    half = {k: x.bfloat16() for k, x in leaves.items()}
    exact = [inputs | {k: x.float() for k, x in rounded.items()}, {k: x.float() for k, x in half.items()}]
    expected = run(THEIRS["grpo"], trainer(beta=0.1), *exact)
    ours, theirs = (run(methods["grpo"], trainer(beta=0.1), inputs | rounded, half) for methods in (OURS, THEIRS))
    assert ours[0].dtype == theirs[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=1e-7)
    assert (theirs[0] - expected[0]).abs() > 1e-4
    for name, numbers in ours[2]["train"].items():
        assert numbers == pytest.approx(expected[2]["train"][name], rel=1e-6)


def test_the_share_of_pairs_in_half_precision_is_not_rounded():
    inputs, logits, ref = pairs(torch.Generator().manual_seed(2), 7, 6)
    self = trainer(beta=0.3, ref_model=Head(ref.bfloat16()))
    self.model = Head(logits)
    shares = [
        dpo(methods, self, inputs, logits.bfloat16())[0][2]["train"]["rewards/accuracies"][0]
        for methods in (OURS, THEIRS)
    ]
    assert shares == pytest.approx([3 / 7, 3 / 7], rel=1e-6)


def test_the_bodies_are_known_and_another_one_stays(monkeypatch):
    names = tuple(f"trl.trainer.{k}_trainer.{k.upper()}Trainer._compute_loss" for k in ("grpo", "rloo", "dpo"))
    with rf.patch("trl") as patch:
        assert set(names) < set(patch.replaced)
        assert patch.kept == {}
        assert RLOOTrainer._compute_loss is not THEIRS["rloo"]
    assert RLOOTrainer._compute_loss is THEIRS["rloo"]

    def _compute_loss(self, model, inputs):
        return 0.0

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", _compute_loss)
    with pytest.warns(UserWarning, match=f"{names[0]} stays trl's own"):
        patch = rf.patch("trl")
    with patch:
        assert GRPOTrainer._compute_loss is _compute_loss
        reason = f"its body ({fingerprint(_compute_loss)}) is not one of those known"
        assert patch.kept == {names[0]: reason}
        assert set(names[1:]) < set(patch.replaced)
    assert GRPOTrainer._compute_loss is _compute_loss
