"""The settings of a command: a flag for each source and each config field, and a YAML file of the same names."""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from rlhf_fast.trainers.options import field_types

#: flag → (its sentence, its default; ``...`` if it must be given).
Sources = dict[str, tuple[str, Any]]


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage as well."""
        raise ValueError(message.removeprefix("argument "))


def settings(name: str, what: str, accepted: Sources, config: type, argv: list[str]) -> tuple[dict[str, Any], Any]:
    """The sources and the config of a command line; a flag wins over the file of ``--config``."""
    parsers = {field: value_parser(*kind) for field, kind in field_types(config).items()}
    parser = make_parser(name, what, accepted, config, parsers)
    flags, unknown = parser.parse_known_args(joined(argv))
    if unknown:
        flag = unknown[0].split("=")[0]
        known = [f"--{field}" for field in (*accepted, *parsers)]
        if not flag.startswith("-"):
            raise ValueError(f"unknown argument {flag!r}: every value follows its flag")
        raise ValueError(f"unknown flag {flag}{suggestion(flag, known)}; rlhf-fast {name} --help lists them")
    given = vars(flags)
    path = given.pop("config", None)
    stored = read_config(path, [*accepted, *parsers], parsers) if path is not None else {}
    values = stored | given
    sources = {}
    for source, (_, default) in accepted.items():
        value = sources[source] = values.pop(source, default)
        if value is ... or (value is None and default is ...):
            raise ValueError(f"{name} needs --{source}")
        if value == "":
            raise ValueError(f"--{source} is empty")
        if value is not None and not isinstance(value, bool if isinstance(default, bool) else str):
            kind = "true or false" if isinstance(default, bool) else "a string"
            raise ValueError(f"{path}: {source} must be {kind}, got {value!r}")
    try:
        return sources, config(**values)
    except ValueError as error:
        field = str(error).split(" ")[0].split(".")[-1]
        raise ValueError(f"{path}: {error}" if field in stored and field not in given else str(error)) from error


def joined(argv: list[str]) -> list[str]:
    """``argv`` with ``--flag -value`` as ``--flag=-value``: argparse takes ``-1e-3`` and ``-hello`` for flags."""
    words: list[str] = []
    for word in argv:
        if word.startswith("-") and not word.startswith("--") and words and re.fullmatch(r"--\w+", words[-1]):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def make_parser(
    name: str, what: str, accepted: Sources, config: type, parsers: dict[str, Callable[[str], Any]]
) -> Parser:
    """A flag for each source and each field of ``config``."""
    parser = Parser(prog=f"rlhf-fast {name}", description=what, allow_abbrev=False)
    parser.usage = f"rlhf-fast {name} [--config file.yaml] [--flag value ...]"
    keep = {"default": argparse.SUPPRESS}
    parser.add_argument("--config", metavar="FILE", help="a YAML file of any of these flags; flags win over it", **keep)
    for source, (words, default) in accepted.items():
        ending = " (required)" if default is ... else "" if default is None else f" [{default}]".lower()
        switch = {"type": value_parser(bool, False), "metavar": "BOOL"}
        parser.add_argument(
            f"--{source}", help=words + ending, **(switch if isinstance(default, bool) else {"metavar": "X"}), **keep
        )
    for field in dataclasses.fields(config):
        choices = field.metadata.get("choices")
        metavar = "|".join(map(str, choices)) if choices else parsers[field.name].__name__.upper()
        default = field.default if isinstance(field.default, str) else str(field.default).lower()  # as it is typed
        shown = f"{field.metadata.get('sentence', '')} [{default}]".replace("%", "%%")
        parser.add_argument(f"--{field.name}", type=parsers[field.name], metavar=metavar, help=shown, **keep)
    return parser


def value_parser(kind: type, optional: bool) -> Callable[[str], Any]:
    """Turns the text of a flag into ``kind``, or ``none`` into None where that is allowed."""

    def parse(text: str) -> Any:
        if optional and text.lower() in ("none", "null"):
            return None
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        return kind(text)

    def checked(text: str) -> Any:
        try:
            return parse(text)
        except (ValueError, KeyError) as error:
            raise argparse.ArgumentTypeError(f"{words[kind]}, got {text!r}") from error

    words = {bool: "must be true or false", int: "must be a whole number", float: "must be a number"}
    checked.__name__ = kind.__name__
    return checked


def read_config(path: str, known: list[str], parsers: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    """The settings in the YAML file ``path``; raises ``ValueError`` that names the file and the key."""
    import yaml

    try:
        stored = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid UTF-8 at byte {error.start + 1}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: {getattr(error, 'problem', None) or 'not YAML'}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path}: must hold lines of key: value")
    for key, value in stored.items():
        if key not in known:
            raise ValueError(f'{path}: unknown key "{key}"{suggestion(str(key), known, quote=True)}')
        if isinstance(value, str) and key in parsers:  # YAML 1.1 reads 1e-5 as a string
            try:
                stored[key] = parsers[key](value)
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{path}: {key} {error}") from error
    return stored


def suggestion(name: str, known: Iterable[str], *, quote: bool = False) -> str:
    """The known name that ``name`` was perhaps meant to be, in brackets."""
    near = difflib.get_close_matches(name, list(known), n=1)
    mark = '"' if quote else ""
    return f" (did you mean {mark}{near[0]}{mark}?)" if near else ""
