"""One training stage's micro-steps, run without contents: its peak, FLOPs and traffic."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import torch.distributed as dist

from erniesearch.models import lengths
from erniesearch.models.backbone import without_weights
from erniesearch.models.precision import tune_for_device
from erniesearch.planning.accounting import GpuKernels, Tracker, fake_world
from erniesearch.planning.full_batch import full_batch
from erniesearch.planning.states import Layout, Reduction, Zero, resident
from erniesearch.stages import Stage
from erniesearch.training.build import assemble_model, base_teacher
from erniesearch.training.faults import guards
from erniesearch.training.gradient_cache import cached_backward


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Attention without maps, and texts in a GPU's blocks."""
    own = lengths.least_rows
    with (
        GpuKernels(),
        patch.object(lengths, "least_rows", lambda _, hidden_size: own("cuda", hidden_size)),
    ):
        yield


@dataclass(frozen=True)
class Trace:
    """One rank's memory, work and traffic in a stage's update.

    Attributes:
        resident: bytes that stay between updates, by what they are.
        phases: highest bytes of activations, gradients and buffers together, above them, in each
            phase of an update.
        flops: per update.
        sent: bytes that the model's own collectives send per update, by kind.
        continued: whether the figures are continued from smaller traces.
    """

    resident: dict[str, int]
    phases: dict[str, int]
    flops: int
    sent: dict[str, int]
    continued: bool = False

    @property
    def moving(self) -> int:
        """Highest bytes above those that stay."""
        return max(self.phases.values())

    @property
    def peak(self) -> int:
        """Bytes at the highest point of an update."""
        return sum(self.resident.values()) + self.moving


class StageTracer:
    """A stage's model on tensors without contents, for any number of ranks and queries.

    Args:
        config: the run's.
        name: of the training stage.
        device: "cuda" or "cpu", on which the training is to run.
        bf16: whether the forward pass computes in bfloat16.
        zero: instead of the config's.

    Raises:
        UserError: for models that cannot be loaded or do not fit each other or the data settings.
    """

    def __init__(self, stage: Stage, device: str, bf16: bool, zero: Zero | None = None) -> None:
        # The gate's running accuracies are numbers that a trace does not have.
        config = stage.config
        objective = replace(config.objective, competence_gate=False)
        self.stage = replace(stage, config=replace(config, objective=objective))
        self.zero = zero or Zero.of(config.training)
        self.device, self.width = device, 2 if bf16 else 4
        self.tracker = Tracker(gpu=device == "cuda")
        with self.tracker, without_weights():
            self.model, self.tokenizer = assemble_model(
                self.stage, config.student, base_teacher(config)
            )
            if bf16:
                for parameter in self.model.parameters():
                    parameter.data = parameter.data.to(torch.bfloat16)
        tune_for_device(self.model, config, torch.device(device), bf16)
        self.layout = Layout.of(self.model, self.stage.settings)
        self.tracker.exclude(self.model.parameters())
        self.model.train()

    def run(self, ranks: int, num_queries: int, world_size: int | None = None) -> Trace:
        """An update with ``num_queries`` per rank and micro-step; of more than two micro-steps two
        are run, since the others are like the second. ``world_size``: how many ranks the model's
        collectives see, if not all."""
        gpu = self.device == "cuda"
        steps = self.stage.settings.accumulation_steps
        self.tracker.reset()
        with fake_world(world_size or ranks, self.device), self.tracker:
            reduction = Reduction(
                self.tracker, self.layout, self.zero, ranks, self.width, gpu, self.stage.settings
            )
            for micro_step in range(min(steps, 2)):
                self.tracker.phase = "forward"
                self._micro_step(reduction, num_queries, micro_step)
                self.tracker.phase = "reduction"
                reduction.finish(micro_step + 1 == min(steps, 2))
            self.tracker.phase = "step"
            reduction.step()
        scale = steps / min(steps, 2)
        return Trace(
            resident(self.layout, self.zero, ranks, self.width, gpu),
            dict(self.tracker.peaks),
            round(self.tracker.flops * scale),
            {kind: round(sent * scale) for kind, sent in self.tracker.sent.items()},
        )

    def _micro_step(self, reduction: Reduction, num_queries: int, micro_step: int) -> None:
        texts = num_queries * (1 + self.stage.settings.num_negatives)
        data = self.stage.config.data
        own = texts * (data.max_query_length + data.max_passage_length)
        gathered = dist.get_world_size() * texts * data.max_passage_length
        self.tracker.real_limit = max(1 << 22, 2 * own, gathered)
        batch = full_batch(self.stage, num_queries, self.tokenizer, 0, micro_step)
        reduction.watch(self.model.parameters())
        with _as_on_a_gpu() if self.device == "cuda" else nullcontext():
            if chunk_size := self.stage.settings.chunk_size:
                cached_backward(
                    self.model, self.model, torch.Tensor.backward, batch, chunk_size,
                    progress=self._enter,
                )  # fmt: skip
                reduction.turn()
            else:
                loss = self.model(batch)["loss"]
                reduction.turn()
                self.tracker.phase = "backward"
                guards.spoil_nonfinite(loss).backward()

    def _enter(self, progress: str) -> None:
        for phase in ("forward", "loss", "backward"):
            if phase in progress:
                self.tracker.phase = phase
