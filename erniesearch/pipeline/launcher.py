"""How the pipeline starts its steps: a training stage's ranks by ``srun`` in a Slurm job, else by
DeepSpeed's launcher if there are several; those steps that encode and score a lot likewise, where
there are several GPUs or nodes; any other step as one process of its own."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from erniesearch.config.keys import TRAINING_STAGES, RunConfig
from erniesearch.distributed import free_port
from erniesearch.errors import UserError
from erniesearch.training.faults import preemption
from erniesearch.training.faults.process import pipeline_token

DEEPSPEED = "deepspeed.launcher.launch"
SHARED_STEPS = ("teacher_check", "mine", "evaluate")
"""Steps whose encoding and scoring is dealt out among ranks."""
ONE_PROCESS = "ERNIESEARCH_ONE_PROCESS"
"""Set by an ablation, which gives every step a process: work on one rank is done in that."""
_running: subprocess.Popen[bytes] | None = None


class StageFailed(RuntimeError):
    """A step's process ended with an error that it has already printed."""

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


def check_devices(config: RunConfig) -> None:
    """Whether every rank of this node gets a GPU, where there are any.

    Raises:
        UserError: for more processes than GPUs; a Slurm job's nodes need not be like this one.
    """
    wanted, visible = config.training.num_processes, torch.cuda.device_count()
    if not in_slurm_job() and 0 < visible < wanted:
        raise UserError(
            f"training.num_processes is {wanted}, but the GPUs that this process sees are"
            f" {visible}: lower it, or name more in CUDA_VISIBLE_DEVICES"
        )


def on_ranks(name: str, world_size: int) -> bool:
    """Whether a step is done by all ranks: training is; encoding and scoring where each has a GPU
    or there are several nodes, since on one CPU a single process uses all cores as well."""
    several = torch.cuda.device_count() > 1 or num_nodes() > 1
    return name in TRAINING_STAGES or (name in SHARED_STEPS and world_size > 1 and several)


def launch(config: RunConfig, name: str, world_size: int) -> None:
    """Run a step and wait for it: on ``world_size`` ranks, or in one process on this node
    (:func:`on_ranks`).

    Raises:
        StageFailed: if a process fails.
        Preempted: if this process or a rank was asked to stop; ranks have saved a checkpoint.
    """
    global _running
    environment = dict(os.environ)
    file = str(Path(config.run_dir) / "config.yaml")
    srun = on_ranks(name, world_size) and in_slurm_job()
    if srun:
        command = _srun(world_size, environment)
    elif world_size > 1 and on_ranks(name, world_size):
        command = _deepspeed(world_size)
    else:
        command = _alone(environment)
    if name in TRAINING_STAGES:
        environment["OMP_NUM_THREADS"] = str(config.training.threads_per_process)
        environment["TOKENIZERS_PARALLELISM"] = "false"
        command += ["train", "--config", file, "--stage", name]
    else:
        command += ["step", "--config", file, "--name", name, "--world_size", str(world_size)]
    if not srun:  # Slurm itself ends what srun leaves behind, on other nodes too
        environment["ERNIESEARCH_PIPELINE"] = pipeline_token()
    # A step's result is in its files: standard output is left to the pipeline's.
    _running = subprocess.Popen(command, env=environment, stdout=2)
    try:
        status = _running.wait()
    except BaseException:
        _running.terminate()
        _running.wait()
        raise
    finally:
        _running = None
    if preemption.requested() or status == preemption.EXIT_STATUS:
        raise preemption.Preempted(f"stopped in or after stage {name}")
    if status:
        raise StageFailed(name, status)


def stop() -> None:
    """Ask the running step to end, ranks with a checkpoint; :func:`launch` then raises.

    Raises:
        Preempted: at once if none runs: this process has nothing to save.
    """
    if _running is None:
        raise preemption.Preempted("stopped between two stages")
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(_running.pid)
        # DeepSpeed's launcher would not hand the signal on to its ranks, as srun does. Before
        # there are any, it dies of it.
        ranks = process.children() if DEEPSPEED in _running.args else []  # type: ignore[operator]
        for receiver in ranks or [process]:
            with suppress(psutil.NoSuchProcess):
                receiver.send_signal(signal.SIGUSR1)


def _deepspeed(world_size: int) -> list[str]:
    """What DeepSpeed's runner (the command ``deepspeed``) would start on one node: it can say any
    name of a GPU, and the runner, given a number of ranks, takes the machine's first GPUs,
    whatever CUDA_VISIBLE_DEVICES says."""
    node = json.dumps({"localhost": _devices(world_size)}).encode()
    return [
        sys.executable, "-m", DEEPSPEED, f"--world_info={base64.urlsafe_b64encode(node).decode()}",
        "--master_port", str(free_port()),
        "--quiet", "--no_local_rank", "--module", "erniesearch.cli",
    ]  # fmt: skip


def _alone(environment: dict[str, str]) -> list[str]:
    """One rank, told what DeepSpeed's launcher would tell it, without the seconds that it takes;
    completes ``environment``."""
    environment |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": _devices(1)[0],
    }  # fmt: skip
    return [sys.executable, "-m", "erniesearch.cli"]


def _devices(world_size: int) -> list[str]:
    """The ranks' CUDA_VISIBLE_DEVICES, one each: the first of this process's own, which may be
    UUIDs; -1, which is none, where a user has hidden the GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(i) for i in range(world_size)]
    named = [name.strip() for name in visible.split(",") if name.strip()][:world_size]
    return named + ["-1"] * (world_size - len(named))


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
