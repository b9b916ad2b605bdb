"""Fixtures: a tiny data set in BEIR layout and tiny random models over its vocabulary."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from support.markers import asks_for_gpu
from support.tiny import ALL_TERMS, ConfigMaker, write_beir, write_model

from erniesearch.config.keys import (
    DataConfig,
    EvaluationConfig,
    ObjectiveConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from erniesearch.config.stage_keys import PostTrainConfig, StageConfig, StagesConfig

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """No test sees a GPU but those marked cuda, which run by themselves (``-m cuda``): several
    ranks would share it, and results would differ from a CPU's.

    Comes before anything asks for devices; started processes inherit it.
    """
    if not asks_for_gpu(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", accelerator)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked cuda are skipped where they see no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device, or no `-m cuda`"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cached corpora of the tests lie with the tests, also those of processes they start."""
    os.environ["ERNIESEARCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_rank_is_left() -> Iterator[None]:
    """What names this process's rank ends with the test: processes that later tests start would
    take themselves for the same one, and meet where it listens."""
    before = {name: os.environ.get(name) for name in LAUNCHER}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in BEIR layout."""
    return write_beir(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer BERT."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_config(tmp_path: Path, tiny_data: Path, tiny_model: Path) -> ConfigMaker:
    """A config of one stage on the tiny data: ``make_config(stage="cascade", steps=5, …)``; other
    keywords are fields of the stage, ``training``, ``objective``, ``student`` or ``data``."""

    def make(stage: str = "cascade", run_dir: Path | None = None, **changes: Any) -> RunConfig:
        config = RunConfig(
            run_dir=str(run_dir or tmp_path / "run"),
            data=DataConfig(str(tiny_data), max_query_length=8, max_passage_length=16),
            student=StudentConfig(str(tiny_model), late_interaction_dim=16),
            objective=ObjectiveConfig(tau_de=1.0),
            training=TrainingConfig(save_every=0, precision="fp32"),  # on any processor
            stages=StagesConfig(),
            evaluation=EvaluationConfig(rerank_depth=10),
        )
        if "dropout" in changes:  # of both models
            config = replace(config, teacher=TeacherConfig(dropout=changes["dropout"]))
        for part in ("training", "objective", "student", "data", "evaluation"):
            values = getattr(config, part)
            own = {k: changes.pop(k) for k in list(changes) if hasattr(values, k)}
            config = replace(config, **{part: replace(values, **own)})
        settings = {
            "steps": 4, "queries_per_rank": 4, "warmup_ratio": 0.0, "schedule": "constant",
            "student_lr": 1e-3, "head_lr": 1e-3, "weights": ALL_TERMS,
        }  # fmt: skip
        if stage != "post_train":
            settings |= {"num_negatives": 2, "negatives": "random", "teacher_lr": 1e-3}
        kind = PostTrainConfig if stage == "post_train" else StageConfig
        stages = replace(config.stages, **{stage: kind(**(settings | changes))})
        return replace(config, stages=stages)

    return make
