"""Hard negatives, and a teacher's scores of their lists, as JSON lines that Tevatron reads too."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from erniesearch.data.collection import RetrievalData
from erniesearch.data.corpus.texts import rows_of
from erniesearch.data.jsonl import read_jsonl
from erniesearch.errors import UserError
from erniesearch.files import write_atomically

Scores = dict[str, dict[str, float]]
"""A teacher's scores by query and passage id, those of relevant passages among them."""


def negatives_line(
    qid: str,
    positives: list[str],
    negatives: list[str],
    scores: tuple[list[float], list[float]] | None = None,
) -> str:
    """One query's hard negatives:
    ``{"query_id", "positive_document_ids", "negative_document_ids"}``, with a teacher's scores of
    both, in parallel lists, as ``positive_scores`` and ``negative_scores``."""
    record: dict[str, object] = {
        "query_id": qid, "positive_document_ids": positives, "negative_document_ids": negatives,
    }  # fmt: skip
    if scores is not None:
        record |= {"positive_scores": scores[0], "negative_scores": scores[1]}
    return json.dumps(record) + "\n"


def write_negatives(
    path: Path, negatives: dict[str, list[str]], positives: dict[str, list[str]]
) -> None:
    """Hard negatives as JSON lines (:func:`negatives_line`)."""
    lines = (negatives_line(qid, positives[qid], pids) for qid, pids in negatives.items())
    write_atomically(path, "".join(lines))


def read_negatives(path: Path, data: RetrievalData | None = None) -> dict[str, list[str]]:
    """Negative passage ids by query, hardest first.

    Raises:
        UserError: for an odd line; with ``data`` also for a query or passage that is not in it, or
            a query with two lines.
    """
    return {qid: pids for qid, pids, _, _ in _lines(path, data)}


def read_scored_negatives(
    path: Path, data: RetrievalData | None = None
) -> tuple[dict[str, list[str]], Scores]:
    """As :func:`read_negatives`, with the scores that lie with them.

    Raises:
        UserError: also for a line without scores, or with another number of them than of passages.
    """
    negatives, scores = {}, {}
    for qid, pids, record, where in _lines(path, data):
        negatives[qid] = pids
        scores[qid] = _scores(record, "positive", where) | _scores(record, "negative", where)
    return negatives, scores


def scored_lists(path: Path, most: int) -> list[list[float]]:
    """Scores of the file's first ``most`` lists that can be ranked: one positive's, then the
    negatives'.

    Raises:
        UserError: as :func:`read_scored_negatives`.
    """
    lists = []
    for _, _, record, where in _lines(path, None):
        own = [list(_scores(record, kind, where).values()) for kind in ("positive", "negative")]
        if all(own):
            lists.append(own[0][:1] + own[1])
        if len(lists) == most:
            break
    return lists


@dataclass(frozen=True)
class NegativesOf:
    """A query's list: passages that are relevant to it, and hard negatives."""

    qid: str
    positives: list[str]
    negatives: list[str]

    @property
    def passages(self) -> list[str]:
        """Positives, then negatives."""
        return self.positives + self.negatives


def read_lists(path: Path, data: RetrievalData) -> list[NegativesOf]:
    """The lists of a file of hard negatives; positives are those of the line and of the qrels.

    Raises:
        UserError: for an odd line, or a query or passage that is not in ``data``.
    """
    relevant = data.relevant()
    lists = []
    for qid, negatives, record, where in _lines(path, data):
        given = record.get("positive_document_ids") or []
        if not isinstance(given, list):
            raise UserError(f"{where}: positive_document_ids must be a list")
        positives = list(dict.fromkeys([*map(str, given), *relevant.get(qid, [])]))
        _check_known(positives, data, where)
        lists.append(NegativesOf(qid, positives, negatives))
    if not lists:
        raise UserError(f"{path}: no lists")
    return lists


def _check_known(pids: list[str], data: RetrievalData, where: str) -> None:
    for pid, row in zip(pids, rows_of(data.index_of, pids), strict=True):
        if row < 0:
            raise UserError(f"{where}: passage '{pid}' is not in corpus.jsonl")


def _lines(
    path: Path, data: RetrievalData | None
) -> Iterator[tuple[str, list[str], dict[str, Any], str]]:
    """Of every line: query, negatives, the whole record, and its place."""
    seen = set()
    for number, record in read_jsonl(path):
        where, pids = f"{path}:{number}", record.get("negative_document_ids")
        if not isinstance(pids, list) or "query_id" not in record:
            raise UserError(f"{where}: expected query_id and negative_document_ids")
        qid, pids = str(record["query_id"]), [str(pid) for pid in pids]
        if data is not None:
            if qid not in data.queries:
                raise UserError(f"{where}: query '{qid}' is not in queries.jsonl")
            if qid in seen:
                raise UserError(f"{where}: a second line for query '{qid}'; join them")
            _check_known(pids, data, where)
            seen.add(qid)
        yield qid, pids, record, where


def _scores(record: dict[str, Any], kind: str, where: str) -> dict[str, float]:
    pids, scores = record.get(f"{kind}_document_ids"), record.get(f"{kind}_scores")
    if not isinstance(scores, list) or not all(_is_number(score) for score in scores):
        raise UserError(
            f"{where}: no {kind}_scores, finite numbers that go with {kind}_document_ids: score the"
            " lists (`erniesearch score`), mine with a teacher (`erniesearch mine --write_scores"
            " true`), or set teacher_scores: live"
        )
    if not isinstance(pids, list) or len(pids) != len(scores):
        raise UserError(
            f"{where}: {len(scores)} {kind}_scores for"
            f" {len(pids) if isinstance(pids, list) else 'no'} {kind}_document_ids"
        )
    return {str(pid): float(score) for pid, score in zip(pids, scores, strict=True)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
