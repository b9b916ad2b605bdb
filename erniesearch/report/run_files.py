"""What a run has left so far, read so that an odd line costs a sentence and no more."""

import json
import math
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from erniesearch.config.keys import TRAINING_STAGES
from erniesearch.data.jsonl import parse_line
from erniesearch.errors import UserError
from erniesearch.run_folder import COSTS
from erniesearch.stages import ORDER

READ = ("metrics.jsonl", "validation.jsonl", "nonfinite.jsonl", "started.json", "done.json", COSTS)
"""Of a step's folder."""


@dataclass
class Notes:
    """What could not be read, a sentence each."""

    said: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Say it once."""
        if text not in self.said:
            self.said.append(text)


@dataclass(frozen=True)
class Log:
    """Lines of ``metrics.jsonl`` or ``validation.jsonl``: updates ``[n]``, and each figure ``[n]``
    by name, not a number where a line has none. Nested figures are ``group/name``."""

    steps: np.ndarray
    figures: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.steps)

    def group(self, name: str) -> dict[str, np.ndarray]:
        """The figures of a group, by their names within it."""
        start = f"{name}/"
        return {k.removeprefix(start): v for k, v in self.figures.items() if k.startswith(start)}

    def last(self, name: str) -> float:
        """The last finite value, not a number without any."""
        values = self.figures.get(name, np.empty(0))
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else math.nan


@dataclass(frozen=True)
class Step:
    """A step of the pipeline: its logs, ``done.json`` (None: not done) and ``costs.json``."""

    name: str
    folder: Path
    begun: bool
    done: dict[str, Any] | None
    metrics: Log
    validation: Log
    costs: dict[str, Any]

    @property
    def state(self) -> str:
        """In a word."""
        return "done" if self.done is not None else "begun" if self.begun else "waiting"

    def cost(self, name: str) -> float | None:
        """A figure of ``costs.json``."""
        value = self.costs.get(name)
        return float(value) if isinstance(value, int | float) else None

    @property
    def wall_seconds(self) -> float | None:
        """From its beginning to its end: what its process has recorded, or the files' times."""
        if self.done is None:
            return None
        if (recorded := self.cost("seconds")) is not None:
            return recorded
        files = self.folder / "started.json", self.folder / "done.json"
        if not all(path.is_file() for path in files):
            return None
        return files[1].stat().st_mtime - files[0].stat().st_mtime


def read_json(path: Path, notes: Notes) -> dict[str, Any] | None:
    """A JSON object; None, and a note where there is one to make, if none can be read."""
    if not path.is_file():
        return None
    try:
        return parse_line(path.read_bytes(), path, 1)
    except (UserError, OSError) as error:
        notes.add(f"{_without_line(error)}; what it says is left out.")
        return None


def read_settings(path: Path, notes: Notes) -> dict[str, Any]:
    """``config.yaml`` as nested keys, empty if it cannot be read. It may be of another version, so
    it is not validated."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        notes.add(f"{path}: cannot be read ({' '.join(str(error).split())[:120]}).")
        return {}
    if not isinstance(found, dict):
        notes.add(f"{path}: no mapping of keys; it is left out.")
        return {}
    return found


def setting(content: dict[str, Any], key: str, kind: type | tuple[type, ...], default: Any) -> Any:
    """A dotted key's value, ``default`` where it is missing or of another kind."""
    value: Any = content
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, kind) and not isinstance(value, bool) else default


def read_log(path: Path, notes: Notes) -> Log:
    """The lines of a log; those that are odd are left out and named in one note. A line that is
    being written, the last one without its end, is no odd one."""
    steps, odd = array("q"), []
    columns: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
    try:
        handle = path.open("rb")
    except FileNotFoundError:
        return Log(np.empty(0, dtype=int), {})
    except OSError as error:
        notes.add(f"{path}: cannot be read: {error.strerror}.")
        return Log(np.empty(0, dtype=int), {})
    with handle:
        for number, raw in enumerate(handle, 1):
            if not raw.strip():
                continue
            try:
                step, figures = _read_line(raw, path, number, steps[-1] if steps else -1)
            except UserError as error:
                if raw.endswith(b"\n"):
                    odd.append(str(error))
                continue
            steps.append(step)
            for name, value in figures.items():
                column = columns[name]
                column.extend([math.nan] * (len(steps) - 1 - len(column)))
                column.append(value)
    if odd:
        more = f" ({len(odd)} such lines in all)" if len(odd) > 1 else ""
        notes.add(f"{odd[0]}{more}; the rest of the file is shown.")
    for column in columns.values():
        column.extend([math.nan] * (len(steps) - len(column)))
    return Log(np.array(steps, dtype=int), {k: np.array(v) for k, v in columns.items()})


def _read_line(raw: bytes, path: Path, number: int, last: int) -> tuple[int, dict[str, float]]:
    record = parse_line(raw, path, number)
    step = record.pop("step", None)
    if not isinstance(step, int) or isinstance(step, bool) or not last < step < 1 << 53:
        raise UserError(f"{path}:{number}: no update that follows the last one ('step')")
    figures: dict[str, float] = {}
    for name, value in record.items():
        own = {name: value}
        if isinstance(value, dict):
            own = {f"{name}/{key}": x for key, x in value.items()}
        for key, x in own.items():
            if x is not None and (isinstance(x, bool) or not isinstance(x, int | float)):
                raise UserError(f"{path}:{number}: '{key}' is no number")
            figures[key] = float(x) if x is not None and abs(x) < 1e300 else math.nan
    return step, figures


def read_steps(root: Path, notes: Notes) -> dict[str, Step]:
    """Every step of the pipeline that has a folder, in order."""
    steps = {}
    for name in ORDER:
        folder = root / "stages" / name
        if not folder.is_dir():
            continue
        trains = name in TRAINING_STAGES
        log = read_log(folder / "metrics.jsonl", notes) if trains else None
        measured = read_log(folder / "validation.jsonl", notes) if trains else None
        empty = Log(np.empty(0, dtype=int), {})
        done = read_json(folder / "done.json", notes)
        costs = read_json(folder / COSTS, notes) or {}
        begun = (folder / "started.json").is_file() or bool(log)
        steps[name] = Step(name, folder, begun, done, log or empty, measured or empty, costs)
    return steps


def signature(root: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes when a run or an ablation has gone on: sizes and times of the files read."""
    found = []
    names = ["config.yaml", "evaluation.json", *(f"stages/*/{name}" for name in READ)]
    arms = [f"arms/*/*/{name}" for name in names] + ["results-*.json"]
    for pattern in names + (arms if (root / "arms").is_dir() else []):
        for path in root.glob(pattern):
            try:
                stat = path.stat()
            except OSError:  # it has just been replaced or set aside
                continue
            found.append((str(path), stat.st_size, stat.st_mtime_ns))
    return tuple(sorted(found))


def read_text(path: Path) -> str:
    """A text file's content for display, empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def nonfinite_updates(step: Step) -> int:
    """How many updates of a stage changed nothing because they were not finite."""
    return sum(
        bool(line.strip()) for line in read_text(step.folder / "nonfinite.jsonl").split("\n")
    )


def _without_line(error: Exception) -> str:
    return str(error).replace(":1:", ":", 1)


def dumps(value: Any) -> str:
    """JSON for display."""
    return json.dumps(value, indent=1, ensure_ascii=False)
