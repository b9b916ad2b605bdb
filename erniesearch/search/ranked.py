"""A query on its way through the models: what is found so far, and in which order."""

from collections.abc import Callable
from dataclasses import dataclass, field

from erniesearch.retrieval import ranking
from erniesearch.search.result import MODELS, Hit, Model, SearchResult


@dataclass
class Ranked:
    """A query's passages so far, best first, and the scores that models gave them.

    Attributes:
        tokens, tokens_read: as in :class:`SearchResult`.
    """

    query: str
    tokens: int
    tokens_read: int
    order: list[str] = field(default_factory=list)
    scores: dict[Model, dict[str, float]] = field(default_factory=dict)

    def add(self, model: Model, scores: dict[str, float]) -> None:
        """What the model scored comes first, best first; the rest behind it in the old order."""
        self.scores[model] = scores
        rest = [pid for pid in self.order if pid not in scores]
        self.order = ranking.top(scores, len(scores)) + rest

    def result(self, depth: int, text: Callable[[str], str]) -> SearchResult:
        """The ``depth`` best, in all and of each model; ``text`` is a pid's."""
        scores = {model: self.scores.get(model, {}) for model in MODELS}
        best = {model: ranking.top(scores[model], len(self.order)) for model in MODELS}
        rank = {model: {pid: i for i, pid in enumerate(pids, 1)} for model, pids in best.items()}

        def hit(pid: str) -> Hit:
            return Hit(
                pid, text(pid),
                {model: scores[model].get(pid) for model in MODELS},
                {model: rank[model].get(pid) for model in MODELS},
            )  # fmt: skip

        return SearchResult(
            self.query, [hit(pid) for pid in self.order[:depth]],
            {model: [hit(pid) for pid in best[model][:depth]] for model in MODELS},
            self.tokens, self.tokens_read,
        )  # fmt: skip
