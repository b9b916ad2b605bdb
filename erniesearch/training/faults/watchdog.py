"""A rank that hangs: every rank notes where it is; when one stands still, all end and say where.

stages/NAME/.progress/rank-00003.json   {"position": "update 12, reading data", "since": "14:03:22"}
stages/NAME/.progress/stalled           made by the rank that tells it; there is one such rank
"""

import json
import os
import shutil
import threading
import time
from datetime import datetime
from pathlib import Path

from erniesearch import distributed
from erniesearch.progress import say


class Watchdog:
    """Ends this process with status 1 when :meth:`at` has not been called for ``seconds``.

    While one rank hangs, the others wait for it in a collective and stand still too; whoever
    notices first prints every rank's last position. Every rank must make one.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder / ".progress", seconds
        self.position = "before the first update"
        self._moved = time.monotonic()
        self._since = _now()
        self._over = threading.Event()
        if distributed.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        distributed.barrier()

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def at(self, step: int, what: str) -> None:
        """This rank is about to do ``what`` in update ``step`` (from 1)."""
        self.position, self._since = f"update {step}, {what}", _now()
        self._moved = time.monotonic()

    def _watch(self) -> None:
        interval = min(self.seconds / 10, 5.0)
        noted = None
        while True:
            if self.position != noted:
                noted = self.position
                self._note()
            if time.monotonic() - self._moved > self.seconds:
                self._end()
            if self._over.wait(interval):
                return

    def _note(self) -> None:
        path = self.folder / f"rank-{distributed.rank():05d}.json"
        aside = path.with_suffix(".tmp")
        try:
            aside.write_text(json.dumps({"position": self.position, "since": self._since}))
            os.replace(aside, path)
        except OSError:
            return  # a full disk stops the training elsewhere, with a message of its own

    def _end(self) -> None:
        time.sleep(min(self.seconds / 5, 10.0))  # the others' notes are that old at most
        try:
            (self.folder / "stalled").touch(exist_ok=False)
        except OSError:
            os._exit(1)  # another rank tells it
        say(
            f"no progress for {self.seconds / 60:g} minutes"
            f" (training.timeout_minutes): {describe(self.folder, distributed.world_size())}; run"
            " the same command again to continue from the newest checkpoint", "error",
        )  # fmt: skip
        os._exit(1)


def describe(folder: Path, world_size: int) -> str:
    """Every rank's last position, ranks at the same one together."""
    ranks: dict[str, list[int]] = {}
    since: dict[str, str] = {}
    for rank in range(world_size):
        try:
            note = json.loads((folder / f"rank-{rank:05d}.json").read_text())
        except (OSError, json.JSONDecodeError):
            note = {"position": "nowhere yet", "since": ""}
        ranks.setdefault(note["position"], []).append(rank)
        since.setdefault(note["position"], note["since"])
    return "; ".join(
        f"{'rank' if len(own) == 1 else 'ranks'} {_spans(own)}: {position}"
        + (f" since {since[position]}" if since[position] else "")
        for position, own in ranks.items()
    )


def _spans(numbers: list[int]) -> str:
    """``0, 2-5`` for ascending numbers."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _now() -> str:
    return datetime.now().strftime("%H:%M:%S")
