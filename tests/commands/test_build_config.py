"""Configurations made in Python: from a file, a shipped name, mappings and changes."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from erniesearch.config.build_config import load_config
from erniesearch.config.keys import RunConfig, StudentConfig
from erniesearch.config.stage_keys import StagesConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.errors import UserError
from erniesearch.installation import config_names, shipped_config

LEAST: dict[str, Any] = {"run_dir": "runs/x", "student": {"path": "m"}}


@pytest.mark.parametrize("name", config_names())
def test_a_shipped_name_is_its_file(name: str) -> None:
    assert load_config(name) == load_config(shipped_config(name))


def test_every_form_gives_the_same(tmp_path: Path) -> None:
    config = load_config("quickstart", {"stages.cascade.steps": 7, "student.layers": [0, 5]},
                         run_dir=tmp_path / "run", objective={"tau_de": 0.1})  # fmt: skip
    assert (config.stages.cascade.steps, config.student.layers) == (7, [0, 5])
    assert (config.run_dir, config.objective.tau_de) == (str(tmp_path / "run"), 0.1)
    plain = load_config("quickstart")
    assert config.student.path == plain.student.path  # what is not named stays
    assert config.stages.interaction == plain.stages.interaction
    (tmp_path / "my.yaml").write_text(to_yaml(config))
    for source in (tmp_path / "my.yaml", str(tmp_path / "my.yaml"), asdict(config), config):
        assert load_config(source) == config


def test_defaults_are_those_of_a_file() -> None:
    config = load_config(**LEAST, stages={"interaction": {"weights": {"dual_reg": 0}}})
    assert config.data.path == ""  # of what is given as data later
    assert config.stages.interaction.weights.li == StagesConfig().interaction.weights.li == 1
    assert config.stages.interaction.weights.dual_reg == 0
    assert config.stages.cascade == StagesConfig().cascade
    section = load_config(run_dir="runs/x", student=StudentConfig("m", pooling="mean"))
    assert section.student == StudentConfig("m", pooling="mean")
    assert isinstance(section, RunConfig)


def test_other_libraries_names_override_ours() -> None:
    changes = {"stages.cascade.max_steps": 5, "save_steps": 9}
    config = load_config("quickstart", changes, output_dir="runs/mine")
    assert (config.stages.cascade.steps, config.training.save_every) == (5, 9)
    assert config.run_dir == "runs/mine"


@pytest.mark.parametrize(
    ("arguments", "sections", "problem"),
    [
        (("quickstrt",), {}, "quickstrt: no such config file (did you mean 'quickstart'?)"),
        (("quickstart", {"stages.cascade.step": 3}), {}, "quickstart: unknown key 'stages.cascad"),
        ((), LEAST | {"studnt": {}}, "config: unknown key 'studnt' (did you mean 'student'?)"),
        ((), {"run_dir": "x"}, "config: the following arguments are required: student.path"),
        ((), LEAST | {"student": "m"}, "config: 'student' must be a mapping, found 'm'"),
        ((), LEAST | {"student": {"path": "m", "pooling": "max"}}, "config: Parser key"),
        ((), LEAST | {"stages": {"cascade": {"steps": -1}}}, "config: config key 'stages.cascade."),
        ((LEAST, {"objective.tau_de": 0}), {}, "config: config key 'objective.tau_de' is 0.0: mus"),
    ],
)
def test_mistakes_are_named(
    arguments: tuple[Any, ...], sections: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError) as error:
        load_config(*arguments, **sections)
    assert str(error.value).startswith(problem)
    assert "\n" not in str(error.value)
