"""The report of a run, finished or going on, from the files in its folder alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from erniesearch.config.keys import TRAINING_STAGES
from erniesearch.data.collection import RetrievalData
from erniesearch.errors import UserError, nearest
from erniesearch.evaluation.measures import METRICS
from erniesearch.evaluation.table import Report, Row
from erniesearch.progress import duration
from erniesearch.report import query_wins
from erniesearch.report.charts import Interval, forest
from erniesearch.report.costs_section import costs_blocks
from erniesearch.report.document import Document, Fold, Preformatted, Section, Table, Text
from erniesearch.report.negatives_section import negatives_blocks
from erniesearch.report.run_files import (
    Notes,
    Step,
    dumps,
    read_json,
    read_settings,
    read_steps,
    read_text,
    setting,
)
from erniesearch.report.teaching_section import check_of, teaching_blocks
from erniesearch.report.training_section import stage_blocks
from erniesearch.run_folder import RunFolder

CONTROL = "dual-encoder, contrastive alone"
METRIC = METRICS[0].name


@dataclass(frozen=True)
class RunFiles:
    """What a run's folder holds now."""

    root: Path
    settings: dict[str, Any]
    steps: dict[str, Step]
    report: Report | None
    notes: Notes

    @classmethod
    def read(cls, root: Path) -> "RunFiles":
        """Read all but the logs' texts and runs."""
        notes = Notes()
        settings = read_settings(root / "config.yaml", notes)
        return cls(root, settings, read_steps(root, notes), _table(root, notes), notes)

    @property
    def finished(self) -> bool:
        """Whether every step that has begun is done, and the table is there."""
        return self.report is not None and all(s.done is not None for s in self.steps.values())

    @property
    def settled(self) -> bool:
        """Whether nothing follows: it has finished, and no step has been done again since it was
        evaluated."""
        times = {name: (step.folder / "done.json").stat().st_mtime
                 for name, step in self.steps.items() if step.done is not None}  # fmt: skip
        return self.finished and times.get("evaluate") == max(times.values())

    def planned_updates(self, stage: str) -> int:
        """``stages.NAME.steps``."""
        return int(setting(self.settings, f"stages.{stage}.steps", int, 0))

    def progress(self) -> str:
        """Where the run stands, in a line."""
        if self.finished:
            return "finished"
        open_ = [step for step in self.steps.values() if step.done is None and step.begun]
        if not open_:
            done = [name for name, step in self.steps.items() if step.done is not None]
            return f"{done[-1]} is done" if done else "nothing has begun"
        step = open_[-1]
        planned, log = self.planned_updates(step.name), step.metrics
        if step.name not in TRAINING_STAGES or not len(log):
            return f"{step.name} has begun"
        now = int(log.steps[-1])
        text = f"{step.name}, update {now:,}" + (f" of {planned:,}" if planned else "")
        speed = log.figures.get("speed/seconds", np.empty(0))
        if planned > now and np.isfinite(speed).any():
            text += (
                f", about {duration((planned - now) * float(np.nansum(speed)) / now)} left in it"
            )
        return text


def run_document(root: Path, baseline: str | None, reload_seconds: float | None) -> Document:
    """The report of a run's folder.

    Args:
        baseline: the table's row that the others are compared with; None chooses.
        reload_seconds: as :class:`Document`'s, while the run is not finished.

    Raises:
        UserError: for a baseline that the table has not.
    """
    run = RunFiles.read(root)
    if baseline is not None and run.report is not None:
        names = [row.name for row in run.report.rows]
        if baseline not in names:
            hint = nearest(baseline, names) or f"; it has {', '.join(names)}"
            raise UserError(f"--baseline {baseline}: no row of {root}'s table{hint}")
    check = run.report.teacher_check if run.report else None
    makers: dict[str, Callable[[], list[Any]]] = {
        "Results": lambda: _results(run),
        "Is there anything to distil?": lambda: teaching_blocks(
            run.steps, check or check_of(run.steps, run.notes)
        ),
        "Training": lambda: _training(run),
        "Negatives": lambda: negatives_blocks(run.steps, run.notes),
        "Queries won and lost": lambda: _queries(run, baseline),
        "Time and memory": lambda: costs_blocks(run.steps),
        "Settings": lambda: _settings(run),
    }
    sections = [Section(title, attempted(title, make, run.notes)) for title, make in makers.items()]
    live = None if run.settled else reload_seconds
    subtitle = f"{run.report.caption}." if run.report else f"{run.progress()}"
    return Document(root.resolve().name, subtitle, _facts(run), sections, run.notes.said, live)


def attempted(title: str, make: Callable[[], list[Any]], notes: Notes) -> list[Any]:
    """A section's blocks; what cannot be made costs the section, not the report."""
    try:
        return make()
    except UserError as error:
        notes.add(f"{title}: {error}.")
    except Exception as error:  # whatever an odd file leads to
        problem = " ".join(str(error).split())[:200]
        notes.add(
            f"{title}: left out, since its files are odd ({type(error).__name__}: {problem})."
        )
    return []


def _table(root: Path, notes: Notes) -> Report | None:
    if not (root / "evaluation.json").is_file():
        return None
    try:
        found = Report.load(root)
        return found if found.rows else None
    except (UserError, KeyError, TypeError, AttributeError, ValueError, OSError):
        notes.add(f"{root / 'evaluation.json'}: damaged; `erniesearch run` writes it again.")
        return None


def _facts(run: RunFiles) -> dict[str, str]:
    found = {"state": run.progress()}
    versions = read_json(run.root / "environment.json", run.notes) or {}
    if versions:
        found["versions"] = ", ".join(
            f"{name} {value}" for name, value in versions.items() if value
        )
    if run.report is not None:
        machine = run.report.machine.items()
        found["evaluated on"] = ", ".join(f"{name} {value}" for name, value in machine)
    ranks = {step.done.get("world_size") for step in run.steps.values() if step.done}
    if sizes := sorted(size for size in ranks if isinstance(size, int)):
        found["ranks"] = ", ".join(map(str, sizes))
    return found


def _results(run: RunFiles) -> list[Any]:
    if run.report is None:
        return [Text("The table comes when the run has been evaluated.")]
    rows = run.report.rows
    cells = [
        [row.name, *(f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in row.metrics.values())]
        for row in rows
    ]
    blocks: list[Any] = [Table(f"{run.report.caption}", ["", *rows[0].metrics], cells)]
    metric = METRIC if METRIC in rows[0].metrics else next(iter(rows[0].metrics))
    bounds = [Interval(row.name, e.mean, e.low, e.high) for row in rows
              if (e := row.metrics.get(metric))]  # fmt: skip
    chart = forest(f"{metric} with its interval", bounds, metric, zero=False)
    return [*blocks, *([chart] if chart else [])]


def _training(run: RunFiles) -> list[Any]:
    stages = [step for name, step in run.steps.items() if name in TRAINING_STAGES and step.begun]
    return [stage_blocks(step, run.planned_updates(step.name), step is stages[-1])
            for step in stages]  # fmt: skip


def _queries(run: RunFiles, baseline: str | None) -> list[Any]:
    if run.report is None:
        return []
    rows = {row.name: row for row in run.report.rows}
    pair = chosen(run.report.rows, baseline)
    if pair is None:
        return []
    system, control = pair
    data = _collection(run)
    kept = RunFolder(run.root).query_metrics
    qids, values = query_wins.metrics_by_query(kept, run.root, run.report.rows, data)
    if missing := [name for name in (system, control) if name not in values]:
        raise UserError(f"{kept}: has no '{missing[0]}', a row of the table; delete it")
    seed = int(setting(run.settings, "seed", int, 42))
    metric = METRIC if METRIC in values[system] else next(iter(values[system]))
    blocks: list[Any] = [query_wins.comparison_table(qids, values, control, metric, seed)]
    if data is None:
        return blocks
    apart = values[system][metric] - values[control][metric]
    won, lost = query_wins.wins_and_losses(
        qids, apart, (rows[system], rows[control]), run.root, data
    )
    for cards, what in ((won, "gains"), (lost, "loses")):
        text = f"Where “{system}” {what} most over “{control}”" if cards else ""
        if cards:
            blocks.append(Fold(f"{text}: {len(cards)} queries", cards, is_open=what == "gains"))
    return blocks


def chosen(rows: list[Row], baseline: str | None) -> tuple[str, str] | None:
    """System and baseline whose queries are shown: the last dual-encoder, over the one that was
    trained on labels alone if there is one, else over the first row."""
    names = [row.name for row in rows]
    students = [row.name for row in rows if Path(row.run_file).name.startswith("dual_encoder-")]
    system = students[-1] if students else names[-1]
    control = baseline or (CONTROL if CONTROL in names and system != CONTROL else names[0])
    if control == system:
        system = names[-1]
    return (system, control) if control != system else None


def _collection(run: RunFiles) -> RetrievalData | None:
    assert run.report is not None
    use_titles = run.settings.get("data", {}).get("use_titles", True) is not False
    try:
        return query_wins.collection(
            setting(run.settings, "data.path", str, ""), run.report.split, use_titles
        )
    except (UserError, AttributeError, OSError) as error:
        run.notes.add(f"The texts of queries and passages are left out: {error}.")
        return None


def _settings(run: RunFiles) -> list[Any]:
    blocks = []
    if text := read_text(run.root / "config.yaml"):
        blocks.append(Fold("config.yaml", [Preformatted("config.yaml", text[:200_000])]))
    marks = {name: step.done for name, step in run.steps.items() if step.done is not None}
    if marks:
        short = {name: {k: v for k, v in mark.items() if not isinstance(v, dict)}
                 for name, mark in marks.items()}  # fmt: skip
        blocks.append(Fold("done.json of every step", [Preformatted("done.json", dumps(short))]))
    return blocks
