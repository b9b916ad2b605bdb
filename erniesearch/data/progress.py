"""How far a long pass over the data is: a bar in a terminal, otherwise a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

PATIENCE = 5.0
"""Seconds before anything is shown: a short pass needs no word."""
INTERVAL = 60.0
"""Seconds between two lines where there is no terminal."""


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A function to call with the count done so far, for a pass of ``total`` units."""
    console = Console(stderr=True, highlight=False)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=total, visible=False)
    started = time.monotonic()
    printed = started + PATIENCE - INTERVAL
    shown = False

    def show(done: int) -> None:
        nonlocal printed, shown
        now = time.monotonic()
        if now - started < PATIENCE:
            return
        shown = True
        if console.is_terminal:
            bar.update(task, completed=done, visible=True)
        elif now - printed >= INTERVAL:
            printed = now
            console.print(f"{what}: {done / max(total, 1):.0%} of {total:,} {unit}")

    with bar:
        yield show
    if shown:
        console.print(f"{what}: {total:,} {unit} in {time.monotonic() - started:.0f} s")
