"""A FAISS folder as Pyserini reads it: ``index`` and ``docid`` (one id a line)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from erniesearch.errors import UserError
from erniesearch.stages import write_atomically

try:
    import faiss
except ImportError:  # an extra: faiss-cpu and faiss-gpu provide the same module
    faiss = None  # type: ignore[assignment]


@dataclass
class VectorIndex:
    """Exact inner-product search over passage vectors.

    ``pids[i]`` is the passage of the index's row i.
    """

    index: Any
    pids: list[str]

    @classmethod
    def build(cls, vectors: np.ndarray, pids: list[str]) -> "VectorIndex":
        """Index ``[num_passages, hidden]`` vectors (FAISS Flat, inner product).

        Raises:
            UserError: if FAISS is not installed.
        """
        require_faiss()
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(np.ascontiguousarray(vectors, dtype=np.float32))
        return cls(index, pids)

    def search(self, vectors: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores of the best passages, both ``[num_queries, min(depth, size)]``."""
        scores, rows = self.index.search(
            np.ascontiguousarray(vectors, dtype=np.float32), min(depth, len(self.pids))
        )
        return rows, scores

    def save(self, folder: Path) -> None:
        """Write ``index`` and ``docid``."""
        folder.mkdir(parents=True, exist_ok=True)
        faiss.write_index(self.index, str(folder / "index"))
        write_atomically(folder / "docid", "".join(f"{pid}\n" for pid in self.pids))

    @classmethod
    def load(cls, folder: Path) -> "VectorIndex":
        """Read a folder written by :meth:`save`.

        Raises:
            UserError: for a missing or inconsistent folder.
        """
        require_faiss()
        for name in ("index", "docid"):
            if not (folder / name).is_file():
                raise UserError(f"index folder {folder}: no file '{name}'")
        index = faiss.read_index(str(folder / "index"))
        pids = (folder / "docid").read_text(encoding="utf-8").splitlines()
        if index.ntotal != len(pids):
            raise UserError(f"{folder}: {index.ntotal} vectors but {len(pids)} ids in docid")
        return cls(index, pids)


def require_faiss() -> None:
    """Raises UserError where FAISS is not installed."""
    if faiss is None:
        raise UserError("FAISS is not installed: pip install 'erniesearch[cpu]' (or [gpu])")
