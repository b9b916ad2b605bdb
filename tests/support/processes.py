"""Commands and trainings in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from erniesearch.config.keys import RunConfig
from erniesearch.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
TWO_RANKS = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
             "--rdzv_endpoint=localhost:0")  # fmt: skip
"""Arguments of Python before a script or a module that two ranks are to run."""


def start(
    *arguments: str, cwd: Path | None = None, stderr: int = subprocess.STDOUT, **environment: str
) -> subprocess.Popen[str]:
    """A Python process that sees this checkout, one thread, output captured.

    Ctrl-C reaches it even where these tests run in a shell's background, which ignores it.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")])
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=cwd or ROOT, env=variables, text=True,
        stdout=subprocess.PIPE, stderr=stderr,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def run_python(*arguments: str, timeout: float = 300, **environment: str) -> tuple[int, str]:
    """Run to the end; returns exit status and output."""
    process = start(*arguments, **environment)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def run_command(*arguments: str, timeout: float = 400) -> tuple[str, str]:
    """``erniesearch …`` in a process of its own, which must succeed; returns what it wrote to
    standard output and to standard error."""
    process = start("-m", "erniesearch.cli", *arguments, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, output[-1000:] + errors[-3000:]
    return output, errors


def losses_of(stage_folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the machine's speed."""
    lines = [json.loads(x) for x in (stage_folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "speed"} for line in lines]


def train_cascade(config: RunConfig, root: Path, world_size: int = 1, **environment: str) -> Path:
    """Returns the stage's folder."""
    file = root / f"{Path(config.run_dir).name}.json"
    file.write_text(json.dumps([("cascade", asdict(config))]))
    worker = str(SUPPORT / "distributed_worker.py")
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={world_size}"]
    launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    status, output = run_python(*launcher, worker, str(file), **environment)
    assert status == 0, output[-4000:]
    return RunFolder(config.run_dir).stage("cascade")


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def orphans(run_dir: Path) -> list[int]:
    """Processes of a run's steps: their command lines name its folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"{run_dir}/config.yaml".encode() in command:
                found.append(int(entry.name))
    return found
