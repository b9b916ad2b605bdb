"""What the loss term ``attention`` compares, of one pair: two maps over the same tokens.

The cross-encoder's is that of :func:`erniesearch.objectives.scores.attention_kl`, the mean over
heads of a layer's attention from a query token, cut to the passage's tokens and renormalised; late
interaction's is the softmax over the passage's tokens of ``<E_qi, E_pj> / tau``.
"""

from typing import NamedTuple

import torch
from erniesearch_kernels.reference import similarities, teacher_attention_map
from torch import Tensor

from erniesearch.data.text_format import SCORED, TEXT
from erniesearch.errors import UserError
from erniesearch.models.backbone import check_same_vocabulary
from erniesearch.models.cross_encoder import assemble_pairs
from erniesearch.models.encoder import Side, content_mask
from erniesearch.models.families import FAMILIES
from erniesearch.models.projections import ProjectionTap, global_layers
from erniesearch.objectives.outputs import TeacherAttention
from erniesearch.retrieval.retriever import PairScorer, Retriever
from erniesearch.search.explain import Token, tokens_in


class AttentionMaps(NamedTuple):
    """Both maps ``[num_query_tokens, num_passage_tokens]``, rows of sum 1, on the CPU in fp32.

    Attributes:
        layer: the cross-encoder's, from 0.
        tau: late interaction's temperature.
        query, passage: the tokens, [CLS], [SEP] and what belongs to a text's format left out.
        shares: ``[num_query_tokens]``, how much of its attention the query token pays to the
            passage's tokens; the cross-encoder's rows are divided by it.
        divergences: ``[num_query_tokens]``, KL(cross-encoder ‖ late interaction) in nats. The
            term's value for this pair is their mean.
    """

    layer: int
    tau: float
    query: list[Token]
    passage: list[Token]
    cross_encoder: Tensor
    late_interaction: Tensor
    shares: Tensor
    divergences: Tensor

    @property
    def divergence(self) -> float:
        """The term's value for this pair."""
        return float(self.divergences.mean())


class _Side(NamedTuple):
    """A text's token ids ``[1, L]`` as the cross-encoder reads them, where in them the n tokens
    stand that are compared, these tokens, and their late-interaction vectors ``[n, dim]``."""

    ids: Tensor
    places: Tensor
    tokens: list[Token]
    vectors: Tensor


def layers_shown(retriever: Retriever | None, scorer: PairScorer | None) -> list[int]:
    """The cross-encoder's layers of which :func:`attention_maps` can show the attention, from 0.

    Raises:
        UserError: if these models' attention cannot be compared.
    """
    if retriever is None or scorer is None:
        raise UserError(
            "attention compares the cross-encoder with late interaction, and this system does not"
            " have both"
        )
    config = scorer.model.model.config
    if not retriever.names_tokens:
        raise UserError("attention needs a late-interaction model that is built here")
    if config.model_type not in FAMILIES:
        raise UserError(f"a cross-encoder of type {config.model_type} cannot show its attention")
    check_same_vocabulary(
        retriever.tokenizer, scorer.tokenizer, retriever.student.settings.path,
        str(scorer.tokenizer.name_or_path), retriever.text_format.prefixes,
    )  # fmt: skip
    return global_layers(config)


def attention_maps(
    retriever: Retriever, scorer: PairScorer, query: str, passage: str, tau: float, layer: int = -1
) -> AttentionMaps:
    """Both maps of a pair, for models that :func:`layers_shown` allows.

    Args:
        tau: ``objective.tau_att``.
        layer: from 0, or from the last one, -1, which is what the term reads.

    Raises:
        UserError: for a layer that cannot be shown, or a text of which no token is compared.
    """
    config = scorer.model.model.config
    shown = global_layers(config)
    wanted = layer + int(config.num_hidden_layers) if layer < 0 else layer
    if wanted not in shown:
        raise UserError(f"layer is {layer}: give one of {', '.join(map(str, shown))}")
    of_query = _side(retriever, query, "query")
    of_passage = _side(retriever, passage, "passage")
    teacher = _attention(scorer, of_query, of_passage, wanted)
    scale = teacher.queries.shape[-1] ** -0.5
    queries, keys, lse = (part[:, None] for part in teacher)
    target = teacher_attention_map(queries, keys, scale, teacher_lse=lse)[0, 0]
    logits = teacher.queries.float() @ teacher.keys.float().mT * scale
    shares = (logits - teacher.lse.float()[..., None]).exp().sum(-1).mean(1)[0]
    cosines = similarities(of_query.vectors[None], of_passage.vectors[None])[0, 0]
    student = (cosines / tau).log_softmax(-1)
    divergences = (torch.xlogy(target, target) - target * student).sum(-1)
    return AttentionMaps(
        wanted, tau, of_query.tokens, of_passage.tokens, target, student.exp(), shares,
        divergences,
    )  # fmt: skip


def _side(retriever: Retriever, text: str, side: Side) -> _Side:
    tokenizer = retriever.tokenizer
    read = retriever.readers[side].texts([text])
    of_text, scored = read.having(TEXT), read.having(SCORED)
    special = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id])
    compared = content_mask(read.ids, of_text & scored, special)
    if not compared.any():
        raise UserError(f"no token of the {side} takes part in the comparison of attention")
    # For one text, what is of the text alone is a selection.
    places = compared[of_text].nonzero().squeeze(1)
    among_scored = compared[scored].tolist()
    ((_, (vectors,)),) = retriever.token_batches([text], side)
    tokens = [
        token
        for token, own in zip(tokens_in(retriever, text, side), among_scored, strict=True)
        if own
    ]
    return _Side(read.ids[of_text][None], places, tokens, vectors[among_scored])


@torch.inference_mode()
def _attention(scorer: PairScorer, query: _Side, passage: _Side, layer: int) -> TeacherAttention:
    """The layer's, of the tokens that are compared; on the CPU."""
    masks = (torch.ones_like(side.ids, dtype=torch.bool) for side in (query, passage))
    pair = assemble_pairs(
        query.ids, next(masks), passage.ids, next(masks), scorer.layout,
        int(scorer.tokenizer.pad_token_id),
    )  # fmt: skip
    pair = pair._replace(
        query_columns=pair.query_columns[:, query.places],
        passage_columns=pair.passage_columns[:, passage.places],
    )
    pair = type(pair)(*(part.to(scorer.device) for part in pair))
    model = scorer.model
    model.tap = ProjectionTap(model.model, "teacher", "of this run", [layer])
    try:
        model(pair)
        return TeacherAttention(*(part.cpu() for part in model.attention(pair, layer=layer)))
    finally:
        model.tap = None
