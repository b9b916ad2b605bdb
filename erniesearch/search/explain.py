"""Which passage token won each query token: the addends of a late-interaction score."""

from typing import NamedTuple

from erniesearch.errors import UserError
from erniesearch.models.encoder import Side
from erniesearch.retrieval.retriever import Retriever


class Token(NamedTuple):
    """A token as it stands in its text: ``text[start:end]``, counted in code points.

    Special tokens ([CLS], [SEP]) have no place there: their name stands in ``text``, and ``start``
    equals ``end``.
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
    """The tokens that the student reads of a text, truncated as it truncates.

    Raises:
        UserError: for a tokenizer that does not say where its tokens stand.
    """
    tokenizer = retriever.tokenizer
    if not tokenizer.is_fast:
        raise UserError(
            "the run's tokenizer gives no character offsets; token matches need a fast tokenizer"
            " (tokenizer.json)"
        )
    encoded = tokenizer(
        text, truncation=True, max_length=retriever.lengths[side], return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )  # fmt: skip
    names = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    return [
        Token(name if special else text[start:end] or name, start, end, bool(special))
        for name, (start, end), special in zip(
            names, encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
        )
    ]


def match_tokens(retriever: Retriever, query: str, passage: str) -> list[TokenMatch]:
    """For every query token i the winner of max over j of <E_qi, E_pj>.

    The similarities add up to the late-interaction score; of equal ones the first token wins, as
    in MaxSim.
    """
    (query_tokens,) = retriever.tokens([query], "query")
    (passage_tokens,) = retriever.tokens([passage], "passage")
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
