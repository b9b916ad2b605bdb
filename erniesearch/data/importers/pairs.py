"""FlagEmbedding: JSON lines ``{"query", "pos": [text], "neg": [text]}``, where a teacher has scored
them with ``"pos_scores"`` and ``"neg_scores"`` beside them.

Nothing has an id there: a passage's and a query's is a hash of its text, and equal texts are one.
"""

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
    content_id,
    listed,
    parallel_scores,
    read_each,
    read_lines,
    require,
    split_in,
    texts_in,
)
from erniesearch.data.jsonl import parse_line
from erniesearch.errors import UserError


def read(sources: list[Path], options: ImportOptions, bad: BadLines) -> Iterator[Record]:
    """JSON lines; the split is in the file's name, else ``options.split``."""
    for path in listed(sources):
        parse = partial(
            _line, split=split_in(path, options.split), scored=options.scores is not None
        )
        yield from read_each(read_lines(path), parse, bad)


def _line(line: Line, split: str, scored: bool) -> Iterator[Record]:
    record = parse_line(line.raw, line.path, line.number)
    query = require(record, "query", str, line.at)
    positives, negatives = (texts_in(record, key, line.at) for key in ("pos", "neg"))
    if not positives:
        raise UserError(f"{line.at}: 'pos' is missing or empty")
    yield from group(query, positives, negatives, split, line.at)
    if scored:
        ids = {f"{key}_scores": [content_id(text) for text in texts]
               for key, texts in (("pos", positives), ("neg", negatives))}  # fmt: skip
        yield from parallel_scores(record, content_id(query), ids, line.at)


def group(
    query: str, positives: list[str], negatives: list[str], split: str, at: str
) -> Iterator[Record]:
    """Records of a query with its passages, all without ids."""
    qid = content_id(query)
    yield Query(qid, query, at)
    for text in (*positives, *negatives):
        yield Passage(content_id(text), text, at)
    for text in positives:
        yield Judgement(split, qid, content_id(text), at)
    if negatives:
        yield HardNegatives(qid, tuple(map(content_id, negatives)), at)
