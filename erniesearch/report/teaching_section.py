"""Is there anything to distil? Teachers beside their students, before and during the cascade."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from erniesearch.evaluation.measures import Estimate
from erniesearch.evaluation.teacher_check import METRIC, TeacherCheck
from erniesearch.report.charts import Interval, Line, forest, lines
from erniesearch.report.document import Chart, Charts, Table, Text
from erniesearch.report.run_files import Log, Notes, Step
from erniesearch.report.training_section import MODELS


def check_of(steps: Mapping[str, Step], notes: Notes) -> TeacherCheck | None:
    """What the step teacher_check found, None if it has not been done."""
    step = steps.get("teacher_check")
    if step is None or step.done is None:
        return None
    try:
        return TeacherCheck.from_facts(step.done)
    except (KeyError, TypeError, AttributeError):
        notes.add(f"{step.folder / 'done.json'}: damaged; the teacher check is left out.")
        return None


def teaching_blocks(steps: Mapping[str, Step], check: TeacherCheck | None) -> list[Any]:
    """The teacher check, and accuracies of teachers and students over the updates."""
    blocks: list[Any] = []
    if check is not None:
        blocks += _check_blocks(check)
    charts = []
    for step in steps.values():
        drawn = [chart for chart in _courses(step) if chart is not None]
        blocks += _verdicts(step.name, step.metrics) if drawn else []
        charts += drawn
    if charts:
        blocks.append(Charts(charts))
    mined = steps["mine"].done if "mine" in steps else None
    if charts and mined and mined.get("dropped_by_teacher"):
        blocks.append(Text(
            "Mined negatives were denoised by the teacher: none is left that it prefers to the"
            " relevant passage, so on the cascade's lists it is right by construction. The teacher"
            " check, on held-out queries, is not concerned by that."
        ))  # fmt: skip
    return blocks


def _check_blocks(check: TeacherCheck) -> list[Any]:
    systems: dict[str, tuple[Estimate, Estimate | None]] = {"student": (check.student, None)}
    for name, teacher in check.teachers.items():
        systems[name.replace("_", "-")] = (teacher.mrr, teacher.gain)
    systems["ceiling"] = (check.ceiling, None)
    rows = [
        [name, f"{own.mean:.3f} [{own.low:.3f}, {own.high:.3f}]",
         f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" if gain else ""]
        for name, (own, gain) in systems.items()
    ]  # fmt: skip
    caption = f"Before the cascade: {check.caption}; the ceiling is a perfect reranker's"
    blocks: list[Any] = [Table(caption, ["", METRIC, "gain over the student"], rows)]
    for name, teacher in check.teachers.items():
        if teacher.gain.low > 0:
            blocks.append(Text(
                f"The {name.replace('_', '-')} model ranks better than the student by"
                f" {teacher.gain.mean:+.3f}: there is something to distil."
            ))  # fmt: skip
    blocks += [Text(f"{warning[0].upper()}{warning[1:]}.", warns=True)
               for warning in check.warnings()]  # fmt: skip
    chart = forest(
        "Teachers and their student", [Interval(name, own.mean, own.low, own.high)
                                       for name, (own, _) in systems.items()], METRIC, zero=False,
    )  # fmt: skip
    return [*blocks, *([chart] if chart else [])]


def _courses(step: Step) -> list[Chart | None]:
    """One chart for the query's own list, one for all candidates of the update."""
    log = step.metrics

    def shown(keys: Mapping[str, str]) -> list[Line]:
        return [Line(name, log.steps, log.figures[key]) for key, name in keys.items()
                if key in log.figures]  # fmt: skip

    students = shown({f"accuracy_group_{model}": MODELS[model] for model in ("li", "de")})
    teacher = shown({"accuracy_ce": MODELS["ce"]})
    charts: list[Chart | None] = []
    if teacher and students:
        charts.append(lines(f"{step.name}: on each query's own list", teacher + students))
    both = shown({f"accuracy_{model}": MODELS[model] for model in ("li", "de")})
    if len(both) == 2:
        charts.append(lines(f"{step.name}: among all candidates of the update", both))
    elif teacher and both and not students:
        charts.append(
            lines(f"{step.name}: teacher on its lists, student among all", teacher + both)
        )
    return charts


def _verdicts(stage: str, log: Log) -> list[Text]:
    """The last quarter of the updates in a sentence for each pair."""
    found = []
    for teacher, student, where in (
        ("accuracy_ce", "accuracy_group_li", "each query's own list"),
        ("accuracy_ce", "accuracy_group_de", "each query's own list"),
        ("accuracy_li", "accuracy_de", "all candidates of the update"),
    ):  # fmt: skip
        if teacher not in log.figures or student not in log.figures:
            continue
        values = [log.figures[key][-max(1, len(log) // 4) :] for key in (teacher, student)]
        if not all(np.isfinite(y).any() for y in values):
            continue
        means = [float(np.nanmean(y)) for y in values]
        names = [MODELS[key.rpartition("_")[2]] for key in (teacher, student)]
        found.append(Text(
            f"In the last quarter of the stage {stage}, among {where}: {names[0]} has the relevant"
            f" passage first for {means[0]:.1%} of the queries, {names[1]} for {means[1]:.1%}, a"
            f" difference of {100 * (means[0] - means[1]):+.1f} points."
        ))  # fmt: skip
    return found
