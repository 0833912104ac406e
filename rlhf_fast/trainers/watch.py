"""Watching a run: sentences that name what goes wrong, and what to do about it, from its figures alone."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rlhf_fast import models
from rlhf_fast.rewards import RunningMoments, lowest_scores

SPAN = 5  # steps whose mean is judged, so that one odd batch says nothing
NOISE_SPAN = 10  # steps over which the noise of the KL is measured
BACK = 20  # steps that the value loss is compared with
AGAIN = 50  # steps before the same cause is named once more

SAME = {"fp32": 0.01, "bf16": 0.1}  # nats by which two passes over the same weights may differ
KL_ERRORS = 4.0  # standard errors below 0 at which the KL is negative
KL_FLOOR = -1e-3  # nats per response that are rounding
ENTROPY_SHARE = 0.2  # of the first steps' entropy
ENDED_SHARE = 0.5  # of the responses
EQUAL_SHARE = 0.5  # of the groups
VALUE_RISE = 10.0  # times the median of the steps before
SCORE_STDS = 3.0  # of the scores that the reward model gave in its training


class Watch:
    """Fed with the figures of every step; remembers a few of each and says what they are symptoms of.

    It keeps nothing that the figures do not hold: a resumed run feeds it those of ``metrics.jsonl`` again.

    Args:
        config: the trainer's; its ``precision`` and ``old_logprobs`` count, where it has them.
        training_range: mean and standard deviation of the scores that the reward model gave when it was trained.
    """

    def __init__(self, config: Any = None, training_range: tuple[float, float] | None = None) -> None:
        self.same = SAME.get(getattr(config, "precision", "fp32"), SAME["fp32"])
        self.sampled = getattr(config, "old_logprobs", "recomputed") == "sampler"
        self.training_range = training_range
        self.recent: dict[str, deque[float]] = {}
        self.first: dict[str, list[float]] = {}
        self.said: dict[str, int] = {}  # cause → the step at which it was last named
        self.checks: dict[str, Callable[[], str | None]] = {
            "ratio": self._ratio, "mismatch": self._mismatch, "negative_kl": self._negative_kl,
            "entropy_collapse": self._entropy_collapse, "no_eos": self._no_eos,
            "zero_variance": self._zero_variance, "value_loss": self._value_loss, "reward_drift": self._reward_drift,
        }  # fmt: skip

    def replay(self, lines: Iterable[dict[str, Any]]) -> "Watch":
        """Take in the lines of ``metrics.jsonl`` that a resumed run goes on from; returns itself."""
        for line in lines:
            self.look(line["step"], {name: value for name, value in line.items() if name not in ("step", "time")})
        return self

    def look(self, step: int, stats: dict[str, Any]) -> list[tuple[str, str]]:
        """``(cause, sentence)`` of what is wrong at ``step``, each cause once in ``AGAIN`` steps."""
        self.fresh = {n: float(v) for n, v in stats.items() if v is not None and math.isfinite(v)}
        for name, value in self.fresh.items():
            self.recent.setdefault(name, deque(maxlen=SPAN + BACK)).append(value)
            start = self.first.setdefault(name, [])
            if len(start) < SPAN and value != 0.0:  # the entropy is 0 while only the critic learns
                start.append(value)
        found = []
        for cause, check in self.checks.items():
            sentence = check()
            if sentence is not None and step - self.said.get(cause, -AGAIN) >= AGAIN:
                self.said[cause] = step
                found.append((cause, sentence))
        return found

    def _last(self, name: str, count: int) -> Sequence[float] | None:
        """The last ``count`` values of ``name``; None where there are fewer or this step has none."""
        values = self.recent.get(name, ())
        return list(values)[-count:] if name in self.fresh and len(values) >= count else None

    def _ratio(self) -> str | None:
        apart = math.sqrt(2 * max(self.fresh.get("first_approx_kl", 0.0), 0.0))
        if self.sampled or apart <= self.same:
            return None
        return (
            f"the ratio is not 1 at the first minibatch: two passes over the same weights differ by {apart:.2g} nats a "
            "token. The model has noise in its forward pass (dropout, router jitter) or does not mask its padding: "
            "turn that off, or the clip works on noise."
        )

    def _mismatch(self) -> str | None:
        values = self._last("mismatch", SPAN)
        if values is None or _mean(values) <= self.same:
            return None
        return (
            f"sampler and trainer differ by {_mean(values):.2g} nats a token: they run the same weights in another "
            "precision or at another temperature. Set importance_cap (2, say) to correct for it, and "
            "old_logprobs=recomputed."
        )

    def _negative_kl(self) -> str | None:
        values = self._last("kl", NOISE_SPAN)
        if values is None:
            return None
        mean = _mean(values)
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / (NOISE_SPAN - 1) / NOISE_SPAN)
        if mean >= KL_FLOOR or mean >= -KL_ERRORS * error:
            return None
        return (
            f"the KL from the reference is {mean:.3g} nats a response over {NOISE_SPAN} steps, and a KL cannot be "
            "below 0: the responses are not drawn from the distribution whose logprobs are taken. top_k and top_p cut "
            "it off (take them off, or use kl=exact)."
        )

    def _entropy_collapse(self) -> str | None:
        values, start = self._last("entropy", 2 * SPAN), self.first.get("entropy", [])
        if values is None or len(start) < SPAN or _mean(values[-SPAN:]) >= ENTROPY_SHARE * _mean(start):
            return None
        return (
            f"the entropy has collapsed from {_mean(start):.3g} to {_mean(values[-SPAN:]):.2g} nats a token: the "
            "policy writes the same again and again and finds nothing better any more. Go back to an earlier "
            "checkpoint with a larger kl_coef or entropy_coef, or a smaller learning_rate."
        )

    def _no_eos(self) -> str | None:
        values = self._last("ended", SPAN)
        if values is None or _mean(values) >= ENDED_SHARE:
            return None
        return (
            f"only {_mean(values):.0%} of the responses end before max_new_tokens, and the reward judges a fragment: "
            "raise max_new_tokens, set missing_eos_penalty, or teach the end token in SFT if it never comes."
        )

    def _zero_variance(self) -> str | None:
        values = self._last("zero_variance", SPAN)
        if values is None or _mean(values) <= EQUAL_SHARE:
            return None
        return (
            f"in {_mean(values):.0%} of the groups all scores are equal, and they teach nothing: the prompts are too "
            "easy or too hard, or the reward is too coarse. Set resample, raise group_size, or take other prompts."
        )

    def _value_loss(self) -> str | None:
        values = self._last("value_loss", SPAN + 3)
        if values is None:
            return None
        before = sorted(list(self.recent["value_loss"])[-3 - BACK : -3])
        median, now = before[len(before) // 2], _mean(values[-3:])
        if now <= VALUE_RISE * median or median <= 0:
            return None
        return (
            f"the value loss has risen from {median:.3g} to {now:.3g}: the critic no longer follows the scores, and "
            "the advantages are noise. Lower critic_learning_rate, set scale_scores=norm or clip_scores, or look for "
            "a reward without bounds."
        )

    def _reward_drift(self) -> str | None:
        values = self._last("scores", SPAN)
        if values is None or self.training_range is None or self.training_range[1] <= 0:
            return None
        mean, std = self.training_range
        away = (_mean(values) - mean) / std
        if abs(away) <= SCORE_STDS:
            return None
        return (
            f"the reward model's mean score, {_mean(values):.3g}, is {abs(away):.1f} standard deviations from that of "
            f"its training ({mean:.3g} ± {std:.3g}): it judges what it has never seen, and may be exploited. Read the "
            "samples; raise kl_coef, or train the reward model on such responses."
        )


def training_range(trainer: Any) -> tuple[float, float] | None:
    """Mean and standard deviation of the scores that the trainer's reward model gave in its training, if it says so."""
    return getattr(getattr(trainer, "reward", None), "training_range", None)


def note_range(
    model: Any, answers: Sequence[list[int]], ends: Sequence[list[int]], pad_id: int, *, most: int = 512, size: int = 32
) -> None:
    """Write the mean and standard deviation of the scores of the first ``answers`` into the config of a reward model.

    They are read at the places ``ends`` of each answer, of which the lowest counts, as ``ModelReward`` reads them. Its
    ``training_range`` gives them back: a policy whose scores leave that range is judged by a stranger.
    """
    moments = RunningMoments()
    moments.update(lowest_scores(model, answers[:most], ends[:most], pad_id, size))
    config = models.unwrap(model).config
    config.score_mean, config.score_std = moments.mean, moments.std


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
