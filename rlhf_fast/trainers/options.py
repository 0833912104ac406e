"""A config field: its default, the sentence that explains it and the range it must lie in."""

import dataclasses
import math
from typing import Any, get_args, get_type_hints


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


def chosen(config: Any, kind: type) -> Any:
    """``config``, or the defaults of ``kind`` if it is None. Raises ``TypeError`` where it is nothing of that kind."""
    if config is not None and not isinstance(config, kind):
        raise TypeError(f"config must be a {kind.__name__}, got {type(config).__name__}")
    return kind() if config is None else config


def field_types(config: type) -> dict[str, tuple[type, bool]]:
    """Field → (its type, whether None is allowed), in the order of the fields."""
    types = {}
    for name, hint in get_type_hints(config).items():
        members = [member for member in get_args(hint) or (hint,) if member is not type(None)]
        types[name] = (members[0], type(None) in get_args(hint))
    return types


def validate(config: Any) -> None:
    """Raise ``ValueError`` naming the first field of ``config`` whose value has the wrong type or is out of range."""
    types = field_types(type(config))
    for field in dataclasses.fields(config):
        value, rule = getattr(config, field.name), field.metadata
        name = f"{type(config).__name__}.{field.name}"
        kind, optional = types[field.name]
        if value is None and optional:
            continue
        _check_type(name, value, kind)
        if not rule:
            continue
        if rule["choices"] is not None and value not in rule["choices"]:
            raise ValueError(f"{name} must be one of {', '.join(map(str, rule['choices']))}, got {value!r}")
        bounds = [(rule["low"], lambda v, b: v >= b, "at least"), (rule["high"], lambda v, b: v <= b, "at most")]
        bounds.append((rule["above"], lambda v, b: v > b, "above"))
        for bound, holds, word in bounds:
            if bound is not None and not holds(value, bound):
                raise ValueError(f"{name} must be {word} {bound:g}, got {value!r}")


def _check_type(name: str, value: Any, kind: type) -> None:
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a string"}
    fits = isinstance(value, (int, float) if kind is float else kind)
    if isinstance(value, bool) and kind is not bool:
        fits = False
    if fits and kind is float and not math.isfinite(value):
        fits = False
    if not fits:
        raise ValueError(f"{name} must be {words[kind]}, got {value!r}")
