"""``load``: each thing that a training or a run leaves becomes what uses it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.finished_run import TEXTS, write_run
from support.tiny import ALL_TERMS

from erniesearch.errors import UserError
from erniesearch.export import export_all
from erniesearch.retrieval.retriever import PairScorer, Retriever
from erniesearch.search.load_result import load
from erniesearch.search.system import SearchSystem


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    export_all(write_run(folder, tiny_data, tiny_model, ALL_TERMS))
    return folder


def test_a_run_is_a_search_system(run_dir: Path) -> None:
    system = load(run_dir)
    assert isinstance(system, SearchSystem)
    assert system.models == ("dual_encoder", "late_interaction", "cross_encoder")
    smaller = load(str(run_dir), cross_encoder=False)
    assert isinstance(smaller, SearchSystem)
    assert "cross_encoder" not in smaller.models


def test_a_stages_model_and_its_exports_encode_alike(run_dir: Path) -> None:
    student = load(run_dir / "stages" / "cascade" / "model")
    dual, late = (load(run_dir / "exports" / kind) for kind in ("dual_encoder", "late_interaction"))
    assert isinstance(student, Retriever)
    assert isinstance(dual, Retriever)
    assert isinstance(late, Retriever)
    np.testing.assert_allclose(student.vectors(TEXTS, "query"), dual.vectors(TEXTS, "query"),
                               atol=1e-6)  # fmt: skip
    for one, other in zip(student.tokens(TEXTS, "passage"), late.tokens(TEXTS, "passage"),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)
    assert load(run_dir / "exports" / "dual_encoder", max_query_length=5).lengths["query"] == 5


def test_cross_encoders_score(run_dir: Path, tmp_path: Path) -> None:
    alone = tmp_path / "model"  # as the stage teacher leaves it
    shutil.copytree(run_dir / "stages" / "cascade" / "model" / "teacher", alone / "teacher")
    scorers = [load(folder, max_query_length=8, max_passage_length=16)
               for folder in (alone, run_dir / "exports" / "cross_encoder")]  # fmt: skip
    scores = []
    for scorer in scorers:
        assert isinstance(scorer, PairScorer)
        scores.append(scorer.scores([TEXTS[0]] * len(TEXTS), TEXTS))
    np.testing.assert_allclose(*scores, atol=1e-6)


def test_what_cannot_be_loaded_is_told(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "nowhere")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run_dir, unfinished)
    shutil.rmtree(unfinished / "index")
    with pytest.raises(UserError, match="the run has no index yet; finish it with"):
        load(unfinished)
