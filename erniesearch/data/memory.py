"""Collections from what a program holds: ``datasets.Dataset`` objects, lists, dictionaries.

They are written once, in BEIR layout, to a folder of the cache that their content names. Every
stage then finds them as it finds a data set on disk, on every rank and in every process: tokens,
negatives, mining, validation, evaluation, and a run that continues. Texts are streamed; a
``Dataset`` is read where Arrow has mapped it.
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from erniesearch.config.keys import RunConfig
from erniesearch.config.options import ImportOptions
from erniesearch.data.collection import NO_DATA, RetrievalData, load_beir
from erniesearch.data.corpus.cache import cache_root, cached, key_of
from erniesearch.data.corpus.texts import ArrowColumn
from erniesearch.data.importers.beir_writer import BeirWriter
from erniesearch.data.importers.pairs import group
from erniesearch.data.importers.records import (
    BadLines,
    HardNegatives,
    Judgement,
    Passage,
    Query,
    Record,
    content_id,
    require,
)
from erniesearch.data.importers.tables import LABELS, row_scores
from erniesearch.errors import UserError
from erniesearch.files import written_aside

Table = Any
"""A ``datasets.Dataset`` (or another iterable of rows that can be read twice) or a list of rows;
a row maps column to value. For ids also a mapping."""
VERSION = 1
"""Of what is written for a given content; a change makes old folders unused."""
BLOCK = 8192
PASSAGE_IDS = ("_id", "id", "document_id", "docid", "corpus-id", "corpus_id", "pid")
QUERY_IDS = ("_id", "id", "query_id", "query-id", "qid")
JUDGED_QUERY, JUDGED_PASSAGE = QUERY_IDS[2:], PASSAGE_IDS[2:]
GRADES = ("score", "relevance", "grade")
QUERY, POSITIVE = ("query", "anchor", "question"), ("positive", "answer")
TEXT = ("text",)


@dataclass(frozen=True)
class Collection(RetrievalData):
    """A collection that lies in a folder in BEIR layout; ``qrels`` are those of ``split``.

    What is trained on is read from ``root``: to train on something else, make another collection.
    """

    root: Path
    split: str

    @classmethod
    def from_beir(cls, root: str | Path, split: str = "train") -> "Collection":
        """A folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv.

        Raises:
            UserError: naming the file, the line and the remedy.
        """
        data = load_beir(root, split)
        return cls(data.pids, data.passages, data.queries, data.qrels, Path(root), split)

    @classmethod
    def from_rows(
        cls,
        train: Table,
        *,
        query: str | None = None,
        positive: str | None = None,
        negative: str = "negative",
        **splits: Table,
    ) -> "Collection":
        """Rows of a query, its positive and its negatives, as sentence-transformers has them.

        Equal texts are one passage, or one query whose positives and negatives are those of all its
        rows. The negatives are what ``negatives: given`` trains on, and the numbers of a column
        ``label``, ``labels``, ``score`` or ``scores`` what ``teacher_scores: stored`` distils from:
        a score of the positive and of each negative, or a margin of each negative.

        Args:
            train: a ``Dataset`` or a list of dictionaries.
            query: column of the queries; by default ``query``, ``anchor`` or ``question``.
            positive: column of the relevant passages, each a text or a list of texts; by default
                ``positive`` or ``answer``.
            negative: columns of the negatives: this, NAME_1, NAME_2, …, and NAMEs.
            splits: further splits of the same form, such as ``dev`` and ``test``.

        Raises:
            UserError: naming column and row, also for a column that is none of these.
        """
        tables = {"train": train} | splits
        names = {"query": query, "positive": positive, "negative": negative}

        def records() -> Iterator[Record]:
            for split, table in tables.items():
                if isinstance(table, Mapping):
                    raise UserError(
                        f"{split}: expected rows, found {type(table).__name__}; of a dictionary of"
                        " columns datasets.Dataset.from_dict makes rows"
                    )
                parse = _Grouped(split, query, positive, negative)
                for at, row in _rows(table, split):
                    yield from parse(row, at)

        return cls.from_beir(_stored(tables, names, records))

    @classmethod
    def from_corpus(
        cls,
        corpus: Table,
        queries: Table,
        qrels: Table,
        *,
        negatives: Mapping[str, Iterable[str]] | None = None,
        **splits: Table,
    ) -> "Collection":
        """Passages, queries and judgements, each with ids, as BEIR and MTEB have them.

        Args:
            corpus: rows with an id (``_id``, ``id``, ``document_id``, ``docid``, ``corpus-id`` or
                ``pid``), ``text`` and perhaps ``title``, or a mapping of id to text or to such a
                row; other columns are not read.
            queries: likewise; the id may also be ``query_id``, ``query-id`` or ``qid``.
            qrels: those of the split ``train``: rows with the ids of a query and a passage, and
                perhaps a whole ``score`` (1 by default; above 0 is relevant), or a mapping of query
                id to {passage id: score} or to the ids of relevant passages.
            negatives: hard negatives by query id, hardest first, for ``negatives: given``.
            splits: qrels of further splits, such as ``dev`` and ``test``.

        Raises:
            UserError: naming column and row.
        """
        judged = {"train": qrels} | splits
        tables = {"corpus": corpus, "queries": queries} | {
            f"qrels {split}": table for split, table in judged.items()
        }
        tables |= {"negatives": negatives} if negatives else {}

        def records() -> Iterator[Record]:
            for at, row in _rows(corpus, "corpus"):
                text, title = _text(row, "text", at), row.get("title")
                yield Passage(_id(row, PASSAGE_IDS, at), text, at,
                              "" if title is None else _text(row, "title", at))  # fmt: skip
            for at, row in _rows(queries, "queries"):
                yield Query(_id(row, QUERY_IDS, at), _text(row, "text", at), at)
            for split, table in judged.items():
                yield from _judgements(table, split)
            for qid, pids in (negatives or {}).items():
                yield HardNegatives(str(qid), tuple(map(str, pids)), f"negatives[{qid!r}]")

        return cls.from_beir(_stored(tables, {}, records))

    def save(self, folder: str | Path) -> Path:
        """A copy of the folder, to be kept where the cache is not; returns it.

        Raises:
            UserError: if ``folder`` is there already or cannot be written.
        """
        folder = Path(folder)
        if folder.exists():
            raise UserError(f"{folder}: is there already")
        try:
            with written_aside(folder) as aside:
                shutil.copytree(self.root, aside)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
        return folder


def with_data(config: RunConfig, data: RetrievalData | None) -> RunConfig:
    """The same configuration on this collection; lists in memory are written to the cache first.

    Raises:
        UserError: if there is neither ``data`` nor ``data.path``.
    """
    if data is None:
        if not config.data.path:
            raise UserError(NO_DATA)
        return config
    if not isinstance(data, Collection):
        if isinstance(data.pids, ArrowColumn):
            raise UserError("data that lies in a folder is given as Collection.from_beir(folder)")
        corpus = dict(zip(data.pids, data.passages, strict=True))
        data = Collection.from_corpus(corpus, data.queries, data.qrels)
    section = replace(config.data, path=str(data.root), train_split=data.split)
    return replace(config, data=section)


def _stored(
    tables: dict[str, Table], names: dict[str, Any], records: Callable[[], Iterator[Record]]
) -> Path:
    """The folder of the cache that holds these tables, written now or by an earlier call."""
    key = key_of(VERSION, names, {name: _digest(table, name) for name, table in tables.items()})

    def build(aside: Path) -> None:
        writer = BeirWriter(aside, BadLines(), sys.maxsize)
        try:
            for record in records():
                writer.write(record)
            writer.finish({"format": "memory", "sources": list(tables)})
        finally:
            writer.close()

    # The folder's own name is what tables and cards call the data set.
    return cached(cache_root() / "collections" / key / "in-memory", build, lambda folder: folder)


def _digest(table: Table, name: str) -> str:
    """Hash of a table's content: of the Arrow buffers of a ``Dataset``, of any other's rows."""
    digest = hashlib.blake2b()
    if _is_dataset(table, name) and table.format["type"] != "custom":
        for part in table.with_format("arrow").iter(BLOCK):
            digest.update(str(part.schema.remove_metadata()).encode())
            for batch in part.combine_chunks().to_batches():
                digest.update(batch.serialize())
    else:
        for _, row in _items(table, name):
            digest.update(json.dumps(row, default=_plain).encode())
            digest.update(b"\n")
    return digest.hexdigest()


def _plain(value: object) -> object:
    """What JSON can hold, the same in every process."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _is_dataset(table: Table, name: str) -> bool:
    import datasets  # seconds, where a command needs none

    if isinstance(table, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise UserError(f"{name}: has several splits ({', '.join(table)}): give one of them")
    return isinstance(table, datasets.Dataset)


def _items(table: Table, name: str) -> Iterator[tuple[str, Any]]:
    """Every row, or item of a mapping, with its place."""
    if _is_dataset(table, name):
        # A transform that the user has set is part of what the rows are; a tensor format is not.
        plain = table if table.format["type"] == "custom" else table.with_format(None)
        number = 0
        for part in plain.iter(BLOCK):
            for values in zip(*part.values(), strict=True):
                yield f"{name}[{number}]", dict(zip(part, values, strict=True))
                number += 1
    elif isinstance(table, Mapping):
        for key, value in table.items():
            yield f"{name}[{key!r}]", (str(key), value)
    elif not isinstance(table, Iterable) or isinstance(table, str) or iter(table) is table:
        raise UserError(
            f"{name}: expected a datasets.Dataset or a list of rows, which can be read twice; found"
            f" {type(table).__name__}"
        )
    else:
        for number, row in enumerate(table):
            yield f"{name}[{number}]", row


def _rows(table: Table, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row with its place; a mapping's has its key as ``_id``."""
    for at, row in _items(table, name):
        if isinstance(table, Mapping):
            key, value = row
            row = (
                {**value, "_id": key} if isinstance(value, Mapping) else {"_id": key, "text": value}
            )
        if not isinstance(row, Mapping):
            raise UserError(
                f"{at}: expected a mapping of column to value, found {type(row).__name__}"
            )
        yield at, dict(row)


def _judgements(table: Table, split: str) -> Iterator[Record]:
    name = f"qrels {split}"
    if not isinstance(table, Mapping):
        for at, row in _rows(table, name):
            qid, pid = _id(row, JUDGED_QUERY, at), _id(row, JUDGED_PASSAGE, at)
            key = _column(row, GRADES)
            yield Judgement(split, qid, pid, at, _grade(row[key], at) if key else 1)
        return
    for at, (qid, found) in _items(table, name):
        if isinstance(found, str) or not isinstance(found, Iterable):
            raise UserError(
                f"{at}: expected passage ids, or a mapping of passage id to score, found"
                f" {type(found).__name__}"
            )
        grades = found.items() if isinstance(found, Mapping) else ((pid, 1) for pid in found)
        for pid, grade in sorted(grades) if isinstance(found, set | frozenset) else grades:
            yield Judgement(split, qid, str(pid), at, _grade(grade, at))


def _grade(value: Any, at: str) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not float(value).is_integer()
    ):
        raise UserError(f"{at}: score {value!r} is not a whole number")
    return int(value)


def _column(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in row), None)


def _id(row: dict[str, Any], names: tuple[str, ...], at: str) -> str:
    key = _column(row, names)
    if key is None:
        raise UserError(
            f"{at}: no column of ids ({', '.join(names)}); columns: {', '.join(row)}: rename one"
        )
    return str(require(row, key, str, at))


def _text(row: dict[str, Any], column: str, at: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        problem = f"'{column}' must be text, found {type(value).__name__}"
        if column not in row:
            problem = f"no column '{column}'; columns: {', '.join(row)}: rename one"
        raise UserError(f"{at}: {problem}")
    return value


class _Grouped:
    """Rows of query, positive and negatives to records."""

    def __init__(self, split: str, query: str | None, positive: str | None, negative: str) -> None:
        self.split = split
        self.wanted = {"query": (query,) if query else QUERY,
                       "positive": (positive,) if positive else POSITIVE}  # fmt: skip
        self.pattern = re.compile(re.escape(negative) + r"(s|_\d+)?")
        self.known: tuple[str, ...] = ()

    def __call__(self, row: dict[str, Any], at: str) -> Iterator[Record]:
        """The records of one row."""
        if tuple(row) != self.known:
            self.query, self.positive = (self._find(row, what, at) for what in self.wanted)
            self.negatives = self._others(row, at)
            self.known = tuple(row)
        query, positives = _text(row, self.query, at), _texts(row, self.positive, at)
        if not positives:
            raise UserError(f"{at}: column '{self.positive}' is empty")
        negatives = [text for name in self.negatives if row[name] is not None
                     for text in _texts(row, name, at)]  # fmt: skip
        yield from group(query, positives, negatives, self.split, at)
        if negatives:
            qid, options = content_id(query), ImportOptions()
            right, wrong = ([*map(content_id, texts)] for texts in (positives, negatives))
            yield from row_scores(row, options, qid, right, wrong, at, BadLines())

    def _find(self, row: dict[str, Any], what: str, at: str) -> str:
        found = _column(row, self.wanted[what])
        if found is None:
            names = " or ".join(f"'{name}'" for name in self.wanted[what])
            raise UserError(
                f"{at}: no column {names}; columns: {', '.join(row)}; name it: {what}='…'"
            )
        return found

    def _others(self, row: dict[str, Any], at: str) -> list[str]:
        """The columns of negatives, which must be all that are left."""
        left = [name for name in row if name not in (self.query, self.positive)]
        found = [name for name in left if self.pattern.fullmatch(name)]
        known = {*found, _column(row, LABELS)} if found else set()  # a pair's label says no more
        if odd := [name for name in left if name not in known]:
            raise UserError(
                f"{at}: column '{odd[0]}' is neither query, positive nor negatives: remove it"
                f" (remove_columns), or name the negatives: negative='{odd[0]}'"
            )
        return found


def _texts(row: dict[str, Any], column: str, at: str) -> list[str]:
    """A cell's texts: it holds one, or a list of them."""
    value = row[column]
    values = list(value) if isinstance(value, list | tuple) else [value]
    for one in values:
        if not isinstance(one, str):
            raise UserError(f"{at}: '{column}' must be text, found {type(one).__name__}")
    return values
