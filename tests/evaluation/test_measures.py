"""Metrics, subsets, dense search and reranking, each against a plain computation."""

import math
from dataclasses import replace
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import torch
from ir_measures import RR, R, nDCG
from support.rankings import random_run

from erniesearch.config.keys import EvaluationConfig, StudentConfig
from erniesearch.data.collection import RetrievalData, Run, load_beir
from erniesearch.data.trec import write_trec_run
from erniesearch.errors import UserError
from erniesearch.evaluation.measures import (
    bm25_run,
    estimate,
    evaluation_subset,
    per_query_metrics,
)
from erniesearch.retrieval import ranking
from erniesearch.retrieval.retriever import PairScorer, Retriever
from erniesearch.retrieval.vector_index import VectorIndex

Qrels = dict[str, dict[str, int]]


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_ir_measures_on_the_written_run(seed: int, tmp_path: Path) -> None:
    run, qrels = random_run(seed)
    path = tmp_path / "system.trec"
    write_trec_run(path, run, "system")
    ours = per_query_metrics(run, qrels)
    measures = {"MRR@10": RR @ 10, "nDCG@10": nDCG @ 10, "R@10": R @ 10, "R@100": R @ 100}
    assert list(ours) == list(measures)
    written = list(ir_measures.read_trec_run(str(path)))
    judged = [
        ir_measures.Qrel(qid, pid, grade)
        for qid, grades in qrels.items()
        for pid, grade in grades.items()
    ]
    expected = {(name, qid): 0.0 for name in measures for qid in qrels}
    for found in ir_measures.iter_calc(list(measures.values()), judged, written):
        name = next(name for name, measure in measures.items() if measure == found.measure)
        expected[name, found.query_id] = found.value
    for name, values in ours.items():
        assert values.tolist() == [expected[name, qid] for qid in qrels]
        assert values.std() > 0
        assert values[list(qrels).index("q7")] == 0.0


def test_metrics_by_hand() -> None:
    run = {
        "a": {"x": 3.0, "y": 2.0, "z": 1.0},
        "b": {f"n{i}": float(-i) for i in range(11)} | {"late": -10.5},
        "unjudged": {"x": 1.0},
    }
    values = per_query_metrics(
        run, {"a": {"y": 1, "elsewhere": 1}, "b": {"late": 1}, "c": {"x": 1}}
    )
    assert values["MRR@10"].tolist() == [0.5, 0.0, 0.0]  # rank 2; rank 12; no results
    assert values["R@10"].tolist() == [0.5, 0.0, 0.0]
    assert values["R@100"].tolist() == [0.5, 1.0, 0.0]
    gain = (1 / math.log2(3)) / (1 + 1 / math.log2(3))
    assert values["nDCG@10"] == pytest.approx([gain, 0.0, 0.0])


def test_bootstrap_repeats_contains_the_mean_and_narrows() -> None:
    values = np.random.default_rng(1).random(400)
    first = estimate(values, seed=3)
    assert first == estimate(values, seed=3)
    assert first != estimate(values, seed=4)
    assert first.mean == pytest.approx(values.mean())
    assert first.low < first.mean < first.high
    half_width = 1.96 * values.std() / math.sqrt(len(values))
    assert first.high - first.low == pytest.approx(2 * half_width, rel=0.1)
    narrow = estimate(np.tile(values, 4), seed=3)
    assert narrow.high - narrow.low == pytest.approx(half_width, rel=0.15)
    constant = estimate(np.full(5, 0.25), seed=0)
    assert (constant.low, constant.mean, constant.high) == (0.25, 0.25, 0.25)


# --- what is searched ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tiny_data: Path) -> RetrievalData:
    return load_beir(tiny_data, "test")


def test_subset_honours_its_sizes(data: RetrievalData) -> None:
    settings = EvaluationConfig(max_queries=7, num_distractors=11)
    subset = evaluation_subset(data, settings, seed=1)
    assert len(subset.queries) == len(subset.qrels) == 7
    relevant = {pid for grades in subset.qrels.values() for pid in grades}
    assert relevant <= set(subset.pids)
    assert len(subset.pids) == len(relevant) + 11
    assert subset.passages == [data.passages[data.index_of[pid]] for pid in subset.pids]
    assert subset.pids == sorted(subset.pids, key=data.pids.index)
    assert subset == evaluation_subset(data, settings, seed=1)
    assert subset.queries != evaluation_subset(data, settings, seed=2).queries


def test_subset_of_everything_is_the_collection(data: RetrievalData) -> None:
    assert evaluation_subset(data, EvaluationConfig(), seed=1) == data
    assert evaluation_subset(data, EvaluationConfig(max_queries=10_000), seed=1) == data


def test_subset_leaves_out_queries_without_a_relevant_passage(data: RetrievalData) -> None:
    first, *_ = data.qrels
    grades = dict.fromkeys(data.qrels[first], 0)
    subset = evaluation_subset(
        replace(data, qrels=data.qrels | {first: grades}), EvaluationConfig(), seed=1
    )
    assert first not in subset.qrels
    assert len(subset.qrels) == len(data.qrels) - 1


def test_more_distractors_than_passages_are_refused(data: RetrievalData) -> None:
    judged = {pid for grades in data.qrels.values() for pid in grades}
    most = len(data.pids) - len(judged)
    whole = evaluation_subset(data, EvaluationConfig(num_distractors=most), seed=1)
    assert whole.pids == list(data.pids)
    assert evaluation_subset(data, EvaluationConfig(), seed=1).passages is data.passages  # no copy
    with pytest.raises(UserError, match=rf"num_distractors is {most + 1}, the corpus has {most} "):
        evaluation_subset(data, EvaluationConfig(num_distractors=most + 1), seed=1)


def test_bm25_run_leaves_out_passages_without_a_common_word(data: RetrievalData) -> None:
    run = bm25_run(data, 100, None)
    assert list(run) == list(data.queries)
    for qid, scores in run.items():
        words = set(data.queries[qid].split())
        sharing = [p for p in data.pids if words & set(data.passages[data.index_of[p]].split())]
        assert set(scores) == set(sharing)
        assert all(score > 0 for score in scores.values())


# --- search and rerank --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def retriever(tiny_model: Path) -> Retriever:
    settings = StudentConfig(str(tiny_model), pooling="mean", late_interaction_dim=16)
    return Retriever(settings, 8, 16, batch_size=7, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def dense(retriever: Retriever, data: RetrievalData) -> Run:
    index = VectorIndex.build(retriever.vectors(data.passages, "passage"), data.pids)
    return ranking.dense_run(retriever, index, data.queries, 20)


def test_vectors_do_not_depend_on_the_batch(retriever: Retriever, data: RetrievalData) -> None:
    together = retriever.vectors(data.passages[:10], "passage")
    alone = np.concatenate([retriever.vectors([text], "passage") for text in data.passages[:10]])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_dense_run_is_the_best_inner_products(
    retriever: Retriever, data: RetrievalData, dense: Run
) -> None:
    passages = retriever.vectors(data.passages, "passage")
    queries = retriever.vectors(list(data.queries.values()), "query")
    assert list(dense) == list(data.queries)
    for row, scores in zip(queries @ passages.T, dense.values(), strict=True):
        assert len(scores) == 20
        assert list(scores.values()) == pytest.approx(np.sort(row)[::-1][:20].tolist(), rel=1e-4)
        for pid, score in scores.items():
            assert score == pytest.approx(row[data.index_of[pid]], rel=1e-4)


def test_index_survives_saving(
    retriever: Retriever, data: RetrievalData, dense: Run, tmp_path: Path
) -> None:
    VectorIndex.build(retriever.vectors(data.passages, "passage"), data.pids).save(tmp_path / "i")
    index = VectorIndex.load(tmp_path / "i")
    assert ranking.dense_run(retriever, index, data.queries, 20) == dense
    (tmp_path / "i" / "docid").write_text("p0\n")
    with pytest.raises(UserError, match="60 vectors but 1 ids"):
        VectorIndex.load(tmp_path / "i")
    (tmp_path / "i" / "docid").unlink()
    with pytest.raises(UserError, match="no file 'docid'"):
        VectorIndex.load(tmp_path / "i")


def assert_reranked(run: Run, old: Run, depth: int, scores: dict[str, dict[str, float]]) -> None:
    """The old run's top ``depth`` ordered by ``scores``, the rest below in the old order."""
    assert list(run) == list(old)
    for qid, found in run.items():
        before, after = ranking.top(old[qid], len(old[qid])), ranking.top(found, len(found))
        assert set(after[:depth]) == set(before[:depth])
        assert after[depth:] == before[depth:]
        new = scores[qid]
        assert [found[pid] for pid in after[:depth]] == pytest.approx(
            sorted((new[pid] for pid in before[:depth]), reverse=True), rel=1e-3
        )


def test_late_interaction_reranks_by_maxsim(
    retriever: Retriever, data: RetrievalData, dense: Run
) -> None:
    reranked = ranking.rerank_late_interaction(retriever, data, dense, 6)
    passages = dict(zip(data.pids, retriever.tokens(data.passages, "passage"), strict=True))
    queries = retriever.tokens(list(data.queries.values()), "query")
    maxsim = {
        qid: {
            pid: float((query.float() @ tokens.float().T).max(1).values.sum())
            for pid, tokens in passages.items()
        }
        for qid, query in zip(data.queries, queries, strict=True)
    }
    assert_reranked(reranked, dense, 6, maxsim)
    assert any(
        ranking.top(reranked[qid], 6) != ranking.top(dense[qid], 6) for qid in dense
    )  # it does change the order


class LengthScorer(PairScorer):
    """A teacher that likes long passages, of any sign."""

    reads_stored_tokens = False

    def __init__(self) -> None:
        self.num_pairs = 0

    def scores(self, queries: list[str], passages: list[str]) -> np.ndarray:
        self.num_pairs += len(queries)
        return np.array([len(passage) - 60.0 for passage in passages], dtype=np.float32)


@pytest.mark.parametrize("depth", [1, 6, 20, 100])
def test_cross_encoder_reranks_only_the_top(data: RetrievalData, dense: Run, depth: int) -> None:
    scorer = LengthScorer()
    reranked = ranking.rerank_cross_encoder(scorer, data, dense, depth)
    lengths = {pid: len(text) - 60.0 for pid, text in zip(data.pids, data.passages, strict=True)}
    assert_reranked(reranked, dense, min(depth, 20), dict.fromkeys(dense, lengths))
    assert scorer.num_pairs == len(dense) * min(depth, 20)


def test_a_query_without_candidates_stays_empty(data: RetrievalData, dense: Run) -> None:
    first, *_ = dense
    reranked = ranking.rerank_cross_encoder(LengthScorer(), data, dense | {first: {}}, 5)
    assert reranked[first] == {}
