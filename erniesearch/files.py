"""Files that are whole or not there, the same after a power cut, and locked while in use."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout

from erniesearch.errors import UserError
from erniesearch.progress import waiting


def sync(path: Path) -> None:
    """Have the system write a file's bytes, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written_aside(target: Path, token: str = "") -> Iterator[Path]:
    """A path beside ``target`` to write a file or fill a folder at; at the end it is synced and put
    in the place of ``target``, after an error it is removed. What a killed process left there goes.

    Args:
        token: part of its name, where several processes may write the same target.
    """
    aside = target.with_name(f".{target.name}.{token}.tmp" if token else f".{target.name}.tmp")
    _remove(aside)
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        for path in aside.rglob("*"):
            sync(path)
        sync(aside)
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(aside, target)
        sync(target.parent)
    finally:
        _remove(aside)


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the whole new one."""
    with written_aside(path, str(os.getpid())) as aside:
        aside.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """sha256 of a file, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@lru_cache(maxsize=256)
def _hash_of(path: Path, size: int, mtime_ns: int) -> str:
    with waiting(f"reading {path.name} for its hash"):
        return hash_file(path)


def hash_files(paths: Iterable[Path]) -> str:
    """One sha256 over names and contents of the files that exist."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        if path.is_file():
            stat = path.stat()
            line = f"{path.name}:{_hash_of(path, stat.st_size, stat.st_mtime_ns)}\n"
            digest.update(line.encode())
    return digest.hexdigest()


@contextmanager
def hold_lock(path: Path, what: str, patience: float = 0) -> Iterator[None]:
    """Lock a file for this process, so that two never write the same folder; the system frees it
    when the process ends, however it ends.

    Args:
        what: who else may hold it, for the message.
        patience: seconds to wait for another process; infinite is allowed.

    Raises:
        UserError: if another process still holds it then, or the folder cannot be written.
    """
    lock = FileLock(path, timeout=-1 if patience == float("inf") else patience)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(poll_interval=0.2)
    except Timeout:
        raise UserError(
            f"{path.parent}: another {what} is writing here; wait for it or end it"
        ) from None
    except OSError as error:
        raise UserError(
            f"run folder {path.parent} cannot be written: {error.strerror}; set run_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()
