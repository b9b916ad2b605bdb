"""A teacher of another family's vocabulary than any model of the tests."""

from pathlib import Path
from typing import Any

import torch
from support.tiny import WORDS
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

SYLLABLES = sorted({part for word in WORDS for part in (word[:2], "##" + word[2:])})
"""The same words in pieces: other ids, and other numbers of tokens."""


def write_cross_encoder(folder: Path, num_labels: int = 1, **sizes: Any) -> Path:
    """A random cross-encoder as sentence-transformers' CrossEncoder and transformers load it."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*SYLLABLES, *special]) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(11)
    config = BertConfig(
        vocab_size=len(SYLLABLES) + len(special), num_labels=num_labels,
        pad_token_id=len(SYLLABLES), initializer_range=0.3,
        **({"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3,
            "intermediate_size": 32, "max_position_embeddings": 128} | sizes),
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder
