"""Rewards: what scores a response: a function, a reward model, or an ensemble of them."""

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.data import encode, pad
from rlhf_fast.models import (
    check_tokens,
    context_length,
    evaluating,
    load_scalar_model,
    load_tokenizer,
    token_values,
    unwrap,
)
from rlhf_fast.ops.checks import check_choice
from rlhf_fast.preferences import split_steps, step_tokens
from rlhf_fast.pretrained import is_scalar, read_config
from rlhf_fast.shaping import RunningMoments as RunningMoments
from rlhf_fast.shaping import check_scores as check_scores
from rlhf_fast.shaping import overlong_penalty as overlong_penalty
from rlhf_fast.shaping import shape_rewards as shape_rewards
from rlhf_fast.shaping import short

COMBINATIONS = ("mean", "worst", "mean_minus_std")


def load_reward(
    source: Any, tokenizer: Any, *, batch_size: int = 32, device: torch.device | str | None = None
) -> Callable[..., Any]:
    """A reward from a path, a Hub id, a module with a scalar head or a ``callable(prompts, responses, **columns)``.

    A list of them is an ensemble of which the mean counts; an ``EnsembleReward`` says another combination. A callable
    is returned itself. A model goes to ``device``, or stays where it is. It reads prompt and response with
    the tokenizer saved beside it, or with ``tokenizer``, the policy's, where there is none or ``source`` is a module.
    Raises ``ValueError`` where ``source`` is a language model: a new scalar head would score at random.
    """
    if isinstance(source, (list, tuple)):
        source = EnsembleReward(source)
    if isinstance(source, EnsembleReward):
        source.load(tokenizer, batch_size=batch_size, device=device)
        return source
    if isinstance(source, (str, Path)):
        config = read_config(source)
        if not is_scalar(config):
            raise ValueError(f"{source} holds a language model, not a reward model: train one on preferences first")
        model = load_scalar_model(source).to(device)
        source = ModelReward(model, _own_tokenizer(source, tokenizer), batch_size=batch_size)
    elif isinstance(source, nn.Module):
        if not hasattr(unwrap(source), "score"):
            raise ValueError(f"{type(source).__name__} has no scalar head (score), so that it cannot be the reward")
        source = ModelReward(source.to(device), tokenizer, batch_size=batch_size)
    if isinstance(source, ModelReward) and tokenizer is not None:
        source.reads_tokens = source.tokenizer.get_vocab() == tokenizer.get_vocab()
    if not callable(source):
        raise TypeError(f"the reward must be a path, a module or a callable, got {type(source).__name__}")
    return source  # type: ignore[no-any-return]


class RewardError(ValueError):
    """A reward function raised something, or a reward model has no room for a text."""


def ask(
    reward: Callable[..., Any],
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: dict[str, list[Any]],
    response_ids: Sequence[list[int]] | None = None,
) -> Any:
    """What ``reward`` returns; a reward model and an ensemble are given the tokens of the responses as well.

    Raises ``RewardError`` that names the line of a function which raised something, and the prompt on which it does so:
    for that it is called again, with one prompt at a time.
    """
    if isinstance(reward, (ModelReward, EnsembleReward)):
        return reward(prompts, responses, **columns | {"response_ids": response_ids})
    try:
        return reward(prompts, responses, **columns)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = f" at {frames[1].filename}:{frames[1].lineno}" if len(frames) > 1 else ""
        said = f": {error}" if str(error) else ""
        name = type(error).__name__
        raise RewardError(
            f"the reward raised {name}{place}{said}{_culprit(reward, prompts, responses, columns)}"
        ) from error


def _culprit(
    reward: Callable[..., Any], prompts: Sequence[str], responses: Sequence[str], columns: dict[str, list[Any]]
) -> str:
    """The first prompt on which ``reward`` raises alone, in words; of several prompts none may."""
    for i, prompt in enumerate(prompts):
        try:
            reward(prompts[i : i + 1], responses[i : i + 1], **{name: c[i : i + 1] for name, c in columns.items()})
        except Exception:
            return f"; prompt {i + 1} of {len(prompts)}: {short(prompt)}, response {short(responses[i])}"
    return "; on no prompt alone"


class ModelReward:
    """A reward model as a callable: the scalar at the end token of prompt and response.

    A model that was taught steps (``step_separator`` in its config) reads a score at the end of each step of the
    response, and the lowest counts: an answer is as good as its worst step (Lightman et al. 2023).

    ``reads_tokens``: the policy has the same tokens. Then its own are read, as it wrote them, rather than those of the
    text: half a character, say, is one token, and three as a text.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 32) -> None:
        self.model, self.tokenizer, self.batch_size = model, load_tokenizer(model, tokenizer), batch_size
        self.special, self.reads_tokens = {*self.tokenizer.all_special_ids}, False

    @property
    def training_range(self) -> tuple[float, float] | None:
        """Mean and standard deviation of the scores of its training data, where its config says so."""
        config = unwrap(self.model).config
        found = getattr(config, "score_mean", None), getattr(config, "score_std", None)
        return None if None in found else found  # type: ignore[return-value]

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        *,
        response_ids: Sequence[list[int]] | None = None,
        **_columns: Any,
    ) -> Tensor:
        """``[B]`` scores, float32, on the model's device.

        Raises ``RewardError`` where a text exceeds its context, ``ValueError`` where it has a token that the model does
        not know.
        """
        limit = context_length(self.model)
        texts, ends = [], []
        written = [None] * len(responses) if response_ids is None or not self.reads_tokens else response_ids
        for prompt, response, own in zip(prompts, responses, written, strict=True):
            before, (answer, places) = encode(self.tokenizer, prompt), self._read(response, own)
            texts.append(before + answer)
            ends.append([len(before) + place for place in places])
            if limit is not None and len(texts[-1]) > limit:
                raise RewardError(
                    f"the reward model's context of {limit} tokens is too short for a prompt and response of "
                    f"{len(texts[-1])}: {short(prompt)}"
                )
        check_tokens(self.model, self.tokenizer, texts)  # on a GPU an unknown token ends the process
        return lowest_scores(self.model, texts, ends, self.tokenizer.pad_token_id, self.batch_size)

    def _read(self, response: str, own: list[int] | None) -> tuple[list[int], list[int]]:
        """The tokens of ``response``, its ``own`` if there are any, and the places at which a score is read."""
        separator = getattr(unwrap(self.model).config, "step_separator", None)
        if separator is not None:
            return step_tokens(self.tokenizer, split_steps(response, separator), separator)
        if own is None:
            ids = encode(self.tokenizer, response, start=False, end=True)
        else:  # a text has no special tokens either
            ids = [*(i for i in own if i not in self.special), self.tokenizer.eos_token_id]
        return ids, [len(ids) - 1]


@torch.no_grad()
def lowest_scores(
    model: Any, texts: Sequence[list[int]], ends: Sequence[list[int]], pad_id: int, batch_size: int
) -> Tensor:
    """``[B]``, float32: the lowest of the scores that ``model`` gives at the places ``ends`` of each text."""
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    scores = torch.zeros(len(texts), device=device)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = pad([texts[i] for i in rows], pad_id)
            places, there = (x.to(device) for x in pad([ends[i] for i in rows], 0))
            found = token_values(model, ids.to(device), mask.to(device)).gather(1, places)
            scores[rows] = torch.where(there, found, torch.inf).amin(1).float()
    return scores


class EnsembleReward:
    """Several rewards as one, which is harder to fool than each of them (Coste et al. 2023).

    Train the members as reward models with different ``RewardConfig.seed``: their heads begin apart, and they see the
    data in different orders. After a call ``uncertainty [B]`` is the standard deviation of the members' scores.

    Args:
        members: two or more of what a trainer takes as ``reward``: paths, modules, callables; one score per response.
        combine: ``"mean"``; ``"worst"``, the lowest; or ``"mean_minus_std"``, the mean less ``caution`` times their
            standard deviation. Scores of models can be compared if each was trained with ``RewardConfig.normalise``.
        caution: what a unit of disagreement costs.
    """

    def __init__(self, members: Sequence[Any], *, combine: str = "mean", caution: float = 1.0) -> None:
        if isinstance(members, str) or len(members) < 2:
            raise ValueError("an ensemble needs two members or more, that they may disagree")
        check_choice("EnsembleReward", "combine", combine, COMBINATIONS)
        if not 0 <= caution < torch.inf:
            raise ValueError(f"EnsembleReward: caution must be finite and not negative, got {caution}")
        self.members, self.combine, self.caution = list(members), combine, caution
        self.rewards: list[Callable[..., Any]] = []
        self.uncertainty: Tensor | None = None

    @property
    def training_range(self) -> tuple[float, float] | None:
        """That of its members: the mean of both numbers, of the worst the lowest mean; None where one has none.

        What their disagreement takes off the combined score is not in it.
        """
        found = [getattr(reward, "training_range", None) for reward in self.rewards]
        if not found or None in found:
            return None
        means, stds = zip(*found, strict=True)  # type: ignore[misc]
        return min(means) if self.combine == "worst" else sum(means) / len(means), sum(stds) / len(stds)

    def load(self, tokenizer: Any = None, **options: Any) -> None:
        """Turn the members into ``rewards`` by ``load_reward``, whose arguments these are; the trainers do so."""
        self.rewards = [load_reward(member, tokenizer, **options) for member in self.members]

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        *,
        response_ids: Sequence[list[int]] | None = None,
        **columns: Any,
    ) -> Tensor:
        """``[B]`` scores, float32. What is wrong with a member is said with its number."""
        if not self.rewards:
            self.load()
        found = [self._ask(i, prompts, responses, columns, response_ids) for i in range(len(self.rewards))]
        scores = torch.stack([each.to(found[0].device) for each in found])
        self.uncertainty = scores.std(0)
        if self.combine == "worst":
            return scores.amin(0)
        return scores.mean(0) - (self.caution * self.uncertainty if self.combine == "mean_minus_std" else 0.0)

    def _ask(self, i: int, prompts: Sequence[str], responses: Sequence[str], *given: Any) -> Tensor:
        try:
            said = ask(self.rewards[i], prompts, responses, *given)
            found = check_scores(said, len(prompts), responses, prompts=prompts)
            if found.dim() == 2:
                raise ValueError(f"the reward must return one score per response, got shape {list(found.shape)}")
        except (ValueError, TypeError) as error:
            kind = next(k for k in (RewardError, ValueError, TypeError) if isinstance(error, k))
            raise kind(f"member {i + 1} of {len(self.rewards)}: {error}") from error
        return found


def token_readers(reward: Any) -> list[nn.Module]:
    """The reward models in ``reward``, itself or the members of an ensemble, that read the policy's tokens."""
    members = reward.rewards if isinstance(reward, EnsembleReward) else [reward]
    return [member.model for member in members if isinstance(member, ModelReward) and member.reads_tokens]


def _own_tokenizer(source: str | Path, tokenizer: Any) -> Any:
    try:
        return load_tokenizer(source)
    except ValueError:
        if tokenizer is None:
            raise
        return tokenizer
