"""Derived files that are made once and found again: whole, or not there.

A cached folder is built aside under a lock, synced and renamed, so that several ranks may start
at once and a kill leaves nothing that is read later.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from erniesearch.errors import UserError
from erniesearch.files import written_aside
from erniesearch.progress import waiting

T = TypeVar("T")
MANIFEST = "whole.json"


def cache_root() -> Path:
    """``ERNIESEARCH_CACHE``, by default ``~/.cache/erniesearch``."""
    return Path(os.environ.get("ERNIESEARCH_CACHE") or "~/.cache/erniesearch").expanduser()


def key_of(*facts: object) -> str:
    """A folder name that stands for these facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def cached(folder: Path, build: Callable[[Path], None], load: Callable[[Path], T]) -> T:
    """What ``load(folder)`` returns, after ``build`` has filled the folder if it was not whole.

    Whole means: every file that ``build`` wrote is there in its size, and ``load`` raises neither
    ``OSError`` nor ``ValueError``. A damaged folder is built again.

    Raises:
        UserError: if the cache folder cannot be written; and what ``build`` raises.
    """
    loaded = _load(folder, load)
    if loaded is not None:
        return loaded
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with waiting("waiting for another process that makes the same files"):
            held = FileLock(folder.with_name(f".{folder.name}.lock")).acquire()
        with held:
            loaded = _load(folder, load)
            if loaded is None:
                _build(folder, build)
                loaded = load(folder)
    except OSError as error:
        raise UserError(
            f"cache folder {folder.parent} cannot be written: {error.strerror or error}; set"
            " ERNIESEARCH_CACHE to a folder with space"
        ) from None
    return loaded


def _load(folder: Path, load: Callable[[Path], T]) -> T | None:
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return None
        return load(folder)
    except (OSError, ValueError, AttributeError):
        return None


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    with written_aside(folder, "part") as aside:  # the lock is ours: what lies here is a ruin
        aside.mkdir()
        build(aside)
        files = (path for path in aside.rglob("*") if path.is_file())
        sizes = {str(path.relative_to(aside)): path.stat().st_size for path in files}
        (aside / MANIFEST).write_text(json.dumps(sizes))
