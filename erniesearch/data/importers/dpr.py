"""DPR: a JSON list of questions with their contexts, and Wikipedia as a table.

    biencoder-*-train.json   [{"question", "answers", "positive_ctxs": [{"title", "text",
                             "passage_id" or "psg_id"}], "negative_ctxs", "hard_negative_ctxs"}]
    psgs_w100.tsv            id, text, title, with that header

The list is gigabytes long and read item by item. With a table, contexts are passages of it;
without, the contexts are the corpus.
"""

import csv
import io
from collections.abc import Iterator
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
    content_id,
    listed,
    open_source,
    read_each,
    read_json,
    require,
    split_in,
    texts_in,
)
from erniesearch.errors import UserError

Item = tuple[int, Any]


def read(sources: list[Path], options: ImportOptions, bad: BadLines) -> Iterator[Record]:
    """``*.tsv`` tables and ``*.json`` lists, each may be gzipped; the split is in the list's name
    (train, dev, test), else ``options.split``.

    Raises:
        UserError: if there is no list.
    """
    names = [(path, path.name.removesuffix(".gz")) for path in listed(sources)]
    tables = [path for path, name in names if name.endswith(".tsv")]
    lists = [path for path, name in names if name.endswith(".json")]
    if not lists:
        raise UserError(f"{', '.join(map(str, sources))}: no .json file with questions")
    for path in tables:
        yield from read_each(_rows(path), partial(_table_row, path), bad)
    for path in lists:
        split = split_in(path, options.split)
        parse = partial(_question, path=path, split=split, contexts_are_corpus=not tables)
        yield from read_each(read_json(path, "item", "a JSON list of questions"), parse, bad)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    with io.TextIOWrapper(open_source(path), encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        try:
            for row in rows:
                if row and row[0] != "id":
                    yield rows.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{rows.line_num + 1}: cannot be read: {error}") from None


def _table_row(path: Path, item: tuple[int, list[str]]) -> Iterator[Record]:
    number, row = item
    if len(row) != 3:
        raise UserError(f"{path}:{number}: expected id, text, title, found {len(row)} columns")
    yield Passage(row[0], row[1], f"{path}:{number}", row[2])


def _question(item: Item, path: Path, split: str, contexts_are_corpus: bool) -> Iterator[Record]:
    number, record = item
    at = f"{path}: item {number}"
    if not isinstance(record, dict):
        raise UserError(f"{at}: expected a JSON object, found {type(record).__name__}")
    qid = f"{split}-{number}"
    answers = tuple(texts_in(record, "answers", at))
    yield Query(qid, require(record, "question", str, at), at, answers)
    positives = _contexts(record, "positive_ctxs", at)
    negatives = [*_contexts(record, "hard_negative_ctxs", at),
                 *_contexts(record, "negative_ctxs", at)]  # fmt: skip
    if contexts_are_corpus:
        yield from positives
        yield from negatives
    for passage in positives:
        yield Judgement(split, qid, passage.pid, at)
    if negatives:
        yield HardNegatives(qid, tuple(passage.pid for passage in negatives), at)


def _contexts(record: dict[str, Any], key: str, at: str) -> list[Passage]:
    contexts = require(record, key, list, at) if record.get(key) is not None else []
    passages = []
    for context in contexts:
        if not isinstance(context, dict):
            raise UserError(f"{at}: '{key}' must hold objects, found {type(context).__name__}")
        text = require(context, "text", str, at)
        title = context.get("title") or ""
        if not isinstance(title, str):
            raise UserError(f"{at}: 'title' must be text, found {type(title).__name__}")
        name = next((name for name in ("passage_id", "psg_id") if context.get(name)), None)
        pid = require(context, name, str, at) if name else content_id(title, text)
        passages.append(Passage(pid, text, at, title))
    return passages
