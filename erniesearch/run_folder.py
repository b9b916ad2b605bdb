"""Where a run keeps its files, and whether what lies there is finished and still good."""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from erniesearch import installation
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.errors import UserError
from erniesearch.files import hold_lock, write_atomically

COSTS = "costs.json"
"""In a step's folder: seconds from its claim to its end and peak memory of rank 0's process, the
one that finished it."""


class RunFolder:
    """Paths inside ``run_dir``.

    ``stages/NAME`` holds metrics.jsonl, checkpoints/, model/student, model/teacher, done.json,
    costs.json;
    ``exports/``, ``index/``, ``token_vectors/``, ``token_index/``, ``runs/*.trec``, ``summary.md``
    and ``report.html`` are for the user.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.root = Path(run_dir)

    def stage(self, name: str) -> Path:
        """The folder of a stage (training stages, ``bm25``, ``mine``)."""
        return self.root / "stages" / name

    def model(self, stage: str, part: str) -> Path:
        """Folder of ``part`` ('student' or 'teacher') as ``stage`` left it."""
        return self.stage(stage) / "model" / part

    def negatives(self, kind: str) -> Path:
        """The hard negatives' file, kind 'bm25' or 'mined'."""
        return self.stage("mine" if kind == "mined" else "bm25") / "negatives.jsonl"

    def export(self, kind: str) -> Path:
        """Export folder: 'dual_encoder', 'late_interaction' or 'cross_encoder'."""
        return self.root / "exports" / kind

    @property
    def index(self) -> Path:
        """The FAISS folder of the final dual-encoder."""
        return self.root / "index"

    @property
    def token_vectors(self) -> Path:
        """The final late interaction's vectors of the whole corpus."""
        return self.root / "token_vectors"

    @property
    def token_index(self) -> Path:
        """The final late interaction's index of the whole corpus."""
        return self.root / "token_index"

    @property
    def runs(self) -> Path:
        """TREC run files."""
        return self.root / "runs"

    @property
    def query_metrics(self) -> Path:
        """Every system's metrics by query."""
        return self.runs / "per_query.parquet"

    def record(self, config: RunConfig) -> None:
        """Leave the resolved config here, versions and commit."""
        write_atomically(self.root / "config.yaml", to_yaml(config))
        used = installation.versions("torch", "deepspeed", "transformers")
        write_atomically(self.root / "environment.json", json.dumps(used, indent=2) + "\n")


def is_done(folder: Path, expected: str) -> bool:
    """Whether ``folder`` holds a finished result made from the same inputs."""
    marker = folder / "done.json"
    if not marker.is_file():
        return False
    try:
        return bool(json.loads(marker.read_text())["fingerprint"] == expected)
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{marker}: damaged; delete it to redo this stage") from None


def mark_done(folder: Path, expected: str, **facts: object) -> None:
    """Write ``done.json`` last and atomically: a folder without it is unfinished."""
    write_atomically(
        folder / "done.json", json.dumps({"fingerprint": expected, **facts}, indent=2) + "\n"
    )


@contextmanager
def claimed(folder: Path, expected: str) -> Iterator[None]:
    """A step's folder, prepared and locked by rank 0 for all ranks until the end of the block; a
    block that ends well leaves :data:`COSTS` there.

    Raises:
        UserError: if another process writes there.
    """
    from erniesearch import distributed  # here, since a fingerprint needs no torch

    began = time.monotonic()
    lock = folder.with_name(f".{folder.name}.lock")
    # The ranks of a run just killed may still be ending.
    held = hold_lock(lock, "process", patience=20) if distributed.is_main() else nullcontext()
    with held:
        if distributed.is_main():
            _prepare(folder, expected)
        distributed.barrier()
        yield
        if distributed.is_main():
            with suppress(OSError):  # what has been done is worth more than what it has cost
                write_atomically(folder / COSTS, json.dumps(_costs(began)) + "\n")


def _costs(began: float) -> dict[str, float]:
    costs = {"seconds": time.monotonic() - began, "peak_memory_bytes": memory_status("VmHWM")}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        costs["peak_gpu_memory_bytes"] = torch.cuda.max_memory_reserved()
    return costs


def memory_status(field: str) -> int:
    """Bytes, from Linux's view of this process: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def _prepare(folder: Path, expected: str) -> None:
    """Prepare a stage's folder: keep unfinished work made from the same inputs, set other work
    aside as ``NAME.stale-K`` (nothing is deleted)."""
    started = folder / "started.json"
    if folder.exists() and any(folder.iterdir()):
        try:
            same = json.loads(started.read_text())["fingerprint"] == expected
        except (OSError, json.JSONDecodeError, KeyError, TypeError):
            same = False
        if not same:
            number = 1
            while (aside := folder.with_name(f"{folder.name}.stale-{number}")).exists():
                number += 1
            shutil.move(folder, aside)
    folder.mkdir(parents=True, exist_ok=True)
    if not started.exists():
        write_atomically(started, json.dumps({"fingerprint": expected}) + "\n")
