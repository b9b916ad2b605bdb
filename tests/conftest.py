"""Fixtures: a tiny data set in BEIR layout and tiny random models over its vocabulary."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from _pytest.mark.expression import Expression
from transformers import BertConfig, BertModel, BertTokenizer

from erniesearch.config.keys import (
    DataConfig,
    EvaluationConfig,
    LossWeights,
    ObjectiveConfig,
    RunConfig,
    StageConfig,
    StagesConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
WORDS = [a + b for a in ("ba", "de", "fi", "go", "ku", "la", "mi", "no") for b in
         ("ran", "sel", "tor", "vix", "wen", "zul", "pat", "hod")]  # fmt: skip
ALL_TERMS = LossWeights(
    ce=1.0, li=1.0, de=1.0, ce_to_li=1.0, ce_to_de=1.0, li_to_de=1.0, attention=1.0, dual_reg=1.0
)
WITH_VIRT = replace(ALL_TERMS, virt=1.0)


def write_beir(root: Path, num_passages: int = 60, num_queries: int = 40, seed: int = 0) -> Path:
    """A data set in which a query's words come from its passage; passages differ in length, and
    several queries share a passage."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    passages = [list(rng.choice(WORDS, size=rng.integers(4, 14))) for _ in range(num_passages)]
    (root / "corpus.jsonl").write_text(
        "".join(
            json.dumps({"_id": f"p{i}", "title": "", "text": " ".join(words)}) + "\n"
            for i, words in enumerate(passages)
        )
    )
    positives = [int(i) for i in rng.integers(num_passages, size=num_queries)]
    (root / "queries.jsonl").write_text(
        "".join(
            json.dumps({"_id": f"q{i}", "text": " ".join(rng.choice(passages[p], size=3))}) + "\n"
            for i, p in enumerate(positives)
        )
    )
    (root / "qrels").mkdir(exist_ok=True)
    for split in ("train", "dev", "test"):
        lines = "".join(f"q{i}\tp{p}\t1\n" for i, p in enumerate(positives))
        (root / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return root


def write_model(folder: Path, seed: int = 0, words: list[str] | None = None, **sizes: Any) -> Path:
    """A random BERT over the data set's words."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(words or WORDS)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary), **({"hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64} | sizes),
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def asks_for_gpu(markers: str) -> bool:
    """Whether an expression given to ``-m`` selects tests by the marker ``cuda``."""
    if not markers:
        return False
    selected = Expression.compile(markers)
    return selected.evaluate(lambda name, **_: name == "cuda") and not selected.evaluate(
        lambda name, **_: False
    )


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


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in BEIR layout."""
    return write_beir(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer BERT."""
    return write_model(tmp_path_factory.mktemp("model"))


ConfigMaker = Callable[..., RunConfig]


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
            training=TrainingConfig(save_every=0),
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
            "steps": 4, "queries_per_rank": 4, "num_negatives": 2, "negatives": "random",
            "warmup_ratio": 0.0, "schedule": "constant", "student_lr": 1e-3, "head_lr": 1e-3,
            "teacher_lr": 1e-3, "weights": ALL_TERMS,
        } | changes  # fmt: skip
        stages = replace(config.stages, **{stage: StageConfig(**settings)})
        return replace(config, stages=stages)

    return make


def start(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    """A Python process that sees this checkout, one thread, output captured.

    Ctrl-C reaches it even where these tests run in a shell's background, which ignores it.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")])
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=cwd or ROOT, env=variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def run_python(*arguments: str, timeout: float = 300, **environment: str) -> tuple[int, str]:
    """Run to the end; returns exit status and output."""
    process = start(*arguments, **environment)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def losses_of(stage_folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the machine's speed."""
    lines = [json.loads(x) for x in (stage_folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "speed"} for line in lines]
