"""How DeepSpeed's checkpoint files reach the disk: hashed on the way, synced, errors kept."""

import hashlib
import io
import os
from pathlib import Path
from typing import IO, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from erniesearch.training.checkpoints.manifest import FileFacts


class CheckpointWriter(TorchCheckpointEngine):
    """A DeepSpeed checkpoint engine; loading is DeepSpeed's own.

    An error of the file system does not raise in :meth:`save`: DeepSpeed's barriers follow, and
    the other ranks would wait in them. It is kept until :meth:`finish`.

    Args:
        in_background: :meth:`save` serialises into memory only; :meth:`finish`, which may run in
            a thread, writes the files.
    """

    def __init__(self, in_background: bool) -> None:
        super().__init__()
        self.in_background = in_background
        self.files: dict[str, FileFacts] = {}
        self.error: str | None = None
        self._in_memory: list[tuple[Path, io.BytesIO]] = []

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Serialise ``state_dict`` to ``path``, now or in :meth:`finish`."""
        if self.in_background:
            memory = io.BytesIO()
            torch.save(state_dict, memory)
            self._in_memory.append((Path(path), memory))
            return
        with _HashedFile(Path(path)) as file:
            torch.save(state_dict, cast(IO[bytes], file))
        self._record(file)

    def finish(self) -> tuple[dict[str, FileFacts], str | None]:
        """Write what is in memory. Returns this rank's files by name since the last call, and
        the first error."""
        while self._in_memory:
            path, memory = self._in_memory.pop(0)
            with _HashedFile(path) as file:
                file.write(memory.getbuffer())
            self._record(file)
        files, error = self.files, self.error
        self.files, self.error = {}, None
        return files, error

    def _record(self, file: "_HashedFile") -> None:
        self.files[file.path.name] = FileFacts(file.size, file.digest.hexdigest())
        if file.error is not None and self.error is None:
            self.error = f"{file.path.name}: {file.error.strerror}"


class _HashedFile:
    """A binary file to write once; hashes what should be in it and syncs it when it is closed.

    After an error it swallows the rest: torch's archive writer must not be interrupted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None
        self._handle: IO[bytes] | None = None

    def __enter__(self) -> "_HashedFile":
        try:
            # Unbuffered: a buffer would raise its error again when it is closed.
            self._handle = self.path.open("wb", buffering=0)
        except OSError as error:
            self.error = error
        return self

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.size += len(view)
        rest = view
        while len(rest) and self.error is None:
            assert self._handle is not None
            try:
                rest = rest[self._handle.write(rest) :]
            except OSError as error:
                self.error = error
        return len(view)

    def flush(self) -> None:
        """torch.save asks for it; there is no buffer."""

    def __exit__(self, *_: object) -> None:
        if self._handle is None:
            return
        try:
            if self.error is None:
                os.fsync(self._handle.fileno())
            self._handle.close()
        except OSError as error:
            self.error = self.error or error
