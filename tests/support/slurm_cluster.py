"""A Slurm of two nodes on this machine, for tests: real daemons on free loopback ports."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from support.processes import ROOT

from erniesearch.distributed import free_port

NODES = ("n1", "n2")
CONFIG = """
ClusterName=t
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
ReturnToService=2
SlurmdTimeout=10
KillWait=20
JobRequeue=1
MpiDefault=none
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why the daemons cannot be started here, or an empty string."""
    absent = [
        name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name)
    ]
    if absent:
        return f"not installed: {', '.join(absent)} (packages slurm-wlm and munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


class Cluster:
    """Controller and nodes; ``close`` ends all of them and what they started, by process id."""

    def __init__(self) -> None:
        # Short: a Unix socket's path has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=1"
            for name in NODES
        )
        for name in ("ctld", *NODES):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(host=host, folder=self.folder, nodes=nodes, ctld_port=free_port())
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        self.environment = inherited | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1",
            "ERNIESEARCH_ROOT": str(ROOT), "MASTER_ADDR": "127.0.0.1",
            "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",  # two nodes cannot share a GPU
        }  # fmt: skip

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        at = f"{self.folder}/munge"
        files = [f"--{name}-file={at}.{name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "munged", "--force", "--foreground", f"--socket={at}.socket", *files)
        self.wait_until("munged", lambda: (self.folder / "munge.socket").exists())
        self._start("ctld", "slurmctld", "-D")
        for name in NODES:
            self.start_node(name)
        self.wait_until("idle nodes", lambda: self.call("sinfo", "-h", "-o", "%t %D") == "idle 2")

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [shutil.which(command[0]) or command[0], *command[1:]],
                env=self.environment, stdout=log, stderr=log,
            )  # fmt: skip

    def start_node(self, name: str) -> None:
        """Start, or start again, a node's slurmd."""
        self._start(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """SIGKILL a node: its slurmd, its tasks and the steps that hold them."""
        slurmd = self.daemons.pop(name)
        slurmd.kill()
        slurmd.wait()
        for process in self._started():
            try:
                if process.environ().get("SLURMD_NODENAME") != name:
                    continue
                step = process.parent()
                if step is not None and step.name() == "slurmstepd":
                    step.kill()
                process.kill()
            except psutil.NoSuchProcess:
                continue

    def _started(self) -> list[psutil.Process]:
        """Processes of this cluster's jobs."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """A Slurm command's output; an empty string if it fails (a daemon still starting)."""
        try:
            result = subprocess.run(
                command, env=self.environment, cwd=cwd, capture_output=True, text=True,
                check=False, timeout=10,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return ""
        return result.stdout.strip() if result.returncode == 0 else ""

    def submit(self, cwd: Path, *arguments: str, **environment: str) -> str:
        """``sbatch``; returns the job's number."""
        result = subprocess.run(
            ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1",
             *arguments], env=self.environment | environment, cwd=cwd, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """``scontrol show job`` as a dictionary."""
        shown = self.call("scontrol", "show", "job", "--oneliner", number)
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def wait_for(self, number: str, *states: str, seconds: float = 300) -> dict[str, str]:
        """Wait until the job is in one of the states; returns it."""
        self.wait_until(
            f"job {number} in {states}", lambda: self.job(number).get("JobState") in states, seconds
        )
        return self.job(number)

    def wait_until(self, what: str, condition, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "".join(p.read_text()[-3000:] for p in sorted(self.folder.glob("*.log")))
                raise AssertionError(f"waited {seconds:.0f} s for {what}; {logs}")
            time.sleep(0.3)

    def close(self) -> None:
        """End everything and remove the scratch folder."""
        for daemon in reversed(self.daemons.values()):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self._started():
            try:
                step = process.parent()
                if step is not None and step.name() == "slurmstepd":
                    step.kill()
                process.kill()
            except psutil.NoSuchProcess:
                continue
        shutil.rmtree(self.folder, ignore_errors=True)
