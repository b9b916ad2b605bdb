"""``search`` and ``report``: ask a finished run."""

from pathlib import Path
from typing import TYPE_CHECKING

from erniesearch.commands.parsing import (
    add_first_stage,
    command_parser,
    name_accelerator,
    require_at_least,
)
from erniesearch.errors import UserError
from erniesearch.progress import say

if TYPE_CHECKING:
    from erniesearch.search.result import SearchResult


def search_command(argv: list[str]) -> int:
    """``erniesearch search --run DIR QUERY``."""
    parser = command_parser("search", "Search the corpus of a finished run.")
    parser.add_argument("query", type=str, help="The query text.")
    parser.add_argument("--run", type=str, required=True, help="Folder of a finished run.")
    parser.add_argument("--depth", type=int, default=5, help="Passages shown.")
    parser.add_argument(
        "--rerank", type=str, default="none",
        help="none (dual-encoder only), late_interaction or cross_encoder.",
    )  # fmt: skip
    parser.add_argument("--rerank_depth", type=int, default=50, help="Passages reranked.")
    add_first_stage(parser)
    settings = parser.parse_args(argv)
    if settings.rerank not in ("none", "late_interaction", "cross_encoder"):
        raise UserError(f"--rerank {settings.rerank}: none, late_interaction or cross_encoder")
    require_at_least(settings, {"depth": 1, "rerank_depth": 1})
    name_accelerator()
    from erniesearch.search.system import SearchSystem

    reranks = settings.rerank != "none"
    late_first = settings.first_stage == "late_interaction"
    if late_first and settings.rerank == "late_interaction":
        raise UserError("--rerank late_interaction: with --first_stage late_interaction it has"
                        " ranked already; leave one of the two out")  # fmt: skip
    system = SearchSystem.from_run(
        settings.run, settings.rerank == "cross_encoder", settings.first_stage
    )
    if reranks and settings.rerank not in system.models:
        raise UserError(
            f"--rerank {settings.rerank}: {settings.run} trained no such model; it has"
            f" {', '.join(system.models)}"
        )
    result = system.search(
        settings.query, settings.depth,
        settings.rerank_depth if settings.rerank == "late_interaction" else int(late_first),
        settings.rerank_depth if settings.rerank == "cross_encoder" else 0,
    )  # fmt: skip
    _show(result)
    return 0


def _show(result: "SearchResult") -> None:
    from rich.console import Console
    from rich.markup import escape

    if result.query_truncated:
        say(
            f"the query has {result.query_tokens} tokens, of which the models read the first"
            f" {result.query_tokens_read}", "warning",
        )  # fmt: skip
    out = Console(highlight=False)
    for position, hit in enumerate(result.hits, 1):
        scores = "  ".join(
            f"{model.replace('_', '-')} {score:.3f}"
            for model, score in hit.scores.items()
            if score is not None
        )
        shown = hit.text if len(hit.text) <= 240 else hit.text[:240].rsplit(" ", 1)[0] + " …"
        out.print(f"{position:2d}. [bold]{escape(hit.pid)}[/]  {scores}", soft_wrap=True)
        out.print(f"    {escape(shown)}")


def report_command(argv: list[str]) -> int:
    """``erniesearch report --run DIR``."""
    parser = command_parser("report", "Print a run's table.")
    parser.add_argument("--run", type=str, required=True, help="Folder of a finished run.")
    settings = parser.parse_args(argv)
    from erniesearch.evaluation.table import Report, table_console

    Report.load(Path(settings.run)).show(table_console())
    return 0
