"""What the systems with sentence-transformers' trainer share: arguments, columns, a step."""

from collections.abc import Callable
from typing import Any

import torch

from training_speed.material import Job
from training_speed.work import serve


def arguments(job: Job, folder: str) -> dict[str, Any]:
    """Of a trainer that writes nothing but to ``folder``."""
    return {
        "output_dir": folder, "per_device_train_batch_size": job.queries,
        "use_cpu": not torch.cuda.is_available(), "bf16": job.precision == "bf16",
        "report_to": "none", "save_strategy": "no", "learning_rate": 1e-5,
        "lr_scheduler_type": "constant", "disable_tqdm": True,
    }  # fmt: skip


def columns(rows: list[list[str]]) -> dict[str, list[str]]:
    """Of rows that hold a query, its relevant passage and the others."""
    names = ["anchor", "positive", *(f"negative_{n}" for n in range(len(rows[0]) - 2))]
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def without_dropout(model: torch.nn.Module) -> None:
    """As the other systems."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def computing(model: Any, job: Job) -> Any:
    """The precision, as the trainer's accelerator wraps a model."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, job.precision == "bf16")


def serve_trainer(trainer: Any, job: Job, versions: Callable[[], dict[str, str]]) -> None:
    """Serve the loss of the first batch, and updates."""
    model, steps = trainer.model, iter(range(job.steps))
    without_dropout(model)

    def inputs(number: int) -> Any:
        first = number * job.queries
        rows = [trainer.train_dataset[i] for i in range(first, first + job.queries)]
        return trainer._prepare_inputs(trainer.data_collator(rows))

    def loss() -> float:
        model.train()
        with torch.no_grad(), computing(model, job):
            return float(trainer.compute_loss(model, inputs(0)))

    def train() -> None:
        if trainer.optimizer is None:
            trainer.create_optimizer()
        model.train()
        with computing(model, job):
            found = trainer.compute_loss(model, inputs(next(steps)))
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    serve(loss, train, versions)
