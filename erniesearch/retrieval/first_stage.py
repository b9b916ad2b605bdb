"""What finds passages in a corpus: a dual-encoder's vectors, or late interaction's tokens."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from erniesearch.errors import UserError
from erniesearch.retrieval.model_folder import ModelFolder
from erniesearch.retrieval.retriever import Retriever
from erniesearch.retrieval.token_index import TokenIndex
from erniesearch.retrieval.vector_index import VectorIndex

Index = VectorIndex | TokenIndex


def retrieve(
    retriever: Retriever,
    index: Index,
    queries: Sequence[str],
    depth: int,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores of each query's best passages, as the index's ``search`` gives them.

    Args:
        allowed: of a late-interaction index, the passages that may be found, ``[P]`` bool.
    """
    if isinstance(index, TokenIndex):
        return index.search(retriever.tokens(queries, "query"), depth, allowed)
    assert allowed is None
    return index.search(retriever.vectors(queries, "query"), depth)


def is_token_index(folder: Path) -> bool:
    """Whether the folder is `erniesearch index`'s of token vectors."""
    return (folder / "codec").is_file()


def open_index(
    folder: Path,
    found: ModelFolder,
    nprobe: int | None = None,
    ef_search: int | None = None,
    gpu: bool = False,
    candidates: int | None = None,
) -> Index:
    """A folder of `erniesearch index`, for queries that a model encodes.

    Args:
        found: the model's folder.
        nprobe, ef_search, gpu: as in :meth:`VectorIndex.load`.
        candidates: as in :meth:`TokenIndex.load`.

    Raises:
        UserError: also for a model that makes no such vectors, and settings the index does not
            have.
    """
    tokens = is_token_index(folder)
    if not (found.has_tokens if tokens else found.has_vectors):
        holds = "late interaction's token vectors" if tokens else "a dual-encoder's vectors"
        raise UserError(
            f"index folder {folder} holds {holds}, and model '{found.settings.path}' is a"
            f" {found.kind.replace('_', '-')}: give the model that encoded the passages"
        )
    if not tokens:
        if candidates is not None:
            raise UserError(
                f"--candidates: index folder {folder} has one vector a text: leave it out"
            )
        return VectorIndex.load(folder, nprobe, ef_search, gpu)
    for name, value in (("--ef_search", ef_search is not None), ("--gpu", gpu)):
        if value:
            raise UserError(f"{name}: index folder {folder} is late interaction's: leave it out")
    return TokenIndex.load(folder, nprobe, candidates)
