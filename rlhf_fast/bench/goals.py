"""The goals of speed and memory, judged on the rows of a benchmark: a measured ratio, its bound, met or not.

C are those on two cores of a CPU, G those on an H100 or H200; on another GPU the shares of bandwidth still say
something, the microseconds less. A goal without a row that was measured is left out, never met by default.
"""

from collections.abc import Callable, Iterator

FORMS = ("cpp", "cuda", "triton", "reference", "eager")  # not other people's code


def ratio(row: dict, peer: str) -> float | None:
    """Time over ours of the peer whose label begins so."""
    return next((value for name, value in row["ratios"].items() if name.startswith(peer)), None)


def least(row: dict) -> float | None:
    """Time over ours of the fastest that is not ours."""
    return min((value for name, value in row["ratios"].items() if not name.startswith(FORMS)), default=None)


def judge(op: str, device: str, rows: list[dict]) -> list[dict]:
    """Every goal of ``op`` on ``device`` that ``rows`` can tell about."""
    found = GOALS.get((op, device), lambda rows: iter(()))(rows)
    return [
        {"goal": goal, "what": what, "measured": value, "bound": bound, "met": _met(value, bound)}
        for goal, what, value, bound in found
        if value is not None
    ]


def _met(value: float, bound: str) -> bool:
    sense, number = bound.split()
    return value >= float(number) if sense == "≥" else value <= float(number)


def line(goal: dict) -> str:
    """Such as ``C1 float32 against TRL: 50.1 (goal ≥ 18) ✓``."""
    met = "✓" if goal["met"] else "✗"
    return f"{goal['goal']} {goal['what']}: {goal['measured']:.3g} (goal {goal['bound']}) {met}"


Found = Iterator[tuple[str, str, float | None, str]]


def _logprobs_cpu(rows: list[dict]) -> Found:
    for row in rows:
        backward = "backward" in row["case"]
        if not backward:
            yield "C1", f"{row['case']}, TRL's time over ours", ratio(row, "TRL"), "≥ 18"
            if "float32" in row["case"]:
                yield "C1", f"{row['case']}, ours over logits.sum()", row["/ sum"], "≤ 1.8"
        elif "float32" in row["case"]:
            yield "C2", f"{row['case']}, eager over ours", ratio(row, "eager"), "≥ 6"
            yield "C2", f"{row['case']}, compile over ours", ratio(row, "compile"), "≥ 4"
        else:
            yield "C2", f"{row['case']}, eager over ours", ratio(row, "eager"), "≥ 15"
        if backward:
            memory = row.get("peak / gradient")
            yield "C2", f"{row['case']}, memory over the gradient, to the page", memory, "≤ 1.02"


def _gae_cpu(rows: list[dict]) -> Found:
    for row in rows:
        for shape, verl, trl in (("64x1024", "≥ 300", "≥ 100"), ("512x1024", "≥ 60", "≥ 25")):
            if row["case"] == shape:
                yield "C3", f"{shape}, verl's time over ours", ratio(row, "verl"), verl
                yield "C3", f"{shape}, TRL's time over ours", ratio(row, "TRL"), trl
                # At the small size 8 us of checks and dispatcher, a price of any op in Python, hide the kernel.
                kernel = row["/ copy"] * ratio(row, "cpp") if ratio(row, "cpp") else None
                yield "C3", f"{shape}, the kernel over a copy of the bytes", kernel, "≤ 3"
                if shape == "512x1024":
                    yield "C3", f"{shape}, ours over a copy of the bytes", row["/ copy"], "≤ 3"


def _sample_cpu(rows: list[dict]) -> Found:
    bounds = {"k50 + p.9": "≥ 45", "p.9": "≥ 30", "min-p .05": "≥ 28", "plain": "≥ 20"}
    for row in rows:
        name, _, shape = row["case"].partition(", ")
        if name in bounds and shape.endswith("float32"):
            yield "C4", f"{row['case']}, transformers over ours", ratio(row, "transformers"), bounds[name]


def _ppo_loss_cpu(rows: list[dict]) -> Found:
    for row in rows:
        if row["case"] == "512x2048":
            yield "C5", f"{row['case']} forward and backward, eager over ours", ratio(row, "eager"), "≥ 10"


def _logprobs_cuda(rows: list[dict]) -> Found:
    for row in rows:
        if "bfloat16" in row["case"]:
            if "backward" in row["case"]:
                yield "G2", f"{row['case']}, share of the floor of 3NVb", row["% copy"] / 100, "≥ 0.85"
            else:
                yield "G1", f"{row['case']}, share of the read bandwidth", row["% read"] / 100, "≥ 0.9"
                yield "G1", f"{row['case']}, fastest peer over ours", least(row), "≥ 1"
    yield from _g10(rows)


def _kl_cuda(rows: list[dict]) -> Found:
    for row in rows:
        if "bfloat16" in row["case"] and "backward" in row["case"]:
            yield "G4", f"{row['case']}, share of the floor of 3NVb", row["% copy"] / 100, "≥ 0.8"
            yield "G4", f"{row['case']}, compile over ours", ratio(row, "compile"), "≥ 5"
    yield from _g10(rows)


def _gae_cuda(rows: list[dict]) -> Found:
    for row in rows:
        time = row.get("graph us", row["us"])
        if row["case"] in ("64x1024", "512x1024"):
            bound = "≤ 6" if row["case"] == "64x1024" else "≤ 8"
            yield "G7", f"{row['case']}, µs on the device (from Python {row['us']:.3g})", time, bound
        elif "/ copy" in row:
            bound = "≤ 3" if "packed" in row["case"] else "≤ 1.3"
            yield "G7", f"{row['case']}, ours over a copy of the bytes", row["/ copy"], bound
    yield from _g10(rows)


def _ppo_loss_cuda(rows: list[dict]) -> Found:
    for row in rows:
        if "launches" in row and "logits" not in row["case"]:
            what = "launches of the forward, its small reduction included"
            yield "G8", f"{row['case']}, {what}", row["launches"] or None, "≤ 2"
            backward = row["with backward"] - row["launches"]
            what = "launches of the backward, autograd's own fill included"
            yield "G8", f"{row['case']}, {what}", backward if row["launches"] else None, "≤ 2"
    yield from _g10(rows)


def _sample_cuda(rows: list[dict]) -> Found:
    for row in rows:
        name, _, shape = row["case"].partition(", ")
        if int(shape.split("x")[0]) >= 128:
            bound = "≤ 1.3" if name in ("plain", "T .8") else "≤ 3"
            yield "G9", f"{row['case']}, ours over the floor of one read", 100 / row["% read"], bound
        else:
            time = row.get("graph us", row["us"])
            yield "G9", f"{row['case']}, µs on the device (from Python {row['us']:.3g})", time, "≤ 25"
        yield "G9", f"{row['case']}, FlashInfer over ours", ratio(row, "FlashInfer"), "≥ 1"
    yield from _g10(rows)


def _g10(rows: list[dict]) -> Found:
    """The first half of G10; the tests on a GPU count what is compiled for 50 random lengths."""
    yield "G10", "calls of all rows that wait for the GPU", sum(row["syncs"] for row in rows), "≤ 0"
    yield "G10", "rows whose call a CUDA graph cannot capture", sum(not row["captured"] for row in rows), "≤ 0"


GOALS: dict[tuple[str, str], Callable[[list[dict]], Found]] = {
    ("advantages", "cuda"): _g10,
    ("gae", "cpu"): _gae_cpu,
    ("gae", "cuda"): _gae_cuda,
    ("kl", "cuda"): _kl_cuda,
    ("logprobs", "cpu"): _logprobs_cpu,
    ("logprobs", "cuda"): _logprobs_cuda,
    ("ppo_loss", "cpu"): _ppo_loss_cpu,
    ("ppo_loss", "cuda"): _ppo_loss_cuda,
    ("sample", "cpu"): _sample_cpu,
    ("sample", "cuda"): _sample_cuda,
}
