"""BM25 against its formula, and the hard negatives taken from it."""

import math
from collections import Counter

import numpy as np
import pytest
from conftest import WORDS

from erniesearch.data.bm25 import BM25, bm25_negatives
from erniesearch.errors import UserError

RNG = np.random.default_rng(0)
PASSAGES = [" ".join(RNG.choice(WORDS, size=RNG.integers(3, 20))) for _ in range(40)]
QUERIES = [" ".join(RNG.choice(WORDS, size=3, replace=False)) for _ in range(12)]


def formula(query: str, k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """Σ_w ln(1 + (N - df + 0.5) / (df + 0.5)) · tf / (tf + k1·(1 - b + b·length/mean length))."""
    documents = [Counter(text.split()) for text in PASSAGES]
    lengths = np.array([sum(document.values()) for document in documents])
    scores = np.zeros(len(documents))
    for word in query.split():
        frequency = np.array([document[word] for document in documents])
        df = int((frequency > 0).sum())
        idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
        scores += idf * frequency / (frequency + k1 * (1 - b + b * lengths / lengths.mean()))
    return scores


def test_scores_are_the_formulas() -> None:
    positions, scores = BM25(PASSAGES).search(QUERIES, 10)
    assert positions.shape == scores.shape == (12, 10)
    for query, row, row_scores in zip(QUERIES, positions, scores, strict=True):
        expected = formula(query)
        np.testing.assert_allclose(row_scores, expected[row], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(row_scores, np.sort(expected)[::-1][:10], rtol=1e-5, atol=1e-6)


def test_depth_is_at_most_the_corpus() -> None:
    positions, _ = BM25(["one text", "another text here"]).search(["text"], 100)
    assert sorted(positions[0]) == [0, 1]


def test_stemmer_joins_word_forms() -> None:
    passages = ["undoing the edits", "nothing of that kind"]
    for stemmer, expected in ((None, 0.0), ("english", 1.0)):
        _, scores = BM25(passages, stemmer).search(["undo edit"], 1)
        assert (scores[0, 0] > 0) == bool(expected)


def test_unknown_stemmer_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no Snowball stemmer 'klingon'; known: .*english"):
        BM25(PASSAGES, "klingon")


def test_negatives_are_the_best_passages_that_are_not_relevant() -> None:
    pids = [f"p{i}" for i in range(len(PASSAGES))]
    queries = {f"q{i}": text for i, text in enumerate(QUERIES)}
    # The best and the third best passage of each query are relevant.
    order = {qid: np.argsort(-formula(text), kind="stable") for qid, text in queries.items()}
    relevant = {qid: [pids[row[0]], pids[row[2]]] for qid, row in order.items()}
    negatives = bm25_negatives(queries, relevant, pids, PASSAGES, 5)
    assert list(negatives) == list(queries)
    for qid, found in negatives.items():
        scores = formula(queries[qid])
        assert not set(found) & set(relevant[qid])
        others = [i for i in range(len(pids)) if pids[i] not in relevant[qid] and scores[i] > 0]
        best = sorted((scores[i] for i in others), reverse=True)[:5]
        np.testing.assert_allclose([scores[int(pid[1:])] for pid in found], best, rtol=1e-5)


def test_passages_without_a_common_word_are_no_negatives() -> None:
    passages = ["red apple pie", "red brick wall", "blue ocean wave"]
    negatives = bm25_negatives({"q": "red apple"}, {"q": ["a"]}, ["a", "b", "c"], passages, 3)
    assert negatives == {"q": ["b"]}
