"""``serve``: a finished run as an HTTP service."""

from erniesearch.commands.parsing import (
    command_parser,
    name_accelerator,
    parse_options,
)
from erniesearch.config.options import SystemOptions
from erniesearch.errors import UserError


def serve_command(argv: list[str]) -> int:
    """``erniesearch serve --run DIR``, or with ``--model``, ``--index`` and ``--data``."""
    parser = command_parser(
        "serve", "Answer queries over HTTP, from a finished run or with models of your own:"
        " /search, /explain, /attention, /health, and a page at /.",
    )  # fmt: skip
    parser.add_argument(
        "--host", type=str, default="127.0.0.1",
        help="Address to listen on; 0.0.0.0 lets other machines ask.",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=8080, help="0 takes any free port.")
    parser.add_argument(
        "--late_interaction_depth", type=int | None, default=None,
        help="Passages that late interaction scores, and the most a request may ask for; 0 leaves"
        " it out. null means 100, or 0 if there is none.",
    )  # fmt: skip
    parser.add_argument(
        "--cross_encoder_depth", type=int | None, default=None,
        help="The same for the cross-encoder; null means 20, or 0 if there is none.",
    )  # fmt: skip
    options, settings = parse_options(
        parser, argv, SystemOptions, lists=("rerankers",),
        at_least={"late_interaction_depth": 0, "cross_encoder_depth": 0},
    )  # fmt: skip
    if not 0 <= settings.port <= 65535:
        raise UserError(f"--port {settings.port}: must be 0 to 65535")
    name_accelerator()
    from erniesearch.search.from_models import open_system

    try:
        from erniesearch.search.server import serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "pydantic", "starlette", "uvicorn"):
            raise
        raise UserError(
            f"the package {error.name} is not installed: pip install fastapi uvicorn"
        ) from None
    serve(
        lambda: open_system(options, settings.cross_encoder_depth != 0),
        settings.host, settings.port,
        settings.late_interaction_depth, settings.cross_encoder_depth,
    )  # fmt: skip
    return 0
