"""What a training watches: updates that are not finite, terms that never change, loss spikes."""

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from erniesearch import distributed
from erniesearch.data.batches import StepBatches
from erniesearch.data.sampler import GroupSampler
from erniesearch.errors import UserError
from erniesearch.progress import say
from erniesearch.training.monitor import drop_lines_after

CONSTANT_AFTER = 50
"""Logged updates without any change after which a term counts as constant."""
SPIKE_WINDOW, SPIKE_AFTER, SPIKE_FACTOR = 50, 20, 12.0
"""A spike is ``median + factor · median absolute deviation`` over a window of logged losses."""


def spoil_nonfinite(loss: torch.Tensor) -> torch.Tensor:
    """The loss with the gradient NaN if its value is not finite, on the device.

    A NaN in one rank's gradient makes the global norm NaN on all of them: every rank skips the
    update, and no collective of its own is needed.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def hold_nonfinite_gradient(engine: DeepSpeedEngine) -> bool:
    """Before a step: make it change nothing if the gradient is not finite and DeepSpeed would
    apply it all the same, as it does without ZeRO in fp32. Ranks hold the same averaged gradient.

    Returns whether the step is held; False where DeepSpeed checks by itself.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "overflow"):
        return False
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    finite = bool(norm.isfinite())
    # By this attribute torch's GradScaler tells fused optimizers to leave everything as it is.
    optimizer.found_inf = None if finite else torch.ones((), device=norm.device)
    return not finite


class NonFiniteGuard:
    """Counts skipped updates, writes what was in them to ``nonfinite.jsonl``, stops a stage that
    does not recover.

    Args:
        folder: the stage's.
        limit: stop after this many skipped updates in a row.
        batches: this rank's batches; what the other ranks had derives from them.
        pids: the corpus's passage ids.
        start_step: updates done before.
        state: of :meth:`state`, from the checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        limit: int,
        batches: StepBatches,
        pids: Sequence[str],
        start_step: int,
        state: dict[str, int],
    ) -> None:
        self.path = folder / "nonfinite.jsonl"
        self.limit, self.batches, self.pids = limit, batches, pids
        self.total, self.in_a_row = state.get("total", 0), state.get("in_a_row", 0)
        if distributed.is_main():
            drop_lines_after(self.path, start_step)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def check(self, step: int, losses: list[torch.Tensor], skipped: bool) -> None:
        """After update ``step`` (from 1): ``losses`` are this rank's, one per micro-step.

        Every rank must call it, with the same ``skipped``.

        Raises:
            UserError: on every rank, at the limit.
        """
        if not skipped:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        every = distributed.gather_objects([float(loss) for loss in losses])
        if distributed.is_main():
            self._write(step, every)
        if self.in_a_row >= self.limit:
            raise UserError(
                f"{self.in_a_row} updates in a row had a loss or gradient that is not finite, the"
                f" last was update {step}; {self.path} names their queries and passages: mend the"
                " data or lower the learning rate (training.max_nonfinite is the limit)"
            )

    def _write(self, step: int, losses: list[list[float]]) -> None:
        spoilt = [
            (rank, micro_step)
            for rank, own in enumerate(losses)
            for micro_step, loss in enumerate(own)
            if not math.isfinite(loss)
        ]
        # All losses finite: the gradient alone was not, and any batch may be the cause.
        shown = spoilt or [(r, m) for r, own in enumerate(losses) for m in range(len(own))]
        line = {
            "step": step,
            "cause": "loss" if spoilt else "gradient",
            "batches": [self._describe(step - 1, r, m, losses[r][m]) for r, m in shown],
        }
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
        say(
            f"update {step} was skipped: its {line['cause']} is not finite; {self.path} names its"
            " queries and passages", "warning",
        )  # fmt: skip

    def _describe(self, step: int, rank: int, micro_step: int, loss: float) -> dict[str, Any]:
        sampler = self.batches.sampler
        _, queries_per_rank, world_size = self.batches.slice
        groups = sampler.micro_batch(step, micro_step, rank, queries_per_rank, world_size)
        return {
            "rank": rank,
            "micro_step": micro_step,
            "loss": str(loss),
            # In post-training a passage is its own query.
            "queries": [
                sampler.qids[group.query]
                if isinstance(sampler, GroupSampler)
                else self.pids[group.query]
                for group in groups
            ],
            "passages": [[self.pids[int(i)] for i in group.passages] for group in groups],
        }


class TermWatch:
    """Warnings about logged terms: one for a term that never changes, one for each loss spike.

    Args:
        names: the stage's terms, those of weight above 0.
        gated: whether a term may be 0 for long because the competence gate is closed.
    """

    def __init__(self, names: Sequence[str], gated: bool) -> None:
        self.names, self.gated = list(names), gated
        self._first: dict[str, float] = {}
        self._same: dict[str, int] = dict.fromkeys(names, 0)
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def look(self, step: int, terms: dict[str, float]) -> list[str]:
        """Warnings after a logged update."""
        found = [self._constant(name, terms[name]) for name in self.names if name in terms]
        found.append(self._spike(step, terms["loss"]))
        return [warning for warning in found if warning]

    def _constant(self, name: str, value: float) -> str | None:
        first = self._first.setdefault(name, value)
        closed = self.gated and value == 0
        if closed or not abs(value - first) <= 1e-6 * max(1.0, abs(first)):
            self._first[name], self._same[name] = value, 0
            return None
        self._same[name] += 1
        if self._same[name] != CONSTANT_AFTER:
            return None
        return (
            f"the term {name} has been {value:.4g} for {CONSTANT_AFTER} logged updates: nothing"
            f" learns from it (weights.{name} 0 saves its work)"
        )

    def _spike(self, step: int, loss: float) -> str | None:
        if not math.isfinite(loss):
            return None  # the other guard's
        before, warning = list(self._losses), None
        if len(before) >= SPIKE_AFTER:
            median = statistics.median(before)
            spread = statistics.median(abs(x - median) for x in before)
            # A loss that has settled has next to no spread.
            if loss > median + SPIKE_FACTOR * max(spread, 0.02 * abs(median)):
                warning = f"loss spike at update {step}: {loss:.4g} after a median of {median:.4g}"
        self._losses.append(loss)
        return warning
