"""The gold judge of the demo: a lexicon, and annotators who see through it with noise."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

WORDS = {
    3: "superb wonderful excellent brilliant delightful loved adored",
    2: "enjoyed lovely clever impressive charming memorable convincing gladly worth happy recommend attentive "
    "friendly funny kind",
    1: "good liked pleasant polite likeable",
    -1: "endured bad disappointing weak forgettable impatient unconvincing careless",
    -2: "disliked poor dull clumsy miserable regret avoid waste cheated annoying irritating unfriendly grumpy "
    "rude tiresome",
    -3: "hated detested terrible dreadful awful tedious",
}
#: Weight of each word that carries an opinion; every other word weighs 0.
LEXICON = {word: float(weight) for weight, words in WORDS.items() for word in words.split()}


def gold_score(response: str) -> float:
    """The sum of the weights of the words of one response; above 0 it is favourable."""
    return sum(LEXICON.get(word, 0.0) for word in re.findall(r"[a-z']+", response.lower()))


def gold_scores(responses: Sequence[str]) -> Tensor:
    """``gold_score`` of each response. ``[B]`` float32."""
    return torch.tensor([gold_score(r) for r in responses], dtype=torch.float32)


def prefers_first(
    first: Tensor,  # [B] gold scores
    second: Tensor,  # [B] gold scores
    *,
    temperature: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A noisy annotator's verdict on each pair, ``[B]`` bool.

    The first one wins with probability σ((first − second) / temperature), the model of Bradley and Terry (1952); a
    pair of equal scores is decided by a fair coin.

    Raises ``ValueError`` when ``temperature`` is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature!r}")
    return torch.rand(first.shape, generator=generator) < torch.sigmoid((first - second) / temperature)
