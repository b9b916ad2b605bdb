"""Folders that other libraries load: sentence-transformers, PyLate, plain transformers.

    dual_encoder      SentenceTransformer(path)
    late_interaction  pylate.models.ColBERT(path)
    cross_encoder     sentence_transformers.CrossEncoder(path)

The older file forms are written on purpose: version 5 of sentence-transformers cannot read what
version 6 writes, and both read these.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from erniesearch import stages
from erniesearch.config import RunConfig
from erniesearch.errors import UserError
from erniesearch.models.encoder import HEAD_FILE

ST_VERSION = "5.0.0"
"""Oldest sentence-transformers whose layout is written; readers refuse a newer one than theirs."""


def export_all(config: RunConfig) -> list[Path]:
    """Export the last stage's student and teacher; returns the folders written.

    Raises:
        UserError: if the run trains no student.
    """
    folder = stages.RunFolder(config.run_dir)
    written = []
    student_stage, teacher_stage = stages.final_student(config), stages.final_teacher(config)
    if student_stage:
        student = folder.model(student_stage, "student")
        _require(student, student_stage)
        towers = {"": student}
        if not config.student.tied:
            towers = {"_query": student, "_passage": student / "passage_tower"}
        for suffix, tower in towers.items():
            written.append(
                _write(folder.export("dual_encoder" + suffix), tower, _dual_encoder, config)
            )
            if stages.trains_late_interaction(config):
                out = folder.export("late_interaction" + suffix)
                head = student / HEAD_FILE
                written.append(_write(out, tower, _late_interaction, config, head))
    if teacher_stage:
        teacher = folder.model(teacher_stage, "teacher")
        _require(teacher, teacher_stage)
        written.append(_write(folder.export("cross_encoder"), teacher, _cross_encoder, config))
    if not written:
        raise UserError("nothing to export: no stage with steps above 0 trains a model")
    return written


def _require(path: Path, stage: str) -> None:
    if not path.is_dir():
        raise UserError(f"nothing to export: stage {stage} is not trained yet ({path} is missing)")


def _write(folder: Path, model: Path, add: Callable[..., None], *arguments: object) -> Path:
    """Copy a transformers folder, add the layout's files, then move it into place."""
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(model, aside, ignore=shutil.ignore_patterns(HEAD_FILE, "passage_tower"))
    # An untied passage tower has no tokenizer of its own.
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if not (aside / name).exists() and (model.parent / name).is_file():
            shutil.copy(model.parent / name, aside / name)
    add(aside, *arguments)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    return folder


def _dump(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _hidden_size(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["hidden_size"])


def _modules(folder: Path, *modules: tuple[str, str]) -> None:
    _dump(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": kind}
            for i, (path, kind) in enumerate(modules)
        ],
    )


def _dual_encoder(folder: Path, config: RunConfig) -> None:
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
    _dump(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    _dump(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {"sentence_transformers": ST_VERSION},
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if student.normalize else "dot",
        },
    )
    _dump(
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


def _late_interaction(folder: Path, config: RunConfig, head: Path) -> None:
    _modules(
        folder,
        ("", "sentence_transformers.models.Transformer"),
        ("1_Dense", "pylate.models.Dense.Dense"),
    )
    length = max(config.data.max_query_length, config.data.max_passage_length)
    _dump(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    _dump(
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
    _dump(
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


def _cross_encoder(folder: Path, config: RunConfig) -> None:
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
    _dump(path, content)
