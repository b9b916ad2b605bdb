"""``index``: embeddings to a FAISS folder."""

from erniesearch.commands.parsing import command_parser, parse_options
from erniesearch.config.options import IndexOptions


def index_command(argv: list[str]) -> int:
    """``erniesearch index --embeddings DIR --out DIR``."""
    parser = command_parser(
        "index", "Build a FAISS index, readable by Pyserini, from what `erniesearch encode`"
        " wrote. States memory and disk before it starts. OMP_NUM_THREADS bounds the cores; HNSW"
        " gives the same bytes again with one thread only.",
    )  # fmt: skip
    names = ("train_sample", "shards", "nprobe", "ef_search", "num_centroids", "candidates")
    positive = dict.fromkeys(names, 1)
    options, _ = parse_options(parser, argv, IndexOptions, at_least=positive)
    from erniesearch.retrieval.build_index import build_index

    build_index(options)
    return 0
