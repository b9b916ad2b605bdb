"""One YAML file describes a run: what is read, what is refused and in which words."""

import ast
import inspect
import json
import re
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentError
from support.processes import ROOT

from erniesearch import installation
from erniesearch.cli import main
from erniesearch.commands import reference
from erniesearch.commands.parsing import config_parser, parse_config
from erniesearch.config import keys, stage_keys
from erniesearch.config.checks import check_yaml, validate
from erniesearch.config.keys import DataConfig, RunConfig, StudentConfig
from erniesearch.config.stage_keys import LossWeights, PostTrainConfig
from erniesearch.config.yaml_file import from_dict, to_yaml, types_of
from erniesearch.errors import UserError

DEFAULT = RunConfig("runs/x", DataConfig("data/x"), StudentConfig("models/x"))
MINIMAL = "run_dir: runs/x\ndata: {path: data/x}\nstudent: {path: models/x}\n"


def parse(*argv: str) -> RunConfig:
    return parse_config(config_parser("train", ""), list(argv))[0]


def changed(config: Any, key: str, value: object) -> Any:
    """The frozen config with one nested key set."""
    name, _, rest = key.partition(".")
    return replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


def leaves(cls: type, prefix: str = "") -> list[tuple[str, type, str]]:
    """(dotted key, class, field) of every config key that is not itself a mapping."""
    found = []
    for name, kind in types_of(cls).items():
        if is_dataclass(kind):
            found += leaves(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            found.append((prefix + name, cls, name))
    return found


def docstrings() -> dict[tuple[str, str], str]:
    """The text below each field of each class of the config module."""
    found = {}
    modules = [inspect.getsource(module) for module in (stage_keys, keys)]
    for node in [node for text in modules for node in ast.parse(text).body]:
        if not isinstance(node, ast.ClassDef):
            continue
        for base in node.bases:
            inherited = {
                field: text for (cls, field), text in found.items() if cls == ast.unparse(base)
            }
            found |= {(node.name, field): text for field, text in inherited.items()}
        for field, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[node.name, ast.unparse(field.target)] = ast.literal_eval(text.value)
    return found


# --- what is read -------------------------------------------------------------------------------


def test_minimal_file_gives_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    assert parse("--config", str(file)) == DEFAULT


def test_yaml_of_a_config_reads_back_as_the_same_config(tmp_path: Path) -> None:
    config = changed(DEFAULT, "stages.cascade.weights.attention", 0.5)
    config = changed(config, "student.dropout", 0.0)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    assert parse(f"--config={file}") == config


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL + "seed: 7\nstages: {cascade: {steps: 5, weights: {ce: 0.5}}}\n")
    overrides = (
        "--seed", "8", "--stages.cascade.weights.li=0.25", "--student.tied", "false",
        "--evaluation.bm25_stemmer", "null",
    )  # fmt: skip
    config = parse("--config", str(file), *overrides)
    assert config.seed == 8
    assert config.stages.cascade.steps == 5  # the file's
    assert (config.stages.cascade.weights.ce, config.stages.cascade.weights.li) == (0.5, 0.25)
    assert config.student.tied is False
    assert config.evaluation.bm25_stemmer is None
    assert config.stages.interaction == DEFAULT.stages.interaction


@pytest.mark.parametrize("option", ["--config {}", "--config={}"])
def test_command_line_wins_wherever_the_file_is_named(option: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL + "seed: 7\n")
    given = option.format(file).split()
    assert parse("--seed", "8", *given, "--run_dir", "y") == replace(DEFAULT, seed=8, run_dir="y")


def test_partial_weights_keep_the_stages_own_defaults(tmp_path: Path) -> None:
    """A file that sets one weight leaves the stage's other terms as they are."""
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL + "stages: {interaction: {weights: {dual_reg: 0.0}}}\n")
    expected = replace(DEFAULT.stages.interaction.weights, dual_reg=0.0)
    assert parse("--config", str(file)).stages.interaction.weights == expected


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("training.max_grad_norm", ".inf", "is inf: must be a finite number"),
        ("stages.cascade.weights.ce", ".nan", "is nan: must be a finite number"),
        ("stages.cascade.steps", str(10**12), "is 1000000000000: must be below 2^31"),
    ],
)
def test_number_that_no_training_can_use_is_refused(
    key: str, value: str, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    with pytest.raises(UserError, match=re.escape(f"config key '{key}' {problem}")):
        parse("--config", str(file), f"--{key}", value)


def test_an_empty_section_has_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL + "objective:\nstages:\n  contrastive:\n")
    assert parse("--config", str(file)) == DEFAULT


@pytest.mark.parametrize("value", ["[" * 3000, "2026-02-30", "9" * 5000])
def test_value_that_yaml_cannot_read_is_refused(value: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL + f"seed: {value}\n")
    with pytest.raises(UserError, match="not valid YAML"):
        parse("--config", str(file))


def test_launchers_rank_argument_is_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    own = ("train", "--config", str(file), "--print_config")
    for given in (own, ("--local_rank=1", *own), (*own, "--local-rank=1", "--local_rank", "1")):
        with pytest.raises(SystemExit) as stop:
            main(list(given))
        assert stop.value.code == 0
        assert yaml.safe_load(capsys.readouterr().out)["run_dir"] == "runs/x"


def test_from_dict_is_the_inverse_of_asdict() -> None:
    assert from_dict(RunConfig, asdict(DEFAULT)) == DEFAULT


@pytest.mark.parametrize("name", installation.config_names())
def test_shipped_config_parses(name: str) -> None:
    config = parse("--config", name)
    assert from_dict(RunConfig, asdict(config)) == config


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("configs/deepspeed/*.json")), ids=lambda p: p.name
)
def test_shipped_zero_json_holds_only_the_zero_section(file: Path) -> None:
    content = json.loads(file.read_text())
    assert list(content) == ["zero_optimization"]
    assert file.stem == f"zero{content['zero_optimization']['stage']}"


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (MINIMAL + "sed: 1\n", "unknown key 'sed' (did you mean 'seed'?)"),
        (
            MINIMAL + "stages: {cascade: {qeries_per_rank: 1}}\n",
            "unknown key 'stages.cascade.qeries_per_rank' (did you mean 'queries_per_rank'?)",
        ),
        (
            MINIMAL + "stages:\n  cascade:\n    weights: {ce_to_dee: 1}\n",
            "unknown key 'stages.cascade.weights.ce_to_dee' (did you mean 'ce_to_de'?)",
        ),
        (
            MINIMAL + "stages: {post_train: {num_negatives: 1}}\n",
            "unknown key 'stages.post_train.num_negatives'",
        ),
        (MINIMAL + "zzzzzz: 1\n", "unknown key 'zzzzzz'"),
        (MINIMAL + "1: 1\n", "unknown key '1'"),
        (MINIMAL + "training: fast\n", "'training' must be a mapping, found 'fast'"),
        (MINIMAL + "stages: {mine: [1]}\n", "'stages.mine' must be a mapping, found [1]"),
        (MINIMAL + "stages: {mine: {depth: }}\n", "'stages.mine.depth' has no value"),
        ("- a\n- b\n", "expected a mapping of keys to values at the top level"),
        ("", "expected a mapping"),
    ],
)
def test_odd_key_is_named_with_the_nearest_right_one(
    text: str, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        check_yaml(file)
    assert str(error.value).startswith(f"{file}: {problem}")


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: 1\nb: [1, 2\nc: 3\n", 3), ("a: 1\n\tb: 2\n", 2), ("a: b: c\n", 1), ("? [a]\n: 1\n", 1)],
)
def test_broken_yaml_is_named_by_file_and_line(text: str, line: int, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{file}:{line}: not valid YAML")):
        check_yaml(file)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    with pytest.raises(UserError, match=re.escape(f"{file}: no such config file")):
        check_yaml(file)
    file.write_bytes(b"run_dir: \xff\n")
    with pytest.raises(UserError, match=re.escape(f"{file}: cannot be read as UTF-8")):
        check_yaml(file)
    with pytest.raises(UserError, match="cannot be read"):
        check_yaml(tmp_path)


def test_no_config_is_refused() -> None:
    with pytest.raises(UserError, match="no configuration: give --config"):
        parse("--seed", "1")


def test_unknown_option_is_named_with_the_nearest_right_one(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    for option in (["--stages.cascade.step", "3"], ["--stages.cascade.step=3"]):
        with pytest.raises(UserError) as error:
            parse("--config", str(file), *option)
        assert "unknown option '--stages.cascade.step' (did you mean 'stages.cascade.steps'?)" in (
            str(error.value)
        )


@pytest.mark.parametrize("place", ["file", "command line"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "1.5"),
        ("stages.cascade.steps", "ten"),
        ("stages.cascade.negatives", "hard"),
        ("student.tied", "perhaps"),
        ("training.zero_stage", "4"),
    ],
)
def test_ill_typed_value_is_refused_naming_the_key(
    key: str, value: str, place: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    odd = yaml.safe_load(value)
    file.write_text(to_yaml(changed(DEFAULT, key, odd) if place == "file" else DEFAULT))
    with pytest.raises(ArgumentError) as error:
        parse("--config", str(file), *([f"--{key}", value] if place == "command line" else []))
    assert key in str(error.value)
    assert value in str(error.value)


IMPOSSIBLE = {
    "stages.cascade.steps": -1,
    "stages.cascade.num_negatives": -1,
    "stages.cascade.easy_steps": -1,
    "stages.cascade.queries_per_rank": 0,
    "stages.cascade.chunk_size": 0,
    "stages.cascade.accumulation_steps": 0,
    "stages.cascade.student_lr": -1e-5,
    "stages.cascade.head_lr": -1e-5,
    "stages.cascade.teacher_lr": float("nan"),
    "stages.cascade.warmup_ratio": 1.5,
    "stages.cascade.weights.ce": -1.0,
    "stages.cascade.weights.mlm": 1.0,
    "stages.interaction.negatives": "mined",
    "stages.post_train.weights.attention": 1.0,
    "stages.post_train.weights.ce_to_li": 1.0,
    "stages.mine.skip_top": 50,
    "stages.mine.num_negatives": 0,
    "stages.mine.max_queries": 0,
    "objective.tau_de": 0.0,
    "objective.tau_li": -1.0,
    "objective.tau_att": 0.0,
    "objective.tau_ce": 0.0,
    "objective.tau_de_kl": -1.0,
    "objective.tau_li_kl": 0.0,
    "objective.tau_li_target": 0.0,
    "stages.teacher.teacher_head_lr": -1e-3,
    "student.layers": 0,
    "objective.virt_layers": [],
    "stages.post_train.weights.virt": 1.0,
    "data.max_query_length": 2,
    "data.max_passage_length": 2,
    "seed": -1,
    "student.late_interaction_dim": 0,
    "training.log_every": 0,
    "training.threads_per_process": 0,
    "training.num_processes": -1,
    "training.save_every": -1,
    "training.num_workers": -1,
    "training.max_grad_norm": -1.0,
    "training.weight_decay": -0.1,
    "evaluation.rerank_depth": 0,
    "evaluation.batch_size": 0,
    "evaluation.max_queries": 0,
    "evaluation.num_distractors": -1,
    "student.dropout": 1.0,
    "teacher.dropout": -0.1,
}


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_impossible_value_is_refused_naming_key_and_value(key: str) -> None:
    with pytest.raises(UserError) as error:
        validate(changed(DEFAULT, key, IMPOSSIBLE[key]))
    assert str(error.value).startswith(f"config key '{key}' is {IMPOSSIBLE[key]!r}: must be ")


def test_default_config_is_possible() -> None:
    assert validate(DEFAULT) is DEFAULT


def test_stage_that_trains_needs_a_term() -> None:
    config = changed(DEFAULT, "stages.cascade.weights", LossWeights())
    validate(config)  # 0 steps: nothing to train
    with pytest.raises(UserError, match=r"'stages\.cascade\.weights'.*one term at least"):
        validate(changed(config, "stages.cascade.steps", 1))


@pytest.mark.parametrize("term", ["ce", "ce_to_li", "ce_to_de"])
def test_terms_over_the_group_need_negatives(term: str) -> None:
    config = changed(DEFAULT, "stages.cascade.weights", LossWeights(**{term: 1.0}))
    config = changed(changed(config, "stages.cascade.steps", 1), "stages.cascade.num_negatives", 0)
    with pytest.raises(UserError, match=rf"'stages\.cascade\.num_negatives' is 0.*{term}"):
        validate(config)


def test_mined_negatives_need_mining() -> None:
    config = changed(changed(DEFAULT, "stages.cascade.steps", 1), "stages.mine.enabled", False)
    with pytest.raises(UserError, match=r"'stages\.cascade\.negatives' is 'mined'.*mine\.enabled"):
        validate(config)
    validate(changed(config, "stages.cascade.negatives", "bm25"))


@pytest.mark.parametrize("layers", [[], [2, 1], [1, 1], [-1, 2]])
def test_layers_are_a_rising_list(layers: list[int]) -> None:
    validate(changed(DEFAULT, "student.layers", [0, 5]))
    with pytest.raises(UserError, match=r"student.layers.*rising order, from 0"):
        validate(changed(DEFAULT, "student.layers", layers))


def test_dual_reg_needs_dropout() -> None:
    config = changed(DEFAULT, "stages.interaction.steps", 1)
    validate(config)  # the checkpoint's own
    config = changed(config, "student.dropout", 0.0)
    with pytest.raises(UserError, match=r"stages.interaction.weights.dual_reg.*student.dropout"):
        validate(config)
    validate(changed(config, "stages.interaction.weights.dual_reg", 0.0))


def test_no_ring_without_cross_batch_candidates() -> None:
    ring = changed(DEFAULT, "objective.late_interaction_exchange", "ring")
    validate(ring)
    for candidates in ("in_batch", "group"):
        with pytest.raises(UserError, match=r"late_interaction_exchange.*no passage travels"):
            validate(changed(ring, "objective.candidates", candidates))


def test_groups_of_one_have_no_candidates() -> None:
    config = changed(DEFAULT, "objective.candidates", "group")
    validate(changed(config, "stages.contrastive.steps", 1))
    config = changed(config, "stages.post_train.steps", 1)
    with pytest.raises(UserError, match=r"objective.candidates.*post_train has no hard negatives"):
        validate(config)


def test_spread_needs_a_teacher() -> None:
    config = changed(DEFAULT, "stages.mine.selection", "spread")
    validate(config)  # nothing is mined
    config = changed(config, "stages.cascade.steps", 1)
    with pytest.raises(UserError, match=r"stages.mine.selection.*stages.teacher.steps is 0"):
        validate(config)
    validate(changed(config, "stages.teacher.steps", 1))


def test_values_of_either_type(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL.replace("models/x", "models/x, layers: [0, 5]")
                    + "objective: {tau_ce: auto}\n")  # fmt: skip
    config = parse("--config", str(file))
    assert (config.student.layers, config.objective.tau_ce) == ([0, 5], "auto")
    config = parse("--config", str(file), "--student.layers", "2", "--objective.tau_ce", "1.5")
    assert (config.student.layers, config.objective.tau_ce) == (2, 1.5)


def test_zero_stage_is_set_in_one_place() -> None:
    config = changed(DEFAULT, "training.zero_json", "configs/deepspeed/zero2.json")
    validate(config)
    with pytest.raises(UserError, match=r"'training\.zero_stage' is 2: must be null"):
        validate(changed(config, "training.zero_stage", 2))


# --- what is explained --------------------------------------------------------------------------


def helped(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "train", "plan", "step", "export-checkpoint"])
def test_help_has_every_key_on_a_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = helped(capsys, command, "--help").splitlines()
    assert len(lines) < 200
    assert max(map(len, lines)) <= 100
    for key, cls, name in leaves(RunConfig):
        key = re.sub(rf"stages\.({'|'.join(keys.TRAINING_STAGES)})\.", "stages.NAME.", key)
        (line,) = [line for line in lines if line.split()[:1] == [f"--{key}"]]
        default = cls.__dataclass_fields__[name].default
        if default is not MISSING and "NAME" not in key:
            shown = yaml.safe_load(line.split()[1])
            assert shown == default, line


def test_every_field_is_explained_in_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    shown = helped(capsys, "run", "--help-all")
    texts = docstrings()
    for key, cls, name in leaves(RunConfig):
        key = re.sub(rf"stages\.({'|'.join(keys.TRAINING_STAGES)})\.", "stages.NAME.", key)
        text = texts.get((cls.__name__, name), "")
        assert text, f"{cls.__name__}.{name} has no docstring"
        row = next(line for line in shown.splitlines() if line.startswith(f"| `{key}` |"))
        assert cls is PostTrainConfig or " ".join(text.split()).replace("|", "\\|") in row, key


def test_the_reference_in_the_docs_is_what_the_code_says() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == reference.full(), "erniesearch run --help-all > docs/configuration.md"


def test_defaults_of_stages_are_told_apart() -> None:
    told = {key.name: key.default for _, found in reference.sections() for key in found}
    assert told["stages.NAME.num_negatives"] == "3 (teacher 7)"
    assert told["stages.NAME.weights.mlm"] == "0.0 (post_train 1.0)"
    assert told["training.trackers"] == "[tensorboard]"
    assert told["teacher.path"] == '""'
    assert told["data.path"] == ""


def test_every_mapping_has_a_docstring() -> None:
    texts = docstrings()
    for name, cls in (vars(stage_keys) | vars(keys)).items():
        if inspect.isclass(cls) and is_dataclass(cls):
            assert cls.__doc__, name
            assert all((name, field.name) in texts for field in fields(cls)), name
