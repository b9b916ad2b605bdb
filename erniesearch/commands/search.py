"""``search`` and ``report``: ask a finished run."""

from pathlib import Path

from jsonargparse import ArgumentParser

from erniesearch.commands.parsing import load_run_config, name_accelerator
from erniesearch.errors import UserError


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
    name_accelerator()
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
