"""Write the report of a run or an ablation, once or as long as it goes on."""

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from erniesearch.errors import UserError
from erniesearch.progress import Level, say
from erniesearch.report.ablation_report import ablation_document, is_ablation
from erniesearch.report.document import REPORT, Document
from erniesearch.report.run_files import signature
from erniesearch.report.run_report import run_document

IDLE = 4
"""Seconds without work for each second of it, at least."""


def folder_document(
    root: Path, baseline: str | None = None, reload_seconds: float | None = None
) -> Document:
    """The report of a run's or an ablation's folder.

    Raises:
        UserError: for a folder that is neither, and a baseline that is not there.
    """
    if is_ablation(root):
        if baseline is not None:
            raise UserError("--baseline: an ablation's grid names the control of each arm")
        return ablation_document(root, reload_seconds)
    if not (root / "config.yaml").is_file() and not (root / "stages").is_dir():
        raise UserError(
            f"{root}: no run and no ablation: there is neither config.yaml nor arms/; give the"
            " run_dir of `erniesearch run` or `erniesearch ablate`"
        )
    return run_document(root, baseline, reload_seconds)


def write_report(root: Path) -> Path | None:
    """Write ``report.html`` into a finished run's or ablation's folder, and say what could not be
    read. Nothing that is wrong with it may fail what it reports: that is told, None returned."""
    try:
        document = folder_document(root)
        document.save(root / REPORT)
    except Exception as error:
        problem = " ".join(str(error).split())[:300]
        say(f"{root / REPORT} could not be written ({type(error).__name__}: {problem})", "warning")
        return None
    for note in document.notes:
        say(f"report: {note}", "warning")
    return root / REPORT


def watch(
    root: Path,
    out: Path,
    every: float,
    baseline: str | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Write the report anew whenever the folder's files have changed, until what is going on there
    has finished or Ctrl-C is pressed.

    Files are looked at every so many seconds, by size and time of change, so that a folder on NFS
    will do, and only the report is written. At most a fifth of a core is taken from the training.

    Raises:
        UserError: as :func:`folder_document`.
    """
    seen: tuple[tuple[str, int, int], ...] | None = None
    try:
        while True:
            began = time.process_time()
            now = signature(root)
            if now != seen and (document := _written(root, out, every, baseline)):
                seen = now
                if document.reload_seconds is None:
                    _say(f"{root} is finished")
                    return
            pause(max(every, IDLE * (time.process_time() - began)))
    except KeyboardInterrupt:
        _say(f"stopped; {out} stays as it is")


def _written(root: Path, out: Path, every: float, baseline: str | None) -> Document | None:
    """Write the report and say so; a disk that is full or away is told, None returned."""
    try:
        document = folder_document(root, baseline, every)
        document.save(out)
    except OSError as error:
        _say(f"{out}: not written: {error.strerror or error}; trying again", "warning")
        return None
    _say(f"{out}: {document.facts.get('state', document.subtitle)}")
    return document


def _say(text: str, level: Level = "note") -> None:
    say(f"{datetime.now():%H:%M:%S} {text}", level)
