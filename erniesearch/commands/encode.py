"""``encode``: a collection to embeddings on disk."""

from erniesearch.commands.parsing import command_parser, name_accelerator, parse_options
from erniesearch.config.options import EncodeOptions


def encode_command(argv: list[str]) -> int:
    """``deepspeed launch/encode.py --model DIR --data DIR --out DIR``."""
    parser = command_parser(
        "encode", "Encode the passages (or queries) of a BEIR folder on the ranks this process"
        " belongs to (deepspeed, torchrun, srun, or none for one process). Shards that are already"
        " there are skipped: run the same command again after an interrupt, with any number of"
        " ranks.",
    )  # fmt: skip
    positive = dict.fromkeys(("batch_size", "shard_size", "max_length", "dim"), 1)
    options, _ = parse_options(parser, argv, EncodeOptions, at_least=positive)
    name_accelerator()
    from erniesearch.retrieval.encode_collection import encode_collection

    encode_collection(options)
    return 0
