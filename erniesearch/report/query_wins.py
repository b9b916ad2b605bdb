"""Where a system gains and loses against a baseline, query by query, with the texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from erniesearch.data.collection import RetrievalData, load_beir
from erniesearch.data.corpus.texts import rows_of, take
from erniesearch.data.ranking_metrics import per_query
from erniesearch.data.trec import ranked_passages, read_trec_run
from erniesearch.errors import UserError
from erniesearch.evaluation.measures import METRICS, estimate
from erniesearch.evaluation.query_metrics import Values, read_query_metrics
from erniesearch.evaluation.significance import compare
from erniesearch.evaluation.table import Row
from erniesearch.report.document import Card, Ranking, Table, clipped

MOST_RESAMPLED = 5_000
"""Queries; of more, the t distribution says the same and costs nothing."""
MOST_BYTES = 300 << 20
"""Of runs that are read whole, where no metrics by query have been kept."""
EACH_WAY = 6
SHOWN, DEPTH = 3, 100
TEXT = 280


@dataclass(frozen=True)
class Paired:
    """A system against the baseline on the same queries."""

    difference: float
    low: float
    high: float
    p: float
    wins: int
    ties: int
    losses: int


def paired(values: np.ndarray, baseline: np.ndarray, seed: int) -> Paired:
    """Differences by query, both ``[num_queries]``: mean with a 95 % interval (bootstrap) and
    two-sided p (randomisation test), by the t distribution beyond :data:`MOST_RESAMPLED`."""
    apart = values - baseline
    counts = (int((apart > 0).sum()), int((apart == 0).sum()), int((apart < 0).sum()))
    if not apart.any() or len(apart) < 2:
        mean = float(apart.mean())
        return Paired(mean, mean, mean, 1.0, *counts)
    if len(apart) > MOST_RESAMPLED:
        test = stats.ttest_1samp(apart, 0.0)
        low, high = test.confidence_interval()
        return Paired(float(apart.mean()), float(low), float(high), float(test.pvalue), *counts)
    interval = estimate(apart, seed)
    p = compare(values, baseline, seed).p_randomisation
    return Paired(interval.mean, interval.low, interval.high, p, *counts)


def metrics_by_query(
    kept: Path, root: Path, rows: Sequence[Row], data: RetrievalData | None
) -> tuple[list[str], Values]:
    """Queries and the metrics of every row: as the evaluation has kept them, or from its runs.

    Args:
        data: the collection with the evaluated split, for the second way.

    Raises:
        UserError: if neither way is open.
    """
    if kept.is_file():
        return read_query_metrics(kept)
    files = [root / row.run_file for row in rows]
    if data is None or not all(path.is_file() for path in files):
        raise UserError(f"{kept}: not there, and runs or judgements are missing, too")
    if sum(path.stat().st_size for path in files) > MOST_BYTES:
        raise UserError(f"{kept}: not there, and the runs are too large to be read for a report")
    runs = {row.name: read_trec_run(path) for row, path in zip(rows, files, strict=True)}
    found = {qid for run in runs.values() for qid in run}
    qids = [qid for qid in data.qrels if qid in found]
    return qids, {name: per_query(run, data.qrels, qids, METRICS) for name, run in runs.items()}


def comparison_table(
    qids: list[str], values: Values, baseline: str, metric: str, seed: int
) -> Table:
    """Every system against the baseline."""
    rows = []
    for system, metrics in values.items():
        if system == baseline:
            continue
        found = paired(metrics[metric], values[baseline][metric], seed)
        interval = f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        p = "<.001" if found.p < 0.001 else f"{found.p:.3f}"
        rows.append(
            [system, interval, p, f"{found.wins:,}", f"{found.ties:,}", f"{found.losses:,}"]
        )
    how = ("bootstrap and randomisation test" if len(qids) <= MOST_RESAMPLED
           else "both by the t distribution")  # fmt: skip
    return Table(
        f"Difference in {metric} to “{baseline}” on the same {len(qids):,} queries, with a 95 %"
        f" interval and two-sided p ({how}), not corrected for several tests",
        ["", "difference", "p", "queries won", "tied", "lost"], rows,
    )  # fmt: skip


def collection(path: str, split: str, use_titles: bool) -> RetrievalData:
    """The run's collection with the evaluated split.

    Raises:
        UserError: if it is not there any more, or damaged.
    """
    if not (Path(path) / "corpus.jsonl").is_file():
        raise UserError(f"{path or 'data.path'}: no collection there from this folder")
    return load_beir(path, split, use_titles)


def wins_and_losses(
    qids: list[str], apart: np.ndarray, systems: tuple[Row, Row], root: Path, data: RetrievalData
) -> tuple[list[Card], list[Card]]:
    """The queries that the first system gains most on over the second, and those it loses most on.

    Args:
        apart: differences ``[num_queries]``.

    Raises:
        UserError: if a run cannot be read.
    """
    order = np.argsort(-apart, kind="stable")
    won = [int(i) for i in order[:EACH_WAY] if apart[i] > 0]
    lost = [int(i) for i in order[::-1][:EACH_WAY] if apart[i] < 0]
    wanted = {qids[i]: i / len(qids) for i in won + lost}
    rankings = [ranked_passages(root / row.run_file, wanted, DEPTH) for row in systems]
    needed = {pid for run in rankings for pids in run.values() for pid in pids[:SHOWN]}
    needed |= {pid for qid in wanted for pid in _relevant(data, qid)[:2]}
    names = [pid for pid, row in zip(needed, rows_of(data.index_of, list(needed)), strict=True)
             if row >= 0]  # fmt: skip
    texts = take(data.passages, rows_of(data.index_of, names))
    text_of = {pid: clipped(text, TEXT) for pid, text in zip(names, texts, strict=True)}

    def card(i: int) -> Card:
        qid = qids[i]
        relevant = _relevant(data, qid)
        return Card(
            clipped(qid, 120), clipped(data.queries.get(qid, ""), 400), f"{apart[i]:+.3f}",
            [(clipped(pid, 120), text_of.get(pid, "")) for pid in relevant[:2]],
            [_ranking(row.name, run.get(qid, []), relevant, text_of)
             for row, run in zip(systems, rankings, strict=True)],
        )  # fmt: skip

    return [card(i) for i in won], [card(i) for i in lost]


def _relevant(data: RetrievalData, qid: str) -> list[str]:
    return [pid for pid, grade in data.qrels.get(qid, {}).items() if grade > 0]


def _ranking(
    system: str, ranked: list[str], relevant: list[str], text_of: dict[str, str]
) -> Ranking:
    place = next((rank for rank, pid in enumerate(ranked, 1) if pid in relevant), None)
    found = f"first relevant passage at rank {place}" if place else f"none in the first {DEPTH}"
    shown = [(rank, clipped(pid, 120), text_of.get(pid, ""), pid in relevant)
             for rank, pid in enumerate(ranked[:SHOWN], 1)]  # fmt: skip
    return Ranking(system, found, shown)
