"""The JSON Lines files of a run when it is resumed: one record a line, each with its ``step``."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def cut(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of ``path`` after ``step``, also one that a kill cut short; returns those that stay."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            if (record := json.loads(line))["step"] <= step:
                kept.append((line, record))
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(f"{line}\n" for line, _ in kept), encoding="utf-8")
    os.replace(partial, path)
    return [record for _, record in kept]
