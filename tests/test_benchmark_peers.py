"""The peers of the benchmarks compute what ours do.

A peer that is a package is compared where it can be imported; without a GPU Triton's interpreter runs its kernels.
"""

from importlib.util import find_spec

import pytest
import torch
from conftest import GPU

from rlhf_fast import gae, kl, logprobs, sample, whiten
from rlhf_fast.bench import gae as bench_gae
from rlhf_fast.bench import kl as bench_kl
from rlhf_fast.bench import logprobs as bench_logprobs
from rlhf_fast.bench import ppo_loss as bench_ppo_loss
from rlhf_fast.bench import sample as bench_sample

DEVICE = "cuda" if GPU else "cpu"
GPU_ONLY = ("quack", "flash_attn", "flashinfer")  # their kernels have no interpreter


def package(name, load):
    """What ``load`` imports, or a skip where that package is not installed or cannot run here."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name in GPU_ONLY and not GPU:
        pytest.skip(f"{name} needs a GPU")
    return load()


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


def logits_and_ids(dtype=torch.float32):
    """Seven rows of 40 logits: quack wants whole vectors of 16 bytes."""
    torch.manual_seed(0)
    return torch.randn(7, 40, dtype=dtype, device=DEVICE) * 3, torch.randint(40, (7,), device=DEVICE)


# --- logprobs

LOGPROBS = {
    "Liger": ("liger_kernel", bench_logprobs.liger),
    "quack": ("quack", bench_logprobs.quack),
    "flash-attn": ("flash_attn", bench_logprobs.flash_attn),
    "TRL": ("trl", bench_logprobs.trl_package),
    "TRL's formula": ("torch", lambda: bench_logprobs.trl_formula),
    "verl's formula": ("torch", lambda: bench_logprobs.verl_formula),
    "eager": ("torch", lambda: bench_logprobs.eager),
}


@pytest.mark.parametrize("name", LOGPROBS)
def test_peers_of_logprobs(name):
    chosen, entropy = package(*LOGPROBS[name])(*logits_and_ids())
    ours = logprobs(*logits_and_ids())
    close(chosen, ours.logprobs)
    assert (entropy is None) == (name in ("Liger", "quack", "flash-attn"))
    if entropy is not None:
        close(entropy, ours.entropy)


@pytest.mark.parametrize("name", [*LOGPROBS, "quack, one pass"])
def test_gradients_of_the_peers_of_logprobs(name):
    if name == "Liger":
        peer = package("liger_kernel", bench_logprobs.liger_gradient)
    elif name == "quack, one pass":
        peer = package("quack", bench_logprobs.quack_one_pass)
    else:
        peer = bench_logprobs.gradient_of(package(*LOGPROBS[name]))
    leaf, ids = logits_and_ids(torch.float64)
    p = leaf.requires_grad_().softmax(-1)
    total = p.log().gather(-1, ids[:, None]).sum()
    if not name.startswith(("Liger", "quack", "flash-attn")):
        total = total - 0.01 * (p * p.log()).sum()
    logits = leaf.detach().float()
    before = logits.clone()
    close(peer(logits, ids), torch.autograd.grad(total, leaf)[0])
    assert torch.equal(logits, before)  # Liger writes over its own copy


def test_liger_selective_leaves_out_the_last_row():
    peer = package("liger_kernel", bench_logprobs.liger_selective)
    close(peer(*logits_and_ids())[0], logprobs(*logits_and_ids()).logprobs[:-1])


@pytest.mark.skipif(GPU, reason="on a GPU TRL runs a kernel of its own")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_of_trl_is_trls(dtype):
    peer, (logits, ids) = package("trl", bench_logprobs.trl_package), logits_and_ids(dtype)
    for a, b in zip(peer(logits, ids), bench_logprobs.trl_formula(logits, ids), strict=True):
        assert torch.equal(a, b)


def test_every_form_gives_the_gradient_of_autograd():
    logits, ids = logits_and_ids(torch.float64)
    expected = bench_logprobs.gradient_of(bench_logprobs.ours)(logits, ids)
    close(bench_logprobs.form_gradient("reference")(logits, ids), expected, 1e-12)
    ref_logits = logits.flip(0) * 0.9
    expected = bench_kl.gradient_of(bench_kl.ours)(logits, ref_logits, ids)
    close(bench_kl.form_gradient("reference")(logits, ref_logits, ids), expected, 1e-12)


# --- kl


@pytest.mark.parametrize("name", ["eager", "kl_div", "liger"])
def test_peers_of_kl(name):
    peer = package("liger_kernel", bench_kl.liger) if name == "liger" else getattr(bench_kl, name)
    logits, ids = logits_and_ids()
    ref_logits = logits.flip(0) * 0.9
    divergence, chosen = peer(logits, ref_logits, ids)
    ours = kl(logits, ref_logits, ids)
    leaf = logits.clone().requires_grad_()
    if name == "liger":
        close(divergence, ours.kl.sum())
        (expected,) = torch.autograd.grad(kl(leaf, ref_logits, ids).kl.sum(), leaf)
    else:
        close(divergence, ours.kl)
        close(chosen, ours.logprobs)
        expected = bench_kl.gradient_of(bench_kl.ours)(logits, ref_logits, ids)
    close(bench_kl.gradient_of(peer)(logits, ref_logits, ids), expected)


# --- gae


def rewards_and_values(holes):
    torch.manual_seed(0)
    mask = torch.rand(5, 23, device=DEVICE) < 0.8 if holes else torch.ones(5, 23, dtype=torch.bool, device=DEVICE)
    return torch.randn(5, 23, device=DEVICE), torch.randn(5, 23, device=DEVICE), mask


def test_the_plain_loop_of_gae():
    given = rewards_and_values(holes=False)
    for a, b in zip(bench_gae.trl_formula(*given), gae(*given, **bench_gae.NUMBERS), strict=True):
        close(a, b)


def test_the_carrying_loop_of_gae():
    given = rewards_and_values(holes=True)
    for a, b in zip(bench_gae.verl_formula(*given), gae(*given, **bench_gae.NUMBERS), strict=True):
        close(a[given[2]], b[given[2]])


def test_verls_gae_is_whitened():
    given = rewards_and_values(holes=True)
    advantages, returns = package("verl", bench_gae.verl_package)(*given)
    ours = gae(*given, **bench_gae.NUMBERS)
    close(returns[given[2]], ours[1][given[2]])
    close(advantages[given[2]], whiten(ours[0], given[2])[given[2]])


# --- ppo_loss


def tokens():
    torch.manual_seed(0)
    t = [torch.randn(4, 33, device=DEVICE) * (0.2 if "logprobs" in n else 1.0) for n in bench_ppo_loss.NAMES]
    t.insert(3, torch.rand(4, 33, device=DEVICE) < 0.8)
    return [t[0].requires_grad_(), *t[1:4], t[4].requires_grad_(), *t[5:]]


@pytest.mark.parametrize("name", ["eager", "verl"])
def test_peers_of_ppo_loss(name):
    peer = package("verl", bench_ppo_loss.verl_package) if name == "verl" else bench_ppo_loss.eager
    loss, stats = peer(*tokens())
    ours = bench_ppo_loss.ours(*tokens())
    close(loss, ours.loss)
    if name == "eager":
        shown = ("policy_loss", "value_loss", "approx_kl", "clipfrac", "value_clipfrac", "ratio_mean", "ratio_max")
        close(stats, torch.stack([ours.stats[n] for n in shown]))
    else:
        close(stats[0], ours.stats["clipfrac"])
        close(stats[-1], ours.stats["value_clipfrac"])
    for a, b in zip(
        bench_ppo_loss.gradients_of(peer)(*tokens()),
        bench_ppo_loss.gradients_of(bench_ppo_loss.ours)(*tokens()),
        strict=True,
    ):
        close(a, b)


@pytest.mark.parametrize("name", ["eager", "liger"])
def test_peers_from_logits(name):
    peer = (
        package("liger_kernel", bench_ppo_loss.liger_from_logits)
        if name == "liger"
        else bench_ppo_loss.eager_from_logits
    )
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 6, 29, device=DEVICE), torch.randint(29, (3, 5), device=DEVICE)
    chosen = logprobs(logits[:, :-1], ids).logprobs
    old, ref = (chosen + 0.3 * torch.randn_like(chosen) for _ in range(2))
    mask = torch.rand(3, 5, device=DEVICE) < 0.7
    advantages = torch.randn(3, device=DEVICE)
    found = []
    for call in (peer, bench_ppo_loss.ours_from_logits):
        leaf = logits.clone().requires_grad_()
        loss = call(leaf, ids, old, ref, advantages, mask)
        found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])


# --- sample

SAMPLERS = {
    "vLLM's formula": ("torch", lambda given: lambda logits: bench_sample.sort_formula(logits, **given)),
    "transformers": ("transformers", bench_sample.transformers_package),
    "FlashInfer": ("flashinfer", bench_sample.flashinfer),
}


@pytest.mark.parametrize("setting", bench_sample.SETTINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_peers_of_sample_draw_from_the_same_distribution(name, setting):
    module, load = SAMPLERS[name]
    given = bench_sample.SETTINGS[setting] | ({"top_k": 5} if "top_k" in bench_sample.SETTINGS[setting] else {})
    peer = package(module, lambda: load(given))
    torch.manual_seed(0)
    many = 20_000
    logits = (torch.randn(1, 16, device=DEVICE) * 2).expand(many, 16).contiguous()
    theirs = torch.bincount(peer(logits).long(), minlength=16) / many
    ours = sample(logits, seeds=torch.arange(many, device=DEVICE), **given)
    exact = torch.zeros(16, device=DEVICE).scatter(0, ours.ids, ours.logprobs.exp())  # of all tokens that were drawn
    assert abs(float(exact.sum()) - 1) < 1e-3
    assert bool(((theirs - exact).abs() < 5 * (exact * (1 - exact) / many).sqrt() + 1e-3).all())
