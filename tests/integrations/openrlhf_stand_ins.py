"""Stand-ins for what OpenRLHF's trainers import and a machine without GPUs has not: Ray, vLLM, W&B and CUDA.

Ray runs at once, in this process. vLLM draws its tokens from a generator of its own, whatever the weights are that it
is sent; it keeps those. W&B keeps what it is told.
"""

import asyncio
import copy
import random
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

LOGGED: list[dict] = []  # of W&B
DTYPE = [torch.float32]  # of the engine's weights
SENT: list[torch.Tensor] = []  # between the actor and the engine, which has not received it yet


class Handle:
    """A Ray actor: each of its methods has ``.remote``. What a coroutine is to return it returns to ``ray.get``."""

    def __init__(self, cls: type, *args: Any, **options: Any) -> None:
        self.actor = cls.__new__(cls)
        result(self.actor.__init__(*args, **options))

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self.actor, name))


class ActorClass:
    def __init__(self, cls: type) -> None:
        self.cls = cls

    def options(self, **_: Any) -> "ActorClass":
        return self

    def remote(self, *args: Any, **options: Any) -> Handle:
        return Handle(self.cls, *args, **options)


def remote(*classes: type, **_: Any) -> Any:
    return ActorClass(*classes) if classes else ActorClass


def result(reference: Any) -> Any:
    return asyncio.run(reference) if asyncio.iscoroutine(reference) else reference


def get(references: Any) -> Any:
    return [result(r) for r in references] if isinstance(references, list) else result(references)


def wait(references: list, num_returns: int, timeout: float) -> tuple[list, list]:
    return references[:num_returns], references[num_returns:]


class Engine:
    """vLLM's engine: 3 tokens or more out of the vocabulary of 300, and what Ray's worker loads into its model."""

    def __init__(self, args: SimpleNamespace) -> None:
        self.random = random.Random(args.seed)
        self.weights: dict[str, torch.Tensor] = {}
        self.output_processor = SimpleNamespace(get_num_unfinished_requests=lambda: 0)
        module, name = args.worker_extension_cls.rsplit(".", 1)
        self.worker = getattr(import_module(module), name)()
        self.worker.device = "cpu"
        self.worker.model_config = SimpleNamespace(dtype=DTYPE[0])
        self.worker.model_runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load))

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.weights.update(weights)

    async def is_sleeping(self) -> bool:
        return False

    async def collective_rpc(self, name: str, args: tuple) -> Any:
        with OnTheCPU():
            return getattr(self.worker, name)(*args)

    async def generate(self, prompt: dict, params: SimpleNamespace, request_id: str) -> Any:
        ids = [self.random.randrange(3, 300) for _ in range(self.random.randint(3, params.max_tokens))]
        reason = "length" if len(ids) == params.max_tokens else "stop"
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, text="", finish_reason=reason, logprobs=None)])


class OnTheCPU(TorchFunctionMode):
    """Makes on the CPU what is to be on ``"cuda"``."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        return function(*args, **(kwargs | {"device": "cpu"} if "device" in kwargs else kwargs))


class Communicator:
    """NCCL between the actor, of rank 0, and the engine."""

    def __init__(self, rank: int, device: Any) -> None:
        self.rank = rank

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any) -> None:
        if self.rank == src:
            SENT.append(tensor.clone())
        else:
            tensor.copy_(SENT.pop())


class Table:
    """A table of W&B."""

    def __init__(self, columns: list, data: list | None = None) -> None:
        self.columns, self.data = columns, list(data or [])

    def add_data(self, *row: Any) -> None:
        self.data.append(row)


class CPU(str):
    """The device as torch takes it, also where it is written behind ``cuda:``."""

    def __format__(self, _: str) -> str:
        return "0"


def modules() -> dict[str, dict[str, Any]]:
    """The modules of Ray, vLLM and W&B and what OpenRLHF takes from them."""
    spaces, wandb = SimpleNamespace, {"api": SimpleNamespace(api_key="none"), "log": LOGGED.append}
    ready = spaces(ready=lambda: None)
    address = spaces(get_node_ip_address=lambda: "127.0.0.1")
    worker = spaces(gcs_client=spaces(address=""))
    return {
        "ray": {"remote": remote, "get": get, "put": copy.deepcopy, "wait": wait, "is_initialized": lambda: True},
        "ray._private": {"services": address},
        "ray._private.worker": {"global_worker": worker},
        "ray.util": {},
        "ray.util.placement_group": {"PlacementGroup": spaces, "placement_group": lambda *_, **__: ready},
        "ray.util.scheduling_strategies": {"PlacementGroupSchedulingStrategy": spaces},
        "vllm": {"__version__": "0.16.0", "SamplingParams": spaces, "AsyncEngineArgs": spaces,
                 "AsyncLLMEngine": spaces(from_engine_args=Engine)},
        "vllm.inputs": {"TokensPrompt": dict},
        "vllm.utils": {"random_uuid": str},
        "vllm.distributed": {},
        "vllm.distributed.utils": {"StatelessProcessGroup": spaces(create=lambda rank, **_: rank)},
        "vllm.distributed.device_communicators": {},
        "vllm.distributed.device_communicators.pynccl": {"PyNcclCommunicator": Communicator},
        "wandb": wandb | {"Table": Table} | dict.fromkeys(("init", "define_metric", "finish"), lambda *_, **__: None),
    }  # fmt: skip


def install() -> None:
    """Put the stand-ins in their places, for the rest of this process."""
    for name, content in modules().items():
        module = ModuleType(name)
        module.__dict__.update(content, __path__=[], __spec__=ModuleSpec(name, None, is_package=True))
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)


def without_cuda() -> None:
    """What asks CUDA for its device gets the CPU, and there is nothing to wait for."""
    torch.cuda.current_device = lambda: CPU("cpu")
    torch.cuda.set_device = lambda device: None  # one function each: torch.compile looks them up
    torch.cuda.synchronize = lambda: None
    torch.cuda.current_stream = lambda: None
