"""Search and rerank: an index's best, then late interaction or cross-encoder over them."""

import numpy as np
import torch
from erniesearch_kernels import maxsim
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from erniesearch.data.collection import RetrievalData, Run
from erniesearch.data.corpus.texts import rows_of
from erniesearch.retrieval.first_stage import Index, retrieve
from erniesearch.retrieval.retriever import PairScorer, Retriever
from erniesearch.retrieval.token_vectors import TokenVectors


def dense_run(
    retriever: Retriever, index: Index, queries: dict[str, str], depth: int,
    allowed: np.ndarray | None = None,
) -> Run:  # fmt: skip
    """The ``depth`` best passages of each query by inner product, or by MaxSim in an index of token
    vectors; ``allowed`` as in :func:`retrieve`."""
    rows, scores = retrieve(retriever, index, list(queries.values()), depth, allowed)
    return {
        qid: {
            index.pids[row]: float(score)
            for row, score in zip(query_rows, query_scores, strict=True)
            if row >= 0
        }
        for qid, query_rows, query_scores in zip(queries, rows, scores, strict=True)
    }


def top(scores: dict[str, float], depth: int) -> list[str]:
    """The best pids, best first; equal scores by pid, as in the written run."""
    return sorted(scores, key=lambda pid: (-scores[pid], pid))[:depth]


def late_interaction_scores(
    retriever: Retriever,
    data: RetrievalData,
    queries: dict[str, str],
    candidates: dict[str, list[str]],
    stored: TokenVectors | None = None,
) -> Run:
    """MaxSim of each query with its candidates' pids; every passage is encoded once, or not at all
    where its vectors are ``stored``."""
    needed = sorted({pid for pids in candidates.values() for pid in pids})
    if stored is not None:
        encoded = stored(needed)
    else:
        rows = rows_of(data.index_of, needed)
        assert (rows >= 0).all()
        encoded = retriever.tokens(retriever.passages(data.passages, rows), "passage")
    tokens_of = dict(zip(needed, encoded, strict=True))
    query_tokens = retriever.tokens([queries[qid] for qid in candidates], "query")
    scores: Run = {}
    for (qid, pids), query in zip(candidates.items(), query_tokens, strict=True):
        passages, mask = _pad([tokens_of[pid] for pid in pids])
        row = maxsim(query.float()[None], passages, None, mask)[0]
        scores[qid] = dict(zip(pids, row.tolist(), strict=True))
    return scores


def cross_encoder_scores(
    scorer: PairScorer,
    data: RetrievalData,
    queries: dict[str, str],
    candidates: dict[str, list[str]],
) -> Run:
    """The cross-encoder's score of each query with its candidates' pids."""
    pairs = [(qid, pid) for qid, pids in candidates.items() for pid in pids]
    rows = rows_of(data.index_of, [pid for _, pid in pairs])
    assert (rows >= 0).all()
    values = scorer.scores([queries[qid] for qid, _ in pairs], scorer.passages(data.passages, rows))
    scores: Run = {qid: {} for qid in candidates}
    for (qid, pid), value in zip(pairs, values.tolist(), strict=True):
        scores[qid][pid] = value
    return scores


def rerank_late_interaction(
    retriever: Retriever, data: RetrievalData, run: Run, depth: int,
    stored: TokenVectors | None = None,
) -> Run:  # fmt: skip
    """Re-score the top ``depth`` of each query by MaxSim; the rest follows in the old order."""
    candidates = {qid: top(scores, depth) for qid, scores in run.items()}
    return _merge(run, late_interaction_scores(retriever, data, data.queries, candidates, stored))


def rerank_cross_encoder(scorer: PairScorer, data: RetrievalData, run: Run, depth: int) -> Run:
    """Re-score the top ``depth`` of each query by the cross-encoder; the rest follows."""
    candidates = {qid: top(scores, depth) for qid, scores in run.items()}
    return _merge(run, cross_encoder_scores(scorer, data, data.queries, candidates))


def _merge(run: Run, reranked: Run) -> Run:
    """Reranked passages on top with their new scores, the others below in the old order."""
    merged: Run = {}
    for qid, old in run.items():
        new = reranked[qid]
        rest = [pid for pid in top(old, len(old)) if pid not in new]
        floor = min(new.values(), default=0.0)
        merged[qid] = new | {pid: floor - 1.0 - i for i, pid in enumerate(rest)}
    return merged


def _pad(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Token vectors of several passages to ``[P, longest, dim]`` in fp32, and their mask."""
    padded = pad_sequence([s.float() for s in sequences], batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences])
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
