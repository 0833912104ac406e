"""What the trainers share whose policy writes its own training data: prompts in, responses out."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast import data, models, ops, packing, sharded
from rlhf_fast.generate import stop_tokens, texts_of
from rlhf_fast.generators import DecodeGenerator, Generator, check_written
from rlhf_fast.rollout import Rollout
from rlhf_fast.trainers import learning, processes, reading
from rlhf_fast.trainers.run import Run, stream

PROMPTS, SEEDS, MINIBATCHES, MORE = 0, 1, 2, 3  # what a random stream is for
PER_TOKEN = ("entropy", "approx_kl", "clipfrac", "ratio_mean")  # statistics that are means over the tokens learned
OLD, SCALES = ("recomputed", "sampler"), ("none", "std", "norm")  # choices of old_logprobs and scale_scores


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


def more(prompts: list[data.Prompt], count: int, config: Any, step: int, attempt: int) -> list[data.Prompt]:
    """``count`` other prompts for a ``step`` that asks once more."""
    drawn = torch.randint(len(prompts), (count,), generator=stream(config.seed, MORE, step, attempt))
    return [prompts[i] for i in drawn.tolist()]


def write(
    policy: nn.Module,
    batch: list[data.Prompt],
    tokenizer: Any,
    config: Any,
    *,
    stop_ids: list[int],
    step: int,
    attempt: int = 0,
    generator: Generator | None = None,
) -> Rollout:
    """A response of ``policy`` to each prompt of ``batch``: each process writes its share, and all get the whole.

    The seeds depend on the config's, on ``step`` and, after the first, on the ``attempt`` alone. A ``generator`` other
    than the decode loop gets the policy's weights before the first attempt.
    """
    device = next(policy.parameters()).device
    every = torch.randint(2**62, (len(batch),), generator=stream(config.seed, SEEDS, step, *[attempt] * (attempt > 0)))
    mine, seeds = processes.share(batch), processes.share(every)

    def part() -> Rollout | None:
        if not mine:
            return None
        ids = [example.ids for example in mine]
        prompt_ids, prompt_mask = (x.to(device) for x in data.pad(ids, tokenizer.pad_token_id, side="left"))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            if generator is not None and attempt == 0:
                generator.sync(sharded.whole(policy))
            written = (generator or DecodeGenerator()).write(
                policy, prompt_ids, prompt_mask, max_new_tokens=config.max_new_tokens, stop_ids=stop_ids,
                pad_id=tokenizer.pad_token_id, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
                seeds=seeds,
            )  # fmt: skip
        if generator is not None:
            check_written(written, len(mine), config.max_new_tokens)
        return Rollout.begin(mine, prompt_ids, prompt_mask, written, texts_of(written, tokenizer))

    asked = [policy] if generator is not None and attempt == 0 else []
    with sharded.collected(asked, everywhere=True), sharded.gathered(policy):
        parts = [written for written in processes.gathered(part) if written is not None]
    return parts[0] if len(parts) == 1 else Rollout.join(parts).to(device)


def fill(rollout: Rollout, size: int, names: Sequence[str], read: Callable[[Rollout], None]) -> None:
    """Let ``read`` fill in the fields ``names`` of ``rollout``, ``size`` responses at a time.

    Each process reads its share, and all get the whole.
    """

    def part() -> dict[str, Tensor]:
        for rows, counts in processes.turns(torch.arange(len(rollout)), lambda rows: learning.split(rows, size)):
            some = rollout.select(rows)
            read(some)
            for name in names if counts else ():
                getattr(rollout, name)[slice(rows[0], rows[-1] + 1), slice(some.mask.shape[1])] = getattr(some, name)
        return {name: processes.share(getattr(rollout, name)) for name in names}

    parts = processes.gathered(part, calls=True)
    for name in names if len(parts) > 1 else ():
        setattr(rollout, name, torch.cat([found[name] for found in parts]).to(rollout.mask.device))


def show_samples(trainer: Any, step: int, run: Run) -> None:
    """Show the last samples of ``trainer`` where its ``sample_every`` says so."""
    every = trainer.config.sample_every
    if every and step % every == 0 and trainer.samples:
        run.show_samples(step, trainer.samples)


def stop_ids(policy: nn.Module, tokenizer: Any, more: str | None) -> list[int]:
    """The tokens that end a response, with the one that ``more`` is. Raises ``ValueError`` if that is not one token."""
    ids = [] if more is None else tokenizer(more, add_special_tokens=False)["input_ids"]
    if len(ids) != (more is not None):
        raise ValueError(f"stop_token {more!r} is {len(ids)} tokens of this tokenizer: it must be one")
    return sorted({*stop_tokens(policy, tokenizer), *ids})


def read(model: nn.Module, rollout: Rollout, config: Any) -> ops.LogprobsOutput:
    """Logprob and entropy of every response token under ``model``."""
    seen = reading.predictions(model, rollout, config)
    found = ops.logprobs(seen.logits, seen.tokens, temperature=config.temperature, mask=seen.mask)
    return ops.LogprobsOutput(*map(seen.spread, found))


def values(critic: nn.Module, rollout: Rollout, config: Any) -> Tensor:
    """The critic's value ``[B, T]`` of the state before each response token."""
    with learning.autocast(rollout.mask.device, config.precision):
        if config.packing:
            spots = reading.spots_of(critic, rollout)
            return spots.spread(packing.packed_values(critic, spots.packed))
        found = models.token_values(critic, rollout.ids, rollout.attention)
    return torch.where(rollout.mask, found[:, rollout.prompt_ids.shape[1] - 1 : -1], 0.0)


def compare(policy: nn.Module, reference: nn.Module | None, rollout: Rollout, config: Any) -> None:
    """Fill in ``ref_logprobs`` and ``kl`` of ``rollout``, and ``old_logprobs`` unless they are the sampler's.

    Without a reference the first two stay 0.
    """
    recomputed = config.old_logprobs == "recomputed"
    if config.kl == "exact" and reference is not None:
        seen = reading.predictions(policy, rollout, config)
        ref_logits = reading.predictions(reference, rollout, config).logits
        found = ops.kl(seen.logits, ref_logits, seen.tokens, temperature=config.temperature, mask=seen.mask)
        rollout.kl, old, rollout.ref_logprobs = map(seen.spread, (found.kl, found.logprobs, found.ref_logprobs))
        rollout.old_logprobs = old if recomputed else rollout.old_logprobs
        return
    if recomputed:
        rollout.old_logprobs = read(policy, rollout, config).logprobs
    if reference is None:
        return
    rollout.ref_logprobs = read(reference, rollout, config).logprobs
    rollout.kl = rollout.old_logprobs - rollout.ref_logprobs


def corrected(advantages: Tensor, rollout: Rollout, cap: float | None) -> Tensor:
    """``advantages``, ``[B, T]`` or ``[B]``, times the ratio of trainer to sampler, at most ``cap``: ``[B, T]``.

    This is truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
    RL training"). Without a cap they are returned as they are.
    """
    if cap is None:
        return advantages
    ratio = (rollout.old_logprobs - rollout.sampler_logprobs).exp().clamp(max=cap)
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    return torch.where(rollout.mask, advantages * ratio, 0)


def keep_groups(rounds: list[tuple[Rollout, Tensor]], count: int, size: int) -> tuple[Rollout, Tensor]:
    """``count`` groups of ``size`` responses out of all ``rounds``, those first whose scores are not all equal."""
    if len(rounds) == 1:
        return rounds[0]
    rollout, scores = Rollout.join([r for r, _ in rounds]), torch.cat([s for _, s in rounds])
    equal = torch.tensor(equal_groups(scores, size))
    rows = equal.argsort(stable=True)[:count].sort().values
    rows = (rows[:, None] * size + torch.arange(size)).flatten()
    return rollout.select(rows), scores[rows.to(scores.device)]


def equal_groups(scores: Tensor, size: int) -> list[bool]:
    """Whether the scores of each group of ``size`` neighbours are all equal; waits for the device."""
    groups = scores.view(-1, size)
    return list((groups == groups[:, :1]).all(1).tolist())


def cliprange(config: Any) -> tuple[float, float]:
    """How far the ratio may move down and up."""
    return config.cliprange, config.cliprange if config.cliprange_high is None else config.cliprange_high


def update(trainer: Any, rollout: Rollout, targets: tuple[Tensor, ...]) -> dict[str, float]:
    """``ppo_epochs`` passes over ``rollout`` in minibatches, fewer if the policy has moved by ``stop_kl``.

    ``trainer`` has ``config``, ``optimizer``, ``accelerator``, ``learners`` (prefix → model), ``done``, ``updates``,
    ``forward_size`` (responses per forward pass), ``count(rollout, rows)`` (the denominator of a minibatch) and
    ``loss(part, *targets, count)``, where each target is ``[B, T]`` or ``[B]``. A minibatch without a token to learn
    is left out: AdamW's moments would move the weights all the same. Returns the mean statistics of the others.
    """
    c, taken, empty = trainer.config, [], []
    for epoch in range(c.ppo_epochs):
        order = torch.randperm(len(rollout), generator=stream(c.seed, MINIBATCHES, trainer.done, epoch))
        for rows in order.split(c.minibatch_size):
            stats = accumulate(trainer, rollout, targets, rows)
            if stats["ratio_max"] == 0:  # of no token
                empty.append(stats)
                trainer.optimizer.zero_grad(set_to_none=True)
                continue
            taken.append(stats)
            if c.stop_kl is not None and stats["approx_kl"] > c.stop_kl:
                trainer.optimizer.zero_grad(set_to_none=True)
                return learning.mean_of(taken)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad(set_to_none=True)
            trainer.updates += 1
    return learning.mean_of(taken or empty)


def accumulate(trainer: Any, rollout: Rollout, targets: tuple[Tensor, ...], rows: Tensor) -> dict[str, float]:
    """Leave the clipped gradient of the minibatch ``rows`` in the weights, micro-batch by micro-batch.

    The denominator is that of the minibatch, so that the split, and that among processes, changes no more than the
    rounding. Where it is not the number of tokens, the statistic ``filled`` of the loss, their share of it, tells how
    to take the means over the tokens.
    """
    device = rollout.mask.device
    count = trainer.count(rollout, rows.to(device, non_blocking=True))

    def backward() -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for some, counts in processes.turns(rows, lambda rows: learning.split(rows, trainer.forward_size)):
            part, at = rollout.select(some), some.to(device, non_blocking=True)
            end = part.mask.shape[1]
            loss, stats = trainer.loss(part, *(t[at] if t.dim() == 1 else t[at, :end] for t in targets), count)
            trainer.accelerator.backward(loss * counts)
            for name, value in {"loss": loss.detach(), **stats}.items() if counts else ():
                merge = torch.maximum if name == "ratio_max" else torch.add
                total[name] = merge(total[name], value) if name in total else value
        return total

    total = {name: value.to(device) for name, value in processes.summed(backward, largest=("ratio_max",)).items()}
    norms = learning.clip_gradients(trainer.accelerator, [*trainer.learners.values()], trainer.config.max_grad_norm)
    names = [f"{prefix}grad_norm" for prefix in trainer.learners]
    numbers = learning.numbers(total | dict(zip(names, norms, strict=True)))  # the only wait for the device
    learning.check_finite(trainer.optimizer, numbers["loss"], [numbers[name] for name in names])
    filled = numbers.pop("filled", 1.0) or 1.0
    return numbers | {name: numbers[name] / filled for name in PER_TOKEN}
