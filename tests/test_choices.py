"""Which kernel serves a GPU follows from what was measured on one, once something was; and Triton's on its device."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast import dispatch

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SLACK = 1.05  # a choice may be so much slower in a row: medians of one run differ by that


def measured(results: list[dict]) -> dict[str, list[tuple[str, dict[str, float]]]]:
    """Op → (GPU and row, seconds of either kernel in any unit), of every row that has timed both."""
    found: dict[str, list[tuple[str, dict[str, float]]]] = {}
    for of_device in results:
        for op, content in of_device.items():
            for row in content["rows"] if isinstance(content, dict) else ():
                ratios = row.get("ratios", {}) | row
                times = {name: ratios.get(name, ratios.get(f"{name} / ours")) for name in ("cuda", "triton")}
                if None not in times.values():
                    found.setdefault(op, []).append((f"{of_device['device']}: {next(iter(row.values()))}", times))
    return found


def contradictions(op: str, choice: dispatch.Choice, rows: list[tuple[str, dict[str, float]]]) -> list[str]:
    """Where the committed figures say otherwise than the choice."""
    first, second = choice.order
    slower = [where for where, times in rows if times[first] > SLACK * times[second]]
    found = [f"{op}: {second} is faster than {first} on {where}" for where in slower]
    if bool(choice.measured) != bool(rows):
        found.append(f"{op}: measured is {choice.measured!r}, the results have {len(rows)} rows with both kernels")
    return found


def test_every_op_has_a_choice_between_both_kernels():
    assert set(dispatch.CHOICES) == {op for op in dispatch.IMPLEMENTATIONS if not op.endswith("_backward")}
    for choice in dispatch.CHOICES.values():
        assert sorted(choice.order) == ["cuda", "triton"]
        assert choice.argument


def test_the_choices_follow_the_committed_measurements():
    found = measured([json.loads(path.read_text()) for path in RESULTS.glob("*.json")])
    wrong = [line for op, choice in dispatch.CHOICES.items() for line in contradictions(op, choice, found.get(op, []))]
    assert wrong == []
    if not found:
        pytest.skip("no results of a GPU are committed: every choice rests on its argument and says so")


def test_a_contradiction_is_seen():
    row = {"shape": "64x1024", "ours, us": 5.0, "cuda / ours": 1.0, "triton / ours": 0.9}
    found = measured([{"device": "H1", "gae": {"rows": [row, {"shape": "8x8", "cuda / ours": 1.0}]}}])
    assert (
        measured([{"device": "H1", "gae": {"rows": [{"case": "64x1024", "ratios": {"cuda": 1.0, "triton": 0.9}}]}}])
        == found
    )
    assert found == {"gae": [("H1: 64x1024", {"cuda": 1.0, "triton": 0.9})]}
    cuda, triton = (dispatch.Choice(order, "because", "H1") for order in (("cuda", "triton"), ("triton", "cuda")))
    assert contradictions("gae", cuda, found["gae"]) == ["gae: triton is faster than cuda on H1: 64x1024"]
    assert contradictions("gae", triton, found["gae"]) == []
    assert "0 rows" in contradictions("gae", triton, [])[0]
    assert "1 rows" in contradictions("gae", triton._replace(measured=""), found["gae"])[0]


@pytest.mark.parametrize("device", [torch.device("cuda", 1), torch.device("cpu")])
def test_triton_launches_on_the_device_of_the_tensors(monkeypatch, device):
    """Triton asks for the current device, which need not be the tensors' own."""
    log = []

    @contextlib.contextmanager
    def current(wanted):
        log.append(f"enter {wanted}")
        yield
        log.append("exit")

    monkeypatch.setattr(torch.cuda, "device", current)
    run = dispatch.bind(
        torch.ops.rlhf_fast.ppo_loss_backward.default, lambda *_: (), lambda *_: log.append("launch"), compiled=False
    )
    run(*[SimpleNamespace(device=device)] * 4)
    assert log == (["enter cuda:1", "launch", "exit"] if device.type == "cuda" else ["launch"])
