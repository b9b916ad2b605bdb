"""Started by test_precision.py: what bf16 training makes of numbers that bf16 cannot hold.

Trains ``JointWeight`` for an update under every ZeRO stage, through the ordinary engine and
update; prints {stage: [gradient norm, weight]} as one JSON line.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from erniesearch import distributed, exiting
from erniesearch.config.keys import TrainingConfig
from erniesearch.config.stage_keys import StageConfig
from erniesearch.training.checkpoints.weights import gathered_state
from erniesearch.training.engine import build_engine
from erniesearch.training.update import update

MICRO_STEPS = 64


class Slope(NamedTuple):
    """A batch whose loss has this gradient."""

    slope: float
    num_tokens: int = 1

    def to(self, device: torch.device) -> "Slope":
        return self


class JointWeight(torch.nn.Module):
    """One number to train, with what the engine asks of a joint module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, batch: Slope) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * batch.slope).sum()}

    def parameter_groups(self, *rates: float) -> Iterator[dict[str, Any]]:
        yield {"params": [self.weight], "lr": 1e-4, "weight_decay": 0.5, "name": "head"}


def main() -> None:
    device, found = distributed.initialize(), {}
    stage = StageConfig(accumulation_steps=MICRO_STEPS)
    for zero_stage in range(4):
        training = TrainingConfig(precision="bf16", zero_stage=zero_stage, max_grad_norm=0.0)  # type: ignore[arg-type]
        engine, _ = build_engine(JointWeight(), training, stage, 1, True)  # type: ignore[arg-type]
        # Averaged: 1, and 63 times 1/256.
        batches = iter([Slope(MICRO_STEPS), *[Slope(MICRO_STEPS / 256)] * (MICRO_STEPS - 1)])
        update(engine, batches, stage, device, lambda what: None)  # type: ignore[arg-type]
        norm = engine.get_global_grad_norm()
        found[zero_stage] = [float(norm), float(gathered_state(engine)["weight"])]
        engine.destroy()
    sys.stdout.write(json.dumps(found) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    exiting.run(main)
