"""``index``: embeddings to a FAISS folder."""

from typing import Literal

from jsonargparse import ArgumentParser

from erniesearch.commands.parsing import require_positive


def index_command(argv: list[str]) -> int:
    """``erniesearch index --embeddings DIR --out DIR``."""
    parser = ArgumentParser(
        prog="erniesearch index", exit_on_error=False,
        description="Build a FAISS index, readable by Pyserini, from what `erniesearch encode`"
        " wrote. States memory and disk before it starts. OMP_NUM_THREADS bounds the cores; HNSW"
        " gives the same bytes again with one thread only.",
    )  # fmt: skip
    parser.add_argument(
        "--embeddings", type=str, required=True, help="Folder written by `erniesearch encode`."
    )
    parser.add_argument("--out", type=str, required=True, help="Folder to make.")
    parser.add_argument(
        "--factory", type=str, default="Flat",
        help="FAISS's index_factory string: Flat (exact), SQfp16, IVF1024,Flat, IVF1024,PQ48,"
        " OPQ48,IVF1024,PQ48, HNSW32 and so on.",
    )  # fmt: skip
    parser.add_argument(
        "--metric", type=Literal["ip", "l2"], default="ip",
        help="ip is the models' score, the inner product (cosine for normalised vectors).",
    )  # fmt: skip
    parser.add_argument(
        "--train_sample", type=int | None, default=None,
        help="Vectors to train on; by default 64 per centroid, 65,536 at least.",
    )  # fmt: skip
    parser.add_argument(
        "--shards", type=int, default=1,
        help="Parts built one after the other, each of them in memory alone; a search asks all.",
    )  # fmt: skip
    parser.add_argument(
        "--nprobe", type=int | None, default=None,
        help="Lists an IVF search visits unless it says otherwise; the root of their number by"
        " default.",
    )  # fmt: skip
    parser.add_argument(
        "--ef_search", type=int | None, default=None,
        help="Breadth of an HNSW search unless it says otherwise; FAISS's by default.",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=42, help="Draws the training sample.")
    parser.add_argument(
        "--gpu", type=bool, default=False, help="Train and add on the first GPU (IVF and Flat)."
    )
    settings = parser.parse_args(argv).as_dict()
    require_positive(settings, "train_sample", "shards", "nprobe", "ef_search")
    from erniesearch.retrieval.build_index import build_index

    build_index(**settings)
    return 0
