"""Which queries and passages make up a step, as a pure function of (seed, step).

No state: resuming needs only the step number, and the order is the same for every number of
ranks as long as the global batch is the same.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from erniesearch.data.collection import RetrievalData
from erniesearch.data.corpus.texts import rows_of
from erniesearch.errors import UserError


@dataclass(frozen=True)
class Group:
    """A query with its passages: the positive first, then hard negatives.

    ``query`` indexes the sampler's qids, ``passages`` the corpus, ``relevant`` lists every corpus
    position the qrels call relevant for the query (the positive included). ``teacher_scores`` are
    the passages', NaN where none is stored.
    """

    query: int
    passages: np.ndarray
    relevant: np.ndarray
    teacher_scores: np.ndarray | None = None


def check_group_fits(data: RetrievalData, num_negatives: int) -> None:
    """Random passages fill groups up, so the corpus must have enough that are not relevant.

    Raises:
        UserError: if it has not.
    """
    left = len(data.pids) - max(len(found) for found in data.relevant().values())
    if left < num_negatives:
        raise UserError(
            f"num_negatives is {num_negatives}, but the corpus of {len(data.pids)} passages leaves"
            f" {left} that are not relevant to every query: lower it"
        )


class StepSampler:
    """The order of the queries: a shuffled pass over all of them, then another.

    Args:
        num_queries: queries are the numbers below it.
        global_batch: queries per update over all ranks and micro-steps.
        seed: the run's seed.
    """

    def __init__(self, num_queries: int, global_batch: int, seed: int) -> None:
        self.num_queries = num_queries
        self.global_batch = global_batch
        self.seed = seed

    def queries(self, step: int) -> np.ndarray:
        """Indices of the queries of an update, ``[global_batch]``: never the same twice within a
        pass."""
        positions = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        epochs, offsets = np.divmod(positions, self.num_queries)
        return np.array(
            [
                _permutation(self.seed, int(e), self.num_queries)[o]
                for e, o in zip(epochs, offsets, strict=True)
            ]
        )

    def group(self, step: int, position: int, query: int) -> Group:
        """The group of ``query`` at ``position`` of the global batch of ``step``."""
        raise NotImplementedError

    def micro_batch(
        self, step: int, micro_step: int, rank: int, queries_per_rank: int, world_size: int
    ) -> list[Group]:
        """This rank's groups of a micro-step; the ranks' slices lie side by side in the step."""
        start = (micro_step * world_size + rank) * queries_per_rank
        queries = self.queries(step)[start : start + queries_per_rank]
        return [self.group(step, start + i, int(query)) for i, query in enumerate(queries)]


class PassageSampler(StepSampler):
    """Every passage of a corpus is its own query, alone in its group (post-training)."""

    def group(self, step: int, position: int, query: int) -> Group:
        """The passage itself."""
        row = np.array([query])
        return Group(query, row, row)


class GroupSampler(StepSampler):
    """Groups for every step of a stage.

    A query's hard negatives are drawn without replacement from its list; a list that is too short
    (or absent) is filled up with random passages that are not relevant to the query.

    Args:
        data: collection with the training split's qrels.
        negatives: pids by query, or None for random negatives only. When given, queries without an
            entry are left out of training.
        num_negatives: n; a group has 1 + n passages.
        global_batch: queries per update over all ranks and micro-steps.
        seed: the run's seed.
        easy_steps: first updates that use random negatives only.
        teacher_scores: stored ones by query and pid, which groups then carry.

    Raises:
        UserError: when the corpus is too small for a group, or a relevant passage has no score.
    """

    def __init__(
        self,
        data: RetrievalData,
        negatives: dict[str, list[str]] | None,
        num_negatives: int,
        global_batch: int,
        seed: int,
        easy_steps: int = 0,
        teacher_scores: dict[str, dict[str, float]] | None = None,
    ) -> None:
        relevant = data.relevant()
        if negatives is not None:
            relevant = {q: pids for q, pids in relevant.items() if q in negatives}
            if not relevant:
                raise UserError("the hard negatives name no query of the training split")
        self.qids = list(relevant)
        super().__init__(len(self.qids), global_batch, seed)
        self.relevant = _rows(data, [relevant[q] for q in self.qids])
        self.negatives: list[np.ndarray] | None = None
        if negatives is not None:
            wrong = [
                [pid for pid in dict.fromkeys(negatives[q]) if pid not in own]  # none twice
                for q, own in relevant.items()
            ]
            self.negatives = _rows(data, wrong)
        self.scored: list[tuple[np.ndarray, np.ndarray]] | None = None
        if teacher_scores is not None:
            self.scored = self._scored(data, relevant, teacher_scores)
        self.num_passages = len(data.pids)
        self.num_negatives = num_negatives
        self.easy_steps = easy_steps
        check_group_fits(data, num_negatives)

    @property
    def num_short(self) -> int:
        """Queries whose hard negatives do not fill a group (random passages do)."""
        if self.negatives is None:
            return len(self.qids)
        return sum(len(found) < self.num_negatives for found in self.negatives)

    def group(self, step: int, position: int, query: int) -> Group:
        """The group of ``query`` at ``position`` of the global batch of ``step``."""
        rng = np.random.default_rng([self.seed, 1, step, position])
        relevant = self.relevant[query]
        positive = relevant[rng.integers(len(relevant))]
        chosen = np.empty(0, dtype=np.int64)
        if self.negatives is not None and step >= self.easy_steps:
            hard = self.negatives[query]
            chosen = rng.permutation(hard)[: self.num_negatives]
        while len(chosen) < self.num_negatives:
            missing = self.num_negatives - len(chosen)
            drawn = rng.integers(self.num_passages, size=missing + 4)
            drawn = drawn[~np.isin(drawn, relevant) & ~np.isin(drawn, chosen)]
            _, first = np.unique(drawn, return_index=True)
            chosen = np.concatenate([chosen, drawn[np.sort(first)][:missing]])
        passages = np.concatenate([[positive], chosen]).astype(np.int64)
        return Group(query, passages, relevant, self._scores_of(query, passages))

    def _scored(
        self,
        data: RetrievalData,
        relevant: dict[str, list[str]],
        scores: dict[str, dict[str, float]],
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Corpus rows and their scores, by query."""
        for qid, pids in relevant.items():
            if missing := [pid for pid in pids if pid not in scores.get(qid, {})]:
                raise UserError(
                    f"no teacher's score is stored for passage '{missing[0]}', which is relevant to"
                    f" query '{qid}': score the lists again, or set teacher_scores: live"
                )
        own = [scores[qid] for qid in self.qids]
        rows = _rows(data, [list(found) for found in own])
        return [
            (where, np.fromiter(found.values(), np.float32, len(found)))
            for where, found in zip(rows, own, strict=True)
        ]

    def _scores_of(self, query: int, passages: np.ndarray) -> np.ndarray | None:
        if self.scored is None:
            return None
        rows, scores = self.scored[query]
        known = passages[:, None] == rows
        return np.where(known.any(1), scores[known.argmax(1)], np.float32("nan"))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(size)


def _rows(data: RetrievalData, lists: list[list[str]]) -> list[np.ndarray]:
    """Corpus rows of every list of pids, looked up all at once."""
    pids = [pid for found in lists for pid in found]
    rows = rows_of(data.index_of, pids)
    if unknown := np.flatnonzero(rows < 0).tolist():
        raise UserError(
            f"hard negatives name passage '{pids[unknown[0]]}', which the corpus does not have"
        )
    return np.split(rows, np.cumsum([len(found) for found in lists])[:-1])
