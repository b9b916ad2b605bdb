"""Configurations from what a program holds: a file, a shipped name, mappings."""

import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from typing import Any

import jsonargparse

from erniesearch.config.checks import named_as_here, validate
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import from_dict, read_yaml, unknown_key
from erniesearch.errors import UserError
from erniesearch.installation import config_file

Source = str | os.PathLike[str] | Mapping[str, Any] | RunConfig


def load_config(
    source: Source | None = None, changes: Mapping[str, Any] | None = None, /, **sections: Any
) -> RunConfig:
    """A validated configuration.

        load_config("my.yaml")
        load_config("quickstart", {"stages.cascade.steps": 100}, run_dir="runs/mine")
        load_config(run_dir="runs/mine", student={"path": "DIR"}, stages={"cascade": {"steps": 9}})

    Args:
        source: a YAML file, the name of a shipped configuration, nested mappings, or another
            configuration; None starts from the defaults.
        changes: values by key, as on the command line: ``{"student.path": "DIR"}``.
        sections: values by key at the top, or mappings of those that change within a section.

    ``data.path`` may be left out where data is given to what runs the configuration.

    Raises:
        UserError: for unknown keys (nearest named), wrong types and impossible values.
    """
    name = "config"
    if source is None:
        content: dict[str, Any] = {}
    elif isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        content = read_yaml(config_file(name))
    else:
        content = _plain(source)
    # Each by itself: a change under another library's name changes the key that is ours.
    content = named_as_here(content, name)
    for values in (changes or {}, sections):
        content = merged(content, named_as_here(nested(_plain(values)), name))
    return config_from(merged({"data": {"path": ""}}, content), name)


def config_from(content: dict[str, Any], source: str) -> RunConfig:
    """A validated config from nested mappings; ``source`` is named in errors.

    Raises:
        UserError: for unknown keys, wrong types and impossible values.
    """
    content = named_as_here(content, source)
    if problem := unknown_key(content, RunConfig):
        raise UserError(f"{source}: {problem}")
    try:
        settings = _parser().parse_object(content)
    except jsonargparse.ArgumentError as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from None
    try:
        return validate(from_dict(RunConfig, settings.as_dict()))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


@lru_cache
def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig)
    return parser


def _plain(value: Any) -> Any:
    """What a YAML file can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key as nested mappings."""
    out: dict[str, Any] = {}
    for key, value in changes.items():
        for part in reversed(str(key).split(".")):
            value = {part: value}
        out = merged(out, value)
    return out


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, those of ``over`` winning."""
    out = dict(base)
    for key, value in over.items():
        mine = out.get(key)
        both = isinstance(value, Mapping) and (mine is None or isinstance(mine, Mapping))
        out[key] = merged(mine or {}, value) if both else value
    return out
