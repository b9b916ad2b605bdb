"""A finished run's folder with random models, written without training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support.tiny import ALL_TERMS, ConfigMaker
from transformers import AutoModel, AutoTokenizer

from erniesearch.config.keys import (
    DataConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from erniesearch.config.stage_keys import LossWeights, StageConfig, StagesConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.data.collection import load_beir
from erniesearch.models.backbone import load_tokenizer
from erniesearch.models.cross_encoder import CrossEncoder
from erniesearch.models.encoder import StudentEncoder
from erniesearch.retrieval.retriever import Retriever
from erniesearch.retrieval.trained import make_retriever, trained_student
from erniesearch.retrieval.vector_index import VectorIndex
from erniesearch.run_folder import RunFolder


def write_run(
    run_dir: Path, data: Path, model: Path, weights: LossWeights, max_passage_length: int = 16
) -> RunConfig:
    """What one cascade stage leaves: config, models and index; returns its config."""
    config = RunConfig(
        run_dir=str(run_dir),
        data=DataConfig(str(data), max_query_length=8, max_passage_length=max_passage_length),
        student=StudentConfig(str(model), pooling="mean", late_interaction_dim=16),
        training=TrainingConfig(precision="fp32"),
        stages=StagesConfig(cascade=StageConfig(steps=1, negatives="random", weights=weights)),
    )
    folder = RunFolder(run_dir)
    torch.manual_seed(1)
    student = StudentEncoder(config.student)
    teacher = CrossEncoder(TeacherConfig(str(model)))
    tokenizer = load_tokenizer(config.student)
    parts = {"student": student} | ({"teacher": teacher} if weights.ce else {})
    for part, module in parts.items():
        module.save(folder.model("cascade", part), module.state_dict())
        tokenizer.save_pretrained(folder.model("cascade", part))
    (run_dir / "config.yaml").write_text(to_yaml(replace(config, run_dir="elsewhere")))
    collection = load_beir(data, config.evaluation.split)
    retriever = make_retriever(config, trained_student(config, "cascade"))
    vectors = retriever.vectors(collection.passages, "passage")
    VectorIndex.build(vectors, collection.pids).save(folder.index)
    return config


TEXTS = ["baran desel", "fitor", "gozul kupat lahod miran noran baran", "wordless baran"]


LONG = " ".join(["baran", "desel", "fitor"] * 10)  # truncated to 16 tokens


def spread(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Larger weights: a random BERT gives nearly the same vector and score to every text."""
    return {
        name: 6 * value if value.ndim == 2 and "embeddings" not in name else value
        for name, value in state.items()
    }


def write_student(folder: Path, settings: StudentConfig) -> Path:
    """A trained student as a stage leaves it; untied towers differ."""
    torch.manual_seed(1)
    student = StudentEncoder(settings)
    state = spread(student.state_dict())
    if not settings.tied:
        for name, value in state.items():
            if name.startswith("passage_tower.") and value.is_floating_point():
                state[name] = value + 0.05 * torch.randn_like(value)
    student.save(folder, state)
    load_tokenizer(settings).save_pretrained(folder)
    return folder


def write_teacher(folder: Path, path: Path) -> Path:
    torch.manual_seed(2)
    teacher = CrossEncoder(TeacherConfig(str(path)))
    teacher.save(folder, spread(teacher.state_dict()))
    load_tokenizer(TeacherConfig(str(path))).save_pretrained(folder)
    return folder


def finished_run(make_config: ConfigMaker, **changes: Any) -> RunConfig:
    """A run whose cascade left a student and a teacher."""
    config = make_config(stage="cascade", weights=ALL_TERMS, **changes)
    folder = RunFolder(config.run_dir)
    write_student(folder.model("cascade", "student"), config.student)
    write_teacher(folder.model("cascade", "teacher"), Path(config.student.path))
    return config


def retriever_of(config: RunConfig) -> Retriever:
    path = str(RunFolder(config.run_dir).model("cascade", "student"))
    return Retriever(
        replace(config.student, path=path), config.data.max_query_length,
        config.data.max_passage_length, device=torch.device("cpu"),
    )  # fmt: skip


def content(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def plain_states(folder: Path, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states and mask by plain transformers, told nothing but the folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = content(folder, "sentence_bert_config.json")["max_seq_length"]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    with torch.inference_mode():
        states = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
    return states, inputs["attention_mask"]
