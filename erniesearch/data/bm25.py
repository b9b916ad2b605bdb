"""BM25 by bm25s: the lexical baseline, and the first hard negatives."""

from collections.abc import Sequence

import bm25s
import numpy as np
import Stemmer

from erniesearch.data.corpora import take
from erniesearch.errors import UserError


class BM25:
    """Lucene-style BM25 over a list of texts.

    Args:
        passages: the corpus.
        stemmer: name of a Snowball stemmer, or None.

    Raises:
        UserError: for an unknown stemmer.
    """

    def __init__(self, passages: Sequence[str], stemmer: str | None = None) -> None:
        self.stemmer = _stemmer(stemmer)
        self.size = len(passages)
        self.retriever = bm25s.BM25()
        self.retriever.index(self._tokenize(list(passages)), show_progress=False)

    def _tokenize(self, texts: list[str]) -> bm25s.tokenization.Tokenized:
        return bm25s.tokenize(texts, stopwords="en", stemmer=self.stemmer, show_progress=False)

    def search(self, queries: list[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and scores of the best passages, both ``[num_queries, min(depth, corpus)]``.

        A passage that shares no word with the query has score 0.
        """
        positions, scores = self.retriever.retrieve(
            self._tokenize(queries), k=min(depth, self.size), show_progress=False, n_threads=1
        )
        return positions.astype(np.int64), scores


def _stemmer(name: str | None) -> object:
    if name is None:
        return None
    try:
        return Stemmer.Stemmer(name)
    except KeyError:
        raise UserError(
            f"evaluation.bm25_stemmer: no Snowball stemmer '{name}'; known:"
            f" {', '.join(Stemmer.algorithms())}, or null"
        ) from None


def bm25_negatives(
    queries: dict[str, str],
    relevant: dict[str, list[str]],
    pids: Sequence[str],
    passages: Sequence[str],
    num_negatives: int,
    stemmer: str | None = None,
) -> dict[str, list[str]]:
    """Best BM25 passages of each query that its qrels do not call relevant, best first."""
    deepest = num_negatives + max(len(found) for found in relevant.values())
    qids = list(relevant)
    positions, scores = BM25(passages, stemmer).search([queries[q] for q in qids], deepest)
    negatives = {}
    for qid, row, row_scores in zip(qids, positions, scores, strict=True):
        found = take(pids, row[row_scores > 0])
        negatives[qid] = [pid for pid in found if pid not in relevant[qid]][:num_negatives]
    return negatives
