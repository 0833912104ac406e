"""TRL: the loss of its DPO trainer. Until 1.14 from one read of the logits, from 1.15 on from what its head computed.

What is not reproduced here, by the trainer's options, runs TRL's own method.
"""

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.losses.preference import dpo_loss
from rlhf_fast.ops.logprobs import logprobs

#: TRL's loss types → the kind of `dpo_loss`, and whether the logprobs are means over the tokens.
KINDS = {
    "sigmoid": ("sigmoid", False),
    "sigmoid_norm": ("sigmoid", True),
    "hinge": ("hinge", False),
    "ipo": ("ipo", True),
}


class Tokens(NamedTuple):
    """Of every token that is predicted, ``[B, T - 1]``, chosen above rejected; what is masked is never read."""

    logprobs: Tensor  # 0 where masked
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor  # bool, of the chosen half at least


class Batch(NamedTuple):
    """What goes into the model and what of its predictions counts."""

    model: dict[str, Any]
    labels: Tensor  # [B, T], -100 where masked
    mask: Tensor  # [B, T - 1], bool


def from_logits(model: Any, batch: Batch) -> Tokens:
    """Logprobs and entropies of one read, where TRL reads twice and copies the rows that count."""
    logits, ids = model(**batch.model).logits[:, :-1], batch.model["input_ids"][:, 1:]
    out = logprobs(logits, ids, mask=batch.mask)
    with torch.no_grad():
        chosen = len(ids) // 2
        top1 = logits[:chosen].argmax(-1) == ids[:chosen]
        return Tokens(out.logprobs, out.entropy.detach(), logits.mean(-1, dtype=out.logprobs.dtype), top1)


def from_head(model: Any, batch: Batch) -> Tokens:
    """What TRL's head computed; prompt tuning puts positions in front."""
    out, n = model(**batch.model, labels=batch.labels, fused_lm_head=True), batch.mask.shape[1]
    extras = (x[:, -n:].detach() for x in (out.entropy, out.mean_logits, out.is_top1))
    return Tokens(out.log_probs[:, -n:], *extras)


def reference_from_logits(model: Any, batch: Batch) -> Tensor:
    """The reference's logprobs ``[B, T - 1]``."""
    return logprobs(model(**batch.model).logits[:, :-1], batch.model["input_ids"][:, 1:], mask=batch.mask).logprobs


def reference_from_head(model: Any, batch: Batch) -> Tensor:
    """The reference's logprobs ``[B, T - 1]``."""
    return model(**batch.model, labels=batch.labels, fused_lm_head=True).log_probs[:, -batch.mask.shape[1] :]


def loss_of(tokens: Callable, reference: Callable) -> Callable:
    """``DPOTrainer._compute_loss`` on the two ways to get at logprobs."""

    def replace(original: Callable) -> Callable:
        def _compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
            if return_outputs or not _is_known(self, original):
                return original(self, model, inputs, return_outputs)
            counts = inputs["completion_mask"] != 0
            given = {k: v for k, v in inputs.items() if k not in ("completion_mask", *_REFERENCE)}
            labels = inputs["input_ids"].masked_fill(~counts, -100)
            batch = Batch(given | {"use_cache": False}, labels, counts[:, 1:])
            found = tokens(model, batch)
            logps = found.logprobs.sum(1)
            if self.precompute_ref_logps:
                before = torch.cat([inputs[name] for name in _REFERENCE])
            else:
                quiet = original.__globals__["disable_gradient_checkpointing"]
                with torch.no_grad(), quiet(self.model, self.args.gradient_checkpointing_kwargs):
                    before = reference(self.ref_model, batch).sum(1)
            loss = _loss(self, logps, before, counts.sum(1).clamp(min=1))
            _log(self, found, batch.mask, logps.detach(), before, inputs["attention_mask"].sum())
            return loss

        return _compute_loss

    return replace


#: The metrics that are means over the pairs.
REWARDS = (
    "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies",
)  # fmt: skip
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


def _is_known(trainer: Any, original: Callable) -> bool:
    """Whether the trainer's options are those that are reproduced."""
    without_reference = trainer.ref_model is None and not trainer.precompute_ref_logps  # an adapter, switched off
    return not (
        without_reference
        or not 0 < trainer.beta < inf
        or trainer.f_divergence_type != "reverse_kl"
        or any(kind not in KINDS for kind in trainer.loss_types)
        or trainer.ld_alpha is not None
        or trainer.use_weighting
        or trainer.aux_loss_enabled
        or getattr(trainer, "use_liger_kernel", False)
    )


def _loss(trainer: Any, logps: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    """The weighted sum of the trainer's losses; ``logps``, ``reference`` and ``lengths`` ``[B]``."""
    ratios, none = logps - reference, torch.zeros(len(logps) // 2, device=logps.device)
    losses = []
    for name, weight in zip(trainer.loss_types, trainer.loss_weights, strict=True):
        kind, normed = KINDS[name]
        pair = (ratios / lengths if normed else ratios).chunk(2)
        losses.append(weight * dpo_loss(*pair, none, none, beta=trainer.beta, kind=kind))
    return torch.stack(losses).sum()


def _log(trainer: Any, tokens: Tokens, mask: Tensor, logps: Tensor, reference: Tensor, attended: Tensor) -> None:
    """TRL's metrics, of all processes."""
    accelerator, mode = trainer.accelerator, "train" if trainer.model.training else "eval"
    chosen, rejected = mask.chunk(2)
    top1 = (tokens.is_top1[: len(chosen)] & chosen).sum()
    logits = [torch.where(m, x, 0).sum() for m, x in zip((chosen, rejected), tokens.mean_logits.chunk(2), strict=True)]
    counts = accelerator.gather_for_metrics(torch.stack([chosen.sum(), rejected.sum(), top1, attended])[None])
    sums = torch.stack([torch.where(mask, tokens.entropy, 0).sum(), *logits])
    entropy, *logits = accelerator.gather_for_metrics(sums[None]).sum(0).tolist()
    of_chosen, of_rejected, right, seen = counts.sum(0).tolist()
    better, worse = (trainer.beta * (logps - reference)).chunk(2)
    rows = torch.stack([better, worse, *logps.chunk(2), better - worse, (better > worse).float()], dim=1)
    means = accelerator.gather(rows).mean(0).tolist()
    if mode == "train":
        trainer._total_train_tokens += seen // getattr(trainer, "_tp_size", 1)  # since 1.13
    metrics = trainer._metrics[mode]
    metrics["num_tokens"] = [trainer._total_train_tokens]
    numbers = dict(zip(REWARDS, means, strict=True)) | {
        "entropy": _ratio(entropy, of_chosen + of_rejected),
        "logits/chosen": _ratio(logits[0], of_chosen),
        "logits/rejected": _ratio(logits[1], of_rejected),
        "mean_token_accuracy": _ratio(right, of_chosen),
    }
    for name, number in numbers.items():
        metrics[name].append(number)


def _ratio(total: float, count: int) -> float:
    return total / count if count else 0.0
