"""Command lines and configuration files into a validated config."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TypeVar

import jsonargparse
import yaml
from docstring_parser import parse_from_object
from jsonargparse import ActionConfigFile, ArgumentParser

from erniesearch.commands import reference
from erniesearch.config import aliases
from erniesearch.config.checks import check_yaml, validate
from erniesearch.config.keys import TRAINING_STAGES, RunConfig
from erniesearch.config.yaml_file import from_dict, read_yaml, types_of
from erniesearch.errors import UserError, nearest
from erniesearch.installation import config_file, config_names

Options = TypeVar("Options")

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def command_parser(command: str, description: str) -> ArgumentParser:
    """A parser of ``erniesearch COMMAND``."""
    return ArgumentParser(
        prog=f"erniesearch {command}", description=description, exit_on_error=False,
        epilog=f"Every command: {reference.PROGRESS}",
    )  # fmt: skip


def config_parser(command: str, description: str) -> ArgumentParser:
    """A parser with ``--config`` and one option per config key."""
    parser = command_parser(command, description)
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="YAML file of the run, or the name of a shipped one (quickstart).",
    )
    return parser


def parse_config(
    parser: ArgumentParser, argv: list[str]
) -> tuple[RunConfig, jsonargparse.Namespace]:
    """Parse a YAML file with overrides into a validated config.

    Raises:
        UserError: for unknown keys (nearest named), keys under two names, wrong types and
            impossible values.
    """
    reference.show_if_asked(parser, argv)
    parser.add_class_arguments(RunConfig)
    argv = aliases.on_command_line(_file_first(list(argv)))
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    known |= set(_flat_keys(RunConfig))
    for position, arg in enumerate(argv):
        if arg == "--config" and position + 1 < len(argv):
            argv[position + 1] = _checked(argv[position + 1])
        elif arg.startswith("--config="):
            argv[position] = f"--config={_checked(arg.removeprefix('--config='))}"
        elif arg.startswith("--") and arg[2:].split("=")[0] not in known:
            key = arg[2:].split("=")[0]
            said = aliases.hint(key) or nearest(key, known)
            raise UserError(f"unknown option '--{key}'{said}")
    given = {arg.split("=")[0] for arg in argv}
    if not {"--config", "--run_dir"} & given:
        names = ", ".join(config_names())
        raise UserError(f"no configuration: give --config FILE, or a shipped one's name: {names}")
    settings = parser.parse_args(argv + _one_length(given))
    return validate(from_dict(RunConfig, settings.as_dict())), settings


def _one_length(given: set[str]) -> list[str]:
    """A stage's length on the command line takes the place of the file's, in updates or passes."""
    out = []
    for stage in TRAINING_STAGES:
        steps, epochs = f"--stages.{stage}.steps", f"--stages.{stage}.num_train_epochs"
        if steps in given and epochs not in given:
            out += [f"{epochs}=null"]
        elif epochs in given and steps not in given:
            out += [f"{steps}=0"]
    return out


def parse_options(
    parser: ArgumentParser,
    argv: list[str],
    cls: type[Options],
    *,
    switches: Sequence[str] = (),
    lists: Sequence[str] = (),
    at_least: Mapping[str, int],
) -> tuple[Options, jsonargparse.Namespace]:
    """Options declared as a dataclass, read from a command line; and all that was read.

    Args:
        switches: options without a value, true if they are there.
        lists: options with several values, which may be given several times.
        at_least: lower bounds by name; None passes.

    Raises:
        UserError: naming the option.
    """
    parser.add_class_arguments(cls, skip={*switches, *lists})
    told = {param.arg_name: param.description for param in parse_from_object(cls).params}
    for name in switches:
        parser.add_argument(f"--{name}", action="store_true", help=told[name])
    for name in lists:
        parser.add_argument(f"--{name}", action="extend", nargs="+", type=str, help=told[name])
    found = parser.parse_args(argv)
    require_at_least(found, at_least)
    values = {field.name: found[field.name] for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**values | {name: values[name] or [] for name in lists}), found


def require_at_least(found: jsonargparse.Namespace, bounds: Mapping[str, int]) -> None:
    """Refuse numbers below their bounds; None passes.

    Raises:
        UserError: naming the option.
    """
    for name, least in bounds.items():
        if found[name] is not None and found[name] < least:
            raise UserError(f"--{name} {found[name]}: must be {least} or more")


def _checked(given: str) -> str:
    """A config file, given by path or by name, as any parser may read it: its path, or its content
    where it has other libraries' names."""
    path = config_file(given)
    content = check_yaml(path)
    if content == read_yaml(path):
        return str(path)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _file_first(argv: list[str]) -> list[str]:
    """``--config`` before the options: to jsonargparse the later one wins, and options override."""
    for position, arg in enumerate(argv):
        if arg == "--config" or arg.startswith("--config="):
            end = position + (2 if arg == "--config" else 1)
            return argv[position:end] + argv[:position] + argv[end:]
    return argv


def _flat_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for name, kind in types_of(cls).items():
        keys.append(prefix + name)
        if is_dataclass(kind):
            keys += _flat_keys(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
    return keys


def name_accelerator() -> None:
    """Tell DeepSpeed that a CPU is meant; it would warn in every process that it found no GPU."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
