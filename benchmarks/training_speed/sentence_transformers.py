"""sentence-transformers: its trainers' step, with the losses that compute what ours computes."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    __version__,
)
from sentence_transformers.cross_encoder.losses import ListNetLoss
from sentence_transformers.multi_vector_encoder import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
)
from sentence_transformers.multi_vector_encoder.losses import (
    MultiVectorMultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.losses import (
    MultipleNegativesRankingLoss,
)

from training_speed.material import (
    TAU_DE,
    TAU_LI,
    Job,
    batches_of,
    inference_texts,
    read_job,
)
from training_speed.trainer_steps import (
    arguments,
    columns,
    computing,
    serve_trainer,
    without_dropout,
)
from training_speed.work import serve

BATCH_SIZES = (32, 128)
"""Of encoding and of reranking."""
ONE_HOT = 100.0
"""A label whose softmax beside zeros is 1: ListNet is the cross-entropy then."""


def versions() -> dict[str, str]:
    return {"sentence-transformers": __version__}


def make_trainer(kind: str, job: Job, rows: list[list[str]], folder: str, attention: str) -> Any:
    """A trainer of ``kind`` over all batches' rows."""
    options = {"attn_implementation": attention}
    exports, shared, texts = Path(job.run_dir) / "exports", arguments(job, folder), columns(rows)
    if kind == "dual_encoder":
        dense = SentenceTransformer(str(exports / "dual_encoder"), model_kwargs=options)
        dense.max_seq_length = job.max_passage_length
        return SentenceTransformerTrainer(
            dense, args=SentenceTransformerTrainingArguments(**shared),
            train_dataset=Dataset.from_dict(texts),
            loss=MultipleNegativesRankingLoss(dense, scale=1 / TAU_DE),
        )  # fmt: skip
    if kind == "late_interaction":
        multi = MultiVectorEncoder(str(exports / "late_interaction"), model_kwargs=options)
        return MultiVectorEncoderTrainer(
            multi, args=MultiVectorEncoderTrainingArguments(**shared),
            train_dataset=Dataset.from_dict(texts),
            loss=MultiVectorMultipleNegativesRankingLoss(multi, scale=1 / TAU_LI),
        )  # fmt: skip
    pairs = CrossEncoder(
        str(exports / "cross_encoder"), model_kwargs=options,
        max_length=job.max_query_length + job.max_passage_length,
    )  # fmt: skip
    lists = {
        "query": texts["anchor"], "docs": [row[1:] for row in rows],
        "labels": [[ONE_HOT] + [0.0] * job.num_negatives] * len(rows),
    }  # fmt: skip
    return CrossEncoderTrainer(
        pairs, args=CrossEncoderTrainingArguments(**shared),
        train_dataset=Dataset.from_dict(lists),
        loss=ListNetLoss(pairs, activation_fn=torch.nn.Identity()),
    )  # fmt: skip


def infer(kind: str, job: Job, attention: str) -> None:
    """Serve ``encoding`` or ``reranking``, with weights in the precision."""
    exports = Path(job.run_dir) / "exports"
    options = {"attn_implementation": attention,
               "dtype": torch.bfloat16 if job.precision == "bf16" else torch.float32}  # fmt: skip
    passages, pairs = inference_texts(job)
    if kind == "encoding":
        dense = SentenceTransformer(str(exports / "dual_encoder"), model_kwargs=options)
        dense.max_seq_length = job.max_passage_length
        _serve_fastest(lambda size: dense.encode(passages, batch_size=size))
        return
    scorer = CrossEncoder(
        str(exports / "cross_encoder"), model_kwargs=options,
        max_length=job.max_query_length + job.max_passage_length,
    )  # fmt: skip
    _serve_fastest(lambda size: scorer.predict(pairs, batch_size=size))


def _serve_fastest(infer: Callable[[int], object]) -> None:
    """Serve inference in batches of the size that takes the least time here."""
    taken = {}
    for size in BATCH_SIZES * 2:  # the first time warms up
        began = perf_counter()
        infer(size)
        taken[size] = perf_counter() - began
    size = min(taken, key=lambda size: taken[size])
    serve(lambda: 0.0, lambda: infer(size), lambda: versions() | {"batch_size": str(size)})


def main(kind: str, job_file: str, attention: str) -> None:
    """Serve one kind; ``scoring`` is the cross-encoder's predict on a batch's pairs."""
    job = read_job(job_file)
    if kind in ("encoding", "reranking"):
        infer(kind, job, attention)
        return
    batches = batches_of(job)
    rows = [row for batch in batches for row in batch]
    trainer = make_trainer(kind, job, rows, tempfile.mkdtemp(), attention)
    if kind != "scoring":
        serve_trainer(trainer, job, versions)
        return
    steps = iter(batches)

    def score() -> None:
        rows = next(steps)
        with computing(trainer.model, job):
            trainer.model.predict([(row[0], text) for row in rows for text in row[1:]],
                                  batch_size=len(rows) * (1 + job.num_negatives))  # fmt: skip

    without_dropout(trainer.model)
    serve(lambda: 0.0, score, versions)


if __name__ == "__main__":
    main(*sys.argv[1:])
