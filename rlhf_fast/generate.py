"""Writing responses: the decode loop over a batch of prompts, and the same from text to text."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_fast.data import DataError, Record, encode, pad
from rlhf_fast.dispatch import require
from rlhf_fast.models import context_length, evaluating, forward, load_policy, load_tokenizer, unwrap
from rlhf_fast.ops import sample

#: Steps between two looks at whether every row has ended: each look waits for the device.
LOOK = 8


class Generation(NamedTuple):
    """What ``decode`` returns; T is the length of the longest response."""

    responses: Tensor  # [B, T], int64, the pad token after the end
    mask: Tensor  # [B, T], bool, True up to and including the stop token
    logprobs: Tensor  # [B, T], of what was drawn, under the unfiltered softmax at that temperature; 0 where masked
    ended: Tensor  # [B], bool, a stop token was drawn


def decode(
    model: Any,
    prompt_ids: Tensor,  # [B, P], padded on the left
    prompt_mask: Tensor,  # [B, P], bool
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int],
    pad_id: int,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seeds: Tensor | None = None,  # [B], int64
) -> Generation:
    """Write a response of up to ``max_new_tokens`` tokens to each prompt, with ``ops.sample`` and a key-value cache.

    A row depends on its own prompt and seed alone, not on its neighbours or the padding, as far as the model's own
    arithmetic does not. The model runs in evaluation mode and gets its own modes back. Raises ``ValueError`` where a
    prompt is empty or padded on the right, where prompt and response exceed the model's context, or where the logits
    of a row are NaN or infinite.
    """
    (batch, width), device = prompt_ids.shape, prompt_ids.device
    check_prompts(model, prompt_mask, max_new_tokens)
    if seeds is None:
        seeds = torch.randint(2**62, (batch,))
    seeds = seeds.to(device)
    stops = torch.tensor(sorted(set(stop_ids)), dtype=torch.long, device=device)
    responses = torch.full((batch, max_new_tokens), pad_id, dtype=torch.long, device=device)
    mask, logprobs = torch.zeros_like(responses, dtype=torch.bool), torch.zeros(responses.shape, device=device)
    attention = torch.cat([prompt_mask.bool(), torch.ones_like(mask)], 1)
    running = torch.ones(batch, dtype=torch.bool, device=device)
    broken, ended = ~running, ~running
    ids, fresh, cache = prompt_ids, prompt_ids, None
    with torch.no_grad(), evaluating(model):
        for step in range(max_new_tokens):
            output = forward(
                model, ids if cache is None else fresh, attention[:, : width + step],
                use_cache=True, past_key_values=cache, logits_to_keep=1,
            )  # fmt: skip
            cache = getattr(output, "past_key_values", None)
            drawn = sample(
                output.logits[:, -1], temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seeds=seeds,
                positions=step,
            )  # fmt: skip
            broken |= running & (drawn.status != 0)
            running = running & ~broken
            token = torch.where(running, drawn.ids, pad_id)
            responses[:, step], mask[:, step] = token, running
            logprobs[:, step] = torch.where(running, drawn.policy_logprobs, 0)
            ended |= running & torch.isin(token, stops)
            running = running & ~ended
            fresh = token[:, None]
            ids = ids if cache is not None else torch.cat([ids, fresh], 1)
            if step % LOOK == LOOK - 1 and not running.any():
                break
    if broken.any():
        raise ValueError(f"the model's logits are NaN or infinite for prompt {int(broken.nonzero()[0]) + 1} of {batch}")
    longest = int(mask.sum(1).max()) if batch else 0
    return Generation(responses[:, :longest], mask[:, :longest], logprobs[:, :longest], ended)


def generate(
    model: Any,
    prompts: Sequence[Any],
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    batch_size: int = 32,
) -> list[str]:
    """The response to each of ``prompts``, without the prompt and without special tokens.

    Args:
        model: a path, a Hub id or a causal language model, which stays where it is; one that is loaded goes to the
            accelerator, if there is one, in its stored dtype.
        prompts: texts, or conversations (lists of ``{"role", "content"}``) for the tokenizer's chat template.
        tokenizer: needed if ``model`` is a module.
        max_new_tokens: where a response that does not end is cut.
        temperature, top_k, top_p, min_p: as in ``sample``; temperature 0 takes the likeliest token.
        seed: of all responses; the batch size does not change them. A new one each time if absent.
        batch_size: prompts at a time.

    Raises:
        ValueError: no such model, an empty prompt, or one that leaves no room for ``max_new_tokens``.
        TypeError: ``prompts`` is one string.
    """
    if isinstance(prompts, str):
        raise TypeError("generate: prompts must be a list, got one string")
    if batch_size < 1:
        raise ValueError(f"generate: batch_size must be at least 1, got {batch_size}")
    require("transformers", "accelerate")
    tokenizer = load_tokenizer(model, tokenizer)
    if not isinstance(model, nn.Module):
        from accelerate import PartialState

        model = load_policy(model, dtype="auto").to(PartialState().device)
    records = [p if isinstance(p, Record) else Record({"prompt": p}, f"prompt {i}") for i, p in enumerate(prompts, 1)]
    encoded = [_encode(record, tokenizer) for record in records]
    _check_room(model, [len(ids) for ids in encoded], max_new_tokens, [record.place for record in records])
    source = None if seed is None else torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (len(encoded),), generator=source)
    stop_ids, device = stop_tokens(model, tokenizer), next(model.parameters()).device
    texts = [""] * len(encoded)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # neighbours of one length need no padding
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = pad([encoded[i] for i in rows], tokenizer.pad_token_id, side="left")
        written = decode(
            model, ids.to(device), mask.to(device), max_new_tokens=max_new_tokens, stop_ids=stop_ids,
            pad_id=tokenizer.pad_token_id, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            seeds=seeds[rows],
        )  # fmt: skip
        for i, text in zip(rows, texts_of(written, tokenizer), strict=True):
            texts[i] = text
    return texts


def texts_of(written: Generation, tokenizer: Any) -> list[str]:
    """The responses as text, without special tokens."""
    return spoken(written.responses, written.mask, tokenizer)


def spoken(
    ids: Tensor,  # [B, T]
    mask: Tensor,  # [B, T], bool
    tokenizer: Any,
) -> list[str]:
    """The text of the tokens of each row that are there, without special tokens."""
    kept = [row[there].tolist() for row, there in zip(ids.cpu(), mask.cpu(), strict=True)]
    return list(tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a response: the tokenizer's end token and those of the model's generation config."""
    config = getattr(unwrap(model), "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    more = [] if more is None else more if isinstance(more, list) else [more]
    return sorted({tokenizer.eos_token_id, *more})


def check_prompts(
    model: Any,
    prompt_mask: Tensor,  # [B, P], bool
    max_new_tokens: int,
) -> None:
    """Raise ``ValueError`` where a prompt is empty, padded on the right, or leaves no room for ``max_new_tokens``."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not bool(prompt_mask[:, -1:].all()) or prompt_mask.shape[1] == 0:
        raise ValueError("decode: every prompt must have a token, and be padded on the left")
    lengths = prompt_mask.sum(1).tolist()
    _check_room(model, lengths, max_new_tokens, [f"prompt {i + 1}" for i in range(len(lengths))])


def _encode(record: Record, tokenizer: Any) -> list[int]:
    from rlhf_fast.columns import prompt_text

    ids = encode(tokenizer, prompt_text(record, tokenizer))
    if not ids:
        raise DataError(f"{record.place}: it is empty")
    return ids


def _check_room(model: Any, lengths: list[int], max_new_tokens: int, places: list[str]) -> None:
    limit = context_length(model)
    for place, length in zip(places, lengths, strict=True):
        if limit is not None and length + max_new_tokens > limit:
            raise ValueError(
                f"{place} has {length} tokens: with max_new_tokens={max_new_tokens} that is more than the "
                f"model's context of {limit}"
            )
