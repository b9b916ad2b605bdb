"""Started by test_crew.py on two ranks: rank 1 fails in the middle of its share."""

import os
import sys
from pathlib import Path

from erniesearch.commands.parsing import config_parser, parse_config
from erniesearch.retrieval import crew
from erniesearch.retrieval.retriever import Retriever
from erniesearch.retrieval.trained import make_retriever


def broken(*_: object) -> None:
    raise OSError("no room on rank 1")


def main(config_file: str) -> None:
    config, _ = parse_config(config_parser("crew", ""), ["--config", config_file])
    if os.environ["RANK"] == "1":
        Retriever.vectors = broken  # type: ignore[method-assign, assignment]
    with crew.assembled() as leads:
        if leads:
            retriever = make_retriever(config, config.student)
            texts = ["baran desel"] * 64
            try:
                retriever.vectors(texts, "passage")
            except OSError as error:
                Path(config.run_dir).mkdir(parents=True, exist_ok=True)
                (Path(config.run_dir) / "told").write_text(str(error))


if __name__ == "__main__":
    main(sys.argv[1])
