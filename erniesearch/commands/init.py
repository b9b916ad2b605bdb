"""``init …``: models to start from where there are no pretrained ones."""

import sys
from pathlib import Path

from jsonargparse import ArgumentParser

from erniesearch.commands.parsing import name_accelerator


def encoder_command(argv: list[str]) -> int:
    """``erniesearch init encoder --data DIR --out DIR``."""
    parser = ArgumentParser(
        prog="erniesearch init encoder", exit_on_error=False,
        description="Write a small BERT with random weights and a WordPiece vocabulary trained on"
        " the corpus, as student.path of a run whose post_train stage is its pretraining.",
    )  # fmt: skip
    parser.add_argument("--data", type=str, required=True,
                        help="Folder with corpus.jsonl, BEIR layout.")  # fmt: skip
    parser.add_argument("--out", type=str, required=True, help="Folder to write; must not exist.")
    parser.add_argument("--use_titles", type=bool, default=True,
                        help="Train the vocabulary on titles too.")  # fmt: skip
    parser.add_argument("--vocab_size", type=int, default=8000,
                        help="Most tokens of the vocabulary.")  # fmt: skip
    parser.add_argument("--hidden", type=int, default=256,
                        help="Hidden size, a multiple of 32: heads have 32.")  # fmt: skip
    parser.add_argument("--layers", type=int, default=4, help="Transformer layers.")
    parser.add_argument("--max_length", type=int, default=256, help="Longest input in tokens.")
    parser.add_argument("--seed", type=int, default=42, help="Fixes the random weights.")
    settings = parser.parse_args(argv)
    name_accelerator()
    from erniesearch.data.corpora import open_corpus
    from erniesearch.models.scratch import EncoderSize, write_encoder

    passages = open_corpus(Path(settings.data) / "corpus.jsonl", settings.use_titles).passages
    size = EncoderSize(settings.vocab_size, settings.hidden, settings.layers, settings.max_length)
    num_tokens = write_encoder(passages, Path(settings.out), size, settings.seed)
    sys.stdout.write(
        f"{settings.out}: {size.layers} layers, hidden {size.hidden}, vocabulary {num_tokens}\n"
    )
    return 0
