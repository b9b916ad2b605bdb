"""The finished model of a stage as safetensors folders: from the engine, or from a checkpoint."""

from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from erniesearch import distributed
from erniesearch.config.stage_keys import TrainingStageConfig
from erniesearch.errors import UserError
from erniesearch.files import written_aside
from erniesearch.models.joint import JointModel
from erniesearch.stages import Stage
from erniesearch.training.build import build_model
from erniesearch.training.checkpoints.checkpointer import best_whole, newest_whole, step_of
from erniesearch.training.checkpoints.resume import quiet


def save_model(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    frozen: dict[str, Tensor],
) -> None:
    """Write the engine's student and teacher; ``frozen`` is of :func:`frozen_state`. Every rank
    must call it."""
    state = gathered_state(engine)
    if distributed.is_main():
        _write_parts(engine.module, state | frozen, folder, tokenizer)


def frozen_state(model: JointModel) -> dict[str, Tensor]:
    """Rank 0's frozen parameters by name, before an engine makes them bf16."""
    if not distributed.is_main():
        return {}
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: p.detach() for name, p in parameters if not p.requires_grad}


def gathered_state(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    """The module's trained parameters by name on the CPU, in fp32; with ZeRO-3 the shards are
    gathered one parameter at a time. Every rank must call it; ranks other than 0 get an empty
    dict."""
    main, optimizer = distributed.is_main(), engine.optimizer
    masters: dict[int, Tensor] = {}
    if isinstance(optimizer, FP16_UnfusedOptimizer):  # bf16 without ZeRO
        for own, group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            masters |= {id(p): master for p, master in zip(own, group, strict=True)}
    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        weight = masters.get(id(parameter))
        if weight is None and engine.bfloat16_enabled():
            weight = safe_get_full_fp32_param(parameter)
        whole = weight is not None or not hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], enabled=not whole):
            if main:
                state[name] = (parameter if weight is None else weight).detach().cpu().clone()
    return state


def export_checkpoint(stage: Stage, out: Path, best: bool = False) -> int:
    """Write the model of a stage's newest whole checkpoint, or of the best one by
    ``training.best_metric``, as :func:`save_model` would have.

    One process, no GPU, whatever ZeRO stage and number of ranks wrote the checkpoint. Frozen
    parameters, which no checkpoint needs, are those that the stage starts from.

    Returns:
        The updates that were done when the checkpoint was saved.

    Raises:
        UserError: if there is no checkpoint, all are damaged, the config describes another model,
            or ``out`` is not empty.
    """
    folder = stage.folder / "checkpoints"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists already; name another folder or delete it")
    found = best_whole(folder) if best else newest_whole(folder, set_aside=False)
    if found is None:
        raise UserError(f"{folder}: no checkpoint; train stage {stage.name} first")
    checkpoint, manifest = found
    model, tokenizer = build_model(stage)
    state = _trained_state(checkpoint, manifest.zero_stage, model, stage.settings)
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    shapes = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in state.items():
        if name not in shapes or shapes[name].shape != tensor.shape:
            raise UserError(f"{checkpoint}: '{name}' is not in the model of this config: give the"
                            " config that the stage was trained with")  # fmt: skip
        trained.pop(id(shapes[name]), None)
    if trained:
        raise UserError(f"{checkpoint}: has no '{next(iter(trained.values()))}': give the config"
                        " that the stage was trained with")  # fmt: skip
    model.load_state_dict(state, strict=False)
    parameters = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    _write_parts(model, parameters, out, tokenizer)
    return step_of(checkpoint)


def _trained_state(
    checkpoint: Path, zero_stage: int, model: JointModel, stage: TrainingStageConfig
) -> dict[str, Tensor]:
    """The checkpoint's fp32 weights by name. Frozen ones, which bf16 has rounded, are left out
    (without ZeRO and in fp32 they are as they were)."""
    file = min(checkpoint.glob("*model_states.pt"))
    with quiet():
        content = TorchCheckpointEngine().load(str(file), map_location=torch.device("cpu"))
        if zero_stage:
            state = get_fp32_state_dict_from_zero_checkpoint(
                str(checkpoint.parent), tag=checkpoint.name
            )
            frozen = content["frozen_param_shapes"] or {}
            return {name: tensor for name, tensor in state.items() if name not in frozen}
    masters: list[list[Tensor]] | None = content["optimizer"].get("fp32_groups")
    if masters is None:
        return dict(content["module"])
    groups = [group["params"] for group in model.parameter_groups(stage, 0.0)]
    if [[p.shape for p in own] for own in groups] != [[t.shape for t in own] for own in masters]:
        raise UserError(f"{checkpoint}: its weights are not those of this config's model: give the"
                        " config that the stage was trained with")  # fmt: skip
    by_id = {id(p): t for g, m in zip(groups, masters, strict=True)
             for p, t in zip(g, m, strict=True)}  # fmt: skip
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: by_id[id(p)].detach() for name, p in parameters if id(p) in by_id}


def _write_parts(
    model: JointModel, state: dict[str, Tensor], folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """``folder/student`` and ``folder/teacher``, written aside, synced, renamed."""
    with written_aside(folder) as aside:
        for part in ("student", "teacher"):
            module = getattr(model, part)
            if module is not None:
                prefix = f"{part}."
                own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                module.save(aside / part, own)
                tokenizer.save_pretrained(aside / part)
