"""What the service reads and writes, as JSON."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from erniesearch.search.result import Model

MAX_DEPTH = 100
MAX_QUERY_CHARACTERS = 10_000

Query = Annotated[
    str,
    Field(
        min_length=1, max_length=MAX_QUERY_CHARACTERS,
        description="The query; what the models do not read of a long one is cut off.",
    ),
]  # fmt: skip


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Response(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class SearchRequest(_Request):
    """A query and how deep to search."""

    query: Query
    depth: int = Field(10, ge=1, le=MAX_DEPTH, description="Passages in each list.")
    late_interaction_depth: int | None = Field(
        None, ge=0, description="Passages that late interaction scores; the server's if left out."
    )
    cross_encoder_depth: int | None = Field(
        None, ge=0, description="Passages that the cross-encoder scores; the server's if left out."
    )


class Hit(_Response):
    """A passage with each model's score and rank; null where the model did not see it."""

    pid: str
    text: str
    scores: dict[Model, float | None]
    ranks: dict[Model, int | None]


class SearchResponse(_Response):
    """The final ranking, and each model's own."""

    query: str
    query_tokens: int = Field(description="Length of the query, [CLS] and [SEP] included.")
    query_tokens_read: int
    query_truncated: bool
    hits: list[Hit]
    rankings: dict[Model, list[Hit]]


class SearchStep(_Response):
    """A line of /search/stream: how far the search is.

    `model` is at work and has scored `done` of `total` passages; `result`, null before, is what
    there is when it has scored them all. The last line's result is that of /search.
    """

    model: Model
    done: int
    total: int
    result: SearchResponse | None


class ExplainRequest(_Request):
    """A query and a passage of the collection."""

    query: Query
    pid: str = Field(min_length=1, max_length=1000)


class Token(_Response):
    """``text[start:end]`` in code points; special tokens stand nowhere in the text."""

    text: str
    start: int
    end: int
    special: bool


class TokenMatch(_Response):
    """A query token and the passage token most similar to it."""

    query: Token
    passage: Token
    similarity: float


class ExplainResponse(_Response):
    """The addends of the late-interaction score; tokens that are not read are left out."""

    query: str
    pid: str
    text: str
    score: float
    matches: list[TokenMatch]


class AttentionRequest(ExplainRequest):
    """A query, a passage of the collection, and a layer of the cross-encoder."""

    layer: int = Field(
        -1, description="From 0, or from the last one, -1, which is the one that is distilled."
    )


class AttentionResponse(_Response):
    """What the loss term `attention` compares in this pair, over the texts' own tokens: rows of
    query tokens, columns of passage tokens; every row sums to 1.

    `shares` is how much of its attention a query token pays to the passage's tokens, by which its
    row of `cross_encoder` is divided. `divergences` are KL(cross_encoder ‖ late_interaction) of the
    rows in nats, and `divergence` is their mean, the term's value.
    """

    query: str
    pid: str
    text: str
    layer: int = Field(description="The cross-encoder's, from 0.")
    tau: float = Field(description="Late interaction's temperature, objective.tau_att.")
    query_tokens: list[Token]
    passage_tokens: list[Token]
    cross_encoder: list[list[float]]
    late_interaction: list[list[float]]
    shares: list[float]
    divergences: list[float]
    divergence: float


class Health(_Response):
    """What is served. The depths are the defaults and the most that a request may ask for;
    `attention_layers` are the layers that /attention shows, none if it cannot."""

    status: str
    passages: int
    models: list[Model]
    first_stage: Model
    max_depth: int
    late_interaction_depth: int
    cross_encoder_depth: int
    attention_layers: list[int]


class Problem(_Response):
    """Every answer that is not 200, and the last line of a stream that fails half-way."""

    detail: str
