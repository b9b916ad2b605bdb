"""Metrics by name: the field's names onto ir-measures, and the answer-string recall A@k.

    MRR@10  nDCG@10  R@100  success@5  P@10  MAP    upper or lower case alike
    A@20 or answer@20                               answer-string recall (evaluation/answers.py)

Any other name is taken as ir-measures spells it, for example ``R(rel=2)@10``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import ir_measures
import numpy as np
from ir_measures import AP, RR, P, R, Success, nDCG

from erniesearch.data.collection import Run
from erniesearch.errors import UserError

DEFAULT_METRICS = "MRR@10,nDCG@10,R@10,R@100"
Mean = Literal["qrels", "run"]
_NAMES: dict[str, tuple[str, Any]] = {
    "mrr": ("MRR", RR), "rr": ("MRR", RR), "ndcg": ("nDCG", nDCG), "r": ("R", R),
    "recall": ("R", R), "success": ("success", Success), "p": ("P", P), "map": ("MAP", AP),
}  # fmt: skip
_WITHOUT_CUTOFF = ("MRR", "MAP", "nDCG")


class Answers(Protocol):
    """Answer-string recall of the queries."""

    def per_query(self, run: Run, qids: list[str], depth: int) -> np.ndarray:
        """``[num_queries]``."""


@dataclass(frozen=True)
class Metric:
    """One column: its name, the depth of the run it looks at (None: all of it), and the measure
    (None: answer-string recall)."""

    name: str
    cutoff: int | None
    measure: Any


def parse_metrics(names: str, option: str = "--metrics") -> list[Metric]:
    """Metrics from names separated by commas; errors name the ``option`` that they come from.

    Raises:
        UserError: for a name that is unknown, stands twice or misses its cutoff.
    """
    metrics = [_parse(name.strip(), option) for name in names.split(",") if name.strip()]
    if not metrics:
        raise UserError(f"{option} {names!r}: no metric; for example {DEFAULT_METRICS}")
    listed = [metric.name for metric in metrics]
    for name in listed:
        if listed.count(name) > 1:
            raise UserError(f"{option}: {name} stands twice")
    return metrics


def _parse(name: str, option: str) -> Metric:
    plain = re.fullmatch(r"([A-Za-z]+)(?:@(\d+))?", name)
    base, cutoff = (plain[1].lower(), plain[2]) if plain else ("", None)
    if cutoff is not None and int(cutoff) < 1:
        raise UserError(f"{option} {name}: the cutoff must be 1 or more")
    if base in ("a", "answer"):
        if cutoff is None:
            raise UserError(f"{option} {name}: give a cutoff, for example A@20")
        return Metric(f"A@{cutoff}", int(cutoff), None)
    if base in _NAMES:
        label, measure = _NAMES[base]
        if cutoff is None and label not in _WITHOUT_CUTOFF:
            raise UserError(f"{option} {name}: give a cutoff, for example {label}@10")
        if cutoff is None:
            return Metric(label, None, measure)
        return Metric(f"{label}@{cutoff}", int(cutoff), measure @ int(cutoff))
    try:
        measure = ir_measures.parse_measure(name)
        supported = any(p.is_available() and p.supports(measure)
                        for p in ir_measures.DefaultPipeline.providers)  # fmt: skip
    except (NameError, ValueError, TypeError, KeyError, AssertionError):
        supported = False
    if not supported:
        raise UserError(
            f"{option} {name}: unknown; known are MRR, nDCG, R, success, P, MAP, A (answer"
            " strings), each as NAME@K, and the names of ir-measures"
        )
    return Metric(name, measure.params.get("cutoff"), measure)


def averaged_queries(
    runs: Iterable[Run], qrels: dict[str, dict[str, int]], mean: Mean
) -> list[str]:
    """The queries that the mean goes over.

    ``qrels``: all queries of the qrels, those without results as 0 (MS MARCO's evaluation).
    ``run``: the queries of the qrels that have results in every run (trec_eval without ``-c``).
    """
    runs = list(runs)
    if mean == "qrels":
        return list(qrels)
    return [qid for qid in qrels if all(run.get(qid) for run in runs)]


def per_query(
    run: Run,
    qrels: dict[str, dict[str, int]],
    qids: list[str],
    metrics: list[Metric],
    answers: Answers | None = None,
) -> dict[str, np.ndarray]:
    """Each metric's value for each of ``qids``, ``[num_queries]``; without results it is 0."""
    by_measure = {metric.measure: metric.name for metric in metrics if metric.measure is not None}
    values = {name: dict.fromkeys(qids, 0.0) for name in by_measure.values()}
    judged = {qid: qrels[qid] for qid in qids}
    if by_measure:
        for result in ir_measures.iter_calc(list(by_measure), judged, run):
            values[by_measure[result.measure]][result.query_id] = result.value
    out = {}
    for metric in metrics:
        if metric.measure is None:
            assert answers is not None
            assert metric.cutoff is not None
            out[metric.name] = answers.per_query(run, qids, metric.cutoff)
        else:
            out[metric.name] = np.array(list(values[metric.name].values()))
    return out
