"""The same systems on several data sets, and their macro average (BEIR, NanoBEIR)."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from erniesearch.evaluation.measures import RESAMPLES, Estimate
from erniesearch.evaluation.table import Row, show_table
from erniesearch.files import write_atomically

if TYPE_CHECKING:
    from erniesearch.evaluation.evaluate import Evaluation

MACRO = "macro average"


@dataclass(frozen=True)
class SeveralSets:
    """An evaluation of each data set, and a row of macro averages for each system."""

    datasets: list["Evaluation"]
    macro_average: list[Row]

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        write_atomically(path, json.dumps(asdict(self), indent=2) + "\n")

    def show(self, out: Console) -> None:
        """Print a table for each system, a row for each data set, the macro average last."""
        for found in self.datasets:
            out.print(found.caption, soft_wrap=True, markup=False, highlight=False)
        for position, average in enumerate(self.macro_average):
            rows = [Row(found.dataset, "", found.rows[position].metrics) for found in self.datasets]
            title = f"\n{average.name}: {MACRO} over {len(rows)} sets, every set counting the same"
            show_table(out, title, [*rows, Row(MACRO, "", average.metrics)])


def macro_rows(values: list[dict[str, dict[str, np.ndarray]]], seed: int) -> list[Row]:
    """A row for each system.

    Args:
        values: of every data set, by system and metric, ``[num_queries]`` of that set.
    """
    return [
        Row(name, "", {metric: macro_estimate([of_set[name][metric] for of_set in values], seed)
                       for metric in values[0][name]})
        for name in values[0]
    ]  # fmt: skip


def macro_estimate(sets: list[np.ndarray], seed: int) -> Estimate:
    """The mean over sets of the mean over queries, and its percentile bootstrap: queries are
    resampled within their sets, which stay the same (a statement about these sets, and not about
    others). For one set it is :func:`measures.estimate`."""
    rng = np.random.default_rng([seed, 5])
    means = []
    for values in sets:
        picks = rng.integers(len(values), size=(RESAMPLES, len(values)))
        means.append(values[picks].mean(1))
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return Estimate(float(np.mean([values.mean() for values in sets])), float(low), float(high))
