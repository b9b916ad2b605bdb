"""Paired comparison of two systems over queries that are not independent.

Questions about one passage rise and fall together, so the passage is the unit that is resampled
(a cluster: queries connected by shared relevant passages). With d the differences by query,

    interval         percentile bootstrap over clusters of  sum(d) / number of queries
    randomisation    the sign of all of a cluster's d is flipped together; two-sided p

Holm's correction (1979) holds the chance of one false finding among several comparisons at 5 %.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

RESAMPLES = 9_999
_BLOCK = 20_000_000


@dataclass(frozen=True)
class Difference:
    """Mean difference, its 95 % interval, and the randomisation test's two-sided p."""

    difference: float
    low: float
    high: float
    p: float


def clusters_of(qrels: dict[str, dict[str, int]]) -> np.ndarray:
    """The cluster of each query of the qrels, ``[num_queries]`` in their order: queries that share
    a relevant passage, directly or through others, have the same number."""
    nodes: dict[str, int] = {}  # passages, after the queries
    edges = [
        (query, nodes.setdefault(pid, len(qrels) + len(nodes)))
        for query, grades in enumerate(qrels.values()) for pid, grade in grades.items() if grade > 0
    ]  # fmt: skip
    size = len(qrels) + len(nodes)
    pairs = np.array(edges, dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs)), pairs.T), (size, size))
    return connected_components(graph, directed=False)[1][: len(qrels)]


def difference(
    values: np.ndarray, baseline: np.ndarray, clusters: np.ndarray, seed: int = 42
) -> Difference:
    """Compare ``values`` with ``baseline``, all ``[num_queries]`` in the same order."""
    assert values.shape == baseline.shape == clusters.shape
    apart = np.asarray(values, dtype=np.float64) - baseline
    sums, counts = np.bincount(clusters, apart), np.bincount(clusters)
    mean = float(apart.mean())
    if not apart.any():
        return Difference(0.0, 0.0, 0.0, 1.0)
    if len(sums) < 2:
        return Difference(mean, float("-inf"), float("inf"), 1.0)
    batch = max(1, _BLOCK // len(sums))
    interval = stats.bootstrap(
        (sums, counts), lambda s, n, axis: s.sum(axis) / n.sum(axis), paired=True,
        method="percentile", n_resamples=RESAMPLES, batch=batch,
        rng=np.random.default_rng([seed, 9]),
    ).confidence_interval  # fmt: skip
    flips = stats.permutation_test(
        (sums,), lambda s, axis: s.sum(axis), permutation_type="samples",
        n_resamples=RESAMPLES, batch=batch, rng=np.random.default_rng([seed, 10]),
    )  # fmt: skip
    return Difference(mean, float(interval.low), float(interval.high), float(flips.pvalue))


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
