"""The formulas without a kernel on a GPU: the numbers of the CPU, the same bits in every run, no wait for the GPU."""

import pytest
import torch

from rlhf_fast import losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: runs in `make gpu-check`")
B, K, T, V = 64, 4, 33, 1000


def arguments(device):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(B, T, V, generator=generator) for _ in range(2))
    logprobs, scores = torch.randn(B, K, T, generator=generator), torch.randn(B, K, generator=generator)
    mask, there = torch.rand(B, K, T, generator=generator) < 0.8, torch.rand(B, K, generator=generator) < 0.8
    ids, groups = (torch.randint(0, n, (B, T), generator=generator) for n in (V, 9))
    given = {
        "pointwise": (losses.pointwise_loss, (scores, there), {"mask": mask[..., 0]}),
        "pairs": (losses.ranking_loss, (scores, ids[:, :K]), {"mask": there}),
        "plackett_luce": (losses.ranking_loss, (scores, ids[:, :K]), {"mask": there, "kind": "plackett_luce"}),
        "rrhf": (lambda *x: losses.rrhf_loss(*x).loss, (logprobs, mask, scores), {}),
        "dpo": (losses.dpo_loss, tuple(scores.T), {}),
        "calibration": (losses.pairwise_calibration_error, tuple(scores.T[:2]), {}),
    }
    for kind in ("grpo", "dr_grpo", "rloo", "reinforce_pp"):
        given[kind] = losses.group_advantages, (scores[:, 0], groups[:, 0]), {"kind": kind}
    for kind in ("forward", "reverse", "jsd"):
        options = {"kind": kind, "temperature": 2.0, "ids": ids, "advantages": logprobs[:, 0]}
        given[kind] = losses.distill_loss, (logits, teacher, mask[:, 0]), options

    def moved(x):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    return {
        name: (f, [moved(x) for x in args], {key: moved(x) for key, x in options.items()})
        for name, (f, args, options) in given.items()
    }


def result_and_gradient(call, args, options):
    leaf = args[0].detach().clone().requires_grad_()
    out = call(leaf, *args[1:], **options)
    if out.requires_grad:
        out.backward()
    return out.detach(), leaf.grad


@pytest.mark.parametrize("name", arguments("cpu"))
def test_the_numbers_of_the_cpu_without_a_wait(name):
    expected = result_and_gradient(*arguments("cpu")[name])
    case = arguments("cuda")[name]
    first = result_and_gradient(*case)  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = result_and_gradient(*case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for on_cpu, on_gpu, second in zip(expected, first, again, strict=True):
        if on_cpu is not None:
            assert torch.equal(on_gpu, second)
            assert torch.allclose(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_an_id_outside_of_the_vocabulary_makes_the_loss_nan(kind):
    logits, mask = torch.zeros(2, 5, device="cuda"), torch.tensor([True, False], device="cuda")
    options = {"kind": kind, "advantages": torch.ones(2, device="cuda")}
    ids = torch.tensor([4, 5], device="cuda")
    assert losses.distill_loss(logits, logits + 1, mask, ids=ids, **options).isfinite()  # masked there
    assert losses.distill_loss(logits, logits + 1, mask, ids=ids.flip(0), **options).isnan()
