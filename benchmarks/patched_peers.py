"""What rf.patch changes in its peers: time and peak memory of their own functions, before and after, in one run.

Run it where the peers are installed (``make .venv/peers``); a peer that is absent is left out. Both forms of a function
take turns; the time is the ratio of medians, the memory the process's own peak above what it held before the call.
"""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import rlhf_fast as rf

ROUNDS = 7
V, H = 50257, 256


def learn(function: Callable, *leaves: torch.Tensor) -> Callable:
    """The function and its backward."""

    def run() -> None:
        sum(out.sum() for out in function() if out is not None and out.requires_grad).backward()
        for leaf in leaves:
            leaf.grad = None

    return run


def trl() -> Iterator[tuple[str, Callable]]:
    import trl.trainer.utils as utils

    logits = torch.randn(4, 128, V, requires_grad=True)
    ids = torch.randint(V, (4, 128))
    hidden, weight = torch.randn(512, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    with torch.no_grad():
        hidden /= H**0.5

    def from_logits() -> tuple:
        return utils.selective_log_softmax(logits, ids), utils.entropy_from_logits(logits)

    def head() -> tuple:
        rest = (None, ids.view(-1), 1.0, 32768, None, 1.0, ("entropy",))
        return utils._ChunkedLogProbFunction.apply(hidden, weight, *rest)

    yield "selective_log_softmax + entropy_from_logits, 512 x 50257", learn(from_logits, logits)
    yield "the chunked head, 512 x 256 x 50257", learn(head, hidden, weight)
    yield from trl_losses()


def trl_losses() -> Iterator[tuple[str, Callable]]:
    """The trainers' own methods, of logprobs that are there: a batch of which every token counts."""
    import trl.trainer.utils as utils
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer
    from trl_batches import Head, batch, pairs, trainer

    generator = torch.Generator().manual_seed(0)
    inputs, leaves = batch(generator, 64, 1024)
    inputs["completion_mask"].fill_(1)
    logps = leaves["logps"].requires_grad_()
    kinds = {
        "GRPO's loss": (GRPOTrainer, {}),
        "GRPO's loss, per sequence": (GRPOTrainer, {"loss_type": "grpo"}),
        "GRPO's loss with its KL": (GRPOTrainer, {"beta": 0.04, "use_bias_correction_kl": True}),
        "RLOO's loss": (RLOOTrainer, {}),
    }
    for name, (kind, options) in kinds.items():
        self = trainer(**options)
        self._get_per_token_logps_and_entropies = lambda *_, **__: (logps, leaves["entropies"], None)
        call = lambda kind=kind, self=self: (kind._compute_loss(self, None, inputs),)  # noqa: E731
        yield f"{name}, 64 x 1024", learn(call, logps)
    if not hasattr(utils, "_ChunkedLogProbFunction") or utils._ChunkedLogProbFunction.__module__ == utils.__name__:
        given, logits, ref = pairs(generator, 2, 96, V)
        logits.requires_grad_()
        self = trainer(beta=0.1, ref_model=Head(ref))
        self.model = Head(logits)
        yield (
            "DPO's loss, from the logits of 4 x 96 x 50257",
            learn(lambda: (DPOTrainer._compute_loss(self, self.model, given, False),), logits),
        )


def verl() -> Iterator[tuple[str, Callable]]:
    from peers import import_with_stubs

    modules = ["verl.trainer.ppo.core_algos", "verl.utils.torch_functional"]
    import_with_stubs(modules, "ray", "torchdata", "hydra", "codetiming", "orjson")
    import verl.trainer.ppo.core_algos as algos
    import verl.utils.torch_functional as functional
    from verl.workers.config import ActorConfig

    logits, ids = torch.randn(512, V, requires_grad=True), torch.randint(V, (512,))
    x, y, z = (torch.randn(64, 1024, requires_grad=i == 0) for i in range(3))
    mask, config = (
        torch.ones(64, 1024, dtype=torch.int64),
        ActorConfig(strategy="fsdp", use_dynamic_bsz=True, rollout_n=1),
    )

    def from_logits() -> tuple:
        return functional.logprobs_from_logits(logits, ids), functional.entropy_from_logits(logits)

    yield "logprobs_from_logits + entropy_from_logits, 512 x 50257", learn(from_logits, logits)
    yield "GAE, 64 x 1024", lambda: algos.compute_gae_advantage_return(y, z, mask, 1.0, 0.95)
    yield (
        "vanilla policy loss, 64 x 1024",
        learn(lambda: algos.compute_policy_loss_vanilla(y, x, z, mask, "token-mean", config)[:1], x),
    )
    yield "value loss, 64 x 1024", learn(lambda: algos.compute_value_loss(x, y, z, mask, 0.5)[:1], x)


def openrlhf() -> Iterator[tuple[str, Callable]]:
    from peers import import_with_stubs

    modules = ["openrlhf.models", "openrlhf.trainer.ppo_utils.experience_maker"]
    import_with_stubs(modules, "ray", "deepspeed", "vllm", "flash_attn", "pylatexenc", "aiohttp", "torchdata")
    import openrlhf.models.loss as loss
    import openrlhf.models.utils as utils
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    logits, ids = torch.randn(1, 512, V, requires_grad=True), torch.randint(V, (1, 512))
    x, y, z = (torch.randn(64, 1024, requires_grad=i == 0) for i in range(3))
    mask, policy, value = torch.ones(64, 1024, dtype=torch.int64), loss.PolicyLoss(), loss.ValueLoss(0.2)

    def from_logits() -> tuple:
        return utils.log_probs_from_logits(logits, ids), utils.compute_entropy(logits)

    yield "log_probs_from_logits + compute_entropy, 512 x 50257", learn(from_logits, logits)
    yield "GAE, 64 x 1024", lambda: RemoteExperienceMaker.get_advantages_and_returns(None, z, y, mask, 1.0, 0.95)
    yield "PolicyLoss, 64 x 1024", learn(lambda: policy(x, y, z, mask)[:1], x)
    yield "ValueLoss, 64 x 1024", learn(lambda: (value(x, y, z, mask),), x)


def held(name: str) -> int:
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(name))
    return int(line.split()[1])


def measure(call: Callable) -> tuple[float, float]:
    """Seconds, and MiB above what was held before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed may still be held, and would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before, start = held("VmRSS"), time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return seconds, (held("VmHWM") - before) / 1024


def main() -> None:
    where = f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU"
    print(f"{where}, float32, with the backward; {ROUNDS} rounds")
    print("| peer | what | time before / after | MiB before → after |\n|---|---|---|---|")
    for peer in (trl, verl, openrlhf):
        if find_spec(peer.__name__) is None:
            continue
        for name, call in peer():
            rounds: tuple[list, list] = ([], [])
            for i in range(ROUNDS + 1):
                before = measure(call)
                with rf.patch(peer.__name__):
                    after = measure(call)
                if i:  # the first round warms up, and compiles OpenRLHF's entropy
                    rounds[0].append(before)
                    rounds[1].append(after)
            (t0, m0), (t1, m1) = ([statistics.median(column) for column in zip(*r, strict=True)] for r in rounds)
            memory = f"{m0:.0f} → {m1:.0f}" if m0 > 20 else "–"
            print(f"| {peer.__name__} | {name} | {t0 / t1:.1f} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
