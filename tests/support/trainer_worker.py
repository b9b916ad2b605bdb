"""Started by tests on every rank: trains with loss terms and callbacks of its own.

Usage: trainer_worker.py JOBS.json, a list of {"config": …, "stage": …, "terms": [names of
functions below], "stop": {"event": …, "step": …, "rank": …} or null, "kill": the update after which
the process dies}.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.unvalidated import train

from erniesearch import distributed, exiting
from erniesearch.config.keys import RunConfig
from erniesearch.config.terms import LossTerm
from erniesearch.config.yaml_file import from_dict
from erniesearch.data.batches import Batch
from erniesearch.objectives import losses
from erniesearch.objectives.own_terms import Scores
from erniesearch.training.callbacks import Callback, TrainingState


def own_de(scores: Scores, batch: Batch) -> torch.Tensor:
    assert scores.dual_encoder is not None
    return losses.contrastive_loss(scores.dual_encoder, scores.labels, scores.mask)


def own_ce(scores: Scores, batch: Batch) -> torch.Tensor:
    assert scores.cross_encoder is not None
    labels = torch.zeros(len(batch.query_ids), dtype=torch.long)
    return losses.contrastive_loss(scores.cross_encoder, labels, scores.group_mask)


def own_ce_to_li(scores: Scores, batch: Batch) -> torch.Tensor:
    assert scores.cross_encoder is not None
    assert scores.late_interaction is not None
    own = scores.own_group(scores.late_interaction)
    return losses.kl_divergence(scores.cross_encoder, own, scores.group_mask, detach=False)


TERMS = {
    "de": LossTerm("own_de", own_de, 0.5),
    "ce": LossTerm("own_ce", own_ce, 2.0, ("cross_encoder",), trains_teacher=True),
    "ce_to_li": LossTerm("own_ce_to_li", own_ce_to_li, 1.0, ("late_interaction", "cross_encoder")),
}


class Recorder(Callback):
    """Writes what it is told, and stops where it is asked to."""

    def __init__(self, stop: dict[str, Any] | None, kill: int | None) -> None:
        self.stop, self.kill, self.lines, self.heard = stop, kill, [], 0

    def note(self, event: str, state: TrainingState) -> None:
        self.heard += event == "on_step_end"
        if event == "on_log" and state.step == self.kill:
            os._exit(9)
        made = (state.model_folder / "student" / "model.safetensors").is_file()
        self.lines.append({
            "event": event, "step": state.step, "steps": state.steps, "heard": self.heard,
            "loss": state.figures.get("loss"), "evaluation": state.evaluation, "model": made,
            "best": [state.best_metric, state.best_step],
        })  # fmt: skip
        wanted = self.stop or {"event": None}
        if wanted["event"] == event and wanted["step"] == state.step:
            state.should_stop = state.should_stop or distributed.rank() == wanted["rank"]
        if event == "on_train_end":
            path = state.folder / f"told-{distributed.rank()}.json"
            path.write_text(json.dumps(self.lines))

    def state_dict(self) -> dict[str, Any]:
        return {"heard": self.heard}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.heard = state["heard"]


def _noting(event: str) -> Any:
    return lambda self, state: self.note(event, state)


for event in ("train_begin", "step_end", "log", "evaluate", "save", "train_end"):
    setattr(Recorder, f"on_{event}", _noting(f"on_{event}"))


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        terms = [TERMS[name] for name in job.get("terms", [])]
        config = from_dict(RunConfig, job["config"])
        recorder = Recorder(job.get("stop"), job.get("kill"))
        folder = train(config, job["stage"], terms=terms, callbacks=[recorder])
        assert folder == Path(config.run_dir) / "stages" / job["stage"] / "model"
    dist.destroy_process_group()


if __name__ == "__main__":
    exiting.run(main)
