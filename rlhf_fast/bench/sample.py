"""sample against what trainers and servers run: transformers' processors and multinomial, vLLM's sort, FlashInfer.

Goals (two cores, 32 x 128256, float32): at least 45 times faster than transformers with top-k 50 and top-p .9, 30 times
with top-p alone, 28 times with min-p and 20 times without a filter, with all outputs where transformers has the id
alone. On an H100: from 128 rows within 3 times the time to read the logits once, 1.3 times without filters; 8 rows in
25 us; faster than FlashInfer everywhere.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlhf_fast.bench.harness import Case, sets
from rlhf_fast.bench.peers import compiled, package_or_formula
from rlhf_fast.dispatch import IMPLEMENTATIONS
from rlhf_fast.ops import sample
from rlhf_fast.ops.sample.knobs import KNOBS, knob

SETTINGS = {
    "k50 + p.9": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "p.9": {"top_p": 0.9},
    "min-p .05": {"min_p": 0.05},
    "plain": {},
    "T .8": {"temperature": 0.8},
}
REMARK = (
    "Floor: the logits read once. Ours gives ids, both logprobs, kept mass, entropy, kept and status; all others give "
    "the id alone.\nNo gradient. 'compile' is the formula of a draw without filters, compiled."
)


def transformers_package(given: dict) -> Callable[[Tensor], Tensor]:
    """What transformers' generate does with the logits of a step: its warpers, a softmax and torch.multinomial."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    kinds = {
        "temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }  # fmt: skip
    warpers = [kind(given[name]) for name, kind in kinds.items() if name in given]

    def call(logits: Tensor) -> Tensor:
        scores = logits.float()
        for warper in warpers:
            scores = warper(None, scores)
        return torch.multinomial(scores.softmax(-1), 1)[:, 0]

    return call


def sort_formula(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """What vLLM does in plain torch: one sort for top-k and top-p, and an exponential race."""
    scores = logits.float() / temperature
    if min_p > 0:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    if top_k > 0 or top_p < 1:
        ordered, index = scores.sort(-1)
        if top_k > 0:
            ordered = ordered.masked_fill(ordered < ordered[:, -top_k, None], -torch.inf)
        if top_p < 1:
            drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
            drop[:, -1] = False
            ordered = ordered.masked_fill(drop, -torch.inf)
        scores = scores.scatter(-1, index, ordered)
    return race(scores)


def race(scores: Tensor) -> Tensor:
    """A draw from the softmax: the smallest of exponential variables, as vLLM does it."""
    return (scores.softmax(-1) / torch.empty_like(scores).exponential_()).argmax(-1)


def flashinfer(given: dict) -> Callable[[Tensor], Tensor]:
    """FlashInfer's shortest way for each setting; it wants float32, and a seed of its own or torch's generator."""
    from flashinfer import sampling

    t, k, p = given.get("temperature", 1.0), given.get("top_k", 0), given.get("top_p", 1.0)

    def scaled(logits: Tensor) -> Tensor:
        return logits.float() if t == 1.0 else logits.float() / t

    if "min_p" in given:
        return lambda logits: sampling.min_p_sampling_from_probs(sampling.softmax(logits.float(), t), given["min_p"])
    if k:
        return lambda logits: sampling.top_k_top_p_sampling_from_logits(scaled(logits), k, p)
    if p < 1:
        return lambda logits: sampling.top_p_sampling_from_probs(sampling.softmax(logits.float(), t), p)
    return lambda logits: sampling.sampling_from_logits(scaled(logits))


def peers(device: str, given: dict, notes: dict[str, str]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Label → call of everybody else for one setting; why somebody is missing goes to ``notes``."""
    found: dict[str, Callable] = {"vLLM's formula": lambda logits: sort_formula(logits, **given)}
    if not given:
        found["compile"] = compiled(lambda logits: race(logits.float()), device)
    load = lambda: transformers_package(given)  # noqa: E731
    found |= package_or_formula("transformers", "transformers", load, None, notes)
    if device == "cuda":
        found |= package_or_formula("FlashInfer", "flashinfer-python", lambda: flashinfer(given), None, notes)
    else:
        notes["FlashInfer"] = "needs a GPU"
    return found


def agrees(ours: tuple[Tensor, ...], theirs: Tensor | tuple[Tensor, ...]) -> bool:
    """That there is a token for each row; which ones is the tests' business."""
    ids = theirs if isinstance(theirs, Tensor) else theirs[0]
    return ids.shape == ours[0].shape and bool((ids >= 0).all())


def case(name: str, batch: int, size: int, dtype: torch.dtype, device: str, notes: dict[str, str]) -> Case:
    """Every candidate on one shape and setting."""
    setting = SETTINGS[name]
    seeds, positions = torch.arange(batch, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
    inputs = sets(lambda: ((torch.randn(batch, size, device=device) * 2.5).to(dtype),), device)
    knobs = [knob(n, setting.get(n, off or 0), inputs[0][0]) for n, (_, _, off) in KNOBS.items() if n != "top_p"]
    knobs.insert(2, knob("top_p", setting.get("top_p", 1.0), inputs[0][0]))
    forms, given = IMPLEMENTATIONS["sample"], peers(device, setting, notes)
    names = (*(("cuda", "triton") if device == "cuda" else ()), *(("reference",) if batch <= 32 else ()))
    for form in [n for n in names if n in forms]:
        given[form] = lambda logits, run=forms[form]: run(logits, seeds, positions, *knobs)
    return Case(
        name=f"{name}, {batch}x{size} {str(dtype).removeprefix('torch.')}",
        bytes=inputs[0][0].nbytes,
        inputs=inputs,
        ours=lambda logits: sample(logits, seeds=seeds, positions=positions, **setting),
        peers=given,
        floors={"amax": lambda logits: logits.amax(-1)},
        agrees=agrees,
    )


def cases(device: str, notes: dict[str, str]) -> Iterator[Case]:
    """Every shape of the suite on ``device``; why a peer is missing goes to ``notes``."""
    batches, size = ((32,), 128256) if device == "cpu" else ((1, 8, 128, 512), 131072)
    names = [name for name in SETTINGS if device == "cpu" or name != "T .8"]  # there as fast as without
    for batch in batches:
        for name in names:
            yield case(name, batch, size, torch.float32, device, notes)
    for name in names:
        yield case(name, batches[0] if device == "cpu" else 128, size, torch.bfloat16, device, notes)
