"""``init …``: configurations, and models where there are no pretrained ones, to start from."""

import sys
from pathlib import Path

from erniesearch.commands.parsing import command_parser, name_accelerator
from erniesearch.errors import UserError
from erniesearch.installation import config_names, shipped_config


def config_command(argv: list[str]) -> int:
    """``erniesearch init config NAME --out FILE``."""
    names = ", ".join(config_names())
    parser = command_parser(
        "init config", f"Copy a configuration that comes with the package, to be edited: {names}.",
    )  # fmt: skip
    parser.add_argument("name", type=str, help=f"One of {names}.")
    parser.add_argument("--out", type=str, required=True, help="File to write; must not exist.")
    settings = parser.parse_args(argv)
    source, out = shipped_config(settings.name), Path(settings.out)
    try:
        with out.open("x", encoding="utf-8") as handle:
            handle.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(f"--out {out}: is there already") from None
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    sys.stdout.write(f"{out}: a copy of {settings.name}; set run_dir, data.path, student.path\n")
    return 0


def encoder_command(argv: list[str]) -> int:
    """``erniesearch init encoder --data DIR --out DIR``."""
    parser = command_parser(
        "init encoder", "Write a small BERT with random weights and a WordPiece vocabulary trained"
        " on the corpus, as student.path of a run whose post_train stage is its pretraining.",
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
    from erniesearch.data.corpus.texts import open_corpus
    from erniesearch.models.scratch import EncoderSize, write_encoder

    passages = open_corpus(Path(settings.data) / "corpus.jsonl", settings.use_titles).passages
    size = EncoderSize(settings.vocab_size, settings.hidden, settings.layers, settings.max_length)
    num_tokens = write_encoder(passages, Path(settings.out), size, settings.seed)
    sys.stdout.write(
        f"{settings.out}: {size.layers} layers, hidden {size.hidden}, vocabulary {num_tokens}\n"
    )
    return 0
