"""Columns to text: what a record says as prompt and answers, be they strings or conversations."""

import json
import re
from collections.abc import Callable
from typing import Any

from rlhf_fast.records import DataError, Record, kind

TURN = "\n\nAssistant:"
#: What other libraries call a column.
ELSEWHERE = {"response": "completion"}
SURROGATE = re.compile("[\ud800-\udfff]")


def text(record: Record, name: str, *, empty: bool = False) -> str:
    """The string in column ``name``. Raises ``DataError`` if there is none, or if it is empty, unless ``empty``."""
    value = record.get(name)
    if value is None:
        hint = f': rename "{ELSEWHERE[name]}"' if ELSEWHERE.get(name) in record else ""
        raise DataError(f'{record.place}: "{name}" is missing{hint}')
    if not isinstance(value, str):
        raise DataError(f'{record.place}: "{name}" must be a string, got {kind(value)}')
    if not empty and not value.strip():
        raise DataError(f'{record.place}: "{name}" is empty')
    if not value.isascii() and SURROGATE.search(value):
        raise DataError(f'{record.place}: "{name}" holds half of a surrogate pair, which is no character')
    return value


def prompt_text(record: Record, tokenizer: Any) -> str:
    """The column ``prompt``, rendered up to where the assistant answers if it is a conversation."""
    if isinstance(record.get("prompt"), list):
        return render(record, tokenizer, messages(record, "prompt"), answer=True)
    return text(record, "prompt", empty=True)


def answer_text(record: Record, name: str, prompt: str, tokenizer: Any) -> str:
    """The answer in column ``name``, which follows ``prompt``, the text of the column ``prompt``."""
    if isinstance(record["prompt"], str):
        if isinstance(record.get(name), list):
            raise DataError(f'{record.place}: "prompt" is a string and "{name}" a list: give both in one form')
        return text(record, name)
    if isinstance(record.get(name), str):
        answer = [{"role": "assistant", "content": text(record, name)}]
    else:
        answer = messages(record, name)
    if not any(message.get("content") for message in answer):
        raise DataError(f'{record.place}: "{name}" is empty')
    whole = render(record, tokenizer, [*record["prompt"], *answer])
    if not whole.startswith(prompt):
        raise DataError(f'{record.place}: the chat template does not begin "{name}" with the prompt: give both as text')
    return whole[len(prompt) :]


def turns(record: Record, tokenizer: Any) -> list[tuple[str, bool]]:
    """The column ``messages`` as pieces of text up to the last answer, True with those that the assistant says.

    An answer is what the chat template adds for it: the conversations that end before and after it are compared. It
    ends with the end token, if the template writes one: what follows that is not said.
    """
    said = messages(record, "messages")
    whole, done, pieces = render(record, tokenizer, said), 0, []
    for i, message in enumerate(said):
        if message["role"] != "assistant":
            continue
        opened = render(record, tokenizer, said[:i], answer=True) if i else ""
        closed = whole if i == len(said) - 1 else render(record, tokenizer, said[: i + 1])
        if not whole.startswith(closed) or not closed.startswith(opened) or closed == opened:
            raise DataError(
                f"{record.place}: the chat template writes turn {i + 1} in another way once more follow, so that it "
                'cannot be told apart: give "prompt" and "response" instead'
            )
        turn, end = whole[len(opened) : len(closed)], tokenizer.eos_token
        turn = turn[: turn.rindex(end) + len(end)] if end in turn else turn
        pieces += [(whole[done : len(opened)], False), (turn, True)]
        done = len(opened) + len(turn)
    if not pieces:
        raise DataError(f'{record.place}: "messages" has no turn of the assistant')
    return pieces


def split_pair(record: Record) -> Record:
    """``record`` with a ``prompt`` taken from what ``chosen`` and ``rejected`` begin with.

    Of two conversations that is the messages they share. Of two texts it ends with the last ``"\\n\\nAssistant:"``
    that they share (Anthropic's HH format), or, if they share none, with the last word before those that differ: there
    no token of a prompt can reach into its answer.
    """
    conversations = isinstance(record.get("chosen"), list) or isinstance(record.get("rejected"), list)
    read: Callable[[Record, str], Any] = messages if conversations else text
    a, b = read(record, "chosen"), read(record, "rejected")
    if a == b:
        raise DataError(f'{record.place}: "chosen" and "rejected" are the same')
    shared = _alike(a, b)
    if conversations:
        while shared and (shared in (len(a), len(b)) or a[shared - 1]["role"] == "assistant"):
            shared -= 1
    else:
        turn = a.rfind(TURN, 0, shared)
        shared = _last_word(a[:shared], a, b) if turn < 0 else turn + len(TURN)
    if not shared:
        raise DataError(f'{record.place}: "prompt" is missing, and "chosen" and "rejected" begin with different words')
    return Record(record | {"prompt": a[:shared], "chosen": a[shared:], "rejected": b[shared:]}, record.place)


def entries(record: Record, name: str) -> list[Any]:
    """The list in column ``name``, which a CSV file holds as JSON text; at least one entry."""
    value = record.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f'{record.place}: "{name}" must be a list, got a text that is not one in JSON') from None
    if value is None:
        raise DataError(f'{record.place}: "{name}" is missing')
    if not isinstance(value, list):
        raise DataError(f'{record.place}: "{name}" must be a list, got {kind(value)}')
    if not value:
        raise DataError(f'{record.place}: "{name}" is empty')
    return value


def messages(record: Record, name: str) -> list[dict[str, Any]]:
    """The conversation in column ``name``: ``[{"role": ..., "content": ...}, ...]``."""
    value = record.get(name)
    if value is None:
        raise DataError(f'{record.place}: "{name}" is missing')
    if not isinstance(value, list):
        raise DataError(f'{record.place}: "{name}" must be a list of messages, got {kind(value)}')
    if not value:
        raise DataError(f'{record.place}: "{name}" is empty')
    for i, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'{record.place}: message {i} of "{name}" must have a "role" and a "content"')
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise DataError(f'{record.place}: the "content" of message {i} of "{name}" must be a string')
    return value


def render(record: Record, tokenizer: Any, said: list[dict[str, Any]], *, answer: bool = False) -> str:
    """The text of a conversation under the tokenizer's chat template; with ``answer``, up to where an answer begins."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{record.place}: a conversation needs a chat template and the tokenizer has none: set its chat_template, "
            "or give the prompt and the answer as text"
        )
    try:
        return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=answer))
    except TemplateError as error:
        raise DataError(f"{record.place}: the chat template refuses the conversation: {error}") from None


def _alike(a: str | list, b: str | list) -> int:
    """How many characters or messages ``a`` and ``b`` begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _last_word(common: str, a: str, b: str) -> int:
    """The end of the last whole word of ``common``, with which ``a`` and ``b`` begin."""
    if all(rest[:1].isspace() for rest in (a[len(common) :], b[len(common) :])):
        return len(common.rstrip())
    space = re.search(r"\s+\S*$", common)
    return space.start() if space else 0
