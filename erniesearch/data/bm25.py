"""BM25 by bm25s: the lexical baseline, and the first hard negatives."""

import importlib
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, Literal

import numpy as np
import regex
import Stemmer

from erniesearch.data.corpus.texts import take
from erniesearch.errors import UserError
from erniesearch.progress import metered, waiting


def _bm25s_without_jax() -> Any:
    """bm25s. Where JAX is installed it runs it once on import (bm25s/selection.py, 0.3), and JAX
    then holds three quarters of the GPU's memory for as long as the process lives."""
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    held = {"jax.lax": modules["jax.lax"]} if "jax.lax" in modules else {}
    modules["jax.lax"] = None  # makes `import jax.lax` an ImportError
    try:
        return importlib.import_module("bm25s")
    finally:
        del modules["jax.lax"]
        modules.update(held)


bm25s = _bm25s_without_jax()
Tokenizer = Literal["words", "code", "jieba"]
BLOCK = 256
"""Queries searched at a time."""
# HTTP|Server, parse|Int, conv|2|d; letters without case (Chinese, say) stay together.
IDENTIFIER_PARTS = regex.compile(r"\p{Lu}+(?!\p{Ll})|\p{Lu}?\p{Ll}+|[\p{Lo}\p{Lm}]+|\p{Nd}+")


class BM25:
    """Lucene-style BM25 over a list of texts.

    Args:
        passages: the corpus.
        stemmer: name of a Snowball stemmer, or None.
        tokenizer: "words" splits at everything that is no letter or digit, drops words of one
            character and English stop words; "code" splits identifiers too, at underscores,
            changes of case and digits, and drops English stop words; "jieba" segments Chinese and
            drops punctuation only, since the weights of frequent words are small anyway.

    Raises:
        UserError: for an unknown stemmer, or if the segmenter is not installed.
    """

    def __init__(
        self, passages: Sequence[str], stemmer: str | None = None, tokenizer: Tokenizer = "words"
    ) -> None:
        check_analyzer(stemmer, tokenizer)
        self.stemmer = _stemmer(stemmer)
        self.tokenizer = tokenizer
        self.size = len(passages)
        self.retriever = bm25s.BM25()
        read = metered(passages, "BM25, splitting passages", "passages", len(passages))
        words = self._tokenize(read)
        with waiting("BM25, weighing words"):
            self.retriever.index(words, show_progress=False)

    def _tokenize(self, texts: Iterable[str]) -> Any:
        if self.tokenizer == "words":
            return bm25s.tokenize(texts, stopwords="en", stemmer=self.stemmer, show_progress=False)
        split, stopwords = (
            (_segment, None) if self.tokenizer == "jieba" else (split_identifiers, "en")
        )
        return bm25s.tokenize(
            map(split, texts), token_pattern=r"\S+", stopwords=stopwords,
            stemmer=self.stemmer, show_progress=False,
        )  # fmt: skip

    def search(self, queries: list[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and scores of the best passages, both ``[num_queries, min(depth, corpus)]``.

        A passage that shares no word with the query has score 0.
        """
        depth, blocks = min(depth, self.size), range(0, max(1, len(queries)), BLOCK)
        found = [
            self.retriever.retrieve(
                self._tokenize(queries[start : start + BLOCK]), k=depth, show_progress=False,
                n_threads=1,
            )
            for start in metered(blocks, "BM25, searching", "queries", len(queries), BLOCK)
        ]  # fmt: skip
        positions, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return positions.astype(np.int64), scores


def check_analyzer(stemmer: str | None, tokenizer: Tokenizer) -> None:
    """Whether both are there; asked before anything is trained.

    Raises:
        UserError: for an unknown stemmer, or if the segmenter is not installed.
    """
    _stemmer(stemmer)
    if tokenizer == "jieba":
        try:
            importlib.import_module("rjieba")
        except ImportError:
            raise UserError(
                "evaluation.bm25_tokenizer: jieba needs the package rjieba: pip install rjieba"
            ) from None


def split_identifiers(text: str) -> str:
    """The words of prose and of code between spaces, punctuation left out.

    ``parseHTTPResponse_v2`` becomes ``parse HTTP Response v 2``. Like Lucene's
    WordDelimiterGraphFilter without the original; its limits are the same (``URLs``: ``UR Ls``).
    """
    return " ".join(IDENTIFIER_PARTS.findall(text))


def _segment(text: str) -> str:
    """Words between spaces, punctuation left out."""
    import rjieba

    return " ".join(w for w in rjieba.cut(text) if any(map(str.isalnum, w)))


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
    tokenizer: Tokenizer = "words",
) -> dict[str, list[str]]:
    """Best BM25 passages of each query that its qrels do not call relevant, best first."""
    deepest = num_negatives + max(len(found) for found in relevant.values())
    qids = list(relevant)
    bm25 = BM25(passages, stemmer, tokenizer)
    positions, scores = bm25.search([queries[q] for q in qids], deepest)
    negatives = {}
    for qid, row, row_scores in zip(qids, positions, scores, strict=True):
        found = take(pids, row[row_scores > 0])
        negatives[qid] = [pid for pid in found if pid not in relevant[qid]][:num_negatives]
    return negatives
