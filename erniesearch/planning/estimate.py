"""A stage's update for any batch and number of ranks, and the largest batch that fits."""

from collections.abc import Callable
from dataclasses import replace

from erniesearch.planning.trace import StageTracer, Trace

MOST_CHUNKS, MOST_HOPS = 48, 32
"""Chunks of gradient caching and hops of the ring that are traced one by one. Beyond, figures are
continued: in the hops they are linear, in the queries at most quadratic."""


class Estimator:
    """Traces of one stage, each made once."""

    def __init__(self, tracer: StageTracer) -> None:
        self.tracer = tracer
        self._known: dict[tuple[int, int, int], Trace] = {}

    def __call__(self, ranks: int, num_queries: int) -> Trace:
        """An update of ``num_queries`` per rank and micro-step."""
        stage = self.tracer.stage
        most = None
        if stage.chunk_size:
            most = max(1, MOST_CHUNKS * stage.chunk_size // (1 + stage.num_negatives))
        if most is None or num_queries <= most:
            return self._of_ranks(ranks, num_queries)
        points = [max(1, most // 4), max(2, most // 2), max(3, most)]
        return continued(
            points, [self._of_ranks(ranks, point) for point in points], num_queries
        )

    def _of_ranks(self, ranks: int, num_queries: int) -> Trace:
        objective = self.tracer.config.objective
        if objective.late_interaction_exchange == "all_gather" or ranks <= MOST_HOPS:
            return self._trace(ranks, ranks, num_queries)
        hops = [MOST_HOPS // 2, MOST_HOPS]
        return continued(hops, [self._trace(ranks, h, num_queries) for h in hops], ranks)

    def _trace(self, ranks: int, hops: int, num_queries: int) -> Trace:
        key = (ranks, hops, num_queries)
        if key not in self._known:
            self._known[key] = self.tracer.run(ranks, num_queries, world_size=hops)
        return self._known[key]


def continued(points: list[int], traces: list[Trace], point: int) -> Trace:
    """The polynomial through all figures of ``traces`` at ``points``, at ``point``."""

    def figure(values: list[int]) -> int:
        total = 0.0
        for i, value in enumerate(values):
            share = 1.0
            for j, other in enumerate(points):
                if j != i:
                    share *= (point - other) / (points[i] - other)
            total += share * value
        return round(total)

    kinds = {kind for trace in traces for kind in trace.sent}
    return replace(
        traces[-1],
        moving=figure([trace.moving for trace in traces]),
        flops=figure([trace.flops for trace in traces]),
        sent={kind: figure([trace.sent.get(kind, 0) for trace in traces]) for kind in kinds},
        continued=True,
    )


def largest_batch(peak: Callable[[int], int], limit: int, guess: int, most: int = 8192) -> int:
    """The most queries whose ``peak`` is within ``limit``; 0 if one is too many, ``most`` if there
    may be more. ``peak`` never falls, and is not far from linear: few calls suffice."""
    low, low_peak = 1, peak(1)
    if low_peak > limit:
        return 0
    high = high_peak = None
    probe = max(2, guess)
    while high is None or high - low > 1:
        if low >= most:
            return most
        found = peak(probe)
        if found > limit:
            high, high_peak = probe, found
        else:
            slope = max(1.0, (found - low_peak) / (probe - low))
            low, low_peak = probe, found
        if high is None or high_peak is None:
            probe = min(most, max(low + 1, low + int((limit - low_peak) / slope)))
        else:
            slope = (high_peak - low_peak) / (high - low)
            # Between the two, and next to one of them once the answer is near.
            probe = low + int((limit - low_peak) / slope)
            probe = min(high - 1, max(low + 1, probe))
    return low
