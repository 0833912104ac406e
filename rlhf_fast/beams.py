"""Diverse beam search: several likely responses to a prompt that differ (Vijayakumar et al. 2016)."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.generate import LOOK, check_prompts
from rlhf_fast.models import evaluating, forward


class Beams(NamedTuple):
    """What ``diverse_beams`` returns, best first within each group; T is the length of the longest response."""

    responses: Tensor  # [B, N, T], int64, the pad token after the end
    mask: Tensor  # [B, N, T], bool, True up to and including the stop token
    scores: Tensor  # [B, N], the logprob of the response over its length to the power of length_penalty, in nats
    ended: Tensor  # [B, N], bool, a stop token was reached


def diverse_beams(
    model: Any,
    prompt_ids: Tensor,  # [B, P], padded on the left
    prompt_mask: Tensor,  # [B, P], bool
    *,
    beams: int,
    max_new_tokens: int,
    stop_ids: Iterable[int],
    pad_id: int,
    groups: int | None = None,
    diversity: float = 1.0,
    length_penalty: float = 1.0,
) -> Beams:
    """``beams`` responses of up to ``max_new_tokens`` tokens to each prompt, in ``groups`` of equal size.

    Within a group it is beam search for the likeliest response. The groups take their tokens one after the other, and
    each ranks its candidates by their logprob less ``diversity`` times the number of beams of the groups before it that
    took the same token at this step (Hamming diversity). The price steers what is kept and is not kept itself.

    A response ends with a stop token, and a group with as many ended responses as it has beams; what has not ended
    after ``max_new_tokens`` is cut. ``groups=None`` gives every beam its own, ``groups=1`` is plain beam search.
    All groups and prompts share one forward pass per token. Raises ``ValueError`` where ``decode`` does, and
    where the groups are not equally large.
    """
    groups = beams if groups is None else groups
    if beams < 1 or groups < 1 or beams % groups:
        raise ValueError(f"diverse_beams: {beams} beams cannot form {groups} groups of the same size")
    if not diversity >= 0:
        raise ValueError(f"diverse_beams: diversity must be at least 0, got {diversity}")
    check_prompts(model, prompt_mask, max_new_tokens)
    (batch, width), device = prompt_ids.shape, prompt_ids.device
    stops = torch.tensor(sorted(set(stop_ids)), dtype=torch.long, device=device)
    search = _Search((batch, groups, beams // groups), max_new_tokens, stops, pad_id, diversity, length_penalty)
    rows = torch.arange(batch, device=device).repeat_interleave(beams)
    attention = torch.ones(batch, width + max_new_tokens, dtype=torch.bool, device=device)
    attention[:, :width] = prompt_mask
    with torch.no_grad(), evaluating(model):
        output = forward(model, prompt_ids, attention[:, :width], use_cache=True, logits_to_keep=1)
        cache, logits = getattr(output, "past_key_values", None), output.logits[:, -1][rows]
        cache = cache if hasattr(cache, "reorder_cache") else None
        attention, prompts, parents = attention[rows], prompt_ids[rows], rows
        for step in range(max_new_tokens):
            if step:
                if cache is not None and (step == 1 or search.width > 1):
                    cache.reorder_cache(parents)
                ids = search.tokens.view(len(rows), -1)
                ids = ids[:, step - 1 : step] if cache is not None else torch.cat([prompts, ids[:, :step]], 1)
                seen = attention[:, : width + step]
                kept = {"use_cache": cache is not None, "past_key_values": cache, "logits_to_keep": 1}
                logits = forward(model, ids, seen, **kept).logits[:, -1]
            chosen = search.advance(logits, step)
            parents = rows if step == 0 else chosen
            if step % LOOK == LOOK - 1 and search.full.all():
                break
    return search.result()


class _Search:
    """The beams ``[B, G, W]`` that run and those that have ended."""

    def __init__(
        self, shape: tuple[int, int, int], longest: int, stops: Tensor, pad_id: int, diversity: float, penalty: float
    ) -> None:
        self.stops, self.diversity, self.penalty, self.longest = stops, diversity, penalty, longest
        self.width, device = shape[2], stops.device
        self.tokens = torch.full((*shape, longest), pad_id, device=device)
        self.total: Tensor = torch.full(shape, -torch.inf, device=device)
        self.total[..., 0] = 0  # at the start all beams of a group are the same one
        self.ended_tokens, self.lengths = self.tokens.clone(), torch.zeros(shape, dtype=torch.long, device=device)
        self.scores: Tensor = torch.full(shape, -torch.inf, device=device)
        self.stopped = torch.zeros(shape, dtype=torch.bool, device=device)
        self.full, self.broken = self.stopped[..., 0].clone(), self.stopped[:, 0, 0].clone()

    def advance(self, logits: Tensor, step: int) -> Tensor:
        """Take one token in every beam; returns the row that each of the new beams continues."""
        batch, groups, width = self.total.shape
        logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        logp = logp.view(batch, groups, width, -1)
        taken = torch.zeros_like(logp[:, 0, 0])  # [B, V], by how many beams of the groups before
        self.total, self.scores = self.total.to(logp.dtype), self.scores.to(logp.dtype)
        parents = torch.stack([self._group(g, logp[:, g], taken, step) for g in range(groups)], 1)
        first = torch.arange(batch * groups, device=logits.device).view(batch, groups, 1) * width
        return (first + parents).flatten()

    def _group(self, g: int, logp: Tensor, taken: Tensor, step: int) -> Tensor:
        """The step of group ``g`` with ``logp [B, W, V]``: each new beam's parent ``[B, W]``; adds to ``taken``."""
        width, vocab = self.width, logp.shape[-1]
        total = self.total[:, g, :, None] + logp
        count = min((len(self.stops) + 1) * width, width * vocab)  # however many stop, W go on
        key, at = (total - self.diversity * taken[:, None]).flatten(1).topk(count)
        value, parent, token = total.flatten(1).gather(1, at), at // vocab, at % vocab
        open_group = ~self.full[:, g, None]
        self.broken |= (key.isnan() & open_group).any(1)
        stop = torch.isin(token, self.stops)
        best = torch.arange(count, device=at.device) < width
        grown = self.tokens[:, g].gather(1, parent[..., None].expand(-1, -1, self.longest))
        grown[..., step] = token
        ending = (stop | (step == self.longest - 1)) & best & open_group & (value > -torch.inf)
        self._end(g, grown, torch.where(ending, value / (step + 1) ** self.penalty, -torch.inf), stop, step)
        taken.scatter_add_(1, token, (best & open_group).to(taken.dtype))
        going = torch.where(stop, -torch.inf, key).topk(width).indices
        self.total[:, g] = torch.where(stop, -torch.inf, value).gather(1, going)
        self.tokens[:, g] = grown.gather(1, going[..., None].expand(-1, -1, self.longest))
        return parent.gather(1, going)

    def _end(self, g: int, grown: Tensor, scores: Tensor, stop: Tensor, step: int) -> None:
        """Keep the W best of the ended beams of group ``g`` and of those that end now, which have ``scores``."""
        lengths = torch.full_like(scores, step + 1, dtype=torch.long)
        merged = torch.cat([self.scores[:, g], scores], 1)
        self.scores[:, g], order = merged.topk(self.width)
        for name, fresh in (("lengths", lengths), ("stopped", stop)):
            kept = getattr(self, name)
            kept[:, g] = torch.cat([kept[:, g], fresh], 1).gather(1, order)
        tokens = torch.cat([self.ended_tokens[:, g], grown], 1)
        self.ended_tokens[:, g] = tokens.gather(1, order[..., None].expand(-1, -1, self.longest))
        self.full[:, g] = (self.scores[:, g] > -torch.inf).all(1)

    def result(self) -> Beams:
        """The responses. Raises ``ValueError`` where the logits of a prompt were no numbers."""
        batch = len(self.broken)
        if self.broken.any():
            place = int(self.broken.nonzero()[0]) + 1
            raise ValueError(f"the model's logits are NaN or infinite for prompt {place} of {batch}")
        lengths = torch.where(self.scores > -torch.inf, self.lengths, 0).flatten(
            1
        )  # of a tiny vocabulary some are none
        longest = int(lengths.max()) if batch else 0
        mask = torch.arange(longest, device=lengths.device) < lengths[..., None]
        responses = self.ended_tokens.flatten(1, 2)[..., :longest]
        ended = self.stopped.flatten(1) & (lengths > 0)
        return Beams(responses, mask, self.scores.flatten(1), ended)
