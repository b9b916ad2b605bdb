"""Query and key projections of chosen layers, kept while a model runs.

With SDPA no attention map exists, and ``output_attentions`` silently returns nothing; from these
projections the map follows exactly.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel

from erniesearch.errors import UserError


class Projections(NamedTuple):
    """One layer's outputs of its query and its key projection, ``[N, L, hidden]`` or, split into
    heads, ``[N, heads, L, head_dim]``."""

    queries: Tensor
    keys: Tensor


class ProjectionTap:
    """Keeps what the query and key projections of some layers put out inside a ``with`` block.

    The hooks exist inside the block only. Activation checkpointing runs layers a second time in the
    backward pass, which must not count; and hooks that come after DeepSpeed's see the outputs whose
    backward pass brings ZeRO-3's parameters back.

    Args:
        part: whose model it is; a teacher's are kept without their graph.
        path: where it comes from, for messages.
        layers: counted from 0, or from the last one, -1.

    Raises:
        UserError: if the model has no such layers, or they have no such projections.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        part: Literal["student", "teacher"],
        path: str,
        layers: Sequence[int],
    ) -> None:
        modules = getattr(getattr(model.base_model, "encoder", None), "layer", None)
        self._taps: dict[int, tuple[nn.Linear, nn.Linear]] = {}
        self.path = path
        self._detached = part == "teacher"
        self._handles: list[RemovableHandle] = []
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._num_layers = int(model.config.num_hidden_layers)
        weights = "weights.virt" + (" and weights.attention" if part == "teacher" else "")
        for layer in (counted_from_0(layer, self._num_layers, path) for layer in layers):
            attention = getattr(modules[layer], "attention", None) if modules else None
            own = getattr(attention, "self", None)
            projections = getattr(own, "query", None), getattr(own, "key", None)
            if not all(isinstance(projection, nn.Linear) for projection in projections):
                raise UserError(
                    f"{part} '{path}' ({model.config.model_type}) cannot give attention: its layers"
                    " have no query and key projections (those of BERT, ERNIE, RoBERTa, ELECTRA"
                    f" and XLM-R have); set the stages' {weights} to 0"
                )
            self._taps[layer] = projections  # type: ignore[assignment]

    def __enter__(self) -> None:
        self.clear()
        for layer, projections in self._taps.items():
            for number, projection in enumerate(projections):
                hook = self._hook((layer, number))
                self._handles.append(projection.register_forward_hook(hook))

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, key: tuple[int, int]):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._kept[key] = output.detach() if self._detached else output

        return hook

    def of(self, layer: int) -> Projections:
        """A layer's, of the last block; ``layer`` as it was given."""
        layer %= self._num_layers
        return Projections(self._kept[layer, 0], self._kept[layer, 1])

    def stacked(self) -> Tensor:
        """All of the last block, lower layers first, ``[N, L, layers, 2, hidden]``."""
        pairs = [torch.stack(self.of(layer), 2) for layer in sorted(self._taps)]
        self.clear()
        return torch.stack(pairs, 2)

    def clear(self) -> None:
        """Let go of what was kept."""
        self._kept.clear()


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """``[N, L, heads·d]`` to ``[N, heads, L, d]``."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def counted_from_0(layer: int, num_layers: int, path: str) -> int:
    """A layer of the teacher that ``objective.virt_layers`` may count from the last one, -1.

    Raises:
        UserError: if the teacher has not that many.
    """
    if not -num_layers <= layer < num_layers:
        raise UserError(
            f"objective.virt_layers names layer {layer}, but the teacher '{path}' has {num_layers}"
            f" layers: 0 to {num_layers - 1}, or -{num_layers} to -1"
        )
    return layer % num_layers


def matched_layers(
    layers: Sequence[int], teacher: PretrainedConfig, student: PretrainedConfig, path: str
) -> list[tuple[int, int]]:
    """Which layer of the student takes which of the teacher's as its target, lower layers first.

    Of T and S layers, the teacher's t goes with the student's ``ceil((t + 1) · S / T) - 1``: the
    last with the last, and evenly from there; with S = T each with its own.

    Args:
        path: the teacher's.

    Returns:
        Pairs (teacher's, student's), counted from 0.

    Raises:
        UserError: for a layer that the teacher has not, two on one layer of the student, and a
            student whose states cannot be split into as many heads as the teacher has.
    """
    of_teacher, of_student = int(teacher.num_hidden_layers), int(student.num_hidden_layers)
    taken: dict[int, int] = {}
    for layer in sorted(counted_from_0(layer, of_teacher, path) for layer in layers):
        own = -(-(layer + 1) * of_student // of_teacher) - 1
        if own in taken:
            raise UserError(
                f"objective.virt_layers {list(layers)}: layers {taken[own]} and {layer} of the"
                f" teacher '{path}' ({of_teacher} layers) fall on one layer, {own}, of the student"
                f" ({of_student} layers): leave one of them out"
            )
        taken[own] = layer
    heads, hidden = int(teacher.num_attention_heads), int(student.hidden_size)
    if hidden % heads:
        raise UserError(
            f"weights.virt: the student's {hidden} dimensions cannot be split into the {heads}"
            f" attention heads of the teacher '{path}': set the stages' weights.virt to 0"
        )
    return [(layer, own) for own, layer in taken.items()]
