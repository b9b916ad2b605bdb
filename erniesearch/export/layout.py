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

from safetensors.torch import load_file
from transformers import AddedToken, AutoConfig, AutoTokenizer

from erniesearch.config.keys import RunConfig
from erniesearch.data.text_format import TextFormat
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


def dual_encoder_layout(folder: Path, config: RunConfig, reading: TextFormat) -> None:
    """Transformer, Pooling and, for cosines, Normalize, as sentence-transformers' modules.

    ``reading`` is how the student's texts are read. A prefix becomes the beginning of the prompt,
    and of the tokenizer's special tokens, so that the text of the prompt becomes that one token.
    """
    student = config.student
    modules = [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
    ]
    if student.normalize:
        modules.append(("2_Normalize", "sentence_transformers.models.Normalize"))
        (folder / "2_Normalize").mkdir()
    _modules(folder, *modules)
    _transformer(folder, config)
    prompts = {side: form.prefix + form.prompt for side, form in
               (("query", reading.query), ("document", reading.passage))}  # fmt: skip
    _register(folder, reading.prefixes)
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {"sentence_transformers": ST_VERSION},
            "model_type": "SentenceTransformer",
            "prompts": prompts,
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
            "include_prompt": reading.query.pool_prompt and reading.passage.pool_prompt,
        },
    )


def _transformer(folder: Path, config: RunConfig, **more: object) -> None:
    length = max(config.data.max_query_length, config.data.max_passage_length)
    write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": length, "do_lower_case": False} | more,
    )


def _register(folder: Path, words: list[str]) -> None:
    """Tokens that stand for themselves in a text, whatever the tokenizer does to letters."""
    if words:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        special = [AddedToken(word, normalized=False, special=True) for word in words]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.save_pretrained(folder)


def late_interaction_layout(
    folder: Path, config: RunConfig, reading: TextFormat, head: Path
) -> None:
    """Transformer and a linear layer over its states, as PyLate writes them, or, where the student
    started from a folder of sentence-transformers 6, as that does.

    ``head`` is the safetensors file of the layer, ``reading`` how the student's texts are read.
    """
    names = load_file(head)
    dense = {
        "in_features": _hidden_size(folder),
        "out_features": config.student.late_interaction_dim,
        "bias": "linear.bias" in names,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    if reading.layout == "sentence_transformers":
        _multi_vector(folder, config, reading, dense)
    else:
        _pylate(folder, config, reading, dense)
    shutil.copy(head, folder / "1_Dense" / "model.safetensors")


def _pylate(folder: Path, config: RunConfig, reading: TextFormat, dense: dict[str, Any]) -> None:
    query, passage = reading.query, reading.passage
    _modules(
        folder,
        ("", "sentence_transformers.models.Transformer"),
        ("1_Dense", "pylate.models.Dense.Dense"),
    )
    _transformer(folder, config)
    write_json(folder / "1_Dense" / "config.json", dense | {"use_residual": False})
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {"sentence_transformers": ST_VERSION},
            "model_type": "ColBERT",
            "prompts": {"query": query.prompt, "document": passage.prompt}
            if query.prompt or passage.prompt else {},
            "default_prompt_name": None,
            "similarity_fn_name": "MaxSim",
            "query_prefix": query.prefix,
            "document_prefix": passage.prefix,
            "query_length": config.data.max_query_length,
            "document_length": config.data.max_passage_length,
            "attend_to_expansion_tokens": query.attend,
            "skiplist_words": list(passage.skip),
            "do_query_expansion": query.expand,
        },
    )  # fmt: skip


def _multi_vector(
    folder: Path, config: RunConfig, reading: TextFormat, dense: dict[str, Any]
) -> None:
    query, passage = reading.query, reading.passage
    base, tokens = "sentence_transformers.base.modules", "token_embeddings"
    both = {"module_input_name": tokens, "module_output_name": tokens}
    _modules(
        folder,
        ("", f"{base}.transformer.Transformer"),
        ("1_Dense", f"{base}.dense.Dense"),
        ("2_MultiVectorMask", "sentence_transformers.multi_vector_encoder.modules"
         ".multi_vector_mask.MultiVectorMask"),
        ("3_Normalize", f"{base}.normalize.Normalize"),
    )  # fmt: skip
    lengths: dict[str, object] = {"document_length": config.data.max_passage_length}
    if query.expand:
        lengths["query_expansion"] = {
            "strategy": "min" if query.at_least else "fixed", "attend": query.attend,
            "token": query.expansion_token or None,
            "length": query.at_least or config.data.max_query_length,
        }  # fmt: skip
    if query.at_least or not query.expand:
        lengths["query_length"] = config.data.max_query_length
    states = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    write_json(
        folder / "sentence_bert_config.json",
        {"transformer_task": "feature-extraction", "modality_config": states,
         "module_output_name": tokens} | lengths,
    )  # fmt: skip
    write_json(folder / "1_Dense" / "config.json", dense | both)
    skip = {"query": query.skip, "document": passage.skip}
    write_json(
        folder / "2_MultiVectorMask" / "config.json",
        {"skiplist_words": list(passage.skip or query.skip), "keep_only_token_ids": None,
         "skiplist_tasks": [side for side, words in skip.items() if words] or ["document"]},
    )  # fmt: skip
    write_json(folder / "3_Normalize" / "config.json", both)
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {"sentence_transformers": "6.0.0"},
            "model_type": "MultiVectorEncoder",
            "prompts": {"query": query.prompt, "document": passage.prompt},
            "default_prompt_name": None,
            "similarity_fn_name": "maxsim",
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
