"""The finished model of a stage as safetensors folders: from the engine, or from a checkpoint."""

import os
import shutil
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from erniesearch import distributed, stages
from erniesearch.config import RunConfig
from erniesearch.errors import UserError
from erniesearch.models.joint import JointModel
from erniesearch.training.checkpoint import find_best, newest_whole, step_of
from erniesearch.training.manifest import Damaged, Manifest, sync_folder, verify
from erniesearch.training.resume import quiet
from erniesearch.training.stage import build_model


def frozen_parameters(model: JointModel) -> dict[str, Tensor]:
    """Copies of what is not trained, on rank 0: an engine in bf16 rounds it."""
    if not distributed.is_main():
        return {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: p.detach().cpu().clone() for name, p in named if not p.requires_grad}


def save_model(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    frozen: dict[str, Tensor],
) -> None:
    """Write the engine's student and teacher; under bf16 with the :func:`frozen_parameters` that
    the model had before it became the engine's. Every rank must call it."""
    state = gathered_state(engine)
    if distributed.is_main():
        _write_parts(engine.module, state | frozen, folder, tokenizer)


def gathered_state(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    """The module's parameters by name on the CPU; with ZeRO-3 the shards are gathered one
    parameter at a time. Every rank must call it; ranks other than 0 get an empty dict."""
    main = distributed.is_main()
    bf16 = engine.bfloat16_enabled()
    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        # Under bf16 the optimizer holds the fp32 weights; frozen parameters have none there.
        master = safe_get_full_fp32_param(parameter) if bf16 and parameter.requires_grad else None
        if master is not None:
            if main:
                state[name] = master.detach().cpu().clone()
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if main:
                state[name] = parameter.detach().cpu().clone()
    return state


def export_checkpoint(config: RunConfig, stage: str, out: Path, best: bool = False) -> int:
    """Write the model of a stage's newest whole checkpoint, or of the one with the lowest
    validation loss, as :func:`save_model` would have.

    One process, no GPU, whatever ZeRO stage and number of ranks wrote the checkpoint. Frozen
    parameters, which no checkpoint needs, are those that the stage starts from.

    Returns:
        The updates that were done when the checkpoint was saved.

    Raises:
        UserError: if there is no checkpoint, all are damaged, the config describes another model,
            or ``out`` is not empty.
    """
    folder = stages.RunFolder(config.run_dir).stage(stage) / "checkpoints"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists already; name another folder or delete it")
    found = _best_whole(folder) if best else newest_whole(folder, set_aside=False)
    if found is None:
        raise UserError(f"{folder}: no checkpoint; train stage {stage} first")
    checkpoint, manifest = found
    model, tokenizer = build_model(config, stage)
    with quiet():
        if manifest.zero_stage:
            state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=checkpoint.name)
        else:
            state = _state_without_zero(checkpoint)
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
    # A checkpoint in bf16 has the frozen ones rounded.
    trainable = {name: tensor for name, tensor in state.items() if shapes[name].requires_grad}
    model.load_state_dict(trainable, strict=False)
    parameters = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    _write_parts(model, parameters, out, tokenizer)
    return step_of(checkpoint)


def _best_whole(folder: Path) -> tuple[Path, Manifest]:
    checkpoint = find_best(folder)
    if checkpoint is None:
        raise UserError(
            f"{folder}: no checkpoint has a validation loss; train with"
            " training.validation_split, or leave --best out"
        )
    try:
        return checkpoint, verify(checkpoint)
    except Damaged as problem:
        raise UserError(f"{checkpoint}: the best checkpoint is damaged: {problem}") from None


def _state_without_zero(checkpoint: Path) -> dict[str, Tensor]:
    file = next(checkpoint.glob("mp_rank_*_model_states.pt"))
    content = TorchCheckpointEngine().load(str(file), map_location=torch.device("cpu"))
    return dict(content["module"])


def _write_parts(
    model: JointModel, state: dict[str, Tensor], folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """``folder/student`` and ``folder/teacher``, written aside, synced, renamed."""
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    for part in ("student", "teacher"):
        module = getattr(model, part)
        if module is not None:
            prefix = f"{part}."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            module.save(aside / part, own)
            tokenizer.save_pretrained(aside / part)
    for path in aside.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        else:
            sync_folder(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    sync_folder(folder.parent)
