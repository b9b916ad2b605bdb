"""What every reader yields, and what both sides do with lines that are odd."""

import codecs
import gzip
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from math import isfinite
from pathlib import Path
from typing import IO, Any, TypeVar

import ijson

from erniesearch.config.options import ImportOptions
from erniesearch.errors import UserError, nearest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage of the corpus; ``at`` is where it was read, as in all records."""

    pid: str
    text: str
    at: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Query:
    """A query; ``answers`` are kept under ``metadata.answers`` in queries.jsonl."""

    qid: str
    text: str
    at: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    """A line of ``qrels/SPLIT.tsv``."""

    split: str
    qid: str
    pid: str
    at: str
    grade: int = 1


@dataclass(frozen=True, slots=True)
class HardNegatives:
    """Passages that the source calls negatives of the query, hardest first."""

    qid: str
    pids: tuple[str, ...]
    at: str


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """A teacher's scores of some of the query's passages.

    ``relative_to`` is the passage that the scores are measured from where the source has only
    differences of scores; those of two such passages do not compare.
    """

    qid: str
    pids: tuple[str, ...]
    scores: tuple[float, ...]
    at: str
    relative_to: str = ""


Record = Passage | Query | Judgement | HardNegatives | TeacherScores


@dataclass
class BadLines:
    """Odd lines: each beyond ``limit`` ends the import, those within it are left out and told.

    ``notes`` count what is no mistake but worth knowing.
    """

    limit: int = 0
    found: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, error: UserError) -> None:
        """Count an odd line.

        Raises:
            UserError: the same, with the remedy, when there are more than ``limit``.
        """
        self.found.append(str(error))
        if len(self.found) > self.limit:
            counted = f" ({len(self.found)} odd lines)" if self.limit else ""
            raise UserError(f"{error}{counted}; repair it, or leave odd lines out: --skip_bad N")

    def note(self, kind: str, at: str) -> None:
        """Count something worth knowing, with its first few places."""
        self.notes[kind] += 1
        known = self.places.setdefault(kind, [])
        if len(known) < 5:
            known.append(at)

    def summary(self) -> dict[str, Any]:
        """Counts by kind with the first few places, for ``import.json``."""
        kinds: dict[str, list[str]] = {}
        for message in self.found:
            kind = re.sub(r"^.*?: ((item|row|article) \d+[^:]*: )?", "", message)
            kinds.setdefault(re.sub(r"'[^']*'", "'…'", kind), []).append(message)
        return {
            "left_out": {kind: {"count": len(all_), "first": all_[:5]}
                         for kind, all_ in kinds.items()},
            "notes": {kind: {"count": count, "first": self.places[kind]}
                      for kind, count in self.notes.items()},
        }  # fmt: skip


Reader = Callable[[list[Path], ImportOptions, BadLines], Iterator[Record]]


def read_each(
    items: Iterable[T], parse: Callable[[T], Iterable[Record]], bad: BadLines
) -> Iterator[Record]:
    """The records of every item; an odd item gives none of its records."""
    for item in items:
        try:
            records = list(parse(item))
        except UserError as error:
            bad.skip(error)
        else:
            yield from records


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a source, without its line end."""

    path: Path
    number: int
    raw: bytes

    @property
    def at(self) -> str:
        """``file:line``."""
        return f"{self.path}:{self.number}"

    def columns(self, *counts: int) -> list[str]:
        """Tab-separated columns, of which there must be one of ``counts``.

        Raises:
            UserError: for another number, or bytes that are not UTF-8.
        """
        try:
            columns = self.raw.decode("utf-8").split("\t")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.at}: not UTF-8: {error.reason}") from None
        if len(columns) not in counts:
            expected = " or ".join(map(str, counts))
            raise UserError(f"{self.at}: expected {expected} columns, found {len(columns)}")
        return columns


def read_lines(path: Path) -> Iterator[Line]:
    """Lines that are not blank, of a file that may be gzipped.

    Raises:
        UserError: for a file that is missing or cannot be read.
    """
    with open_source(path) as handle:
        try:
            for number, raw in enumerate(handle, 1):
                if raw.strip():
                    yield Line(path, number, raw.rstrip(b"\r\n"))
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: cannot be read to its end: {error}") from None


def open_source(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked if its name ends in .gz."""
    try:
        return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_json(path: Path, prefix: str, expected: str) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, value) for the values under an ijson ``prefix``, one at a time.

    Raises:
        UserError: for a file that is no JSON, or holds no such value: ``expected`` describes them.
    """
    with open_source(path) as file:
        number = 0
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        try:
            for number, value in enumerate(ijson.items(file, prefix), 1):
                yield number, value
        except (ijson.JSONError, UnicodeDecodeError) as error:
            problem = " ".join(str(error).split())
            raise UserError(f"{path}: not valid JSON after item {number}: {problem}") from None
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: cannot be read to its end: {error}") from None
        if not number:
            raise UserError(f"{path}: expected {expected}, found none")


def listed(sources: list[Path]) -> list[Path]:
    """The files named, and those in the folders named."""
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            files += sorted(p for p in source.iterdir() if p.is_file() and p.name[0] != ".")
        else:
            open_source(source).close()
            files.append(source)
    return files


def stem(path: Path) -> str:
    """The name without .gz and without its last suffix."""
    return Path(path.name.removesuffix(".gz")).stem


def split_in(path: Path, default: str) -> str:
    """train, dev or test where the file's name says so, else ``default``."""
    words = re.split(r"[^a-z]+", path.name.lower())
    for split in ("train", "dev", "test"):
        if split in words:
            return split
    return "dev" if {"valid", "validation"} & set(words) else default


def require(record: dict[str, Any], key: str, kind: type, at: str) -> Any:
    """A field of this type.

    Raises:
        UserError: naming the place, the key and what was found.
    """
    if key not in record:
        raise UserError(f"{at}: no key '{key}'{nearest(key, record)}")
    value = record[key]
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind):
        names = {"str": "text", "list": "a list", "dict": "an object"}
        raise UserError(
            f"{at}: '{key}' must be {names[kind.__name__]}, found {type(value).__name__}"
        )
    return value


def texts_in(record: dict[str, Any], key: str, at: str) -> list[str]:
    """A field that is a list of texts (numbers are taken as ids); an absent one is empty."""
    if record.get(key) is None:
        return []
    return [require({key: value}, key, str, at) for value in require(record, key, list, at)]


def numbers(value: Any, key: str, expected: int, at: str) -> list[float]:
    """A field that is a list of ``expected`` finite numbers, the scores of as many passages.

    Raises:
        UserError: naming the place, the key and what was found.
    """
    if not isinstance(value, list):
        raise UserError(f"{at}: '{key}' must be a list of scores, found {type(value).__name__}")
    if len(value) != expected:
        raise UserError(f"{at}: '{key}' has {len(value)} scores for {expected} passages")
    return [number(one, key, at) for one in value]


def number(value: Any, key: str, at: str) -> float:
    """A score.

    Raises:
        UserError: for what is no finite number.
    """
    if not isinstance(value, int | float | Decimal) or isinstance(value, bool):
        raise UserError(f"{at}: '{key}' must hold numbers, found {type(value).__name__}")
    if not isfinite(value):
        raise UserError(f"{at}: '{key}' holds {value}, which is no score")
    return float(value)


def parallel_scores(
    record: dict[str, Any], qid: str, lists: dict[str, list[str]], at: str
) -> Iterator[TeacherScores]:
    """The scores that a record has in lists parallel to its passages; none if it has no such list.

    Args:
        lists: by key of the scores, the ids of the passages that they go with.

    Raises:
        UserError: for one list without the other, another number of scores, or what is no number.
    """
    given = [key for key in lists if record.get(key) is not None]
    if not given:
        return
    pids: list[str] = []
    scores: list[float] = []
    for key, own in lists.items():
        if key not in given and own:
            raise UserError(f"{at}: '{given[0]}' without '{key}': a teacher scores both or none")
        pids += own
        scores += numbers(record.get(key) or [], key, len(own), at)
    yield TeacherScores(qid, tuple(pids), tuple(scores), at)


def content_id(*texts: str) -> str:
    """An id for what has none: a hash of its text, so that equal texts are one."""
    joined = "\0".join(texts).encode("utf-8", "surrogatepass")
    return hashlib.sha256(joined).hexdigest()[:24]
