"""Stands in for hypothesis where that is not installed: its tests are skipped, those beside them run."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest


class Strategy:
    """Whatever is asked of a strategy is a strategy again."""

    def __call__(self, *_: Any, **__: Any) -> "Strategy":
        return self

    def __getattr__(self, name: str) -> "Strategy":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __or__(self, _: Any) -> "Strategy":
        return self


class settings:
    """hypothesis.settings, which change nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, test: Callable) -> Callable:
        return test

    register_profile = load_profile = staticmethod(lambda *_, **__: None)


def given(*_: Any, **__: Any) -> Callable:
    """Skip the test."""
    return pytest.mark.skip(reason="hypothesis is not installed: runs wherever the extra [test] is")


def install() -> None:
    """Make ``import hypothesis`` find this."""
    module, strategies = ModuleType("hypothesis"), ModuleType("hypothesis.strategies")
    strategies.__getattr__ = Strategy().__getattr__  # type: ignore[method-assign]
    module.given, module.settings, module.HealthCheck, module.strategies = given, settings, Strategy(), strategies
    module.example = module.note = lambda *_, **__: lambda test: test
    for fake in (module, strategies):  # whoever asks whether hypothesis is there asks for its spec
        fake.__spec__ = ModuleSpec(fake.__name__, None)
    sys.modules |= {"hypothesis": module, "hypothesis.strategies": strategies}
