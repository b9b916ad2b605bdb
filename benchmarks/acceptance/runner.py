"""Runs checks, each in a process of its own that is ended with all it started, and keeps the JSON.

{"machine": {…}, "commit", "size", "status": "passed" | "failed", "skipped": [names],
 "checks": [{"name", "status": "passed" | "failed" | "skipped", "seconds", "reason",
             "figures": {…}}]}
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from acceptance.check import ROOT, Check, Size, last_lines

MARK = "ERNIESEARCH_ACCEPTANCE_CHECK"
Result = dict[str, Any]


@dataclass(frozen=True)
class Runner:
    """Where checks run and for how long.

    Attributes:
        module: whose CHECKS are run.
        checks: its content.
        size: of all of them.
        folder: receives a folder and a log for each check.
        deadline: on time.monotonic; checks that could not begin before are skipped.
    """

    module: str
    checks: Sequence[Check]
    size: Size
    folder: Path
    deadline: float

    def run(self, names: Sequence[str], jobs: int, done: Callable[[Result], None]) -> None:
        """Run the named checks, ``jobs`` at a time but those that measure alone, which come last;
        ``done`` is told each result."""
        chosen = [check for check in self.checks if check.name in names]
        with orphans_adopted(), ThreadPoolExecutor(jobs) as pool:
            try:
                for result in pool.map(self._one, [c for c in chosen if not c.alone]):
                    done(result)
                for check in chosen:
                    if check.alone:
                        done(self._one(check))
            except BaseException:  # Ctrl-C
                pool.shutdown(wait=False, cancel_futures=True)
                for check in chosen:
                    end_marked(check.name)
                raise

    def _one(self, check: Check) -> Result:
        began = time.monotonic()
        limit = min(check.limit(self.size), self.deadline - began)
        if limit < 1:
            return _result(check, "skipped", 0.0, "no time was left in this command", {})
        folder, log = self.folder / check.name, self.folder / f"{check.name}.log"
        file = self.folder / f"{check.name}.json"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        file.unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "acceptance.one", self.module, str(self.checks.index(check)),
            self.size, str(folder), str(file),
        ]  # fmt: skip
        own = {MARK: check.name, "ERNIESEARCH_CACHE": str(folder / "cache")}
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(self.size) | own,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        end_marked(check.name)
        process.wait()
        seconds = round(time.monotonic() - began, 1)
        told = json.loads(file.read_text()) if file.exists() else {}
        figures = told.get("figures", {})
        if status is None:
            cut = ", when this command's time was up" * (limit < check.limit(self.size))
            return _result(check, "failed", seconds, f"not done after {limit:.0f} s{cut}", figures)
        if told.get("status", "running") == "running":  # it died
            reason = f"ended with status {status}: {last_lines(log.read_text(errors='replace'))}"
            return _result(check, "failed", seconds, reason, figures)
        return _result(check, told["status"], seconds, told["reason"], figures)


def _result(
    check: Check, status: str, seconds: float, reason: str, figures: dict[str, Any]
) -> Result:
    return {"name": check.name, "status": status, "seconds": seconds, "reason": reason,
            "figures": figures}  # fmt: skip


def environment(size: Size) -> dict[str, str]:
    """Of every check: no network, no GPU for the size cpu, caches of its own."""
    variables = os.environ | {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true" if size == "gpu" else "false",
        "TRANSFORMERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    if size == "cpu":
        variables |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return variables


@contextmanager
def orphans_adopted() -> Iterator[None]:
    """What checks leave behind becomes a child of this process, which can then find it (Linux)."""

    def adopt(yes: bool) -> None:
        if sys.platform == "linux":
            pr_set_child_subreaper = 36
            ctypes.CDLL(None).prctl(pr_set_child_subreaper, int(yes), 0, 0, 0)

    adopt(True)
    try:
        yield
    finally:
        adopt(False)


def end_marked(name: str) -> None:
    """Kill every process that a check started, whatever session it made for itself, until there is
    none: one may have started another just before it was killed."""
    found = True
    while found:
        found = False
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it has ended
                if process.environ().get(MARK) == name:
                    process.kill()
                    found = True
        time.sleep(0.05 * found)


def merge(file: Path, head: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """Write the results into ``file``, which keeps the others that it holds from the same commit
    and machine; returns its content."""
    old = json.loads(file.read_text()) if file.exists() else {}
    known = {}
    if all(old.get(key) == head[key] for key in ("commit", "size", "machine")):
        known = {result["name"]: result for result in old["checks"]}
    checks = list((known | {result["name"]: result for result in results}).values())
    failed = any(result["status"] == "failed" for result in checks)
    skipped = [result["name"] for result in checks if result["status"] == "skipped"]
    content = head | {
        "status": "failed" if failed else "passed", "skipped": skipped, "checks": checks,
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(aside, file)
    return content
