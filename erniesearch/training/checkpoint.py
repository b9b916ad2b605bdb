"""Checkpoints: written aside, listed in a manifest, renamed; an unfinished one is never read.

checkpoints/step-000050/  DeepSpeed's files, manifest.json (sizes of all of them)
"""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erniesearch import distributed
from erniesearch.errors import UserError
from erniesearch.stages import write_atomically

if TYPE_CHECKING:
    import deepspeed

KEEP = 2


def save_checkpoint(
    engine: "deepspeed.DeepSpeedEngine", folder: Path, step: int, state: dict[str, Any]
) -> None:
    """Save after ``step`` updates and drop all but the newest two. Every rank must call it."""
    name = f"step-{step:06d}"
    aside = folder / f"{name}.tmp"
    if distributed.is_main():
        shutil.rmtree(aside, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    # The empty entry lets DeepSpeed's universal converter read the checkpoint later.
    engine.save_checkpoint(
        str(folder), tag=aside.name, save_latest=False,
        client_state={"universal_checkpoint_info": {}, "erniesearch": state},
    )  # fmt: skip
    distributed.barrier()
    if distributed.is_main():
        sizes = {str(p.relative_to(aside)): _sync(p) for p in aside.rglob("*") if p.is_file()}
        manifest = {"step": step, "world_size": distributed.world_size(), "files": sizes}
        write_atomically(aside / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        final = folder / name
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        for old in find_checkpoints(folder)[:-KEEP]:
            shutil.rmtree(old)
    distributed.barrier()


def find_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.suffix != ".tmp"]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def check_complete(checkpoint: Path) -> None:
    """Compare a checkpoint with its manifest.

    Raises:
        UserError: naming the first file that is missing or has another size.
    """
    remedy = f"delete {checkpoint} to continue from the one before it, or from the start"
    manifest = checkpoint / "manifest.json"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        files = content["files"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"checkpoint {checkpoint}: no readable manifest.json; {remedy}") from None
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"checkpoint {checkpoint} is incomplete: {name} is missing; {remedy}")
        if path.stat().st_size != size:
            raise UserError(
                f"checkpoint {checkpoint} is damaged: {name} has {path.stat().st_size} bytes, not"
                f" {size}; {remedy}"
            )
    if content.get("world_size") != distributed.world_size():
        raise UserError(
            f"checkpoint {checkpoint} was written by {content.get('world_size')} ranks, this run"
            f" has {distributed.world_size()}: start as many"
        )


def load_latest(engine: "deepspeed.DeepSpeedEngine", folder: Path) -> tuple[int, dict[str, Any]]:
    """Restore the newest checkpoint; returns the number of updates done and the saved state
    (0 and an empty dict when there is none)."""
    found = find_checkpoints(folder)
    if not found:
        return 0, {}
    checkpoint = found[-1]
    check_complete(checkpoint)
    _, client_state = engine.load_checkpoint(str(folder), tag=checkpoint.name)
    return int(checkpoint.name.removeprefix("step-")), client_state["erniesearch"]


def _sync(path: Path) -> int:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    return path.stat().st_size
