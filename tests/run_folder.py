"""A finished run's folder with random models, written without training."""

from dataclasses import replace
from pathlib import Path

import torch

from erniesearch.config.keys import (
    DataConfig,
    LossWeights,
    RunConfig,
    StageConfig,
    StagesConfig,
    StudentConfig,
    TeacherConfig,
    to_yaml,
)
from erniesearch.data.collection import load_beir
from erniesearch.models.backbone import load_tokenizer
from erniesearch.models.cross_encoder import CrossEncoder
from erniesearch.models.encoder import StudentEncoder
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
