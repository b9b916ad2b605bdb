"""A stage's update for any batch and number of ranks, and the largest batch that fits."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from erniesearch.planning.trace import StageTracer, Trace

MOST_CHUNKS, MOST_HOPS, MOST_TOKENS = 16, 32, 1 << 22
"""Chunks of gradient caching, hops of the ring and gathered tokens that are traced one by one.
Beyond, figures are continued: in the ranks they are linear, in the queries at most quadratic."""


class Estimator:
    """Traces of one stage, each made once."""

    def __init__(self, tracer: StageTracer) -> None:
        self.tracer = tracer
        self._known: dict[tuple[int, int, int], Trace] = {}

    def __call__(self, ranks: int, num_queries: int) -> Trace:
        """An update of ``num_queries`` per rank and micro-step."""
        stage = self.tracer.stage.settings
        most = None
        if stage.chunk_size:
            most = max(1, MOST_CHUNKS * stage.chunk_size // (1 + stage.num_negatives))
        if most is None or num_queries <= most:
            return self._of_ranks(ranks, num_queries)
        points = [max(1, most // 4), max(2, most // 2), max(3, most)]
        return continued(points, [self._of_ranks(ranks, point) for point in points], num_queries)

    def _of_ranks(self, ranks: int, num_queries: int) -> Trace:
        config, stage = self.tracer.stage.config, self.tracer.stage.settings
        if config.objective.late_interaction_exchange == "ring":
            most = MOST_HOPS
        else:
            own = num_queries * (1 + stage.num_negatives) * config.data.max_passage_length
            most = max(4, MOST_TOKENS // own)
        if ranks <= most:
            return self._trace(ranks, ranks, num_queries)
        worlds = [most // 2, most]
        return continued(worlds, [self._trace(ranks, w, num_queries) for w in worlds], ranks)

    def _trace(self, ranks: int, world_size: int, num_queries: int) -> Trace:
        key = (ranks, world_size, num_queries)
        if key not in self._known:
            self._known[key] = self.tracer.run(ranks, num_queries, world_size)
        return self._known[key]


MOST_QUERIES = 8192
"""Per rank; beyond, nobody asks."""


def largest_fitting(estimate: Estimator, ranks: int, limit: int, planned: int) -> int:
    """The most queries per rank whose update stays within ``limit`` bytes; 0 if one is too many,
    MOST_QUERIES if there may be more.

    Solved on the polynomials through three traces from ``planned`` queries on, and checked by
    tracing the answer and one more.
    """
    points = [planned, 4 * planned, 16 * planned]
    guess = 1
    for _ in range(3):
        traces = [estimate(ranks, point) for point in points]
        guess = largest_batch(partial(_continued_peak, points, traces), limit, points[-1])
        if (not guess or estimate(ranks, guess).peak <= limit) and (
            guess == MOST_QUERIES or estimate(ranks, guess + 1).peak > limit
        ):
            return guess
        points = sorted({*points, max(2, guess)})[-3:]
    return largest_batch(lambda num: estimate(ranks, num).peak, limit, guess)


def _continued_peak(points: list[int], traces: list[Trace], point: int) -> int:
    return continued(points, traces, point).peak


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
        phases={
            phase: figure([trace.phases[phase] for trace in traces]) for phase in traces[0].phases
        },
        flops=figure([trace.flops for trace in traces]),
        sent={kind: figure([trace.sent.get(kind, 0) for trace in traces]) for kind in kinds},
        continued=True,
    )


def largest_batch(peak: Callable[[int], int], limit: int, guess: int) -> int:
    """The most queries whose ``peak`` is within ``limit``; 0 if one is too many,
    MOST_QUERIES if there may be more. ``peak`` never falls."""
    room = float(limit - peak(1))  # at ``low``
    if room < 0:
        return 0
    low, high, probe = 1, MOST_QUERIES + 1, min(max(2, guess), MOST_QUERIES)
    lack = 0.0  # at ``high``
    while high - low > 1:
        over = peak(probe) - limit
        if over <= 0:
            slope = (over + room) / (probe - low)
            low, room, lack = probe, -over, lack / 2
        else:
            high, lack, room = probe, over, room / 2
        # Regula falsi, the bound that stays counting half (Illinois); without one, along the slope.
        if lack:
            probe = low + int((high - low) * room / (room + lack))
        else:
            probe = low + int(room / slope) if slope > 0 else 4 * low
        probe = min(high - 1, max(low + 1, probe))
    return low
