"""Processes that must not outlive, or write beside, one another; and what their deaths are told
as."""

import errno
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from erniesearch import distributed
from erniesearch.errors import RankFailed

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
AGAIN = "run the same command again to continue"
# What gloo and NCCL say when the process at the other end is gone.
LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|remote process exited|Socket closed"
    r"|recvValue failed|sendBytes failed"
)


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
    """Start time of a living process in clock ticks, which tells it from a later one of the same
    pid; None once it has ended, also while its parent has not yet asked how (a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def pipeline_token() -> str:
    """Value of ERNIESEARCH_PIPELINE that ties started processes to this one; empty where there is
    no /proc to watch."""
    started = _start_time(os.getpid())
    return f"{os.getpid()}:{started}" if started else ""


@contextmanager
def failures_told(folder: Path) -> Iterator[None]:
    """What befalls one rank of a training, and is no mistake in its input, becomes one line.

    Raises:
        RankFailed: for a full disk, a dead data worker, a lost connection to another rank.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise RankFailed(
            f"{error.filename or folder}: {error.strerror}; make room and {AGAIN}"
        ) from None
    except SafetensorError as error:  # has no error number
        raise RankFailed(f"{folder}: {error}; {AGAIN}") from None
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            raise RankFailed(
                f"rank {distributed.rank()}: {str(error).split(chr(10))[0]} A worker that is"
                f" killed often ran out of memory: lower training.num_workers, and {AGAIN}"
            ) from None
        if LOST.search(str(error)):
            raise RankFailed(
                f"rank {distributed.rank()} lost its connection to another rank, which ended or"
                f" was killed; {AGAIN}"
            ) from None
        raise
