"""The command line: which command is meant, and how its errors are told."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import jsonargparse

from erniesearch import __version__, exiting, progress
from erniesearch.errors import RankFailed, UserError, nearest

USAGE = """usage: erniesearch COMMAND [options]

Joint training of cross-encoder, late interaction and dual-encoder (ERNIE-Search).

commands:
  run CONFIG           every stage in order, then export, index, evaluate and the table
  ablate GRID          variants of a configuration, trained with several seeds and compared
  plan CONFIG          memory, traffic and time per rank before a training is started
  train                one stage in this process; start it with deepspeed, torchrun or srun
  report               a run, an ablation or benchmarks as one page; --watch while it goes on
  search               ask the index of a finished run
  serve                answer queries over HTTP, with a page that shows the three rankings
  evaluate             models and TREC runs on any data set in BEIR layout
  export               models of a run for other libraries, with cards; ONNX on request
  push                 a run's model, its card and its results to the hub
  export-checkpoint    model folders from a stage's checkpoint, without a GPU
  encode               passages or queries to vectors on disk; start it as train
  index                vectors on disk to a FAISS index of any kind
  mine                 hard negatives for a split from an index, dropped by a cross-encoder
  score                a teacher's scores of given lists, by any CrossEncoder
  data import          convert MS MARCO, DPR, SQuAD, Tevatron, … to BEIR layout
  data check           lengths, copies, judgements and splits of a data set
  data pydocs          write the embedded docstring corpus in BEIR layout
  data pycode          write the embedded code-search corpus in BEIR layout
  init config NAME     a copy of a shipped configuration, to be edited
  init encoder         a small untrained encoder with a vocabulary of the corpus's own
  env                  versions, processor and GPUs, for a report of a bug
  convert paddle       PaddleNLP's ERNIE weights into a folder that transformers loads

CONFIG is a YAML file, or the name of a shipped one (quickstart).
`erniesearch COMMAND --help` explains every option; --version prints the version.
Every command takes --progress auto|plain|json|quiet, how it tells how far it is (standard error;
ERNIESEARCH_PROGRESS says the same), and --quiet, short for --progress quiet.
"""


QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Loading a checkpoint without its pooler or with a new head is what we want, not news."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a failure, 2 for a user's mistake, 75 for
    a training that stopped on request and can be continued."""
    argv = _drop_local_rank(list(sys.argv[1:] if argv is None else argv))
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    before = os.environ.get(progress.VARIABLE)
    try:
        return _run(argv)
    finally:
        os.environ.pop(progress.VARIABLE, None)
        if before is not None:
            os.environ[progress.VARIABLE] = before


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        sys.stdout.write(f"erniesearch {__version__}\n")
        return 0
    try:
        argv = _take_progress(argv)
        groups = {command.split()[0] for command in COMMANDS if " " in command}
        name = " ".join(argv[:2]) if argv and argv[0] in groups else "".join(argv[:1])
        if name not in COMMANDS:
            raise UserError(f"unknown command '{name}'{nearest(name, COMMANDS)}; see --help")
        progress.set_stage(name)
        return _load(name)(argv[len(name.split()) :])
    except (UserError, jsonargparse.ArgumentError) as error:
        # Every rank meets the same mistake.
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            _tell(error)
        return 2
    except RankFailed as error:
        _tell(error)
        return 1
    except KeyboardInterrupt:
        return 130


# Imported when they are asked for: --help must not wait for torch.
COMMANDS = {
    "run": "train:run_command",
    "ablate": "ablate:ablate_command",
    "plan": "plan:plan_command",
    "train": "train:train_command",
    "step": "train:step_command",  # started by run; not in USAGE
    "report": "report:report_command",
    "search": "search:search_command",
    "serve": "serve:serve_command",
    "evaluate": "evaluate:evaluate_command",
    "export": "export:export_command",
    "push": "push:push_command",
    "export-checkpoint": "checkpoint:export_checkpoint_command",
    "encode": "encode:encode_command",
    "index": "index:index_command",
    "mine": "mine:mine_command",
    "score": "score:score_command",
    "data import": "data:import_command",
    "data check": "data:check_command",
    "data pydocs": "data:pydocs_command",
    "data pycode": "data:pycode_command",
    "init config": "init:config_command",
    "init encoder": "init:encoder_command",
    "env": "env:env_command",
    "convert paddle": "convert:paddle_command",
}


def entry() -> NoReturn:
    """The command of this process, which it ends."""
    exiting.run(main)


def _drop_local_rank(argv: list[str]) -> list[str]:
    """Without ``--local_rank``, which launchers add, in front of a module's command too;
    LOCAL_RANK says the same."""
    for flag in ("--local_rank", "--local-rank"):
        argv = [arg for arg in argv if not arg.startswith(flag + "=")]
        if flag in argv:
            del argv[argv.index(flag) : argv.index(flag) + 2]
    return argv


def _take_progress(argv: list[str]) -> list[str]:
    """Without ``--progress`` and ``--quiet``, which every command has: the environment says it from
    now on, to the processes that are started too.

    Raises:
        UserError: for a mode that there is not, and for two.
    """
    kept: list[str] = []
    given: list[str] = []
    rest = iter(argv)
    for arg in rest:
        if arg == "--":
            kept += [arg, *rest]
        elif arg == "--quiet":
            given.append("quiet")
        elif arg == "--progress" or arg.startswith("--progress="):
            mode = arg.partition("=")[2] if "=" in arg else next(rest, "")
            given.append(progress.checked(mode, "--progress"))
        else:
            kept.append(arg)
    if len(set(given)) > 1:
        raise UserError(f"--progress: {' and '.join(given)} at once; give one, --quiet is quiet")
    if given:
        os.environ[progress.VARIABLE] = given[0]
    progress.mode()
    return kept


def _tell(error: Exception) -> None:
    """On one line, without terminal controls or the bulk of an odd value."""
    message = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}"
                      for c in " ".join(str(error).split()))  # fmt: skip
    if len(message) > 1000:
        message = f"{message[:600]} … {message[-300:]}"
    progress.say(message, "error")


def _load(name: str) -> Callable[[list[str]], int]:
    module, function = COMMANDS[name].split(":")
    command: Callable[[list[str]], int] = getattr(
        importlib.import_module(f"erniesearch.commands.{module}"), function
    )
    return command


if __name__ == "__main__":
    entry()
