"""Names of other libraries' trainers: the same key, or an error that names ours."""

import re
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from erniesearch.commands.parsing import config_parser, parse_config
from erniesearch.config import aliases
from erniesearch.config.checks import check_yaml
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import types_of
from erniesearch.errors import UserError

MINIMAL: dict[str, Any] = {
    "run_dir": "runs/x", "data": {"path": "data/x"}, "student": {"path": "models/x"},
}  # fmt: skip
THEIRS = """
output_dir: runs/x
model_name_or_path: models/x
save_steps: 7
per_device_eval_batch_size: 9
load_best_model_at_end: true
data: {path: data/x, query_max_len: 20}
teacher: {model_name_or_path: models/y}
objective: {temperature: 0.05}
training:
  validation_split: dev
  gradient_checkpointing: true
  save_total_limit: 3
  logging_steps: 10
  report_to: wandb
  bf16: true
  dataloader_num_workers: 2
  eval_steps: 20
  metric_for_best_model: eval_loss
stages:
  contrastive:
    per_device_train_batch_size: 16
    gradient_accumulation_steps: 2
    learning_rate: 1.0e-3
    lr_scheduler_type: constant_with_warmup
    max_steps: 100
    mini_batch_size: 32
"""
OURS = """
run_dir: runs/x
student: {path: models/x}
data: {path: data/x, max_query_length: 20}
teacher: {path: models/y}
objective: {tau_de: 0.05}
evaluation: {batch_size: 9}
training:
  load_best_model_at_end: true
  validation_split: dev
  save_every: 7
  activation_checkpointing: true
  keep_checkpoints: 3
  log_every: 10
  trackers: [wandb]
  precision: bf16
  num_workers: 2
  evaluate_every: 20
  best_metric: loss
stages:
  contrastive:
    queries_per_rank: 16
    accumulation_steps: 2
    student_lr: 1.0e-3
    schedule: constant
    steps: 100
    chunk_size: 32
"""


def parse(*argv: str) -> RunConfig:
    return parse_config(config_parser("train", ""), list(argv))[0]


def written(path: Path, content: dict[str, Any] | str) -> str:
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    path.write_text(text)
    return str(path)


def flat(content: dict[str, Any], prefix: str = "") -> list[str]:
    """The mapping as command-line options."""
    out = []
    for key, value in content.items():
        if isinstance(value, dict):
            out += flat(value, f"{prefix}{key}.")
        else:
            out += [f"--{prefix}{key}", value if isinstance(value, str) else yaml.safe_dump(
                value, default_flow_style=True).splitlines()[0]]  # fmt: skip
    return out


def test_their_names_are_ours_in_yaml_and_on_the_command_line(tmp_path: Path) -> None:
    wanted = parse("--config", written(tmp_path / "ours.yaml", OURS))
    assert wanted.stages.contrastive.student_lr == 1e-3
    assert parse("--config", written(tmp_path / "theirs.yaml", THEIRS)) == wanted
    assert parse(*flat(yaml.safe_load(THEIRS))) == wanted
    joined = [f"{a}={b}" for a, b in zip(*[iter(flat(yaml.safe_load(THEIRS)))] * 2, strict=True)]
    assert parse(*joined) == wanted


def test_the_command_line_wins_under_any_name(tmp_path: Path) -> None:
    file = written(tmp_path / "theirs.yaml", THEIRS)
    assert parse("--config", file, "--save_steps", "8").training.save_every == 8
    assert parse("--training.save_every", "8", "--config", file).training.save_every == 8
    assert parse("--config", file, "--training.report_to", "none").training.trackers == []
    assert parse("--config", file, "--max_grad_norm", "2").training.max_grad_norm == 2
    assert parse("--config", file, "--data", "data/y").data.path == "data/y"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"training": {"save_steps": 1, "save_every": 2}},
         "'training.save_steps' and 'training.save_every' are one key"),
        ({"training": {"save_every": 1}, "save_steps": 2},
         "'training.save_every' and 'save_steps' are one key"),
        ({"output_dir": "x"}, "'run_dir' and 'output_dir' are one key"),
        ({"stages": {"cascade": {"max_steps": 1, "steps": 1}}}, "are one key: keep one of them"),
        ({"stages": {"cascade": {"lr_scheduler_type": "constant"}}}, "has no warm-up"),
        ({"training": {"bf16": "maybe"}}, "'bf16' is 'maybe': must be true or false"),
        ({"learning_rate": 1e-5}, "every stage has its own: stages.NAME.student_lr"),
        ({"num_train_epochs": 3}, "every stage has its own: stages.NAME.num_train_epochs"),
        ({"training": {"learning_rate": 1e-5}}, "key 'training.learning_rate' (every stage"),
        ({"stages": {"cascade": {"save_steps": 1}}}, "(it is training.save_every here)"),
        ({"stages": {"cascade": {"warmup_steps": 10}}}, "stages.NAME.warmup_ratio"),
        ({"stages": {"cascade": {"train_group_size": 8}}}, "num_negatives is one less"),
        ({"fp16": True}, "unknown key 'fp16' (training.precision is auto, bf16 or fp32)"),
    ],
)  # fmt: skip
def test_two_names_and_other_meanings_are_refused(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    file = written(tmp_path / "run.yaml", MINIMAL | changes)
    with pytest.raises(UserError) as error:
        check_yaml(file)
    assert str(error.value).startswith(f"{file}: ")
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ("--save_steps 1 --training.save_every 2", "--save_steps and --training.save_every are"),
        ("--learning_rate 1", "unknown option '--learning_rate' (every stage has its own"),
        ("--training.warmup_steps=5", "the warm-up is a share of the updates"),
        ("--stages.cascade.lr_scheduler_type constant", "has no warm-up"),
    ],
)
def test_the_command_line_is_held_to_the_same(argv: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(problem)):
        parse("--config", written(tmp_path / "run.yaml", MINIMAL), *argv.split())


def keys(cls: type, prefix: str = "") -> set[str]:
    found = set()
    for name, kind in types_of(cls).items():
        found |= keys(kind, f"{prefix}{name}.") if is_dataclass(kind) else {prefix + name}  # type: ignore[arg-type]
    return found


def test_every_alias_stands_for_a_key_and_is_none() -> None:
    known = keys(RunConfig)
    for theirs, key in aliases.table():
        for name in ("contrastive", "cascade"):
            assert key.replace("NAME", name) in known
        assert not [own for own in known if own.rpartition(".")[2] == theirs], theirs
    sections = "|".join(types_of(RunConfig))
    for theirs, said in aliases.DIFFERENT.items():
        assert not [own for own in known if own.rpartition(".")[2] == theirs], theirs
        for key in re.findall(rf"\b(?:{sections})\.[A-Za-z_.]*[a-z_]", said):
            assert key.replace("NAME", "cascade") in known, theirs


def test_a_file_without_their_names_is_left_as_it_is(tmp_path: Path) -> None:
    content = yaml.safe_load(OURS)
    assert aliases.canonical(content) == content
    resolved = asdict(parse("--config", written(tmp_path / "ours.yaml", OURS)))
    assert aliases.canonical(resolved) == resolved
