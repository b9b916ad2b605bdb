"""Time and memory by step."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from erniesearch.progress import duration
from erniesearch.report.charts import bars
from erniesearch.report.document import Table, Text
from erniesearch.report.run_files import Step


def costs_blocks(steps: Mapping[str, Step]) -> list[Any]:
    """A row for each step, and a chart of the seconds."""
    rows, whole = [], {}
    for step in steps.values():
        seconds, log = step.wall_seconds, step.metrics
        trained = float(np.nansum(log.figures.get("speed/seconds", np.empty(0))))
        if seconds is not None:
            whole[step.name] = seconds
        memory = [step.cost(f"peak_{kind}memory_bytes") for kind in ("", "gpu_")]
        rows.append([
            step.name, step.state, str(log.steps[-1]) if len(log) else "",
            duration(seconds) if seconds is not None else "",
            duration(trained) if len(log) else "",
            _median(step, "queries_per_second"), _median(step, "tokens_per_second"),
            *("" if size is None else f"{size / 2**20:,.0f}" for size in memory),
        ])  # fmt: skip
    if not rows:
        return []
    if whole:
        rows.append(["all steps done", "", "", duration(sum(whole.values())), *[""] * 5])
    columns = ["step", "state", "updates", "from beginning to end", "in updates",
               "queries a second", "tokens a second", "peak MiB", "peak GPU MiB"]  # fmt: skip
    table = Table("Time and memory; speeds are medians over the log", columns, rows)
    blocks: list[Any] = [table]
    if any(step.cost("seconds") is None for step in steps.values() if step.done is not None):
        blocks.append(Text("Where a step has left no costs.json, its time is that between"
                           " started.json and done.json, pauses included."))  # fmt: skip
    blocks.append(Text("Memory is that of rank 0's process, the one that finished the step."))
    minutes = {name: round(seconds / 60, 2) for name, seconds in whole.items()}
    if chart := bars("Time by step", minutes, "minutes"):
        blocks.append(chart)
    return blocks


def _median(step: Step, name: str) -> str:
    values = step.metrics.figures.get(f"speed/{name}", np.empty(0))
    values = values[np.isfinite(values)]
    return f"{np.median(values):,.1f}" if len(values) else ""
