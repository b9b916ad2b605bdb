"""How far long work is: a bar on a terminal, a line every 20 seconds elsewhere."""

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 20


class Meter:
    """Counts ``unit`` up to ``total`` and says how many a second and how long it will take.

    Args:
        shown: False counts without a word (ranks other than 0).
        patience: seconds without a word; work that is done by then needs none.
        done: units that an earlier process did.
    """

    def __init__(
        self, name: str, unit: str, total: int, shown: bool = True, patience: float = 0.0,
        done: int = 0,
    ) -> None:  # fmt: skip
        self.name, self.unit, self.total, self.shown = name, unit, total, shown
        self.patience, self.first, self.done = patience, done, done
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"), console=self.console,
            disable=not (shown and self.console.is_terminal),
        )  # fmt: skip
        self.task = self.bar.add_task(
            name, total=total, completed=done, note="", visible=not patience
        )
        self.started = self.printed = time.monotonic()

    def __enter__(self) -> "Meter":
        if not self.patience:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)

    def advance(self, number: int) -> None:
        """Count ``number`` more."""
        self.reach(self.done + number)

    def reach(self, done: int, note: str = "") -> None:
        """``done`` are done by now; ``note`` says how fast in other words than units a second."""
        self.done = done
        now = time.monotonic()
        if now - self.started < self.patience:
            return
        self.bar.start()
        rate = self.rate
        note = note or f"{rate:,.0f} {self.unit}/s"
        self.bar.update(self.task, completed=done, note=note, visible=True)
        if (
            self.shown
            and not self.console.is_terminal
            and (now - self.printed > SECONDS_BETWEEN_LINES or self.done == self.total)
        ):
            self.printed = now
            left = (self.total - self.done) / max(rate, 1e-9)
            self.console.print(
                f"{self.name} {done:,}/{self.total:,} {self.unit}  {note}  {left:,.0f} s left"
            )
