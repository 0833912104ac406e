"""Models whose weights several processes hold in parts (FSDP2, ``torch.distributed.fsdp.fully_shard``).

Each layer is gathered when it is used and forgotten after it, in the backward pass again, so that every process must
call a sharded model equally often and in the same order. Gradients are summed over the processes, never averaged.
"""

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast import zero

WHOLE: dict[int, Any] = {}  # id of a model or optimizer → what ``collected`` has gathered of it
SKELETON = "_skeleton"  # of a sharded model: the same on the meta device, unsharded
RESHARD = "_reshard_after_forward"
MODELS: Any = weakref.WeakSet()  # whose forward or backward pass waits for the other processes


def is_sharded(model: Any) -> bool:
    """Whether ``shard`` was applied to ``model``, or stage 3 of ZeRO."""
    return isinstance(model, nn.Module) and SKELETON in vars(model)


def shard(model: nn.Module, parts: Sequence[nn.Module], mesh: Any, *, reshard_after_forward: bool = True) -> None:
    """Leave in each process of ``mesh`` its part of the weights of ``model``, on the device of the mesh, in place.

    ``parts``: modules whose own weights are gathered together, the inner ones first; all weights are in one of them,
    and each is called as a module. Raises ``ValueError`` where this PyTorch cannot sum their gradients.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ValueError(f"FSDP2 needs PyTorch 2.8 or newer, and this is {torch.__version__}")
    remember(model)
    vars(model)[RESHARD] = reshard_after_forward
    MODELS.add(model)
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard_after_forward)
    for part in _parts(model):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo cannot scale what it reduces


def remember(model: nn.Module) -> None:
    """Keep of ``model``, which will be sharded, what ``collected`` needs."""
    memo = {id(tensor): _like(tensor, tensor.detach().to("meta")) for tensor in _tensors(model)}
    vars(model)[SKELETON] = copy.deepcopy(model, _kept(model) | memo)


@torch.no_grad()
def put(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy whole ``weights``, which every process has, to those of that name in ``model``."""
    for name, own in [*model.named_parameters(), *model.named_buffers()]:
        if name in weights:
            with zero.gathered([own], changed=True):
                own.copy_(parted(weights[name].to(own.device, own.dtype), own))


def kind(model: nn.Module) -> type:
    """The class of ``model`` as it was before ``shard``."""
    return type(vars(model).get(SKELETON, model))


def whole(model: Any) -> Any:
    """``model`` unsharded on the CPU, where ``collected`` has it, or ``model`` itself if it is not sharded."""
    return WHOLE[id(model)] if is_sharded(model) else model


def state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """The state of ``optimizer``, unsharded where ``collected`` has it."""
    found: dict[int, dict[str, Tensor]] = WHOLE.get(id(optimizer)) or optimizer.state_dict()["state"]
    return found


def shape(tensor: Tensor) -> torch.Size:
    """The shape of ``tensor`` as a whole."""
    found: torch.Size = tensor.ds_shape if zero.is_part(tensor) else tensor.shape
    return found


def parted(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of ``tensor``, which all have, if ``like`` is sharded and of its shape."""
    from torch.distributed.tensor import distribute_tensor

    if not _is_part(like) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


@contextmanager
def collected(
    models: Sequence[nn.Module], optimizer: torch.optim.Optimizer | None = None, *, everywhere: bool = False
) -> Iterator[None]:
    """Gather what is sharded of ``models`` and ``optimizer`` on the CPU of the first process, or of all of them.

    Every process must come here; ``whole`` and ``state`` return it inside. Nothing is done where nothing is sharded.
    """
    models, keep = [model for model in models if is_sharded(model)], everywhere
    parts = optimizer is not None and (bool(models) or isinstance(optimizer, zero.ZeroAdamW))
    keep = keep or ((bool(models) or parts) and torch.distributed.get_rank() == 0)
    kept = []
    try:
        for model in models:
            full = [_full(tensor, keep) for tensor in _tensors(model)]
            if keep:
                bare = vars(model)[SKELETON]
                memo = {id(x): _like(x, y) for x, y in zip(_tensors(bare), full, strict=True)}
                WHOLE[id(model)] = copy.deepcopy(bare, _kept(model) | memo)
                kept.append(id(model))
        if optimizer is not None and parts:
            found = _state(optimizer, keep)
            if keep:
                WHOLE[id(optimizer)] = found
                kept.append(id(optimizer))
        yield
    finally:
        for key in kept:
            del WHOLE[key]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold all weights of ``model`` in every process, which may then call it as often as it likes, without gradients.

    Every process must come here. Nothing is done where ``model`` is not sharded.
    """
    parts = _parts(model) if is_sharded(model) else []
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        with zero.gathered([*model.parameters()]):
            yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(vars(model)[RESHARD], recurse=False)


def _parts(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _is_part(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def _state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[int, dict[str, Any]]:
    """The whole state of a sharded ``optimizer``, in a process that keeps it."""
    if isinstance(optimizer, zero.ZeroAdamW):
        return optimizer.collect(keep)
    found = optimizer.state_dict()["state"]
    return {i: {n: _full(t, keep) for n, t in tensors.items()} for i, tensors in found.items()}


def _full(tensor: Tensor, keep: bool) -> Tensor | None:
    """``tensor`` whole on the CPU; None in a process that does not keep it, which takes part all the same."""
    if zero.is_part(tensor):
        with zero.gathered([tensor]):
            return tensor.detach().to("cpu", copy=True) if keep else None
    full = tensor.detach().full_tensor() if _is_part(tensor) else tensor.detach()
    return full.cpu() if keep else None


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _kept(model: nn.Module) -> dict[int, Any]:
    """What a copy of ``model`` shares with it: its configs, which are written to disk as they are then."""
    configs = [getattr(m, "config", None) for m in model.modules()]
    return {id(c): c for c in configs if c is not None}


def _like(tensor: Tensor, data: Tensor) -> Tensor:
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
