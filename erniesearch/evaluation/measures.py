"""What the pipeline measures: default metrics with bootstrap intervals, over a part of the data."""

from dataclasses import dataclass, replace

import numpy as np

from erniesearch.config.keys import EvaluationConfig
from erniesearch.data.bm25 import BM25, Tokenizer
from erniesearch.data.collection import RetrievalData, Run, draw_rows
from erniesearch.data.corpus.texts import take
from erniesearch.data.ranking_metrics import DEFAULT_METRICS, parse_metrics, per_query
from erniesearch.errors import UserError

METRICS = parse_metrics(DEFAULT_METRICS)
RESAMPLES = 1000
_BLOCK = 5_000_000
"""Queries drawn at a time: memory does not grow with their number."""


@dataclass(frozen=True)
class Estimate:
    """Mean over queries with a 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def per_query_metrics(run: Run, qrels: dict[str, dict[str, int]]) -> dict[str, np.ndarray]:
    """Each default metric's value for every query of the qrels, ``[num_queries]`` in their order.

    A query without results counts as 0 (as in MS MARCO's evaluation; trec_eval without ``-c``
    leaves it out).
    """
    return per_query(run, qrels, list(qrels), METRICS)


def estimate(values: np.ndarray, seed: int) -> Estimate:
    """Mean and percentile bootstrap (1,000 resamples of the queries)."""
    rng = np.random.default_rng([seed, 5])
    rows = max(1, _BLOCK // len(values))
    means = [
        values[rng.integers(len(values), size=(min(rows, RESAMPLES - done), len(values)))].mean(1)
        for done in range(0, RESAMPLES, rows)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


def evaluation_subset(data: RetrievalData, settings: EvaluationConfig, seed: int) -> RetrievalData:
    """The collection to search: the drawn queries, their relevant passages and the distractors.

    Raises:
        UserError: if there are fewer distractors than asked for.
    """
    subset = draw_subset(data, settings.max_queries, settings.num_distractors, seed)
    judged = {pid for grades in subset.qrels.values() for pid in grades}
    drawn = len(subset.pids) - len(judged)
    if settings.num_distractors is not None and drawn < settings.num_distractors:
        raise UserError(
            f"evaluation.num_distractors is {settings.num_distractors}, the corpus has"
            f" {drawn} passages besides the judged ones: lower it, or null for all"
        )
    return subset


def draw_subset(
    data: RetrievalData, max_queries: int | None, num_distractors: int | None, seed: int
) -> RetrievalData:
    """At most ``max_queries`` queries with a relevant passage, their judged passages and at most
    ``num_distractors`` others; None takes all."""
    qids, rows = draw_rows(data, max_queries, num_distractors, seed)
    qrels = {qid: data.qrels[qid] for qid in qids}
    queries = {qid: data.queries[qid] for qid in qids}
    if num_distractors is None:
        return replace(data, queries=queries, qrels=qrels)
    return RetrievalData(take(data.pids, rows), take(data.passages, rows), queries, qrels)


def bm25_run(
    data: RetrievalData, depth: int, stemmer: str | None, tokenizer: Tokenizer = "words"
) -> Run:
    """BM25 over the same passages; passages that share no word with the query are left out."""
    bm25 = BM25(data.passages, stemmer, tokenizer)
    rows, scores = bm25.search(list(data.queries.values()), depth)
    return {
        qid: {
            data.pids[row]: float(s)
            for row, s in zip(query_rows, query_scores, strict=True)
            if s > 0
        }
        for qid, query_rows, query_scores in zip(data.queries, rows, scores, strict=True)
    }
