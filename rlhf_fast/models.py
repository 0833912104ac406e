"""The four roles of a language model: policy, frozen reference, critic and reward model, and how they are called.

A policy is a causal language model of transformers. A critic or reward model is the same backbone under a scalar head,
in the format of transformers' ``...ForSequenceClassification`` with one label. Every call passes the mask and the
positions counted from it, so that neither the side nor the amount of padding changes a number.
"""

import copy
import inspect
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.pretrained import SCALAR, is_scalar, read_config, read_model, read_tokenizer, unwrap
from rlhf_fast.pretrained import evaluating as evaluating
from rlhf_fast.pretrained import restore as restore
from rlhf_fast.pretrained import save as save
from rlhf_fast.zero import is_part

NOISE = re.compile(r"drop|jitter")


def load_tokenizer(source: Any, tokenizer: Any = None) -> Any:
    """The tokenizer of ``source`` (path or Hub id), or ``tokenizer`` (path, Hub id or object) where one is given.

    A tokenizer without a pad token pads with its end token. Raises ``ValueError`` where there is no end token, or where
    ``source`` is a module and no tokenizer is given.
    """
    chosen = source if tokenizer is None else tokenizer
    if isinstance(chosen, nn.Module):
        raise ValueError("a model given as a module comes without its tokenizer: pass tokenizer=...")
    if isinstance(chosen, (str, Path)):
        chosen = read_tokenizer(chosen)
    if not hasattr(chosen, "eos_token_id"):
        raise TypeError(f"a tokenizer must be a path, a Hub id or one of transformers, got {type(chosen).__name__}")
    if chosen.eos_token_id is None:
        raise ValueError(f"the tokenizer {chosen.name_or_path or type(chosen).__name__} has no end token (eos_token)")
    if chosen.pad_token_id is None:
        chosen.pad_token = chosen.eos_token
    return chosen


def load_policy(source: Any, *, dtype: torch.dtype | str = torch.float32) -> Any:
    """The causal language model at ``source`` (path, Hub id or module), every dropout off.

    Weights are read from safetensors only and held in ``dtype``, by default float32, for an optimizer's small steps
    vanish in bfloat16 weights; ``"auto"`` keeps the stored dtype. A module is returned itself, dropout off.
    Raises ``ValueError`` in one sentence where there is no such model, or where padding would change its numbers.
    """
    if isinstance(source, nn.Module):
        return without_dropout(source)
    from transformers import AutoModelForCausalLM

    config = read_config(source)
    if is_scalar(config):
        raise ValueError(f"{source} holds a model with a scalar head ({config.architectures[0]}), not a language model")
    if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{source} holds a {config.model_type} model, which is not a causal language model")
    model = without_dropout(read_model(AutoModelForCausalLM, source, dtype=dtype))
    if "position_ids" not in accepts(model):
        _check_padding(model)
    return model


def load_scalar_model(
    source: Any,
    *,
    zero_head: bool = False,
    dtype: torch.dtype | str = torch.float32,
    copied: Callable[[Any], Any] = copy.deepcopy,
) -> Any:
    """A critic or reward model from ``source`` (path, Hub id or module), every dropout off.

    From a causal language model the backbone is taken (``copied``, if it is a module) and the head is new: normal with
    standard deviation ``1/sqrt(H + 1)`` (Stiennon et al. 2020), or zeros with ``zero_head``. From a model that has a
    scalar head already, that head is kept (and a module copied). Raises ``ValueError`` like ``load_policy``.
    """
    if isinstance(source, nn.Module):
        inner = unwrap(source)
        if hasattr(inner, "score"):
            return without_dropout(copied(source))
        return _with_head(copied(inner.base_model), inner, zero_head)
    config = read_config(source)
    if not is_scalar(config):
        model = load_policy(source, dtype=dtype)
        return _with_head(model.base_model, model, zero_head)
    if config.num_labels != 1:
        raise ValueError(f"{source} has a head of {config.num_labels} labels: a critic or reward model has 1")
    return without_dropout(read_model(_scalar_class(config), source, dtype=dtype))


def frozen_copy(model: nn.Module, copied: Callable[[Any], Any] = copy.deepcopy) -> Any:
    """A copy of ``model`` in evaluation mode that no gradient reaches: the reference."""
    return copied(model).eval().requires_grad_(False)


def without_dropout(model: nn.Module) -> Any:
    """Set every dropout, layer drop and router jitter of ``model`` to 0, in place; returns ``model``.

    The ratio of PPO compares two passes over the same tokens: with dropout it differs from 1 before the first step.
    """
    configs = [c for c in (getattr(m, "config", None) for m in model.modules()) if hasattr(c, "to_dict")]
    for holder in [*model.modules(), *configs]:
        for name, value in list(vars(holder).items()):
            if NOISE.search(name) and isinstance(value, float):
                setattr(holder, name, 0.0)
        if isinstance(holder, nn.modules.dropout._DropoutNd):
            holder.p = 0.0
    return model


def position_ids(
    mask: Tensor,  # [B, L], bool
) -> Tensor:
    """``[B, L]`` positions counted over the valid tokens alone, 0 where masked."""
    return (mask.long().cumsum(-1) - 1) * mask


def forward(
    model: Any,
    ids: Tensor,  # [B, L]
    mask: Tensor,  # [B, L], or [B, L + length of the cache]
    **extra: Any,
) -> Any:
    """Call ``model`` with the mask and the positions, and with those of ``extra`` that its forward knows."""
    known = accepts(model)
    given = {"position_ids": position_ids(mask)[:, -ids.shape[1] :], "use_cache": False, **extra}
    given = {name: value for name, value in given.items() if name in known}
    return model(input_ids=ids, attention_mask=mask.long(), return_dict=True, **given)


def hidden_states(
    model: Any,
    ids: Tensor,  # [B, L]
    mask: Tensor,  # [B, L], bool
) -> Tensor:
    """``[B, L, H]``, the last hidden states of the backbone; arbitrary where masked."""
    return forward(unwrap(model).base_model, ids, mask).last_hidden_state


def token_logits(
    model: Any,
    ids: Tensor,  # [B, L]
    mask: Tensor,  # [B, L], bool
    *,
    keep: int | None = None,
    final: bool = True,
) -> Tensor:
    """``[B, L, V]`` logits in the model's dtype, or of the last ``keep`` positions alone; arbitrary where masked.

    The logits at a position are those of the next token: T response tokens at the end need ``keep=T + 1`` without the
    ``final`` position. They come from the model's own forward, with its scaling and softcap, and no slice of larger
    ones is taken where that can leave positions out: its gradient would be a copy of that size.
    """
    if keep is not None and not 1 <= keep <= ids.shape[1]:
        raise ValueError(f"token_logits: keep must be between 1 and the length {ids.shape[1]}, got {keep}")
    if keep is None:
        return forward(model, ids, mask).logits
    spots = torch.arange(ids.shape[1] - keep, ids.shape[1] - (not final), device=ids.device)
    logits = forward(model, ids, mask, logits_to_keep=keep if final else spots).logits
    return logits if logits.shape[1] == len(spots) else logits[:, spots]


def token_values(
    model: Any,
    ids: Tensor,  # [B, L]
    mask: Tensor,  # [B, L], bool
) -> Tensor:
    """``[B, L]``, the scalar head at every position, in float32 (float64 for a float64 model); 0 where masked.

    ``score_shift`` is added where the model's config has it, which moves the mean of its scores to 0: it has no place
    in the head, which in transformers has no bias. Transformers' own forward gives the scores without it.

    Raises ``ValueError`` where the model has no head ``score`` with one output per token.
    """
    if not hasattr(unwrap(model), "score"):
        raise ValueError(f"{type(model).__name__} has no scalar head: load it with load_scalar_model")
    return torch.where(mask.bool(), scalar_head(model, hidden_states(model, ids, mask)), 0)


def scalar_head(
    model: Any,
    hidden: Tensor,  # [..., H]
) -> Tensor:
    """``[...]``, the scalar head of ``model`` on hidden states of its backbone, as ``token_values`` has it."""
    head = unwrap(model).score
    with torch.autocast(hidden.device.type, enabled=False):
        # Rounded to bfloat16 a value would have three digits left.
        if type(head) is nn.Linear and not is_part(head.weight):
            dtype = torch.promote_types(torch.promote_types(hidden.dtype, head.weight.dtype), torch.float32)
            bias = None if head.bias is None else head.bias.to(dtype)
            values = nn.functional.linear(hidden.to(dtype), head.weight.to(dtype), bias)
        else:
            values = head(hidden.to(next(head.parameters()).dtype))
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    shift = getattr(unwrap(model).config, "score_shift", 0.0)
    return values.squeeze(-1) + shift


def sequence_scores(
    model: Any,
    ids: Tensor,  # [B, L]
    mask: Tensor,  # [B, L], bool
) -> Tensor:
    """``[B]``, the scalar head at the last valid token, found from the mask; 0 for a row without any."""
    values = token_values(model, ids, mask)
    last = torch.where(mask.bool(), torch.arange(mask.shape[1], device=mask.device), 0).amax(-1)
    return values.gather(1, last[:, None]).squeeze(1)


def context_length(model: Any) -> int | None:
    """The most tokens that ``model`` was made for, or None where it has no such limit."""
    config = unwrap(model).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((n for n in lengths if isinstance(n, int) and n > 0), None)


def allowed_length(model: Any, max_length: int | None) -> int | None:
    """``max_length``, or the model's context where it is None. Raises ``ValueError`` if it exceeds that context."""
    limit = context_length(model)
    if max_length is not None and limit is not None and max_length > limit:
        raise ValueError(f"max_length {max_length} exceeds the model's context of {limit}")
    return limit if max_length is None else max_length


def check_tokens(model: Any, tokenizer: Any, sequences: Iterable[list[int]]) -> None:
    """Raise ``ValueError`` where the pad token or a token of ``sequences`` has no embedding in ``model``."""
    rows = unwrap(model).get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.pad_token_id, max((max(ids) for ids in sequences if ids), default=0))
    if highest >= rows:
        raise ValueError(f"the tokenizer's token {highest} is none of the model's {rows}: it belongs to another model")


def accepts(model: Any) -> frozenset[str]:
    """The names of the arguments of the model's forward."""
    return _parameters(type(unwrap(model)))


@cache
def _parameters(model_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


def _with_head(backbone: nn.Module, policy: Any, zero_head: bool) -> Any:
    """``backbone`` of ``policy`` under a new scalar head."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    with torch.device("meta"):  # its own weights would be thrown away
        model = _scalar_class(config, type(policy))(config)
    weight = next(p for p in backbone.parameters() if p.dim() > 1)
    head = nn.Linear(model.score.in_features, 1, bias=False, device=weight.device, dtype=weight.dtype)
    nn.init.normal_(head.weight, std=0.0 if zero_head else (head.in_features + 1) ** -0.5)
    setattr(model, model.base_model_prefix, backbone)
    model.score = head
    return without_dropout(model.train(policy.training))


def _scalar_class(config: Any, policy_class: type | None = None) -> Any:
    """The class of transformers that puts a linear head ``score`` on this architecture, or a new one like it."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.modeling_layers import GenericForSequenceClassification

    known = AutoModelForSequenceClassification._model_mapping.get(type(config), None)
    if known is not None:
        with torch.device("meta"):
            if hasattr(known(config), "score"):  # other heads pool the sequence before they project it
                return known
    policy_class = policy_class or AutoModelForCausalLM._model_mapping[type(config)]
    family = next(c for c in policy_class.__mro__ if c.__name__.endswith("PreTrainedModel"))
    name = re.sub(r"(For\w+|LMHeadModel)$", "", policy_class.__name__) + SCALAR
    prefix = {"base_model_prefix": policy_class.base_model_prefix}
    return type(name, (GenericForSequenceClassification, family), prefix | {"__module__": __name__})


@torch.no_grad()
def _check_padding(model: Any) -> None:
    """Raise ``ValueError`` if padding moves the numbers of a model that cannot be told its positions."""
    ids = torch.tensor([[1, 2, 3]])
    padded = torch.cat([torch.zeros_like(ids), ids], 1)
    alone = token_logits(model.eval(), ids, torch.ones_like(ids).bool()).float()
    beside = token_logits(model, padded, torch.arange(6)[None] >= 3, keep=3).float()
    if (alone - beside).abs().max() > 1e-3 * alone.abs().max():
        raise ValueError(f"{type(model).__name__} takes no position_ids, and padding on the left changes its numbers")
