"""A FAISS folder as Pyserini reads it: ``index`` and ``docid`` (one id a line).

An index in parts has ``shard-00``, ``shard-01`` and so on, each such a folder; a search asks all
of them.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np

from erniesearch.errors import UserError
from erniesearch.files import write_atomically, written_aside
from erniesearch.progress import metered, say

try:
    import faiss
except ImportError:  # an extra: faiss-cpu and faiss-gpu provide the same module
    faiss = None  # type: ignore[assignment]

Result = TypeVar("Result")
BLOCK = 4096
"""Queries that FAISS is given at a time; it takes as many into one product with the vectors."""
SearchOn = Literal["auto", "cpu", "gpu", "gpu_fp16"]
"""``training.vector_search``."""
MOST_ON_GPUS = 2048
"""Passages a query that FAISS finds on a GPU at most."""


class DocIds(Sequence[str]):
    """The lines of ``docid`` files one after the other, mapped and not read: 8 bytes an id."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files = [np.memmap(p, np.uint8, "r") if p.stat().st_size else None for p in paths]
        self.ends = [_line_ends(file) for file in self.files]
        self.starts = np.cumsum([0, *map(len, self.ends)]).tolist()

    def __len__(self) -> int:
        return int(self.starts[-1])

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> list[str]: ...
    def __getitem__(self, item: int | slice) -> str | list[str]:
        if isinstance(item, slice):
            return [self[i] for i in range(*item.indices(len(self)))]
        row = item + len(self) if item < 0 else item
        if not 0 <= row < len(self):
            raise IndexError(item)
        number = bisect_right(self.starts, row) - 1
        row -= self.starts[number]
        file, ends = self.files[number], self.ends[number]
        assert file is not None
        return bytes(file[ends[row - 1] + 1 if row else 0 : ends[row]]).decode()


def _line_ends(file: np.memmap | None, block: int = 1 << 24) -> np.ndarray:
    if file is None:
        return np.empty(0, dtype=np.int64)
    found = [np.flatnonzero(file[i : i + block] == 10) + i for i in range(0, len(file), block)]
    return np.concatenate(found)


@dataclass
class VectorIndex:
    """Search over passage vectors, exact or not as its FAISS indexes are.

    ``pids[i]`` is the passage of row i; the rows of ``parts`` are counted on from one to the next.
    """

    parts: list[Any]
    pids: Sequence[str]

    @classmethod
    def build(cls, vectors: np.ndarray, pids: Sequence[str]) -> "VectorIndex":
        """Index ``[num_passages, hidden]`` vectors in memory (FAISS Flat, inner product).

        Raises:
            UserError: if FAISS is not installed.
        """
        require_faiss()
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(np.ascontiguousarray(vectors, dtype=np.float32))
        return cls([index], pids)

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        return int(self.parts[0].d)

    def search(self, vectors: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores of the best passages, both ``[num_queries, min(depth, size)]``.

        Equal scores are in the order of rows. An index of metric l2 gives the negative squared
        distance. Where an approximate index finds too few, rows are -1 and scores -inf.

        Raises:
            UserError: for vectors of another size.
        """
        if vectors.shape[1] != self.dim:
            raise UserError(
                f"the index holds vectors of {self.dim} dimensions, the query has"
                f" {vectors.shape[1]}: search with the model that encoded the passages,"
                " and its --dim"
            )
        queries = np.ascontiguousarray(vectors, dtype=np.float32)
        blocks = range(0, max(1, len(queries)), BLOCK)
        rows_of_part, scores_of_part, start = [], [], 0
        for part in self.parts:
            found = [
                part.search(queries[low : low + BLOCK], min(depth, part.ntotal))
                for low in metered(blocks, "searching", "queries", len(queries), BLOCK)
            ]
            scores, rows = (np.concatenate(own) for own in zip(*found, strict=True))
            if part.metric_type == faiss.METRIC_L2:
                scores = -scores
            rows_of_part.append(np.where(rows >= 0, rows + start, -1))
            scores_of_part.append(np.where(rows >= 0, scores, -np.inf))
            start += part.ntotal
        rows = np.concatenate(rows_of_part, axis=1)
        scores = np.concatenate(scores_of_part, axis=1)
        order = np.lexsort((rows, -scores), axis=1)[:, :depth]
        return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)

    def on(self, where: SearchOn, depth: int) -> "VectorIndex":
        """The index to search for ``depth`` passages a query: on all GPUs, each with a share of the
        vectors, or here. ``auto`` says why if it is here in spite of a GPU.

        Raises:
            UserError: for ``gpu`` and ``gpu_fp16`` where they cannot be.
        """
        if where == "cpu":
            return self
        try:
            check_search(where, depth)
            return VectorIndex(on_all_gpus(self.parts, where == "gpu_fp16"), self.pids)
        except UserError as error:
            if where != "auto":
                raise
            if _sees_gpu():
                say(f"vectors are searched on the CPU: {error}")
            return self

    def save(self, folder: Path) -> None:
        """Write ``index`` and ``docid``."""
        assert len(self.parts) == 1
        write_index(self.parts[0], folder)
        write_atomically(folder / "docid", "".join(f"{pid}\n" for pid in self.pids))

    @classmethod
    def load(
        cls,
        folder: Path,
        nprobe: int | None = None,
        ef_search: int | None = None,
        gpu: bool = False,
    ) -> "VectorIndex":
        """Open a folder of one index or of several parts.

        Vectors stay in the file, memory-mapped: processes on one machine share them.

        Args:
            nprobe: lists that an IVF index visits; None keeps what the index was saved with.
            ef_search: breadth of an HNSW search; None likewise.
            gpu: search on all GPUs, each with a share of the vectors.

        Raises:
            UserError: for a missing or inconsistent folder, and settings the index does not have.
        """
        require_faiss()
        folders = sorted(folder.glob("shard-*")) or [folder]
        for path in folders:
            for name in ("index", "docid"):
                if not (path / name).is_file():
                    raise UserError(f"index folder {path}: no file '{name}'")
        flags = 0 if gpu else faiss.IO_FLAG_MMAP_IFC
        parts = [
            faiss_call(partial(faiss.read_index, str(path / "index"), flags), str(path / "index"))
            for path in folders
        ]
        pids = DocIds([path / "docid" for path in folders])
        for path, part, ids in zip(folders, parts, pids.ends, strict=True):
            if part.ntotal != len(ids):
                raise UserError(f"{path}: {part.ntotal} vectors but {len(ids)} ids in docid")
        for part in parts:
            tune(part, nprobe, ef_search)
        if gpu:
            require_gpu("--gpu")
            parts = on_all_gpus(parts)
        return cls(parts, pids)


def on_all_gpus(parts: list[Any], fp16: bool = False) -> list[Any]:
    """Copies of indexes that share their vectors out over all GPUs.

    Raises:
        UserError: if FAISS cannot, for lack of memory for instance.
    """
    options = faiss.GpuMultipleClonerOptions()
    options.shard, options.useFloat16 = True, fp16
    copy = partial(faiss.index_cpu_to_all_gpus, co=options)
    return [faiss_call(partial(copy, part), "vectors to the GPUs") for part in parts]


def check_search(where: SearchOn, depth: int) -> None:
    """Whether vectors can be searched on GPUs for ``depth`` passages a query.

    Raises:
        UserError: if not, and ``where`` is not ``cpu``.
    """
    if where == "cpu":
        return
    require_gpu(f"training.vector_search {where}")
    if depth > MOST_ON_GPUS:
        raise UserError(
            f"training.vector_search {where}: {depth} passages a query are more than FAISS finds on"
            f" a GPU, {MOST_ON_GPUS}: lower the depth, or set it to cpu"
        )


def _sees_gpu() -> bool:
    import torch  # a search on the CPU does without

    return torch.cuda.is_available()


def tune(index: Any, nprobe: int | None, ef_search: int | None) -> None:
    """Set what a search in ``index`` visits; None changes nothing.

    Raises:
        UserError: if the index has no such setting.
    """
    for name, value in (("nprobe", nprobe), ("efSearch", ef_search)):
        if value is None:
            continue
        try:
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        except RuntimeError:
            kind = {"nprobe": "IVF", "efSearch": "HNSW"}[name]
            raise UserError(f"{name} {value}: the index is no {kind} index, leave it out") from None


def write_index(index: Any, folder: Path) -> None:
    """Write ``folder/index``, whole or not at all."""
    with written_aside(folder / "index") as aside:
        faiss_call(partial(faiss.write_index, index, str(aside)), str(folder))


def faiss_call(work: Callable[[], Result], what: str) -> Result:
    """``work()``, with FAISS's complaint as a :class:`UserError` about ``what``."""
    try:
        return work()
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        reason = lines.rsplit("failed: ", 1)[-1] if "failed: " in lines else lines
        raise UserError(f"{what}: FAISS says: {reason}") from None


def require_faiss() -> None:
    """Raises: UserError: if FAISS is not installed."""
    if faiss is None:
        raise UserError("FAISS is not installed: pip install faiss-cpu (or faiss-gpu)")


def require_gpu(option: str) -> None:
    """Raises: UserError: if FAISS was built without GPUs, or there is none."""
    require_faiss()
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        raise UserError(f"{option}: this FAISS has no GPU: on a machine with one, put faiss-gpu in"
                        " the place of faiss-cpu; or leave it out")  # fmt: skip
