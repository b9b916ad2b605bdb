"""Which passage token won each query token: the addends of a late-interaction score."""

from typing import NamedTuple

from torch import Tensor

from erniesearch.data.text_format import SCORED
from erniesearch.errors import UserError
from erniesearch.models.encoder import Side
from erniesearch.retrieval.retriever import Retriever


class Token(NamedTuple):
    """A token as it stands in its text: ``text[start:end]``, counted in code points.

    Tokens that are not of the text ([CLS], [SEP], a prompt's, those that fill a query up) have no
    place there: their name stands in ``text``, and ``start`` equals ``end``.
    """

    text: str
    start: int
    end: int
    special: bool


class TokenMatch(NamedTuple):
    """A query token, the passage token most similar to it, and their similarity <E_qi, E_pj>."""

    query: Token
    passage: Token
    similarity: float


def tokens_in(retriever: Retriever, text: str, side: Side) -> list[Token]:
    """The tokens of a text that take part in MaxSim, truncated as the student truncates.

    Raises:
        UserError: for a tokenizer that does not say where its tokens stand.
    """
    tokenizer = retriever.tokenizer
    if not tokenizer.is_fast:
        raise UserError(
            "the run's tokenizer gives no character offsets; token matches need a fast tokenizer"
            " (tokenizer.json)"
        )
    reader = retriever.readers[side]
    read = reader.texts([text])
    names = tokenizer.convert_ids_to_tokens(read.ids[0].tolist())
    return [
        Token(name, 0, 0, True) if place is None
        else Token(text[slice(*place)] or name, *place, False)
        for name, place, scored in zip(
            names, reader.places(text), read.having(SCORED)[0].tolist(), strict=True
        )
        if scored
    ]  # fmt: skip


def match_tokens(
    retriever: Retriever, query: str, passage: str, stored: Tensor | None = None
) -> list[TokenMatch]:
    """For every query token i the winner of max over j of <E_qi, E_pj>.

    The similarities add up to the late-interaction score; of equal ones the first token wins, as
    in MaxSim. ``stored`` are the passage's vectors where they are known.
    """
    (query_tokens,) = retriever.tokens([query], "query")
    passage_tokens = retriever.tokens([passage], "passage")[0] if stored is None else stored
    similarities, winners = (query_tokens.float() @ passage_tokens.float().T).max(1)
    in_query = tokens_in(retriever, query, "query")
    in_passage = tokens_in(retriever, passage, "passage")
    assert (len(in_query), len(in_passage)) == (len(query_tokens), len(passage_tokens))
    return [
        TokenMatch(token, in_passage[winner], similarity)
        for token, winner, similarity in zip(
            in_query, winners.tolist(), similarities.tolist(), strict=True
        )
    ]
