"""Ablations: grids, sharing of stages, statistics over dependent queries."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from support.processes import run_python, start
from support.tiny import ConfigMaker

from erniesearch import installation, stages
from erniesearch.ablation import arms
from erniesearch.ablation.grid import Grid, needed_steps, read_grid
from erniesearch.ablation.plots import plot_curves, plot_differences
from erniesearch.ablation.results import collect
from erniesearch.ablation.statistics import clusters_of, difference, holm
from erniesearch.cli import main
from erniesearch.config.keys import TRAINING_STAGES
from erniesearch.config.stage_keys import LossWeights, StageConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.data.collection import load_beir
from erniesearch.data.trec import write_trec_run
from erniesearch.errors import UserError
from erniesearch.run_folder import RunFolder, mark_done
from erniesearch.stages import Stage

GridMaker = Callable[..., Path]
_HALF = {"mean": 0.5, "low": 0.4, "high": 0.6}
TEACHERS = {
    "queries": 9, "passages": 9, "depth": 9, "split": "dev", "trained_on": False,
    "student": _HALF, "ceiling": _HALF, "late_interaction": None,
    "cross_encoder": {"mrr": _HALF, "gain": {"mean": 0.125, "low": 0.1, "high": 0.15}},
}  # fmt: skip


@pytest.fixture
def make_grid(make_config: ConfigMaker, tmp_path: Path) -> GridMaker:
    """A file with a teacher that two arms share and a control without one; keywords replace keys
    of the grid."""

    def make(**changes: Any) -> Path:
        small = StageConfig(steps=3, queries_per_rank=2, num_negatives=2, negatives="random")
        config = make_config(run_dir=tmp_path / "unused", num_processes=1)
        several = replace(
            config.stages,
            teacher=replace(small, weights=LossWeights(ce=1.0)),
            cascade=replace(small, weights=LossWeights(de=1.0)),
        )
        (tmp_path / "base.yaml").write_text(to_yaml(replace(config, stages=several)))
        content = {
            "name": "tiny", "config": "base.yaml", "run_dir": str(tmp_path / "ablation"),
            "seeds": [1, 2], "seeded": ["cascade"], "control": "plain", "primary": "distilled",
            "arms": {
                "plain": {"terms": {"de": 1.0}, "set": {"stages.teacher.steps": 0}},
                "distilled": {"about": "from the teacher", "terms": {"de": 0.5, "ce_to_de": 1.0}},
                "hotter": {"terms": {"de": 0.5, "ce_to_de": 1.0}, "set": {"objective.tau_de": 2.0}},
            },
        } | changes  # fmt: skip
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return make


def write_results(grid: Grid) -> list[str]:
    """A stand-in for the commands that an ablation starts: results without a training."""
    begun = []

    def begin(arm: str, *arguments: str) -> None:
        begun.append(f"{arm} {arguments[0]} {arguments[-1] if arguments[0] == 'run' else ''}")
        if arguments[0] == "run":
            content = yaml.safe_load(Path(arguments[1]).read_text())
            seed = content["stages"]["cascade"]["seed"]
            config = grid.config(grid.arms[arm.split()[0]], seed)
            step = arguments[-1]
            folder = RunFolder(config.run_dir).stage(step)
            line = {"step": 3, "loss": 1.0, "speed": {"seconds": 2.0}}
            (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            if step in TRAINING_STAGES:
                (folder / "checkpoints").mkdir()
            facts = TEACHERS if step == "teacher_check" else {}
            mark_done(folder, stages.fingerprint(config, step, 1), **facts)
        else:
            data = load_beir(grid.base["data"]["path"], "test")
            rng = np.random.default_rng(len(begun))
            ranked = {
                qid: {data.pids[i]: float(s) for i, s in enumerate(rng.random(len(data.pids)))}
                for qid in data.qrels
            }
            write_trec_run(Path(arguments[arguments.index("--run_out") + 1]), ranked, "x")

    arms._start = begin  # type: ignore[assignment]
    return begun


@pytest.fixture
def _real_start() -> Any:
    kept = arms._start
    yield
    arms._start = kept


@pytest.mark.usefixtures("_real_start")
def test_shared_stages_are_trained_once(make_grid: GridMaker) -> None:
    grid = read_grid(make_grid(), {})
    begun = write_results(grid)
    jobs = list(grid.jobs())
    assert [(arm.name, seed) for arm, seed in jobs[:3]] == [
        ("plain", 1), ("distilled", 1), ("hotter", 1)
    ]  # fmt: skip
    assert len(arms.pending(grid, jobs)) == 6
    arms.train_arms(grid, jobs, parallel=2)
    assert not arms.pending(grid, jobs)
    # Neither the other seed nor the other temperature of the students makes another teacher.
    assert sum(line.endswith("run teacher") for line in begun) == 1
    assert sum(line.endswith("run cascade") for line in begun) == 6
    assert not list(grid.run_dir.rglob("checkpoints"))
    teachers = {
        os.path.realpath(RunFolder(grid.config(arm, seed).run_dir).stage("teacher"))
        for arm, seed in jobs
        if arm.name != "plain"
    }
    assert len(teachers) == 1
    arms.train_arms(grid, jobs, parallel=1)
    assert sum(line.endswith("run teacher_check") for line in begun) == 1
    assert len(begun) == 1 + 1 + 6 + 6  # nothing is done again

    results = collect(grid, "erniesearch ablate grid.yaml")
    assert [c.arm for c in results.comparisons] == ["distilled", "hotter"]
    primary, secondary = results.comparisons
    assert primary.p_holm is None
    assert secondary.p_holm == secondary.p  # one secondary comparison: nothing to correct
    for c in results.comparisons:
        assert c.low <= c.difference <= c.high
        means = [results.arms[name]["MRR@10"]["per_seed"] for name in (c.arm, "plain")]
        assert c.per_seed == pytest.approx({s: means[0][s] - means[1][s] for s in (1, 2)})
        assert c.difference == pytest.approx(np.mean(list(c.per_seed.values())))
    assert results.arms["hotter"]["seconds"] == 2.0
    assert results.arms["hotter"]["seconds_with_upstream"] == 4.0
    assert results.arms["plain"]["seconds_with_upstream"] == 2.0
    for name, gain in (("plain", None), ("distilled", 0.125), ("hotter", 0.125)):
        assert results.arms[name]["teacher_gain"] == gain
        assert results.arms[name]["late_interaction_gain"] is None
    results.save(grid.run_dir / "results.json")
    assert json.loads((grid.run_dir / "results.json").read_text())["seeds"] == [1, 2]
    table = results.markdown()
    assert "| plain |" in table
    assert "primary" in table
    rows = {
        line.split("|")[1].strip(): line.split("|") for line in table.splitlines() if "|" in line
    }
    assert [rows[name][7].strip() for name in ("plain", "hotter")] == ["", "+0.125"]
    plot_differences(results, grid.run_dir / "differences.png")
    plot_curves(grid, grid.run_dir / "curves.png")
    assert (grid.run_dir / "curves.png").stat().st_size > 5000


def test_arms_see_the_same_batches(make_grid: GridMaker) -> None:
    """An arm's configuration differs from the base in what the grid says, and nothing else."""
    grid = read_grid(make_grid(), {"split": "dev"})
    assert grid.split == "dev"
    plain, hotter = (grid.config(grid.arms[name], 2) for name in ("plain", "hotter"))
    assert plain.stages.cascade.seed == hotter.stages.cascade.seed == 2
    assert Stage(plain, "cascade").seed == 2
    assert Stage(plain, "teacher").seed == plain.seed
    weights = hotter.stages.cascade.weights
    assert (weights.de, weights.ce_to_de, weights.li, weights.ce) == (0.5, 1.0, 0.0, 0.0)
    assert hotter.objective.tau_de == 2.0
    assert needed_steps(plain) == ["cascade"]
    assert needed_steps(hotter) == ["teacher", "teacher_check", "cascade"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": {}}, r"unknown key 'arm' \(did you mean 'arms'\?\)"),
        ({"control": "plane"}, r"control 'plane' is not among the arms \(did you mean 'plain'"),
        ({"primary": "x"}, "primary 'x' is not among the arms"),
        ({"seeds": [1, 1]}, "'seeds' must be a list of different integers"),
        ({"seeded": ["mine"]}, "seeded: 'mine' is none of"),
        ({"set": {"stages.cascade.stepz": 2}}, r"set: unknown key 'stages.cascade.stepz'"),
        ({"set": {"training": 3}}, "set: 'training' must be a mapping"),
        ({"arms": {"plain": {"term": {"de": 1}}}}, r"unknown key 'arms.plain.term'"),
        ({"arms": {"plain": {"terms": {"dee": 1}}}}, r"unknown term 'arms.plain.terms.dee'"),
        ({"arms": {"plain": {"terms": {"de": -1}}}, "primary": None}, "arm plain: .*weights.de"),
        ({"arms": {"a/b": {}}, "control": "a/b"}, "arms.a/b: a name has letters"),
        ({"arms": {"plain": {"terms": {"de": 1}}, "copy": {"terms": {"de": 1.0}}}, "primary": None},
         "arms plain and copy train the same model"),
        ({"arms": {"plain": {"set": {"stages.cascade.steps": 0}}}, "primary": None},
         "arm plain: the configuration trains no student"),
    ],
)  # fmt: skip
def test_mistakes_in_a_grid_are_told(
    make_grid: GridMaker, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_grid(**changes)
    with pytest.raises(UserError, match=message):
        read_grid(path, {})
    assert main(["ablate", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_seeds_of_the_command_line(
    make_grid: GridMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(make_grid())
    assert main(["ablate", path, "--seeds", "7,x"]) == 2
    assert "--seeds 7,x: must be integers" in capsys.readouterr().err
    assert main(["ablate", path, "--seeds", "7,8", "--report", "true"]) == 2
    told = capsys.readouterr().err
    assert "plain seed 7" in told
    assert "hotter seed 8" in told
    assert "seed 1" not in told


@pytest.mark.parametrize("name", installation.grid_names())
def test_shipped_grids(name: str) -> None:
    """Each parses, its arms differ, and what the arms share is one stage."""
    grid = read_grid(installation.grid_file(name), {})
    trained = set()
    for arm in grid.arms.values():
        config = grid.config(arm, arm.seeds[0])
        trained |= {arms.result_folder(grid, config, step) for step in needed_steps(config)}
    assert len(grid.arms) <= len(trained) < 3 * len(grid.arms)


def test_a_name_that_stands_twice_is_an_error(make_grid: GridMaker) -> None:
    path = make_grid()
    path.write_text(path.read_text() + "  plain: {terms: {de: 2.0}}\n")
    with pytest.raises(UserError, match=r"grid.yaml:\d+: not valid YAML: 'plain' stands twice"):
        read_grid(path, {})


def test_queries_of_one_passage_are_one_cluster() -> None:
    qrels = {"a": {"p1": 1}, "b": {"p2": 1, "p3": 1}, "c": {"p1": 1, "p9": 0}, "d": {"p9": 1},
             "e": {"p3": 2, "p4": 1}, "f": {"p4": 1}}  # fmt: skip
    assert clusters_of(qrels).tolist() == [0, 1, 0, 2, 1, 1]


def test_the_interval_is_that_of_clusters() -> None:
    """Copies of a query carry no information: the interval of 40 queries, each 25 times, is that
    of 40 queries, where an interval over 1,000 independent ones would be five times narrower."""
    rng = np.random.default_rng(0)
    apart = rng.normal(0.05, 0.2, 40)
    clusters = np.arange(40)
    once = difference(apart, np.zeros(40), clusters)
    copies = difference(np.repeat(apart, 25), np.zeros(1000), np.repeat(clusters, 25))
    independent = difference(np.repeat(apart, 25), np.zeros(1000), np.arange(1000))
    assert copies.difference == pytest.approx(once.difference)
    assert (copies.low, copies.high) == pytest.approx((once.low, once.high))
    assert copies.p == once.p
    assert once.low == pytest.approx(apart.mean() - 1.96 * apart.std(ddof=1) / 40**0.5, abs=0.01)
    assert independent.high - independent.low < 0.3 * (once.high - once.low)
    assert independent.p < once.p


def test_randomisation_counts_sign_flips_of_clusters() -> None:
    """Three clusters, differences all positive: 2 of the 8 flips reach the observed mean."""
    found = difference(np.array([1.0, 1.0, 2.0, 3.0]), np.zeros(4), np.array([0, 0, 1, 2]))
    assert found.difference == pytest.approx(7 / 4)
    assert found.p == pytest.approx(2 / 8)
    assert difference(np.ones(3), np.ones(3), np.arange(3)).p == 1.0


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_and_continued_gives_the_same_table(make_grid: GridMaker, tmp_path: Path) -> None:
    tables = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        command = ("-m", "erniesearch.cli", "ablate", str(make_grid(run_dir=str(folder))))
        if name == "killed":
            for reached in ("cascade-*/stages/cascade/started.json", "teacher-*/**/done.json"):
                process = start(*command)
                while not list((folder / "results").glob(reached)):
                    assert process.poll() is None, process.stdout.read()[-3000:]
                    time.sleep(0.05)
                below = psutil.Process(process.pid).children(recursive=True)
                assert below
                process.send_signal(signal.SIGKILL)
                process.wait()
                _, left = psutil.wait_procs(below, timeout=20)  # they end by themselves
                assert all(child.status() == psutil.STATUS_ZOMBIE for child in left)
                assert not (folder / "results-test.json").exists()
        status, output = run_python(*command, timeout=550)
        assert status == 0, output
        content = json.loads((folder / "results-test.json").read_text())
        tables.append({arm: facts["MRR@10"] for arm, facts in content["arms"].items()})
        assert len(list((folder / "results").glob("teacher-*"))) == 1
    assert tables[0] == tables[1]


def test_chosen_arms_bring_their_controls(make_grid: Any) -> None:
    grid = read_grid(make_grid(), {})
    name = next(name for name, arm in grid.arms.items() if arm.control != name)
    chosen = grid.only([name])
    assert set(chosen.arms) == {name, grid.arms[name].control}
    assert chosen.primary in (None, name)
    with pytest.raises(UserError, match="--arms nobody: this grid has"):
        grid.only(["nobody"])
