"""What a search hands out: hits with the scores and ranks of every model."""

from dataclasses import dataclass, field
from typing import Literal

Model = Literal["dual_encoder", "late_interaction", "cross_encoder"]
MODELS: tuple[Model, ...] = ("dual_encoder", "late_interaction", "cross_encoder")


@dataclass(frozen=True)
class Hit:
    """A passage found, with the score and the rank (from 1) that each model gave it; None where
    the model did not see it."""

    pid: str
    text: str
    scores: dict[Model, float | None]
    ranks: dict[Model, int | None]


@dataclass(frozen=True)
class SearchResult:
    """What a query found.

    Attributes:
        hits: the ``depth`` best passages: by cross-encoder, then what only late interaction
            scored, then what only the dual-encoder did.
        rankings: the ``depth`` best of each model by its own scores, empty for one left out.
        query_tokens: length of the query in tokens, [CLS] and [SEP] included.
        query_tokens_read: how many of them the models read.
    """

    query: str
    hits: list[Hit]
    rankings: dict[Model, list[Hit]] = field(repr=False)
    query_tokens: int
    query_tokens_read: int

    @property
    def query_truncated(self) -> bool:
        """Whether the query is longer than the models read."""
        return self.query_tokens_read < self.query_tokens


@dataclass(frozen=True)
class SearchStep:
    """How far a search is.

    Attributes:
        model: the one at work; ``done`` of the ``total`` passages that it is to score have a score.
        result: what there is when it has scored all of them, None before.
    """

    model: Model
    done: int
    total: int
    result: SearchResult | None
