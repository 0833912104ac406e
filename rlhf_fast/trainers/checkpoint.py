"""A checkpoint: all that the next step of a run depends on, as safetensors and JSON.

::

    (the model's files, as ``save_pretrained`` names them; further models in folders of their own)
    optimizer.safetensors   what AdamW keeps of every weight
    random.json             the states of the global generators; the trainers draw from streams of their own
    random.1.json           those of the second process, and so on
    trainer.json            the trainer's numbers, and a fingerprint of its data
    files.json              the size of every file, written last: without it, or with another size, it is half-written
"""

import hashlib
import json
import random
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_fast import sharded

SIZES = "files.json"


def save_state(
    folder: Path, optimizer: torch.optim.Optimizer, numbers: dict[str, Any], examples: Iterable[Any]
) -> None:
    """Write what a trainer keeps beside its weights: its optimizer, its ``numbers`` and what its data was."""
    from safetensors.torch import save_file

    kept = sharded.state(optimizer)
    tensors = {f"{index}.{name}": value.contiguous() for index, s in kept.items() for name, value in s.items()}
    save_file(tensors, folder / "optimizer.safetensors")
    save_random(folder, 0, random_state())
    record = {**numbers, "data": fingerprint(examples)}
    (folder / "trainer.json").write_text(json.dumps(record, indent=2) + "\n")


def load_state(folder: Path, optimizer: torch.optim.Optimizer, examples: Iterable[Any]) -> dict[str, Any]:
    """Put back what ``save_state`` wrote and return the numbers.

    Raises ``ValueError`` where the data or the weights to train are not those of the checkpoint.
    """
    from safetensors.torch import load_file

    numbers: dict[str, Any] = json.loads((folder / "trainer.json").read_text())
    if numbers.pop("data") != fingerprint(examples):
        raise ValueError(f"{folder} was written by a run on other data, so that this one cannot go on from it")
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    shapes = {i: s["exp_avg"].shape for i, s in state.items()}
    if any(i >= len(weights) or sharded.shape(weights[i]) != shape for i, shape in shapes.items()):
        raise ValueError(f"{folder} holds the optimizer of other weights, so that this run cannot go on from it")
    state = {i: {n: sharded.parted(v, weights[i]) for n, v in s.items()} for i, s in state.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    load_random(folder, 0)
    return numbers


def save_random(folder: Path, process: int, state: dict[str, Any]) -> None:
    """Write the ``random_state`` of a process."""
    (folder / _random_file(process)).write_text(json.dumps(state) + "\n")


def load_random(folder: Path, process: int) -> None:
    """Put back the generators of a process, if there was one of that number."""
    if (folder / _random_file(process)).exists():
        _set_random_state(json.loads((folder / _random_file(process)).read_text()))


def fingerprint(examples: Iterable[Any]) -> str:
    """A hash of all that ``examples`` say, in their order: tokens, scores, margins, and the columns for the reward.

    Of a column that is neither text nor number nor a list of them it sees the type alone.
    """
    digest = hashlib.sha256()
    for example in examples:
        for name, value in vars(example).items():
            if name != "place":  # the same data may have moved
                digest.update(name.encode())
                digest.update(_bytes(value))
    return digest.hexdigest()


def seal(folder: Path) -> None:
    """Write down the size of every file of ``folder``: from now on it is whole."""
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    (folder / SIZES).write_text(json.dumps(sizes, indent=2) + "\n")


def is_whole(folder: Path) -> bool:
    """Whether every file that ``seal`` saw is there with the size it had."""
    try:
        sizes = json.loads((folder / SIZES).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _bytes(value: Any) -> bytes:
    """``value`` as bytes; of tokens without a detour over JSON, which takes much longer."""
    if isinstance(value, list) and all(type(item) in (int, bool) for item in value):
        return array("q", value).tobytes()
    return json.dumps(value, default=lambda item: type(item).__name__, skipkeys=True).encode()


def _random_file(process: int) -> str:
    return f"random.{process}.json" if process else "random.json"


def random_state() -> dict[str, Any]:
    """The global generators, for rewards and models of the user that draw from them."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda": [bytes(state.tolist()).hex() for state in torch.cuda.get_rng_state_all()],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numpy_keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(numpy_keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["torch"])), dtype=torch.uint8))
    if len(state["cuda"]) == torch.cuda.device_count():
        states = (torch.tensor(list(bytes.fromhex(each)), dtype=torch.uint8) for each in state["cuda"])
        torch.cuda.set_rng_state_all(states)
