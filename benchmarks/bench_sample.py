"""sample against its reference and what trainers and servers run: transformers' processors and torch.multinomial.

Goals (two cores, 32 x 128256, float32): at least 45 times faster than transformers with top-k 50 and top-p .9, 30 times
with top-p alone, 28 times with min-p and 20 times without a filter, with all outputs where transformers has the id
alone. On a GPU: within 3 times the time to read the logits once, 1.3 times without filters.
"""

from importlib.util import find_spec

import torch
from harness import device_name, devices, interleave, save, table
from torch import Tensor

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


def transformers_sample(logits: Tensor, warpers: list) -> Tensor:
    """What transformers' generate does with the logits of a step: the id, nothing else."""
    scores = logits.float()
    for warper in warpers:
        scores = warper(None, scores)
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def sorted_sample(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0):
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
    return (scores.softmax(-1) / torch.empty_like(scores).exponential_()).argmax(-1)


def peers(logits: Tensor, given: dict) -> dict:
    """Name → call, of the peers that can be imported."""
    found = {"sort (vLLM)": lambda: sorted_sample(logits, **given)}
    if find_spec("transformers"):
        from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        kinds = {
            "temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper,
            "min_p": MinPLogitsWarper,
        }  # fmt: skip
        warpers = [kind(given[name]) for name, kind in kinds.items() if name in given]
        found["transformers"] = lambda: transformers_sample(logits, warpers)
    if logits.is_cuda and find_spec("flashinfer") and "min_p" not in given:
        from flashinfer.sampling import top_k_top_p_sampling_from_logits

        k, p, t = given.get("top_k", logits.shape[1]), given.get("top_p", 1.0), given.get("temperature", 1.0)
        found["FlashInfer"] = lambda: top_k_top_p_sampling_from_logits(logits / t, k, p)
    return found


def measure(name: str, batch: int, size: int, dtype: torch.dtype, device: str) -> dict:
    """One row of the table: every candidate on one shape and setting."""
    given = SETTINGS[name]
    logits = (torch.randn(batch, size) * 2.5).to(device, dtype)
    seeds, positions = torch.arange(batch, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
    knobs = [knob(n, given.get(n, off or 0), logits) for n, (_, _, off) in KNOBS.items() if n != "top_p"]
    knobs.insert(2, knob("top_p", given.get("top_p", 1.0), logits))
    forms = IMPLEMENTATIONS["sample"]
    candidates = {"ours": lambda: sample(logits, seeds=seeds, **given), "read": lambda: logits.amax(-1)}
    names = ("cuda", "triton") if device == "cuda" else ()
    for form in [n for n in (*names, "reference") if n in forms]:
        candidates[form] = lambda run=forms[form]: run(logits, seeds, positions, *knobs)
    candidates |= peers(logits, given)
    times = interleave(candidates, device=device)
    row = {"case": f"{name} {batch}x{size} {str(dtype).removeprefix('torch.')}", "ours, us": times["ours"] * 1e6}
    row["GB/s"] = logits.nbytes / times["ours"] / 1e9
    row["/ read"] = times["ours"] / times["read"]
    return row | {f"{n} / ours": t / times["ours"] for n, t in times.items() if n not in ("ours", "read")}


def main() -> None:
    torch.manual_seed(0)
    for device in devices():
        shapes = [(32, 128256)] if device == "cpu" else [(8, 131072), (128, 131072), (512, 131072)]
        rows = [measure(name, *shape, torch.float32, device) for shape in shapes for name in SETTINGS]
        rows += [measure(name, *shapes[0], torch.bfloat16, device) for name in SETTINGS]
        table(f"sample on {device_name(device)}, medians of interleaved runs", rows)
        print(f"written to {save('sample', device, rows)}")


if __name__ == "__main__":
    main()
