"""AdamW whose state several processes hold in parts, and from stage 2 on its gradients, from 3 the weights: ZeRO.

Rajbhandari et al. 2020, by DeepSpeed. All models of a trainer are in one engine, whose forward pass is never called:
its hooks on the weights reduce their gradients, and those on the modules gather the weights of stage 3.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

PLAN = "_zero"  # of a model: how it is, or will be, trained
MOMENTS = "exp_avg", "exp_avg_sq"
#: Keys of DeepSpeed's config that ``settings`` itself gives their values, and of its section ``zero_optimization``.
IGNORED = (
    "zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "steps_per_print",
    "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "offload_optimizer",
    "offload_param", "allgather_partitions", "contiguous_gradients", "reduce_scatter",
)  # fmt: skip
#: Keys of that section that are taken over: when to talk, and how much at a time.
TAKEN = "stage", "overlap_comm", "reduce_bucket_size", "allgather_bucket_size", "sub_group_size"


class Plan:
    """What ``plan`` leaves at a model until ``ZeroAdamW`` is made, and that optimizer from then on."""

    def __init__(self, models: list[nn.Module], config: dict[str, Any], accelerator: Any) -> None:
        self.models, self.config, self.accelerator = models, config, accelerator
        self.optimizer: ZeroAdamW | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Plan":
        return self


def settings(given: dict[str, Any]) -> dict[str, Any]:
    """The config for DeepSpeed's engine out of the one that a user gave. Raises ``ValueError`` for what is not done."""
    section = given.get("zero_optimization", {})
    if section.get("stage") not in (1, 2, 3):
        raise ValueError(f"ZeRO runs in stage 1, 2 or 3 here, and DeepSpeed was set up for {section.get('stage')}")
    for name in ("offload_optimizer", "offload_param"):
        device = str((section.get(name) or {}).get("device") or "none")
        if device != "none":
            raise ValueError(f"the trainers run ZeRO without offloading: no {name} to {device}")
    for name, value in section.items():
        if name not in IGNORED + TAKEN and not name.startswith("stage3_") and _asks(value):
            raise ValueError(f"the trainers cannot do zero_optimization.{name} of DeepSpeed's config: leave it out")
    for name, value in given.items():
        if name not in IGNORED and _asks(value) and (name != "gradient_accumulation_steps" or value != 1):
            raise ValueError(f"the trainer's config rules, not DeepSpeed's: leave {name} out of that (docs/scale.md)")
    taken = {name: section[name] for name in TAKEN if section.get(name, "auto") != "auto"}
    if taken["stage"] == 1:  # its gradients are summed after the last backward pass, and with overlap_comm never
        taken["overlap_comm"] = False
    if taken["stage"] == 3:  # a small weight that stayed gathered would be dropped where it is used first
        taken["stage3_param_persistence_threshold"] = 0
    return {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": float("inf"),
        "gradient_clipping": 0.0,  # its default is to clip all models together to 1
        "zero_optimization": taken, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip


def stage(config: dict[str, Any]) -> int:
    """The stage of ``settings``: 1 to 3."""
    return int(config["zero_optimization"]["stage"])


def plan(models: Sequence[nn.Module], config: dict[str, Any], accelerator: Any) -> None:
    """Let ``ZeroAdamW`` train ``models`` under ``config``, of ``settings``; in stage 3 their weights are parted now."""
    found = Plan(list(models), config, accelerator)
    if stage(config) == 3:
        import deepspeed

        deepspeed.init_distributed()
        deepspeed.zero.Init(module=nn.ModuleList(models), config_dict_or_path=config)
        for model in models:
            for buffer in model.buffers():
                buffer.data = buffer.data.to(accelerator.device)
    for model in models:
        vars(model)[PLAN] = found


def planned(model: nn.Module) -> Plan | None:
    """What ``plan`` left at ``model``."""
    found: Plan | None = vars(model).get(PLAN)
    return found


class _AdamW(torch.optim.AdamW):
    """AdamW that leaves the groups alone which are ``idle``, as one does whose weights have no gradient."""

    def step(self, closure: Any = None) -> Any:
        every = self.param_groups
        self.param_groups = [group for group in every if not group["idle"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = every


class ZeroAdamW(torch.optim.AdamW):
    """AdamW by DeepSpeed's engine, over ``groups`` whose weights are those of the models of ``plan``.

    The groups and rates are its own. ``backward``, ``clip`` and ``step`` or ``zero_grad`` follow on each other, in
    every process equally often.
    """

    def __init__(self, groups: list[dict[str, Any]], plan: Plan, **options: Any) -> None:
        super().__init__(groups, **options)
        import deepspeed

        every = [weight for group in self.param_groups for weight in group["params"]]
        learning = [m for m in plan.models if any(p.requires_grad for p in m.parameters())]
        owners = {id(weight): model for model in learning for weight in model.parameters()}
        self.owners = [owners[id(group["params"][0])] for group in self.param_groups]
        self.taken, self.moved = [0] * len(self.owners), set[int]()  # steps of each group; models with a gradient
        for weight in every:
            weight.register_post_accumulate_grad_hook(partial(_note, self.moved, id(owners[id(weight)])))
        self.stage = stage(plan.config)
        inner = _AdamW([dict(group) | {"idle": False} for group in self.param_groups], **options)
        models = nn.ModuleList(plan.models if self.stage == 3 else learning)
        self.engine = deepspeed.initialize(model=models, optimizer=inner, config=plan.config)[0]
        self.zero = self.engine.optimizer
        if not hasattr(self.zero, "finalize_gradient_accumulation_boundary"):
            raise ValueError(f"ZeRO needs DeepSpeed 0.19.4 or newer, and this is {deepspeed.__version__}")
        name = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        self.flat = getattr(self.zero, name)
        for own in self.flat:
            step = torch.zeros((), dtype=torch.float32, device=own.device)
            inner.state[own] = {"step": step} | {name: torch.zeros_like(own) for name in MOMENTS}
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()  # what its first step does, and checkpoints read
        self.parts: dict[int, list[Tensor]] = {}
        self.zero_grad()
        plan.optimizer, plan.accelerator.backward = self, self.backward  # its own would leave the engine out

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to what the processes hold of it."""
        self.zero.clear_backward_seen_flag()
        self.engine.backward(loss * torch.distributed.get_world_size())  # DeepSpeed averages over the processes

    @torch.no_grad()
    def clip(self, models: Sequence[nn.Module], max_norm: float) -> Tensor:
        """Clip the gradient of each model to ``max_norm`` on its own; returns the ``[len(models)]`` norms before."""
        self.engine.set_gradient_accumulation_boundary(True)
        if self.stage == 1:
            self.engine.allreduce_gradients()
        else:
            self.zero.finalize_gradient_accumulation_boundary()
        self.parts = dict(self.zero.averaged_gradients)
        own = [[g for i, part in self.parts.items() for g in part if self.owners[self._group(i)] is m] for m in models]
        squares = [torch.stack(torch._foreach_norm(part)).square().sum() for part in own]
        norms = torch.stack(squares)
        torch.distributed.all_reduce(norms)
        norms = norms.sqrt()
        for part, norm in zip(own, norms, strict=True):
            torch._foreach_mul_(part, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norms

    def step(self, closure: Any = None) -> None:
        """One step with the gradient that ``clip`` saw; a model without one is left as it is."""
        for i, (group, inner) in enumerate(zip(self.param_groups, self.zero.optimizer.param_groups, strict=True)):
            inner["lr"], inner["idle"] = group["lr"], id(self.owners[i]) not in self.moved
            self.taken[i] += not inner["idle"]
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradient."""
        for part in self.parts.values():
            torch._foreach_zero_(part)  # DeepSpeed keeps what a weight had that gets no gradient in the next step
        self.parts = {}
        if self.stage < 3:
            for i in range(len(self.param_groups)):
                self.zero.averaged_gradients[i] = self.zero.all_grad_tensors[i] = None
        self.zero.zero_grad()
        self.engine.set_gradient_accumulation_boundary(False)
        self.moved.clear()

    def collect(self, keep: bool) -> dict[int, dict[str, Tensor]]:
        """The state, unsharded on the CPU, if ``keep``; every process must come here."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found: dict[int, dict[str, Tensor]] = {}
        for i, (group, weight) in enumerate(self._weights()):
            if not self.taken[group]:
                continue
            whole = {name: safe_get_full_optimizer_state(weight, name) for name in MOMENTS}
            if keep:
                found[i] = {"step": torch.tensor(float(self.taken[group]))} | {n: t.cpu() for n, t in whole.items()}
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state that every process has whole, and that the weights may have changed."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self.zero.refresh_fp32_params()
        state = state_dict["state"]
        self.taken = [0] * len(self.taken)
        for i, (group, weight) in enumerate(self._weights()):
            if i not in state:
                continue
            self.taken[group] = int(state[i]["step"])
            for name in MOMENTS:
                value = state[i][name].to(weight.device, torch.float32)
                if self.stage == 3:
                    size, rank = weight.ds_tensor.numel(), torch.distributed.get_rank()
                    padded = nn.functional.pad(value.flatten(), (0, size * (rank + 1)))
                    safe_set_local_optimizer_state(weight, padded[size * rank : size * (rank + 1)], name)
                else:
                    safe_set_full_optimizer_state(weight, value, name)
        for i, own in enumerate(self.flat):
            self.zero.optimizer.state[own]["step"].fill_(self.taken[self._group(i)])

    def _weights(self) -> list[tuple[int, nn.Parameter]]:
        return [(i, weight) for i, group in enumerate(self.param_groups) for weight in group["params"]]

    def _group(self, part: int) -> int:
        """The group of what DeepSpeed counts as its part ``part``, which in stage 3 may be smaller."""
        return int(self.zero.sub_group_to_group_id[part]) if self.stage == 3 else part


def _note(moved: set[int], model: int, weight: Tensor) -> None:
    moved.add(model)


@contextmanager
def gathered(weights: Sequence[nn.Parameter], *, changed: bool = False) -> Iterator[None]:
    """Hold ``weights`` of stage 3 whole in every process, which may then use them; ``changed`` if they are to be.

    Every process must come here. Others than those of stage 3 are left alone.
    """
    weights = [weight for weight in weights if is_part(weight)]
    if not weights:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(weights, modifier_rank=0 if changed else None):
        outside = [weight.is_external_param for weight in weights]
        for weight in weights:
            weight.is_external_param = True  # so that the module which used it does not drop it
        try:
            yield
        finally:
            for weight, was in zip(weights, outside, strict=True):
                weight.is_external_param = was


def is_part(tensor: Any) -> bool:
    """Whether ``tensor`` is a weight that stage 3 has parted."""
    return hasattr(tensor, "ds_id")


def _asks(value: Any) -> bool:
    """Whether a value of DeepSpeed's config asks for anything."""
    if isinstance(value, dict):
        return _asks(value.get("enabled", bool(value)))
    return value not in (None, False, "auto", "none", 0, [])
