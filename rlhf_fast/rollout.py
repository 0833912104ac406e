"""The one record that flows through an online trainer."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.data import Prompt
from rlhf_fast.generate import Generation
from rlhf_fast.losses import masked_mean
from rlhf_fast.packing import Spots, spots

#: The fields of shape [B, T]; scores may be one.
PER_TOKEN = ("responses", "mask", "sampler_logprobs", "old_logprobs", "ref_logprobs", "kl", "values", "scores")


@dataclass
class Rollout:
    """What the policy wrote to ``B`` prompts, and what the other models think of it.

    Prompts are padded to the left, responses to the right, so that column ``P - 1`` of ``ids`` is the last token of
    every prompt. The value of a response token is that of the state before it is drawn.
    """

    prompts: list[str]  # [B], as the reward sees them
    texts: list[str]  # [B], the responses without special tokens
    columns: dict[str, list[Any]]  # the other columns of the prompts, [B] each
    prompt_ids: Tensor  # [B, P], int64
    prompt_mask: Tensor  # [B, P], bool
    responses: Tensor  # [B, T], int64
    mask: Tensor  # [B, T], bool, True up to and including the stop token
    ended: Tensor  # [B], bool, a stop token was drawn
    prompt_lengths: Tensor  # [B], int64, tokens of each prompt; on the CPU, as lengths, to cut padding without a wait
    lengths: Tensor  # [B], int64, tokens of each response
    sampler_logprobs: Tensor  # [B, T], nats, as the sampler had them when it drew, at its temperature, unfiltered
    old_logprobs: Tensor  # [B, T], nats, of the same policy, from whichever of sampler and trainer the loss starts
    ref_logprobs: Tensor  # [B, T], nats, under the frozen reference
    kl: Tensor  # [B, T], nats, of policy and reference: exact, or the difference of their logprobs
    values: Tensor  # [B, T], in units of reward
    scores: Tensor | None = None  # [B] or [B, T], from the reward
    uncertainty: Tensor | None = None  # [B], in units of reward, the standard deviation of an ensemble's scores

    @classmethod
    def begin(
        cls,
        batch: list[Prompt],
        prompt_ids: Tensor,  # [B, P]
        prompt_mask: Tensor,  # [B, P], bool
        written: Generation,
        texts: list[str],
    ) -> "Rollout":
        """The rollout of what was just ``written``, with the sampler's logprobs; what nobody has read yet is 0."""
        columns = {name: [prompt.columns[name] for prompt in batch] for name in batch[0].columns}
        ref, kl, values = (torch.zeros_like(written.logprobs) for _ in range(3))
        return cls(
            prompts=[prompt.prompt for prompt in batch], texts=texts, columns=columns,
            prompt_ids=prompt_ids, prompt_mask=prompt_mask, responses=written.responses, mask=written.mask,
            ended=written.ended, prompt_lengths=prompt_mask.sum(1).cpu(), lengths=written.mask.sum(1).cpu(),
            sampler_logprobs=written.logprobs, old_logprobs=written.logprobs.clone(), ref_logprobs=ref, kl=kl,
            values=values,
        )  # fmt: skip

    @property
    def ids(self) -> Tensor:
        """``[B, P + T]``: each prompt and its response."""
        return torch.cat([self.prompt_ids, self.responses], 1)

    @property
    def attention(self) -> Tensor:
        """``[B, P + T]`` bool: the tokens of ``ids`` that are there."""
        return torch.cat([self.prompt_mask, self.mask], 1)

    def response_ids(self) -> list[list[int]]:
        """The tokens of each response, the stop token included; waits for the device."""
        return [row[:n] for row, n in zip(self.responses.tolist(), self.lengths.tolist(), strict=True)]

    @cached_property
    def spots(self) -> Spots:
        """The sequences without their padding, in rows as long as the longest of them."""
        return spots(self.ids, self.mask, self.prompt_lengths, self.lengths)

    @cached_property
    def flat_spots(self) -> Spots:
        """The same in one row, for flash-attn's kernels."""
        return spots(self.ids, self.mask, self.prompt_lengths, self.lengths, flat=True)

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str) -> "Rollout":
        """The same on ``device``, but for the lengths."""
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor) and name not in ("prompt_lengths", "lengths"):
                moved[name] = value.to(device)
        return Rollout(**moved)

    def sequence_scores(self) -> Tensor:
        """``[B]``: the score of each response, summed over its tokens where the reward is dense."""
        assert self.scores is not None
        return self.scores if self.scores.dim() == 1 else torch.where(self.mask, self.scores, 0).sum(1)

    def samples(self, count: int) -> list[dict[str, Any]]:
        """``prompt``, ``response`` and ``score`` (None without a reward) of the first ``count`` sequences."""
        scores = [None] * count if self.scores is None else self.sequence_scores()[:count].tolist()
        texts = zip(self.prompts, self.texts, scores, strict=False)
        return [{"prompt": prompt, "response": response, "score": score} for prompt, response, score in texts]

    @classmethod
    def join(cls, parts: "list[Rollout]") -> "Rollout":
        """The sequences of all ``parts``, one part after the other, padded to the longest."""
        joined: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            values = [getattr(part, field.name) for part in parts]
            if isinstance(values[0], list):
                joined[field.name] = [item for value in values for item in value]
            elif isinstance(values[0], Tensor):
                width = max(v.shape[1] for v in values) if values[0].dim() == 2 else 0
                left = field.name in ("prompt_ids", "prompt_mask")  # prompts end where responses begin
                room = [(width - v.shape[1]) * (v.dim() == 2) if v.dim() == 2 else 0 for v in values]
                sides = [(n, 0) if left else (0, n) for n in room]
                padded = [nn.functional.pad(v, s) if any(s) else v for v, s in zip(values, sides, strict=True)]
                joined[field.name] = torch.cat(padded)
        names = parts[0].columns
        joined["columns"] = {name: [item for part in parts for item in part.columns[name]] for name in names}
        return cls(**joined)

    def select(self, rows: Tensor) -> "Rollout":
        """The rollout of the sequences ``rows``, int64 ``[M]`` on the CPU, without the columns that all of them pad."""
        at = rows.to(self.mask.device, non_blocking=True)
        first = self.prompt_ids.shape[1] - int(self.prompt_lengths[rows].max())
        end = int(self.lengths[rows].max())
        chosen: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                taken = value[at if value.device == at.device else rows]
                if field.name in ("prompt_ids", "prompt_mask"):
                    taken = taken[:, first:]
                chosen[field.name] = taken[:, :end] if field.name in PER_TOKEN and taken.dim() == 2 else taken
            elif isinstance(value, list):
                chosen[field.name] = [value[row] for row in rows.tolist()]
        chosen["columns"] = {name: [column[row] for row in rows.tolist()] for name, column in self.columns.items()}
        return Rollout(**chosen)


def statistics(
    rollout: Rollout,
    rewards: Tensor,  # [B, T], or [B]
    returns: Tensor | None = None,  # [B, T], where there is a critic
) -> dict[str, Tensor]:
    """What a scored rollout looks like, each a 0-d tensor.

    ``kl`` is the mean over the responses of the sum of ``rollout.kl`` over their tokens, in nats; ``mismatch`` the root
    of the mean square of what sampler and trainer differ in about the logprob of a token, where both computed it;
    ``rewards`` that of the token rewards, or of the ``[B]`` scores less the penalties; ``explained_variance`` the share
    of the returns' variance that the values account for; ``uncertainty``, of an ensemble, by how much it disagrees.
    """
    mask = rollout.mask
    mismatch = masked_mean((rollout.old_logprobs - rollout.sampler_logprobs) ** 2, mask).sqrt()
    found = {
        "kl": torch.where(mask, rollout.kl, 0).sum(1).mean(),
        "mismatch": mismatch,
        "scores": rollout.sequence_scores().mean(),
        "rewards": (rewards if rewards.dim() == 1 else rewards.sum(1)).mean(),
        "response_length": mask.sum(1).float().mean(),
        "ended": rollout.ended.float().mean(),
    }
    if rollout.uncertainty is not None:
        found["uncertainty"] = rollout.uncertainty.mean()
    if returns is not None:
        unexplained, whole = (_variance(x, mask) for x in (returns - rollout.values, returns))
        found["explained_variance"] = 1 - unexplained / whole
    return found


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)
