"""The command line. Heavy imports wait until a command needs them."""

import os
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_type_hints

import jsonargparse
from jsonargparse import ActionConfigFile, ArgumentParser

from erniesearch import __version__
from erniesearch.config import (
    TRAINING_STAGES,
    RunConfig,
    check_yaml,
    from_dict,
    validate,
)
from erniesearch.errors import UserError, nearest

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

USAGE = """usage: erniesearch COMMAND [options]

Joint training of cross-encoder, late interaction and dual-encoder (ERNIE-Search).

commands:
  run CONFIG           every stage in order, then export, index, evaluate and the table
  train                one stage in this process; start it with deepspeed, torchrun or srun
  search               ask the index of a finished run
  report               print the table of a finished run again
  data pydocs          write the embedded docstring corpus in BEIR layout

`erniesearch COMMAND --help` explains every option; --version prints the version.
"""


QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Loading a checkpoint without its pooler or with a new head is what we want, not news."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a failure, 2 for a user's mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        sys.stdout.write(f"erniesearch {__version__}\n")
        return 0
    name = " ".join(argv[:2]) if argv[0] == "data" else argv[0]
    try:
        if name not in COMMANDS:
            raise UserError(f"unknown command '{name}'{nearest(name, COMMANDS)}; see --help")
        return COMMANDS[name](argv[len(name.split()) :])
    except (UserError, jsonargparse.ArgumentError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every rank meets the same mistake
            message = " ".join(str(error).split())
            sys.stderr.write(f"erniesearch: error: {message}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def config_parser(command: str, description: str) -> ArgumentParser:
    """A parser with ``--config`` and one option per config key."""
    parser = ArgumentParser(
        prog=f"erniesearch {command}", description=description, exit_on_error=False
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of the run.")
    return parser


def parse_config(
    parser: ArgumentParser, argv: list[str]
) -> tuple[RunConfig, jsonargparse.Namespace]:
    """Parse a YAML file with overrides into a validated config.

    Raises:
        UserError: for unknown keys (nearest named), wrong types and impossible values.
    """
    parser.add_class_arguments(RunConfig)
    for flag in ("--local_rank", "--local-rank"):  # launchers add it; LOCAL_RANK says the same
        argv = [arg for arg in argv if not arg.startswith(flag + "=")]
        if flag in argv:
            del argv[argv.index(flag) : argv.index(flag) + 2]
    argv = _file_first(argv)
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    known |= set(_flat_keys(RunConfig))
    for position, arg in enumerate(argv):
        if arg == "--config" and position + 1 < len(argv):
            check_yaml(argv[position + 1])
        elif arg.startswith("--config="):
            check_yaml(arg.removeprefix("--config="))
        elif arg.startswith("--") and arg[2:].split("=")[0] not in known:
            key = arg[2:].split("=")[0]
            raise UserError(f"unknown option '--{key}'{nearest(key, known)}")
    if not {"-h", "--help", "--config", "--run_dir"} & {arg.split("=")[0] for arg in argv}:
        raise UserError("no configuration: give --config FILE (see configs/)")
    settings = parser.parse_args(argv)
    return validate(from_dict(RunConfig, settings.as_dict())), settings


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


def run_command(argv: list[str]) -> int:
    """``erniesearch run CONFIG``."""
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    parser = config_parser(
        "run", "Run every stage of a config, each through the DeepSpeed launcher; finished stages"
        " are skipped, an interrupted one continues.",
    )  # fmt: skip
    parser.add_argument(
        "--only", type=str | None, default=None,
        help="Comma-separated steps to run, e.g. mine,cascade; all by default.",
    )  # fmt: skip
    config, settings = parse_config(parser, argv)
    _name_accelerator()
    from erniesearch import pipeline

    try:
        pipeline.run(config, settings.only.split(",") if settings.only else None)
    except pipeline.StageFailed as error:
        if error.status != 2:  # a user's mistake has been told already
            sys.stderr.write(f"erniesearch: {error}; run the same command again to continue\n")
        return 2 if error.status == 2 else 1
    return 0


def train_command(argv: list[str]) -> int:
    """``deepspeed launch/train.py --config … --stage …``."""
    parser = config_parser(
        "train", "Train one stage on the ranks this process belongs to (deepspeed, torchrun, srun,"
        " or none for one process).",
    )  # fmt: skip
    parser.add_argument(
        "--stage", type=str, default="interaction",
        help=f"One of {', '.join(TRAINING_STAGES)}. Stages that start from another's result need"
        " it in run_dir.",
    )  # fmt: skip
    config, settings = parse_config(parser, argv)
    if settings.stage not in TRAINING_STAGES:
        hint = nearest(settings.stage, TRAINING_STAGES)
        raise UserError(f"--stage {settings.stage}: one of {', '.join(TRAINING_STAGES)}{hint}")
    _name_accelerator()
    import torch.distributed as dist

    from erniesearch.training.loop import train_stage

    try:
        train_stage(config, settings.stage)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def search_command(argv: list[str]) -> int:
    """``erniesearch search --run DIR QUERY``."""
    parser = ArgumentParser(
        prog="erniesearch search", description="Search the corpus of a finished run.",
        exit_on_error=False,
    )  # fmt: skip
    parser.add_argument("query", type=str, help="The query text.")
    parser.add_argument("--run", type=str, required=True, help="Folder of a finished run.")
    parser.add_argument("--depth", type=int, default=5, help="Passages shown.")
    parser.add_argument(
        "--rerank", type=str, default="none",
        help="none (dual-encoder only), late_interaction or cross_encoder.",
    )  # fmt: skip
    parser.add_argument("--rerank_depth", type=int, default=50, help="Passages reranked.")
    settings = parser.parse_args(argv)
    if settings.rerank not in ("none", "late_interaction", "cross_encoder"):
        raise UserError(f"--rerank {settings.rerank}: none, late_interaction or cross_encoder")
    for name in ("depth", "rerank_depth"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name} {getattr(settings, name)}: must be 1 or more")
    _name_accelerator()
    from erniesearch.steps import interactive_search

    interactive_search(
        load_run_config(settings.run), settings.query, settings.depth, settings.rerank,
        settings.rerank_depth,
    )  # fmt: skip
    return 0


def report_command(argv: list[str]) -> int:
    """``erniesearch report --run DIR``."""
    parser = ArgumentParser(
        prog="erniesearch report", description="Print a run's table.", exit_on_error=False
    )
    parser.add_argument("--run", type=str, required=True, help="Folder of a finished run.")
    settings = parser.parse_args(argv)
    from erniesearch.report import Report, table_console

    Report.load(Path(settings.run)).show(table_console())
    return 0


def pydocs_command(argv: list[str]) -> int:
    """``erniesearch data pydocs --out DIR``."""
    parser = ArgumentParser(
        prog="erniesearch data pydocs", exit_on_error=False,
        description="Build a retrieval set from the docstrings on this machine: summary lines are"
        " queries, the rest of each docstring is its passage; split by module.",
    )  # fmt: skip
    parser.add_argument("--out", type=str, required=True, help="Folder to write, BEIR layout.")
    parser.add_argument(
        "--max_pairs", type=int | None, default=None, help="Keep at most this many queries."
    )
    settings = parser.parse_args(argv)
    from erniesearch.data import pydocs

    facts = pydocs.build(Path(settings.out), settings.max_pairs)
    splits = ", ".join(f"{name} {count}" for name, count in facts["qrels"].items())  # type: ignore[attr-defined]
    sys.stdout.write(
        f"{settings.out}: {facts['passages']} passages, {facts['queries']} queries ({splits})\n"
    )
    return 0


def _name_accelerator() -> None:
    """Tell DeepSpeed that a CPU is meant; it would warn in every process that it found no GPU."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def load_run_config(run_dir: str) -> RunConfig:
    """The config that a run folder recorded.

    Raises:
        UserError: if there is none.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path}: no such file; --run names the folder of a finished run")
    parser = config_parser("search", "")
    config, _ = parse_config(parser, ["--config", str(path), "--run_dir", run_dir])
    return config


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run_command,
    "train": train_command,
    "search": search_command,
    "report": report_command,
    "data pydocs": pydocs_command,
}

if __name__ == "__main__":
    sys.exit(main())
