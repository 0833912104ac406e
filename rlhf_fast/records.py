"""Records from a file, a list or a ``datasets.Dataset``, each of which remembers its place for the errors."""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

TOO_MUCH = "a number of thousands of digits, or brackets in thousands of brackets"


class DataError(ValueError):
    """Broken training data; the message starts with the place: ``prefs.jsonl:17: "rejected" is missing``."""


class Record(dict[str, Any]):
    """The columns of one record; ``place`` says where it stands."""

    def __init__(self, columns: Mapping[str, Any], place: str) -> None:
        super().__init__(columns)
        self.place = place


def read_records(source: Any) -> list[Record]:
    """The records of a path, a list of dicts or a ``datasets.Dataset``.

    A file is ``.jsonl``, ``.json`` (a list), ``.csv`` or ``.parquet``, gzipped (``.gz`` after that) or not. A record of
    a file of lines knows its line, any other its number, from 1. Raises ``DataError`` naming the place of a
    broken record or that there is none, ``TypeError`` where ``source`` is nothing of the kind.
    """
    if isinstance(source, (str, Path)):
        name, rows = str(source), _file(source)
    elif isinstance(source, Mapping):  # a datasets.DatasetDict too
        raise TypeError(f"data must be a path, a list of dicts or one split of a dataset, got {type(source).__name__}")
    elif isinstance(source, Iterable):
        name, rows = "data", _numbered(source, "")
    else:
        raise TypeError(f"data must be a path, a list of dicts or a datasets.Dataset, got {type(source).__name__}")
    records = list(rows)
    if not records:
        raise DataError(f"{name}: no records")
    return records


def kind(value: Any) -> str:
    """What ``value`` is, in the words of an error."""
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "a dict"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def _file(source: str | Path) -> Iterator[Record]:
    path = Path(source).expanduser()
    zipped = path.suffix.lower() == ".gz"
    suffix = Path(path.stem if zipped else path.name).suffix.lower()
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if not path.exists():
        raise DataError(f"{source}: there is no such file")
    if path.is_dir():
        raise DataError(f"{source}: it is a folder, not a file")
    if suffix not in readers:
        raise DataError(f"{source}: the name must end in {', '.join(readers)}, or in .gz after one of these")
    try:
        content = path.read_bytes()
        if zipped:
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{source}: not a whole gzip file: {error}") from None
    return readers[suffix](content.removeprefix(b"\xef\xbb\xbf"), str(source))


def _jsonl(content: bytes, name: str) -> Iterator[Record]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield _record(_parse(line, f"{name}:{number}"), f"{name}:{number}")


def _json(content: bytes, name: str) -> Iterator[Record]:
    if not content.strip():
        return
    try:
        parsed = json.loads(content.decode())
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object per line under another name, as in many public data sets
            yield from _jsonl(content, name)
            return
        raise DataError(f"{name}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError:
        raise DataError(_not_utf8(content, name)) from None
    except (ValueError, RecursionError):
        raise DataError(f"{name}: {TOO_MUCH}") from None
    if not isinstance(parsed, list):
        raise DataError(f"{name}: it must hold a list of records, got {kind(parsed)}")
    yield from _numbered(parsed, f"{name}: ")


def _csv(content: bytes, name: str) -> Iterator[Record]:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise DataError(_not_utf8(content, name)) from None
    limit = csv.field_size_limit(sys.maxsize)  # a long text is no error
    try:
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(rows, [])
        twice = next((column for column in header if header.count(column) > 1), None)
        if twice is not None:
            raise DataError(f'{name}:1: the column "{twice}" stands there twice')
        line = rows.line_num + 1
        for row in rows:
            place, line = f"{name}:{line}", rows.line_num + 1
            if row and len(row) != len(header):
                raise DataError(f"{place}: {len(row)} fields where the header has {len(header)}")
            if row:
                yield Record(dict(zip(header, row, strict=True)), place)
    except csv.Error as error:
        raise DataError(f"{name}:{rows.line_num}: not valid CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(content: bytes, name: str) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise DataError(f"{name}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    except ArrowException as error:
        raise DataError(f"{name}: not valid parquet: {str(error).splitlines()[0]}") from None
    return _numbered(rows, f"{name}: ")


def _numbered(rows: Iterable[Any], before: str) -> Iterator[Record]:
    return (_record(row, f"{before}record {number}") for number, row in enumerate(rows, 1))


def _record(value: Any, place: str) -> Record:
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: a record must be a JSON object, got {kind(value)}")
    return Record(value, place)


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not valid UTF-8 at byte {error.start + 1}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{place}: {TOO_MUCH}") from None


def _not_utf8(content: bytes, name: str) -> str:
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return f"{name}:{number}: not valid UTF-8 at byte {error.start + 1}"
    return f"{name}: not valid UTF-8"
