"""What an ablation found, as JSON and as a Markdown table."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from erniesearch import installation, stages
from erniesearch.ablation.arms import final_result, result_folder, run_file
from erniesearch.ablation.grid import Arm, Grid, needed_steps
from erniesearch.ablation.statistics import Difference, clusters_of, difference, holm
from erniesearch.config.keys import TRAINING_STAGES, RunConfig
from erniesearch.data.collection import load_beir
from erniesearch.data.ranking_metrics import DEFAULT_METRICS, parse_metrics, per_query
from erniesearch.data.trec import read_trec_run
from erniesearch.evaluation.table import describe_machine, stage_facts
from erniesearch.evaluation.teacher_check import Teacher, TeacherCheck
from erniesearch.files import write_atomically


@dataclass(frozen=True)
class Comparison:
    """An arm against its control: per-query values averaged over the seeds that both have.

    ``p`` is the randomisation test's, ``p_holm`` corrected for the secondary comparisons (None
    for the primary one); ``per_seed`` the difference of each seed.
    """

    arm: str
    control: str
    metric: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float | None
    per_seed: dict[int, float]


@dataclass(frozen=True)
class Results:
    """The content of ``results-SPLIT.json``.

    ``arms`` holds for each arm every metric's mean, standard deviation over seeds (None for one
    seed) and value per seed, updates and seconds of the final stage, what the arm is about, and
    what its teachers gain in MRR@10 over the student that the cascade starts from
    (``teacher_gain``: the cross-encoder; ``late_interaction_gain``; means over seeds, None for a
    model that it distils nothing from).
    """

    name: str
    dataset: str
    split: str
    num_queries: int
    num_clusters: int
    seeds: list[int]
    control: str
    primary: str | None
    arms: dict[str, dict[str, Any]]
    comparisons: list[Comparison]
    machine: dict[str, object]
    command: str
    commit: str | None

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")

    def markdown(self) -> str:
        """The table, with what stands in it said above."""
        metric = self.comparisons[0].metric if self.comparisons else _metrics(self.arms)[0]
        by_arm = {c.arm: c for c in self.comparisons}
        lines = [
            f"{self.dataset}, {self.split}: {self.num_queries} queries in {self.num_clusters}"
            f" clusters (queries that share a relevant passage); {metric}, mean ± standard"
            f" deviation over seeds; difference to the control ({self.control} unless said) with a"
            " 95 % bootstrap interval over clusters; p of the randomisation test, signs flipped by"
            " cluster; Holm's correction over the secondary comparisons. Gain: a teacher's MRR@10"
            " over that of the student it teaches, before the cascade, on its own candidates.", "",
            f"| arm | {metric} | difference | p | p (Holm) | per seed | cross-encoder's gain | late"
            " interaction's gain | updates | seconds |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for name, facts in self.arms.items():
            value = facts[metric]
            spread = f" ± {value['sd']:.3f}" if value["sd"] is not None else ""
            cells = [name, f"{value['mean']:.3f}{spread}"]
            if name in by_arm:
                c = by_arm[name]
                against = "" if c.control == self.control else f" to {c.control}"
                cells += [
                    f"{c.difference:+.4f} [{c.low:+.4f}, {c.high:+.4f}]{against}", _p(c.p),
                    "primary" if c.p_holm is None else _p(c.p_holm),
                    " ".join(f"{d:+.4f}" for d in c.per_seed.values()),
                ]  # fmt: skip
            else:
                cells += ["control", "", "", ""]
            gains = (facts["teacher_gain"], facts["late_interaction_gain"])
            cells += ["" if gain is None else f"{gain:+.3f}" for gain in gains]
            lines.append(f"| {' | '.join(cells)} | {facts['updates']} | {facts['seconds']:.0f} |")
        return "\n".join(lines) + "\n"


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}"


def _metrics(arms: dict[str, dict[str, Any]]) -> list[str]:
    return [key for key, value in next(iter(arms.values())).items() if isinstance(value, dict)]


def collect(grid: Grid, command: str) -> Results:
    """Measure all arms' runs and compare them; every job must be done."""
    first = grid.config(*next(grid.jobs()))
    data = load_beir(first.data.path, grid.split, first.data.use_titles)
    names = list(dict.fromkeys([grid.metric, *DEFAULT_METRICS.split(",")]))
    metrics = parse_metrics(",".join(names))
    clusters = clusters_of(data.qrels)
    values: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    arms: dict[str, dict[str, Any]] = {}
    for arm in grid.arms.values():
        values[arm.name] = {}
        for seed in arm.seeds:
            path = run_file(final_result(grid, grid.config(arm, seed))[1], grid.split)
            run = read_trec_run(path)
            values[arm.name][seed] = per_query(run, data.qrels, list(data.qrels), metrics)
        arms[arm.name] = _summary(values[arm.name]) | _facts(grid, arm) | {"about": arm.about}
    return Results(
        grid.name, Path(first.data.path).resolve().name, grid.split, len(data.qrels),
        int(clusters.max()) + 1, sorted({s for a in grid.arms.values() for s in a.seeds}),
        grid.control, grid.primary, arms, _compare(grid, values, clusters), describe_machine(),
        command, installation.commit(),
    )  # fmt: skip


def _summary(by_seed: dict[int, dict[str, np.ndarray]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for metric in next(iter(by_seed.values())):
        means = {seed: float(of_seed[metric].mean()) for seed, of_seed in by_seed.items()}
        spread = float(np.std(list(means.values()), ddof=1)) if len(means) > 1 else None
        out[metric] = {"mean": float(np.mean(list(means.values()))), "sd": spread,
                       "per_seed": means}  # fmt: skip
    return out


def _facts(grid: Grid, arm: Arm) -> dict[str, Any]:
    """Updates and mean seconds of the final stage, and the seconds of all that leads to it."""
    own, whole, updates = [], [], 0
    gains: dict[str, list[float]] = {"cross_encoder": [], "late_interaction": []}
    for seed in arm.seeds:
        config = grid.config(arm, seed)
        steps = [name for name in needed_steps(config) if name in TRAINING_STAGES]
        facts = {name: _stage(grid, config, name) for name in steps}
        own.append(facts[steps[-1]]["seconds"])
        whole.append(sum(f["seconds"] for f in facts.values()))
        updates = int(facts[steps[-1]]["steps"])
        for teacher, found in _teachers(grid, config).items():
            gains[teacher].append(found.gain.mean)
    means = {name: float(np.mean(values)) if values else None for name, values in gains.items()}
    return {"updates": updates, "seconds": float(np.mean(own)),
            "seconds_with_upstream": float(np.mean(whole)),
            "teacher_gain": means["cross_encoder"],
            "late_interaction_gain": means["late_interaction"]}  # fmt: skip


def _stage(grid: Grid, config: RunConfig, name: str) -> dict[str, float]:
    return stage_facts(result_folder(grid, config, name) / "stages" / name)


def _teachers(grid: Grid, config: RunConfig) -> dict[str, Teacher]:
    if not stages.is_enabled(config, "teacher_check"):
        return {}
    folder = result_folder(grid, config, "teacher_check") / "stages" / "teacher_check"
    return TeacherCheck.from_facts(json.loads((folder / "done.json").read_text())).teachers


def _compare(
    grid: Grid, values: dict[str, dict[int, dict[str, np.ndarray]]], clusters: np.ndarray
) -> list[Comparison]:
    found: dict[str, tuple[Arm, Difference, dict[int, float]]] = {}
    for arm in grid.arms.values():
        if arm.name == arm.control:
            continue
        own, control = values[arm.name], values[arm.control]
        shared = [seed for seed in own if seed in control]
        if not shared:  # a control with one seed is compared as it is with every seed
            continue
        means = [
            np.mean([of[seed][grid.metric] for seed in shared], axis=0) for of in (own, control)
        ]
        per_seed = {
            seed: float((own[seed][grid.metric] - control[seed][grid.metric]).mean())
            for seed in shared
        }
        found[arm.name] = (arm, difference(means[0], means[1], clusters), per_seed)
    secondary = [name for name in found if name != grid.primary]
    corrected = dict(zip(secondary, holm([found[n][1].p for n in secondary]), strict=True))
    return [
        Comparison(name, arm.control, grid.metric, d.difference, d.low, d.high, d.p,
                   corrected.get(name), per_seed)
        for name, (arm, d, per_seed) in found.items()
    ]  # fmt: skip
