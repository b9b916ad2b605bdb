"""Late interaction's vectors of a corpus on disk: what encoding gives, used in its place."""

from pathlib import Path

import pytest
import torch
from support.finished_run import retriever_of, write_run, write_student
from support.tiny import ALL_TERMS, write_beir

from erniesearch.config.keys import RunConfig
from erniesearch.data.collection import RetrievalData, load_beir
from erniesearch.errors import UserError
from erniesearch.retrieval import ranking
from erniesearch.retrieval.retriever import Retriever
from erniesearch.retrieval.token_vectors import TokenVectors, store_token_vectors
from erniesearch.run_folder import RunFolder
from erniesearch.search.system import SearchSystem

ENOUGH = 1e9


@pytest.fixture
def config(tmp_path: Path, tiny_data: Path, tiny_model: Path) -> RunConfig:
    return write_run(tmp_path / "run", tiny_data, tiny_model, ALL_TERMS)


@pytest.fixture
def data(tiny_data: Path) -> RetrievalData:
    return load_beir(tiny_data, "test")


def store(
    config: RunConfig, retriever: Retriever | None = None, most: float = ENOUGH
) -> str | None:
    folder = RunFolder(config.run_dir).token_vectors
    return store_token_vectors(
        retriever or retriever_of(config), Path(config.data.path), True, folder, most
    )


def changes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_they_are_the_models(
    config: RunConfig, data: RetrievalData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In shards that cut through the corpus, in any order, a passage twice."""
    monkeypatch.setattr(
        "erniesearch.retrieval.token_vectors.SHARD_SIZES", {"vectors": 7, "tokens": 7}
    )
    assert store(config) is None
    folder = RunFolder(config.run_dir).token_vectors
    assert len(list(folder.glob("*.safetensors"))) == 9  # 60 passages
    found = TokenVectors(folder, data.index_of)
    pids = [data.pids[row] for row in (59, 0, 7, 6, 8, 7)]
    expected = retriever_of(config).tokens(
        [data.passages[data.index_of[p]] for p in pids], "passage"
    )
    assert {len(tokens) for tokens in expected} != {16}  # of several lengths
    for ours, theirs in zip(found(pids), expected, strict=True):
        assert ours.dtype == torch.float16
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_reranking_encodes_no_passage(
    config: RunConfig, data: RetrievalData, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(config)
    stored = TokenVectors(RunFolder(config.run_dir).token_vectors, data.index_of)
    retriever = retriever_of(config)
    run = {qid: {pid: float(-i) for i, pid in enumerate(data.pids[:20])} for qid in data.qrels}
    expected = ranking.rerank_late_interaction(retriever, data, run, 10)
    whole = retriever.tokens

    def queries_alone(texts: list[str], side: str) -> list[torch.Tensor]:
        assert side == "query"
        return whole(texts, "query")

    monkeypatch.setattr(retriever, "tokens", queries_alone)
    found = ranking.rerank_late_interaction(retriever, data, run, 10, stored)
    for qid, scores in expected.items():
        assert found[qid] == pytest.approx(scores, abs=2e-2)


def test_a_run_is_searched_with_them(config: RunConfig) -> None:
    system = SearchSystem.from_run(config.run_dir)
    expected = system.search("baran desel fitor", late_interaction_depth=30)
    assert system.token_vectors is None
    store(config)
    system = SearchSystem.from_run(config.run_dir)
    assert system.token_vectors is not None
    found = system.search("baran desel fitor", late_interaction_depth=30)
    scores = {hit.pid: hit.scores["late_interaction"] for hit in expected.hits}
    assert {hit.pid: hit.scores["late_interaction"] for hit in found.hits} == pytest.approx(
        scores, abs=2e-2
    )


def test_the_same_are_kept_and_others_replaced(config: RunConfig, data: RetrievalData) -> None:
    folder = RunFolder(config.run_dir).token_vectors
    store(config)
    before = changes(folder)
    store(config)
    assert changes(folder) == before
    write_student(RunFolder(config.run_dir).model("cascade", "student"), config.student)
    retriever = retriever_of(config)
    store(config, retriever)
    (found,) = TokenVectors(folder, data.index_of)([data.pids[3]])
    (expected,) = retriever.tokens([data.passages[3]], "passage")
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_what_is_too_large_is_not_stored(config: RunConfig) -> None:
    folder = RunFolder(config.run_dir).token_vectors
    assert store(config) is None
    (file,) = folder.glob("*.safetensors")
    size = file.stat().st_size
    reason = store(config, most=size / 2)
    assert reason is not None
    assert "evaluation.token_vectors_gib" in reason
    assert not folder.exists()
    assert store(config, most=size) is None  # the estimate is not above what there is


def test_those_of_another_corpus_are_refused(config: RunConfig, tmp_path: Path) -> None:
    store(config)
    other = load_beir(write_beir(tmp_path / "other", num_passages=61), "test")
    with pytest.raises(UserError, match="of 60 passages, but the collection has 61: evaluate"):
        TokenVectors(RunFolder(config.run_dir).token_vectors, other.index_of)
