"""The report of an ablation: what ``results-SPLIT.json`` says, and the course of every arm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from erniesearch.config.keys import TRAINING_STAGES
from erniesearch.report.charts import Interval, Line, bars, forest, lines
from erniesearch.report.document import Chart, Charts, Document, Fold, Section, Table, Text
from erniesearch.report.run_files import Notes, Step, read_json, read_steps
from erniesearch.report.run_report import attempted
from erniesearch.report.training_section import is_loss


def is_ablation(root: Path) -> bool:
    """Whether a folder is an ablation's."""
    return (root / "arms").is_dir() and not (root / "config.yaml").is_file()


def ablation_document(root: Path, reload_seconds: float | None) -> Document:
    """The report of an ablation's folder, finished or going on."""
    notes = Notes()
    results = {path.stem.removeprefix("results-"): found
               for path in sorted(root.glob("results-*.json"))
               if (found := read_json(path, notes)) is not None}  # fmt: skip
    arms = _arms(root, notes)
    makers: dict[str, Callable[[], list[Any]]] = {}
    for split, found in results.items():
        makers[f"Results on {split}"] = lambda found=found: results_blocks(found)  # type: ignore[misc]
    makers |= {
        "Course of the arms": lambda: _courses(arms),
        "Terms by arm": lambda: _terms(arms),
        "What is done": lambda: _progress(arms),
    }
    sections = [Section(title, attempted(title, make, notes)) for title, make in makers.items()]
    facts = {}
    for found in results.values():
        machine = found.get("machine")
        told = (
            ", ".join(f"{k} {v}" for k, v in machine.items()) if isinstance(machine, dict) else ""
        )
        facts = {"command": str(found.get("command", "")), "commit": str(found.get("commit") or ""),
                 "machine": told}  # fmt: skip
    open_ = [f"{arm} seed {seed}" for (arm, seed), steps in arms.items() if not _done(steps)]
    state = f"not done yet: {', '.join(open_)}" if open_ else "every arm that has begun is done"
    subtitle = f"Ablation: {len({arm for arm, _ in arms})} arms; {state}"
    live = reload_seconds if open_ or not results else None
    return Document(root.resolve().name, subtitle, {k: v for k, v in facts.items() if v},
                    sections, notes.said, live)  # fmt: skip


Arms = dict[tuple[str, str], dict[str, Step]]


def _arms(root: Path, notes: Notes) -> Arms:
    """The steps of each arm and seed; stages that arms share are linked in each."""
    return {
        (folder.parent.name, folder.name.removeprefix("seed-")): read_steps(folder, notes)
        for folder in sorted(root.glob("arms/*/seed-*"))
        if folder.is_dir()
    }


def _done(steps: dict[str, Step]) -> bool:
    return bool(steps) and all(step.done is not None for step in steps.values())


def _last_stage(steps: dict[str, Step]) -> Step | None:
    trained = [
        step for name, step in steps.items() if name in TRAINING_STAGES and len(step.metrics)
    ]
    return trained[-1] if trained else None


def results_blocks(found: dict[str, Any]) -> list[Any]:
    """The content of ``results-SPLIT.json``."""
    compared = {c["arm"]: c for c in found["comparisons"]}
    metrics = [k for k, v in next(iter(found["arms"].values())).items() if isinstance(v, dict)]
    metric = found["comparisons"][0]["metric"] if found["comparisons"] else metrics[0]
    clusters = found["num_clusters"]
    caption = (
        f"{found['dataset']}, {found['split']}: {found['num_queries']:,} queries in {clusters:,}"
        f" clusters; {metric}, mean ± standard deviation over seeds; difference to the control"
        f" ({found['control']} unless said) with a 95 % bootstrap interval over clusters; p of the"
        " randomisation test, corrected by Holm but for the primary comparison"
    )
    rows = [[name, *_cells(facts, compared.get(name), metric, found["control"])]
            for name, facts in found["arms"].items()]  # fmt: skip
    columns = ["", metric, "difference", "p", "p (Holm)", "cross-encoder's gain",
               "late interaction's gain", "updates", "seconds"]  # fmt: skip
    others = Table("All measures, means over seeds", ["", *metrics], [
        [name, *(f"{facts[m]['mean']:.3f}" for m in metrics)]
        for name, facts in found["arms"].items()
    ])  # fmt: skip
    about = [[name, facts["about"]] for name, facts in found["arms"].items() if facts["about"]]
    intervals = [
        Interval(_against(c, found["control"]), c["difference"], c["low"], c["high"],
                 tuple(c["per_seed"].values()))
        for c in compared.values()
    ]  # fmt: skip
    chart = forest("Differences to the control; dots are seeds", intervals,
                   f"difference in {metric}", zero=True)  # fmt: skip
    told = [Text(f"{name}: {text}") for name, text in about]
    return [Table(caption, columns, rows), *([chart] if chart else []), others, *told]


def _against(comparison: dict[str, Any], control: str) -> str:
    own = comparison["control"]
    return str(comparison["arm"]) + ("" if own == control else f" (to {own})")


def _cells(
    facts: dict[str, Any], comparison: dict[str, Any] | None, metric: str, control: str
) -> list[str]:
    value = facts[metric]
    spread = f" ± {value['sd']:.3f}" if value["sd"] is not None else ""
    cells = [f"{value['mean']:.3f}{spread}", "control", "", ""]
    if comparison is not None:
        c = comparison
        against = "" if c["control"] == control else f" to {c['control']}"
        difference = f"{c['difference']:+.4f} [{c['low']:+.4f}, {c['high']:+.4f}]{against}"
        cells[1:] = [difference, f"{c['p']:.4f}",
                     "primary" if c["p_holm"] is None else f"{c['p_holm']:.4f}"]  # fmt: skip
    gains = [facts["teacher_gain"], facts["late_interaction_gain"]]
    cells += ["" if gain is None else f"{gain:+.3f}" for gain in gains]
    return [*cells, f"{facts['updates']:,}", f"{facts['seconds']:,.0f}"]


def _first_seeds(arms: Arms) -> dict[str, dict[str, Step]]:
    found: dict[str, dict[str, Step]] = {}
    for (arm, _), steps in arms.items():
        found.setdefault(arm, steps)
    return found


def _courses(arms: Arms) -> list[Any]:
    """The last stage of each arm, first seed: on the validation split where it was measured."""
    trained: list[Line] = []
    validated: list[Line] = []
    for arm, steps in _first_seeds(arms).items():
        step = _last_stage(steps)
        for log, into in ((step.metrics, trained), (step.validation, validated)) if step else ():
            if "loss" in log.figures:
                into.append(Line(arm, log.steps, log.figures["loss"]))
    made = [
        lines("loss of each arm's own terms, first seed", trained, wide=True),
        lines("validation loss, first seed", validated, smooth=False, wide=True),
    ]
    blocks: list[Any] = [chart for chart in made if chart is not None]
    if blocks:
        blocks.insert(0, Text("Arms have different terms, so the height of a loss does not compare;"
                              " its course does."))  # fmt: skip
    return blocks


def _terms(arms: Arms) -> list[Any]:
    """Every term in every arm that has it."""
    courses: dict[str, list[Line]] = {}
    for arm, steps in _first_seeds(arms).items():
        step = _last_stage(steps)
        if step is None:
            continue
        for name, y in step.metrics.figures.items():
            if (is_loss(name) and name != "loss") or name.startswith("accuracy_"):
                courses.setdefault(name, []).append(Line(arm, step.metrics.steps, y))
    charts: list[Chart] = [
        chart for name, of_arms in courses.items() if (chart := lines(name, of_arms)) is not None
    ]
    return [Fold("The last stage of every arm, term by term", [Charts(charts)])] if charts else []


def _progress(arms: Arms) -> list[Any]:
    rows, seconds = [], {}
    for (arm, seed), steps in arms.items():
        cells = []
        for name, step in steps.items():
            now = f" {step.metrics.steps[-1]}" if len(step.metrics) and step.done is None else ""
            cells.append(f"{name} {step.state}{now}")
        last = _last_stage(steps)
        if last is not None:
            took = float(np.nansum(last.metrics.figures.get("speed/seconds", np.empty(0))))
            seconds[f"{arm} {seed}"] = round(took / 60, 2)
        rows.append([f"{arm}, seed {seed}", "; ".join(cells)])
    chart = bars("Time in the updates of the last stage", seconds, "minutes")
    return [Table("Steps of every arm", ["", "steps"], rows), *([chart] if chart else [])]
