"""``evaluate``: models and TREC runs on any data set."""

import os
from pathlib import Path

from erniesearch.commands.parsing import command_parser, name_accelerator, parse_options
from erniesearch.config.options import EvaluateOptions
from erniesearch.errors import UserError

KINDS = ("dual_encoder", "late_interaction", "cross_encoder")
FORMER = {"--run": "--trec", "--rerank": "--rerankers"}
"""Options that had two meanings: of `search`, `serve`, `report` and `export`, and of this one."""


def evaluate_command(argv: list[str]) -> int:
    """``erniesearch evaluate --data DIR … --model EXPORT`` or ``--trec FILE …``."""
    parser = command_parser(
        "evaluate", "Evaluate models (sentence-transformers or PyLate folders, such as those in"
        " exports/) and TREC runs on sets in BEIR layout. With two or more systems, each is"
        " tested against the first; with several sets, there is a macro average too.",
    )  # fmt: skip
    for flag, now in FORMER.items():
        if flag in {arg.split("=")[0] for arg in argv}:
            raise UserError(f"{flag} is {now} here: {flag} means something else elsewhere")
    names = ("depth", "rerank_depth", "batch_size", "max_query_length", "max_passage_length", "dim")
    options, _ = parse_options(
        parser, argv, EvaluateOptions, lists=("data", "trec", "rerankers"),
        at_least=dict.fromkeys(names, 1),
    )  # fmt: skip
    for name, allowed in (("kind", KINDS), ("mean", ("qrels", "run"))):
        value = getattr(options, name)
        if value is not None and value not in allowed:
            raise UserError(f"--{name} {value}: one of {', '.join(allowed)}")
    for name in ("run_out", "json"):
        if getattr(options, name) is not None:
            _check_output(f"--{name}", Path(getattr(options, name)))
    name_accelerator()
    from erniesearch.evaluation.evaluate import evaluate
    from erniesearch.evaluation.table import table_console

    result = evaluate(options)
    if options.json:
        result.save(Path(options.json))
    result.show(table_console())
    return 0


def _check_output(option: str, path: Path) -> None:
    """Whether a file can be written there, before hours of work end without one."""
    if path.is_dir():
        raise UserError(f"{option} {path}: a folder; give a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option} {path}: cannot be written: the folder is read-only")
