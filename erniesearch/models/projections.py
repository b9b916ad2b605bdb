"""Query and key projections of chosen layers, kept while a model runs.

With SDPA no attention map exists, and ``output_attentions`` silently returns nothing; from these
projections the map follows exactly.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel

from erniesearch.errors import UserError
from erniesearch.models.attention import Packing, current_packing
from erniesearch.models.families import family_of


class Projections(NamedTuple):
    """One layer's outputs of its query and its key projection, ``[N, L, hidden]`` or, split into
    heads, ``[N, heads, L, head_dim]``."""

    queries: Tensor
    keys: Tensor


class ProjectionTap:
    """Keeps the queries and keys of some layers inside a ``with`` block, in the family's own way
    (:mod:`erniesearch.models.families`).

    A teacher's are those of the pair that it reads: turned by their positions where the family
    does so, without their graph, with the bias that is added to their logits. A student's are of
    two texts that it reads apart, which have no distance: as projected, with their graph.

    The hooks exist inside the block only. Activation checkpointing runs layers a second time in the
    backward pass, which must not count; and hooks that come after DeepSpeed's see the outputs whose
    backward pass brings ZeRO-3's parameters back.

    Args:
        part: whose model it is.
        path: where it comes from, for messages.
        layers: counted from 0, or from the last one, -1.

    Raises:
        UserError: if the model has no such layers, its family's attention cannot be rebuilt, or a
            teacher's layer attends to a window only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        part: Literal["student", "teacher"],
        path: str,
        layers: Sequence[int],
    ) -> None:
        weights = "weights.virt" + (" and weights.attention" if part == "teacher" else "")
        family = family_of(model.config, part, path, f"set the stages' {weights} to 0")
        self.path = path
        self.bias: Tensor | None = None
        self._family = family
        self._of_teacher = part == "teacher"
        self._num_heads = int(model.config.num_attention_heads)
        self._num_layers = int(model.config.num_hidden_layers)
        self._attentions: dict[int, nn.Module] = {}
        self._rotations: dict[int, tuple[Tensor, Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._packing: Packing | None = None
        encoder = model.base_model
        try:
            for layer in (counted_from_0(layer, self._num_layers, path) for layer in layers):
                attention = encoder.get_submodule(f"{family.layers}.{layer}.{family.attention}")
                attention.get_submodule(family.query), attention.get_submodule(family.key)
                self._attentions[layer] = attention
            self._bias = encoder.get_submodule(family.bias) if family.bias else None
        except AttributeError as error:
            raise UserError(
                f"{part} '{path}' calls itself {model.config.model_type}, but is built otherwise"
                f" ({error}); set the stages' {weights} to 0"
            ) from None
        if self._of_teacher:
            _check_windows(model.config, path, list(self._attentions))

    @property
    def attentions(self) -> list[nn.Module]:
        """The modules that get hooks."""
        return [*self._attentions.values()]

    def __enter__(self) -> None:
        self.clear()
        for layer, attention in self._attentions.items():
            if self._family.rotary and self._of_teacher:
                self._handles.append(
                    attention.register_forward_pre_hook(self._rotation(layer), with_kwargs=True)
                )
            for name in {self._family.query, self._family.key}:
                projection = attention.get_submodule(name)
                self._handles.append(projection.register_forward_hook(self._hook(layer, name)))
        if self._bias is not None and self._of_teacher:
            self._handles.append(self._bias.register_forward_hook(self._keep_bias))

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._rotations.clear()

    def _rotation(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._rotations[layer] = named["position_embeddings"]

        return hook

    def _keep_bias(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.bias = output.detach()

    def _hook(self, layer: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # Nothing with a graph is computed here: it would be missing when activations are
            # recomputed, without these hooks.
            self._packing = current_packing()
            output = output.detach() if self._of_teacher else output
            joint = self._family.query == self._family.key
            for number, own in enumerate((self._family.query, self._family.key)):
                if name == own:
                    self._kept[layer, number] = output.chunk(3, -1)[number] if joint else output
                    self._rotate((layer, number))

        return hook

    def _rotate(self, key: tuple[int, int]) -> None:
        if self._of_teacher and self._family.rotary:
            angles = self._rotations[key[0]]
            self._kept[key] = _rotated(self._kept[key], *angles, self._num_heads)

    def of(self, layer: int) -> Projections:
        """A layer's, of the last block; ``layer`` as it was given."""
        layer %= self._num_layers
        kept = (self._kept[layer, number] for number in (0, 1))
        return Projections(*(self._packing.padded(x) if self._packing else x for x in kept))

    def stacked(self) -> Tensor:
        """All of the last block, lower layers first, ``[N, L, layers, 2, hidden]``."""
        pairs = [torch.stack(self.of(layer), 2) for layer in sorted(self._attentions)]
        self.clear()
        return torch.stack(pairs, 2)

    def clear(self) -> None:
        """Let go of what was kept."""
        self._kept.clear()
        self._packing = self.bias = None


def global_layers(config: PretrainedConfig) -> list[int]:
    """Layers that attend to every token, from 0."""
    types = getattr(config, "layer_types", None)
    return [
        layer
        for layer in range(int(config.num_hidden_layers))
        if not types or types[layer] == "full_attention"
    ]


def _check_windows(config: PretrainedConfig, path: str, layers: list[int]) -> None:
    """The layers attend to every token.

    Raises:
        UserError: for a layer that attends to a window: outside of it the target would be 0, and
            for a token whose window ends before the other text there is none.
    """
    everywhere = global_layers(config)
    for layer in layers:
        if layer not in everywhere:
            raise UserError(
                f"layer {layer} of the teacher '{path}' attends to a window of"
                f" {config.sliding_window} tokens on each side, which is no target for tokens of"
                " another text: name layers of global attention in objective.virt_layers"
                f" ({everywhere}); weights.attention takes the last layer"
            )


def _rotated(states: Tensor, cosine: Tensor, sine: Tensor, num_heads: int) -> Tensor:
    """``[N, L, heads·d]`` turned by angles ``[N or 1, L, d]``, of which the second half repeats the
    first; in fp32."""
    heads = states.unflatten(-1, (num_heads, -1)).float()
    first, second = heads.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    angles = cosine.unsqueeze(-2), sine.unsqueeze(-2)
    return (heads * angles[0] + turned * angles[1]).to(states.dtype).flatten(-2)


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
