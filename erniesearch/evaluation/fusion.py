"""Reciprocal rank fusion of runs (Cormack, Clarke and Büttcher, SIGIR 2009).

    score(q, d) = sum over runs of  1 / (k + rank of d in the run)

Ranks count from 1; a passage that a run did not retrieve gets nothing from it. Only ranks are
read, so that scores of different kinds need no common scale.
"""

from collections import defaultdict
from collections.abc import Sequence

from erniesearch.data.collection import Run
from erniesearch.retrieval.ranking import top


def reciprocal_rank_fusion(runs: Sequence[Run], depth: int, k: int = 60) -> Run:
    """The ``depth`` best passages of each query that any of the runs has.

    Args:
        runs: their passages' scores by query; each is ranked by score, equal ones by pid.
        k: the source's constant; the larger, the less the top ranks dominate.
    """
    fused: Run = {}
    for qid in dict.fromkeys(qid for run in runs for qid in run):
        scores: dict[str, float] = defaultdict(float)
        for run in runs:
            found = run.get(qid, {})
            for rank, pid in enumerate(top(found, len(found)), 1):
                scores[pid] += 1 / (k + rank)
        fused[qid] = {pid: scores[pid] for pid in top(scores, depth)}
    return fused
