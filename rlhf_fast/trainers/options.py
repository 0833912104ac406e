"""A config field: its default, the sentence that explains it and the range it must lie in."""

import dataclasses
import math
from typing import Any


def option(
    default: Any,
    sentence: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple | None = None,
) -> Any:
    """A field of a frozen config: ``low <= value <= high``, ``value > above``, or one of ``choices``."""
    metadata = {"sentence": sentence, "low": low, "high": high, "above": above, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def validate(config: Any) -> None:
    """Raise ``ValueError`` naming the first field of ``config`` whose value is out of its range. None is never out."""
    for field in dataclasses.fields(config):
        value, rule = getattr(config, field.name), field.metadata
        name = f"{type(config).__name__}.{field.name}"
        if value is None or not rule:
            continue
        if rule["choices"] is not None and value not in rule["choices"]:
            raise ValueError(f"{name} must be one of {', '.join(map(str, rule['choices']))}, got {value!r}")
        bounds = [(rule["low"], lambda v, b: v >= b, "at least"), (rule["high"], lambda v, b: v <= b, "at most")]
        bounds.append((rule["above"], lambda v, b: v > b, "above"))
        for bound, holds, word in bounds:
            if bound is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if not holds(value, bound):
                raise ValueError(f"{name} must be {word} {bound:g}, got {value!r}")
