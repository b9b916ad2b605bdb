"""One run on 2, then 1, then 3 ranks trains like a run on 2: same global batch, same data order."""

import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT, ConfigMaker, losses_of, run_python, start

from erniesearch import stages
from erniesearch.cli import main
from erniesearch.config import RunConfig, to_yaml
from erniesearch.errors import UserError
from erniesearch.stages import RunFolder
from erniesearch.training.checkpoint import find_checkpoints

STEPS, SAVE_EVERY, BATCH = 12, 4, 6


def command(file: Path, world_size: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={world_size}",
                "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]  # fmt: skip
    return [*launcher, str(ROOT / "tests" / "distributed_worker.py"), str(file)]


def train(config: RunConfig, file: Path, world_size: int) -> None:
    """To the end."""
    file.write_text(json.dumps([("cascade", asdict(config))]))
    status, output = run_python(*command(file, world_size))
    assert status == 0, output[-3000:]


def train_until(config: RunConfig, file: Path, world_size: int, step: int) -> None:
    """Killed, all ranks, once the checkpoint of ``step`` is there and before the next one."""
    file.write_text(json.dumps([("cascade", asdict(config))]))
    folder = RunFolder(config.run_dir).stage("cascade") / "checkpoints"
    process = start(*command(file, world_size))
    deadline = time.monotonic() + 200
    while not (folder / f"step-{step:06d}").exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [*map(int, children), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert [path.name for path in find_checkpoints(folder)][-1] == f"step-{step:06d}"


@pytest.mark.distributed
@pytest.mark.parametrize(
    "zero_stages", [(1, 1, 1), (2, 2, 2), (3, 3, 3), (1, 2, 1)], ids=lambda z: "-".join(map(str, z))
)
def test_other_numbers_of_ranks_continue_a_run(
    make_config: ConfigMaker, tmp_path: Path, zero_stages: tuple[int, ...]
) -> None:
    def config(name: str, zero: int) -> RunConfig:
        # Each group with a learning rate and a decay of its own: they must not be mixed up.
        return make_config(
            run_dir=tmp_path / name, steps=STEPS, save_every=SAVE_EVERY, batch_size=BATCH,
            accumulation_steps=2, zero_stage=zero, dropout=0.0, weight_decay=0.1,
            student_lr=2e-4, head_lr=5e-4, teacher_lr=1e-4, competence_gate=True,
        )  # fmt: skip

    train(config("fixed", zero_stages[0]), tmp_path / "fixed.json", 2)
    train_until(config("moved", zero_stages[0]), tmp_path / "moved.json", 2, 4)
    train_until(config("moved", zero_stages[1]), tmp_path / "moved.json", 1, 8)
    train(config("moved", zero_stages[2]), tmp_path / "moved.json", 3)

    fixed, moved = (
        losses_of(RunFolder(tmp_path / name).stage("cascade")) for name in ("fixed", "moved")
    )
    assert [line["step"] for line in moved] == list(range(1, STEPS + 1))
    for own, expected in zip(moved, fixed, strict=True):
        assert own["learning_rate"] == expected["learning_rate"]
        assert own["loss"] == pytest.approx(expected["loss"], abs=1e-5), own["step"]
        assert own["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    folder = RunFolder(tmp_path / "moved").stage("cascade") / "checkpoints"
    assert not list(folder.glob("*.tmp"))  # the converted copies are gone
    assert not (folder.parent.parent / "cascade.stale-1").exists()


def test_the_global_batch_decides_what_continues(make_config: ConfigMaker) -> None:
    def print_of(world_size: int, **changes: object) -> str:
        return stages.fingerprint(make_config(**changes), "cascade", world_size)

    assert print_of(2, queries_per_rank=3) == print_of(1, queries_per_rank=6)
    assert print_of(2, queries_per_rank=3) == print_of(3, batch_size=6)
    assert print_of(2, queries_per_rank=3) != print_of(1, queries_per_rank=3)
    assert print_of(2, batch_size=6) != print_of(2, batch_size=6, accumulation_steps=2)
    assert print_of(1, zero_stage=1) == print_of(1, zero_stage=2) == print_of(1)
    assert len({print_of(1, zero_stage=z) for z in (0, 2, 3)}) == 3


def test_ranks_that_do_not_divide_the_batch_are_refused(
    make_config: ConfigMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(batch_size=8)
    assert stages.queries_per_rank(config, "cascade", 4) == 2
    with pytest.raises(UserError, match=r"stages.cascade.batch_size is 8, which 3 ranks cannot"):
        stages.fingerprint(config, "cascade", 3)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    assert main(["run", str(file), "--training.num_processes", "3"]) == 2
    assert "which 3 ranks cannot share equally" in capsys.readouterr().err
    assert main(["run", str(file), "--stages.cascade.batch_size", "0"]) == 2
    assert "stages.cascade.batch_size' is 0: must be 1 or more" in capsys.readouterr().err
