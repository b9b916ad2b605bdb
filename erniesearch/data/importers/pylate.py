"""PyLate's knowledge distillation: three tables, as files or as the parts of a dataset by name.

    train       {"query_id", "document_ids": [id], "scores": [number]}
    queries     {"query_id", "text"}
    documents   {"document_id", "text"}

The lists may also be texts that spell them. Which passage is relevant they do not say:
``options.relevant`` does.
"""

import ast
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from erniesearch.config.options import ImportOptions
from erniesearch.data.importers.records import (
    BadLines,
    HardNegatives,
    Judgement,
    Passage,
    Query,
    Record,
    TeacherScores,
    numbers,
    read_each,
    require,
    split_in,
    texts_in,
)
from erniesearch.data.importers.tables import Row, table_files, table_rows
from erniesearch.errors import UserError

KINDS = {"documents": {"document_id", "text"}, "queries": {"query_id", "text"},
         "train": {"query_id", "document_ids", "scores"}}  # fmt: skip
"""The tables with the columns that tell them, in the order in which they are read."""


def read(sources: list[Path], options: ImportOptions, bad: BadLines) -> Iterator[Record]:
    """Files or folders of them, told apart by their columns, or datasets by name with the parts
    train, queries and documents.

    Raises:
        UserError: if ``options.relevant`` is not given, or a table is missing or unknown.
    """
    if options.relevant is None:
        raise UserError(
            "format pylate: its lists do not say which passage is relevant: --relevant first, or"
            " --relevant best for that of the highest score"
        )
    tables = [table for source in sources for table in _tables(source, options)]
    for kind, columns in KINDS.items():
        own = [(path, part) for path, found, part in tables if found == kind]
        if not own:
            raise UserError(
                f"{', '.join(map(str, sources))}: no table of {kind}, with the columns"
                f" {', '.join(sorted(columns))}"
            )
        for path, part in own:
            parse = {"documents": _document, "queries": _query}.get(kind)
            if parse is None:
                split = split_in(path, options.split) if path.exists() else options.split
                parse = partial(_list, split=split, options=options, bad=bad)
            yield from read_each(table_rows(path, part), partial(parse, path), bad)


def _tables(source: Path, options: ImportOptions) -> Iterator[tuple[Path, str, ImportOptions]]:
    """Path, kind, and the options that read it."""
    if not source.exists() and not source.suffix:
        for kind in KINDS:
            split = options.split if kind == "train" else "train"
            yield source, kind, replace(options, subset=kind, split=split)
        return
    for path in table_files(source):
        first = next(table_rows(path, options), (0, {}))[1]
        found = [kind for kind, columns in KINDS.items() if columns <= first.keys()]
        if not found:
            raise UserError(f"{path}: the columns {', '.join(first) or '(none)'} are of no table"
                            f" of PyLate's: {', '.join(KINDS)}")  # fmt: skip
        yield path, found[0], options


def _document(path: Path, item: Row) -> Iterator[Record]:
    at, row = f"{path}: row {item[0]}", item[1]
    title = require(row, "title", str, at) if row.get("title") is not None else ""
    pid, text = (require(row, key, str, at) for key in ("document_id", "text"))
    yield Passage(pid, text, at, title)


def _query(path: Path, item: Row) -> Iterator[Record]:
    at, row = f"{path}: row {item[0]}", item[1]
    qid, text = (require(row, key, str, at) for key in ("query_id", "text"))
    yield Query(qid, text, at)


def _list(
    path: Path, item: Row, split: str, options: ImportOptions, bad: BadLines
) -> Iterator[Record]:
    at, row = f"{path}: row {item[0]}", item[1]
    qid = require(row, "query_id", str, at)
    pids = texts_in({"document_ids": _spelt(row, "document_ids", at)}, "document_ids", at)
    if not pids:
        raise UserError(f"{at}: 'document_ids' is empty")
    scores = numbers(_spelt(row, "scores", at), "scores", len(pids), at)
    best = scores.index(max(scores))
    if options.relevant == "first" and best:
        bad.note("the first passage of a list is not that of the highest score", at)
    positive = pids[best if options.relevant == "best" else 0]
    yield Judgement(split, qid, positive, at)
    if negatives := [pid for pid in pids if pid != positive]:
        yield HardNegatives(qid, tuple(negatives), at)
    if options.scores is not None:
        yield TeacherScores(qid, tuple(pids), tuple(scores), at)


def _spelt(row: dict[str, Any], key: str, at: str) -> Any:
    """A list, or the text of one."""
    value = row.get(key)
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise UserError(f"{at}: '{key}' must be a list, found the text {value[:40]!r}") from None
