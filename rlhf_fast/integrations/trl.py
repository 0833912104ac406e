"""TRL: the logprobs and entropies of all its trainers, from logits and from hidden states; and three trainers' losses.

Its results keep the dtype that its own functions give them: that of the logits, float32 from its own GPU kernel.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.integrations import trl_dpo, trl_losses
from rlhf_fast.integrations.head import Head, HeadLogprobs
from rlhf_fast.integrations.inputs import softmax_dtype
from rlhf_fast.integrations.patching import Peer, Replacement
from rlhf_fast.ops.logprobs import logprobs

UTILS = "trl.trainer.utils"


def selective_log_softmax(original: Callable) -> Callable:
    """Logprobs of chosen tokens ``[...]``, or of K tokens per row ``[..., K]``."""

    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        _check(temperature)
        dtype, mask = _dtype(logits, index, row_mask), None if row_mask is None else row_mask != 0
        if index.dim() == logits.dim() - 1:
            return logprobs(logits, index, temperature=temperature, mask=mask).logprobs.to(dtype)
        lse = logprobs(logits, index[..., 0], temperature=temperature).lse.unsqueeze(-1)
        chosen = (logits.gather(-1, index).to(lse.dtype) / temperature - lse).to(dtype)
        return chosen if mask is None else chosen.masked_fill(~mask, 0)

    return selective_log_softmax


def entropy_from_logits(original: Callable) -> Callable:
    """Entropy of every row of logits."""

    def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
        anything = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        return logprobs(logits, anything).entropy.to(_dtype(logits))

    return entropy_from_logits


def selective_log_softmax_and_entropy(original: Callable) -> Callable:
    """Both from one read of the logits."""

    def selective_log_softmax_and_entropy(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        _check(temperature)
        mask = None if row_mask is None else row_mask != 0
        out = logprobs(logits, index, temperature=temperature, mask=mask)
        dtype = _dtype(logits, index, row_mask)
        entropy = out.entropy if entropy_requires_grad else out.entropy.detach()
        return out.logprobs.to(dtype), entropy.to(dtype)

    return selective_log_softmax_and_entropy


class ChunkedHead:
    """Takes the place of TRL's autograd function of the chunked head: all that TRL calls of it is ``apply``."""

    def __init__(self, original: Any, *, bias: bool, outputs: bool) -> None:
        self.original, self.bias, self.outputs = original, bias, outputs

    def apply(self, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple:
        """The arguments of TRL's ``forward``, its results in its order."""
        given = list(rest) if self.bias else [None, *rest]
        bias, ids, temperature, _, softcap, scale, outputs = given + [None, 1.0, None][len(given) - 4 :]
        if not scale > 0:
            return self.original.apply(hidden, weight, *rest)
        extras = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1") if outputs is None else outputs
        wanted = tuple(x for x in extras if x not in ("entropy", "log_probs")) if self.outputs else ()
        gathered = import_module(UTILS).maybe_gather_lm_head_ctx
        # softcap tanh(scale x / softcap) / T, which is the op's own form with softcap / scale and T / scale.
        head = Head(temperature / scale, None if softcap is None else softcap / scale, _ordered(wanted), gathered)
        chosen, entropy, *others = HeadLogprobs.apply(hidden, weight, bias, ids, head)
        if not self.outputs:
            return chosen, entropy
        return chosen, entropy if "entropy" in extras else None, *others


def _ordered(extras: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(x for x in ("log_sum_sq_probs", "mean_logits", "is_top1") if x in extras)


def _check(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def _dtype(logits: Tensor, *others: Any) -> torch.dtype:
    """What TRL's own function returns for these: its kernel, where it would run, makes float32."""
    utils = import_module(UTILS)
    there = getattr(utils, "_fused_logprob_entropy", None) is not None  # since 1.14, where Triton is installed
    kernel = there and utils._supports_trl_loss_kernel(logits, *others)
    return torch.float32 if kernel else softmax_dtype(logits)


def _head(*, bias: bool, outputs: bool) -> Callable:
    return lambda original: ChunkedHead(original, bias=bias, outputs=outputs)


_SELECTED = ("logits, index", "logits, index, temperature=1.0, row_mask=None")
_BOTH = "logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None"
_END = "targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0"
_OUTPUTS = "('entropy', 'log_sum_sq_probs', 'mean_logits', 'is_top1')"

PEER = Peer(
    since="1.10",
    until="2",
    replacements=(
        Replacement(UTILS, "selective_log_softmax", _SELECTED, selective_log_softmax),
        Replacement(UTILS, "entropy_from_logits", ("logits, chunk_size=128",), entropy_from_logits),
        Replacement(
            UTILS,
            "selective_log_softmax_and_entropy",
            (_BOTH,),
            selective_log_softmax_and_entropy,
            since="1.14",
        ),
        Replacement(
            UTILS,
            "_ChunkedLogProbFunction",
            (f"ctx, last_hidden, weight, {_END}",),
            _head(bias=False, outputs=False),
            until="1.13",
        ),
        Replacement(
            UTILS,
            "_ChunkedLogProbFunction",
            (f"ctx, last_hidden, weight, bias, {_END}",),
            _head(bias=True, outputs=False),
            since="1.13",
            until="1.15",
        ),
        Replacement(
            "trl.kernels.chunked_logprob",
            "ChunkedLogProbFunction",
            (f"ctx, hidden, weight, bias, {_END}, outputs={_OUTPUTS}",),
            _head(bias=True, outputs=True),
            since="1.15",
        ),
        Replacement(
            "trl.trainer.grpo_trainer",
            "GRPOTrainer._compute_loss",
            ("self, model, inputs",),
            trl_losses.grpo_loss,
            bodies=("57278f3d8550111b",),  # 1.10.0 to 1.16.0
        ),
        Replacement(
            "trl.trainer.rloo_trainer",
            "RLOOTrainer._compute_loss",
            ("self, model, inputs",),
            trl_losses.rloo_loss,
            bodies=("735be5b1fb05909a",),  # 1.10.0 to 1.16.0
        ),
        Replacement(
            "trl.trainer.dpo_trainer",
            "DPOTrainer._compute_loss",
            ("self, model, inputs, return_outputs",),
            trl_dpo.loss_of(trl_dpo.from_logits, trl_dpo.reference_from_logits),
            until="1.15",
            bodies=("a10f6924291b56bb", "e8bf813935ba2a8a", "91e98bee9f3377c1"),  # 1.10 to 1.12, 1.13, 1.14
        ),
        Replacement(
            "trl.trainer.dpo_trainer",
            "DPOTrainer._compute_loss",
            ("self, model, inputs, return_outputs",),
            trl_dpo.loss_of(trl_dpo.from_head, trl_dpo.reference_from_head),
            since="1.15",
            bodies=("79ed90ddd610aff8",),  # 1.15.0 and 1.16.0
        ),
    ),
)
