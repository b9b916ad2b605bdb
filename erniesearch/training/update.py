"""One update: forward and backward over its micro-steps, and the optimizer's step."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from deepspeed import DeepSpeedEngine

from erniesearch.config.stage_keys import TrainingStageConfig
from erniesearch.data.batches import Batch
from erniesearch.training.faults import guards
from erniesearch.training.gradient_cache import cached_backward, one_reduction


class Update(NamedTuple):
    """What an update was made of on this rank: mean terms, each micro-step's loss, real tokens,
    and whether it changed nothing because it was not finite (the same on every rank)."""

    terms: dict[str, torch.Tensor]
    losses: list[torch.Tensor]
    num_tokens: int
    skipped: bool


def update(
    engine: DeepSpeedEngine,
    loader: Iterator[Batch],
    stage: TrainingStageConfig,
    device: torch.device,
    progress: Callable[[str], Any],
) -> Update:
    """Forward and backward over the micro-steps, and the optimizer's step."""
    micro_steps = []
    num_tokens, held = 0, False
    several = stage.chunk_size or stage.accumulation_steps > 1
    with one_reduction(engine) if several else nullcontext(engine.backward) as backward:
        for _ in range(stage.accumulation_steps):
            progress("reading data")
            batch = next(loader)
            num_tokens += batch.num_tokens
            batch = batch.to(device)
            if stage.chunk_size:
                own = cached_backward(
                    engine.module, engine, backward, batch, stage.chunk_size,
                    1 / stage.accumulation_steps, progress,
                )  # fmt: skip
            else:
                progress("forward pass")
                own = engine(batch)
                progress("backward pass")
                backward(guards.spoil_nonfinite(own["loss"]) / stage.accumulation_steps)
            micro_steps.append({name: value.detach() for name, value in own.items()})
    progress("optimizer's step")
    held = guards.hold_nonfinite_gradient(engine)
    engine.step()
    table = torch.stack([torch.stack(list(own.values())) for own in micro_steps]).mean(0)
    means = dict(zip(micro_steps[0], table.unbind(), strict=True))
    losses = [own["loss"] for own in micro_steps]
    return Update(means, losses, num_tokens, held or not engine.was_step_applied())
