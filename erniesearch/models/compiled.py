"""Encoder layers compiled by torch.compile, one graph for batches of every size.

What is compiled is the call of a layer: parameters keep their names, and checkpoints and exports
do not know of it.
"""

import torch
from torch import nn
from transformers import PretrainedConfig

from erniesearch.config.keys import RunConfig, StudentConfig, TeacherConfig, TrainingConfig
from erniesearch.errors import UserError
from erniesearch.models.attention import PACKED
from erniesearch.models.families import FAMILIES
from erniesearch.models.joint import JointModel

GRAPHS = 64
"""Graphs that torch.compile may keep of one function: by sizes of the models, with and without
gradient, in training and in evaluation. Beyond its own limit, 8, it runs the rest uncompiled
without a word."""


def check_compiles(
    training: TrainingConfig,
    zero_stage: int,
    settings: StudentConfig | TeacherConfig,
    model: PretrainedConfig,
) -> None:
    """The model's layers can be compiled, with these settings.

    Raises:
        UserError: if not, or if there is no compiler.
    """
    part = "teacher" if isinstance(settings, TeacherConfig) else "student"
    reason = None
    if zero_stage == 3:
        reason = "ZeRO-3 fetches parameters inside of layers: take training.zero_stage 1 or 2"
    elif training.activation_checkpointing:
        reason = "training.activation_checkpointing is true: set one of the two to false"
    elif settings.attn_implementation in PACKED:
        reason = (
            f"{part}.attn_implementation is {settings.attn_implementation}, which reads lengths of"
            " texts inside of layers: set it to null"
        )
    elif model.model_type not in FAMILIES:
        reason = (
            f"the layers of '{settings.path}' ({model.model_type}) are not known: take one of"
            f" {', '.join(FAMILIES)}"
        )
    if reason is not None:
        raise UserError(f"training.compile is true, but {reason}")
    _check_compiler()


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "training.compile is true, but torch.compile finds no C++ compiler: install g++, or set"
            " training.compile to false"
        ) from None


def compile_layers(model: JointModel, config: RunConfig, zero_stage: int) -> list[nn.Module]:
    """Let the towers' layers be compiled when they are first called; returns these layers.

    A layer whose projections are tapped stays as it is: the taps' hooks come and go, and a compiled
    graph would keep none, or keep those of another call.

    Raises:
        UserError: as :func:`check_compiles`.
    """
    taps = [*model.student.taps.values()] if model.student is not None else []
    if model.teacher is not None and model.teacher.tap is not None:
        taps.append(model.teacher.tap)
    tapped = {id(attention) for tap in taps for attention in tap.attentions}
    layers: dict[int, nn.Module] = {}
    for tower in model.towers():
        part = config.teacher if model.teacher and tower is model.teacher.model else config.student
        check_compiles(config.training, zero_stage, part, tower.config)
        stack = tower.base_model.get_submodule(FAMILIES[tower.config.model_type].layers)
        layers |= {id(layer): layer for layer in stack.children()
                   if not any(id(module) in tapped for module in layer.modules())}  # fmt: skip
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for layer in layers.values():
        # Dropout by torch's own generator: gradient caching runs a layer without gradient first and
        # with it later, in two graphs, which must draw the same.
        layer.compile(dynamic=True, options={"fallback_random": True})
    return [*layers.values()]
