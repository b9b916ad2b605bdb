"""``search``: ask a finished run."""

from typing import TYPE_CHECKING

from erniesearch.commands.parsing import command_parser, name_accelerator, parse_options
from erniesearch.config.options import SystemOptions
from erniesearch.errors import UserError
from erniesearch.progress import say

if TYPE_CHECKING:
    from erniesearch.search.result import SearchResult


def search_command(argv: list[str]) -> int:
    """``erniesearch search --run DIR QUERY``, or with ``--model``, ``--index`` and ``--data``."""
    parser = command_parser(
        "search", "Search the corpus of a finished run, or an index with models of your own."
    )
    parser.add_argument("query", type=str, help="The query text.")
    parser.add_argument("--depth", type=int, default=5, help="Passages shown.")
    parser.add_argument(
        "--rerank", type=str, default=None,
        help="Of a run: none (the default; the first stage alone), late_interaction or"
        " cross_encoder.",
    )  # fmt: skip
    parser.add_argument("--rerank_depth", type=int, default=50, help="Passages reranked.")
    options, settings = parse_options(
        parser, argv, SystemOptions, lists=("rerankers",),
        at_least={"depth": 1, "rerank_depth": 1},
    )  # fmt: skip
    rerank: str = settings.rerank or "none"
    if rerank not in ("none", "late_interaction", "cross_encoder"):
        raise UserError(f"--rerank {rerank}: none, late_interaction or cross_encoder")
    if settings.rerank is not None and options.run is None:
        raise UserError(f"--rerank {rerank}: --run's; models of your own rerank by --rerankers")
    late_first = options.first_stage == "late_interaction"
    if late_first and rerank == "late_interaction":
        raise UserError("--rerank late_interaction: with --first_stage late_interaction it has"
                        " ranked already; leave one of the two out")  # fmt: skip
    name_accelerator()
    from erniesearch.search.from_models import open_system

    system = open_system(options, rerank == "cross_encoder")
    if rerank != "none" and rerank not in system.models:
        raise UserError(
            f"--rerank {rerank}: {options.run} trained no such model; it has"
            f" {', '.join(system.models)}"
        )
    rerankers = {rerank} if options.run else set(system.models)
    late = settings.rerank_depth if "late_interaction" in rerankers else 0
    if system.first_stage == "late_interaction":
        late = 1
    cross = settings.rerank_depth if "cross_encoder" in rerankers else 0
    _show(system.search(settings.query, settings.depth, late, cross))
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
