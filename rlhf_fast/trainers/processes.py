"""Data parallelism: N processes, started by ``accelerate launch``, that take the steps which one would take alone.

Every process knows the whole batch and draws from the same random streams. What costs time, each does for its ``share``
alone: to write, to read, to score, to go forward and backward. What comes out is ``gathered``, so that everything after
that (whitening, statistics, the KL coefficient, running moments, when to stop) is computed by all of them from the same
numbers. A denominator is that of the whole minibatch, and gradients are summed, never averaged.

A trainer does that by ``summed`` or ``joined`` around what goes through its ``share`` of a batch, and
``learning.clip_gradients`` after it; whatever can raise in one process alone is inside of them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlhf_fast import sharded
from rlhf_fast.rewards import RewardError

T = TypeVar("T")
BUCKET = 2**25  # elements that are summed at a time
KINDS = (RewardError, FloatingPointError, ValueError, TypeError)  # of errors that keep their kind in other processes


def count() -> int:
    """How many processes there are."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def rank() -> int:
    """The number of this process, from 0; the first is the one that writes files."""
    return torch.distributed.get_rank() if count() > 1 else 0


def share(items: Any) -> Any:
    """The part of a list or tensor that is this process's: neighbours, and in all processes together all of them."""
    return shares(items)[rank()]


def shares(items: Any) -> list[Any]:
    """The ``share`` of every process, in their order."""
    n = count()
    return [items[len(items) * i // n : len(items) * (i + 1) // n] for i in range(n)]


def turns(items: Any, cut: Callable[[Any], Sequence[T]]) -> Iterator[tuple[T, float]]:
    """The parts into which ``cut`` cuts this process's share of ``items``, each with 1.

    Then a part with 0 for each that another process has more: sharded models must be called equally often in all.
    """
    own = cut(share(items))
    yield from ((part, 1.0) for part in own)
    if count() == 1:
        return
    for _ in range(max(len(cut(mine)) for mine in shares(items)) - len(own)):
        yield cut(items[:1])[0], 0.0


def gathered(part: Callable[[], T], *, calls: bool = False) -> list[T]:
    """What ``part`` returns in each process, in their order; tensors on the CPU, unless there is one process only.

    An error in one of them is raised in all: none waits for another that is gone. With ``calls``, where ``part`` calls
    models that are sharded, the others cannot be told, for they are in the middle of them: there it is a
    ``RuntimeError`` here, and theirs comes when this process ends.
    """
    if count() == 1:
        return [part()]
    found, failed = None, None
    try:
        found = part()
        said = (_on_cpu(found), None)
    except Exception as error:
        if calls and sharded.MODELS:
            raise RuntimeError(f"process {rank()}: {_text(error)}") from error
        failed = error
        said = (None, (next((i for i, kind in enumerate(KINDS) if isinstance(error, kind)), None), _text(error)))
    every: list[Any] = [None] * count()
    torch.distributed.all_gather_object(every, said)
    if failed is not None:
        raise failed
    for number, (_, error) in enumerate(every):
        if error is not None:
            kind, text = error
            raise (RuntimeError if kind is None else KINDS[kind])(f"process {number}: {text}")
    return [value for value, _ in every]


def joined(part: Callable[[], Tensor | None]) -> Tensor:
    """The rows that ``part`` returns in each process, or None where its share is empty, one after the other.

    Rows of different lengths are padded with 0 on the right. The whole is on the CPU if there are several processes.
    """
    parts = [rows for rows in gathered(part) if rows is not None]
    if len(parts) == 1:
        return parts[0]
    width = max(rows.shape[1] for rows in parts) if parts[0].dim() == 2 else 0
    return torch.cat([nn.functional.pad(x, (0, width - x.shape[1])) if x.dim() == 2 else x for x in parts])


def summed(part: Callable[[], dict[str, Tensor]], *, largest: Sequence[str] = ()) -> dict[str, Tensor]:
    """The sum over the processes of the 0-d tensors that ``part`` returns, the maximum of those named ``largest``.

    ``part`` calls models (``gathered``).
    """
    total: dict[str, Tensor] = {}
    for found in gathered(part, calls=True):
        for name, value in found.items():
            merge = torch.maximum if name in largest else torch.add
            total[name] = merge(total[name], value) if name in total else value
    return total


def highest(number: int) -> int:
    """The highest ``number`` of any process."""
    return number if count() == 1 else max(gathered(lambda: number))


def same_weights(model: nn.Module) -> None:
    """Give every process the weights of the first."""
    if count() > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            sent = tensor.data.to(_meeting()).contiguous()
            torch.distributed.broadcast(sent, 0)
            tensor.data.copy_(sent)


def sum_gradients(models: Sequence[nn.Module]) -> None:
    """Leave in every process the sum of all their gradients; a weight that none has a gradient for keeps none."""
    if count() == 1 or not models:
        return
    weights = [p for p in dict.fromkeys(p for model in models for p in model.parameters()) if p.requires_grad]
    learned = torch.tensor([p.grad is not None for p in weights], dtype=torch.int32, device=weights[0].device)
    torch.distributed.all_reduce(learned, torch.distributed.ReduceOp.MAX)
    bucket: list[Tensor] = []
    for weight, there in zip(weights, learned.tolist(), strict=True):
        if not there:
            continue
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if bucket and sum(g.numel() for g in bucket) + weight.numel() > BUCKET:
            _sum(bucket)
            bucket = []
        bucket.append(weight.grad)
    _sum(bucket)


def _sum(gradients: list[Tensor]) -> None:
    """Sum what the processes hold in ``gradients``, in place, by one message."""
    if len(gradients) == 1 and gradients[0].is_contiguous():
        torch.distributed.all_reduce(gradients[0])
        return
    if not gradients:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    torch.distributed.all_reduce(flat)
    parts = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def _meeting() -> torch.device:
    """Where tensors must be for the processes to exchange them."""
    return torch.device("cuda" if "nccl" in torch.distributed.get_backend() else "cpu")


def _on_cpu(value: Any) -> Any:
    """``value`` with its tensors on the CPU: each process has a device of its own."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {name: _on_cpu(item) for name, item in value.items()}
    return value.to("cpu") if hasattr(value, "to") else value


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, KINDS) else f"{type(error).__name__}: {error}"
