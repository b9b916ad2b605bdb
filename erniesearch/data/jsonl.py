"""JSON lines and their fields; every odd line is named by file and line."""

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unicodedata import category

from erniesearch.errors import UserError, nearest
from erniesearch.progress import PATIENCE, Meter


def read_jsonl(
    path: Path,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for every line that is not blank.

    Raises:
        UserError: for a missing file, bytes that are not UTF-8, or a line that is no JSON object.
    """
    try:
        handle = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    position, size = 0, os.fstat(handle.fileno()).st_size
    with handle, Meter(f"reading {path.name}", "bytes", size, patience=PATIENCE) as meter:
        for number, raw in enumerate(handle, 1):
            position += len(raw)
            if number % 4096 == 0:
                meter.reach(position)
            if raw.strip():
                yield number, parse_line(raw, path, number)


def parse_line(raw: bytes, path: Path, number: int) -> dict[str, Any]:
    """The JSON object on one line.

    Raises:
        UserError: naming file and line.
    """
    if number == 1:
        raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8: {error.reason}") from None
    except RecursionError:
        raise UserError(f"{path}:{number}: not valid JSON: nested too deeply") from None
    except ValueError as error:  # a syntax error, or a number of thousands of digits
        problem = getattr(error, "msg", str(error).split(";")[0])
        raise UserError(f"{path}:{number}: not valid JSON: {problem}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}:{number}: expected a JSON object, found {type(value).__name__}")
    return value


def text_field(
    record: dict[str, Any], key: str, path: Path, number: int, default: str | None = None
) -> str:
    """A field that must be text (``default`` where it is absent or null); ``_id`` may be a whole
    number.

    Raises:
        UserError: naming file and line.
    """
    value = record.get(key, default)
    if value is None and default is not None:
        return default
    if value is None:
        raise UserError(f"{path}:{number}: no key '{key}'{nearest(key, record)}")
    if key == "_id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{path}:{number}: '{key}' must be text, found {type(value).__name__}")
    if key == "_id" and (not value or any(c.isspace() or category(c) == "Cc" for c in value)):
        raise UserError(
            f"{path}:{number}: id {value!r} is empty or has white space or control characters: a"
            " TREC run cannot hold it"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{path}:{number}: '{key}' has half of a surrogate pair (\\ud800 to \\udfff), which no"
            " UTF-8 text can hold: remove or complete it"
        ) from None
    return value
