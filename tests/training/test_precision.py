"""bf16 computes; what is added up and kept is fp32, under every ZeRO stage."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.processes import SUPPORT, losses_of, run_python
from support.tiny import ConfigMaker

from erniesearch.run_folder import RunFolder


@pytest.fixture(scope="module")
def trained() -> dict[str, list[float]]:
    """Gradient norm and weight after an update, by ZeRO stage."""
    status, output = run_python(str(SUPPORT / "precision_worker.py"))
    assert status == 0, output[-3000:]
    found: dict[str, list[float]] = json.loads(output.splitlines()[-1])
    return found


@pytest.mark.parametrize("zero_stage", ["0", "1", "2", "3"])
def test_micro_steps_add_up_in_fp32(trained: dict[str, list[float]], zero_stage: str) -> None:
    """In bf16, 1/256 added to 1 is 1: micro-steps after the first would count for nothing."""
    assert trained[zero_stage][0] == pytest.approx(1 + 63 / 256, rel=1 / 256)


@pytest.mark.parametrize("zero_stage", ["0", "1", "2", "3"])
def test_the_first_update_is_adams_first(trained: dict[str, list[float]], zero_stage: str) -> None:
    """A decayed weight and one step of the learning rate, less than bf16 can tell from 1."""
    assert trained[zero_stage][1] == pytest.approx(1 - 1e-4 * 0.5 - 1e-4, abs=1e-7)


def test_resumed_without_zero_is_bit_exact(make_config: ConfigMaker, tmp_path: Path) -> None:
    """Updates smaller than bf16's steps go on from the fp32 weights."""
    whole, killed = (
        make_config(
            run_dir=tmp_path / name, steps=6, save_every=2, zero_stage=0, precision="bf16",
            student_lr=1e-5, head_lr=1e-5, teacher_lr=1e-5, queries_per_rank=2,
        )
        for name in ("whole", "killed")
    )  # fmt: skip
    plan = [(asdict(whole), 1, None), (asdict(killed), 1, 2), (asdict(killed), 1, None)]
    (tmp_path / "job.json").write_text(json.dumps({"plan": plan}))
    status, output = run_python(str(SUPPORT / "fork_ranks.py"), str(tmp_path / "job.json"))
    assert status == 0, output[-3000:]
    folders = [RunFolder(config.run_dir) for config in (whole, killed)]
    expected, trace = (losses_of(folder.stage("cascade")) for folder in folders)
    assert trace == expected
    for part in ("student", "teacher"):
        wanted, made = (load_file(f.model("cascade", part) / "model.safetensors") for f in folders)
        assert all(made[name].equal(wanted[name]) for name in wanted)
