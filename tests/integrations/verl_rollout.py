"""What verl's trainers get instead of vLLM, and of a GPU: both through verl's own registries."""

import contextlib
import zlib
from types import SimpleNamespace
from typing import Any

import ray
import torch
import verl.workers.rollout.base as rollouts
from transformers import AutoModelForCausalLM
from verl.plugin.platform import PlatformBase
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

NAME = "in_process"
MODELS: dict[str, torch.nn.Module] = {}  # the one that all servers generate with


def nothing(*_: Any, **__: Any) -> int:
    return 0


class Cpu(PlatformBase):
    """The CPU as an accelerator of verl's, whose memory is not counted."""

    device_name, vendor_name = "cpu", "nobody"
    counters = ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved", "empty_cache")
    device_module = SimpleNamespace(
        **{name: getattr(torch.cpu, name) for name in ("synchronize", "set_device", "is_available", "current_device")},
        **dict.fromkeys(counters, nothing),
        mem_get_info=lambda: (0, 0),
        get_device_name=lambda: "CPU",
    )

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CPU_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def get_device_capability(self, device_index: int = 0) -> tuple:
        return None, None

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Any:
        yield

    manual_seed = manual_seed_all = set_allocator_settings = empty_cache = set_device = synchronize = nothing
    profiler_start = profiler_stop = cudart = nothing


class Server:
    """Samples with the actor's weights; a prompt gets the same tokens at the same step, whoever asks when."""

    @torch.no_grad()
    def generate(self, request_id: str, prompt_ids: list[int], sampling_params: dict, **_: Any) -> TokenOutput:
        model, steps = MODELS["actor"], MODELS["steps"]
        generator = torch.Generator().manual_seed(zlib.crc32(repr((steps, prompt_ids)).encode()))
        tokens, logprobs = [], []
        while len(tokens) < 8 and tokens[-1:] != [model.config.eos_token_id]:
            logits = model(torch.tensor([[*prompt_ids, *tokens]])).logits[0, -1]
            logits[model.config.eos_token_id] += 4  # responses of several lengths
            chosen = logits.log_softmax(-1)
            tokens.append(int(torch.multinomial(chosen.exp(), 1, generator=generator)))
            logprobs.append(float(chosen[tokens[-1]]))
        fields = {"global_steps": steps}
        return TokenOutput(token_ids=tokens, log_probs=logprobs, stop_reason="completed", extra_fields=fields)

    def sleep(self) -> None: ...

    def wake_up(self) -> None: ...


class Replica(RolloutReplica):
    async def launch_servers(self) -> None:
        self._server_handle, self._server_address = ray.remote(Server).remote(), "in process"
        self.servers = [self._server_handle]


class Weights(rollouts.BaseRollout):
    """The worker's side of a server: it gets the weights."""

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(self, weights: Any, global_steps: int = 0, **_: Any) -> None:
        if "actor" not in MODELS:
            MODELS["actor"] = AutoModelForCausalLM.from_pretrained(self.model_config.local_path).eval()
        MODELS["actor"].load_state_dict(dict(weights))
        MODELS["steps"] = global_steps


def register() -> None:
    rollouts._ROLLOUT_REGISTRY[NAME, "async"] = f"{__name__}.Weights"
    RolloutReplicaRegistry.register(NAME, lambda: Replica)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict, **_: Any) -> float:
    """A reward that differs from response to response: the share of its letters that are in the ground truth."""
    return sum(letter in ground_truth for letter in solution_str) / (1 + len(solution_str))
