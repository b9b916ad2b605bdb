"""DeepSpeed's share of the memory and the traffic, by formula (read from DeepSpeed 0.19).

With N trainable parameters, W ranks, c bytes per number in the forward pass (fp32 4, bf16 2)::

    ZeRO   weights                    master copy        Adam     gradients
    0      c N                        fp32 0, bf16 4 N   8 N      c N, flattened once more to reduce
    1, 2   c N, flat                  4 N / W            8 N / W  c N until they are reduced
    3      c N / W, gathered c N      4 N / W            8 N / W  c N / W, c N until reduced

Flat groups are padded to a multiple of 2 W, ZeRO-3's parameters one by one to a multiple of W.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from erniesearch.config.keys import TrainingConfig
from erniesearch.config.stage_keys import TrainingStageConfig
from erniesearch.errors import UserError
from erniesearch.models.joint import JointModel
from erniesearch.planning.accounting import Tracker, bytes_sent
from erniesearch.training.engine import zero_section

FALLBACK_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at a time without ZeRO."""


@dataclass(frozen=True)
class Zero:
    """What of DeepSpeed's ZeRO settings decides memory and traffic; sizes in elements."""

    stage: int
    reduce_bucket: int
    overlap: bool
    persistence: int
    prefetch: int
    reuse_distance: int
    offloads: tuple[str, ...]

    @classmethod
    def of(cls, training: TrainingConfig) -> "Zero":
        """Read a run's settings, with DeepSpeed's defaults.

        Raises:
            UserError: for a section that DeepSpeed refuses.
        """
        try:
            zero = DeepSpeedZeroConfig(**zero_section(training))
        except ValidationError as error:
            raise UserError(f"training.zero_json: {training.zero_json}: {error}") from None
        offloads = tuple(
            name for name in ("offload_optimizer", "offload_param")
            if (part := getattr(zero, name)) is not None and part.device != "none"
        )  # fmt: skip
        return cls(
            int(zero.stage), int(zero.reduce_bucket_size), bool(zero.overlap_comm),
            int(zero.param_persistence_threshold), int(zero.prefetch_bucket_size),
            int(zero.max_reuse_distance), offloads,
        )  # fmt: skip

    @property
    def hooked(self) -> bool:
        """Gradients go into the bucket as they arrive, not after the backward pass."""
        return self.stage >= 2 or (self.stage == 1 and self.overlap)


@dataclass(frozen=True)
class Layout:
    """Numbers of elements: of each trainable parameter by parameter group, of each frozen one."""

    groups: tuple[tuple[int, ...], ...]
    frozen: tuple[int, ...]

    @classmethod
    def of(cls, model: JointModel, stage: TrainingStageConfig) -> "Layout":
        """Of a joint module, grouped as the stage's optimizer groups them."""
        return cls.of_parameters(
            [group["params"] for group in model.parameter_groups(stage, 0.0)],
            model.parameters(),
        )

    @classmethod
    def of_parameters(
        cls, groups: list[list[torch.nn.Parameter]], parameters: Iterable[torch.nn.Parameter]
    ) -> "Layout":
        """From parameter groups and all parameters."""
        return cls(
            tuple(tuple(p.numel() for p in group) for group in groups),
            tuple(p.numel() for p in parameters if not p.requires_grad),
        )

    @property
    def trainable(self) -> int:
        """N."""
        return sum(map(sum, self.groups))

    def partitions(self, ranks: int) -> list[int]:
        """Elements of a group's flat partition, ZeRO 1 and 2."""
        return [-(-sum(group) // (2 * ranks)) * 2 for group in self.groups]

    def shards(self, ranks: int) -> list[int]:
        """Elements of a rank's part of a group, ZeRO-3."""
        return [sum(-(-n // ranks) for n in group) for group in self.groups]

    def own_gradients(self, ranks: int) -> int:
        """Elements of all parameters that reach into a rank's partitions, on the rank with most:
        ZeRO 1 and 2 copy their gradients whole."""
        most = 0
        bounds = [(list(accumulate(g, initial=0)), size)
                  for g, size in zip(self.groups, self.partitions(ranks), strict=True)]  # fmt: skip
        for rank in range(ranks):
            own = 0
            for edges, size in bounds:
                begin, end = rank * size, (rank + 1) * size
                inside = [high - low for low, high in pairwise(edges) if low < end and high > begin]
                own += sum(inside)
            most = max(most, own)
        return most


def resident(layout: Layout, zero: Zero, ranks: int, width: int, gpu: bool) -> dict[str, int]:
    """Bytes that stay allocated between two updates, by what they are.

    Args:
        width: bytes per number in the forward pass.
        gpu: count buffers that are allocated and not yet written; on a CPU they take no memory.
    """
    n, frozen = layout.trainable, sum(layout.frozen)
    if zero.stage == 0:
        master = 4 * n if width == 2 else 0
        return {"weights": width * (n + frozen), "master weights": master, "Adam": 8 * n}
    if zero.stage <= 2:
        part = sum(layout.partitions(ranks))
        return {"weights": width * (part * ranks + frozen), "master weights": 4 * part,
                "Adam": 8 * part}  # fmt: skip
    part = sum(layout.shards(ranks))
    small = persistent_weights(layout, zero, ranks)
    return {
        "weights": width * (part + sum(-(-m // ranks) for m in layout.frozen) + small),
        "master weights": 4 * part,
        "Adam": 8 * part,
        "gradients": width * part,
        "reduction bucket": width * (zero.reduce_bucket if gpu else min(zero.reduce_bucket, n)),
    }


def persistent_weights(layout: Layout, zero: Zero, ranks: int) -> int:
    """Elements of the parameters that ZeRO-3 leaves whole on every rank besides their shards."""
    if zero.stage < 3 or ranks == 1:
        return 0
    parameters = [m for group in layout.groups for m in group] + list(layout.frozen)
    return sum(m for m in parameters if m <= zero.persistence)


def gathered_weights(layout: Layout, zero: Zero, ranks: int) -> int:
    """Elements that ZeRO-3 gathers for a micro-step, and again for its backward pass where the
    model exceeds ``max_reuse_distance``."""
    parameters = [m for group in layout.groups for m in group] + list(layout.frozen)
    if zero.stage < 3 or ranks == 1:
        return 0
    return sum(m for m in parameters if m > zero.persistence)


def engine_traffic(
    layout: Layout, zero: Zero, ranks: int, width: int, accumulation_steps: int
) -> dict[str, int]:
    """Bytes that a rank sends per update besides the model's own collectives."""
    n = layout.trainable
    if zero.stage <= 2:  # ZeRO-2 reduces by all-reduce as well
        sent = {"gradients (all-reduce)": bytes_sent("all_reduce", width * n, ranks)}
    else:
        sent = {"gradients (reduce-scatter)": bytes_sent("reduce_scatter", width * n, ranks)}
    if zero.stage in (1, 2):
        whole = width * ranks * sum(layout.partitions(ranks))
        sent["updated weights (all-gather)"] = bytes_sent("all_gather", whole, ranks)
    if zero.stage == 3:
        numel = gathered_weights(layout, zero, ranks)
        times = accumulation_steps * (1 if 2 * numel <= zero.reuse_distance else 2)
        sent["weights (all-gather)"] = times * bytes_sent("all_gather", width * numel, ranks)
        updated = width * persistent_weights(layout, zero, ranks)
        sent["updated weights (all-gather)"] = bytes_sent("all_gather", updated, ranks)
    return sent


class Reduction:
    """What DeepSpeed holds while gradients arrive, are reduced, and are applied.

    Follows a traced micro-step: :meth:`watch` before it, :meth:`turn` between forward and backward
    pass, :meth:`finish` after it; and :meth:`step` after the last one. With several micro-steps or
    chunks, gradients stay where they are until the update's last one (``one_reduction``).
    """

    def __init__(
        self, tracker: Tracker, layout: Layout, zero: Zero, ranks: int, width: int, gpu: bool,
        stage: TrainingStageConfig,
    ) -> None:  # fmt: skip
        self.tracker, self.layout, self.zero = tracker, layout, zero
        self.ranks, self.width, self.gpu = ranks, width, gpu
        self.chunked = bool(stage.chunk_size)
        self.several = self.chunked or stage.accumulation_steps > 1
        self.hooked = zero.hooked and not self.several
        self.filled = self.touched = self.partition = self.released = 0
        self.handles: list[Any] = []
        self.parameters: list[torch.nn.Parameter] = []
        self.gathered = width * gathered_weights(layout, zero, ranks)
        # The buffer that weights are gathered in stays until the last of them has been used.
        self.gathering = min(self.gathered, width * zero.prefetch)
        # With bf16 they are added up in fp32.
        self.sums = 4 * layout.trainable if self.several and width == 2 else 0
        tracker.hold(self.sums)

    def watch(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Before a micro-step with these parameters: weights are gathered."""
        self.tracker.hold(self.gathered + self.gathering)
        self.parameters = [p for p in parameters if p.requires_grad]
        self.handles = [
            p.register_post_accumulate_grad_hook(self._arrived) for p in self.parameters
        ]

    def turn(self) -> None:
        """The forward pass is over."""
        self.tracker.hold(-self.gathering)
        self.released = 0

    def _arrived(self, parameter: torch.nn.Parameter) -> None:
        numel = parameter.numel()
        if self.chunked:
            return
        if self.gathered and numel > self.zero.persistence:
            self.tracker.hold(-self.width * numel)  # its gathered weights go
            self.released += self.width * numel
        if self.hooked:
            self._into_bucket(parameter)
        elif self.zero.stage and self.gpu and not self.several:
            self._touch(0)

    def _into_bucket(self, parameter: torch.nn.Parameter) -> None:
        numel, limit = parameter.numel(), self.zero.reduce_bucket
        if self.filled + numel > limit:
            self._flush()
        self._touch(self.filled + numel)
        self.filled += numel
        parameter.grad = None

    def _touch(self, numel: int) -> None:
        """The bucket holds ``numel`` elements. On a GPU all of it is there from the first one, two
        of them with overlap_comm; on a CPU what has been written. ZeRO-3's is always there."""
        if self.zero.stage == 3:
            return
        if self.gpu:
            numel = (2 if self.zero.overlap else 1) * self.zero.reduce_bucket
        if numel > self.touched:
            self.tracker.hold(self.width * (numel - self.touched))
            self.touched = numel

    def _flush(self) -> None:
        """Reduce what is in the bucket: flattened once more, then the own part is copied out."""
        if self.filled and (self.ranks > 1 or self.zero.stage == 3):
            self.tracker.pulse(self.width * self.filled)
        if self.filled and self.zero.stage <= 2 and not self.partition:
            self.partition = self.width * self.layout.own_gradients(self.ranks)
            self.tracker.hold(self.partition)
        self.filled = 0

    def finish(self, boundary: bool) -> None:
        """After a backward pass; ``boundary`` if the update's last."""
        self.tracker.hold(self.released - self.gathered)
        if self.zero.stage == 0 and boundary:
            self.tracker.pulse(self.width * min(self.layout.trainable, FALLBACK_BUCKET))
        if self.zero.stage >= 1 and boundary:
            if not self.hooked:
                for parameter in self.parameters:
                    self._into_bucket(parameter)
            self._flush()
            self.tracker.hold(-self.width * self.touched)
            self.touched = 0
        if boundary:
            self.tracker.hold(-self.sums)
        for handle in self.handles:
            handle.remove()

    def step(self) -> None:
        """The optimizer's step: a group's gradient once flat, and once more in fp32."""
        if self.zero.stage == 0:
            self.tracker.pulse(4 * self.layout.trainable if self.width == 2 else 0)
            for parameter in self.parameters:
                parameter.grad = None
            return
        sizes = (self.layout.shards if self.zero.stage == 3 else self.layout.partitions)(self.ranks)
        self.tracker.pulse(max(sizes) * (self.width + (4 if self.width == 2 else 0)))
        self.tracker.hold(-self.partition)
        self.partition = 0
