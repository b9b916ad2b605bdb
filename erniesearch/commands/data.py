"""``data …``: make or convert data sets."""

import sys
from pathlib import Path

from jsonargparse import ArgumentParser


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
