"""Command lines and configuration files into a validated config."""

import os
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import jsonargparse
from jsonargparse import ActionConfigFile, ArgumentParser

from erniesearch.config.checks import check_yaml, validate
from erniesearch.config.keys import RunConfig, from_dict
from erniesearch.errors import UserError, nearest
from erniesearch.installation import config_file, config_names

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def config_parser(command: str, description: str) -> ArgumentParser:
    """A parser with ``--config`` and one option per config key."""
    parser = ArgumentParser(
        prog=f"erniesearch {command}", description=description, exit_on_error=False
    )
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
        UserError: for unknown keys (nearest named), wrong types and impossible values.
    """
    parser.add_class_arguments(RunConfig)
    argv = _file_first(list(argv))
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    known |= set(_flat_keys(RunConfig))
    for position, arg in enumerate(argv):
        if arg == "--config" and position + 1 < len(argv):
            argv[position + 1] = _checked(argv[position + 1])
        elif arg.startswith("--config="):
            argv[position] = f"--config={_checked(arg.removeprefix('--config='))}"
        elif arg.startswith("--") and arg[2:].split("=")[0] not in known:
            key = arg[2:].split("=")[0]
            raise UserError(f"unknown option '--{key}'{nearest(key, known)}")
    if not {"-h", "--help", "--config", "--run_dir"} & {arg.split("=")[0] for arg in argv}:
        names = ", ".join(config_names())
        raise UserError(f"no configuration: give --config FILE, or a shipped one's name: {names}")
    settings = parser.parse_args(argv)
    return validate(from_dict(RunConfig, settings.as_dict())), settings


def require_positive(options: dict[str, Any], *names: str) -> None:
    """Refuse numbers below 1; None passes.

    Raises:
        UserError: naming the option.
    """
    for name in names:
        if options[name] is not None and options[name] < 1:
            raise UserError(f"--{name} {options[name]}: must be 1 or more")


def _checked(given: str) -> str:
    """Path of a config file, given by path or by name, that any parser may read."""
    path = config_file(given)
    check_yaml(path)
    return str(path)


def _file_first(argv: list[str]) -> list[str]:
    """``--config`` before the options: to jsonargparse the later one wins, and options override."""
    for position, arg in enumerate(argv):
        if arg == "--config" or arg.startswith("--config="):
            end = position + (2 if arg == "--config" else 1)
            return argv[position:end] + argv[:position] + argv[end:]
    return argv


def _flat_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for name, kind in get_type_hints(cls).items():
        keys.append(prefix + name)
        if is_dataclass(kind):
            keys += _flat_keys(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
    return keys


def name_accelerator() -> None:
    """Tell DeepSpeed that a CPU is meant; it would warn in every process that it found no GPU."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
