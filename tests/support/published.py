"""Scores of a late-interaction model, text by text."""

import string

import numpy as np
import torch
from support.tiny import WORDS

from erniesearch.models.encoder import Side
from erniesearch.retrieval.retriever import Retriever

WITH_MARKS = [*WORDS, *string.punctuation, "query", "passage", "[unused0]", "[unused1]"]
"""A vocabulary in which punctuation and the usual prompts are words."""


def token_vectors(retriever: Retriever, texts: list[str], side: Side) -> list[torch.Tensor]:
    """Each text's, in fp32."""
    out: dict[int, torch.Tensor] = {}
    for positions, batch in retriever.token_batches(texts, side):
        out |= dict(zip(positions.tolist(), batch, strict=True))
    return [out[i] for i in range(len(texts))]


def max_sims(retriever: Retriever, queries: list[str], passages: list[str]) -> np.ndarray:
    """Sum over a query's tokens of the best similarity, ``[queries, passages]``."""
    found = token_vectors(retriever, passages, "passage")
    return np.array([
        [float((query @ passage.T).max(1).values.sum()) for passage in found]
        for query in token_vectors(retriever, queries, "query")
    ])  # fmt: skip
