"""Killed and resumed equals never interrupted, bit for bit."""

import json
import os
import signal
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.processes import SUPPORT, losses_of, start, wait_for_step
from support.tiny import ConfigMaker

from erniesearch.run_folder import RunFolder
from erniesearch.training.checkpoints.resume import Resume, load_checkpoint


def launch(config_file: Path) -> "subprocess.Popen[str]":
    return start(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0", str(SUPPORT / "distributed_worker.py"),
        str(config_file),
    )  # fmt: skip


def ranks_of(process: "subprocess.Popen[str]") -> list[int]:
    """Pids of the training processes that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


class _Engine:
    """DeepSpeed's engine after it has read the universal form: two parameters elsewhere (here on
    the device meta), and one and the same count of steps for both."""

    def __init__(self, step: object) -> None:
        first, second = (torch.zeros(4, device="meta", requires_grad=True) for _ in range(2))
        self.optimizer = SimpleNamespace(
            param_groups=[{"params": [first, second], "lr": 0.1}],
            optimizer=SimpleNamespace(state={first: {"step": step}, second: {"step": step}}),
        )

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, object]]:
        return folder, {"erniesearch": {}}


@pytest.mark.parametrize("step", [torch.tensor(7.0), torch.tensor(7), 7], ids=repr)
def test_the_universal_form_counts_steps_beside_the_parameters(
    step: object, tmp_path: Path
) -> None:
    """Fused AdamW on a GPU takes no count of steps on the CPU, nor one that is not fp32."""
    engine = _Engine(step)
    load_checkpoint(engine, Resume(tmp_path, "step-000007", 7, universal=True))  # type: ignore[arg-type]
    states = engine.optimizer.optimizer.state
    for parameter, state in states.items():
        assert state["step"].device == parameter.device
        assert state["step"].dtype == torch.float32
    first, second = (state["step"] for state in states.values())
    assert first is not second


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("zero_stage", "steps", "kills", "chunk_size"),
    [(1, 24, (6, 15), None), pytest.param(3, 12, (6,), 4, marks=pytest.mark.slow)],
    ids=["zero1", "zero3-cached"],
)
def test_sigkill_and_resume_is_bit_exact(
    make_config: ConfigMaker,
    tmp_path: Path,
    zero_stage: int,
    steps: int,
    kills: tuple[int, ...],
    chunk_size: int | None,
) -> None:
    folders = {}
    for name in ("whole", "killed"):
        # Dropout stays on: randomness is a function of the step, not of what ran before.
        config = make_config(
            run_dir=tmp_path / name, steps=steps, save_every=4,
            zero_stage=zero_stage, chunk_size=chunk_size, schedule="linear",
            warmup_ratio=0.2, accumulation_steps=2, queries_per_rank=2, competence_gate=True,
        )  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps([("cascade", asdict(config))]))
        folders[name] = RunFolder(tmp_path / name)
    whole = launch(tmp_path / "whole.json")
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output[-3000:]

    stage = folders["killed"].stage("cascade")
    for step in kills:
        process = launch(tmp_path / "killed.json")
        wait_for_step(stage, step)
        for pid in [*ranks_of(process), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)
        assert not (stage / "done.json").exists()
    last = launch(tmp_path / "killed.json")
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output[-3000:]

    trace, expected = losses_of(stage), losses_of(folders["whole"].stage("cascade"))
    assert [line["step"] for line in trace] == list(range(1, steps + 1))
    assert trace == expected
    for part in ("student", "teacher"):
        ours, theirs = (load_file(f.model("cascade", part) / "model.safetensors")
                        for f in folders.values())  # fmt: skip
        assert all(ours[name].equal(theirs[name]) for name in theirs)
