"""transformers: the loss of its ``Trainer`` and the sampling of its ``generate``, on the ops here.

Trainer(model, args, compute_loss_func=causal_lm_loss, ...)
model.generate(**inputs, do_sample=False, logits_processor=[Sampler(temperature=0.8, top_p=0.9, seeds=seeds)])
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from rlhf_fast.ops import SampleOutput, logprobs, sample

#: The label that transformers leaves out of a loss.
IGNORED = -100


def causal_lm_loss(
    outputs: Any,
    labels: Tensor,  # [..., T], integer, -100 where a token does not count
    num_items_in_batch: Tensor | int | None = None,  # number or 0-d
    *,
    shift: bool = True,
    aux_loss_coef: float | None = None,
) -> Tensor:
    """Cross-entropy of the labels, a ``compute_loss_func`` of ``transformers.Trainer``; no float32 copy of the logits.

    ``-sum log softmax(logits)_label / num_items_in_batch``: what transformers' own loss of a causal model is, but that
    one widens all logits first. The gradient is written in the logits' dtype, once. ``label_smoothing_factor`` is not
    applied; ``functools.partial`` gives other arguments.

    Args:
        outputs: of the model: an object or a dict with ``logits [..., T, V]``, or a tuple with them first.
        labels: ``[..., T]``, beside their own tokens.
        num_items_in_batch: the labels that count in all micro-batches and processes of the step, as ``Trainer`` gives
            it, so that accumulated gradients are those of the whole batch; None for those of this batch.
        shift: the logits of a token are compared with the label of the next one; False where they are beside each
            other, as in encoder-decoder models.
        aux_loss_coef: weight of ``outputs.aux_loss``, of the experts' load (``config.router_aux_loss_coef``).

    Returns:
        0-d float32 (float64 for float64 logits); 0 with a graph where no label counts.

    Raises:
        ValueError: no labels, no logits, shapes that do not fit, or an ``aux_loss`` that nothing was said about.
        IndexError: a label outside ``[0, V)`` that is not -100, on the CPU. On a GPU the loss becomes NaN.
    """
    if labels is None:
        raise ValueError("causal_lm_loss: the batch has no labels")
    named = isinstance(outputs, Mapping)
    logits = outputs.get("logits") if named else outputs[0] if isinstance(outputs, tuple) else outputs.logits
    if logits is None:
        raise ValueError("causal_lm_loss: the model returned no logits")
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"causal_lm_loss: logits {list(logits.shape)} and labels {list(labels.shape)} do not fit")
    labels = labels.to(logits.device)
    if shift:  # the labels move, for a slice of the logits would have a gradient to be copied
        labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED)
    mask = labels != IGNORED
    total = -logprobs(logits, labels, mask=mask).logprobs.sum()
    count = torch.as_tensor(mask.sum() if num_items_in_batch is None else num_items_in_batch, device=total.device)
    count = count.reshape(-1)[0]  # one per device, all equal, under DataParallel
    loss = total / torch.where(count > 0, count, 1)
    aux_loss = outputs.get("aux_loss") if named else getattr(outputs, "aux_loss", None)
    if aux_loss is None:
        return loss
    if aux_loss_coef is None:
        raise ValueError(
            "causal_lm_loss: the model returns an aux_loss: pass aux_loss_coef, as its config.router_aux_loss_coef or 0"
        )
    return loss + aux_loss_coef * aux_loss.to(loss.device)


class Sampler(LogitsProcessor):
    """Draws each token of one call of ``generate`` with `sample`: every filter and penalty and the draw in one pass.

    It leaves a score of 0 at the token that was drawn and -inf elsewhere, so that the argmax of ``do_sample=False``
    takes it; so does ``do_sample=True``, which ``num_return_sequences`` needs, at the price of its own filters after
    this one, which find one token. It goes last in ``logits_processor``, after whatever bans or biases tokens. With
    seeds a row's tokens depend on its own logits and seed alone, in any batch, as far as the model's arithmetic does
    not on its neighbours.

    Args:
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, allowed:
            as in `sample`, a number or a ``[B]`` tensor.
        prompt_mask: ``[B, P]``, the attention mask of the prompts; needed by penalties where prompts are padded.
        count_prompt: the penalties see the prompt's tokens, not only those of the response.
        seeds: ``[B]`` integers, one per row that ``generate`` has (``num_return_sequences`` of each prompt); from
            torch's generator if absent.

    Attributes:
        draws: the `SampleOutput` of each token, in order. Rows that have ended go on being drawn: mask them.

    Raises:
        TypeError: an argument that there is none of, seeds that are no integers, a mask that is no ``[B, P]`` tensor.
        ValueError: when drawing: a knob out of range, seeds or mask of another batch, a second call of ``generate``,
            logits that are NaN or +inf, or nothing left to draw from. The last two wait for the device at every token.
    """

    def __init__(
        self,
        *,
        prompt_mask: Tensor | None = None,  # [B, P], bool or integer
        count_prompt: bool = True,
        seeds: Tensor | Sequence[int] | None = None,  # [B]
        **knobs: Any,
    ) -> None:
        unknown = knobs.keys() - KNOBS
        if unknown:
            raise TypeError(f"Sampler: no such argument: {', '.join(sorted(unknown))}; it has {', '.join(KNOBS)}")
        self.knobs, self.seeds, self.prompt_mask, self.count_prompt = knobs, None, prompt_mask, count_prompt
        if seeds is not None:
            given = None if isinstance(seeds, str) else torch.as_tensor(seeds)
            if given is None or given.is_floating_point() or given.dtype == torch.bool:
                raise TypeError(f"Sampler: seeds must be integers, got {seeds!r}")
            self.seeds = given.to(torch.int64)
        if prompt_mask is not None and not (isinstance(prompt_mask, Tensor) and prompt_mask.dim() == 2):
            raise TypeError("Sampler: prompt_mask must be a [B, P] tensor, the attention_mask of the prompts")
        self.counts: Tensor | None = None
        self.shape: tuple[int, int] | None = None
        self.draws: list[SampleOutput] = []

    def __call__(
        self,
        input_ids: Tensor,  # [B, T]
        scores: Tensor,  # [B, V]
    ) -> Tensor:
        """``[B, V]``: 0 at the token that was drawn, -inf elsewhere."""
        rows, width = input_ids.shape
        if self.shape is None:
            self._start(rows, width, scores)
        elif (rows, width) != (self.shape[0], self.shape[1] + len(self.draws)):
            raise ValueError("Sampler: it serves one call of generate, without beams: make a new one for each")
        if self.counts is not None:
            self._count(input_ids)
        drawn = sample(scores, **self.knobs, token_counts=self.counts, seeds=self.seeds, positions=len(self.draws))
        if bool(drawn.status.any()):
            row = int(drawn.status.nonzero()[0])
            why = "the logits are NaN or infinite" if int(drawn.status[row]) == 1 else "no token is left to draw"
            raise ValueError(f"Sampler: {why} in row {row} at token {len(self.draws)} of the response")
        self.draws.append(drawn)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.ids[:, None], 0)

    def _start(self, rows: int, width: int, scores: Tensor) -> None:
        self.shape = rows, width
        if self.seeds is not None:
            if self.seeds.shape != (rows,):
                raise ValueError(f"Sampler: seeds must be [{rows}], one per row, got {list(self.seeds.shape)}")
            self.seeds = self.seeds.to(scores.device)
        self.knobs = {
            name: value.to(scores.device) if isinstance(value, Tensor) else value for name, value in self.knobs.items()
        }
        if any(name.endswith("_penalty") for name in self.knobs):
            self.counts = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
        if self.prompt_mask is not None:
            prompts, length = self.prompt_mask.shape
            if length != width or prompts == 0 or rows % prompts:
                raise ValueError(f"Sampler: prompt_mask must be [{rows}, {width}], got [{prompts}, {length}]")
            self.prompt_mask = self.prompt_mask.repeat_interleave(rows // prompts, 0)  # num_return_sequences

    def _count(self, input_ids: Tensor) -> None:
        if self.draws:
            fresh, ones = input_ids[:, -1:], torch.ones_like(input_ids[:, -1:])
        elif self.count_prompt:
            fresh = input_ids
            ones = torch.ones_like(fresh) if self.prompt_mask is None else self.prompt_mask.to(fresh)
        else:
            return
        self.counts.scatter_add_(1, fresh.to(self.counts.device), ones.to(self.counts))


#: The arguments of `sample` that `Sampler` hands on.
KNOBS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "allowed",
)  # fmt: skip
