"""BEIR layout; every odd line is named by file and line.

corpus.jsonl    {"_id": str, "title": str, "text": str}
queries.jsonl   {"_id": str, "text": str}
qrels/SPLIT.tsv query-id <tab> corpus-id <tab> score, with that header
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from erniesearch.data.corpus.texts import ArrowColumn, PidIndex, open_corpus, rows_of
from erniesearch.data.jsonl import read_jsonl, text_field
from erniesearch.errors import UserError

NO_DATA = "no data: set data.path, or give a Collection as data"
"""A configuration made in Python may leave ``data.path`` out."""
Run = dict[str, dict[str, float]]
"""Scores by query id and passage id."""


@dataclass(frozen=True)
class RetrievalData:
    """A collection.

    ``pids`` and ``passages`` are parallel, ``passages`` with titles already joined; ``queries``
    maps qid to text; ``qrels`` maps qid to {pid: grade} for one split. ``load_beir`` gives
    memory-mapped columns (``data/corpus/texts.py``), a part of a collection comes as lists;
    ``take(passages, rows)`` reads several texts of either.
    """

    pids: Sequence[str]
    passages: Sequence[str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]

    @cached_property
    def index_of(self) -> Mapping[str, int]:
        """Position of each pid in ``pids``; ``rows_of(index_of, pids)`` looks many up at once."""
        if isinstance(self.pids, ArrowColumn):
            return PidIndex(self.pids)
        return {pid: i for i, pid in enumerate(self.pids)}

    def relevant(self) -> dict[str, list[str]]:
        """Passages of grade above 0 by query, queries without any left out."""
        found = {q: [p for p, g in grades.items() if g > 0] for q, grades in self.qrels.items()}
        return {q: pids for q, pids in found.items() if pids}


def draw_rows(
    data: RetrievalData, max_queries: int | None, num_distractors: int | None, seed: int
) -> tuple[list[str], np.ndarray]:
    """At most ``max_queries`` queries with a relevant passage, and the positions in the corpus of
    their judged passages and of at most ``num_distractors`` others; None takes all."""
    rng = np.random.default_rng([seed, 6])
    qids = list(data.relevant())
    if max_queries is not None and max_queries < len(qids):
        qids = [qids[i] for i in sorted(rng.permutation(len(qids))[:max_queries])]
    if num_distractors is None:
        return qids, np.arange(len(data.pids))
    keep = np.zeros(len(data.pids), dtype=bool)
    keep[rows_of(data.index_of, [pid for qid in qids for pid in data.qrels[qid]])] = True
    keep[rng.permutation(np.flatnonzero(~keep))[:num_distractors]] = True
    return qids, np.flatnonzero(keep)


def read_queries(path: Path) -> dict[str, str]:
    """Query texts by id, in file order."""
    queries: dict[str, str] = {}
    for number, record in read_jsonl(path):
        qid = text_field(record, "_id", path, number)
        if qid in queries:
            raise UserError(f"{path}:{number}: duplicate query id '{qid}'")
        queries[qid] = text_field(record, "text", path, number)
    if not queries:
        raise UserError(f"{path}: no queries")
    return queries


def read_qrels(
    path: Path, queries: dict[str, str], known_pids: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """Grades by query and passage.

    Raises:
        UserError: for a malformed line, or an id that corpus or queries do not have.
    """
    if not path.is_file():
        splits = sorted(p.stem for p in path.parent.glob("*.tsv"))
        there = f"; splits here: {', '.join(splits)}" if splits else ""
        raise UserError(f"{path}: no such file{there}")
    qrels: dict[str, dict[str, int]] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        columns = line.split("\t")
        if number == 1 and columns[-1].strip() == "score":
            continue
        if len(columns) != 3:
            raise UserError(
                f"{path}:{number}: expected query-id<tab>corpus-id<tab>score, found {len(columns)}"
                " columns"
            )
        qid, pid, grade = (column.strip() for column in columns)
        if qid not in queries:
            raise UserError(f"{path}:{number}: query '{qid}' is not in queries.jsonl")
        if pid not in known_pids:
            raise UserError(f"{path}:{number}: passage '{pid}' is not in corpus.jsonl")
        try:
            qrels.setdefault(qid, {})[pid] = int(grade)
        except ValueError:
            raise UserError(f"{path}:{number}: score {grade!r} is not a whole number") from None
    if not any(grade > 0 for grades in qrels.values() for grade in grades.values()):
        raise UserError(f"{path}: no query has a relevant passage")
    return qrels


def load_beir(root: str | Path, split: str, use_titles: bool = True) -> RetrievalData:
    """Read a folder in BEIR layout; the corpus stays on disk, memory-mapped.

    Raises:
        UserError: naming the file, the line and the remedy.
    """
    if not str(root):
        raise UserError(NO_DATA)
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; data.path must hold corpus.jsonl, queries.jsonl and qrels/:"
            " `erniesearch data import` brings a data set there, `erniesearch data pycode --out"
            f" {root} --max_pairs 4000` writes the quickstart's"
        )
    corpus = open_corpus(root / "corpus.jsonl", use_titles)
    queries = read_queries(root / "queries.jsonl")
    return with_split(RetrievalData(corpus.pids, corpus.passages, queries, {}), root, split)


def with_split(data: RetrievalData, root: str | Path, split: str) -> RetrievalData:
    """The same collection with another split's qrels; corpus and queries are not read again.

    Raises:
        UserError: as :func:`read_qrels`.
    """
    path = Path(root) / "qrels" / f"{split}.tsv"
    return replace(data, qrels=read_qrels(path, data.queries, data.index_of))
