"""PyLate: its step of late interaction, contrastive over the batch's passages."""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from pylate import losses, models, utils
from sentence_transformers import (
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from training_speed.material import TAU_LI, batches_of, read_job
from training_speed.trainer_steps import arguments, columns, serve_trainer


def main(kind: str, job_file: str, attention: str) -> None:
    """Serve ``late_interaction``."""
    assert kind == "late_interaction"
    job = read_job(job_file)
    model = models.ColBERT(
        str(Path(job.run_dir) / "exports" / "late_interaction"),
        model_kwargs={"attn_implementation": attention},
    )
    trainer = SentenceTransformerTrainer(
        model, args=SentenceTransformerTrainingArguments(**arguments(job, tempfile.mkdtemp())),
        train_dataset=Dataset.from_dict(
            columns([row for batch in batches_of(job) for row in batch])
        ),
        loss=losses.Contrastive(model=model, temperature=TAU_LI),
        data_collator=utils.ColBERTCollator(tokenize_fn=model.tokenize),
    )  # fmt: skip
    serve_trainer(trainer, job, lambda: {"pylate": version("pylate")})


if __name__ == "__main__":
    main(*sys.argv[1:])
