"""What is measured of a stage on held-out queries, and what follows from it: which checkpoint is
the best, and when the training has stopped to get better."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from erniesearch.data.batches import StepBatches
from erniesearch.data.collection import RetrievalData
from erniesearch.stages import Stage
from erniesearch.training.checkpoints.manifest import Quality
from erniesearch.training.retrieval_quality import (
    RetrievalQuality,
    best_metric,
    retrieval_metrics,
    trained_models,
)
from erniesearch.training.validation import Validation, is_validated


@dataclass
class Progress:
    """What a checkpoint keeps of the measurements.

    Attributes:
        metric: the figure that they go by, None if the stage has none.
        best, best_step: its best value so far, and the update.
        since_best: measurements after that one.
        times, seconds: measurements, and what they took.
    """

    metric: str | None = None
    best: float | None = None
    best_step: int | None = None
    since_best: int = 0
    times: int = 0
    seconds: float = 0.0


class QualityWatch:
    """A stage's measurements, the same on every rank.

    Attributes:
        progress: what has been measured so far.

    Args:
        saved: of :meth:`state`, from a checkpoint.

    Raises:
        UserError: if the split cannot be read, or does not fit.
    """

    def __init__(
        self, stage: Stage, data: RetrievalData, batches: StepBatches, saved: dict[str, Any]
    ) -> None:
        self.patience = stage.config.training.early_stopping_patience
        self.loss = Validation(stage, data, batches) if is_validated(stage) else None
        self.retrieval = RetrievalQuality(stage, data, batches) if ranks(stage) else None
        goes_by = best_metric(stage)
        metric, self.greater_is_better = goes_by if goes_by else (None, False)
        self.progress = Progress(metric)
        if saved.get("metric") == metric:
            self.progress = Progress(**saved)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self.progress)

    def measure(
        self,
        engine: DeepSpeedEngine,
        device: torch.device,
        step: int,
        tell: Callable[[str], Any],
    ) -> tuple[dict[str, float], Quality]:
        """All figures after ``step`` updates with ``seconds``, and what a checkpoint says of them.
        Every rank must call it; ``tell`` is told what is being done."""
        began = time.monotonic()
        figures: dict[str, float] = {}
        tell("validating")
        if self.loss is not None:
            figures |= self.loss.measure(engine, device)
        if self.retrieval is not None:
            figures |= self.retrieval.measure(engine, device, tell)
        progress = self.progress
        value = figures.get(progress.metric or "", math.nan)
        best = math.isfinite(value) and (
            progress.best is None
            or (value > progress.best if self.greater_is_better else value < progress.best)
        )
        if best:
            progress.best, progress.best_step, progress.since_best = value, step, 0
        else:
            progress.since_best += 1
        seconds = time.monotonic() - began
        progress.times, progress.seconds = progress.times + 1, progress.seconds + seconds
        quality = Quality(figures.get("loss"), progress.metric, value, self.greater_is_better, best)
        return figures | {"seconds": seconds}, quality

    def told(self) -> str:
        """One line."""
        progress = self.progress
        best = ""
        if progress.best is not None:
            best = f"; best {progress.metric} {progress.best:.4f} after update {progress.best_step}"
        return f"measured {progress.times} times in {progress.seconds:.1f} s{best}"

    @property
    def reason_to_stop(self) -> str:
        """Why the training should end now; empty if it should not."""
        progress = self.progress
        if self.patience is None or progress.best is None or progress.since_best < self.patience:
            return ""
        return (
            f"{progress.metric} was not better in {progress.since_best} measurements than"
            f" {progress.best:.4f} after update {progress.best_step}"
        )


def ranks(stage: Stage) -> bool:
    """Whether retrieval metrics are measured of a stage."""
    training = stage.config.training
    split = training.validation_split is not None
    return split and bool(retrieval_metrics(training)) and bool(trained_models(stage))


def is_watched(stage: Stage) -> bool:
    """Whether anything is measured of a stage."""
    return is_validated(stage) or ranks(stage)
