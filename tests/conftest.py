"""What all tests share: where each implementation of an op can run on this machine."""

import os
from pathlib import Path

import torch

GPU = torch.cuda.is_available()
if not GPU:
    # Triton reads this when it is imported: without a GPU its kernels run in the interpreter, on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable  # noqa: E402
from importlib.util import find_spec  # noqa: E402

import pytest  # noqa: E402

if find_spec("hypothesis") is None:
    import no_hypothesis

    no_hypothesis.install()
import hypothesis  # noqa: E402

import rlhf_fast.ops  # noqa: E402, F401
from rlhf_fast import dispatch  # noqa: E402

# The tensors here are small: a second thread costs more than it brings. Tests of threads ask for theirs.
torch.set_num_threads(1)

# The same examples in every run: a failure is the change's, and shows again.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")

CUDA_SOURCES = Path(__file__).parent.parent / "kernels" / "cuda"


def forms(op: str) -> list[tuple[str, str]]:
    """(implementation, device) for every form of ``op`` that can run here; "simt" is the CUDA source on the CPU."""
    found = [("reference", "cpu")]
    if "cpp" in dispatch.IMPLEMENTATIONS[op]:
        found.append(("cpp", "cpu"))
    if (CUDA_SOURCES / f"{op}.cu").exists():
        found.append(("simt", "cpu"))
    if "triton" in dispatch.IMPLEMENTATIONS[op]:
        found.append(("triton", "cuda" if GPU else "cpu"))
    if GPU:
        found += [(name, "cuda") for name in ("reference", "cuda") if name in dispatch.IMPLEMENTATIONS[op]]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``run`` and ``device`` runs once per form of the op: of tests/ops/test_<op>.py, or marked."""
    if {"run", "device"} <= set(metafunc.fixturenames):
        marked = metafunc.definition.get_closest_marker("ops")
        ops = marked.args if marked else [Path(metafunc.module.__file__).stem.removeprefix("test_")]
        cases = [((op, name), device) for op in ops for name, device in forms(op)]
        ids = ["-".join([*([op] if marked else []), name, device]) for (op, name), device in cases]
        metafunc.parametrize(("run", "device"), cases, ids=ids, indirect=["run"])


def implementation(op: str, name: str) -> Callable:
    """One implementation of an op: a function with the arguments of its schema."""
    if name == "simt":
        from simt.build import simt_implementation

        return simt_implementation(op)
    return dispatch.IMPLEMENTATIONS[op][name]


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Callable:
    """The form of the op under test."""
    return implementation(*request.param)


@pytest.fixture
def run_backward(request: pytest.FixtureRequest, run: Callable) -> Callable:
    """Its gradient, of the same form."""
    op, name = request.node.callspec.params["run"]
    return implementation(f"{op}_backward", name)


@pytest.fixture
def looks_at_ids(request: pytest.FixtureRequest, device: str) -> bool:
    """A kernel for GPUs cannot raise, also where it runs on the CPU."""
    return device == "cpu" and request.node.callspec.params["run"][1] in ("reference", "cpp")
