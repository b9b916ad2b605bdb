"""Files that make a transformers folder one that other libraries load as what it is.

    dual_encoder      SentenceTransformer(path)
    late_interaction  pylate.models.ColBERT(path)
    cross_encoder     sentence_transformers.CrossEncoder(path)

The older file forms are written on purpose: version 5 of sentence-transformers cannot read what
version 6 writes, and both read these.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from erniesearch.config.keys import RunConfig
from erniesearch.export.model_card import pair_length

ST_VERSION = "5.0.0"
"""Oldest sentence-transformers whose layout is written; readers refuse a newer one than theirs."""


def write_json(path: Path, content: object) -> None:
    """Write ``content`` indented, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _hidden_size(folder: Path) -> int:
    return int(AutoConfig.from_pretrained(folder).hidden_size)  # DistilBERT's file calls it dim


def cut_of(folder: Path) -> dict[str, Any] | None:
    """What config.json says of the layers that the model was left with; None if it has all."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    about = content.get("erniesearch", {})
    return about if "layers" in about else None


def _modules(folder: Path, *modules: tuple[str, str]) -> None:
    write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": kind}
            for i, (path, kind) in enumerate(modules)
        ],
    )


def dual_encoder_layout(folder: Path, config: RunConfig) -> None:
    """Transformer, Pooling and, for cosines, Normalize, as sentence-transformers' modules."""
    student = config.student
    modules = [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
    ]
    if student.normalize:
        modules.append(("2_Normalize", "sentence_transformers.models.Normalize"))
        (folder / "2_Normalize").mkdir()
    _modules(folder, *modules)
    length = max(config.data.max_query_length, config.data.max_passage_length)
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False}
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {"sentence_transformers": ST_VERSION},
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if student.normalize else "dot",
        },
    )
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": _hidden_size(folder),
            "pooling_mode_cls_token": student.pooling == "cls",
            "pooling_mode_mean_tokens": student.pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "pooling_mode_weightedmean_tokens": False,
            "pooling_mode_lasttoken": False,
            "include_prompt": True,
        },
    )


def late_interaction_layout(folder: Path, config: RunConfig, head: Path) -> None:
    """Transformer and PyLate's Dense; ``head`` is the safetensors file of its matrix."""
    _modules(
        folder,
        ("", "sentence_transformers.models.Transformer"),
        ("1_Dense", "pylate.models.Dense.Dense"),
    )
    length = max(config.data.max_query_length, config.data.max_passage_length)
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False}
    )
    write_json(
        folder / "1_Dense" / "config.json",
        {
            "in_features": _hidden_size(folder),
            "out_features": config.student.late_interaction_dim,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
            "use_residual": False,
        },
    )
    shutil.copy(head, folder / "1_Dense" / "model.safetensors")
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {"sentence_transformers": ST_VERSION},
            "model_type": "ColBERT",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "MaxSim",
            "query_prefix": "",
            "document_prefix": "",
            "query_length": config.data.max_query_length,
            "document_length": config.data.max_passage_length,
            "attend_to_expansion_tokens": False,
            "skiplist_words": [],
            "do_query_expansion": False,
        },
    )


def cross_encoder_layout(folder: Path, config: RunConfig) -> None:
    """A classifier whose ``predict()`` gives the bare score, on pairs as long as trained."""
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    # Without it predict() applies a sigmoid.
    content["sentence_transformers"] = {
        "activation_fn": "torch.nn.modules.linear.Identity",
        "version": ST_VERSION,
    }
    content["erniesearch"] = {  # query and passage are cut by themselves, before they are joined
        "max_query_length": config.data.max_query_length,
        "max_passage_length": config.data.max_passage_length,
    }
    write_json(path, content)
    # Without it predict() reads pairs as long as the model's positions, longer than any trained.
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, tokenizer | {"model_max_length": pair_length(config)})
