"""The best checkpoint: measured on another split, kept beside the newest, exported."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.processes import losses_of, train_cascade
from support.tiny import ALL_TERMS, ConfigMaker

from erniesearch.cli import main
from erniesearch.config.keys import RunConfig
from erniesearch.config.stage_keys import LossWeights
from erniesearch.config.yaml_file import to_yaml
from erniesearch.stages import Stage
from erniesearch.training.checkpoints.checkpointer import find_best, find_checkpoints, step_of
from erniesearch.training.checkpoints.manifest import read_manifest
from erniesearch.training.validation import is_validated

pytestmark = pytest.mark.distributed
STEPS, EVERY = 12, 2


def figures_of(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "validation.jsonl").read_text().splitlines()]


def make(make_config: ConfigMaker, run_dir: Path, steps: int = STEPS, **changes: Any) -> RunConfig:
    changes = {"weights": replace(ALL_TERMS, dual_reg=0.0)} | changes
    # A learning rate at which the model falls apart after some updates: the best is not the last.
    return make_config(
        run_dir=run_dir, steps=steps, save_every=EVERY, keep_checkpoints=1, dropout=0.0,
        queries_per_rank=8, student_lr=0.05, validation_split="dev", validation_queries=20,
        **changes,
    )  # fmt: skip


def test_the_best_checkpoint_stays_and_is_exported(
    make_config: ConfigMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(make_config, tmp_path / "measured")
    stage = train_cascade(config, tmp_path)
    figures = figures_of(stage)
    assert [line["step"] for line in figures] == list(range(EVERY, STEPS + 1, EVERY))
    for line in figures:
        assert line["loss"] == pytest.approx(sum(line[term] for term in ("ce", "li", "de")))
    best = min(figures, key=lambda line: line["loss"])
    assert best["step"] < STEPS, "choose a learning rate at which the last is not the best"
    left = find_checkpoints(stage / "checkpoints")
    assert [step_of(path) for path in left] == [best["step"], STEPS]
    assert find_best(stage / "checkpoints") == left[0]
    assert read_manifest(left[0]).validation_loss == best["loss"]

    # Measuring changes nothing in the training.
    plain = replace(config, run_dir=str(tmp_path / "plain"))
    plain = replace(plain, training=replace(plain.training, validation_split=None))
    unmeasured = train_cascade(plain, tmp_path)
    assert losses_of(stage) == losses_of(unmeasured)
    assert not (unmeasured / "validation.jsonl").exists()

    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    arguments = ["export-checkpoint", "--config", str(file), "--stage", "cascade"]
    assert main([*arguments, "--best", "--out", str(tmp_path / "best")]) == 0
    assert f"after {best['step']} updates" in capsys.readouterr().out
    assert main([*arguments, "--out", str(tmp_path / "last")]) == 0
    name = "student/model.safetensors"
    last, kept = (load_file(tmp_path / folder / name) for folder in ("last", "best"))
    finished = load_file(stage / "model" / name)
    assert all(last[key].equal(finished[key]) for key in finished)
    assert not all(kept[key].equal(finished[key]) for key in finished)

    file.write_text(to_yaml(plain))
    assert main([*arguments, "--best", "--out", str(tmp_path / "none")]) == 2
    assert "no checkpoint was measured" in capsys.readouterr().err


def test_ranks_and_chunks_measure_the_same(make_config: ConfigMaker, tmp_path: Path) -> None:
    wanted = figures_of(train_cascade(make(make_config, tmp_path / "one", EVERY), tmp_path))[0]
    config = make(make_config, tmp_path / "two", EVERY, chunk_size=5, zero_stage=3)
    cascade = replace(config.stages.cascade, queries_per_rank=4)
    config = replace(config, stages=replace(config.stages, cascade=cascade))
    made = figures_of(train_cascade(config, tmp_path, world_size=2))[0]
    for term in ("loss", "ce", "li", "de"):
        assert made[term] == pytest.approx(wanted[term], rel=1e-3)


def test_what_is_measured(make_config: ConfigMaker) -> None:
    config = make_config(validation_split="dev")
    assert is_validated(Stage(config, "cascade"))
    assert not is_validated(Stage(make_config(), "cascade"))
    assert not is_validated(Stage(config, "post_train"))  # passages have no other split
    targets = make_config(validation_split="dev", weights=LossWeights(ce_to_de=1.0))
    assert not is_validated(Stage(targets, "cascade"))


def test_a_missing_split_is_told_before_anything_runs(
    make_config: ConfigMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(validation_split="nowhere")
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    assert main(["run", str(file)]) == 2
    assert "nowhere.tsv" in capsys.readouterr().err
    assert not (Path(config.run_dir) / "stages").exists()
