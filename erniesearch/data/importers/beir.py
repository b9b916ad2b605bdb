"""BEIR layout itself: validated, its repeated lines dropped, and re-split with ``--hold_out``."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from erniesearch.config.options import ImportOptions
from erniesearch.data.importers.records import (
    BadLines,
    HardNegatives,
    Judgement,
    Line,
    Passage,
    Query,
    Record,
    parallel_scores,
    read_each,
    read_lines,
    require,
    texts_in,
)
from erniesearch.data.jsonl import parse_line, text_field
from erniesearch.errors import UserError


def read(sources: list[Path], options: ImportOptions, bad: BadLines) -> Iterator[Record]:
    """One folder: corpus.jsonl, queries.jsonl, qrels/*.tsv, negatives.jsonl if it is there; each
    may end in .gz as well.

    Raises:
        UserError: for another number of sources, or a missing file.
    """
    if len(sources) != 1 or not sources[0].is_dir():
        raise UserError("format beir reads one folder: corpus.jsonl, queries.jsonl, qrels/*.tsv")
    root = sources[0]
    yield from read_each(read_lines(_file(root, "corpus.jsonl")), _passage, bad)
    yield from read_each(read_lines(_file(root, "queries.jsonl")), _query, bad)
    splits = sorted([*root.glob("qrels/*.tsv"), *root.glob("qrels/*.tsv.gz")])
    if not splits:
        raise UserError(f"{root / 'qrels'}: no SPLIT.tsv")
    for path in splits:
        yield from read_each(read_lines(path), _judgement, bad)
    negatives = _file(root, "negatives.jsonl")
    if negatives.is_file():
        parse = partial(_negatives, scored=options.scores is not None)
        yield from read_each(read_lines(negatives), parse, bad)


def _file(root: Path, name: str) -> Path:
    packed = root / f"{name}.gz"
    return packed if packed.is_file() else root / name


def _passage(line: Line) -> Iterator[Record]:
    record = parse_line(line.raw, line.path, line.number)
    place = (line.path, line.number)
    pid, text = text_field(record, "_id", *place), text_field(record, "text", *place)
    yield Passage(pid, text, line.at, text_field(record, "title", *place, ""))


def _query(line: Line) -> Iterator[Record]:
    record = parse_line(line.raw, line.path, line.number)
    place = (line.path, line.number)
    qid, text = text_field(record, "_id", *place), text_field(record, "text", *place)
    metadata = record.get("metadata")
    answers = texts_in(metadata, "answers", line.at) if isinstance(metadata, dict) else []
    yield Query(qid, text, line.at, tuple(answers))


def _judgement(line: Line) -> Iterator[Record]:
    columns = [column.strip() for column in line.columns(3)]
    if line.number == 1 and columns[2] == "score":
        return
    split = line.path.name.removesuffix(".gz").removesuffix(".tsv")
    yield judgement(split, columns[0], columns[1], columns[2], line.at)


def judgement(split: str, qid: str, pid: str, grade: str, at: str) -> Judgement:
    """A judgement whose grade comes as text.

    Raises:
        UserError: if that is no whole number.
    """
    try:
        return Judgement(split, qid, pid, at, int(grade))
    except ValueError:
        raise UserError(f"{at}: score {grade!r} is not a whole number") from None


def _negatives(line: Line, scored: bool) -> Iterator[Record]:
    record = parse_line(line.raw, line.path, line.number)
    qid = require(record, "query_id", str, line.at)
    kinds = ("positive", "negative")
    pids = {f"{kind}_scores": texts_in(record, f"{kind}_document_ids", line.at) for kind in kinds}
    yield HardNegatives(qid, tuple(pids["negative_scores"]), line.at)
    if scored:
        yield from parallel_scores(record, qid, pids, line.at)
