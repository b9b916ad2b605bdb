"""Checkpoints: written aside, synced, listed in a manifest, renamed; the newest whole one counts.

checkpoints/step-000050/            DeepSpeed's files and manifest.json
checkpoints/step-000050.TOKEN.tmp/  being written, or left by a killed run; never read
checkpoints/step-000050.damaged-1/  set aside, because it was not what its manifest says
"""

import math
import os
import re
import shutil
import threading
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from erniesearch import distributed
from erniesearch.errors import UserError
from erniesearch.files import hash_file, sync
from erniesearch.progress import say
from erniesearch.training.checkpoints import manifest
from erniesearch.training.checkpoints.checkpoint_writer import CheckpointWriter
from erniesearch.training.checkpoints.manifest import Damaged, FileFacts, Manifest, Quality

if TYPE_CHECKING:
    import deepspeed


class Checkpointer:
    """Saves a stage's checkpoints and keeps the newest ones.

    Every rank makes one and calls the same methods at the same steps.

    Args:
        engine: its checkpoint files are written by our :class:`CheckpointWriter` from now on.
        folder: the stage's ``checkpoints``.
        keep: newest checkpoints that stay.
        in_background: write in a thread; errors show at the next :meth:`save` or :meth:`wait`.
    """

    def __init__(
        self, engine: "deepspeed.DeepSpeedEngine", folder: Path, keep: int, in_background: bool
    ) -> None:
        self.engine, self.folder, self.keep = engine, folder, keep
        self.writer = CheckpointWriter(in_background)
        engine.checkpoint_engine = self.writer
        # DeepSpeed would copy scripts into the folder, past the writer; `export-checkpoint`
        # does what they do.
        engine._copy_recovery_script = lambda save_path: None
        # The thread's collectives must not mix with those of the training.
        self._group = dist.new_group(backend="gloo") if in_background else None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, state: dict[str, Any], quality: Quality | None = None) -> None:
        """Save after ``step`` updates, with ``state`` for :func:`load_checkpoint` to return.
        Of the checkpoints measured, the best by ``quality`` stays too.

        Raises:
            UserError: on every rank, if any rank could not write (a full disk); the older
                checkpoints are untouched and nothing is left of this one.
        """
        self.wait()
        token = self._agree(uuid.uuid4().hex[:8])
        # A name of its own: ranks of a killed run may still write into theirs.
        aside = self.folder / f"{_name(step)}.{token}.tmp"
        self._check(step, self._make_room(aside) if distributed.is_main() else None, aside)
        # The empty entry lets DeepSpeed's universal converter read the checkpoint later.
        self.engine.save_checkpoint(
            str(self.folder), tag=aside.name, save_latest=False,
            client_state={"universal_checkpoint_info": {}, "erniesearch": state},
        )  # fmt: skip
        if not self.writer.in_background:
            self._publish(step, aside, quality)
            return
        self._thread = threading.Thread(
            target=self._publish_in_background, args=(step, aside, quality), daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint being written is whole.

        Raises:
            UserError: as :meth:`save`.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _publish_in_background(self, step: int, aside: Path, quality: Quality | None) -> None:
        try:
            self._publish(step, aside, quality)
        except BaseException as error:  # raised again by wait()
            self._failure = error

    def _publish(self, step: int, aside: Path, quality: Quality | None) -> None:
        """Manifest, sync, rename: once every rank has written its part."""
        parts = distributed.gather_objects(self.writer.finish(), self._group)
        errors = [f"{error} (rank {rank})" for rank, (_, error) in enumerate(parts) if error]
        error = errors[0] if errors else None
        if distributed.is_main() and not error:
            files = {name: facts for part, _ in parts for name, facts in part.items()}
            error = self._finish(step, aside, files, quality)
        self._check(step, error, aside)

    def _make_room(self, aside: Path) -> str | None:
        try:
            for left in self.folder.glob("*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            aside.mkdir(parents=True)
        except OSError as error:
            return f"{error.filename}: {error.strerror}"
        return None

    def _finish(
        self, step: int, aside: Path, files: dict[str, FileFacts], quality: Quality | None
    ) -> str | None:
        try:
            for path in aside.rglob("*"):  # what DeepSpeed writes past the writer: offloaded states
                name = str(path.relative_to(aside))
                if path.is_file() and name not in files:
                    files[name] = FileFacts(path.stat().st_size, hash_file(path))
            stage = self.engine.zero_optimization_stage()
            bf16 = bool(self.engine.bfloat16_enabled())
            made = Manifest(step, distributed.world_size(), int(stage), files, bf16=bf16)
            if quality is not None:
                value = quality.value if math.isfinite(quality.value) else None
                made = replace(
                    made, validation_loss=quality.loss, metric=quality.metric, metric_value=value,
                    greater_is_better=quality.greater_is_better,
                )  # fmt: skip
            made.write(aside)
            sync(aside)
            os.rename(aside, self.folder / _name(step))
            sync(self.folder)
            best = find_best(self.folder)
            for old in find_checkpoints(self.folder)[: -self.keep]:
                if old == best:
                    continue
                gone = old.with_name(f"{old.name}.tmp")
                os.rename(old, gone)  # a kill half-way must not leave half a checkpoint
                shutil.rmtree(gone, ignore_errors=True)
        except OSError as error:
            return f"{error.filename or aside.name}: {error.strerror}"
        return None

    def _check(self, step: int, error: str | None, aside: Path) -> None:
        """Raise rank 0's error on every rank."""
        error = self._agree(error)
        if error is None:
            return
        if distributed.is_main():
            shutil.rmtree(aside, ignore_errors=True)
        whole = find_checkpoints(self.folder)
        kept = f"{whole[-1].name} is untouched" if whole else "there is none before it"
        raise UserError(
            f"checkpoint {self.folder / _name(step)} could not be written: {error}; {kept}: make"
            " room and run the same command again"
        )

    def _agree(self, value: Any) -> Any:
        return distributed.gather_objects(value, self._group)[0]


def find_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def find_best(folder: Path) -> Path | None:
    """The best checkpoint by the metric that the newest measured one goes by, the earliest of
    equals; None if none was measured. Reads manifests only."""
    measured: dict[Path, tuple[str, float]] = {}
    for checkpoint in find_checkpoints(folder):
        try:
            found = manifest.read_manifest(checkpoint).measured
        except Damaged:
            continue  # told when it is about to be loaded
        if found is not None:
            measured[checkpoint] = found
    if not measured:
        return None
    (*_, (metric, _)) = measured.values()
    values = {path: value for path, (name, value) in measured.items() if name == metric}
    return min(values, key=values.__getitem__)


def best_whole(folder: Path) -> tuple[Path, Manifest]:
    """The best checkpoint; rank 0 alone reads it.

    Raises:
        UserError: if none was measured, or it is damaged.
    """
    checkpoint = find_best(folder)
    if checkpoint is None:
        raise UserError(
            f"{folder}: no checkpoint was measured; train with"
            " training.validation_split, or leave --best out"
        )
    try:
        return checkpoint, manifest.verify(checkpoint)
    except Damaged as problem:
        raise UserError(f"{checkpoint}: the best checkpoint is damaged: {problem}") from None


def step_of(checkpoint: Path) -> int:
    """Updates that were done when it was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_whole(folder: Path, set_aside: bool = True) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that is what its manifest says; None if there is no checkpoint.

    Rank 0 reads, every rank returns the same. Damaged ones that are newer are named in a warning
    and, with ``set_aside``, renamed.

    Raises:
        UserError: if there are checkpoints and all are damaged.
    """
    found = distributed.gather_objects(
        _newest_whole(folder, set_aside) if distributed.is_main() else None
    )[0]
    if isinstance(found, str):
        raise UserError(found)
    return found  # type: ignore[no-any-return]


def _newest_whole(folder: Path, set_aside: bool) -> tuple[Path, Manifest] | str | None:
    problems: dict[Path, str] = {}
    for checkpoint in reversed(find_checkpoints(folder)):
        try:
            whole = manifest.verify(checkpoint)
        except Damaged as problem:
            problems[checkpoint] = str(problem)
            continue
        for damaged, problem_text in problems.items():
            kept = _set_aside(damaged) if set_aside else damaged
            say(
                f"checkpoint {damaged} is damaged: {problem_text}; it is kept as {kept.name}, and"
                f" {checkpoint.name} is used", "warning",
            )  # fmt: skip
        return checkpoint, whole
    if not problems:
        return None
    told = "; ".join(f"{path.name}: {problem}" for path, problem in problems.items())
    return (
        f"every checkpoint in {folder} is damaged ({told}): put a whole one back, or delete"
        f" {folder} to start the stage again"
    )


def _set_aside(checkpoint: Path) -> Path:
    number = 1
    while (aside := checkpoint.with_name(f"{checkpoint.name}.damaged-{number}")).exists():
        number += 1
    return checkpoint.rename(aside)


def _name(step: int) -> str:
    return f"step-{step:06d}"
