"""Late interaction's vectors of a whole corpus on disk, so that reranking encodes queries alone."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import Tensor

from erniesearch.config.options import IndexOptions
from erniesearch.data.corpus.tokens import open_tokens
from erniesearch.errors import UserError
from erniesearch.retrieval.build_index import build_index
from erniesearch.retrieval.embeddings import Embeddings, Manifest, claim, read_manifest
from erniesearch.retrieval.encode_collection import SHARD_SIZES, encode_shards, read_collection
from erniesearch.retrieval.model_folder import fingerprint, read_folder
from erniesearch.retrieval.retriever import Retriever
from erniesearch.retrieval.token_index import TokenIndex


class TokenVectors:
    """What :func:`store_token_vectors` has written, memory-mapped.

    Args:
        row_of: the collection's row of a pid.

    Raises:
        UserError: if the folder is not whole, or holds another number of passages.
    """

    def __init__(self, folder: Path, row_of: Mapping[str, int]) -> None:
        found = Embeddings(folder)
        if len(found) != len(row_of):
            raise UserError(
                f"{folder}: token vectors of {len(found)} passages, but the collection has"
                f" {len(row_of)}: evaluate the run again"
            )
        self._row_of, self._shards = row_of, list(found)
        self._size = found.manifest.shard_size

    def __call__(self, pids: Sequence[str]) -> list[Tensor]:
        """Token vectors of each passage, ``[num_tokens, dim]`` in fp16."""
        places = (divmod(self._row_of[pid], self._size) for pid in pids)
        return [self._of(shard, row) for shard, row in places]

    def _of(self, shard: int, row: int) -> Tensor:
        _, _, embeddings, offsets = self._shards[shard]
        assert offsets is not None
        return embeddings[int(offsets[row]) : int(offsets[row + 1])]


def store_token_vectors(
    retriever: Retriever, data: Path, use_titles: bool, folder: Path, most: float
) -> str | None:
    """Write the vectors of a collection's passages in fp16, as `erniesearch encode --what tokens`
    does, if they take at most ``most`` bytes. Those of the same model and collection are kept, a
    part of them finished, others removed.

    Returns:
        Why nothing is stored; None if it is.
    """
    collection = read_collection(data, "passage", None, use_titles)
    reading = retriever.text_format.passage
    lengths = open_tokens(collection.texts, retriever.tokenizer, reading.prompt).lengths
    settings, longest = retriever.student.settings, retriever.lengths["passage"]
    size = (
        2
        * settings.late_interaction_dim
        * int(np.minimum(lengths.astype(np.int64) + 2 + bool(reading.prefix), longest).sum())
    )
    manifest = Manifest(
        what="tokens", side="passage", dtype="fp16", dim=settings.late_interaction_dim,
        rows=len(collection.ids), shard_size=SHARD_SIZES["tokens"], max_length=longest,
        precision=retriever.precision, model=fingerprint(read_folder(settings.path)),
        data=collection.fingerprint,
    )  # fmt: skip
    if folder.is_dir() and (size > most or read_manifest(folder) != manifest):
        shutil.rmtree(folder)
    if size > most:
        return f"they would take {size / (1 << 30):.1f} GiB (evaluation.token_vectors_gib)"
    claim(folder, manifest)
    encode_shards(retriever, collection, folder, manifest)
    return None


def store_token_index(vectors: Path, folder: Path) -> TokenIndex:
    """Index the folder of :func:`store_token_vectors`, as `erniesearch index` does by default; an
    index of the same vectors is kept, another one replaced."""
    manifest = asdict(read_manifest(vectors))
    record = folder / "index.json"
    if record.is_file() and json.loads(record.read_text())["embeddings"] != manifest:
        shutil.rmtree(folder)
    if not record.is_file():
        build_index(IndexOptions(str(vectors), str(folder)))
    return TokenIndex.load(folder)
