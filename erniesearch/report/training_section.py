"""The course of each training stage: every term, accuracies, targets, rates, speed, validation."""

import re

import numpy as np

from erniesearch.config.terms import LOGGED_OF_A_TERM
from erniesearch.report.charts import Line, lines, number
from erniesearch.report.document import Chart, Charts, Fold, Table, Text
from erniesearch.report.run_files import Log, Step, nonfinite_updates

MODELS = {"de": "dual-encoder", "li": "late interaction", "ce": "cross-encoder"}
NO_TERMS = ("grad_norm", "skipped_updates", "seconds")
MOST_CHARTS = 30
SIDES = re.compile(r"^(?P<term>.+)_(?P<side>target|student)_(?P<what>top1|entropy|margin)$")
WHAT = {"top1": "largest probability", "entropy": "entropy", "margin": "margin"}


def accuracy_name(key: str) -> str:
    """What an ``accuracy_*`` is of."""
    model = key.removeprefix("accuracy_")
    own = model.startswith("group_")
    model = model.removeprefix("group_")
    return MODELS.get(model, model) + (", own list" if own else "")


def stage_blocks(step: Step, planned: int, is_open: bool) -> Fold:
    """A stage's facts and charts, to be unfolded."""
    log, head = step.metrics, []
    updates = int(log.steps[-1]) if len(log) else 0
    of = f" of {planned}" if planned and planned != updates else ""
    loss = log.last("loss")
    shown = number(loss) if np.isfinite(loss) else "–"
    told = f"{step.name}: {updates}{of} updates, last loss {shown}"
    if step.done is not None and isinstance(reason := step.done.get("stopped"), str):
        head.append(Text(f"Stopped before its end: {reason}."))
    if skipped := nonfinite_updates(step):
        head.append(Text(f"{skipped} updates changed nothing because a loss or gradient was not"
                         " finite (nonfinite.jsonl).", warns=True))  # fmt: skip
    if not len(log):
        return Fold(f"{step.name}: no update is logged yet", head or [Text("Nothing to show yet.")])
    charts = [*_losses(log), *_accuracies(log), *_targets(log), *_machine(log)]
    left = max(0, len(charts) - MOST_CHARTS)
    blocks = [*head, Charts(charts[:MOST_CHARTS]), _figures(step.name, log)]
    if left:
        blocks.insert(-1, Text(f"{left} more figures stand in the table alone."))
    if len(step.validation):
        blocks += _validation(step)
    return Fold(told, blocks, is_open)


def is_loss(key: str) -> bool:
    """Whether a logged figure is the loss or one of its terms."""
    return "/" not in key and key not in NO_TERMS and not LOGGED_OF_A_TERM.search(key)


def _charts(*made: Chart | None) -> list[Chart]:
    return [chart for chart in made if chart is not None]


def _losses(log: Log) -> list[Chart]:
    names = sorted((key for key in log.figures if is_loss(key)), key=lambda key: key != "loss")
    titles = {name: "loss, all terms weighted" if name == "loss" else f"term {name}"
              for name in names}  # fmt: skip
    return _charts(*(lines(titles[n], [Line(n, log.steps, log.figures[n])]) for n in names))


def _accuracies(log: Log) -> list[Chart]:
    courses = [Line(accuracy_name(key), log.steps, y) for key, y in log.figures.items()
               if key.startswith("accuracy_")]  # fmt: skip
    return _charts(lines("relevant passage first (accuracy)", courses))


def _targets(log: Log) -> list[Chart]:
    """How sharp target and student are, for each distillation term."""
    found: dict[tuple[str, str], list[Line]] = {}
    for key, y in log.figures.items():
        if match := SIDES.match(key):
            course = Line(match["side"], log.steps, y)
            found.setdefault((match["term"], match["what"]), []).append(course)
    return _charts(*(lines(f"{term}: {WHAT[what]}", sides)
                     for (term, what), sides in found.items()))  # fmt: skip


def _machine(log: Log) -> list[Chart]:
    rates = log.group("learning_rate")
    ours = {name.removesuffix("_no_decay"): y for name, y in rates.items()}  # which are equal
    shown = [Line(name, log.steps, y) for name, y in ours.items()]
    speed = log.group("speed")
    none = np.full(len(log), np.nan)
    return _charts(
        lines("learning rate", shown, smooth=False),
        lines("gradient norm before clipping",
              [Line("gradient norm", log.steps, log.figures.get("grad_norm", none))]),
        *(lines(f"{name.replace('_per_second', '')} a second", [Line("speed", log.steps, y)])
          for name, y in speed.items() if name.endswith("_per_second")),
    )  # fmt: skip


def _validation(step: Step) -> list[Charts | Text | Table]:
    """Figures on the held-out split, one chart a measure."""
    log = step.validation
    groups: dict[str, list[Line]] = {}
    for key, y in log.figures.items():
        name, _, model = key.rpartition("_")
        if key in NO_TERMS:
            continue
        if "@" in key and model in MODELS:
            groups.setdefault(name, []).append(Line(MODELS[model], log.steps, y))
        elif key.startswith("accuracy_"):
            course = Line(accuracy_name(key), log.steps, y)
            groups.setdefault("accuracy", []).append(course)
        elif is_loss(key):
            groups.setdefault("loss", []).append(Line(key, log.steps, y))
    charts = _charts(*(lines(f"validation: {name}", courses, smooth=False)
                       for name, courses in groups.items()))  # fmt: skip
    seconds = log.figures.get("seconds", np.empty(0))
    told = f"Measured {len(log)} times on the validation split"
    if len(seconds):
        told += f", in {number(round(float(np.nansum(seconds)), 1))} s together"
    return [Text(told + "."), Charts(charts)]


def _figures(stage: str, log: Log) -> Table:
    """All figures of a stage at a glance: the charts in numbers."""
    rows = []
    for name, y in log.figures.items():
        there = np.isfinite(y)
        if name.startswith("speed/") or not there.any():
            continue
        x, y = log.steps[there], y[there]
        quarter = y[-max(1, len(y) // 4) :]
        ends = [f"{number(y[i])} ({x[i]})" for i in (y.argmin(), y.argmax())]
        mean = number(float(quarter.mean()))
        rows.append([name, number(y[0]), number(y[-1]), mean, *ends])
    columns = ["", "first", "last", "mean of the last quarter", "lowest (update)",
               "highest (update)"]  # fmt: skip
    return Table(f"Figures of {stage}", columns, rows)
