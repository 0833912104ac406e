"""Reviews from a grammar: one set of rules (``rules.py``) that writes them, recognises them and counts them."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from rlhf_fast.demo.rules import DOMAINS, SHARED

Symbols = tuple[str, ...]  # words, punctuation and the names of rules in braces: ("the", "{part}", "{very}", ".")
Word = re.compile(r"\{[\w.]+\}|[A-Za-z']+|[.,]")
#: The share of favourable decisions in a review of each mood.
MOODS = {"positive": 0.9, "negative": 0.1, "mixed": 0.5}
HELD_OUT = 0.15  # share of the prompts that no training stage ever sees


@dataclass(frozen=True)
class Alternative:
    """One right-hand side: its symbols and the favourable and unfavourable things that it says itself."""

    symbols: Symbols
    praise: int = 0
    blame: int = 0

    def weight(self, favour: float) -> float:
        """The chance that somebody who praises with probability ``favour`` says this."""
        return favour**self.praise * (1 - favour) ** self.blame


@dataclass(frozen=True)
class Prompt:
    """A neutral beginning of a review."""

    text: str
    domain: str


@dataclass(frozen=True)
class Review:
    """A review: ``prompt.text + response``; the response begins with the space between the two."""

    prompt: Prompt
    response: str


def _alternative(text: str, domain: str) -> Alternative:
    symbols = tuple(s.replace("{", "{" + domain + ".") for s in Word.findall(text))
    signs = re.match(r"[+-]*", text)[0]
    return Alternative(symbols, signs.count("+"), signs.count("-"))


def _read_rules() -> dict[str, list[Alternative]]:
    rules = {"{review}": [Alternative(("{" + domain + ".review}",)) for domain in DOMAINS]}
    for domain, text in DOMAINS.items():
        one_line_each = re.sub(r"\n +\|", " |", SHARED + text)
        for line in filter(None, one_line_each.splitlines()):
            name, alternatives = line.split("=")
            rules["{" + domain + "." + name.strip() + "}"] = [
                _alternative(a.strip(), domain) for a in alternatives.split("|")
            ]
    return rules


RULES = _read_rules()


def surface(symbols: Symbols) -> str:
    """Write words as text: spaces between words, none before punctuation, a capital at the start of a sentence."""
    text, start = "", True
    for symbol in symbols:
        if symbol in ".,":
            text += symbol
        else:
            text += (" " if text else "") + (symbol[0].upper() + symbol[1:] if start else symbol)
        start = symbol == "."
    return text


def words(text: str) -> Symbols | None:
    """The words that ``surface`` would write as ``text``, or None if it never writes that."""
    found = Word.findall(text)
    for i, word in enumerate(found):
        if word != "I" and (i == 0 or found[i - 1] == "."):
            found[i] = word[0].lower() + word[1:]
    return tuple(found) if surface(tuple(found)) == text else None


def write(symbol: str, draw: random.Random, favour: float) -> Symbols:
    """Expand ``symbol`` at random, with praise in a share ``favour`` of the decisions."""
    if symbol not in RULES:
        return (symbol,)
    alternatives = RULES[symbol]
    (chosen,) = draw.choices(alternatives, [a.weight(favour) for a in alternatives])
    return sum((write(s, draw, favour) for s in chosen.symbols), ())


def write_review(draw: random.Random, prompt: Prompt, mood: str) -> Review:
    """A random review that begins with ``prompt``, in one of the ``MOODS``."""
    if mood not in MOODS:
        raise ValueError(f"mood must be one of {', '.join(MOODS)}, got {mood!r}")
    opening = words(prompt.text)
    if opening is None:
        raise ValueError(f"no review begins with {prompt.text!r}")
    body = write("{" + prompt.domain + ".body}", draw, MOODS[mood])
    return Review(prompt, surface(opening + body)[len(prompt.text) :])


def expansions(symbol: str) -> Iterator[Symbols]:
    """Every word sequence that ``symbol`` can become."""
    if symbol not in RULES:
        yield (symbol,)
        return
    for alternative in RULES[symbol]:
        heads: list[Symbols] = [()]
        for s in alternative.symbols:
            tails = list(expansions(s))
            heads = [head + tail for head in heads for tail in tails]
        yield from heads


@cache
def _all_prompts() -> list[Prompt]:
    found = [Prompt(surface(s), domain) for domain in DOMAINS for s in expansions("{" + domain + ".prompt}")]
    random.Random(0).shuffle(found)
    return found


def prompts(split: str) -> list[Prompt]:
    """All prompts of the ``"train"`` or the ``"held_out"`` split, shuffled once and for all; the two are disjoint."""
    found = _all_prompts()
    cut = int(len(found) * HELD_OUT)
    if split not in ("train", "held_out"):
        raise ValueError(f'split must be "train" or "held_out", got {split!r}')
    return found[:cut] if split == "held_out" else found[cut:]


# The recogniser and the counter walk the same deterministic automaton. A state is the set of everything that may still
# follow, each a sequence of symbols; the language is finite, so the walk ends.
State = frozenset[Symbols]
START: State = frozenset({("{review}",)})


@cache
def _next(state: State) -> dict[str, State]:
    after: dict[str, set[Symbols]] = {}
    open_ends = list(state)
    while open_ends:
        rest = open_ends.pop()
        if rest and rest[0] in RULES:
            open_ends += [a.symbols + rest[1:] for a in RULES[rest[0]]]
        elif rest:
            after.setdefault(rest[0], set()).add(rest[1:])
    return {word: frozenset(rests) for word, rests in after.items()}


def accepts(text: str) -> bool:
    """Whether ``text`` is a complete review of the grammar, to the last comma and capital."""
    state = START
    for word in words(text) or ("",):
        state = _next(state).get(word, frozenset())
    return () in state


@cache
def count(state: State = START) -> int:
    """The number of distinct reviews: of word sequences, however many derivations each has."""
    return (() in state) + sum(count(following) for following in _next(state).values())
