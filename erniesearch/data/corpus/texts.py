"""The corpus on disk: memory-mapped Arrow columns that behave as lists of text.

``corpus.jsonl`` is read once into a cache folder (``erniesearch.data.corpus.cache``):

    corpus.arrow   columns pid, text (title, space, text)
    hashes.npy     64-bit hashes of the pids, sorted
    rows.npy       the row of each hash

The cache is keyed by the source's path, size and time of change. Memory is that of the pages
in use, which ranks on one machine share.
"""

import hashlib
import shutil
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from erniesearch.data.corpus.arrow import Blocks, BlockWriter
from erniesearch.data.corpus.cache import cache_root, cached, key_of
from erniesearch.data.jsonl import read_jsonl, text_field
from erniesearch.errors import UserError

VERSION = 1
"""Of the layout above; a change makes old caches unused."""
Rows = Sequence[int] | np.ndarray


class ArrowColumn(Sequence[str]):
    """One text column of a cached corpus, as a sequence.

    ``column[3]`` is a text; ``column[3:7]`` and ``column[[5, 2]]`` (a list or an array of
    positions) are lists of texts. Iterating streams block by block.
    """

    def __init__(self, folder: Path, name: str, blocks: Blocks | None = None) -> None:
        self.folder, self.name = folder, name
        self._blocks = blocks or Blocks(folder / "corpus.arrow")
        self._arrays: list[pa.StringArray] = self._blocks.column(name)
        self._starts: list[int] = self._blocks.starts.tolist()

    def __reduce__(self) -> tuple[Any, ...]:  # other processes map the file themselves
        return type(self), (self.folder, self.name)

    def __len__(self) -> int:
        return len(self._blocks)

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice | Rows) -> list[str]: ...
    def __getitem__(self, item: int | slice | Rows) -> str | list[str]:
        if isinstance(item, int | np.integer):
            return self._at(int(item))
        if isinstance(item, slice):
            start, stop, step = item.indices(len(self))
            if step == 1:
                return [text for part in self._parts(start, stop) for text in part.to_pylist()]
            item = range(start, stop, step)
        rows = np.asarray(item)
        if not rows.size:
            return []
        places = zip(*self._blocks.locate(rows), strict=True)
        return [self._arrays[block][position].as_py() for block, position in places]

    def _at(self, row: int) -> str:
        size = self._starts[-1]
        row = row + size if row < 0 else row
        if not 0 <= row < size:
            raise IndexError(f"row outside 0 to {size - 1}")
        block = bisect_right(self._starts, row) - 1
        return self._arrays[block][row - self._starts[block]].as_py()  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        for block in self._arrays:
            yield from block.to_pylist()

    def _parts(self, start: int, stop: int) -> Iterator[pa.StringArray]:
        for first, block in zip(self._starts, self._arrays, strict=False):
            if first < stop and first + len(block) > start:
                low = max(start - first, 0)
                yield block.slice(low, min(stop - first, len(block)) - low)


def take(texts: Sequence[str], rows: Rows) -> list[str]:
    """Texts at these positions, of a list or a column."""
    if isinstance(texts, ArrowColumn):
        return texts[rows]
    return [texts[int(row)] for row in rows]


class PidIndex(Mapping[str, int]):
    """Row of each pid: 16 bytes a passage, memory-mapped.

    A binary search among the pids' hashes; what it finds is compared with the stored pid, so two
    pids of one hash are told apart.
    """

    def __init__(self, pids: ArrowColumn) -> None:
        self.pids = pids
        self._hashes, self._rows = (
            np.asarray(np.load(pids.folder / name, mmap_mode="r"))
            for name in ("hashes.npy", "rows.npy")
        )
        if not len(self._hashes) == len(self._rows) == len(pids):
            raise ValueError("corpus and index differ in length")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.pids,)

    def __len__(self) -> int:
        return len(self.pids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pids)

    def __getitem__(self, pid: str) -> int:
        value = np.uint64(hash_text(pid))  # of the array's type: another would convert the array
        row = self._walk(pid, value, int(self._hashes.searchsorted(value)))
        if row < 0:
            raise KeyError(pid)
        return row

    def _walk(self, pid: str, value: np.uint64, position: int) -> int:
        while position < len(self._hashes) and self._hashes[position] == value:
            row = int(self._rows[position])
            if self.pids[row] == pid:
                return row
            position += 1
        return -1

    def rows(self, pids: Sequence[str]) -> np.ndarray:
        """Row of each pid, ``[len(pids)]``; -1 where the corpus does not have it."""
        values = np.fromiter(map(hash_text, pids), np.uint64, len(pids))
        positions = np.minimum(self._hashes.searchsorted(values), len(self) - 1)
        rows = np.where(self._hashes[positions] == values, self._rows[positions], -1)
        hits = np.flatnonzero(rows >= 0)
        for hit, stored in zip(hits.tolist(), self.pids[rows[hits]], strict=True):
            if stored != pids[hit]:
                rows[hit] = self._walk(pids[hit], values[hit], int(positions[hit]))
        return rows


def rows_of(index_of: Mapping[str, int], pids: Sequence[str]) -> np.ndarray:
    """Row of each pid, ``[len(pids)]``, -1 for unknown ones; one pass for many pids."""
    if isinstance(index_of, PidIndex):
        return index_of.rows(pids)
    return np.array([index_of.get(pid, -1) for pid in pids], dtype=np.int64)


def hash_text(text: str) -> int:
    """64 bits of a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Corpus:
    """A cached corpus: ``pids`` and ``passages`` are parallel, ``index_of`` maps pid to row."""

    def __init__(self, folder: Path) -> None:
        blocks = Blocks(folder / "corpus.arrow")
        self.pids = ArrowColumn(folder, "pid", blocks)
        self.passages = ArrowColumn(folder, "text", blocks)
        self.index_of = PidIndex(self.pids)


def open_corpus(path: Path, use_titles: bool) -> Corpus:
    """The corpus of a ``corpus.jsonl``, read now or by an earlier call.

    The first call needs 16 bytes of memory a passage and one block of text, whatever the size of
    the file. Caches of earlier states of the same file are removed.

    Raises:
        UserError: for a line that is odd, a duplicate id, an empty corpus, a file that changes
            while it is read, or a cache folder that cannot be written.
    """
    try:
        before = path.stat()
    except OSError:
        raise UserError(f"{path}: no such file") from None
    source = str(path.resolve())
    family = cache_root() / "corpora" / key_of(source, use_titles)
    key = key_of(VERSION, before.st_size, before.st_mtime_ns)

    def build(folder: Path) -> None:
        hashes = _write_columns(path, use_titles, folder)
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise UserError(f"{path}: changed while it was read; start again when it is complete")
        pids = ArrowColumn(folder, "pid")
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        _refuse_duplicates(path, pids, hashes, order)
        np.save(folder / "hashes.npy", hashes)
        np.save(folder / "rows.npy", order)
        for old in family.iterdir():
            if old.is_dir() and not old.name.startswith("."):
                shutil.rmtree(old, ignore_errors=True)

    return cached(family / key, build, Corpus)


def _write_columns(path: Path, use_titles: bool, folder: Path) -> np.ndarray:
    """Stream the source into ``corpus.arrow``; returns the pids' hashes in row order."""
    hashes = array("Q")
    schema = pa.schema([("pid", pa.string()), ("text", pa.string())])
    with BlockWriter(folder / "corpus.arrow", schema) as writer:
        for number, record in read_jsonl(path):
            pid = text_field(record, "_id", path, number)
            text = text_field(record, "text", path, number)
            title = text_field(record, "title", path, number, "") if use_titles else ""
            text = f"{title} {text}".strip() if title else text
            writer.add((pid, text), len(text) + len(pid))
            hashes.append(hash_text(pid))
    if not hashes:
        raise UserError(f"{path}: the corpus is empty")
    return np.frombuffer(hashes, dtype=np.uint64)


def _refuse_duplicates(
    path: Path, pids: ArrowColumn, hashes: np.ndarray, order: np.ndarray
) -> None:
    """Raise for the first pid that stands twice; equal hashes of different pids are none."""
    repeated = np.sort(order[1:][hashes[1:] == hashes[:-1]])
    for row in repeated.tolist():
        pid = pids[row]
        value = np.uint64(hash_text(pid))
        low, high = hashes.searchsorted(value), hashes.searchsorted(value, side="right")
        for earlier in order[low:high].tolist():
            if earlier < row and pids[earlier] == pid:
                records = enumerate(read_jsonl(path))
                first, second = (number for i, (number, _) in records if i in (earlier, row))
                raise UserError(f"{path}:{second}: duplicate id '{pid}', first on line {first}")
