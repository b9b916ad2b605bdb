"""One run on 2, then 1, then 3 ranks trains like a run on 2: same global batch, same data order."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from support.processes import SUPPORT, losses_of, run_python
from support.tiny import ConfigMaker

from erniesearch import stages
from erniesearch.cli import main
from erniesearch.config.keys import RunConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.errors import UserError
from erniesearch.run_folder import RunFolder
from erniesearch.stages import Stage

STEPS, BATCH = 12, 6


def with_batch_size(config: RunConfig, batch_size: int) -> RunConfig:
    stage = replace(config.stages.cascade, batch_size=batch_size)
    return replace(config, stages=replace(config.stages, cascade=stage))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "zero_stages",
    [
        (1, 1, 1),
        pytest.param((3, 3, 3), marks=pytest.mark.slow),
        pytest.param((1, 2, 1), marks=pytest.mark.slow),
        pytest.param((2, 2, 2), marks=pytest.mark.slow),
        pytest.param((0, 0, 0), marks=pytest.mark.slow),
    ],
    ids=lambda z: "-".join(map(str, z)),
)
def test_other_numbers_of_ranks_continue_a_run(
    make_config: ConfigMaker, tmp_path: Path, zero_stages: tuple[int, ...]
) -> None:
    def config(name: str, zero: int) -> RunConfig:
        # Each group with a learning rate and a decay of its own: they must not be mixed up.
        return with_batch_size(make_config(
            run_dir=tmp_path / name, steps=STEPS, save_every=4, accumulation_steps=2,
            zero_stage=zero, dropout=0.0, weight_decay=0.1, student_lr=2e-4, head_lr=5e-4,
            teacher_lr=1e-4, teacher_head_lr=3e-4, freeze_embeddings=True, competence_gate=True,
        ), BATCH)  # fmt: skip

    fixed, *moved = [
        asdict(config(name, zero))
        for name, zero in zip(("fixed", "moved", "moved", "moved"), (zero_stages[0], *zero_stages),
                              strict=True)
    ]  # fmt: skip
    plan = [(fixed, 2, None), (moved[0], 2, 4), (moved[1], 1, 8), (moved[2], 3, None)]
    (tmp_path / "job.json").write_text(json.dumps({"plan": plan}))
    status, output = run_python(str(SUPPORT / "fork_ranks.py"), str(tmp_path / "job.json"),
                                timeout=500)  # fmt: skip
    assert status == 0, output[-5000:]
    folders = [RunFolder(tmp_path / name).stage("cascade") for name in ("fixed", "moved")]
    expected_trace, trace = map(losses_of, folders)
    assert [line["step"] for line in trace] == list(range(1, STEPS + 1))
    for own, expected in zip(trace, expected_trace, strict=True):
        assert own["learning_rate"] == expected["learning_rate"]
        assert own["loss"] == pytest.approx(expected["loss"], abs=1e-5), own["step"]
        assert own.keys() == expected.keys()
        if zero_stages[0]:  # without ZeRO DeepSpeed does not tell it
            assert own["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    checkpoints = folders[1] / "checkpoints"
    assert not list(checkpoints.glob("*.tmp"))  # the converted copies are gone
    assert not folders[1].with_name("cascade.stale-1").exists()


def test_the_global_batch_decides_what_continues(make_config: ConfigMaker) -> None:
    def print_of(world_size: int, batch_size: int | None = None, **changes: object) -> str:
        config = make_config(**changes)
        if batch_size is not None:
            config = with_batch_size(config, batch_size)
        return stages.fingerprint(config, "cascade", world_size)

    assert print_of(2, queries_per_rank=3) == print_of(1, queries_per_rank=6)
    assert print_of(2, queries_per_rank=3) == print_of(3, batch_size=6)
    assert print_of(2, queries_per_rank=3) != print_of(1, queries_per_rank=3)
    assert print_of(2, batch_size=6) != print_of(2, batch_size=6, accumulation_steps=2)
    assert print_of(1, zero_stage=1) == print_of(1, zero_stage=2) == print_of(1)
    assert len({print_of(1, zero_stage=z) for z in (0, 2, 3)}) == 3
    # How the same is computed; chunks draw other dropout masks.
    assert print_of(1, late_interaction_exchange="ring", kernels="eager") == print_of(1)
    assert print_of(1, chunk_size=4) != print_of(1)


def test_ranks_that_do_not_divide_the_batch_are_refused(
    make_config: ConfigMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_batch_size(make_config(), 8)
    assert Stage(config, "cascade", 4).queries_per_rank == 2
    with pytest.raises(UserError, match=r"stages.cascade.batch_size is 8, which 3 ranks cannot"):
        stages.fingerprint(config, "cascade", 3)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    assert main(["run", str(file), "--training.num_processes", "3"]) == 2
    assert "which 3 ranks cannot share equally" in capsys.readouterr().err
    assert main(["run", str(file), "--stages.cascade.batch_size", "0"]) == 2
    assert "stages.cascade.batch_size' is 0: must be 1 or more" in capsys.readouterr().err
