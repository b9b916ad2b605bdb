"""What each training stage needs on each number of ranks, and what to change where that is more
than there is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from erniesearch.config.keys import RunConfig
from erniesearch.errors import UserError
from erniesearch.models.precision import use_bf16
from erniesearch.planning.estimate import Estimator, largest_fitting
from erniesearch.planning.states import Zero, engine_traffic
from erniesearch.planning.trace import StageTracer, Trace
from erniesearch.progress import metered
from erniesearch.stages import Stage

SMALL_BUCKET = 50_000_000
SMALL_CHUNK = 16


@dataclass(frozen=True)
class Machine:
    """What the ranks run on; the defaults are an H100 SXM node and a 400 Gbit/s link per GPU."""

    gpu_memory: float = 80.0
    """Memory of a GPU in GiB."""
    headroom: float = 3.0
    """GiB of it that are kept free: CUDA's context, NCCL's buffers, what the allocator loses."""
    gpu_tflops: float | None = None
    """Peak of matrix products in TFLOP/s; null is 989 in bf16 and 67 in fp32."""
    utilization: float = 0.35
    """Share of that peak that training reaches."""
    node_bandwidth: float = 450.0
    """GB/s that a GPU sends to others of its node."""
    network_bandwidth: float = 50.0
    """GB/s that a GPU sends to other nodes."""
    gpus_per_node: int = 8
    """GPUs of a node; with no more ranks than that, nothing leaves it."""

    def limit(self) -> int:
        """Bytes that a rank may use."""
        return int((self.gpu_memory - self.headroom) * (1 << 30))

    def seconds(self, flops: int, sent: int, ranks: int, bf16: bool) -> tuple[float, float]:
        """Of computing, and of sending::

        FLOPs / (peak · utilization)        bytes sent / bandwidth of the slowest link in a ring
        """
        peak = self.gpu_tflops or (989.0 if bf16 else 67.0)
        bandwidth = self.node_bandwidth if ranks <= self.gpus_per_node else self.network_bandwidth
        return flops / (peak * 1e12 * self.utilization), sent / (bandwidth * 1e9)


Variant = tuple[str, Callable[[RunConfig], RunConfig], Zero | None]
"""A change as it is shown, what it does to a config, and ZeRO settings that no config says."""


@dataclass(frozen=True)
class Change:
    """A change of the config and what it does to the peak, other things equal."""

    setting: str
    peak: int
    fits: bool
    note: str = ""


@dataclass(frozen=True)
class StagePlan:
    """One stage on one number of ranks; bytes and seconds are of one rank and one update.

    Attributes:
        queries: per rank and micro-step.
        resident: bytes that stay between updates, by what they are.
        phases: highest bytes above them in each phase.
        peak: bytes at the highest point.
        fits: whether that is within the machine's limit.
        largest: queries per rank that fit at most.
        sent: bytes on the wire, by what they are.
        seconds_computing, seconds_sending: by the machine's figures, without overlap.
        continued: figures come from smaller batches or fewer ranks, continued.
        changes: what helps, where it does not fit.
        notes: what the figures leave out.
    """

    stage: str
    ranks: int
    queries: int
    resident: dict[str, int]
    phases: dict[str, int]
    peak: int
    fits: bool
    largest: int
    flops: int
    sent: dict[str, int]
    seconds_computing: float
    seconds_sending: float
    continued: bool
    changes: tuple[Change, ...]
    notes: tuple[str, ...]


class Planner:
    """Plans the stages of one config.

    Args:
        config: the run's.
        machine: what the ranks run on.
        device: "cuda" or "cpu".
    """

    def __init__(self, config: RunConfig, machine: Machine, device: str = "cuda") -> None:
        self.config, self.machine, self.device = config, machine, device
        self._estimators: dict[str, Estimator] = {}

    def estimator(self, name: str) -> Estimator:
        """Of a stage as the config has it."""
        if name not in self._estimators:
            self._estimators[name] = self._estimator_of(self.config, name)
        return self._estimators[name]

    def all(self, names: list[str], ranks: list[int]) -> list[StagePlan]:
        """Every stage on every number of ranks; of several numbers, those that cannot share a
        stage's batch_size are left out.

        Raises:
            UserError: if none is left for a stage.
        """
        plans = []
        for name in metered(names, "planning", "stages", len(names)):
            batch_size = Stage(self.config, name).settings.batch_size
            possible = [n for n in ranks if batch_size is None or batch_size % n == 0]
            plans += [self.stage(name, number) for number in possible or ranks[:1]]
        return plans

    def stage(self, name: str, ranks: int) -> StagePlan:
        """Plan one stage.

        Raises:
            UserError: if the ranks cannot share the stage's batch_size.
        """
        queries = Stage(self.config, name, ranks).queries_per_rank
        estimate = self.estimator(name)
        trace = estimate(ranks, queries)
        tracer, limit = estimate.tracer, self.machine.limit()
        sent = trace.sent | engine_traffic(
            tracer.layout,
            tracer.zero,
            ranks,
            tracer.width,
            tracer.stage.settings.accumulation_steps,
        )
        seconds = self.machine.seconds(trace.flops, sum(sent.values()), ranks, tracer.width == 2)
        fits = trace.peak <= limit
        largest = largest_fitting(estimate, ranks, limit, queries)
        changes = () if fits else tuple(self._changes(name, ranks, queries, trace, largest))
        return StagePlan(
            name, ranks, queries, trace.resident, trace.phases, trace.peak, fits, largest,
            trace.flops, sent, *seconds, trace.continued, changes, _notes(tracer.zero),
        )  # fmt: skip

    def _estimator_of(self, config: RunConfig, name: str, zero: Zero | None = None) -> Estimator:
        return Estimator(StageTracer(Stage(config, name), self.device, self._bf16(config), zero))

    def _bf16(self, config: RunConfig) -> bool:
        precision = config.training.precision
        if precision == "auto" and self.device == "cuda":
            return True  # this machine need not have the GPU
        return use_bf16(precision, torch.device(self.device))

    def _changes(
        self, name: str, ranks: int, queries: int, trace: Trace, largest: int
    ) -> Iterator[Change]:
        limit = self.machine.limit()
        stage = Stage(self.config, name).settings
        if largest:
            # The fewest parts that fit and divide the batch: an update's queries stay the same.
            parts = next(n for n in range(-(-queries // largest), queries + 1) if not queries % n)
            fewer = queries // parts
            key = "queries_per_rank" if stage.batch_size is None else "batch_size"
            value = fewer if stage.batch_size is None else fewer * ranks
            steps = stage.accumulation_steps * parts
            yield Change(
                f"stages.{name}.{key}: {value} with accumulation_steps: {steps}",
                self.estimator(name)(ranks, fewer).peak, True,
                "fewer cross-batch negatives: they come from one micro-step",
            )  # fmt: skip
        everything, small_bucket, helping = self.config, False, 0
        for setting, change, zero in self._variants(name, ranks):
            try:
                peak = self._estimator_of(change(self.config), name, zero)(ranks, queries).peak
            except UserError as error:
                yield Change(setting, trace.peak, False, str(error))
                continue
            if peak < trace.peak:
                yield Change(setting, peak, peak <= limit)
                everything = change(everything)
                small_bucket, helping = small_bucket or zero is not None, helping + 1
        if helping > 1:
            zero = Zero.of(everything.training)
            if small_bucket:
                zero = replace(zero, reduce_bucket=SMALL_BUCKET)
            peak = self._estimator_of(everything, name, zero)(ranks, queries).peak
            yield Change("all of these but the smaller batch", peak, peak <= limit)

    def _variants(self, name: str, ranks: int) -> Iterator[Variant]:
        training, objective = self.config.training, self.config.objective
        tracer = self.estimator(name).tracer
        if not training.activation_checkpointing:
            yield _variant("training", "activation_checkpointing", True)
        chunk_size = Stage(self.config, name).settings.chunk_size
        if not chunk_size or chunk_size > SMALL_CHUNK:
            yield _variant(f"stages.{name}", "chunk_size", SMALL_CHUNK)
        if (
            ranks > 1
            and objective.late_interaction_exchange == "all_gather"
            and objective.candidates == "cross_batch"
            and tracer.model.objective.needs_tokens
        ):
            yield _variant("objective", "late_interaction_exchange", "ring")
        if not self._bf16(self.config):
            yield _variant("training", "precision", "bf16")
        zero = tracer.zero
        if self.device == "cuda" and zero.stage and zero.reduce_bucket > SMALL_BUCKET:
            text = f"reduce_bucket_size {SMALL_BUCKET} in training.zero_json, as in the shipped"
            smaller = replace(zero, reduce_bucket=SMALL_BUCKET)
            yield f"{text} zero{zero.stage}", lambda config: config, smaller
        if ranks > 1:
            for number in range(zero.stage + 1, 4):
                yield _variant("training", "zero_stage", number, zero_json=None)


def _variant(section: str, key: str, value: object, **besides: object) -> Variant:
    """One key of a section changed; ``besides``, what goes with it."""

    def change(config: RunConfig) -> RunConfig:
        return replaced(config, section.split("."), {key: value, **besides})

    shown = str(value).lower() if isinstance(value, bool) else value
    return f"{section}.{key}: {shown}", change, None


def replaced(config: Any, path: list[str], changes: dict[str, Any]) -> Any:
    """A frozen dataclass with a nested one's fields replaced."""
    if not path:
        return replace(config, **changes)
    inner = replaced(getattr(config, path[0]), path[1:], changes)
    return replace(config, **{path[0]: inner})


def _notes(zero: Zero) -> tuple[str, ...]:
    if not zero.offloads:
        return ()
    names = " and ".join(zero.offloads)
    return (f"{names}: counted as if nothing were moved to the CPU; the figures are too high",)
