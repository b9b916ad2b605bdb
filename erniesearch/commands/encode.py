"""``encode``: a collection to embeddings on disk."""

from typing import Literal

from jsonargparse import ArgumentParser

from erniesearch.commands.parsing import name_accelerator, require_positive


def encode_command(argv: list[str]) -> int:
    """``deepspeed launch/encode.py --model DIR --data DIR --out DIR``."""
    parser = ArgumentParser(
        prog="erniesearch encode", exit_on_error=False,
        description="Encode the passages (or queries) of a BEIR folder on the ranks this process"
        " belongs to (deepspeed, torchrun, srun, or none for one process). Shards that are already"
        " there are skipped: run the same command again after an interrupt, with any number of"
        " ranks.",
    )  # fmt: skip
    parser.add_argument(
        "--model", type=str, required=True,
        help="Folder: exports/dual_encoder, exports/late_interaction, any sentence-transformers"
        " folder of Transformer + Pooling (+ Normalize), RUN/stages/NAME/model/student, or, with"
        " --pooling, a plain encoder. For untied towers the name without _query or _passage.",
    )  # fmt: skip
    parser.add_argument("--data", type=str, required=True, help="Folder in BEIR layout.")
    parser.add_argument(
        "--out", type=str, required=True, help="Folder for manifest.json and the shards."
    )
    parser.add_argument(
        "--side", type=Literal["passage", "query"], default="passage", help="What is encoded."
    )
    parser.add_argument(
        "--split", type=str | None, default=None,
        help="With --side query: only the queries of this qrels file; all by default.",
    )  # fmt: skip
    parser.add_argument(
        "--use_titles", type=bool, default=True, help="Put a passage's title before its text."
    )
    parser.add_argument(
        "--what", type=Literal["vectors", "tokens"] | None, default=None,
        help="One vector a text, or late interaction's token vectors; by default what the model"
        " makes, vectors if both.",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", type=Literal["fp32", "fp16", "bf16"], default="fp16", help="Stored as."
    )
    parser.add_argument(
        "--precision", type=Literal["auto", "fp32", "bf16"], default="auto",
        help="Computed in; auto is bf16 on a GPU and fp32 on a CPU.",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=64, help="Texts per forward pass.")
    parser.add_argument(
        "--shard_size", type=int | None, default=None,
        help="Rows of a shard, which one rank encodes and holds in memory; 50,000 for vectors and"
        " 5,000 for tokens by default.",
    )  # fmt: skip
    parser.add_argument(
        "--max_length", type=int | None, default=None,
        help="Longest text in tokens, [CLS] and [SEP] included; the model folder's by default.",
    )  # fmt: skip
    parser.add_argument(
        "--pooling", type=Literal["cls", "mean"] | None, default=None,
        help="For encoders whose folder does not say it.",
    )  # fmt: skip
    settings = parser.parse_args(argv).as_dict()
    require_positive(settings, "batch_size", "shard_size", "max_length")
    name_accelerator()
    from erniesearch.retrieval.encode_collection import encode_collection

    encode_collection(**settings)
    return 0
