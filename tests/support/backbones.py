"""Tiny random models of every family, with tokenizers over the words of the tiny data set."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from support.tiny import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, BertTokenizer, PreTrainedTokenizerFast

BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
ROBERTA_WORDS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *WORDS]
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 64}  # fmt: skip


@dataclass(frozen=True)
class Backbone:
    """A family: its class of masked language models, ``NAMEForMaskedLM``, and what its
    configuration calls differently or has besides."""

    name: str
    roberta: bool = False
    renamed: dict[str, str] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


BACKBONES = {
    "bert": Backbone("Bert"),
    "ernie": Backbone("Ernie"),
    "roberta": Backbone("Roberta", roberta=True),
    "xlm-roberta": Backbone("XLMRoberta", roberta=True, more={"type_vocab_size": 1}),
    "camembert": Backbone("Camembert", roberta=True, more={"type_vocab_size": 1}),
    "xlm-roberta-xl": Backbone("XLMRobertaXL", roberta=True, more={"type_vocab_size": 1}),
    "megatron-bert": Backbone("MegatronBert"),
    "electra": Backbone("Electra", more={"embedding_size": 16}),
    "distilbert": Backbone(
        "DistilBert",
        renamed={"hidden_size": "dim", "num_hidden_layers": "n_layers",
                 "num_attention_heads": "n_heads", "intermediate_size": "hidden_dim"},
    ),
    "mpnet": Backbone("MPNet", roberta=True),
    "modernbert": Backbone(
        "ModernBert",
        more={"layer_types": ["full_attention", "sliding_attention", "full_attention"],
              "local_attention": 8, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2,
              "eos_token_id": 3},
    ),
    "nomic_bert": Backbone("NomicBert"),
    "gte": Backbone("Gte", roberta=True),
    "deberta-v2": Backbone(
        "DebertaV2",
        more={"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
              "position_biased_input": False, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    ),
}  # fmt: skip


OTHERS = {"convbert": Backbone("ConvBert", more={"embedding_size": 32})}
"""Not in the table: a convolution reads the padding, so that vectors depend on it."""


def write_backbone(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A random model with its masked-language-model head, and its tokenizer."""
    backbone = (BACKBONES | OTHERS)[family]
    folder.mkdir(parents=True, exist_ok=True)
    words = ROBERTA_WORDS if backbone.roberta else BERT_WORDS
    if backbone.roberta:
        roberta_tokenizer().save_pretrained(folder)
    else:
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
        BertTokenizer(str(folder / "vocab.txt"), model_max_length=10_000).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {backbone.renamed.get(key, key): value for key, value in (SIZES | changes).items()}
    config = AutoConfig.for_model(
        family, vocab_size=len(words), pad_token_id=int(backbone.roberta),
        **(backbone.more | sizes),
    )  # fmt: skip
    model = getattr(transformers, f"{backbone.name}ForMaskedLM")(config)
    with torch.no_grad():  # peaks, where a fresh model's attention is flat
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("query", "key", "q_lin", "k_lin", ".q.", ".k.",
                                             "Wqkv", "q_proj", "k_proj")):  # fmt: skip
                parameter *= 20
            if "relative_attention_bias" in name:
                parameter *= 50
    model.save_pretrained(folder)
    return folder


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """``<s> q </s></s> p </s>`` over words."""
    vocabulary = {word: i for i, word in enumerate(ROBERTA_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>", model_max_length=10_000,
    )  # fmt: skip
