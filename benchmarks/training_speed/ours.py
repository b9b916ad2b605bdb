"""A stage's updates, as `erniesearch train` makes them."""

import sys
from pathlib import Path

import torch

from erniesearch.commands.parsing import name_accelerator
from erniesearch.config.keys import StudentConfig, TeacherConfig
from erniesearch.retrieval.retriever import PairScorer, Retriever
from erniesearch.training.trainer import Trainer
from erniesearch.training.update import update
from training_speed.material import Job, config_of, inference_texts, read_job
from training_speed.work import serve


def infer(kind: str, job: Job) -> None:
    """Serve ``encoding`` or ``reranking``, as the pipeline does them."""
    exports = Path(job.run_dir) / "exports"
    sizes = job.max_query_length, job.max_passage_length
    passages, pairs = inference_texts(job)
    precision = {"precision": job.precision}
    if kind == "encoding":
        settings = StudentConfig(str(exports / "dual_encoder"), pooling="mean", normalize=True)
        retriever = Retriever(settings, *sizes, **precision)  # type: ignore[arg-type]
        serve(lambda: 0.0, lambda: retriever.vectors(passages, "passage"))
        return
    scorer = PairScorer(TeacherConfig(str(exports / "cross_encoder")), *sizes, **precision)  # type: ignore[arg-type]
    queries, texts = (list(side) for side in zip(*pairs, strict=True))
    serve(lambda: 0.0, lambda: scorer.scores(queries, texts))


def main(kind: str, job_file: str) -> None:
    """Serve one kind."""
    if kind in ("encoding", "reranking"):
        infer(kind, read_job(job_file))
        return
    name_accelerator()
    trainer = Trainer(config_of(read_job(job_file), kind), "interaction")
    trainer.initialize()
    trainer.prepare()
    stage, device = trainer.stage, trainer.device
    trainer.engine.train()
    loader = iter(trainer.batches)

    def loss() -> float:
        with torch.no_grad():
            return float(trainer.engine(trainer.batches[0].to(device))["loss"])

    def step() -> None:
        made = update(trainer.engine, loader, stage.settings, device, lambda what: None)
        float(made.losses[0])  # a GPU has done it

    serve(loss, step)


if __name__ == "__main__":
    main(*sys.argv[1:])
