"""Random rankings."""

import numpy as np

from erniesearch.data.collection import Run

Qrels = dict[str, dict[str, int]]


def random_run(seed: int = 0) -> tuple[Run, Qrels]:
    """150 candidates a query with many equal scores, graded qrels, one query without results."""
    rng = np.random.default_rng(seed)
    qrels: Qrels = {}
    run: Run = {}
    for q in range(20):
        pids = [f"p{i}" for i in rng.permutation(200)[:150]]
        scores = np.round(rng.normal(size=150), 1).astype(np.float32)
        run[f"q{q}"] = {pid: float(score) for pid, score in zip(pids, scores, strict=True)}
        judged = rng.permutation(200)[:6]
        qrels[f"q{q}"] = {f"p{i}": int(g) for i, g in zip(judged, (1, 1, 2, 3, 0, 0), strict=True)}
    del run["q7"]
    return run, qrels
