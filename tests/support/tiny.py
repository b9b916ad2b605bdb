"""A tiny data set in BEIR layout, and tiny random models over its words."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from erniesearch.config.keys import RunConfig
from erniesearch.config.stage_keys import LossWeights

WORDS = [a + b for a in ("ba", "de", "fi", "go", "ku", "la", "mi", "no") for b in
         ("ran", "sel", "tor", "vix", "wen", "zul", "pat", "hod")]  # fmt: skip


ALL_TERMS = LossWeights(
    ce=1.0, li=1.0, de=1.0, ce_to_li=1.0, ce_to_de=1.0, li_to_de=1.0, attention=1.0, dual_reg=1.0
)


EVERY_TERM = replace(ALL_TERMS, virt=1.0, margin_mse_li=0.1, margin_mse_de=0.01)
"""But for mlm, which is another stage's."""


ConfigMaker = Callable[..., RunConfig]


def write_beir(root: Path, num_passages: int = 60, num_queries: int = 40, seed: int = 0) -> Path:
    """A data set in which a query's words come from its passage; passages differ in length, and
    several queries share a passage."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    passages = [list(rng.choice(WORDS, size=rng.integers(4, 14))) for _ in range(num_passages)]
    (root / "corpus.jsonl").write_text(
        "".join(
            json.dumps({"_id": f"p{i}", "title": "", "text": " ".join(words)}) + "\n"
            for i, words in enumerate(passages)
        )
    )
    positives = [int(i) for i in rng.integers(num_passages, size=num_queries)]
    (root / "queries.jsonl").write_text(
        "".join(
            json.dumps({"_id": f"q{i}", "text": " ".join(rng.choice(passages[p], size=3))}) + "\n"
            for i, p in enumerate(positives)
        )
    )
    (root / "qrels").mkdir(exist_ok=True)
    for split in ("train", "dev", "test"):
        lines = "".join(f"q{i}\tp{p}\t1\n" for i, p in enumerate(positives))
        (root / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return root


def write_model(folder: Path, seed: int = 0, words: list[str] | None = None, **sizes: Any) -> Path:
    """A random BERT over the data set's words."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(words or WORDS)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary), **({"hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64} | sizes),
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder
