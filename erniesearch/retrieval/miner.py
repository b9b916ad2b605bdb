"""Hard negatives by the current dual-encoder, denoised by the teacher.

A candidate that the teacher scores above the positive (minus a margin) is more likely an
unlabelled answer than a negative (RocketQA's denoising, with the positive as the threshold, since
a listwise-trained teacher's scores have no absolute scale; a teacher that has one can be given an
absolute threshold too). A candidate with a positive's text under another id is no negative either.
"""

import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from erniesearch.config.stage_keys import MineConfig
from erniesearch.data.collection import RetrievalData
from erniesearch.data.corpus.texts import rows_of, take
from erniesearch.data.negatives import negatives_line
from erniesearch.errors import UserError
from erniesearch.progress import Meter
from erniesearch.retrieval.first_stage import Index, retrieve
from erniesearch.retrieval.retriever import PairScorer, Retriever
from erniesearch.retrieval.vector_index import SearchOn, VectorIndex

QUERIES_PER_BLOCK = 1024
"""Queries searched and denoised at a time; memory does not depend on how many there are."""
SPARE = 8
"""Candidates retrieved beyond the depth, in place of copies of the positive."""


@dataclass(frozen=True)
class MinedQuery:
    """What was found for one query, hardest first, and what was dropped.

    ``scores`` are the index's of ``negatives``, ``positive_scores`` those of the relevant
    passages that the search found; the teacher's are empty if it was not asked, and otherwise
    parallel to ``negatives`` and ``positives``, and those of what it dropped.
    """

    qid: str
    positives: list[str]
    negatives: list[str]
    scores: list[float]
    positive_scores: list[float]
    num_candidates: int
    num_duplicates: int
    num_denoised: int = 0
    teacher_scores: list[float] = field(default_factory=list)
    teacher_positive_scores: list[float] = field(default_factory=list)
    teacher_dropped_scores: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Mined:
    """The queries in the order of the qrels."""

    queries: list[MinedQuery]

    @property
    def negatives(self) -> dict[str, list[str]]:
        """Negatives by query, hardest first."""
        return {query.qid: query.negatives for query in self.queries}

    @property
    def num_candidates(self) -> int:
        """Candidates in the window, relevant passages and their copies left out."""
        return sum(query.num_candidates for query in self.queries)

    @property
    def num_denoised(self) -> int:
        """Candidates that the teacher dropped."""
        return sum(query.num_denoised for query in self.queries)


def mined_line(query: MinedQuery, with_scores: bool) -> str:
    """As :func:`negatives_line`, with the teacher's scores or without."""
    scores = (query.teacher_positive_scores, query.teacher_scores) if with_scores else None
    return negatives_line(query.qid, query.positives, query.negatives, scores)


def statistics(
    queries: Iterable[MinedQuery],
    searched_by: Literal["dual_encoder", "late_interaction"] = "dual_encoder",
) -> dict[str, Any]:
    """Counts, and histograms of the scores of negatives and positives, and of what was dropped."""
    facts = dict.fromkeys(
        ("queries", "queries_without_negatives", "candidates", "negatives", "dropped_as_positives",
         "dropped_as_duplicates", "dropped_by_teacher"), 0,
    )  # fmt: skip
    scores = {name: array("d") for name in ("negatives", "positives")}
    teacher_scores = {name: array("d") for name in ("negatives", "positives", "dropped")}
    for query in queries:
        facts["queries"] += 1
        facts["queries_without_negatives"] += not query.negatives
        facts["candidates"] += query.num_candidates
        facts["negatives"] += len(query.negatives)
        facts["dropped_as_positives"] += len(query.positive_scores)
        facts["dropped_as_duplicates"] += query.num_duplicates
        facts["dropped_by_teacher"] += query.num_denoised
        scores["negatives"].extend(query.scores)
        scores["positives"].extend(query.positive_scores)
        teacher_scores["negatives"].extend(query.teacher_scores)
        teacher_scores["positives"].extend(query.teacher_positive_scores)
        teacher_scores["dropped"].extend(query.teacher_dropped_scores)
    histograms = {f"{searched_by}_scores": _histograms(scores)}
    if teacher_scores["positives"]:
        histograms["teacher_scores"] = _histograms(teacher_scores)
    return facts | histograms


def told(facts: dict[str, Any]) -> str:
    """The statistics in a sentence."""
    text = (
        f"mined for {facts['queries']} queries: {facts['candidates']} candidates,"
        f" {facts['dropped_as_duplicates']} copies of positives left out,"
        f" {facts['dropped_by_teacher']} dropped by the teacher, {facts['negatives']} kept"
    )
    for name in ("dual_encoder", "late_interaction", "teacher"):
        if scores := facts.get(f"{name}_scores"):
            means = (scores[kind]["mean"] for kind in ("positives", "negatives"))
            numbers = ["none" if mean is None else f"{mean:.3f}" for mean in means]
            text += f"; {name.replace('_', '-')} scores: positives {numbers[0]}, negatives"
            text += f" {numbers[1]} on average"
    return text


def drawn_queries(data: RetrievalData, settings: MineConfig, seed: int) -> list[str]:
    """The queries to mine for: those with a relevant passage, or ``max_queries`` of them."""
    qids = list(data.relevant())
    if settings.max_queries is not None and settings.max_queries < len(qids):
        drawn = np.random.default_rng([seed, 7]).permutation(len(qids))[: settings.max_queries]
        qids = [qids[i] for i in sorted(drawn)]
    return qids


def mine_negatives(
    data: RetrievalData,
    retriever: Retriever,
    scorer: PairScorer | None,
    settings: MineConfig,
    seed: int,
    search_on: SearchOn = "cpu",
) -> Mined:
    """Index the passages, retrieve ``settings.depth`` candidates per training query and filter.

    Relevant passages never become negatives. Queries that keep none stay in the result with an
    empty list (the sampler fills their groups with random passages). ``search_on`` is
    ``training.vector_search``.
    """
    index = VectorIndex.build(
        retriever.vectors(retriever.passages(data.passages), "passage"), data.pids
    )
    miner = Miner(data, retriever, index, scorer, settings, seed)
    miner.index = index.on(search_on, miner.depth)
    qids = drawn_queries(data, settings, seed)
    mined: list[MinedQuery] = []
    with Meter("mining", "queries", len(qids)) as meter:
        for block in query_blocks(qids):
            with meter.part(len(block)):
                mined += miner.mine(block)
    return Mined(mined)


def query_blocks(qids: list[str]) -> Iterator[list[str]]:
    """Consecutive blocks of queries; the same whoever works on them."""
    return (qids[i : i + QUERIES_PER_BLOCK] for i in range(0, len(qids), QUERIES_PER_BLOCK))


class Miner:
    """Finds negatives for blocks of queries.

    Args:
        index: over the passages of ``data``, encoded by ``retriever``.
        scorer: the teacher; None drops nothing.
        seed: draws where the selection is random.
        always_score: ask the teacher also if the settings let it drop nothing.
    """

    def __init__(
        self,
        data: RetrievalData,
        retriever: Retriever,
        index: Index,
        scorer: PairScorer | None,
        settings: MineConfig,
        seed: int,
        always_score: bool = False,
    ) -> None:
        self.data, self.retriever, self.index = data, retriever, index
        self.settings, self.seed = settings, seed
        self.scorer = scorer if always_score or settings.asks_teacher else None
        assert self.scorer is not None or settings.selection != "spread"
        self.relevant = data.relevant()
        most = max(len(pids) for pids in self.relevant.values())
        self.depth = settings.depth + most + SPARE

    def mine(self, qids: list[str]) -> list[MinedQuery]:
        """Negatives for these queries, in their order."""
        queries = [self.data.queries[qid] for qid in qids]
        rows, scores = retrieve(self.retriever, self.index, queries, self.depth)
        found = [
            self._window(qid, query_rows, query_scores)
            for qid, query_rows, query_scores in zip(qids, rows, scores, strict=True)
        ]
        if self.scorer is not None:
            found = self._denoised(found, self.scorer)
        return [self._selected(query) for query in found]

    def _window(self, qid: str, rows: np.ndarray, scores: np.ndarray) -> MinedQuery:
        """The candidates from ``skip_top`` to ``depth`` that are neither relevant nor copies."""
        relevant = self.relevant[qid]
        texts = {_plain(text) for text in self._texts(relevant)}
        real = rows >= 0
        pids = [self.index.pids[row] for row in rows[real].tolist()]
        score_of = dict(zip(pids, scores[real].tolist(), strict=True))
        others = [pid for pid in pids if pid not in set(relevant)]
        kept = [pid for pid, text in zip(others, self._texts(others), strict=True)
                if _plain(text) not in texts]  # fmt: skip
        window = kept[self.settings.skip_top : self.settings.depth]
        return MinedQuery(
            qid, relevant, window, [score_of[pid] for pid in window],
            [score_of[pid] for pid in relevant if pid in score_of],
            len(window), len(others) - len(kept),
        )  # fmt: skip

    def _denoised(self, found: list[MinedQuery], scorer: PairScorer) -> list[MinedQuery]:
        """Drop what the teacher scores above the best positive minus the margin, absolute or
        relative, or above the threshold."""
        pids = [[*query.positives, *query.negatives] for query in found]
        scores = scorer.scores(
            [self.data.queries[query.qid] for query, own in zip(found, pids, strict=True)
             for _ in own],
            scorer.passages(self.data.passages, self._rows([pid for own in pids for pid in own])),
        ).tolist()  # fmt: skip
        out, start = [], 0
        for query, own in zip(found, pids, strict=True):
            middle, end = start + len(query.positives), start + len(own)
            positives, candidates = scores[start:middle], scores[middle:end]
            start = end
            limit = np.inf
            if self.settings.denoise_margin is not None:
                limit = max(positives) - self.settings.denoise_margin
            if self.settings.denoise_threshold is not None:
                limit = min(limit, self.settings.denoise_threshold)
            if self.settings.denoise_relative_margin is not None:
                best = max(positives)
                limit = min(limit, best - self.settings.denoise_relative_margin * abs(best))
            keep = [i for i, score in enumerate(candidates) if score <= limit]
            out.append(
                MinedQuery(
                    query.qid, query.positives, [query.negatives[i] for i in keep],
                    [query.scores[i] for i in keep], query.positive_scores, query.num_candidates,
                    query.num_duplicates, len(candidates) - len(keep),
                    [candidates[i] for i in keep], positives,
                    [score for score in candidates if score > limit],
                )
            )  # fmt: skip
        return out

    def _selected(self, query: MinedQuery) -> MinedQuery:
        """Keep ``num_negatives`` by ``settings.selection``, hardest first as before."""
        most, selection = self.settings.num_negatives, self.settings.selection
        if selection == "top" or len(query.negatives) <= most:
            kept = list(range(len(query.negatives)))[:most]
        elif selection == "random":
            rng = np.random.default_rng([self.seed, 8, zlib.crc32(query.qid.encode())])
            kept = sorted(rng.permutation(len(query.negatives))[:most].tolist())
        else:
            kept = spread(query.teacher_scores, most)
        return replace(
            query,
            negatives=[query.negatives[i] for i in kept],
            scores=[query.scores[i] for i in kept],
            teacher_scores=[query.teacher_scores[i] for i in kept if query.teacher_scores],
        )

    def _texts(self, pids: Sequence[str]) -> list[str]:
        return take(self.data.passages, self._rows(pids))

    def _rows(self, pids: Sequence[str]) -> np.ndarray:
        rows = rows_of(self.data.index_of, pids)
        if (rows < 0).any():
            missing = pids[int(np.argmin(rows))]
            raise UserError(
                f"passage '{missing}' of the index is not in the collection: index the same corpus"
            )
        return rows


def spread(scores: Sequence[float], number: int) -> list[int]:
    """Positions of ``number`` scores that cover the range evenly, in rising order.

    The wanted scores are ``number`` evenly spaced ones from the highest to the lowest, both
    included (the highest alone for one). Each takes the score nearest to it that is left, from the
    highest wanted downwards; of equally near ones the first (stratified sampling over the score
    spectrum, after arXiv 2604.04734).
    """
    left = np.array(scores, dtype=np.float64)
    chosen = []
    for wanted in np.linspace(left.max(), left.min(), number):
        nearest = int(np.argmin(np.abs(left - wanted)))
        chosen.append(nearest)
        left[nearest] = np.inf
    return sorted(chosen)


def _plain(text: str) -> str:
    return " ".join(text.split())


def _histograms(scores: "dict[str, array[float]]") -> dict[str, Any]:
    """Counts of each kind in twenty bins of equal width, and their means."""
    values = {name: np.array(numbers) for name, numbers in scores.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=20)
    facts: dict[str, Any] = {"bin_edges": edges.round(6).tolist()}
    for name, numbers in values.items():
        mean = round(float(numbers.mean()), 6) if len(numbers) else None
        facts[name] = {"mean": mean, "counts": np.histogram(numbers, edges)[0].tolist()}
    return facts
