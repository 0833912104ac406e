"""The bytes of the tensors that are alive, counted by storage: the memory that bench_rrhf.py compares."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts every storage that an op reads or returns, from then until it dies.

    ``now`` are the bytes that are alive, ``peaks`` the most of each phase. Views share a storage, which counts once.
    Ops of the backward pass count like others; what an op takes for itself and gives back within is not seen.
    """

    def __init__(self, phase: str = "all") -> None:
        super().__init__()
        self.now, self.phase, self.peaks = 0, phase, {phase: 0}
        self.ends: dict[int, weakref.finalize] = {}  # by the address of the storage

    def mark(self, phase: str) -> None:
        """From here on it is ``phase``."""
        self.phase = phase
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.now)

    def hold(self, *tensors: torch.Tensor) -> None:
        """Count ``tensors`` from now on, each storage once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if size and key not in self.ends:
                self.now += size
                self.peaks[self.phase] = max(self.peaks[self.phase], self.now)
                self.ends[key] = weakref.finalize(storage, self._drop, key, size)
                self.ends[key].atexit = False

    def _drop(self, key: int, size: int) -> None:
        del self.ends[key]
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and count what it reads and returns."""
        found = func(*args, **(kwargs or {}))
        self.hold(*(leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, torch.Tensor)))
        return found
