"""Train and measure every arm of a grid; what two arms share is trained once.

A stage's result lies in ``RUN_DIR/results/STAGE-FINGERPRINT``, a run folder of its own; an arm's
run folder, ``RUN_DIR/arms/ARM/seed-N``, links to it. So a killed ablation goes on where it was,
arms that are added later reuse what is there, and tasks of a Slurm array may share one folder.
"""

import os
import shutil
import signal
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from erniesearch import stages
from erniesearch.ablation.forked import Forked
from erniesearch.ablation.grid import Arm, Grid, needed_steps
from erniesearch.config.keys import TRAINING_STAGES, RunConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.errors import UserError
from erniesearch.files import hold_lock, write_atomically
from erniesearch.pipeline import launcher
from erniesearch.progress import ARM, Meter, say
from erniesearch.run_folder import RunFolder, is_done
from erniesearch.training.faults import preemption
from erniesearch.training.faults.process import pipeline_token

_running: set[Forked] = set()


class ArmFailed(RuntimeError):
    """A command of an arm ended with an error that it has already printed."""

    def __init__(self, arm: str, command: list[str], status: int) -> None:
        super().__init__(f"arm {arm}: {' '.join(command)} ended with status {status}")
        self.status = status


def train_arms(grid: Grid, jobs: list[tuple[Arm, int]], parallel: int) -> None:
    """Bring every job to its measured run, ``parallel`` at a time.

    Raises:
        ArmFailed: for the first job that failed, after those that had begun have ended.
        Preempted: when asked to stop; the trainings have saved a checkpoint.
    """
    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(_train_arm, grid, arm, seed) for arm, seed in jobs]
        try:
            with Meter("training arms", "jobs", len(jobs), rewritten=False) as meter:
                for future in futures:
                    future.result()
                    meter.advance(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def stop() -> None:
    """Ask the trainings for a checkpoint; :func:`train_arms` then raises."""
    for process in list(_running):
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGUSR1)


def result_folder(grid: Grid, config: RunConfig, step: str) -> Path:
    """The run folder in which a step's result lies."""
    expected = stages.fingerprint(config, step, launcher.num_processes(config))
    return grid.run_dir / "results" / f"{step}-{expected[:16]}"


def final_result(grid: Grid, config: RunConfig) -> tuple[str, Path]:
    """The final student's stage and the run folder in which it lies."""
    step = needed_steps(config)[-1]
    return step, result_folder(grid, config, step)


def run_file(result: Path, split: str) -> Path:
    """The TREC run of a result's dual-encoder."""
    return result / "runs" / f"dual_encoder-{split}.trec"


def _train_arm(grid: Grid, arm: Arm, seed: int) -> None:
    config = grid.config(arm, seed)
    root = Path(config.run_dir)
    for step in needed_steps(config):
        result = result_folder(grid, config, step)
        _link(root / "stages" / step, result / "stages" / step)
        expected = stages.fingerprint(config, step, launcher.num_processes(config))
        if is_done(result / "stages" / step, expected):
            continue
        with hold_lock(result / ".lock", "ablation", patience=float("inf")):
            if is_done(result / "stages" / step, expected):
                continue  # another arm has trained it meanwhile
            say(f"{arm.name} seed {seed}: {step}")
            write_atomically(result / "config.yaml", to_yaml(replace(config, run_dir=str(result))))
            write_atomically(root / "arm.yaml", to_yaml(config))
            _start(f"{arm.name} seed {seed}", "run", str(root / "arm.yaml"), "--only", step)
            if step in TRAINING_STAGES:  # several times the model's size, and no longer needed
                shutil.rmtree(result / "stages" / step / "checkpoints", ignore_errors=True)
    _measure(grid, arm.name, config)


def _measure(grid: Grid, arm: str, config: RunConfig) -> None:
    step, result = final_result(grid, config)
    out = run_file(result, grid.split)
    with hold_lock(result / ".lock", "ablation", patience=float("inf")):
        if out.is_file():
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        model = RunFolder(result).model(step, "student")
        _start(f"{arm} seed {config.seed}", *evaluate_command(grid, config, model, out))


def evaluate_command(grid: Grid, config: RunConfig, model: Path, out: Path) -> list[str]:
    """Arguments of ``erniesearch`` that measure a dual-encoder on the grid's split."""
    return [
        "evaluate", "--data", config.data.path, "--split", grid.split,
        "--model", str(model), "--kind", "dual_encoder", "--metrics", grid.metric,
        "--use_titles", str(config.data.use_titles).lower(),
        "--batch_size", str(config.evaluation.batch_size), "--run_out", str(out),
        "--precision", "fp32",  # whatever the machine, one measure
    ]  # fmt: skip


def _link(link: Path, target: Path) -> None:
    """``link`` to the shared result; a folder or another link in its place is a mistake or of an
    earlier configuration."""
    target.mkdir(parents=True, exist_ok=True)
    relative = os.path.relpath(target, link.parent)
    if link.is_symlink():
        if os.readlink(link) == relative:
            return
        link.unlink()
    elif link.exists():
        raise UserError(f"{link}: not made by this ablation; name another run_dir")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(relative)


def _start(arm: str, *arguments: str) -> None:
    """Run a command of ours in a process of its own; its errors have been told when it ends."""
    if preemption.requested():
        raise preemption.Preempted("stopped between two steps")
    # Only errors and progress are shown; the tables of single arms would bury both.
    process = Forked(
        arguments, {"ERNIESEARCH_PIPELINE": pipeline_token(), launcher.ONE_PROCESS: "1", ARM: arm}
    )
    _running.add(process)
    try:
        status = process.wait()
    finally:
        _running.discard(process)
    if preemption.requested() or status == preemption.EXIT_STATUS:
        raise preemption.Preempted("stopped with everything saved")
    if status:
        raise ArmFailed(arm, ["erniesearch", *arguments], status)


def pending(grid: Grid, jobs: Iterable[tuple[Arm, int]]) -> list[str]:
    """Arms and seeds without a measured run."""
    return [
        f"{arm.name} seed {seed}"
        for arm, seed in jobs
        if not run_file(final_result(grid, grid.config(arm, seed))[1], grid.split).is_file()
    ]
