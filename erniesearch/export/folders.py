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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from erniesearch import stages
from erniesearch.config import RunConfig
from erniesearch.errors import UserError
from erniesearch.export.model_card import model_card, pair_length
from erniesearch.export.onnx import export_onnx, require_onnx
from erniesearch.models.encoder import HEAD_FILE

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
ST_VERSION = "5.0.0"
"""Oldest sentence-transformers whose layout is written; readers refuse a newer one than theirs."""


@dataclass(frozen=True)
class _Target:
    """One export folder: ``kind`` and ``suffix`` make its name, ``model`` is where it comes from,
    ``add`` writes the layout's files."""

    kind: str
    suffix: str
    model: Path
    add: Callable[[Path, RunConfig], None]


def export_all(config: RunConfig, onnx: bool = False, results: str | None = None) -> list[Path]:
    """Export the last stage's student and teacher; returns the folders written.

    Args:
        onnx: also write the dual-encoder's transformer as ``onnx/model.onnx``.
        results: the evaluation in Markdown, for the model cards.

    Raises:
        UserError: if the run trains no student or teacher, or has not trained it yet.
    """
    if onnx:
        require_onnx()
    targets = _targets(config)
    if not targets:
        raise UserError("nothing to export: no stage with steps above 0 trains a model")
    return [_write(target, config, onnx, results) for target in targets]


def write_cards(config: RunConfig, results: str) -> None:
    """Write the cards of the folders that are there again, now with the evaluation's results."""
    for target in _targets(config):
        folder = stages.RunFolder(config.run_dir).export(target.kind + target.suffix)
        if folder.is_dir():
            onnx = (folder / "onnx" / "model.onnx").is_file()
            card = model_card(target.kind, target.suffix, config, results, onnx)
            stages.write_atomically(folder / "README.md", card)


def _targets(config: RunConfig) -> list[_Target]:
    folder = stages.RunFolder(config.run_dir)
    targets = []
    student_stage, teacher_stage = stages.final_student(config), stages.final_teacher(config)
    if student_stage:
        student = folder.model(student_stage, "student")
        _require(student, student_stage)
        towers = {"": student}
        if not config.student.tied:
            towers = {"_query": student, "_passage": student / "passage_tower"}
        late = partial(_late_interaction, head=student / HEAD_FILE)
        for suffix, tower in towers.items():
            targets.append(_Target("dual_encoder", suffix, tower, _dual_encoder))
            if stages.trains_late_interaction(config):
                targets.append(_Target("late_interaction", suffix, tower, late))
    if teacher_stage:
        teacher = folder.model(teacher_stage, "teacher")
        _require(teacher, teacher_stage)
        targets.append(_Target("cross_encoder", "", teacher, _cross_encoder))
    return targets


def _require(path: Path, stage: str) -> None:
    if not path.is_dir():
        raise UserError(f"nothing to export: stage {stage} is not trained yet ({path} is missing)")


def _write(target: _Target, config: RunConfig, onnx: bool, results: str | None) -> Path:
    """Copy a transformers folder, add the layout's files, then move it into place."""
    folder = stages.RunFolder(config.run_dir).export(target.kind + target.suffix)
    model = target.model
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        shutil.copytree(model, aside, ignore=shutil.ignore_patterns(HEAD_FILE, "passage_tower"))
        # An untied passage tower has no tokenizer of its own.
        for name in TOKENIZER_FILES:
            if not (aside / name).exists() and (model.parent / name).is_file():
                shutil.copy(model.parent / name, aside / name)
        target.add(aside, config)
        with_onnx = onnx and target.kind == "dual_encoder"
        if with_onnx:
            export_onnx(aside)
        card = model_card(target.kind, target.suffix, config, results, with_onnx)
        (aside / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
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
    # Without it predict() reads pairs as long as the model's positions, longer than any trained.
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    _dump(path, tokenizer | {"model_max_length": pair_length(config)})
