"""Continue from a checkpoint, on the ranks that wrote it or on another number of them.

Ranks and ZeRO stage decide how DeepSpeed cuts the optimizer's state. Where they differ from those
of the checkpoint, rank 0 converts it to DeepSpeed's universal form first, aside; the copy is
deleted once every rank has read it. Stages 1 and 2 convert into each other, 3 into 3.
"""

import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.checkpoint import ds_to_universal

from erniesearch import distributed
from erniesearch.config.keys import Precision
from erniesearch.errors import UserError
from erniesearch.models.precision import use_bf16
from erniesearch.progress import waiting
from erniesearch.training.checkpoints.checkpointer import (
    best_whole,
    find_best,
    newest_whole,
    step_of,
)
from erniesearch.training.checkpoints.manifest import Manifest

if TYPE_CHECKING:
    import deepspeed

UNIVERSAL = "universal.tmp"


@dataclass(frozen=True)
class Resume:
    """Where the engine's state lies: ``folder / tag``, after ``step`` updates; ``bf16`` says
    whether it is of weights in bf16, None if that was not recorded."""

    folder: Path
    tag: str
    step: int
    universal: bool
    bf16: bool | None = None


def find_resume(folder: Path, zero_stage: int) -> Resume | None:
    """The newest whole checkpoint in a form that this number of ranks can load; None if there is
    no checkpoint. Every rank must call it, before its engine is built.

    Raises:
        UserError: if all checkpoints are damaged, or there is no room for the conversion.
    """
    found = newest_whole(folder)
    return None if found is None else _prepared(folder, found, zero_stage)


def _prepared(folder: Path, found: tuple[Path, Manifest], zero_stage: int) -> Resume:
    """A whole checkpoint in a form that this number of ranks can load. Every rank must call it.

    Raises:
        UserError: if there is no room for the conversion.
    """
    checkpoint, manifest = found
    same = (manifest.world_size, manifest.zero_stage) == (distributed.world_size(), zero_stage)
    if same or zero_stage == 0:  # without ZeRO every rank's state is whole
        return Resume(folder, checkpoint.name, step_of(checkpoint), False, manifest.bf16)
    error = None
    if distributed.is_main():
        with waiting(f"converting {checkpoint.name} for {distributed.world_size()} ranks"):
            error = _convert(checkpoint, folder / UNIVERSAL / checkpoint.name)
    error = distributed.gather_objects(error)[0]
    if error is not None:
        raise UserError(
            f"checkpoint {checkpoint} of {manifest.world_size} ranks could not be converted for"
            f" {distributed.world_size()}: {error}"
        )
    return Resume(folder / UNIVERSAL, checkpoint.name, step_of(checkpoint), True, manifest.bf16)


def find_best_resume(folder: Path, zero_stage: int) -> Resume | None:
    """The same of the best checkpoint, None if none was measured.

    Raises:
        UserError: if it is damaged, or there is no room for the conversion.
    """
    found: tuple[Path, Manifest] | str | None = None
    if distributed.is_main() and find_best(folder) is not None:
        try:
            found = best_whole(folder)
        except UserError as error:
            found = str(error)
    found = distributed.gather_objects(found)[0]
    if isinstance(found, str):
        raise UserError(found)
    return None if found is None else _prepared(folder, found, zero_stage)


def load_checkpoint(
    engine: "deepspeed.DeepSpeedEngine", resume: Resume | None
) -> tuple[int, dict[str, Any]]:
    """Restore the engine; returns the number of updates done and the saved state (0 and an empty
    dict without a checkpoint)."""
    if resume is None:
        return 0, {}
    # DeepSpeed's ZeRO-3 gives every group the settings of the first when it reads the universal
    # form: no group's weight decay and name may come from a checkpoint.
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in engine.optimizer.param_groups
    ]
    _, state = engine.load_checkpoint(str(resume.folder), tag=resume.tag)
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    if resume.universal:
        # It also leaves the count of steps as it was saved, on the CPU, and under ZeRO-3 gives all
        # groups one and the same tensor. Fused AdamW wants fp32 on the parameter's device (an
        # error on a GPU), and would count each update once per group.
        for parameter, own in engine.optimizer.optimizer.state.items():
            own["step"] = torch.tensor(float(own["step"]), device=parameter.device)
    distributed.barrier()
    if resume.universal and distributed.is_main():
        shutil.rmtree(resume.folder, ignore_errors=True)
    return resume.step, state["erniesearch"]


def _convert(checkpoint: Path, out: Path) -> str | None:
    shutil.rmtree(out.parent, ignore_errors=True)
    try:
        with quiet():
            ds_to_universal.main(
                Namespace(
                    input_folder=str(checkpoint), output_folder=str(out), num_extract_workers=1,
                    num_merge_workers=1, keep_temp_folder=False, strict=True,
                    inject_missing_state=False,
                )
            )  # fmt: skip
    except (OSError, RuntimeError) as error:  # torch.save tells of a full disk by the latter
        shutil.rmtree(out.parent, ignore_errors=True)
        return str(error)
    return None


def goes_on_in_bf16(precision: Precision, resume: Resume | None, device: torch.device) -> bool:
    """``auto`` is what a checkpoint was written in, else what every rank's device is fast in."""
    if precision == "auto" and resume is not None and resume.bf16 is not None:
        return resume.bf16
    return not distributed.any_rank(not use_bf16(precision, device), device)


@contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed's converters print every step and draw progress bars."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
