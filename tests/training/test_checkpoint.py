"""Checkpoints: a damaged one is never loaded, a full disk leaves the old ones, models come out of
them without an engine."""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import SUPPORT, TWO_RANKS, losses_of, run_python
from support.tiny import ConfigMaker

from erniesearch.cli import main
from erniesearch.config.keys import RunConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.config.yaml_file import from_dict, to_yaml
from erniesearch.errors import UserError
from erniesearch.run_folder import RunFolder
from erniesearch.training.checkpoints import manifest
from erniesearch.training.checkpoints.checkpointer import find_checkpoints, newest_whole

pytestmark = pytest.mark.distributed
STEPS = 6


def train(root: Path, *jobs: tuple[str, RunConfig]) -> None:
    """Train the stages on two ranks."""
    file = root / "jobs.json"
    file.write_text(json.dumps([(stage, asdict(config)) for stage, config in jobs]))
    status, output = run_python(*TWO_RANKS, str(SUPPORT / "distributed_worker.py"),
                                str(file))  # fmt: skip
    assert status == 0, output[-3000:]


def train_with(fault: dict[str, object], config: RunConfig, root: Path) -> tuple[int, str]:
    """``erniesearch train`` on two ranks with a fault; exit status and output."""
    (root / "fault.json").write_text(json.dumps(fault))
    (root / "run.yaml").write_text(to_yaml(config))
    return run_python(
        *TWO_RANKS, str(SUPPORT / "fault_worker.py"), str(root / "fault.json"),
        "--config", str(root / "run.yaml"), "--stage", "cascade",
    )  # fmt: skip


def same_models(ours: Path, theirs: Path) -> bool:
    """Whether two model folders hold the same parameters, bit for bit."""
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*.safetensors"))
    assert files
    assert files == sorted(path.relative_to(ours) for path in ours.rglob("*.safetensors"))
    pairs = [(load_file(ours / file), load_file(theirs / file)) for file in files]
    return all(
        own.keys() == other.keys() and all(own[name].equal(other[name]) for name in other)
        for own, other in pairs
    )


def share_that_bf16_cannot_hold(file: Path) -> float:
    """Of saved weights."""
    weights = torch.cat([weight.flatten() for weight in load_file(file).values()])
    return float((weights.bfloat16().float() != weights).float().mean())


@pytest.fixture(scope="module")
def trained_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def trained(make_config: ConfigMaker, trained_root: Path, tmp_path: Path) -> RunConfig:
    """A finished run on two ranks with checkpoints of updates 2, 4 and 6, in a copy of its own."""
    record = trained_root / "config.json"
    if not record.exists():
        config = make_config(
            run_dir=trained_root / "run", steps=STEPS, save_every=2, keep_checkpoints=3,
            queries_per_rank=2, competence_gate=True,
        )  # fmt: skip
        train(trained_root, ("cascade", config))
        record.write_text(json.dumps(asdict(config)))
    shutil.copytree(trained_root / "run", tmp_path / "copy")
    return replace(from_dict(RunConfig, json.loads(record.read_text())),
                   run_dir=str(tmp_path / "copy"))  # fmt: skip


def checkpoints_of(config: RunConfig) -> Path:
    return RunFolder(config.run_dir).stage("cascade") / "checkpoints"


def unfinish(config: RunConfig) -> None:
    """Back to the moment after the last checkpoint."""
    stage = RunFolder(config.run_dir).stage("cascade")
    (stage / "done.json").unlink()
    shutil.rmtree(stage / "model")


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_every_flip_and_truncation_of_every_file_is_found(trained: RunConfig) -> None:
    checkpoint = find_checkpoints(checkpoints_of(trained))[-1]
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert {path.name for path in files} == {
        "manifest.json", "mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    }  # fmt: skip
    rng = random.Random(0)
    for path in files:
        content = path.read_bytes()
        size = len(content)
        positions = [0, 1, size // 2, size - 1, *(rng.randrange(size) for _ in range(16))]
        for position in positions:
            flip(path, position, rng.randrange(8))
            with pytest.raises(manifest.Damaged, match=path.name):
                manifest.verify(checkpoint)
            path.write_bytes(content)
        for changed in (b"", content[: size // 2], content[:-1], content + b"\n"):
            path.write_bytes(changed)
            with pytest.raises(manifest.Damaged, match=path.name):
                manifest.verify(checkpoint)
        path.unlink()
        with pytest.raises(manifest.Damaged, match=f"{path.name} is missing"):
            manifest.verify(checkpoint)
        path.write_bytes(content)
        assert manifest.verify(checkpoint).step == STEPS


def test_damaged_ones_are_named_set_aside_and_the_one_before_is_used(
    trained: RunConfig, trained_root: Path, tmp_path: Path
) -> None:
    """Two of three are damaged: the training goes on from the first, to the same end."""
    folder = checkpoints_of(trained)
    before, middle, last = find_checkpoints(folder)
    unfinish(trained)
    flip(last / "mp_rank_00_model_states.pt", 5000, 3)
    optimizer = middle / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-7])
    status, output = train_with({"kind": "nan_loss", "rank": 0, "steps": []}, trained, tmp_path)
    assert status == 0, output[-3000:]
    told = [line for line in output.splitlines() if "is damaged" in line]
    assert told == [
        f"warning: checkpoint {last} is damaged: mp_rank_00_model_states.pt has other content than"
        f" was written; it is kept as {last.name}.damaged-1, and {before.name} is used",
        f"warning: checkpoint {middle} is damaged: {optimizer.name} has {optimizer_size(middle)}"
        f" bytes, not {optimizer_size(middle) + 7}; it is kept as {middle.name}.damaged-1, and"
        f" {before.name} is used",
    ]
    original = RunFolder(trained_root / "run").stage("cascade")
    again = RunFolder(trained.run_dir).stage("cascade")
    assert losses_of(again) == losses_of(original)
    assert same_models(again / "model", original / "model")
    assert [path.name for path in find_checkpoints(folder)] == [before.name, middle.name, last.name]
    assert (folder / "step-000006.damaged-1").is_dir()


def optimizer_size(checkpoint: Path) -> int:
    """Of rank 1's optimizer file as it was damaged."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged-1")
    return (aside / "zero_pp_rank_1_mp_rank_00_optim_states.pt").stat().st_size


def test_all_damaged_is_refused_and_nothing_is_moved(trained: RunConfig) -> None:
    folder = checkpoints_of(trained)
    for checkpoint in find_checkpoints(folder):
        flip(checkpoint / "manifest.json", 20, 2)
    told = r"is damaged \(step-000006: mani.*step-000002: manifest.json is damaged\): put a whole"
    with pytest.raises(UserError, match=told):
        newest_whole(folder)
    assert len(find_checkpoints(folder)) == 3


def test_what_a_kill_leaves_is_no_checkpoint(trained: RunConfig) -> None:
    folder = checkpoints_of(trained)
    shutil.copytree(folder / "step-000006", folder / "step-000008.0a1b2c3d.tmp")
    shutil.copytree(folder / "step-000006", folder / "step-000002.tmp")
    found = newest_whole(folder)
    assert found is not None
    assert found[0].name == "step-000006"
    assert newest_whole(folder / "nothing") is None


# --- a disk without room ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "in_background"), [(1, False), (0, True)], ids=["now", "async"])
def test_write_error_on_one_rank_is_one_line_and_the_old_checkpoint_stays(
    make_config: ConfigMaker, trained_root: Path, trained: RunConfig, tmp_path: Path, rank: int,
    in_background: bool,
) -> None:  # fmt: skip
    config = replace(trained, run_dir=str(tmp_path / "run"),
                     training=replace(trained.training, async_save=in_background))  # fmt: skip
    fault = {"kind": "small_files_only", "rank": rank, "steps": [3]}
    status, output = train_with(fault, config, tmp_path)
    assert status != 0
    errors = [line for line in output.splitlines() if line.startswith("erniesearch: error:")]
    folder = checkpoints_of(config)
    assert errors == [
        f"erniesearch: error: checkpoint {folder}/step-000004 could not be written:"
        f" {'mp_rank_00_model_states.pt' if rank == 0 else 'zero_pp_rank_1_mp_rank_00_optim_states.pt'}"  # noqa: E501
        f": File too large (rank {rank}); step-000002 is untouched: make room and run the same"
        " command again"
    ]
    assert "Error:" not in output.split("erniesearch: error:")[0]
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002"]
    manifest.verify(folder / "step-000002")
    train(tmp_path, ("cascade", config))
    original = RunFolder(trained_root / "run").stage("cascade")
    assert losses_of(RunFolder(config.run_dir).stage("cascade")) == losses_of(original)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.slow
def test_full_disk(
    trained: RunConfig, trained_root: Path, small_disk: Path, tmp_path: Path
) -> None:
    """The disk has room for one checkpoint and a half."""
    checkpoint = find_checkpoints(checkpoints_of(trained))[0]
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    subprocess.run(
        ["mount", "-o", f"remount,size={round(1.5 * size) + 100_000}", str(small_disk)], check=True
    )
    config = replace(trained, run_dir=str(small_disk / "run"))
    status, output = train_with({"kind": "nan_loss", "rank": 0, "steps": []}, config, tmp_path)
    assert status != 0
    errors = [line for line in output.splitlines() if line.startswith("erniesearch: error:")]
    assert len(errors) == 1
    assert "step-000004 could not be written: " in errors[0]
    assert "No space left on device" in errors[0]
    assert "step-000002 is untouched: make room" in errors[0]
    folder = checkpoints_of(config)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002"]
    manifest.verify(folder / "step-000002")
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    train(tmp_path, ("cascade", config))
    original = RunFolder(trained_root / "run").stage("cascade")
    assert losses_of(RunFolder(config.run_dir).stage("cascade")) == losses_of(original)


@pytest.mark.slow
def test_saving_in_the_background_writes_the_same_bytes(trained: RunConfig, tmp_path: Path) -> None:
    config = replace(trained, run_dir=str(tmp_path / "run"),
                     training=replace(trained.training, async_save=True))  # fmt: skip
    train(tmp_path, ("cascade", config))
    for now, later in zip(find_checkpoints(checkpoints_of(trained)),
                          find_checkpoints(checkpoints_of(config)), strict=True):  # fmt: skip
        assert manifest.verify(later).files == manifest.verify(now).files


# --- models from checkpoints --------------------------------------------------------------------


def test_exported_checkpoint_equals_the_finished_model(
    make_config: ConfigMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ZeRO 0 to 3 in fp32 and bf16, a frozen teacher, and a student whose parameters have several
    names."""
    small = {"steps": 2, "queries_per_rank": 2}
    frozen = LossWeights(de=1.0, ce_to_de=1.0)
    tiny = {**small, "precision": "bf16", "student_lr": 1e-5, "head_lr": 1e-5, "teacher_lr": 1e-5}
    jobs = {
        f"zero{zero}": ("cascade", {**small, "zero_stage": zero}) for zero in (0, 1, 2, 3)
    } | {
        f"bf16-{zero}": ("cascade", {**tiny, "zero_stage": zero}) for zero in (0, 1, 2, 3)
    } | {
        "frozen1": ("cascade", {**small, "weights": frozen}),
        "frozen3": ("cascade", {**small, "zero_stage": 3, "weights": frozen}),
        "bf16-frozen0": ("cascade", {**tiny, "zero_stage": 0, "weights": frozen}),
        "bf16-frozen3": ("cascade", {**tiny, "zero_stage": 3, "weights": frozen}),
        "words": ("post_train", {**small, "zero_stage": 2,
                                 "weights": LossWeights(mlm=1.0, de=1.0)}),
        "frozen-bf16": ("cascade", {**small, "precision": "bf16", "freeze_embeddings": True,
                                    "weights": LossWeights(de=1.0, ce_to_de=1.0)}),
        "embeddings0": ("cascade", {**small, "zero_stage": 0, "freeze_embeddings": True,
                                    "layers": 1}),
        "embeddings3": ("cascade", {**small, "zero_stage": 3, "precision": "bf16",
                                    "freeze_embeddings": True, "tied": False}),
        "untied": ("cascade", {**small, "tied": False, "weights": LossWeights(de=1.0)}),
    }  # fmt: skip
    configs = {
        name: (stage, make_config(stage=stage, run_dir=tmp_path / name, **changes))
        for name, (stage, changes) in jobs.items()
    }
    train(tmp_path, *configs.values())
    for name, (stage, config) in configs.items():
        file, out = tmp_path / f"{name}.yaml", tmp_path / f"{name}-out"
        file.write_text(to_yaml(config))
        command = ["export-checkpoint", "--config", str(file), "--stage", stage, "--out", str(out)]
        capsys.readouterr()
        assert main(command) == 0, capsys.readouterr().err
        assert capsys.readouterr().out == f"{out}: stage {stage} after 2 updates\n"
        folder = RunFolder(config.run_dir).stage(stage)
        written = manifest.read_manifest(find_checkpoints(folder / "checkpoints")[-1])
        assert written.bf16 is (config.training.precision == "bf16")
        model = folder / "model"
        assert same_models(out, model), name
        # Neither the trained weights nor the frozen ones are rounded.
        for weights in model.glob("*/model.safetensors"):
            assert share_that_bf16_cannot_hold(weights) > 0.5, weights
        ours, theirs = (
            {p.relative_to(folder) for p in folder.rglob("*")} for folder in (out, model)
        )
        assert ours == theirs
        if config.student.freeze_embeddings:
            start = load_file(Path(config.student.path) / "model.safetensors")
            towers = [out / "student", out / "student" / "passage_tower"]
            for tower in towers[: 1 if config.student.tied else 2]:
                saved = load_file(tower / "model.safetensors")
                name = "embeddings.word_embeddings.weight"
                assert saved[name].equal(start[name])


def test_export_refuses_what_it_cannot_do(
    trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(trained))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    flip(find_checkpoints(checkpoints_of(trained))[-1] / "manifest.json", 20, 2)
    command = ("export-checkpoint", "--config", str(file))
    for options, problem in (
        ((), "no --out: name the folder to write"),
        (("--out", str(tmp_path / "taken")), "exists already"),
        (("--out", str(tmp_path / "x"), "--stage", "teacher"), "no checkpoint; train stage"),
        (("--out", str(tmp_path / "x"), "--student.late_interaction_dim", "8"),
         "is not in the model of this config"),
        (("--out", str(tmp_path / "x"), "--stages.cascade.weights.ce", "0",
          "--stages.cascade.weights.ce_to_li", "0", "--stages.cascade.weights.ce_to_de", "0",
          "--stages.cascade.weights.attention", "0"), "is not in the model of this config"),
    ):  # fmt: skip
        capsys.readouterr()
        assert main([*command, *options]) == 2
        assert problem in capsys.readouterr().err
    # The newest is damaged: the one before it is exported, and nothing is renamed.
    assert main([*command, "--out", str(tmp_path / "x")]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'x'}: stage cascade after 4 updates\n"
    assert "manifest.json is damaged" in shown.err
    assert len(find_checkpoints(checkpoints_of(trained))) == 3
    assert sorted(os.listdir(tmp_path / "x")) == ["student", "teacher"]
