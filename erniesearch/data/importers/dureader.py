"""DuReader-retrieval, as JSON lines.

queries   {"question", "question_id", "answer_paragraphs": [{"paragraph_id",
           "paragraph_text"}]}
passages  {"paragraph_id", "paragraph_text"}
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from erniesearch.config.options import ImportOptions
from erniesearch.data.importers.records import (
    BadLines,
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
)
from erniesearch.data.jsonl import parse_line
from erniesearch.errors import UserError


def read(sources: list[Path], options: ImportOptions, bad: BadLines) -> Iterator[Record]:
    """Files of either kind, told apart line by line; the split is in the file's name, else
    ``options.split``. Answers are passages of the corpus."""
    for path in listed(sources):
        parse = partial(_line, split=split_in(path, options.split))
        yield from read_each(read_lines(path), parse, bad)


def _line(line: Line, split: str) -> Iterator[Record]:
    record = parse_line(line.raw, line.path, line.number)
    if "question" not in record:
        yield _paragraph(record, line.at)
        return
    qid = require(record, "question_id", str, line.at)
    yield Query(qid, require(record, "question", str, line.at), line.at)
    for answer in require(record, "answer_paragraphs", list, line.at):
        passage = _paragraph(answer, line.at)
        yield passage
        yield Judgement(split, qid, passage.pid, line.at)


def _paragraph(record: Any, at: str) -> Passage:
    if not isinstance(record, dict):
        raise UserError(f"{at}: a paragraph must be an object, found {type(record).__name__}")
    pid = require(record, "paragraph_id", str, at)
    return Passage(pid, require(record, "paragraph_text", str, at), at)
