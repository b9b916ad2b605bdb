"""The end of a process that may have had a process group."""

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and end the process with the status that it returns, 0 for None.

    The interpreter is not taken apart. Threads of gloo, NCCL and the autograd engine may outlive
    their process group (DeepSpeed's engine holds on to it); one that wants the interpreter's lock
    while it goes down aborts the process, and a finished training would count as failed. Threads
    that are no daemons are waited for, and exit handlers run, as ever. Call it before the imports
    that register some.
    """
    status = 1

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # a closed pipe
                continue
        os._exit(status)

    atexit.register(end)  # the first to be registered is the last to run
    try:
        status = main() or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    sys.exit(status)
