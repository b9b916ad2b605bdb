"""The table at the end of a run, for the terminal and for ``summary.md``."""

import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from erniesearch.errors import UserError
from erniesearch.evaluation.measures import Estimate
from erniesearch.evaluation.teacher_check import TeacherCheck
from erniesearch.files import write_atomically


@dataclass(frozen=True)
class Row:
    """One system: what it is, its run file, its metrics."""

    name: str
    run_file: str
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class Report:
    """What ``evaluation.json`` holds; ``teacher_check`` is None where nothing was measured."""

    dataset: str
    split: str
    num_queries: int
    num_passages: int
    rerank_depth: int
    machine: dict[str, object]
    stages: dict[str, dict[str, float]]
    rows: list[Row]
    teacher_check: TeacherCheck | None = None

    def save(self, root: Path) -> None:
        """Write ``evaluation.json`` and ``summary.md``."""
        write_atomically(root / "evaluation.json", json.dumps(asdict(self), indent=2) + "\n")
        write_atomically(root / "summary.md", self.markdown())

    @classmethod
    def load(cls, root: Path) -> "Report":
        """Read ``evaluation.json``.

        Raises:
            UserError: if the run has not been evaluated.
        """
        path = root / "evaluation.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file; `erniesearch run` writes it at its end")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            raise UserError(f"{path}: damaged; `erniesearch run` writes it again") from None
        rows = [
            Row(row["name"], row["run_file"],
                {name: Estimate(**value) for name, value in row["metrics"].items()})
            for row in content.pop("rows")
        ]  # fmt: skip
        if (check := content.pop("teacher_check", None)) is not None:
            content["teacher_check"] = TeacherCheck.from_facts(check)
        return cls(rows=rows, **content)

    @property
    def caption(self) -> str:
        """What was measured on what."""
        return (
            f"{self.dataset}, {self.split}: {self.num_queries} queries, {self.num_passages}"
            f" passages; late interaction and cross-encoder rerank the dual-encoder's top"
            f" {self.rerank_depth}; bootstrap intervals of 95 % over queries"
        )

    def table(self) -> str:
        """The rows as a Markdown table."""
        return markdown_table(self.rows)

    def for_card(self) -> str:
        """Caption and table, for a model card."""
        return f"{self.caption}.\n\n{self.table()}"

    def markdown(self) -> str:
        """The summary: table, stages, machine, where the files are."""
        lines = ["# Summary", "", self.caption + ".", "", self.table()]
        lines += ["Machine: " + ", ".join(f"{k} {v}" for k, v in self.machine.items()) + "."]
        if self.teacher_check is not None:
            lines += ["", "## Before the cascade: what its teachers gain", ""]
            lines += [self.teacher_check.caption + ".", ""]
            lines += [f"- {line}" for line in self.teacher_check.lines()]
            lines += [f"\nWarning: {warning}." for warning in self.teacher_check.warnings()]
        lines += ["", "## Stages", "", "| stage | updates | seconds training | last loss |",
                  "|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| {name} | {facts['steps']:.0f} | {facts['seconds']:.0f} | {facts['loss']:.3f} |"
            for name, facts in self.stages.items()
        ]
        lines += ["", "## Files", ""]
        lines += [f"- `{row.run_file}`: TREC run of *{row.name}*" for row in self.rows]
        lines += [
            "- `exports/`: folders for sentence-transformers, PyLate and transformers",
            "- `index/`: FAISS index of the whole corpus by the last dual-encoder",
            "- `stages/NAME/metrics.jsonl`, `stages/NAME/tensorboard`: every loss term",
            "- `config.yaml`: the resolved configuration",
        ]
        return "\n".join(lines) + "\n"

    def show(self, console: Console) -> None:
        """Print the table, and what the cascade's teachers gained."""
        show_table(console, self.caption, self.rows)
        if self.teacher_check is not None:
            for line in (self.teacher_check.caption + ":", *self.teacher_check.lines()):
                console.print(line, soft_wrap=True, markup=False)
            for warning in self.teacher_check.warnings():
                console.print(f"warning: {warning}", soft_wrap=True, markup=False)


def markdown_table(rows: list[Row]) -> str:
    """Mean and interval of every metric of the rows, as a Markdown table."""
    names = list(rows[0].metrics)
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in row.metrics.values()]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def show_table(console: Console, title: str, rows: list[Row]) -> None:
    """Print mean and half the interval of every metric of the rows."""
    cells = {
        row.name: [f"{e.mean:.3f} ±{(e.high - e.low) / 2:.3f}" for e in row.metrics.values()]
        for row in rows
    }
    show_cells(console, title, list(rows[0].metrics), cells)


def show_cells(
    console: Console, title: str, columns: list[str], cells: dict[str, list[str]]
) -> None:
    """Print a table with named rows under a title; no cell is shortened."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in cells.items():
        table.add_row(escape(name), *row)
    unbounded = console.options.update(max_width=10_000)
    console.width = max(console.width, Measurement.get(console, unbounded, table).maximum)
    console.print(escape(title), soft_wrap=True)
    console.print(table, crop=False)


def describe_machine() -> dict[str, object]:
    """Processor, GPUs and versions that a figure depends on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    facts: dict[str, object] = {"CPU": cpu, "cores": os.cpu_count()}
    if torch.cuda.is_available():
        facts["GPU"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return facts | {"Python": platform.python_version(), "torch": torch.__version__}


def table_console() -> Console:
    """Standard output, wide enough for the table when it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=110)


def stage_facts(folder: Path) -> dict[str, float]:
    """Updates, seconds and last loss from a stage's ``metrics.jsonl``."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {
        "steps": records[-1]["step"],
        "seconds": sum(record["speed"]["seconds"] for record in records),
        # Null where an update was skipped because its loss was not finite.
        "loss": next((r["loss"] for r in reversed(records) if r["loss"] is not None), math.nan),
    }
