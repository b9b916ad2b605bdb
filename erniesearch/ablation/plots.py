"""Two pictures of an ablation: differences by seed, and the course of the losses."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from erniesearch.ablation.arms import final_result
from erniesearch.ablation.grid import Grid
from erniesearch.ablation.results import Results
from erniesearch.report.charts import Interval, draw_forest


def plot_differences(results: Results, path: Path) -> None:
    """One row an arm: a dot for every seed's difference to its control, the mean over seeds with
    its 95 % interval, and a line at 0."""
    rows = [
        Interval(c.arm if c.control == results.control else f"{c.arm} (to {c.control})",
                 c.difference, c.low, c.high, tuple(c.per_seed.values()))
        for c in results.comparisons
    ]  # fmt: skip
    figure = Figure(figsize=(7, 1.2 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    draw_forest(axes, rows, True, ("0.55", "black", "tab:blue"))
    metric = results.comparisons[0].metric if rows else ""
    axes.set_xlabel(f"{metric}, difference to {results.control}; dots: seeds; bar: 95 % interval")
    axes.set_title(f"{results.dataset}, {results.split}: {results.num_queries} queries")
    figure.savefig(path, dpi=130)


def plot_curves(grid: Grid, path: Path) -> None:
    """The loss of every arm's last stage over its updates (first seed), smoothed: on the
    validation split where it was measured, else in training."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for arm in grid.arms.values():
        step, result = final_result(grid, grid.config(arm, arm.seeds[0]))
        folder = result / "stages" / step
        validated = folder / "validation.jsonl"
        source = validated if validated.is_file() else folder / "metrics.jsonl"
        lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        points = [(line["step"], line["loss"]) for line in lines if line["loss"] is not None]
        smooth, curve = None, []
        for _, loss in points:
            smooth = loss if smooth is None else 0.9 * smooth + 0.1 * loss
            curve.append(loss if source is validated else smooth)
        axes.plot([step for step, _ in points], curve, label=arm.name, linewidth=1.2)
    axes.set_xlabel("updates of the last stage")
    axes.set_ylabel("loss (of each arm's own terms)")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=130)
