"""The result of long work in blocks, each a file beside the target: an interrupted job continues,
and neither the number of ranks nor an interrupt changes what is joined in the end."""

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from erniesearch import distributed
from erniesearch.errors import UserError
from erniesearch.files import write_atomically

PATIENCE = timedelta(days=7)
"""Ranks wait this long for the slowest; a rank that fails ends the others through the launcher."""


class Parts:
    """Blocks of the file ``target``, dealt to the ranks."""

    def __init__(self, target: Path) -> None:
        self.folder = target.with_name(f".{target.name}.parts")

    def claim(self, record: str) -> None:
        """Keep the parts of the same work; those of another ``record`` cannot be used.

        Raises:
            UserError: if the folder cannot be written.
        """
        path = self.folder / "started.json"
        if not (path.is_file() and path.read_text(encoding="utf-8") == record):
            shutil.rmtree(self.folder, ignore_errors=True)
            try:
                write_atomically(path, record)
            except OSError as error:
                raise UserError(
                    f"{self.folder.parent}: cannot be written: {error.strerror}; change --out"
                ) from None

    def todo(self, num_blocks: int) -> list[int]:
        """This rank's blocks that are not there yet."""
        own = range(distributed.rank(), num_blocks, distributed.world_size())
        return [k for k in own if not self._path(k).is_file()]

    def write(self, number: int, lines: list[str]) -> None:
        """A finished block."""
        write_atomically(self._path(number), "".join(lines))

    def lines(self) -> Iterator[str]:
        """Of all blocks, in their order."""
        for path in sorted(self.folder.glob("block-*.jsonl")):
            with path.open(encoding="utf-8") as lines:
                yield from lines

    def remove(self) -> None:
        """Once the target is written."""
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number:05d}.jsonl"
