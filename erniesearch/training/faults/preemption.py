"""Asked to stop: SIGUSR1 or SIGTERM ends a training at its next update, with a checkpoint.

Slurm warns a job before its time limit or a preemption by such a signal. Every rank then saves at
the same update, whichever of them was signalled, and ends with exit status 75 (EX_TEMPFAIL): run
the same command again to continue. Imports nothing heavy: a signal that comes while torch is still
being imported must already find the handler.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
EXIT_STATUS = os.EX_TEMPFAIL

_requested = False


class Preempted(BaseException):
    """Stopped on request, with everything saved that is needed to continue.

    No ``Exception``: a handler raises it anywhere, like KeyboardInterrupt, and no library's
    ``except Exception`` may swallow it.
    """


def requested() -> bool:
    """Whether this process was asked to stop since :func:`listening` began."""
    return _requested


@contextmanager
def listening(action: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Note the signals instead of dying of them, and call ``action`` each time one comes.

    Must be entered in the main thread; the handlers of before come back at the end.
    """
    global _requested
    _requested = False

    def note(number: int, frame: FrameType | None) -> None:
        global _requested
        _requested = True
        action()

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
