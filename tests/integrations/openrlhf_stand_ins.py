"""Stand-ins for what OpenRLHF's trainers import and a machine without GPUs has not: Ray, vLLM, W&B and CUDA.

Ray runs at once, in this process. vLLM draws its tokens from a generator of its own, whatever the weights are that it
is sent. W&B keeps the figures that it is told.
"""

import asyncio
import copy
import random
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY, MagicMock

import torch
from torch.overrides import TorchFunctionMode

LOGGED: list[dict[str, float]] = []  # of W&B
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
    """vLLM's engine: at random 3 tokens or more of the first 300, and a worker with OpenRLHF's extension."""

    def __init__(self, args: SimpleNamespace) -> None:
        self.random = random.Random(args.seed)
        self.output_processor = SimpleNamespace(get_num_unfinished_requests=lambda: 0)
        module, name = args.worker_extension_cls.rsplit(".", 1)
        self.worker = getattr(import_module(module), name)()
        self.worker.device, self.worker.model_runner = "cpu", MagicMock()
        self.worker.model_config = SimpleNamespace(dtype=ANY)

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


class CPU(str):
    """The device as torch takes it, also where it is written behind ``cuda:``."""

    def __format__(self, _: str) -> str:
        return "0"


def log(said: dict[str, Any]) -> None:
    figures = {name: value for name, value in said.items() if isinstance(value, int | float)}
    LOGGED.extend([figures] if figures else [])


def modules() -> dict[str, dict[str, Any]]:
    """The modules of Ray, vLLM and W&B, and what OpenRLHF takes from them."""
    spaces, anything = SimpleNamespace, MagicMock()
    return {
        "ray": {"remote": remote, "get": get, "put": copy.deepcopy, "wait": wait, "is_initialized": lambda: True},
        "ray._private": {"services": spaces(get_node_ip_address=lambda: "127.0.0.1")},
        "ray._private.worker": {"global_worker": spaces(gcs_client=spaces(address=""))},
        "ray.util": {},
        "ray.util.placement_group": {"PlacementGroup": anything, "placement_group": anything},
        "ray.util.scheduling_strategies": {"PlacementGroupSchedulingStrategy": anything},
        "vllm": {"__version__": "0.16.0", "SamplingParams": spaces, "AsyncEngineArgs": spaces,
                 "AsyncLLMEngine": spaces(from_engine_args=Engine)},
        "vllm.inputs": {"TokensPrompt": dict},
        "vllm.utils": {"random_uuid": str},
        "vllm.distributed": {},
        "vllm.distributed.utils": {"StatelessProcessGroup": spaces(create=lambda rank, **_: rank)},
        "vllm.distributed.device_communicators": {},
        "vllm.distributed.device_communicators.pynccl": {"PyNcclCommunicator": Communicator},
        "wandb": {"log": log} | dict.fromkeys(("api", "init", "define_metric", "finish", "Table"), anything),
    }  # fmt: skip


def without_cuda() -> None:
    """What asks CUDA for its device gets the CPU, and there is nothing to wait for."""
    torch.cuda.current_device = lambda: CPU("cpu")
    torch.cuda.set_device = lambda device: None  # one function each: torch.compile looks them up
    torch.cuda.synchronize = lambda: None
    torch.cuda.current_stream = lambda: None
