"""Timing that holds on a shared machine: candidates take turns, medians are compared, ratios come from one run."""

import gc
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from rlhf_fast.bench.peers import sentence, wanted

#: Below this a call on a GPU costs the host more than the device: it is measured in a CUDA graph too.
SHORT = 1e-3


@dataclass
class Case:
    """One row: a shape, what must move through memory for it, and who takes part.

    ``inputs`` are sets of arguments of one shape, taken in turn so that on a GPU none of them is in its L2. ``peers``
    take the same arguments as ``ours``. ``floors`` are what ours is compared with the other way round: a copy, a read.
    """

    name: str
    bytes: int
    inputs: list[tuple]
    ours: Callable
    peers: dict[str, Callable]
    floors: dict[str, Callable] = field(default_factory=dict)
    agrees: Callable[[object, object], bool] = lambda ours, theirs: True
    forward: Callable | None = None  # of a case with a backward: the forward alone, to count its launches
    gradient: int = 0  # bytes that ours leaves behind, which it cannot do without


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


def devices() -> list[str]:
    """Where this machine can be measured: on its CPU and on its GPU if there is one."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def device_name(device: str) -> str:
    """The name under which results of this machine are kept."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    facts = Path("/proc/cpuinfo")  # of Linux
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} x{torch.get_num_threads()}"


def sets(make: Callable[[], tuple], device: str, *, at_least: int = 1) -> list[tuple]:
    """Enough sets of arguments that they do not fit a GPU's L2 twice; one on a CPU, whose goals are set for that."""
    found = [make() for _ in range(at_least)]
    if device == "cuda":
        size = sum(t.nbytes for t in found[0] if isinstance(t, torch.Tensor))
        enough = 2 * torch.cuda.get_device_properties(0).L2_cache_size // max(size, 1) + 1
        found += [make() for _ in range(min(enough, 256) - len(found))]
    return found


#: Rounds of interleave(), however slow the candidates: of three one odd one out is too many for a median.
LEAST = 7


def interleave(
    candidates: dict[str, Callable], *, device: str = "cpu", seconds: float | None = None
) -> dict[str, float]:
    """Median seconds of each candidate. Each round runs all of them, starting with another one every time.

    A fast candidate is repeated for about 3 ms within a round, so that what the one before it left in the caches and in
    the allocator is not all that is measured. ``seconds`` is the time for each candidate, after two calls to warm up:
    by default 1 on a CPU, which it shares, and 0.15 on a GPU, which it does not.

    On a CPU a slow candidate runs once more just before it is timed. What the one before it freed may have gone back to
    the host of a virtual machine, which takes 10 times as long to hand memory out as to have it cleared.
    """
    if seconds is None:
        seconds = 1.0 if device == "cpu" else 0.15
    repeats, rounds = {}, LEAST
    for name, call in candidates.items():
        call()
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        once = time.perf_counter() - start
        repeats[name] = max(1, int(3e-3 / max(once, 1e-7)))
        rounds = max(rounds, min(200, int(seconds / (once * repeats[name]))))
    gc.collect()
    gc.disable()  # a collection of all that torch.compile left behind would be charged to whoever is running
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    began = time.perf_counter()
    for turn in range(rounds):
        if turn >= LEAST and time.perf_counter() - began > seconds * len(names):
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if device == "cpu" and repeats[name] == 1:
                candidates[name]()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                candidates[name]()
            synchronize(device)
            times[name].append((time.perf_counter() - start) / repeats[name])
    gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def turning(call: Callable, inputs: Sequence[tuple]) -> Callable[[], object]:
    """``call`` on the next set of ``inputs`` each time."""
    following = itertools.cycle(inputs)
    return lambda: call(*next(following))


def able(case: Case, device: str, notes: dict[str, str], peers: Sequence[str] | None = None) -> dict[str, Callable]:
    """Those of ``peers``, all if None, that run here and agree with ours; why the others do not goes to ``notes``."""
    found, expected = {}, case.ours(*case.inputs[0])
    for name, call in case.peers.items():
        if not wanted(name, peers):
            continue
        try:
            result = call(*case.inputs[0])
            synchronize(device)
            if case.agrees(expected, result):
                found[name] = call
            else:
                notes[f"{name}, {case.name}"] = "computes something else"
        except Exception as error:
            notes[f"{name}, {case.name}"] = sentence(error)
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def measure(
    case: Case, device: str, notes: dict[str, str], *, peers: Sequence[str] | None = None, seconds: float | None = None
) -> dict:
    """The row of one case, with ``seconds`` for each candidate and those of ``peers`` alone if some are named."""
    beside = able(case, device, notes, peers)
    everyone = {"ours": case.ours, **beside, **{f"floor {name}": call for name, call in case.floors.items()}}
    turns = {name: turning(call, case.inputs) for name, call in everyone.items()}
    times = interleave(turns, device=device, seconds=seconds)
    ours = times["ours"]
    row = {"case": case.name, "us": ours * 1e6}
    facts: dict = {}
    if device == "cuda":
        facts = on_gpu(case, row, short=ours < SHORT)
        ours = row.get("graph us", row["us"]) / 1e6
        if "graph us" in row and "compile" in beside:
            with suppress(RuntimeError):  # a peer that a graph cannot capture has no figure there
                row["compile, graph"] = graph_seconds(beside["compile"], case.inputs) * 1e6 / row["graph us"]
    speed = case.bytes / ours / 1e9
    row |= {"GB/s": speed, "% copy": 100 * speed / copy_bandwidth(device)}
    if device == "cuda":
        row["% read"] = 100 * speed / read_bandwidth()
    for name, call in case.floors.items():
        in_graph = "graph us" in row
        row[f"/ {name}"] = ours / (graph_seconds(call, case.inputs) if in_graph else times[f"floor {name}"])
    peaks = [peak_bytes(turning(case.ours, case.inputs), device) for _ in range(3)]
    peak = None if None in peaks else max(peaks)
    if peak is not None and peak < 0.9 * case.gradient:
        peak = None  # the gradient alone is new memory: pages of others went meanwhile, as where memory is short
    row["peak MiB"] = None if peak is None else peak / 2**20
    if case.gradient and peak is not None:
        row["peak / gradient"] = peak / case.gradient
    return row | facts | {"ratios": {name: times[name] / times["ours"] for name in beside}}


def on_gpu(case: Case, row: dict, *, short: bool) -> dict:
    """What a profiler and a CUDA graph say of ours; a ``short`` call's time in a graph goes to ``row``."""
    call = turning(case.ours, case.inputs)
    facts = {"launches": launches(turning(case.forward or case.ours, case.inputs))}
    if case.forward:
        facts["with backward"] = launches(call)
    facts |= {"syncs": host_syncs(call), "captured": 1}
    try:
        seconds = graph_seconds(case.ours, case.inputs if short else case.inputs[:1])
        if short:
            row["graph us"] = seconds * 1e6
    except RuntimeError:
        facts["captured"] = 0
    return facts


@cache
def copy_bandwidth(device: str) -> float:
    """GB/s, reads and writes counted, of a copy between tensors larger than any cache, of random data."""
    source = _large(device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / interleave({"copy": lambda: target.copy_(source)}, device=device)["copy"] / 1e9


@cache
def read_bandwidth() -> float:
    """GB/s of the fastest pass over a large tensor that PyTorch has on this GPU, or of the copy if that is faster."""
    source = _large("cuda")
    passes = {"sum": source.sum, "amax": source.amax, "norm": source.norm}
    times = interleave(passes, device="cuda")
    return max(copy_bandwidth("cuda"), source.nbytes / min(times.values()) / 1e9)


def _large(device: str) -> torch.Tensor:
    """Random float32, 256 MiB on a CPU and 1 GiB on a GPU: many times their largest caches."""
    return torch.randn(2**26 if device == "cpu" else 2**28, device=device)


def graph_seconds(call: Callable, inputs: Sequence[tuple]) -> float:
    """Seconds per call when a round over the inputs is one CUDA graph: the device's share, without the host's."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # a graph wants what it captures to have run on a side stream
        for given in inputs[:3]:
            call(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for given in inputs:
            call(*given)
    times = interleave({"replay": graph.replay}, device="cuda")
    return times["replay"] / len(inputs)


def launches(call: Callable) -> int:
    """How many kernels, copies and fills one call starts on the GPU; 0 where the profiler sees none."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(on_gpu)


def host_syncs(call: Callable) -> int:
    """0 if one call waits nowhere for the GPU, else 1."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0


def peak_bytes(call: Callable, device: str) -> int | None:
    """How far memory rises while ``call`` runs; None where Linux does not let the mark be reset."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = status("VmRSS")
    call()
    return status("VmHWM") - before
