"""Tevatron, all forms, as JSON lines.

older       {"query_id", "query", "positive_passages": [{"docid", "title", "text"}],
             "negative_passages"}; to distil, with a "score" in every passage
newer       {"query_id", "query_text", "positive_document_ids", "negative_document_ids"}
            with a corpus {"docid", "title", "text"}; this project's hard negatives add
            "positive_scores" and "negative_scores"
annotated   {"query_id", "query", "passages": [{"title", "text"}], "scores"}, the positive first
            (its annotate_with_teacher)
"""

from collections.abc import Callable, Iterator
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
    content_id,
    listed,
    numbers,
    parallel_scores,
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
            split, scored = split_in(path, options.split), options.scores is not None
            parse = partial(_query, split=split, scored=scored)
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


def _document(record: Any, line: Line, make_id: Callable[[str, str], str] | None = None) -> Passage:
    if not isinstance(record, dict):
        raise UserError(f"{line.at}: a passage must be an object, found {type(record).__name__}")
    text = require(record, "text", str, line.at)
    title = text_field(record, "title", line.path, line.number, "")
    if make_id and "docid" not in record:
        return Passage(make_id(title, text), text, line.at, title)
    return Passage(require(record, "docid", str, line.at), text, line.at, title)


def _query(line: Line, split: str, scored: bool) -> Iterator[Record]:
    record = parse_line(line.raw, line.path, line.number)
    at = line.at
    qid = require(record, "query_id", str, at)
    newer = "positive_passages" not in record and "passages" not in record
    answers = tuple(texts_in(record, "answers", at))
    yield Query(qid, require(record, "query_text" if newer else "query", str, at), at, answers)
    if newer:
        positives, negatives = (
            texts_in(record, f"{kind}_document_ids", at) for kind in ("positive", "negative")
        )
        scores = record
    else:
        passages, scores = _own_passages(record, line, scored)
        positives, negatives = ([passage.pid for passage in own] for own in passages)
        for own in passages:
            yield from own
    for pid in positives:
        yield Judgement(split, qid, pid, at)
    if negatives:
        yield HardNegatives(qid, tuple(negatives), at)
    if scored:
        lists = {"positive_scores": positives, "negative_scores": negatives}
        yield from parallel_scores(scores, qid, lists, at)


def _own_passages(
    record: dict[str, Any], line: Line, scored: bool
) -> tuple[list[list[Passage]], dict[str, Any]]:
    """Of a line that holds its passages: positives and negatives, and their scores as the newer
    form has them."""
    scores: list[list[Any]] = []
    if "positive_passages" in record:
        keys = ("positive_passages", "negative_passages")
        found = [require(record, key, list, line.at) if record.get(key) is not None else []
                 for key in keys]  # fmt: skip
        passages = [[_document(p, line) for p in own] for own in found]
        scores = [[p.get("score") for p in own] for own in found]
    else:
        every = require(record, "passages", list, line.at)
        if not every:
            raise UserError(f"{line.at}: 'passages' is empty; the first one is the positive")
        documents = [_document(p, line, content_id) for p in every]
        passages = [documents[:1], documents[1:]]
        if scored:
            values = numbers(record.get("scores"), "scores", len(every), line.at)
            scores = [values[:1], values[1:]]
    known = [score is not None for own in scores for score in own]
    if not any(known):
        return passages, {}
    if scored and not all(known):
        raise UserError(
            f"{line.at}: {sum(known)} of {len(known)} passages have a 'score': all must, or none;"
            " --scores null leaves them out"
        )
    return passages, dict(zip(("positive_scores", "negative_scores"), scores, strict=True))
