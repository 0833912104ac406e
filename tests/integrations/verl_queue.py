"""A TransferQueue of one process, for verl's trainers: rows by key, which workers and trainer put and get.

Like the real one it gives back what is in all the rows that are asked for: numbers stacked, other tensors nested, and
anything else as it is.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import NonTensorStack, TensorDict

PARTITIONS: dict[str, dict[str, tuple[dict, dict]]] = defaultdict(dict)  # partition → key → (tag, fields)


@dataclass
class KVBatchMeta:
    """Which rows and fields a batch has; instead of the batch."""

    keys: list[str] = field(default_factory=list)
    tags: list[dict] = field(default_factory=list)
    partition_id: str | None = None
    fields: list[str] | None = None
    extra_info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def size(self) -> int:
        return len(self.keys)

    def reorder(self, order: Iterable[int]) -> None:
        order = list(order)
        self.keys, self.tags = [self.keys[i] for i in order], [self.tags[i] for i in order]

    def chunk(self, chunks: int) -> list["KVBatchMeta"]:
        assert chunks == 1, "there is one process"
        return [copy.deepcopy(self)]

    @classmethod
    def concat(cls, data: list["KVBatchMeta"]) -> "KVBatchMeta":
        assert len(data) == 1, "there is one process"
        return data[0]


class BatchMeta(KVBatchMeta):
    """The same with the names that workers use."""

    def select_fields(self, fields: list[str]) -> "BatchMeta":
        return BatchMeta(self.keys, self.tags, self.partition_id, [*fields], self.extra_info)

    @property
    def partition_ids(self) -> list:
        return [self.partition_id] * self.size

    @property
    def global_indexes(self) -> list[str]:
        return self.keys

    @property
    def field_names(self) -> list[str] | None:
        return self.fields


def kv_batch_put(
    keys: list[str], partition_id: str, fields: TensorDict | None = None, tags: list[dict] | None = None
) -> KVBatchMeta:
    rows = [PARTITIONS[partition_id].setdefault(key, ({}, {})) for key in keys]
    for (tag, _), given in zip(rows, tags or [], strict=bool(tags)):
        tag.update(given)
    for name, values in () if fields is None else fields.items():
        parts = values.unbind() if isinstance(values, torch.Tensor) else values.tolist()
        for (_, row), part in zip(rows, parts, strict=True):
            row[name] = part.clone() if isinstance(part, torch.Tensor) else part
    return KVBatchMeta(list(keys), [copy.deepcopy(tag) for tag, _ in rows], partition_id)


def kv_batch_get(keys: list[str] | str, partition_id: str, select_fields: list[str] | None = None) -> TensorDict:
    rows = [PARTITIONS[partition_id][key][1] for key in ([keys] if isinstance(keys, str) else keys)]
    names = [n for n in rows[0] if all(n in row for row in rows) and (select_fields is None or n in select_fields)]
    return TensorDict({name: column([row[name] for row in rows]) for name in names}, batch_size=len(rows))


def column(values: list) -> Any:
    if not all(isinstance(value, torch.Tensor) for value in values):
        return NonTensorStack(*values)
    if values[0].ndim == 0:
        return torch.stack(values)
    return torch.nested.as_nested_tensor([value.clone() for value in values], layout=torch.jagged)


def kv_list(partition_id: str | None = None) -> dict[str, dict[str, dict]]:
    """Tags by partition and key; in the order of the keys, not of the threads that put them."""
    chosen = PARTITIONS if partition_id is None else {partition_id: PARTITIONS[partition_id]}
    return {name: {key: dict(rows[key][0]) for key in sorted(rows)} for name, rows in chosen.items()}


def kv_clear(keys: list[str] | str, partition_id: str) -> None:
    for key in [keys] if isinstance(keys, str) else keys:
        PARTITIONS[partition_id].pop(key, None)


async def async_kv_batch_put(*args: Any, **kwargs: Any) -> KVBatchMeta:
    return kv_batch_put(*args, **kwargs)


async def async_kv_put(key: str, partition_id: str, tag: dict) -> KVBatchMeta:
    return kv_batch_put([key], partition_id, tags=[tag])


class Client:
    """What a worker's wrapper turns the one meta into the other with."""

    async def async_kv_retrieve_meta(self, keys: list[str], partition_id: str, create: bool) -> BatchMeta:
        return BatchMeta(keys, [{} for _ in keys], partition_id)

    async def async_kv_retrieve_keys(self, global_indexes: list[str], partition_id: str) -> list[str]:
        return global_indexes

    async def async_get_data(self, metadata: BatchMeta) -> TensorDict:
        return kv_batch_get(metadata.keys, metadata.partition_id, metadata.fields)

    async def async_put(self, data: TensorDict, metadata: BatchMeta) -> BatchMeta:
        kv_batch_put(metadata.keys, metadata.partition_id, data)
        return metadata


def modules() -> dict[str, dict[str, Any]]:
    functions = kv_batch_put, kv_batch_get, kv_list, kv_clear, async_kv_batch_put, async_kv_put
    members = {member.__name__: member for member in (KVBatchMeta, BatchMeta, *functions)}
    return {"transfer_queue": members | {"init": lambda *_: None, "close": PARTITIONS.clear, "get_client": Client}}
