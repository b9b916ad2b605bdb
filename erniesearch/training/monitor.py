"""What a user sees of a training: progress, metrics.jsonl, and trackers such as TensorBoard."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from accelerate.tracking import GeneralTracker

from erniesearch.files import write_atomically
from erniesearch.progress import Meter, say


class Monitor:
    """Rank 0's log of a stage; lines after ``start_step`` left by a killed run are dropped.

    ``metrics.jsonl`` has one line per logged update: step, every term, learning rates, gradient
    norm; and under ``speed`` what depends on the machine. ``validation.jsonl`` has one line per
    measurement, with the ``seconds`` that it took. The same figures go to ``trackers``, which are
    finished at the end.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        start_step: int,
        steps: int,
        trackers: Sequence[GeneralTracker],
    ) -> None:
        self.name, self.path = name, folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.validation_path = folder / "validation.jsonl"
        for path in (self.path, self.validation_path):
            drop_lines_after(path, start_step)
        self.handle = self.path.open("a", encoding="utf-8")
        self.trackers = trackers
        self.meter = Meter("training", "updates", steps, done=start_step)

    def __enter__(self) -> "Monitor":
        self.meter.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.meter.__exit__()
        self.handle.close()
        for tracker in self.trackers:
            tracker.finish()

    def sync(self) -> None:
        """Bring what is logged to the disk: a checkpoint must not be ahead of its log."""
        os.fsync(self.handle.fileno())

    def log(
        self, step: int, terms: dict[str, float], rates: dict[str, float], speed: dict[str, float]
    ) -> None:
        """Write one update's figures; ``step`` counts from 1."""
        # JSON has no NaN and no infinity.
        shown = {key: value if math.isfinite(value) else None for key, value in terms.items()}
        line = {"step": step, **shown, "learning_rate": rates, "speed": speed}
        self.handle.write(json.dumps(line) + "\n")
        self.handle.flush()
        self._track(step, {"loss": terms, "learning_rate": rates, "speed": speed})
        self.meter.reach(
            step, f"loss {terms['loss']:.3f}  {speed['queries_per_second']:.1f} queries/s"
            f"  {speed['tokens_per_second']:.0f} tokens/s", loss=terms["loss"],
            queries_per_second=round(speed["queries_per_second"], 1),
            tokens_per_second=round(speed["tokens_per_second"]),
        )  # fmt: skip

    def log_validation(self, step: int, figures: dict[str, float], is_best: bool = False) -> None:
        """Write the figures on the validation split."""
        shown = {key: value if math.isfinite(value) else None for key, value in figures.items()}
        with self.validation_path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **shown}) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        self._track(step, {"validation": figures})
        told = [f"validation {name} {value:.4f}" if name == "loss" else f"{name} {value:.4f}"
                for name, value in figures.items() if name == "loss" or "@" in name]  # fmt: skip
        if "seconds" in figures:
            told.append(f"in {figures['seconds']:.1f} s")
        best = ", the best so far" if is_best else ""
        say(f"{self.name} {step}/{self.meter.total}  {'  '.join(told)}{best}")

    def _track(self, step: int, groups: dict[str, dict[str, float]]) -> None:
        tagged = {f"{g}/{key}": value for g, part in groups.items() for key, value in part.items()}
        for tracker in self.trackers:
            tracker.log(tagged, step=step)


def drop_lines_after(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines log that a killed run left after ``step``."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            break  # the line a kill cut short; nothing follows it
    write_atomically(path, "".join(kept))
