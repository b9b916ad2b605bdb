"""How far long work is, told on standard error: one meter and one voice for everything.

``ERNIESEARCH_PROGRESS`` holds the mode (:data:`MODES`), so that ranks and other processes that are
started have it too; on a command line it is ``--progress MODE``, and ``--quiet`` is short for
``--progress quiet``. Only rank 0 speaks, but for errors. Standard output is left to results.

With ``json`` a line is one object. How far work is:

    time          seconds since 1970
    stage         stage of the run, or the command
    what          what is being done, e.g. "training"
    unit          what is counted
    done, total   units; total is null where nobody knows it
    rate          units a second since this process began, null before the first
    seconds_left  at that rate; null where it is not known
    loss          of a training's last logged update, null if it was not finite; with it
                  queries_per_second and tokens_per_second

and what is said otherwise: time, stage, level (note, warning, stopped or error), message. ``arm``
stands in both where an ablation has started the work.
"""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeVar

from erniesearch.errors import UserError, nearest

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
VARIABLE = "ERNIESEARCH_PROGRESS"
MODES = {
    "auto": "a line that is rewritten in place on a terminal, plain lines elsewhere",
    "plain": "a line at most every 20 seconds",
    "json": "JSON lines (docs/progress.md)",
    "quiet": "warnings and errors alone",
}
ARM = "ERNIESEARCH_ARM"
"""Variable that names the arm and the seed that an ablation trains in this process."""
Level = Literal["note", "warning", "stopped", "error"]
PREFIXES: dict[Level, str] = {
    "note": "", "warning": "warning: ", "stopped": "erniesearch: ", "error": "erniesearch: error: ",
}  # fmt: skip
SECONDS_BETWEEN_LINES = {"plain": 20.0, "json": 5.0}
PATIENCE = 5.0
"""Seconds without a word for work that is done by then as a rule."""
_process = {"stage": ""}
_thread = threading.local()


def mode() -> str:
    """One of :data:`MODES`.

    Raises:
        UserError: if ERNIESEARCH_PROGRESS is none.
    """
    return checked(os.environ.get(VARIABLE) or "auto", VARIABLE)


def checked(given: str, where: str) -> str:
    """The mode of that name; ``where`` it was given stands in the error.

    Raises:
        UserError: if there is none.
    """
    if given not in MODES:
        raise UserError(f"{where} '{given}': one of {', '.join(MODES)}{nearest(given, MODES)}")
    return given


def is_spoken_here() -> bool:
    """Whether this process is rank 0, by the launcher's variables, which are there before a
    process group is."""
    env = os.environ
    tasks = int(env.get("SLURM_NTASKS") or 1)
    slurm = env.get("SLURM_PROCID", "0") if tasks > 1 else "0"
    return env.get("RANK", slurm) == "0"


def set_stage(name: str) -> None:
    """From now on this process works on that stage of a run, or on that command."""
    _process["stage"] = name


def begin(stage: str) -> None:
    """Say that a stage of a run begins."""
    set_stage(stage)
    if is_spoken_here() and mode() in ("auto", "plain"):
        _write(f"── {stage} {'─' * max(0, 76 - len(stage))}")
    else:
        say("begins")


def say(message: str, level: Level = "note") -> None:
    """A line; every rank's if it is an error.

    Raises:
        UserError: as :func:`mode`, unless it tells an error.
    """
    if level != "error" and not is_spoken_here():
        return
    chosen = os.environ.get(VARIABLE) if level == "error" else mode()
    if chosen == "json":
        _write_object(level=level, message=message)
    elif chosen != "quiet" or level != "note":
        _write(PREFIXES[level] + message)


def _write(line: str) -> None:
    # The present sys.stderr: a bar that is shown has put its own in place, to make room for lines.
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _write_object(**facts: object) -> None:
    arm = {"arm": os.environ[ARM]} if ARM in os.environ else {}
    head = {"time": round(time.time(), 3), "stage": _process["stage"], **arm}
    _write(json.dumps(head | facts, ensure_ascii=False))


class Meter:
    """Counts ``unit`` up to ``total`` and says how many a second and how long it will take.

    A meter that is opened while another one is open says nothing; it moves the other one, if that
    has opened a :meth:`part`.

    Args:
        what: what is being done, e.g. "encoding passages".
        total: how many there will be; None if nobody knows.
        shown: False counts without a word.
        patience: seconds without a word; work that is done by then needs none.
        done: units that an earlier process did.
        rewritten: False for a line after the other on terminals too, where other processes write
            to it meanwhile.

    Raises:
        UserError: as :func:`mode`.
    """

    def __init__(
        self, what: str, unit: str, total: int | None, shown: bool = True, patience: float = 0.0,
        done: int = 0, rewritten: bool = True,
    ) -> None:  # fmt: skip
        self.what, self.unit, self.total, self.patience = what, unit, total, patience
        self.first, self.done, self.rewritten = done, done, rewritten
        self.outer: Meter | None = None
        self._shown = shown and is_spoken_here()
        self._mode = mode()
        self._bar: Progress | None = None
        self._share: tuple[int, int] | None = None  # what lay before an open part, and its units
        self._facts: dict[str, float | None] = {}
        self._note = ""
        self.started = self._told_at = time.monotonic()
        self._told = done

    def __enter__(self) -> "Meter":
        self._stack = _stack()
        self.outer = self._stack[-1] if self._stack else None
        self._stack.append(self)
        self._shown &= self.outer is None and self._mode != "quiet"
        if self._shown and self._mode == "auto":
            self._bar = _bar() if self.rewritten else None
            self._mode = "bar" if self._bar else "plain"
        if self._shown and not self.patience and self._mode in ("bar", "json"):
            self._tell()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.remove(self)
        if self._told != self.done:
            self._tell_after_patience()
        if self._bar:
            self._bar.stop()

    @property
    def rate(self) -> float:
        """Units a second since the start, those of an earlier process left out."""
        return (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)

    def advance(self, number: int) -> None:
        """Count ``number`` more."""
        self.reach(self.done + number)

    def reach(self, done: int, note: str = "", **facts: float) -> None:
        """``done`` are done by now.

        Args:
            note: how fast, in other words than units a second.
            facts: more fields of the JSON line.
        """
        self.done, self._note = done, note
        self._facts = {k: v if math.isfinite(v) else None for k, v in facts.items()}
        if self.outer and self.outer._share and self.total:
            start, units = self.outer._share
            self.outer.reach(max(self.outer.done, start + units * done // self.total))
        elif self._shown:
            since = time.monotonic() - self._told_at
            last = done == self.total and done != self._told
            if self._bar or last or since > SECONDS_BETWEEN_LINES[self._mode]:
                self._tell_after_patience()

    @contextmanager
    def part(self, units: int) -> Iterator[None]:
        """Work on the next ``units``, which other meters measure; they are done after the block."""
        start = self.done
        self._share = (start, units)
        try:
            yield
        finally:
            self._share = None
        self.reach(start + units)

    def _tell_after_patience(self) -> None:
        if self._shown and time.monotonic() - self.started >= self.patience:
            self._tell()

    def _tell(self) -> None:
        self._told_at, self._told = time.monotonic(), self.done
        rate, left, known = self.rate, None, self.done > self.first
        if self.total is not None and (known or self.done == self.total):
            left = (self.total - self.done) / max(rate, 1e-9)
        if self._mode == "json":
            _write_object(
                what=self.what, unit=self.unit, done=self.done, total=self.total,
                rate=float(f"{rate:.4g}") if known else None,
                seconds_left=None if left is None else round(left, 1), **self._facts,
            )  # fmt: skip
            return
        note = self._note or ("" if self.unit == "seconds" else f"{_number(rate)} {self.unit}/s")
        told = "" if left is None else f"{duration(left)} left"
        if self._bar:
            self._bar.start()
            self._bar.update(
                self._bar.task_ids[0], description=self._label, total=self.total,
                completed=self.done, note=note, left=told, visible=True,
            )  # fmt: skip
            return
        of = "" if self.total is None else f"/{self.total:,}"
        _write(
            "  ".join(filter(None, [f"{self._label} {self.done:,}{of} {self.unit}", note, told]))
        )

    @property
    def _label(self) -> str:
        return ": ".join(filter(None, [os.environ.get(ARM), _process["stage"], self.what]))


@contextmanager
def waiting(what: str, patience: float = PATIENCE) -> Iterator[None]:
    """Work of a library that does not say how far it is: the seconds are counted."""
    with Meter(what, "seconds", None, patience=patience) as meter:
        ended = threading.Event()

        def count() -> None:
            while not ended.wait(1):
                meter.reach(int(time.monotonic() - meter.started))

        counter = threading.Thread(target=count, daemon=True)
        counter.start()
        try:
            yield
        finally:
            ended.set()
            counter.join()


def metered(
    items: Iterable[T], what: str, unit: str, total: int | None = None, each: int = 1
) -> Iterator[T]:
    """The same items, counted with :data:`PATIENCE`: each is done when the next is asked for.

    Args:
        total: units in all, if they are known.
        each: units of an item; the last may have fewer.
    """
    with Meter(what, unit, total, patience=PATIENCE) as meter:
        done, looked = 0, 0.0
        for item in items:
            if (now := time.monotonic()) - looked > 0.1:  # some items take a microsecond
                meter.reach(done)
                looked = now
            yield item
            done += each
        meter.reach(done if total is None else total)


def duration(seconds: float) -> str:
    """``48 s``, ``12 min``, ``3 h 05 min``, ``2 d 4 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _stack() -> list[Meter]:
    """Meters that are open in this thread, the outermost first."""
    if not hasattr(_thread, "meters"):
        _thread.meters = []
    meters: list[Meter] = _thread.meters
    return meters


def _bar() -> "Progress | None":
    """A line of standard error that is rewritten, if that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        return None
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("{task.fields[left]}"), TextColumn("{task.fields[note]}"),
        console=console,
    )  # fmt: skip
    bar.add_task("", total=None, visible=False, note="", left="")
    return bar
