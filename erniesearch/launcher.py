"""How the pipeline starts a stage's ranks: ``srun`` in a Slurm job, else DeepSpeed's launcher."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from erniesearch.config import RunConfig
from erniesearch.distributed import free_port
from erniesearch.errors import UserError
from erniesearch.training import preemption
from erniesearch.training.process import pipeline_token

_running: subprocess.Popen[bytes] | None = None


class StageFailed(RuntimeError):
    """A training process ended with an error that it has already printed."""

    def __init__(self, stage: str, status: int) -> None:
        super().__init__(f"stage {stage} failed with exit status {status}")
        self.status = status


def in_slurm_job() -> bool:
    """Whether this process is a Slurm job's batch script (or ``salloc`` shell), not one of its
    tasks, so that ``srun`` from here reaches all nodes of the job."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ


def num_nodes() -> int:
    """Nodes that a stage runs on."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES", 1)) if in_slurm_job() else 1


def num_processes(config: RunConfig) -> int:
    """Ranks per stage: nodes times processes per node, which are as configured, else as many as
    the Slurm job has tasks per node, else one per GPU, else 2.

    Raises:
        UserError: for a Slurm job whose nodes have different numbers of tasks.
    """
    per_node = config.training.num_processes
    if not per_node and in_slurm_job() and "SLURM_TASKS_PER_NODE" in os.environ:
        tasks = os.environ["SLURM_TASKS_PER_NODE"]  # "4", or "4(x2)" for two nodes
        if "," in tasks:
            raise UserError(
                f"the Slurm job has {tasks} tasks per node: ask for the same number on every node"
                " (--ntasks-per-node), or set training.num_processes"
            )
        per_node = int(tasks.split("(")[0])
    return num_nodes() * (per_node or torch.cuda.device_count() or 2)


def launch(config: RunConfig, name: str, world_size: int) -> None:
    """Train a stage on ``world_size`` ranks and wait for them.

    Raises:
        StageFailed: if a rank fails.
        Preempted: if this process or a rank was asked to stop; the ranks have saved a checkpoint.
    """
    global _running
    environment = os.environ | {
        "OMP_NUM_THREADS": str(config.training.threads_per_process),
        "TOKENIZERS_PARALLELISM": "false",
    }
    slurm = in_slurm_job()
    command = _srun(world_size, environment) if slurm else _deepspeed(world_size)
    if not slurm:  # Slurm itself ends what a job leaves behind, on other nodes too
        environment["ERNIESEARCH_PIPELINE"] = pipeline_token()
    command += ["train", "--config", str(Path(config.run_dir) / "config.yaml"), "--stage", name]
    _running = subprocess.Popen(command, env=environment)
    try:
        status = _running.wait()
    except BaseException:
        _running.terminate()
        raise
    finally:
        _running = None
    if preemption.requested() or status == preemption.EXIT_STATUS:
        raise preemption.Preempted(f"stopped in or after stage {name}")
    if status:
        raise StageFailed(name, status)


def stop() -> None:
    """Ask the ranks for a checkpoint; :func:`launch` then raises.

    Raises:
        Preempted: at once if no ranks run: the steps of this process have nothing to save.
    """
    if _running is None:
        raise preemption.Preempted("stopped between two stages")
    if in_slurm_job():
        _running.send_signal(signal.SIGUSR1)  # srun hands it to every task
        return
    with suppress(psutil.NoSuchProcess):
        # DeepSpeed's runner starts its launcher, the launcher starts the ranks; neither of the
        # two would hand the signal on.
        for launcher in psutil.Process(_running.pid).children():
            for rank in launcher.children():
                with suppress(psutil.NoSuchProcess):
                    rank.send_signal(signal.SIGUSR1)


def _deepspeed(world_size: int) -> list[str]:
    return [
        sys.executable, "-m", "deepspeed.launcher.runner",
        "--num_gpus", str(world_size), "--master_port", str(free_port()),
        "--quiet", "--no_local_rank", "--module", "erniesearch.cli",
    ]  # fmt: skip


def _srun(world_size: int, environment: dict[str, str]) -> list[str]:
    """One task per rank on all nodes of the job; completes ``environment``."""
    if shutil.which("srun") is None:
        raise UserError("SLURM_JOB_ID is set, but srun is not on PATH: unset it to run on one node")
    if "MASTER_ADDR" not in environment:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames"], capture_output=True, text=True, check=False
        )
        if hosts.returncode or not hosts.stdout.strip():
            raise UserError(
                f"scontrol does not name the job's nodes ({hosts.stderr.strip()}): export"
                " MASTER_ADDR, the address of the first"
            )
        environment["MASTER_ADDR"] = hosts.stdout.split()[0]
    environment["MASTER_PORT"] = str(free_port())
    if "SLURM_CPUS_PER_TASK" in environment:  # which srun does not look at since 22.05
        environment.setdefault("SRUN_CPUS_PER_TASK", environment["SLURM_CPUS_PER_TASK"])
    # A rank that ends alone must not leave the others waiting, but those that save on request need
    # a moment to end as well: --kill-on-bad-exit would give them none.
    return [
        "srun", "--nodes", str(num_nodes()), "--ntasks", str(world_size),
        "--ntasks-per-node", str(world_size // num_nodes()), "--wait=60",
        sys.executable, "-m", "erniesearch.cli",
    ]  # fmt: skip
