"""How policy, reference and critic share weights, so that three models weigh little more than one.

What is frozen is shared: a copy by ``shared_copy`` holds the very same frozen parameters and its own of the others.
``hydra:k`` freezes all but the last k layers and the norm after them (Glaese et al. 2022; trlX), ``lora`` everything,
and trains low-rank adapters instead (Hu et al. 2021), by PEFT.
"""

import copy
import re
import warnings
from typing import Any

import torch
from torch import nn

from rlhf_fast.dispatch import require
from rlhf_fast.models import load_scalar_model
from rlhf_fast.pretrained import unwrap


def check_share(name: str, share: str) -> None:
    """Raise ``ValueError`` unless ``share`` is none, hydra:k with k above 0, or lora."""
    if not re.fullmatch(r"none|lora|hydra:[1-9]\d*", share):
        raise ValueError(f"{name} must be none, lora or hydra:k, say hydra:2, got {share!r}")


def freeze(model: nn.Module, share: str) -> None:
    """Freeze what the copies of ``model`` will share. Raises ``ValueError`` where it has fewer than k layers."""
    if share == "none":
        return
    model.requires_grad_(False)
    if share == "lora":
        return
    for module in _top(model, int(share.removeprefix("hydra:"))):
        module.requires_grad_(True)


def shared_copy(model: nn.Module) -> Any:
    """A deep copy of ``model`` but for its frozen parameters, which are its own."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def new_critic(source: Any, policy: nn.Module, scorer: nn.Module | None, seed: int) -> Any:
    """The critic at ``source``, else a copy of ``scorer``, else the policy under a head of zeros, sharing its weights.

    ``seed`` is that of a new head. What is copied of ``scorer``, the reward model, is trained even if it was frozen.
    """
    if source is None and scorer is not None:
        return load_scalar_model(scorer).requires_grad_(True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if source is None:
            return load_scalar_model(policy, zero_head=True, copied=shared_copy)
        return load_scalar_model(source)


def with_adapters(model: Any, *, rank: int, alpha: float, seed: int) -> Any:
    """``model`` under LoRA adapters on every linear layer of its backbone, B = 0: its numbers are unchanged.

    Its weights stay frozen, but for a scalar head. ``seed`` is that of A.
    """
    require("peft")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", exclude_modules=["score", "lm_head"], bias="none"
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D, which PEFT recognises and says so, and of its use of transformers
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    head = getattr(unwrap(adapted), "score", None)
    if head is not None:
        head.requires_grad_(True)
    return adapted


def parts(model: nn.Module) -> list[nn.Module]:
    """What of ``model`` is sharded together: each layer, then the rest; of a scalar model backbone and head apart.

    A policy is called as a whole, of a critic or reward model the backbone, and then the head.
    """
    inner = unwrap(model)
    rest = [inner.base_model, inner.score] if hasattr(inner, "score") else [model]
    return [*_stack(model)[1], *rest]


def _stack(model: nn.Module) -> tuple[nn.Module, Any]:
    """The longest stack of layers of ``model``, after what holds it."""
    backbone = unwrap(model).base_model
    stacks = [(len(stack), parent, stack) for parent in backbone.modules() for stack in parent.children()
              if isinstance(stack, nn.ModuleList)]  # fmt: skip
    return max(stacks, key=lambda found: found[0], default=(0, backbone, []))[1:]


def _top(model: nn.Module, count: int) -> list[nn.Module]:
    """The last ``count`` layers of the longest stack of layers, and what stands behind them: the last norm."""
    parent, layers = _stack(model)
    length = len(layers)
    if count > length:
        raise ValueError(f"hydra:{count} trains {count} layers, and {type(unwrap(model)).__name__} has {length}")
    children = list(parent.children())
    return [*layers[length - count :], *children[children.index(layers) + 1 :]]
