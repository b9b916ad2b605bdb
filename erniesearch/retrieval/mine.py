"""Hard negatives by the current dual-encoder, denoised by the teacher.

A candidate that the teacher scores above the positive (minus a margin) is more likely an
unlabelled answer than a negative (RocketQA's denoising, with the positive as the threshold, since
a listwise-trained teacher's scores have no absolute scale).
"""

from dataclasses import dataclass

import numpy as np

from erniesearch.config import MineConfig
from erniesearch.data.formats import RetrievalData
from erniesearch.retrieval.encode import PairScorer, Retriever
from erniesearch.retrieval.index import VectorIndex


@dataclass(frozen=True)
class Mined:
    """Negatives by query (hardest first) and counts for the report."""

    negatives: dict[str, list[str]]
    num_candidates: int
    num_denoised: int


def mine_negatives(
    data: RetrievalData,
    retriever: Retriever,
    scorer: PairScorer | None,
    settings: MineConfig,
    seed: int,
) -> Mined:
    """Retrieve ``settings.depth`` candidates per training query and filter them.

    Relevant passages never become negatives. Queries that keep none stay in the result with an
    empty list (the sampler fills their groups with random passages).
    """
    relevant = data.relevant()
    qids = list(relevant)
    if settings.max_queries is not None and settings.max_queries < len(qids):
        drawn = np.random.default_rng([seed, 7]).permutation(len(qids))[: settings.max_queries]
        qids = [qids[i] for i in sorted(drawn)]
    index = VectorIndex.build(retriever.vectors(data.passages, "passage"), data.pids)
    query_vectors = retriever.vectors([data.queries[qid] for qid in qids], "query")
    deepest = settings.depth + max(len(relevant[qid]) for qid in qids)
    rows, _ = index.search(query_vectors, deepest)
    candidates = {
        qid: [r for r in query_rows if data.pids[r] not in set(relevant[qid])][
            settings.skip_top : settings.depth
        ]
        for qid, query_rows in zip(qids, rows.tolist(), strict=True)
    }
    num_candidates = sum(map(len, candidates.values()))
    num_denoised = 0
    if scorer is not None and settings.denoise_margin is not None:
        kept = _denoise(data, relevant, candidates, scorer, settings)
        num_denoised = num_candidates - sum(map(len, kept.values()))
        candidates = kept
    negatives = {
        qid: [data.pids[row] for row in rows_kept[: settings.num_negatives]]
        for qid, rows_kept in candidates.items()
    }
    return Mined(negatives, num_candidates, num_denoised)


def _denoise(
    data: RetrievalData,
    relevant: dict[str, list[str]],
    candidates: dict[str, list[int]],
    scorer: PairScorer,
    settings: MineConfig,
) -> dict[str, list[int]]:
    """Drop candidates that the teacher scores above the best positive minus the margin."""
    assert settings.denoise_margin is not None
    index_of = data.index_of
    pairs = [
        (qid, row)
        for qid, rows in candidates.items()
        for row in [*(index_of[pid] for pid in relevant[qid]), *rows]
    ]
    scores = scorer.scores(
        [data.queries[qid] for qid, _ in pairs], [data.passages[row] for _, row in pairs]
    )
    score_of = dict(zip(pairs, scores.tolist(), strict=True))
    kept = {}
    for qid, rows in candidates.items():
        threshold = max(score_of[qid, index_of[pid]] for pid in relevant[qid])
        threshold -= settings.denoise_margin
        kept[qid] = [row for row in rows if score_of[qid, row] <= threshold]
    return kept
