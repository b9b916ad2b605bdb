"""What a training tells of itself while it runs, and may be stopped by (``Trainer(callbacks=…)``).

The methods are called as those of transformers' ``TrainerCallback``, on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erniesearch.errors import UserError


@dataclass
class TrainingState:
    """Where a stage's training stands; the same on every rank but for ``should_stop``.

    Attributes:
        stage: its name.
        step, steps: updates done, and those that there will be if nothing stops it.
        folder: the stage's: metrics.jsonl, validation.jsonl, checkpoints.
        model_folder: receives the finished model (``student/``, ``teacher/``), whole when
            ``on_train_end`` is called.
        figures: of the last logged update: loss, every term, learning rates (``learning_rate/…``),
            speed (``speed/…``).
        evaluation: figures of the last measurement on the validation split.
        best_metric, best_step: the best value of ``training.best_metric`` so far and its update.
        is_main: whether this is rank 0.
        should_stop: set it true, on any rank, to end the training cleanly: a checkpoint, the
            finished model, and the stage counts as done. It ends after this update; where several
            GPUs train, after the next one, unless it is set in ``on_evaluate``.
        stop_reason: why, for done.json; empty takes the callback's name.
    """

    stage: str
    steps: int
    folder: Path
    model_folder: Path
    is_main: bool
    step: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    best_metric: float | None = None
    best_step: int | None = None
    should_stop: bool = False
    stop_reason: str = ""


class Callback:
    """Override what is wanted. Work with a collective in it must be done on every rank; work that
    writes, on ``state.is_main`` alone."""

    def on_train_begin(self, state: TrainingState) -> None:
        """Before the first update, or the first after a checkpoint (``state.step``)."""

    def on_step_end(self, state: TrainingState) -> None:
        """After every update."""

    def on_log(self, state: TrainingState) -> None:
        """After an update that is logged (``training.log_every``); ``state.figures`` are new."""

    def on_evaluate(self, state: TrainingState) -> None:
        """After a measurement; ``state.evaluation`` is new."""

    def on_save(self, state: TrainingState) -> None:
        """After a checkpoint."""

    def on_train_end(self, state: TrainingState) -> None:
        """When the finished model lies in ``state.model_folder``."""

    def state_dict(self) -> dict[str, Any]:
        """What must outlive a kill: goes into checkpoints (rank 0's)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave for the checkpoint from which the training goes on."""


class Callbacks:
    """All of a training's callbacks, told in their order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        for callback in callbacks:
            if not isinstance(callback, Callback):
                name = getattr(callback, "__name__", type(callback).__name__)
                raise UserError(f"callbacks: {name} is no instance of erniesearch's Callback")
        self.each = list(callbacks)

    def tell(self, event: str, state: TrainingState) -> None:
        """Call the method ``event`` of each."""
        for callback in self.each:
            before = state.should_stop
            getattr(callback, event)(state)
            if state.should_stop and not before and not state.stop_reason:
                state.stop_reason = type(callback).__name__

    def state(self) -> list[tuple[str, dict[str, Any]]]:
        """Of each, with its class's name."""
        return [(type(callback).__name__, callback.state_dict()) for callback in self.each]

    def load(self, saved: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Hand each the first state of its class that no other has had."""
        left = list(saved)
        for callback in self.each:
            for found in left:
                if found[0] == type(callback).__name__:
                    left.remove(found)
                    callback.load_state_dict(found[1])
                    break
