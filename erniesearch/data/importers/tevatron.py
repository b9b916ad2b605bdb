"""Tevatron, both forms, as JSON lines.

older   {"query_id", "query", "positive_passages": [{"docid", "title", "text"}],
         "negative_passages"}
newer   {"query_id", "query_text", "positive_document_ids", "negative_document_ids"}
        with a corpus {"docid", "title", "text"}
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from erniesearch.config.options import ImportOptions
from erniesearch.data.importers.records import (
    BadLines,
    HardNegatives,
    Judgement,
    Line,
    Passage,
    Query,
    Record,
    listed,
    read_each,
    read_lines,
    require,
    split_in,
    texts_in,
)
from erniesearch.data.jsonl import parse_line, text_field
from erniesearch.errors import UserError


def read(sources: list[Path], options: ImportOptions, bad: BadLines) -> Iterator[Record]:
    """Files of either form; a file whose first line has a ``docid`` and no ``query_id`` is a
    corpus and comes first. The split is in the file's name, else ``options.split``."""
    files = listed(sources)
    corpora = [path for path in files if _is_corpus(path)]
    for path in corpora:
        yield from read_each(read_lines(path), _passage, bad)
    for path in files:
        if path not in corpora:
            parse = partial(_query, split=split_in(path, options.split), bad=bad)
            yield from read_each(read_lines(path), parse, bad)


def _is_corpus(path: Path) -> bool:
    first = next(read_lines(path), None)
    if first is None:
        return False
    try:
        record = parse_line(first.raw, path, first.number)
    except UserError:  # told when the file is read
        return False
    return "docid" in record and "query_id" not in record


def _passage(line: Line) -> Iterator[Record]:
    yield _document(parse_line(line.raw, line.path, line.number), line)


def _document(record: Any, line: Line) -> Passage:
    if not isinstance(record, dict):
        raise UserError(f"{line.at}: a passage must be an object, found {type(record).__name__}")
    pid, text = (require(record, key, str, line.at) for key in ("docid", "text"))
    return Passage(pid, text, line.at, text_field(record, "title", line.path, line.number, ""))


def _query(line: Line, split: str, bad: BadLines) -> Iterator[Record]:
    record = parse_line(line.raw, line.path, line.number)
    at = line.at
    qid = require(record, "query_id", str, at)
    older = "positive_passages" in record
    answers = tuple(texts_in(record, "answers", at))
    yield Query(qid, require(record, "query" if older else "query_text", str, at), at, answers)
    if older:
        found = {key: require(record, f"{key}_passages", list, at)
                 if record.get(f"{key}_passages") is not None else []
                 for key in ("positive", "negative")}  # fmt: skip
        if any(isinstance(p, dict) and "score" in p for both in found.values() for p in both):
            bad.note("scores of a teacher, not kept", at)
        passages = {key: [_document(p, line) for p in both] for key, both in found.items()}
        yield from passages["positive"]
        yield from passages["negative"]
        positives, negatives = ([p.pid for p in passages[key]] for key in found)
    else:
        positives = texts_in(record, "positive_document_ids", at)
        negatives = texts_in(record, "negative_document_ids", at)
    for pid in positives:
        yield Judgement(split, qid, pid, at)
    if negatives:
        yield HardNegatives(qid, tuple(negatives), at)
