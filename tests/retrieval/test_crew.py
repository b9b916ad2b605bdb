"""Steps on two ranks: what they make is what one process makes, and errors reach rank 0."""

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.finished_run import write_student, write_teacher
from support.processes import SUPPORT, TWO_RANKS, run_python
from support.tiny import ALL_TERMS, ConfigMaker

from erniesearch.config.keys import RunConfig, TeacherConfig
from erniesearch.config.stage_keys import LossWeights, StageConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.data import text_format
from erniesearch.data.collection import load_beir
from erniesearch.data.corpus.tokens import PartStore
from erniesearch.retrieval import crew
from erniesearch.retrieval import retriever as retriever_module
from erniesearch.retrieval.retriever import StoredTokens
from erniesearch.retrieval.trained import make_retriever, make_scorer
from erniesearch.run_folder import RunFolder

pytestmark = pytest.mark.distributed
STEPS = ("teacher_check", "mine", "evaluate")


def trained(make_config: ConfigMaker, run_dir: Path) -> RunConfig:
    """A run whose stages have left their models, with everything that steps read."""
    config = make_config(run_dir=run_dir, weights=ALL_TERMS, negatives="mined", batch_size=4)
    one = StageConfig(steps=1, negatives="random")
    stages = replace(
        config.stages, interaction=replace(one, weights=LossWeights(li=1.0, de=1.0)),
        teacher=replace(one, weights=LossWeights(ce=1.0)),
        cascade=replace(config.stages.cascade, batch_size=None),
        mine=replace(config.stages.mine, depth=8, num_negatives=4),
        teacher_check=replace(config.stages.teacher_check, depth=6),
    )  # fmt: skip
    config = replace(
        config, stages=stages, evaluation=replace(config.evaluation, batch_size=4, rerank_depth=8)
    )
    folder = RunFolder(run_dir)
    for stage in ("interaction", "cascade"):
        write_student(folder.model(stage, "student"), config.student)
    for stage in ("teacher", "cascade"):
        write_teacher(folder.model(stage, "teacher"), Path(config.student.path))
    for stage in ("interaction", "teacher", "cascade"):
        line = {"step": 1, "loss": 1.0, "speed": {"seconds": 1.0}}
        (folder.stage(stage) / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (folder.root / "config.yaml").write_text(to_yaml(config))
    return config


def do_steps(config: RunConfig, *launcher: str) -> None:
    for step in STEPS:
        status, output = run_python(
            *launcher, "-m", "erniesearch.cli", "step", "--config",
            str(Path(config.run_dir) / "config.yaml"), "--name", step, "--world_size", "1",
        )  # fmt: skip
        assert status == 0, output[-6000:]


def close(ours: Any, theirs: Any) -> None:
    """Equal, numbers up to rounding."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            close(ours[key], theirs[key])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for own, other in zip(ours, theirs, strict=True):
            close(own, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=2e-5)
    else:
        assert ours == theirs


def made(config: RunConfig) -> dict[str, Any]:
    folder = RunFolder(config.run_dir)
    marks = {step: json.loads((folder.stage(step) / "done.json").read_text()) for step in STEPS}
    for mark in marks.values():
        mark.pop("fingerprint")
    lines = folder.negatives("mined").read_text().splitlines()
    report = json.loads((folder.root / "evaluation.json").read_text())
    return {
        "marks": marks, "negatives": [json.loads(line) for line in lines], "rows": report["rows"],
        "index": (folder.index / "docid").read_text(),
    }  # fmt: skip


def test_two_ranks_make_what_one_process_makes(make_config: ConfigMaker, tmp_path: Path) -> None:
    alone, together = (trained(make_config, tmp_path / name) for name in ("alone", "together"))
    do_steps(alone)
    do_steps(together, *TWO_RANKS)
    ours, theirs = made(together), made(alone)
    assert theirs["negatives"]
    assert "positive_scores" in theirs["negatives"][0]
    close(ours, theirs)


def test_an_error_of_any_rank_reaches_the_first(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = make_config(run_dir=tmp_path / "run")
    config = replace(config, evaluation=replace(config.evaluation, batch_size=4))
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    status, output = run_python(*TWO_RANKS, str(SUPPORT / "crew_worker.py"), str(file))
    assert status == 0, output[-6000:]
    assert (tmp_path / "run" / "told").read_text() == "no room on rank 1"


class Alone:
    """A crew whose ranks' shares go through the wire's format and are worked on here."""

    def __init__(self) -> None:
        self.connections = [None]
        self.sent: list[Any] = []

    def share(self, jobs: Sequence[crew.Job], own: Callable[..., Any]) -> list[Any]:
        jobs = pickle.loads(pickle.dumps(jobs))
        self.sent += [argument for job in jobs for argument in job.arguments]
        return [own(*job.arguments) for job in jobs]


def test_ranks_get_stored_tokens_and_tokenise_no_passage(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(batch_size=4)
    data = load_beir(config.data.path, "train")
    teacher = TeacherConfig(str(write_teacher(tmp_path / "teacher", Path(config.student.path))))
    retriever, scorer = make_retriever(config, config.student), make_scorer(config, teacher)
    texts, rows = list(data.passages), np.array([5, 0, 5, 59, *range(20)])
    queries = list(data.queries.values())[: len(rows)]
    wanted = retriever.vectors(texts, "passage"), retriever.tokens(texts, "passage")
    scores = scorer.scores(queries, [texts[row] for row in rows])

    ranks = Alone()
    monkeypatch.setattr(crew, "_crew", ranks)
    shared, pairs = make_retriever(config, config.student), make_scorer(config, teacher)
    stored = shared.passages(data.passages)
    assert isinstance(stored, StoredTokens)
    tokenised: list[str] = []
    real = text_format.encode_texts
    for module in (text_format, retriever_module):
        monkeypatch.setattr(
            module, "encode_texts", lambda *own: tokenised.extend(own[1]) or real(*own)
        )
    np.testing.assert_allclose(shared.vectors(stored, "passage"), wanted[0], atol=2e-6)
    for own, other in zip(shared.tokens(stored, "passage"), wanted[1], strict=True):
        torch.testing.assert_close(own, other, atol=1e-3, rtol=1e-3)
    made = pairs.scores(queries, pairs.passages(data.passages, rows))
    np.testing.assert_allclose(made, scores, atol=2e-6)
    assert tokenised
    assert not set(tokenised) & set(texts)
    given = [argument for argument in ranks.sent if isinstance(argument, StoredTokens)]
    assert len(given) == 6, "two ranks, three kinds of work"
    assert all(isinstance(tokens.store, PartStore) for tokens in given)
