"""Processes that must not outlive, or write beside, one another."""

import fcntl
import os
import threading
import time
from pathlib import Path
from typing import IO

from erniesearch import distributed, stages
from erniesearch.errors import UserError


def claim_folder(folder: Path, expected: str) -> IO[str] | None:
    """Rank 0 claims the folder and holds its lock, so that two runs never write it at once."""
    lock = None
    if distributed.is_main():
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = folder.with_name(f".{folder.name}.lock")
        lock = path.open("a+")
        deadline = time.monotonic() + 20  # the ranks of a run just killed may still be ending
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{folder}: another training is writing here; wait for it or end it"
                    ) from None
                time.sleep(0.2)
        stages.claim(folder, expected)
    distributed.barrier()
    return lock


def exit_with_pipeline() -> None:
    """End this process when the pipeline that started it is gone: a killed pipeline must not
    leave ranks behind that write into its folder."""
    watched = os.environ.get("ERNIESEARCH_PIPELINE")
    if not watched:
        return
    pid, started = watched.split(":")

    def watch() -> None:
        while _start_time(int(pid)) == started:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _start_time(pid: int) -> str | None:
    """Start time of a process in clock ticks, which tells it from a later one of the same pid."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None


def pipeline_token() -> str:
    """Value of ERNIESEARCH_PIPELINE that ties started processes to this one; empty where there is
    no /proc to watch."""
    started = _start_time(os.getpid())
    return f"{os.getpid()}:{started}" if started else ""
