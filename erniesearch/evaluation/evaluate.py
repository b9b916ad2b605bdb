"""``erniesearch evaluate``: any models and TREC runs on any set in BEIR layout, in one table."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from rich.console import Console

from erniesearch.config.options import EvaluateOptions
from erniesearch.data.collection import RetrievalData, Run, load_beir
from erniesearch.data.ranking_metrics import (
    Mean,
    Metric,
    averaged_queries,
    parse_metrics,
    per_query,
)
from erniesearch.data.trec import write_trec_run
from erniesearch.errors import UserError
from erniesearch.evaluation import systems
from erniesearch.evaluation.answers import AnswerRecall, read_answers
from erniesearch.evaluation.macro import SeveralSets, macro_rows
from erniesearch.evaluation.measures import estimate
from erniesearch.evaluation.significance import Comparison, compare
from erniesearch.evaluation.table import Row, describe_machine, show_cells, show_table
from erniesearch.files import write_atomically


@dataclass(frozen=True)
class Evaluation:
    """The table and what it was made from; ``comparisons`` are with the first row."""

    dataset: str
    split: str
    num_passages: int
    num_judged: int
    num_queries: int
    mean: Mean
    depth: int | None
    seed: int
    machine: dict[str, object]
    rows: list[Row]
    comparisons: dict[str, dict[str, Comparison]]

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        write_atomically(path, json.dumps(asdict(self), indent=2) + "\n")

    @property
    def caption(self) -> str:
        """What was measured on what, and what the mean goes over."""
        queries = (
            f"means over all {self.num_queries} queries of the qrels, without results as 0 (MS"
            " MARCO's way)"
            if self.mean == "qrels"
            else f"means over the {self.num_queries} of {self.num_judged} queries of the qrels that"
            " have results (trec_eval's way)"
        )
        return (
            f"{self.dataset}, {self.split}: {self.num_passages} passages; {queries}; bootstrap"
            " intervals of 95 % over queries"
        )

    def show(self, out: Console) -> None:
        """Print the table, and the differences to its first row where it has more than one."""
        show_table(out, self.caption, self.rows)
        if not self.comparisons:
            return
        title = (
            f"Difference to {self.rows[0].name}; two-sided p of the paired t-test / randomisation"
            f" test, n = {self.num_queries} queries, not corrected for several tests"
        )
        cells = {
            name: [f"{c.difference:+.3f} {_p(c.p_t_test)} / {_p(c.p_randomisation)}"
                   for c in of_row.values()]
            for name, of_row in self.comparisons.items()
        }  # fmt: skip
        show_cells(out, title, list(self.rows[0].metrics), cells)


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}"


Values = dict[str, dict[str, np.ndarray]]
"""By system and metric, ``[num_queries]``."""


def evaluate(options: EvaluateOptions) -> Evaluation | SeveralSets:
    """Make or read every system's run on every data set and measure it; ``run_out`` receives the
    last one's run.

    Raises:
        UserError: for bad data, runs or folders, before any model is loaded.
    """
    systems.check(options)
    metrics = parse_metrics(options.metrics)
    deepest = max((metric.cutoff or 0 for metric in metrics), default=0)
    if options.model and deepest > options.depth:
        raise UserError(
            f"--depth {options.depth}: the metrics look at {deepest} passages; give --depth"
            f" {deepest} or more"
        )
    roots = _dataset_names(options.data)
    collections = {name: _collection(root, options, metrics) for name, root in roots.items()}
    found, values = [], []
    for name, data in collections.items():
        runs = systems.make_runs(options, data)
        if options.run_out:
            last = list(runs)[-1]
            write_trec_run(Path(options.run_out), runs[last], last.replace(" ", "_"))
        measured = _measure(options, roots[name], data, runs, metrics)
        found.append(replace(measured[0], dataset=name))
        values.append(measured[1])
    return found[0] if len(found) == 1 else SeveralSets(found, macro_rows(values, options.seed))


def _dataset_names(folders: list[str]) -> dict[str, Path]:
    """The folders by their own names, by their paths where two have the same."""
    own = [Path(folder).resolve().name for folder in folders]
    return {name if own.count(name) == 1 else folder: Path(folder)
            for name, folder in zip(own, folders, strict=True)}  # fmt: skip


def _collection(root: Path, options: EvaluateOptions, metrics: list[Metric]) -> RetrievalData:
    """The collection with the judged queries alone."""
    data = load_beir(root, options.split, options.use_titles)
    if any(metric.measure is None for metric in metrics):
        read_answers(root / "queries.jsonl", data.qrels)
    return replace(data, queries={qid: data.queries[qid] for qid in data.qrels})


def _measure(
    options: EvaluateOptions,
    root: Path,
    data: RetrievalData,
    runs: dict[str, Run],
    metrics: list[Metric],
) -> tuple[Evaluation, Values]:
    seed, mean = options.seed, cast(Mean, options.mean)
    qids = averaged_queries(runs.values(), data.qrels, mean)
    if not qids:
        raise UserError("--mean run: no query has results in every run; take --mean qrels")
    answers = None
    if depths := [m.cutoff or 0 for m in metrics if m.measure is None]:
        answers = AnswerRecall.read(root, qids, runs.values(), max(depths))
    values = {name: per_query(run, data.qrels, qids, metrics, answers)
              for name, run in runs.items()}  # fmt: skip
    name_of = systems.names(options)
    files = {name_of[path]: path for path in options.trec}
    rows = [
        Row(name, files.get(name, ""), {m: estimate(v, seed) for m, v in of_run.items()})
        for name, of_run in values.items()
    ]
    first = rows[0].name
    comparisons = {
        row.name: {m: compare(v, values[first][m], seed) for m, v in values[row.name].items()}
        for row in rows[1:]
        if len(qids) > 1
    }
    evaluation = Evaluation(
        root.resolve().name, options.split, len(data.pids), len(data.qrels), len(qids), mean,
        options.depth if options.model else None, seed, describe_machine(), rows, comparisons,
    )  # fmt: skip
    return evaluation, values
