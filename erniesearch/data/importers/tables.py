"""Tables with a query, its positive and its negatives in columns, as sentence-transformers has
them: Parquet, JSON, CSV and TSV files, or a dataset by its name on the hub."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from erniesearch.config.options import ImportOptions
from erniesearch.data.importers.pairs import group
from erniesearch.data.importers.records import (
    BadLines,
    HardNegatives,
    Judgement,
    Passage,
    Query,
    Record,
    content_id,
    read_each,
    split_in,
)
from erniesearch.errors import UserError, nearest

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}
Row = tuple[int, dict[str, Any]]


def read(sources: list[Path], options: ImportOptions, bad: BadLines) -> Iterator[Record]:
    """Files, folders of files, or names of datasets; rows are streamed.

    Columns: ``options.query``, ``options.positive`` (text or list of texts), ``options.negative``
    and ``negative_1`` to ``negative_n``; ``options.query_id`` and ``options.positive_id`` name
    columns of ids, without which ids are hashes of the text.

    Raises:
        UserError: if a source does not load, or lacks a column.
    """
    for source in sources:
        for path in _files(source):
            split = split_in(path, options.split) if path.exists() else options.split
            rows = _rows(path, options)
            parse = partial(_row, path=path, split=split, options=options)
            yield from read_each(rows, parse, bad)


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    files = sorted(path for path in source.rglob("*") if path.suffix in BUILDERS)
    if not files:
        raise UserError(f"{source}: no {', '.join(BUILDERS)} file")
    return files


def _rows(path: Path, options: ImportOptions) -> Iterator[Row]:
    settings: dict[str, Any] = {"streaming": True, "split": "train"}
    builder = BUILDERS.get(path.suffix)
    if path.exists() and builder is None:
        raise UserError(f"{path}: expected {', '.join(BUILDERS)}")
    if builder and not path.is_file():
        raise UserError(f"{path}: no such file")
    number = 0
    try:
        if builder:
            if path.suffix == ".tsv":
                settings["sep"] = "\t"
            table = datasets.load_dataset(builder, data_files=str(path), **settings)
        else:
            settings["split"] = options.split
            table = datasets.load_dataset(str(path), options.subset or None, **settings)
        for number, row in enumerate(table, 1):
            yield number, row
    except GeneratorExit:
        raise
    except Exception as error:
        # The library and its readers raise whatever their own libraries raise.
        problem = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{path}: cannot be read after row {number}: {problem}") from None


def _row(item: Row, path: Path, split: str, options: ImportOptions) -> Iterator[Record]:
    number, row = item
    at = f"{path}: row {number}"
    query = _texts(row, options.query, at)
    positives = _texts(row, options.positive, at)
    if len(query) != 1:
        raise UserError(f"{at}: column '{options.query}' must hold one text")
    if not positives:
        raise UserError(f"{at}: column '{options.positive}' is empty")
    pattern = re.compile(re.escape(options.negative) + r"(_\d+)?")
    negatives = [text for name in row if pattern.fullmatch(name) and row[name] is not None
                 for text in _texts(row, name, at)]  # fmt: skip
    if not options.query_id and not options.positive_id:
        yield from group(query[0], positives, negatives, split, at)
        return
    qid = _one(row, options.query_id, at) if options.query_id else content_id(query[0])
    pids = [content_id(text) for text in positives]
    if options.positive_id:
        pids = _texts(row, options.positive_id, at)
        if len(pids) != len(positives):
            raise UserError(f"{at}: {len(positives)} positives but {len(pids)} ids for them")
    yield Query(qid, query[0], at)
    for pid, text in zip(pids, positives, strict=True):
        yield Passage(pid, text, at)
        yield Judgement(split, qid, pid, at)
    for text in negatives:
        yield Passage(content_id(text), text, at)
    if negatives:
        yield HardNegatives(qid, tuple(map(content_id, negatives)), at)


def _one(row: dict[str, Any], column: str, at: str) -> str:
    texts = _texts(row, column, at)
    if len(texts) != 1:
        raise UserError(f"{at}: column '{column}' must hold one value")
    return texts[0]


def _texts(row: dict[str, Any], column: str, at: str) -> list[str]:
    """A cell's texts: it holds one, or a list of them; whole numbers are taken as ids."""
    if column not in row:
        raise UserError(
            f"{at}: no column '{column}'{nearest(column, row)}; columns: {', '.join(row)}; name it"
            " with --query, --positive, --negative, --query_id or --positive_id"
        )
    value = row[column]
    values = value if isinstance(value, list) else [value]
    for one in values:
        if not isinstance(one, str | int) or isinstance(one, bool):
            raise UserError(f"{at}: '{column}' must be text, found {type(one).__name__}")
    return [str(one) for one in values]
