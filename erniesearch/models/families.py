"""What differs between families of encoders, by the ``model_type`` of their config.json.

Everything else comes from transformers' Auto classes. A family that is not listed can be trained
all the same; what it cannot give is its attention (:mod:`erniesearch.models.projections`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from erniesearch.errors import UserError


@dataclass(frozen=True)
class Family:
    """Where the query and key projections of a layer are, and what makes logits of them.

    Attributes:
        layers: the stack of layers, a module of the encoder.
        attention: a layer's attention, which is called with ``position_embeddings`` if ``rotary``.
        query, key: linear modules of the attention; equal where one makes queries, keys and values.
        rotary: queries and keys are turned by their position (RoFormer, arXiv 2104.09864).
        bias: the embedding of the encoder whose output, ``[L, L, heads]``, is added to the logits
            of every layer; None if nothing is.
        words: modules of the masked language model that make scores of words from token states,
            one after the other; none where it has one module beside the encoder.
    """

    layers: str
    attention: str
    query: str
    key: str
    rotary: bool = False
    bias: str | None = None
    words: tuple[str, ...] = ()


_BERT = Family("encoder.layer", "attention.self", "query", "key")
_ROTARY = Family("layers", "self_attn", "q_proj", "k_proj", rotary=True)

FAMILIES = {
    **dict.fromkeys(("bert", "ernie", "megatron-bert"), _BERT),
    "electra": replace(_BERT, words=("generator_predictions", "generator_lm_head")),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl"), _BERT),
    "distilbert": Family(
        "transformer.layer", "attention", "q_lin", "k_lin",
        words=("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
    ),
    "mpnet": Family(
        "encoder.layer", "attention.attn", "q", "k", bias="encoder.relative_attention_bias"
    ),
    "modernbert": Family("layers", "attn", "Wqkv", "Wqkv", rotary=True, words=("head", "decoder")),
    **dict.fromkeys(("nomic_bert", "gte"), _ROTARY),
}  # fmt: skip
"""Families whose attention can be rebuilt."""

NO_ATTENTION = {
    name: "a token's logit with another also has products with vectors of their distance, so that"
    " it is no product of one query and one key"
    for name in ("deberta", "deberta-v2")
}
"""Families whose attention has another form."""

AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "data2vec-text")
"""Families whose first token has the position after the padding id."""
_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout",
    # DistilBERT and ModernBERT
    "dropout", "attention_dropout", "seq_classif_dropout", "embedding_dropout", "mlp_dropout",
    # DeBERTa
    "pooler_dropout", "cls_dropout",
)  # fmt: skip


def family_of(config: PretrainedConfig, part: str, path: str, remedy: str) -> Family:
    """The family of an encoder whose attention is wanted.

    Raises:
        UserError: if its attention cannot be rebuilt; ``part``, ``path`` and ``remedy`` are for the
            message.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = "no query and key projections of its layers are known"
        raise UserError(
            f"{part} '{path}' ({config.model_type}) cannot give attention:"
            f" {NO_ATTENTION.get(config.model_type, known)}; {remedy}, or take one of"
            f" {', '.join(FAMILIES)}"
        )
    return family


def word_scorer(model: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
    """What makes scores of words from the token states of a masked language model; None if that is
    not known."""
    family = FAMILIES.get(model.config.model_type)
    if family is not None and family.words:
        return nn.Sequential(*(model.get_submodule(name) for name in family.words))
    head, *more = (child for child in model.children() if child is not model.base_model)
    return None if more else head


def set_dropout(config: PretrainedConfig, dropout: float, path: str) -> None:
    """Set every dropout that the encoder and its heads have.

    Raises:
        UserError: if none is known, so that the setting would change nothing.
    """
    names = [name for name in _DROPOUTS if hasattr(config, name)]
    if not names:
        raise UserError(
            f"model '{path}' ({config.model_type}): no dropout of it is known; set dropout to null"
        )
    for name in names:
        setattr(config, name, dropout)


def check_kept_layers(config: PretrainedConfig, kept: list[int]) -> None:
    """These layers can stand alone.

    Raises:
        UserError: for ModernBERT without its first layer, the only one that has no norm before its
            attention: whichever layer came first would be read without it.
    """
    if config.model_type == "modernbert" and kept[0] != 0:
        raise UserError(
            f"student.layers is {kept}: the first layer of a ModernBERT is unlike the others and"
            " cannot be left out: begin with 0"
        )


def cut_layers(config: PretrainedConfig, kept: list[int]) -> None:
    """Say in ``config`` that the encoder has these of its layers only."""
    if types := getattr(config, "layer_types", None):
        config.layer_types = [types[i] for i in kept]
    config.num_hidden_layers = len(kept)
