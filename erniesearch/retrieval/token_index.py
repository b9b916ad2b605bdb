"""Late interaction's token vectors, compressed and searched end to end (PLAID, arXiv 2205.09707).

A folder holds, with P passages and T token vectors:

    codec         FAISS: the centroids, and the quantizer of what vectors differ from them
    centroids.npy [T] uint16 or uint32, the centroid of each token vector
    codes.npy     [T, bytes] uint8, its difference from it
    offsets.npy   [P + 1] int64: passage i has the token vectors offsets[i] to offsets[i + 1]
    lists.npy     uint32: the passages of the first centroid, of the second and so on, each once
    list_ends.npy [centroids + 1] int64, as offsets
    docid         one pid a line
    index.json    what it was made from, and how it is searched unless a caller says otherwise

All but the centroids is memory-mapped. A search visits the passages in the lists of the centroids
nearest to each query token, ranks them by MaxSim over centroids alone, and scores the best by
MaxSim over the decompressed vectors.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from erniesearch_kernels import maxsim_varlen
from torch import Tensor

from erniesearch.errors import UserError
from erniesearch.progress import metered
from erniesearch.retrieval.vector_index import DocIds, faiss, faiss_call, require_faiss

SIMILARITIES = 1 << 26
"""Similarities of query tokens to centroids in memory at a time."""
FILES = ("codec", "centroids.npy", "codes.npy", "offsets.npy", "lists.npy", "list_ends.npy",
         "docid", "index.json")  # fmt: skip


def default_candidates(depth: int) -> int:
    """Passages of a query scored exactly unless it is said: with 40 for each that is asked for,
    docs/results/late-interaction-index-8bit.json finds .96 of exhaustive MaxSim's best 10 and best
    100; a deep search, as mining's, is content with four."""
    return max(1024, min(40 * depth, 4096), 4 * depth)


@dataclass
class TokenIndex:
    """Search over token vectors by MaxSim.

    Attributes:
        pids: ``pids[i]`` is the passage of row i.
        codec: FAISS index without vectors that encodes and decodes.
        normalized: whether every vector has length 1; decompressed ones then get it back.
        nprobe: lists visited for each query token.
        candidates: passages of a query that are scored exactly; None is
            :func:`default_candidates`.
    """

    pids: Sequence[str]
    codec: Any
    centroids: np.ndarray
    codes: np.ndarray
    offsets: np.ndarray
    lists: np.ndarray
    list_ends: np.ndarray
    normalized: bool
    nprobe: int
    candidates: int | None = None

    @classmethod
    def load(
        cls, folder: Path, nprobe: int | None = None, candidates: int | None = None
    ) -> "TokenIndex":
        """Open a folder; None keeps what it was built with.

        Raises:
            UserError: for a missing or inconsistent folder.
        """
        require_faiss()
        for name in FILES:
            if not (folder / name).is_file():
                raise UserError(f"index folder {folder}: no file '{name}'")
        try:
            record = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            arrays = {
                name.removesuffix(".npy"): np.load(folder / name, mmap_mode="r")
                for name in FILES if name.endswith(".npy")
            }  # fmt: skip
            normalized, by_default = bool(record["normalized"]), int(record["nprobe"])
            found = record["candidates"] if candidates is None else candidates
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise UserError(f"index folder {folder}: damaged ({error}); build it again") from None
        codec = faiss_call(partial(faiss.read_index, str(folder / "codec")), str(folder / "codec"))
        index = cls(
            DocIds([folder / "docid"]), codec, **arrays, normalized=normalized,
            nprobe=nprobe or by_default, candidates=found,
        )  # fmt: skip
        index._check(folder)
        return index

    def _check(self, folder: Path) -> None:
        tokens = int(self.offsets[-1])
        for name, found, expected in (
            ("docid", len(self.pids), len(self.offsets) - 1),
            ("centroids.npy", len(self.centroids), tokens),
            ("codes.npy", len(self.codes), tokens),
            ("list_ends.npy", len(self.list_ends), self.codec.nlist + 1),
            ("lists.npy", len(self.lists), int(self.list_ends[-1])),
        ):
            if found != expected:
                raise UserError(f"{folder / name}: {found} entries, expected {expected}: index"
                                " again")  # fmt: skip

    @property
    def dim(self) -> int:
        """Dimensions of a token vector."""
        return int(self.codec.d)

    def search(
        self, queries: Sequence[Tensor], depth: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores of the best passages, both ``[num_queries, min(depth, P)]``.

        Equal scores are in the order of rows. Where too few passages are found, rows are -1 and
        scores -inf; a passage without token vectors is never found.

        Args:
            queries: each query's token vectors, ``[num_tokens, dim]``.
            allowed: ``[P]`` bool, the passages that may be found; None allows all.

        Raises:
            UserError: for vectors of another size.
        """
        depth = min(depth, len(self.pids))
        rows = np.full((len(queries), depth), -1, dtype=np.int64)
        scores = np.full((len(queries), depth), -np.inf, dtype=np.float32)
        table = torch.from_numpy(self._table())
        longest = max(map(len, queries), default=0)
        size = max(1, SIMILARITIES // (max(1, longest) * len(table)))
        blocks = range(0, len(queries), size)
        for start in metered(blocks, "searching", "queries", len(queries), size):
            block = [query.float() for query in queries[start : start + size]]
            for query in block:
                if query.shape[1] != self.dim:
                    raise UserError(
                        f"the index holds token vectors of {self.dim} dimensions, the query's have"
                        f" {query.shape[1]}: search with the model that encoded the passages"
                    )
            # One product for all queries of a block, centroids first: a passage's are then rows.
            similarities = (torch.cat(block) @ table.T).split([len(query) for query in block])
            for number, (query, own) in enumerate(zip(block, similarities, strict=True), start):
                if not len(query):
                    continue
                found = self._candidates(own, depth, allowed)
                exact = self._exact(query, found)
                order = np.lexsort((found, -exact))[:depth]
                rows[number, : len(order)] = found[order]
                scores[number, : len(order)] = exact[order]
        return rows, scores

    def _table(self) -> np.ndarray:
        """The centroids, ``[centroids, dim]``, where FAISS keeps them."""
        quantizer: Any = faiss.downcast_index(self.codec.quantizer)
        table: np.ndarray = faiss.rev_swig_ptr(quantizer.get_xb(), quantizer.ntotal * self.dim)
        return table.reshape(quantizer.ntotal, self.dim)

    def _candidates(self, similarities: Tensor, depth: int, allowed: np.ndarray | None) -> Any:
        """Rows to score exactly, rising, by the ``[query tokens, centroids]`` similarities."""
        nprobe = min(self.nprobe, similarities.shape[1])
        probed = np.unique(similarities.topk(nprobe).indices.numpy())
        found = np.unique(self.lists[ranges(self.list_ends[probed], self.list_ends[probed + 1])])
        if allowed is not None:
            found = found[allowed[found]]
        most = self.candidates or default_candidates(depth)
        most = max(most, depth)
        if len(found) <= most:
            return found.astype(np.int64)
        starts, ends = self.offsets[found], self.offsets[found + np.uint32(1)]
        of_token = self.centroids[ranges(starts, ends)]
        near = similarities.T.contiguous().numpy()[of_token]  # [tokens, query tokens]
        lengths = ends - starts
        best = np.maximum.reduceat(near, np.cumsum(lengths) - lengths, axis=0)
        kept = np.argpartition(-best.sum(1), most - 1)[:most]
        return np.sort(found[kept]).astype(np.int64)

    def _exact(self, query: Tensor, rows: np.ndarray) -> np.ndarray:
        """MaxSim of a query with passages over their decompressed vectors."""
        if not len(rows):
            return np.empty(0, dtype=np.float32)
        starts, ends = self.offsets[rows], self.offsets[rows + 1]
        lengths = ends - starts
        bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        scores = maxsim_varlen(
            query, torch.from_numpy(self.decode(ranges(starts, ends))),
            torch.tensor([0, len(query)]), bounds, len(query), int(lengths.max()),
        )  # fmt: skip
        own: np.ndarray = scores[0].numpy()
        return own

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Token vectors ``[len(tokens), dim]`` in fp32, as far as the codes keep them."""
        width = self.codec.coarse_code_size()
        number = self.centroids[tokens].astype("<u4")
        coarse = number.view(np.uint8).reshape(-1, 4)[:, :width]
        vectors: np.ndarray = self.codec.sa_decode(
            np.ascontiguousarray(np.concatenate([coarse, self.codes[tokens]], axis=1))
        )
        if self.normalized:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors


def ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The numbers from each start up to its end, one range after the other."""
    lengths = ends - starts
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
