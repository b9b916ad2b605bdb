"""What a data set holds, and what in it will hurt: lengths, copies, splits that share queries."""

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from erniesearch.data.collection import RetrievalData, load_beir, with_split
from erniesearch.data.corpus.texts import hash_text
from erniesearch.data.corpus.tokens import open_tokens
from erniesearch.data.negatives import read_negatives
from erniesearch.errors import UserError
from erniesearch.progress import metered

PERCENTILES = (0, 50, 90, 95, 99, 100)
LIMITS = (64, 128, 256, 512)
"""Token limits whose share of truncated passages is told."""
SHOWN = 5


def check(
    root: Path, use_titles: bool = True, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Facts about a folder in BEIR layout, for JSON.

    ``tokens`` are given with a tokenizer and count special tokens; ``same_text`` counts passages
    whose text (by a 64-bit hash) came before, under another id.

    Raises:
        UserError: for whatever :func:`load_beir` refuses, in any split, and for odd negatives.
    """
    splits = sorted(path.stem for path in root.glob("qrels/*.tsv"))
    if not splits:
        raise UserError(f"{root / 'qrels'}: no SPLIT.tsv")
    data = load_beir(root, splits[0], use_titles)
    by_split = {split: with_split(data, root, split) for split in splits}
    judged = {qid for part in by_split.values() for qid in part.qrels}
    facts: dict[str, Any] = {
        "passages": _passages(data),
        "queries": {
            "number": len(data.queries),
            "characters": percentiles(map(len, data.queries.values())),
            "not_judged": len(data.queries.keys() - judged),
            "same_text": len(data.queries) - len(set(data.queries.values())),
        },
        "splits": {split: _split(part) for split, part in by_split.items()},
        "shared": _shared(by_split),
    }
    if tokenizer is not None:
        facts["passages"] |= _tokens(data, tokenizer)
    if (path := root / "negatives.jsonl").is_file():
        negatives = read_negatives(path, data)
        facts["negatives"] = {
            "queries": len(negatives), "per_query": percentiles(map(len, negatives.values())),
        }  # fmt: skip
    return facts


def percentiles(values: Iterable[int]) -> dict[str, int]:
    """Smallest, median, 90th, 95th, 99th percentile, largest."""
    found = np.percentile(np.fromiter(values, np.int64), PERCENTILES, method="nearest")
    names = ("least", *(f"p{p}" for p in PERCENTILES[1:-1]), "most")
    return dict(zip(names, found.astype(int).tolist(), strict=True))


def _passages(data: RetrievalData) -> dict[str, Any]:
    lengths = np.empty(len(data.passages), np.int64)
    hashes = np.empty(len(data.passages), np.uint64)
    read = metered(data.passages, "reading passages", "passages", len(data.passages))
    for row, text in enumerate(read):
        lengths[row], hashes[row] = len(text), hash_text(text)
    order = np.argsort(hashes, kind="stable")
    repeats = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    first = [[data.pids[int(order[i])], data.pids[int(order[i + 1])]] for i in repeats[:SHOWN]]
    return {
        "number": len(lengths), "characters": percentiles(lengths),
        "empty": int((lengths == 0).sum()),
        "same_text": {"number": len(repeats), "first": first},
    }  # fmt: skip


def _tokens(data: RetrievalData, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    store = open_tokens(data.passages, tokenizer)
    lengths = store.lengths + len(store.special.prefix) + len(store.special.suffix)
    return {
        "tokens": percentiles(lengths),
        "truncated": {str(limit): float((lengths > limit).mean()) for limit in LIMITS},
    }


def _split(data: RetrievalData) -> dict[str, Any]:
    relevant = data.relevant()
    return {
        "queries": len(data.qrels), "judgements": sum(map(len, data.qrels.values())),
        "without_relevant": len(data.qrels) - len(relevant),
        "relevant_per_query": percentiles(map(len, relevant.values())),
    }  # fmt: skip


def _shared(by_split: dict[str, RetrievalData]) -> dict[str, int]:
    """Queries that two splits have in common, by their text."""
    texts = {split: {part.queries[qid] for qid in part.qrels} for split, part in by_split.items()}
    return {f"{a}, {b}": len(texts[a] & texts[b]) for a, b in combinations(texts, 2)}
