"""Arrow files written block by block and read memory-mapped: rows are found by their block."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

BLOCK_ROWS = 8192
BLOCK_WEIGHT = 4 << 20
"""A block ends at this many rows or characters, whichever comes first: what a writer holds."""


class BlockWriter:
    """Rows to an Arrow IPC file; holds one block in memory."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self.writer = pa.ipc.new_file(str(path), schema)
        self.rows: list[tuple[Any, ...]] = []
        self.weight = 0

    def add(self, row: tuple[Any, ...], weight: int) -> None:
        """Append a row; ``weight`` is about its size."""
        self.rows.append(row)
        self.weight += weight
        if len(self.rows) >= BLOCK_ROWS or self.weight >= BLOCK_WEIGHT:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            columns = [
                pa.array(values, field.type)
                for values, field in zip(zip(*self.rows, strict=True), self.schema, strict=True)
            ]
            self.writer.write_batch(pa.record_batch(columns, schema=self.schema))
        self.rows, self.weight = [], 0

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is None:
            self._flush()
        self.writer.close()


class Blocks:
    """A memory-mapped Arrow file.

    ``starts [num_blocks + 1]`` holds the first row of each block, and the number of rows last.

    Raises:
        ValueError, OSError: for a file that is no Arrow file or not whole.
    """

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self.starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def column(self, name: str) -> list[pa.Array]:
        """The column's blocks; nothing is copied."""
        return [batch.column(name) for batch in self.batches]

    def locate(self, rows: np.ndarray) -> tuple[list[int], list[int]]:
        """Block and position inside it of each row.

        Raises:
            IndexError: for a row that is not there; negative ones count from the end.
        """
        if rows.dtype == bool:
            raise TypeError("rows are positions, not a mask: take np.flatnonzero of it")
        rows = rows.astype(np.int64)
        rows = np.where(rows < 0, rows + len(self), rows)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"row outside 0 to {len(self) - 1}")
        blocks = np.searchsorted(self.starts, rows, side="right") - 1
        return blocks.tolist(), (rows - self.starts[blocks]).tolist()
