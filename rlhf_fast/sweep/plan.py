"""What a sweep file says: the figure to improve, the fields to search, how many trials and when to give one up."""

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_fast.flags import read_config, suggestion
from rlhf_fast.metrics import METRICS, find
from rlhf_fast.trainers.options import field_types, option, validate

DIRECTIONS, PRUNERS = ("maximize", "minimize"), ("median", "halving", "none")
RANGE = ("low", "high", "log", "choices")
#: Fields that are the sweep's own or say nothing about the result.
FIXED = ("quiet", "keep", "save_every")


@dataclass(frozen=True)
class Plan:
    """Every entry of a sweep file."""

    metric: str  # a name of docs/metrics.md
    direction: str = option("maximize", "what is better", choices=DIRECTIONS)
    trials: int = option(20, "runs, those given up included", low=1)
    last: int = option(5, "values of the metric whose mean is a trial's", low=1)
    pruner: str = option(
        "median", "gives up what is worse than the median, or not in the best quarter", choices=PRUNERS
    )
    prune_every: int = option(5, "steps between two looks of the pruner", low=1)
    warmup_steps: int = option(0, "steps before its first look", low=0)
    startup_trials: int = option(4, "trials before it looks at any (median)", low=0)
    seed: int = option(0, "of the search; that of the runs is a field of theirs", low=0, high=2**32 - 1)
    fields: dict = field(default_factory=dict)  # config field → its low, high and log, or its choices

    def __post_init__(self) -> None:
        validate(self)

    def suggest(self, trial: Any, kinds: dict[str, tuple[type, bool]]) -> dict[str, Any]:
        """The values of the ``fields`` that ``trial`` shall try."""
        found = {}
        for name, room in self.fields.items():
            if "choices" in room:
                found[name] = trial.suggest_categorical(name, room["choices"])
            else:
                draw = trial.suggest_int if kinds[name][0] is int else trial.suggest_float
                found[name] = draw(name, room["low"], room["high"], log=room.get("log", False))
        return found


def read_plan(path: str | Path, config: Any) -> Plan:
    """The plan in the YAML file ``path`` for runs of ``config``.

    Raises ``ValueError`` naming the file and the entry: a key, metric or field that is none, a range without values, a
    value that the config does not take.
    """
    known = [f.name for f in dataclasses.fields(Plan)]
    stored = read_config(str(path), known, {})
    for key in ("metric", "direction", "fields"):
        if key not in stored:
            raise ValueError(f"{path}: {key} is missing")
    metric, fields = stored["metric"], stored["fields"]
    if not isinstance(metric, str) or find(metric) is None:
        raise ValueError(f"{path}: there is no metric {metric!r}{suggestion(str(metric), METRICS)}")
    if not isinstance(fields, dict) or not fields:
        raise ValueError(f"{path}: fields must name config fields, each with low and high or with choices")
    kinds = field_types(type(config))
    stored["fields"] = {str(name): _room(str(path), str(name), room, config, kinds) for name, room in fields.items()}
    try:
        return Plan(**stored)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('Plan.')}") from None


def _room(path: str, name: str, room: Any, config: Any, kinds: dict[str, tuple[type, bool]]) -> dict[str, Any]:
    """The range of one field, its numbers as the config takes them."""
    if name not in kinds or name in FIXED:
        near = suggestion(name, [known for known in kinds if known not in FIXED])
        raise ValueError(f"{path}: {type(config).__name__} has no field {name!r} to search{near}")
    if not isinstance(room, dict):
        raise ValueError(f"{path}: {name} must have low and high, or choices")
    for key in room:
        if key not in RANGE:
            raise ValueError(f"{path}: {name} has no entry {key!r}{suggestion(str(key), RANGE)}")
    kind = kinds[name][0]
    if "choices" in room:
        choices = room["choices"]
        if len(room) > 1 or not isinstance(choices, list) or not choices:
            raise ValueError(f"{path}: the choices of {name} must be a list, without low and high")
        room = {"choices": [_typed(value, kind) for value in choices]}
        ends = room["choices"]
    else:
        if "low" not in room or "high" not in room or kind not in (int, float):
            raise ValueError(f"{path}: {name} must have {'low and high, or ' * (kind in (int, float))}choices")
        room = {"low": _typed(room["low"], kind), "high": _typed(room["high"], kind), "log": room.get("log", False)}
        ends = [room["low"], room["high"]]
    for value in ends:
        _check(path, name, value, config)
    if "low" in room and not (isinstance(room["log"], bool) and room["low"] <= room["high"]):
        raise ValueError(f"{path}: {name} must go from low to high, and log be true or false")
    if room.get("log") and room["low"] <= 0:
        raise ValueError(f"{path}: {name} with log: true must be above 0, got {room['low']!r}")
    return room


def _check(path: str, name: str, value: Any, config: Any) -> None:
    """Raise ``ValueError`` if ``config`` takes no such value; how it goes with other fields is each trial's matter."""
    changed = copy.copy(config)
    object.__setattr__(changed, name, value)
    try:
        validate(changed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _typed(value: Any, kind: type) -> Any:
    """``value`` as ``kind``: YAML 1.1 reads 1e-5 as a string, and 1 may stand for 1.0."""
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return value
    return value
