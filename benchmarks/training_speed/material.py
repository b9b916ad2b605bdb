"""What all systems share: weights as folders that each of them reads, and the batches' texts."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from erniesearch.config.keys import (
    DataConfig,
    ObjectiveConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from erniesearch.config.stage_keys import LossWeights, StageConfig, StagesConfig
from erniesearch.config.yaml_file import to_yaml
from erniesearch.data.collection import load_beir
from erniesearch.data.sampler import GroupSampler
from erniesearch.export import export_all
from erniesearch.models.backbone import load_tokenizer
from erniesearch.models.cross_encoder import CrossEncoder
from erniesearch.models.encoder import StudentEncoder
from erniesearch.run_folder import RunFolder

TAU_DE, TAU_LI = 0.05, 1.0
TERMS = {
    "dual_encoder": LossWeights(de=1.0),
    "late_interaction": LossWeights(li=1.0),
    "cross_encoder": LossWeights(ce=1.0),
    "joint": LossWeights(
        ce=1.0, li=1.0, de=1.0, ce_to_li=1.0, ce_to_de=1.0, li_to_de=1.0, attention=1.0
    ),
}


class Job(NamedTuple):
    """Sizes of a measurement; ``run_dir`` receives the shared material."""

    run_dir: str
    data: str
    model: str
    precision: str
    queries: int
    num_negatives: int
    max_query_length: int
    max_passage_length: int
    steps: int


def read_job(path: str) -> Job:
    """What the parent process wrote."""
    return Job(**json.loads(Path(path).read_text()))


def config_of(job: Job, kind: str) -> RunConfig:
    """A stage that trains ``kind`` from the shared weights, once they are there."""
    folder = RunFolder(job.run_dir)
    student, teacher = (folder.model("interaction", part) for part in ("student", "teacher"))
    stage = StageConfig(
        steps=job.steps, queries_per_rank=job.queries, num_negatives=job.num_negatives,
        negatives="random", warmup_ratio=0.0, student_lr=1e-5, head_lr=1e-5, teacher_lr=1e-5,
        weights=TERMS[kind],
    )  # fmt: skip
    return RunConfig(
        run_dir=str(Path(job.run_dir) / kind),
        data=DataConfig(
            job.data, max_query_length=job.max_query_length,
            max_passage_length=job.max_passage_length,
        ),
        student=StudentConfig(
            str(student) if student.is_dir() else job.model, pooling="mean", normalize=True,
            dropout=0.0,
        ),
        teacher=TeacherConfig(str(teacher) if teacher.is_dir() else job.model, dropout=0.0),
        objective=ObjectiveConfig(tau_de=TAU_DE, tau_li=TAU_LI, tau_att=0.05),
        training=TrainingConfig(
            num_processes=1, precision=job.precision, save_every=0, trackers=[],  # type: ignore[arg-type]
        ),
        stages=StagesConfig(interaction=stage),
    )  # fmt: skip


def write_material(job: Job) -> dict[str, Any]:
    """Weights with fresh heads, exported for the peers, and texts; returns the batches' sizes."""
    torch.manual_seed(0)
    config = config_of(job, "joint")
    folder = RunFolder(job.run_dir)
    tokenizer = load_tokenizer(config.student)
    for part, model in (
        ("student", StudentEncoder(config.student)), ("teacher", CrossEncoder(config.teacher)),
    ):  # fmt: skip
        model.save(folder.model("interaction", part), model.state_dict())  # type: ignore[operator]
        tokenizer.save_pretrained(folder.model("interaction", part))
    config = config_of(job, "joint")
    (folder.root / "config.yaml").write_text(to_yaml(config))
    _export(job, config)
    data = load_beir(job.data, "train")
    sampler = GroupSampler(data, None, job.num_negatives, job.queries, config.seed)
    batches = []
    for step in range(job.steps):
        groups = sampler.micro_batch(step, 0, 0, job.queries, 1)
        batches.append([
            [data.queries[sampler.qids[g.query]], *(data.passages[row] for row in g.passages)]
            for g in groups
        ])  # fmt: skip
    (folder.root / "batches.json").write_text(json.dumps(batches))
    lengths = [len(ids) for ids in tokenizer([text for batch in batches for row in batch
                                              for text in row[1:]])["input_ids"]]  # fmt: skip
    lengths = [min(length, job.max_passage_length) for length in lengths]
    return {
        "data": Path(job.data).name, "model": job.model, "queries": job.queries,
        "passages_per_query": 1 + job.num_negatives,
        "passage_tokens_mean": sum(lengths) / len(lengths), "passage_tokens_most": max(lengths),
    }  # fmt: skip


def _export(job: Job, config: RunConfig) -> None:
    """The start's weights in the layouts of the peers, as if a training had left them."""
    folder = RunFolder(job.run_dir)
    source, target = folder.stage("interaction"), folder.stage("cascade")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        target.symlink_to(source.absolute())
    stages = StagesConfig(cascade=StageConfig(steps=1, negatives="random", weights=TERMS["joint"]))
    export_all(RunConfig(
        run_dir=job.run_dir, data=config.data, student=config.student, teacher=config.teacher,
        objective=config.objective, training=config.training, stages=stages,
    ))  # fmt: skip


def inference_texts(job: Job) -> tuple[list[str], list[tuple[str, str]]]:
    """Of encoding, the passages of all batches; of reranking, every query with its group."""
    rows = [row for batch in batches_of(job)[:4] for row in batch]
    pairs = [(row[0], text) for row in rows for text in row[1:]]
    return [text for _, text in pairs], pairs


def batches_of(job: Job) -> list[list[list[str]]]:
    """Of every step: of every query, its text and those of its passages, the relevant one first."""
    content: list[list[list[str]]] = json.loads((Path(job.run_dir) / "batches.json").read_text())
    return content
