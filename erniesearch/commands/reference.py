"""The configuration's keys, told: briefly for ``--help``, in full for ``--help-all``, which also is
``docs/configuration.md``."""

import re
import sys
import textwrap
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser

from erniesearch import progress
from erniesearch.config import aliases
from erniesearch.config.keys import TRAINING_STAGES, RunConfig
from erniesearch.config.stage_keys import StagesConfig

WIDTH = 100
PROGRESS = (
    "--progress MODE says how far the work is, on standard error: "
    + "; ".join(f"{mode}, {told}" for mode, told in progress.MODES.items())
    + f". --quiet is short for --progress quiet, {progress.VARIABLE} says the same."
)


class Key(NamedTuple):
    """A key as a user writes it, its type and default in words, and what its docstring says."""

    name: str
    kind: str
    default: str
    text: str


def show_if_asked(parser: ArgumentParser, argv: list[str]) -> None:
    """Print the help that the command line asks for, and end.

    Args:
        parser: with the command's own options alone.
    """
    if "--help-all" in argv:
        sys.stdout.write(full())
    elif {"-h", "--help"} & {*argv}:
        sys.stdout.write(brief(parser))
    else:
        return
    raise SystemExit(0)


def brief(parser: ArgumentParser) -> str:
    """The command's own options, and every key on a line of its section."""
    lines = [f"usage: {parser.prog} [options] [--SECTION.KEY VALUE …]", ""]
    lines += [*textwrap.wrap(parser.description or "", WIDTH), "", "options:"]
    for action in parser._actions:
        if action.option_strings and "-h" not in action.option_strings:
            text = str(action.help or "").replace("(default: %(default)s)", "").strip()
            default = "" if action.default in (None, False, "==SUPPRESS==") else action.default
            lines += _aligned(f"{action.option_strings[0]}", text, default)
    lines += _aligned("--help-all", "Every key in full, as in docs/configuration.md.", "")
    lines += ["", *textwrap.wrap(PROGRESS, WIDTH)]
    lines += ["", "Every key of the configuration is an option too; defaults stand behind it. Names"
              " of Hugging Face's", "trainers are understood where they mean the same"
              " (--help-all)."]  # fmt: skip
    for title, keys in sections():
        shown = [f"--{key.name} {key.default}".rstrip() for key in keys]
        column = min(max(map(len, shown)), 44)
        lines += ["", f"{title}:"]
        lines += [_cut(f"  {name:<{column}} {_first_sentence(key.text)}")
                  for name, key in zip(shown, keys, strict=True)]  # fmt: skip
    return "\n".join(lines) + "\n"


def full() -> str:
    """The reference in Markdown."""
    out = [_INTRODUCTION.strip(), ""]
    for title, keys in sections():
        out += [f"## {title[0].upper()}{title[1:]}", "", "| key | values | default | |",
                "|---|---|---|---|"]  # fmt: skip
        for key in keys:
            default = f"`{key.default}`" if key.default else "required"
            cells = (f"`{key.name}`", key.kind, default, key.text)
            out.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        out.append("")
    out += [
        "## Names of other libraries",
        "",
        _ALIASES.strip(),
        "",
        "| theirs | here |",
        "|---|---|",
    ]
    out += [f"| `{theirs}` | `{key}` |" for theirs, key in aliases.table()]
    out += ["", "These mean something else, or are done otherwise; the error says how:", ""]
    out += [f"- `{theirs}`: {said}" for theirs, said in aliases.DIFFERENT.items()]
    return "\n".join(out) + "\n"


def sections() -> list[tuple[str, list[Key]]]:
    """Every key of a run by section; those of the training stages once, as ``stages.NAME``."""
    found: list[tuple[str, list[Key]]] = [("the run", [])]
    for field in fields(RunConfig):
        kind = get_type_hints(RunConfig)[field.name]
        if not is_dataclass(kind):
            found[0][1].append(_key(RunConfig, field, "", _default(field)))
        elif kind is not StagesConfig:
            found.append((_told(RunConfig)[field.name].rstrip("."), _keys(kind, field.name)))
    stages = StagesConfig()
    trained = f"each training stage, NAME one of {', '.join(TRAINING_STAGES)}"
    found.insert(-1, (trained, _stage_keys(stages)))
    for name in ("teacher_check", "mine"):
        told = _told(StagesConfig)[name].split(";")[0].rstrip(".")
        found.insert(-1, (told, _keys(type(getattr(stages, name)), f"stages.{name}")))
    return found


def _stage_keys(stages: StagesConfig) -> list[Key]:
    """The keys of all training stages; of a default that differs, whose."""
    settings = {name: getattr(stages, name) for name in TRAINING_STAGES}
    keys = []
    for field in fields(stages.cascade):
        if is_dataclass(getattr(stages.cascade, field.name)):
            kind = type(stages.cascade.weights)
            for term in fields(kind):
                values = {name: getattr(s.weights, term.name) for name, s in settings.items()}
                keys.append(_key(kind, term, f"stages.NAME.{field.name}.", _by_stage(values)))
            continue
        values = {name: getattr(s, field.name) for name, s in settings.items()
                  if field.name in {own.name for own in fields(s)}}  # fmt: skip
        keys.append(_key(type(stages.cascade), field, "stages.NAME.", _by_stage(values)))
    return keys


def _by_stage(values: dict[str, Any]) -> str:
    """The commonest default, and those of the stages that have another."""
    shown = {name: _value(value) for name, value in values.items()}
    common = max(shown.values(), key=list(shown.values()).count)
    others = [f"{name} {value}" for name, value in shown.items() if value != common]
    return common + (f" ({', '.join(others)})" if others else "")


def _keys(cls: Any, prefix: str) -> list[Key]:
    return [_key(cls, field, f"{prefix}.", _default(field)) for field in fields(cls)]


def _key(cls: type, field: "Field[Any]", prefix: str, default: str) -> Key:
    kind = get_type_hints(cls)[field.name]
    return Key(prefix + field.name, _kind(kind), default, _told(cls)[field.name])


@lru_cache
def _told(cls: type) -> dict[str, str]:
    """The docstring of every field, inherited ones included."""
    told: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base):
            told |= {param.arg_name: " ".join((param.description or "").split())
                     for param in parse_from_object(base).params}  # fmt: skip
    return told


def _default(field: "Field[Any]") -> str:
    if field.default_factory is not MISSING:
        return _value(field.default_factory())
    return "" if field.default is MISSING else _value(field.default)


def _value(value: Any) -> str:
    """As YAML has it."""
    plain = {None: "null", True: "true", False: "false", "": '""'}
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return plain[value] if value is None or value == "" or isinstance(value, bool) else str(value)


def _kind(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin is list:
        return f"list of {_kind(args[0])}"
    if args:
        return " or ".join(_kind(arg) for arg in args)
    names = {int: "integer", float: "number", str: "text", bool: "true, false", type(None): "null"}
    return names.get(kind, str(kind))


def _aligned(option: str, text: str, default: Any) -> list[str]:
    told = f"{text} Default: {default}." if default != "" else text
    return textwrap.wrap(
        told, WIDTH, initial_indent=f"  {option:<18} ", subsequent_indent=" " * 21
    )  # fmt: skip


def _first_sentence(text: str) -> str:
    return re.split(r"(?<!e\.g)[.;:] ", text)[0].rstrip(".")


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 2].rsplit(" ", 1)[0] + " …"


_INTRODUCTION = """
# Configuration

[简体中文](configuration.zh-CN.md)

<!-- Written by `erniesearch run --help-all > docs/configuration.md` from the code: edit there. -->

One YAML file describes a run. Every key below can be set in it, nested at the dots, and on the
command line, which wins over the file:

```bash
erniesearch run my.yaml --stages.cascade.steps 100 --training.zero_stage 2
erniesearch train --config my.yaml --stage cascade --print_config    # the resolved configuration
```

An unknown key, a value of the wrong type and an impossible one end the command with one line.

**How long a stage trains** is said in updates (`steps`) or in passes over its queries
(`num_train_epochs`), not in both; what the command line says takes the place of the file's. Passes
become updates before anything is trained: ⌈passes × queries / queries of an update⌉, rounded up so
that every query is seen as often as asked. The queries of a stage are those of the training split
with a relevant passage, with `negatives: given` those of them that have a line in negatives.jsonl,
with `mined` at most `stages.mine.max_queries`; in post_train they are the passages of the corpus.
An update has queries_per_rank × ranks × accumulation_steps of them. The run's record, config.yaml,
has the updates: a run continues on as many ranks, or on any number of them with `batch_size`.
"""

_ALIASES = """
Names of Hugging Face's `TrainingArguments`, of sentence-transformers, FlagEmbedding and Tevatron
are understood where they mean the same, in YAML and on the command line: `training.save_steps`, and
for what belongs to the whole run also `save_steps` alone. A key under two names is an error.
`report_to` takes a name, a list or `none`; `bf16` true or false; `lr_scheduler_type` linear, cosine
or constant_with_warmup; `max_steps: -1` is no update.
"""
