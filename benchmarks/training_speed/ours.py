"""A stage's updates, as `erniesearch train` makes them."""

import sys

import torch

from erniesearch import distributed
from erniesearch.commands.parsing import name_accelerator
from erniesearch.stages import Stage
from erniesearch.training.trainer import Trainer, update
from training_speed.material import config_of, read_job
from training_speed.work import serve


def main(kind: str, job_file: str) -> None:
    """Serve one kind."""
    name_accelerator()
    device = distributed.initialize()
    stage = Stage(config_of(read_job(job_file), kind), "interaction")
    trainer = Trainer(stage, device)
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
