"""Search and rerank: dual-encoder by FAISS, then late interaction or cross-encoder."""

import torch
from erniesearch_kernels import maxsim
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from erniesearch.data.formats import RetrievalData, Run
from erniesearch.retrieval.encode import PairScorer, Retriever
from erniesearch.retrieval.index import VectorIndex


def dense_run(retriever: Retriever, index: VectorIndex, queries: dict[str, str], depth: int) -> Run:
    """The ``depth`` best passages of each query by inner product."""
    rows, scores = index.search(retriever.vectors(list(queries.values()), "query"), depth)
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


def rerank_late_interaction(retriever: Retriever, data: RetrievalData, run: Run, depth: int) -> Run:
    """Re-score the top ``depth`` of each query by MaxSim; the rest follows in the old order."""
    candidates = {qid: top(scores, depth) for qid, scores in run.items()}
    needed = sorted({pid for pids in candidates.values() for pid in pids})
    index_of = data.index_of
    encoded = retriever.tokens([data.passages[index_of[pid]] for pid in needed], "passage")
    tokens_of = dict(zip(needed, encoded, strict=True))
    queries = retriever.tokens([data.queries[qid] for qid in run], "query")
    new_scores: Run = {}
    for qid, query in zip(run, queries, strict=True):
        pids = candidates[qid]
        passages, mask = _pad([tokens_of[pid] for pid in pids])
        scores = maxsim(query.float()[None], passages, None, mask)[0]
        new_scores[qid] = dict(zip(pids, scores.tolist(), strict=True))
    return _merge(run, new_scores)


def rerank_cross_encoder(scorer: PairScorer, data: RetrievalData, run: Run, depth: int) -> Run:
    """Re-score the top ``depth`` of each query by the cross-encoder; the rest follows."""
    index_of = data.index_of
    pairs = [(qid, pid) for qid, scores in run.items() for pid in top(scores, depth)]
    scores = scorer.scores(
        [data.queries[qid] for qid, _ in pairs],
        [data.passages[index_of[pid]] for _, pid in pairs],
    )
    new_scores: Run = {qid: {} for qid in run}
    for (qid, pid), score in zip(pairs, scores.tolist(), strict=True):
        new_scores[qid][pid] = score
    return _merge(run, new_scores)


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
