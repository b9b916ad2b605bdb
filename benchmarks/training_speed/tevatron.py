"""Tevatron: its step of the dual-encoder, contrastive over the batch's passages.

Its cross-encoder is no peer here: it reads pairs without segment ids, so that its loss on the same
weights is another. Padding to multiples of 16, its default, is off, and mixed precision keeps
weights in fp32, as in the other systems.
"""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from tevatron.retriever.arguments import (
    DataArguments,
    ModelArguments,
    TevatronTrainingArguments,
)
from tevatron.retriever.collator import TrainCollator
from tevatron.retriever.modeling import DenseModel
from tevatron.retriever.trainer import TevatronTrainer
from transformers import AutoTokenizer

from training_speed.material import TAU_DE, batches_of, read_job
from training_speed.trainer_steps import arguments, serve_trainer

Media = tuple[str, None, None, None]
"""A text, image, video, and sound, as its datasets hand them out."""


def texts_alone(text: str) -> Media:
    return text, None, None, None


def main(kind: str, job_file: str, attention: str) -> None:
    """Serve ``dual_encoder``."""
    assert kind == "dual_encoder"
    job = read_job(job_file)
    folder = str(Path(job.run_dir) / "exports" / "dual_encoder")
    given = TevatronTrainingArguments(**arguments(job, tempfile.mkdtemp()))
    model = DenseModel.build(
        ModelArguments(folder, pooling="mean", normalize=True, temperature=TAU_DE), given,
        dtype=torch.float32, attn_implementation=attention,
    )  # fmt: skip
    lengths = DataArguments(
        query_max_len=job.max_query_length, passage_max_len=job.max_passage_length,
        pad_to_multiple_of=None,
    )  # fmt: skip
    rows = [(texts_alone(row[0]), [texts_alone(text) for text in row[1:]])
            for batch in batches_of(job) for row in batch]  # fmt: skip
    trainer = TevatronTrainer(
        model, args=given, train_dataset=rows,
        data_collator=TrainCollator(lengths, AutoTokenizer.from_pretrained(folder)),
    )  # fmt: skip
    serve_trainer(trainer, job, lambda: {"tevatron": version("tevatron")})


if __name__ == "__main__":
    main(*sys.argv[1:])
