"""What the tests of the integrations share: whether a peer is here, and which, and how results are compared."""

import importlib.abc
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def needs(peer: str) -> None:
    """Skip the module unless the peer is installed."""
    if find_spec(peer) is None:
        reason = f"{peer} is not installed: make test installs it, with the extra test-peers and constraints.txt"
        pytest.skip(reason, allow_module_level=True)


def passes_with(folder: Path, peer: str, files: list[str], *options: str) -> tuple[str, str]:
    """Run files beside this one's integrations in a process that finds the peer in ``folder`` first; they have to pass.

    Returns its version, as that process saw it, and pytest's last line.
    """
    here = Path(__file__).parent
    command = f"import sys, pytest, {peer}; print({peer}.__version__); sys.exit(pytest.main(sys.argv[1:]))"
    options = ("-q", "-x", "-p", "no:cacheprovider", *options)
    done = subprocess.run(
        [sys.executable, "-c", command, *options, *(str(here / "integrations" / name) for name in files)],
        env=os.environ | {"PYTHONPATH": str(folder), "ACCELERATE_USE_CPU": "true"},
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    seen, *_, last = done.stdout.splitlines()
    (installed,) = (d.version for d in distributions(path=[str(folder)]) if d.name == peer)
    assert seen == installed
    return seen, last


def agree(ours: Callable, theirs: Callable, *inputs: torch.Tensor, tolerance: float = 1e-6, slope: float = 1.0) -> None:
    """Both functions give the same results, of the same dtypes, and the same gradients.

    Up to ``tolerance``; it is relative for results beyond 1, and for inputs beyond 4: the peers' entropy is a
    difference of numbers of that size. Gradients are allowed ``slope`` times as much, where the functions multiply
    what they get by that.
    """
    torch.manual_seed(0)
    (expected, expected_grads), (results, result_grads) = (results_and_gradients(f, *inputs) for f in (theirs, ours))
    assert [(o.shape, o.dtype) for o in results] == [(o.shape, o.dtype) for o in expected]
    inner = max([1.0, *(float(x.abs().max()) / 4 for x in inputs if x.is_floating_point() and x.numel())])
    allowed = [tolerance] * len(results) + [tolerance * max(1.0, slope)] * len(result_grads)
    for a, b, t in zip([*results, *result_grads], [*expected, *expected_grads], allowed, strict=True):
        scale = max(inner, float(b.double().abs().max())) if b.numel() and b.is_floating_point() else inner
        torch.testing.assert_close(a, b, rtol=0, atol=t * scale, check_dtype=False)


def results_and_gradients(function: Callable, *inputs: torch.Tensor) -> tuple[list, list]:
    """What the function returns but for None, and the gradients of a random sum of it; the same sum for any dtype."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*leaves)
    outputs = [o for o in (outputs if isinstance(outputs, tuple | list) else [outputs]) if o is not None]
    live = [o for o in outputs if o.requires_grad]
    generator = torch.Generator().manual_seed(1)
    pulls = [torch.randn(o.shape, generator=generator, dtype=torch.float32).to(o.dtype) for o in live]
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(live, wanted, pulls, allow_unused=True) if live else ()
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted, strict=False)]
    return [o.detach() for o in outputs], grads


class Anything:
    """Whatever a module that is not installed is asked for: a decorator that changes nothing, a value, a context."""

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self

    def __getattr__(self, name: str) -> "Anything":
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class Stub(ModuleType):
    """A module of anything: a class for a name that looks like one, to inherit from."""

    __path__: tuple = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {}) if name[0].isupper() else Anything()
        setattr(self, name, value)
        return value


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stubs of the given packages, after every other finder: what is installed is itself."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def stand_in(modules: dict[str, dict[str, Any]]) -> None:
    """Make modules of these names and contents what ``import`` finds from here on, each after the one that holds it."""
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content, __path__=[], __spec__=ModuleSpec(name, None, is_package=True))
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)


def import_with_stubs(names: list[str], *packages: str) -> None:
    """Import modules of a peer as if ``packages``, its heavy dependencies, were there; afterwards they are not."""
    finder, before = Stubs(*packages), set(sys.modules)
    sys.meta_path.append(finder)
    try:
        for name in names:
            importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], Stub):
                del sys.modules[name]
