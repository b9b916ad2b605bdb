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
    TeacherScores,
    content_id,
    numbers,
    read_each,
    split_in,
)
from erniesearch.errors import UserError, nearest

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}
LABELS = ("label", "labels", "score", "scores")
"""Columns that sentence-transformers' trainers take for labels."""
Row = tuple[int, dict[str, Any]]


def read(sources: list[Path], options: ImportOptions, bad: BadLines) -> Iterator[Record]:
    """Files, folders of files, or names of datasets; rows are streamed.

    Columns: ``options.query``, ``options.positive`` (text or list of texts), ``options.negative``
    and ``negative_1`` to ``negative_n``, or ``options.documents`` (a list, the positive first) in
    place of both; ``options.query_id`` and ``options.positive_id`` name columns of ids, without
    which ids are hashes of the text. ``options.scores`` is read as sentence-transformers' losses
    read it (:func:`row_scores`).

    Raises:
        UserError: if a source does not load, or lacks a column.
    """
    for source in sources:
        for path in table_files(source):
            split = split_in(path, options.split) if path.exists() else options.split
            rows = table_rows(path, options)
            parse = partial(_row, path=path, split=split, options=options, bad=bad)
            yield from read_each(rows, parse, bad)


def table_files(source: Path) -> list[Path]:
    """The tables in a folder; what is none stays as it is."""
    if not source.is_dir():
        return [source]
    files = sorted(path for path in source.rglob("*") if path.suffix in BUILDERS)
    if not files:
        raise UserError(f"{source}: no {', '.join(BUILDERS)} file")
    return files


def table_rows(path: Path, options: ImportOptions) -> Iterator[Row]:
    """Number and content of every row of a file, or of ``options.subset`` and ``options.split`` of
    a dataset that is named.

    Raises:
        UserError: naming the file and the last row that was read.
    """
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


def _row(
    item: Row, path: Path, split: str, options: ImportOptions, bad: BadLines
) -> Iterator[Record]:
    number, row = item
    at = f"{path}: row {number}"
    query = _texts(row, options.query, at)
    if len(query) != 1:
        raise UserError(f"{at}: column '{options.query}' must hold one text")
    positives, negatives = _passages(row, options, at)
    qid = _one(row, options.query_id, at) if options.query_id else content_id(query[0])
    scores = partial(row_scores, row, options, qid, at=at, bad=bad)
    if not options.query_id and not options.positive_id:
        yield from group(query[0], positives, negatives, split, at)
        yield from scores([*map(content_id, positives)], [*map(content_id, negatives)])
        return
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
    yield from scores(pids, [*map(content_id, negatives)])


def _passages(row: dict[str, Any], options: ImportOptions, at: str) -> tuple[list[str], list[str]]:
    """Positives and negatives."""
    if options.documents:
        texts = _texts(row, options.documents, at)
        positives, negatives = texts[:1], texts[1:]
    else:
        positives = _texts(row, options.positive, at)
        pattern = re.compile(re.escape(options.negative) + r"(_?\d+)?")
        negatives = [text for name in row if pattern.fullmatch(name) and row[name] is not None
                     for text in _texts(row, name, at)]  # fmt: skip
    if not positives:
        raise UserError(f"{at}: column '{options.documents or options.positive}' is empty")
    return positives, negatives


def row_scores(
    row: dict[str, Any], options: ImportOptions, qid: str,
    positives: list[str], negatives: list[str], at: str, bad: BadLines,
) -> Iterator[Record]:  # fmt: skip
    """As sentence-transformers' MarginMSELoss and DistillKLDivLoss read a label: with k negatives,
    k + 1 numbers are the scores of positive and negatives, k (or a bare one) are margins, the
    positive's score minus each negative's."""
    column = options.scores
    if column == "":
        column = next((name for name in LABELS if name in row), None)
        if column and not negatives:
            bad.note(f"'{column}' of a query without negatives, not kept", at)
            return
    if column is None:
        return
    if column not in row:
        raise UserError(f"{at}: no column '{column}'{nearest(column, row)}; name it with --scores")
    values = row[column] if isinstance(row[column], list) else [row[column]]
    pids = (*positives, *negatives)
    if len(values) == len(pids):
        scores = numbers(values, column, len(pids), at)
        yield TeacherScores(qid, pids, tuple(scores), at)
    elif len(positives) == 1 and len(values) == len(negatives):
        margins = numbers(values, column, len(negatives), at)
        yield TeacherScores(qid, pids, (0.0, *(-m for m in margins)), at, positives[0])
    else:
        raise UserError(
            f"{at}: '{column}' has {len(values)} numbers for {len(positives)} positives and"
            f" {len(negatives)} negatives: give a score each, or, with one positive, a margin for"
            " every negative; --scores null leaves them out"
        )


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
