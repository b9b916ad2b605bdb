"""YAML files: read strictly, and held against the dataclass that describes them."""

from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from erniesearch.config import aliases
from erniesearch.errors import UserError, nearest


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error and not the later value's."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag != "tag:yaml.org,2002:merge":
                key = str(self.construct_object(key_node, deep=True))
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"'{key}' stands twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        UserError: naming file and line, for what is no YAML, no mapping, or has a key twice.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{line}: not valid YAML: {problem}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of keys to values at the top level")
    return content


def types_of(cls: type) -> dict[str, type[Any]]:
    """The keys of a config dataclass, with their types."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def unknown_key(content: dict[Any, Any], cls: type, prefix: str = "") -> str | None:
    """What is wrong with the first key that ``cls`` does not have, or that has no value."""
    hints = types_of(cls)
    for key, value in content.items():
        if key not in hints:
            said = aliases.hint(f"{prefix}{key}") or nearest(str(key), hints)
            return f"unknown key '{prefix}{key}'{said}"
        if is_dataclass(hints[key]):
            if value is None:
                value = {}
            if not isinstance(value, dict):
                return f"'{prefix}{key}' must be a mapping, found {value!r}"
            if problem := unknown_key(value, hints[key], f"{prefix}{key}."):  # type: ignore[arg-type]
                return problem
        elif value is None and type(None) not in get_args(hints[key]):
            return f"'{prefix}{key}' has no value: give one, or leave the key out"
    return None


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, keys in the order of the dataclasses."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def from_dict(cls: type, content: dict[str, Any]) -> Any:
    """Rebuild a (nested) config dataclass from plain dictionaries (the inverse of ``asdict``)."""
    values = {
        name: from_dict(kind, content[name]) if is_dataclass(kind) else content[name]  # type: ignore[arg-type]
        for name, kind in types_of(cls).items()
        # A section that stands there empty is None, and has its defaults.
        if name in content and not (is_dataclass(kind) and content[name] is None)
    }
    return cls(**values)
