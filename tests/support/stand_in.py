"""A model that is not built here, and what stands in for sentence-transformers, which runs it."""

import json
from pathlib import Path
from typing import Any

import torch
from support.tiny import write_model
from transformers import AutoTokenizer


def write_pooled_by_max(target: Path) -> Path:
    """A sentence-transformers folder whose pooling is not built here."""
    folder = write_model(target)
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"}
               for path, kind in (("", "Transformer"), ("1_Pooling", "Pooling"))]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_max_tokens": True,
               "pooling_mode_mean_tokens": False}  # fmt: skip
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    about = {"prompts": {"query": "baran ", "document": ""}, "similarity_fn_name": "cosine"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(about))
    return folder


class Stand:
    """What of a SentenceTransformer the retriever asks, over word lengths."""

    similarity_fn_name = "cosine"
    max_seq_length = 64

    def __init__(self, path: str, **options: Any) -> None:
        self.options = options
        self.prompts = {"query": "baran "}
        if "broken" in path:
            raise RuntimeError("a module\nthat fails")
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def __getitem__(self, number: int) -> object:
        return object()

    def get_embedding_dimension(self) -> int:
        return 2

    def encode_query(self, texts: list[str], **options: Any) -> torch.Tensor:
        assert options["normalize_embeddings"]
        rows = torch.tensor([[len(text), 1.0] for text in texts])
        return torch.nn.functional.normalize(rows, dim=-1)

    def encode_document(self, texts: list[str], **options: Any) -> torch.Tensor:
        return -self.encode_query(texts, **options)
