"""What every trainer does with its weights: place them, and take one checked step of AdamW."""

import contextlib
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast import packing, sharded, sharing, zero
from rlhf_fast.dispatch import require
from rlhf_fast.products import exact_products
from rlhf_fast.trainers import processes

SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("fp32", "bf16")
#: What a run needs of the extra ``train``, asked for at its start.
PACKAGES = ("transformers", "accelerate", "tqdm", "tensorboard", "rich")
#: Accelerate's names of what the trainers run in: one process, or data parallel, or that with sharded weights.
DISTRIBUTED = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")


def accelerator() -> Any:
    """Accelerate's view of this process: its device, its backward and its clipping.

    Mixed precision is ``autocast`` below instead of Accelerate's own, which turns the whole ``[B, T, V]`` logits into
    float32 and can be chosen once per process only. Raises ``ValueError`` where Accelerate was set up for what the
    trainers cannot do, ``ModuleNotFoundError`` where one of ``PACKAGES`` is absent.
    """
    require(*PACKAGES)
    from accelerate import Accelerator

    found = Accelerator()
    kind = str(getattr(found.distributed_type, "value", found.distributed_type))
    if kind not in DISTRIBUTED:
        raise ValueError(f"the trainers run data parallel, under FSDP2 or ZeRO, and Accelerate was set up for {kind}")
    plugin = _fsdp(found)
    if plugin is not None and (plugin.fsdp_version != 2 or _offloads(plugin)):
        raise ValueError("the trainers shard with FSDP2 and without offloading: fsdp_version 2, no offload_params")
    _deepspeed(found)
    if found.gradient_accumulation_steps > 1:  # it would divide every loss once more
        raise ValueError("set micro_batch_size, and leave Accelerate's gradient_accumulation_steps at 1")
    if found.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"the trainers need no loss scaling: use precision=bf16, not {found.mixed_precision}")
    return found


def _fsdp(accelerator: Any) -> Any:
    """Accelerate's FSDP plugin where there are several processes and it was set up for that, else None.

    Accelerate itself looks at it on accelerators only, not on the CPU. Where there is none and nobody asked for the
    CPU, it counts one process, and torch all that its launcher has started.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env

    if max(accelerator.num_processes, processes.count()) == 1:
        return None
    found = getattr(accelerator.state, "fsdp_plugin", None) if accelerator.distributed_type == "FSDP" else None
    asked = found is None and parse_flag_from_env("ACCELERATE_USE_FSDP")
    return FullyShardedDataParallelPlugin() if asked else found


def _deepspeed(accelerator: Any) -> dict[str, Any] | None:
    """The config for DeepSpeed's engine where Accelerate was set up for that, else None.

    Accelerate itself looks at it on accelerators only. Raises ``ValueError`` for what ZeRO does not do here.
    """
    from accelerate.utils import DeepSpeedPlugin, parse_flag_from_env

    found = accelerator.state.deepspeed_plugin if accelerator.distributed_type == "DEEPSPEED" else None
    if found is None and not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return None
    if find_spec("deepspeed") is None:
        raise ModuleNotFoundError("deepspeed is not installed: pip install 'rlhf-fast[deepspeed]'", name="deepspeed")
    if max(accelerator.num_processes, processes.count()) == 1:
        raise ValueError("ZeRO shares among processes, and Accelerate was set up for DeepSpeed with one")
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # or transformers would load models in parts, which ``zero.plan`` makes
    return zero.settings((found or DeepSpeedPlugin()).deepspeed_config)


def _offloads(plugin: Any) -> bool:
    offload = plugin.cpu_offload
    return bool(
        getattr(offload, "offload_params", offload is not None and type(offload).__name__ == "CPUOffloadPolicy")
    )


def home(accelerator: Any) -> torch.device:
    """Where models are before ``shard``: the CPU if they will be sharded, for one may exceed a device."""
    config = _deepspeed(accelerator)
    parted = _fsdp(accelerator) is not None or (config is not None and zero.stage(config) == 3)
    return torch.device("cpu") if parted else accelerator.device


def prepare_packing(
    accelerator: Any, models: Sequence[nn.Module | None], config: Any, *, rows: bool = True
) -> list[packing.Attention]:
    """``packing.prepare`` before ``shard``; the ``rows`` of a CPU are for models that stay on one."""
    models = [model for model in models if model is not None]
    return packing.prepare(models, home(accelerator), config, rows=rows and accelerator.device.type == "cpu")


def shard(accelerator: Any, models: Sequence[nn.Module | None]) -> None:
    """Shard ``models`` in place where Accelerate was set up for FSDP2 or DeepSpeed, before the optimizer is made."""
    plugin, config = _fsdp(accelerator), _deepspeed(accelerator)
    if config is not None:
        every = [model for model in models if model is not None]
        for model in every if zero.stage(config) == 3 else ():
            sharded.remember(model)
        sharded.MODELS.update(every if zero.stage(config) > 1 else ())
        zero.plan(every, config, accelerator)
    if plugin is None:
        return
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(accelerator.device.type, (processes.count(),))
    again = plugin.reshard_after_forward is not False
    for model in models:
        if model is not None:
            sharded.shard(model, sharing.parts(model), mesh, reshard_after_forward=again)


def autocast(device: torch.device, precision: str) -> Any:
    """The context in which models read: weights stay float32, products are bfloat16 if ``precision`` says so."""
    if precision == "fp32" and device.type == "cpu":
        return exact_products()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def trainable(model: Any, device: torch.device, config: Any) -> Any:
    """``model`` on ``device`` with float32 weights: a step of 1e-6 is lost in the 8 bits of a bfloat16 weight.

    In several processes they are those of the first. With ``config.gradient_checkpointing`` its layers keep no
    activations for the backward pass. Raises ``ValueError`` where the model cannot do that.
    """
    model = model.to(device=device, dtype=torch.float32).train()
    processes.same_weights(model)
    if config.gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ValueError(f"{type(model).__name__} has no gradient checkpointing: gradient_checkpointing=false")
        newer = getattr(model, "activation_checkpointing_enable", None)  # its name in later releases of transformers 5

        def contexts() -> tuple[Any, Any]:
            """Around the layers' first forward pass, which has its own, and around that of the backward pass."""
            return contextlib.nullcontext(), autocast(device, config.precision)

        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False, "context_fn": contexts})
    return model


def adamw(groups: list[tuple[nn.Module, float]], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over ``(model, learning rate)`` groups; biases and norms do not decay.

    Raises ``ValueError`` where a model is frozen: the run would go on and teach it nothing.
    """
    parameters = []
    for model, rate in groups:
        learned = [p for p in model.parameters() if p.requires_grad]
        if not learned:
            raise ValueError(f"no weight of {type(model).__name__} can be trained: requires_grad is False on all")
        wide, flat = ([p for p in learned if (len(sharded.shape(p)) > 1) is wide] for wide in (True, False))
        parameters.append({"params": wide, "lr": rate, "weight_decay": weight_decay})
        parameters.append({"params": flat, "lr": rate, "weight_decay": 0.0})
    parameters = [group | {"peak": group["lr"]} for group in parameters if group["params"]]
    plan = zero.planned(groups[0][0])
    if plan is not None:
        return zero.ZeroAdamW(parameters, plan, betas=(0.9, 0.95), fused=True)
    return torch.optim.AdamW(parameters, betas=(0.9, 0.95), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, schedule: str, step: int, total: int, warmup_ratio: float) -> float:
    """Set the rate of ``step`` (from 0) of ``total``: a linear rise, then the schedule; returns the first group's."""
    step, warmup = min(step, total - 1), warmup_ratio * total
    if step < warmup:
        factor = (step + 1) / (warmup + 1)
    else:
        progress = (step - warmup) / max(total - warmup, 1)
        decays = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
        factor = decays[schedule]
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return float(optimizer.param_groups[0]["lr"])


def clip_gradients(accelerator: Any, models: list[nn.Module], max_norm: float) -> Tensor:
    """Clip each model's gradient to ``max_norm`` on its own; returns the ``[len(models)]`` norms before that.

    In several processes their gradients are summed first; those of a sharded model are already.
    """
    plan = zero.planned(models[0])
    if plan is not None and plan.optimizer is not None:
        return plan.optimizer.clip(models, max_norm)
    processes.sum_gradients([model for model in models if not sharded.is_sharded(model)])
    norms = [accelerator.clip_grad_norm_(model.parameters(), max_norm) for model in models]
    return torch.stack([(norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float() for norm in norms])


def split(items: list[Any], size: int | None) -> list[list[Any]]:
    """``items`` in parts of ``size``, the last of which may be smaller, or in one if it is None."""
    size = size or max(len(items), 1)
    return [items[start : start + size] for start in range(0, len(items), size)]


def numbers(stats: dict[str, Tensor]) -> dict[str, float]:
    """0-d tensors as Python numbers, with one wait for the device."""
    return dict(zip(stats, torch.stack([value.float() for value in stats.values()]).tolist(), strict=True))


def check_finite(optimizer: torch.optim.Optimizer, loss: float, norms: list[float]) -> None:
    """Raise ``FloatingPointError`` and drop the gradient unless the loss and every norm are finite."""
    for name, value in (("loss", loss), *(("gradient norm", norm) for norm in norms)):
        if not math.isfinite(value):
            optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(f"{name} is {value}")


def mean_of(taken: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each statistic over the minibatches of a step, and the largest ratio.

    ``first_approx_kl`` is ``approx_kl`` of the first one, before any step: 0, for its ratio is 1. ``mismatch``, the
    root of twice that, is how far old and new logprobs are apart.
    """
    means = {name: sum(stats[name] for stats in taken) / len(taken) for name in taken[0]}
    largest = max(stats["ratio_max"] for stats in taken)
    first = taken[0]["approx_kl"]
    return means | {"ratio_max": largest, "first_approx_kl": first, "mismatch": math.sqrt(2 * first)}
