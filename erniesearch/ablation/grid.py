"""A grid: one configuration, its variants (arms), seeds, and what is compared with what.

name: controls-pycode         # of the results
config: pycode.yaml           # beside this file, or a path from the working directory
run_dir: runs/controls-pycode
set: {training.precision: bf16}                     # for every arm; dotted or nested keys
seeds: [42, 43, 44]
seeded: [cascade]             # stages that the seed reaches; the others are trained once
control: contrastive-mined
primary: cascade              # its comparison with the control is not corrected
arms:
  contrastive-mined: {terms: {de: 1.0}}             # the cascade stage's weights, all others 0
  cascade: {about: the method, terms: {de: 0.2, ce_to_de: 1.0}, set: {objective.tau_ce: 2.0}}
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from erniesearch import installation, stages
from erniesearch.config.build_config import config_from, merged, nested
from erniesearch.config.checks import named_as_here
from erniesearch.config.keys import TRAINING_STAGES, RunConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.config.yaml_file import read_yaml, unknown_key
from erniesearch.errors import UserError, nearest
from erniesearch.pipeline import launcher
from erniesearch.training.epochs import resolve_epochs

GRID_KEYS = ("name", "config", "run_dir", "set", "seeds", "seeded", "split", "metric", "control",
             "primary", "arms")  # fmt: skip
ARM_KEYS = ("about", "terms", "set", "seeds", "control")


@dataclass(frozen=True)
class Arm:
    """One variant: nested overrides of the configuration, and the seeds it is trained with.

    ``control`` is the arm it is compared with.
    """

    name: str
    overrides: dict[str, Any]
    seeds: tuple[int, ...]
    control: str
    about: str = ""


@dataclass(frozen=True)
class Grid:
    """A whole ablation; ``path`` is the file it was read from."""

    path: Path
    name: str
    base: dict[str, Any]
    run_dir: Path
    split: str
    metric: str
    control: str
    primary: str | None
    seeded: tuple[str, ...]
    arms: dict[str, Arm]

    def config(self, arm: Arm, seed: int) -> RunConfig:
        """The configuration of one arm and seed, in a run folder of its own.

        Raises:
            UserError: for values that no run could have.
        """
        seeds = {"stages": {name: {"seed": seed} for name in self.seeded}}
        folder = {"run_dir": str(self.run_dir / "arms" / arm.name / f"seed-{seed}")}
        content = merged(merged(merged(self.base, arm.overrides), seeds), folder)
        config = config_from(content, f"{self.path}: arm {arm.name}")
        return resolve_epochs(config, launcher.num_processes(config))

    def only(self, names: list[str]) -> "Grid":
        """The grid of these arms and the controls that they are compared with.

        Raises:
            UserError: for an arm that the grid has not.
        """
        for name in names:
            if name not in self.arms:
                raise UserError(f"--arms {name}: this grid has {', '.join(self.arms)}")
        wanted = {*names, *(self.arms[name].control for name in names)}
        arms = {name: arm for name, arm in self.arms.items() if name in wanted}
        return replace(self, arms=arms, primary=self.primary if self.primary in arms else None)

    def jobs(self) -> Iterator[tuple[Arm, int]]:
        """Every arm with every seed, the first seed of all arms first."""
        most = max(len(arm.seeds) for arm in self.arms.values())
        for position in range(most):
            for arm in self.arms.values():
                if position < len(arm.seeds):
                    yield arm, arm.seeds[position]


def read_grid(path: Path, overrides: Mapping[str, Any]) -> Grid:
    """Read and check a grid.

    Args:
        overrides: top-level keys given on the command line (``split``, ``run_dir``, …).

    Raises:
        UserError: naming the file and the key: unknown keys of the grid or the configuration,
            names that stand twice, arms that are equal, controls that do not exist.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    if "config" in given and "run_dir" not in given:
        raise UserError("--config: another configuration needs another --run_dir")
    content = read_yaml(path) | given
    for key in content:
        if key not in GRID_KEYS:
            raise UserError(f"{path}: unknown key '{key}'{nearest(str(key), GRID_KEYS)}")
    for key in ("config", "run_dir", "control", "arms"):
        if not content.get(key):
            raise UserError(f"{path}: '{key}' is missing")
    config = str(content["config"])
    beside = path.parent / config
    source = beside if beside.is_file() else installation.config_file(config)
    base = named_as_here(read_yaml(source), str(source))
    base = merged(base, _nested(content.get("set"), path, "set"))
    seeds = _seeds(content.get("seeds", [42]), path, "seeds")
    seeded = content.get("seeded", [*TRAINING_STAGES])
    for name in seeded:
        if name not in TRAINING_STAGES:
            raise UserError(f"{path}: seeded: '{name}' is none of {', '.join(TRAINING_STAGES)}")
    if not isinstance(content["arms"], dict):
        raise UserError(f"{path}: 'arms' must be a mapping of names to variants")
    arms = {
        str(name): _arm(str(name), settings or {}, seeds, str(content["control"]), path)
        for name, settings in content["arms"].items()
    }
    primary = content.get("primary")
    named = [("control", content["control"])] + [("primary", primary)] * (primary is not None)
    named += [(f"arms.{arm.name}.control", arm.control) for arm in arms.values()]
    for key, name in named:
        if name not in arms:
            raise UserError(f"{path}: {key} '{name}' is not among the arms{nearest(name, arms)}")
    grid = Grid(
        path, str(content.get("name", path.stem)), base, Path(content["run_dir"]),
        str(content.get("split", "test")), str(content.get("metric", "MRR@10")),
        str(content["control"]), primary, tuple(seeded), arms,
    )  # fmt: skip
    _refuse_equal_arms(grid)
    return grid


def needed_steps(config: RunConfig) -> list[str]:
    """The pipeline's steps that lead to the final student, in order, and what measures its
    teachers.

    Raises:
        UserError: if the configuration trains no student.
    """
    final = stages.final_student(config)
    if final is None:
        raise UserError("the configuration trains no student: set stages.NAME.steps above 0")
    wanted: set[str] = set()
    todo = [final]
    if stages.is_enabled(config, "teacher_check"):
        todo.append("teacher_check")
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted.add(name)
            todo += stages.upstream(config, name)
    return [name for name in stages.ORDER if name in wanted]


def _arm(name: str, settings: Any, seeds: tuple[int, ...], control: str, path: Path) -> Arm:
    where = f"arms.{name}"
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"{path}: {where}: a name has letters, digits, '-', '_', '+' and '.' only")
    if not isinstance(settings, dict):
        raise UserError(f"{path}: {where} must be a mapping ({', '.join(ARM_KEYS)})")
    for key in settings:
        if key not in ARM_KEYS:
            raise UserError(f"{path}: unknown key '{where}.{key}'{nearest(str(key), ARM_KEYS)}")
    overrides = _nested(settings.get("set"), path, f"{where}.set")
    if "terms" in settings:
        known = [field.name for field in fields(LossWeights)]
        for term in settings["terms"]:
            if term not in known:
                raise UserError(
                    f"{path}: unknown term '{where}.terms.{term}'{nearest(term, known)}"
                )
        weights = dict.fromkeys(known, 0.0) | settings["terms"]
        overrides = merged(overrides, {"stages": {"cascade": {"weights": weights}}})
    if "seeds" in settings:
        seeds = _seeds(settings["seeds"], path, f"{where}.seeds")
    return Arm(name, overrides, seeds, str(settings.get("control", control)),
               str(settings.get("about", "")))  # fmt: skip


def _nested(content: Any, path: Path, where: str) -> dict[str, Any]:
    """Overrides with dotted keys as nested mappings, every key one of the configuration's."""
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: '{where}' must be a mapping of configuration keys to values")
    out = named_as_here(nested(content), f"{path}: {where}")
    if problem := unknown_key(out, RunConfig):
        raise UserError(f"{path}: {where}: {problem}")
    return out


def _seeds(content: Any, path: Path, where: str) -> tuple[int, ...]:
    good = isinstance(content, list) and content and all(type(s) is int and s >= 0 for s in content)
    if not good or len(set(content)) != len(content):
        raise UserError(f"{path}: '{where}' must be a list of different integers of 0 or more")
    return tuple(content)


def _refuse_equal_arms(grid: Grid) -> None:
    """Two arms whose final models would be the same are a mistake in the grid."""
    seen: dict[str, str] = {}
    for arm in grid.arms.values():
        config = grid.config(arm, arm.seeds[0])
        try:
            final = needed_steps(config)[-1]
        except UserError as error:
            raise UserError(f"{grid.path}: arm {arm.name}: {error}") from None
        assert final in TRAINING_STAGES
        key = f"{arm.seeds[0]} {stages.fingerprint(config, final, launcher.num_processes(config))}"
        if key in seen:
            raise UserError(f"{grid.path}: arms {seen[key]} and {arm.name} train the same model")
        seen[key] = arm.name
