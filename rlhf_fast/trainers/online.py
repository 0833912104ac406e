"""What the trainers share whose policy writes its own training data: prompts in, responses out."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rlhf_fast import data, models
from rlhf_fast.generate import decode, texts_of
from rlhf_fast.rollout import Rollout
from rlhf_fast.trainers import learning
from rlhf_fast.trainers.run import stream

PROMPTS, SEEDS, MINIBATCHES = 0, 1, 2  # what a random stream is for


def tokenise(
    records: list[data.Record], tokenizer: Any, readers: dict[nn.Module, int], config: Any
) -> list[data.Prompt]:
    """The prompts of ``records`` that leave every reader room for a response.

    ``readers``: model → how many tokens it reads beside prompt and response. ``config`` has ``max_new_tokens``,
    ``max_prompt_length`` and ``overlong``. Raises ``ValueError`` where there is no room, or a token one does not know.
    """
    new = config.max_new_tokens
    rooms = [n - new - ends for m, ends in readers.items() if (n := models.context_length(m))]
    if min(rooms, default=1) < 1:
        raise ValueError(f"{type(config).__name__}.max_new_tokens {new} fills the context: no room for a prompt")
    rooms += [] if config.max_prompt_length is None else [config.max_prompt_length]
    limits = {"max_length": min(rooms, default=None), "overlong": config.overlong}
    examples = data.prompt_examples(records, tokenizer, **limits)
    for model in readers:
        models.check_tokens(model, tokenizer, (example.ids for example in examples))
    return examples


def batches(prompts: list[data.Prompt], config: Any, done: int) -> Iterator[list[data.Prompt]]:
    """``steps`` batches of prompts, one shuffled pass after the other, without the first ``done``."""
    waiting: list[int] = []
    epoch = 0
    for step in range(config.steps):
        while len(waiting) < config.batch_size:
            waiting += torch.randperm(len(prompts), generator=stream(config.seed, PROMPTS, epoch)).tolist()
            epoch += 1
        if step >= done:
            yield [prompts[i] for i in waiting[: config.batch_size]]
        waiting = waiting[config.batch_size :]


def write(
    policy: nn.Module, batch: list[data.Prompt], tokenizer: Any, config: Any, *, stop_ids: list[int], step: int
) -> Rollout:
    """A response of ``policy`` to each prompt of ``batch``; the seeds depend on the config's and on ``step`` alone."""
    device = next(policy.parameters()).device
    ids = [example.ids for example in batch]
    prompt_ids, prompt_mask = (x.to(device) for x in data.pad(ids, tokenizer.pad_token_id, side="left"))
    seeds = torch.randint(2**62, (len(batch),), generator=stream(config.seed, SEEDS, step))
    with learning.autocast(device, config.precision):
        written = decode(
            policy, prompt_ids, prompt_mask, max_new_tokens=config.max_new_tokens, stop_ids=stop_ids,
            pad_id=tokenizer.pad_token_id, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
            seeds=seeds,
        )  # fmt: skip
    return Rollout.begin(batch, prompt_ids, prompt_mask, written, texts_of(written, tokenizer))
