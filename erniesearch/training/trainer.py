"""One training stage: model, engine, steps, checkpoints, and the finished model."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from rich.console import Console
from torch.utils.data import DataLoader, Subset

from erniesearch import distributed, stages
from erniesearch.config.keys import RunConfig, StageConfig
from erniesearch.data.batches import Batch, StepBatches
from erniesearch.data.collection import load_beir
from erniesearch.errors import UserError
from erniesearch.run_folder import RunFolder, claimed, is_done, mark_done
from erniesearch.training.build import build_batches, build_model, learning_rate_factor
from erniesearch.training.calibration import calibrate
from erniesearch.training.checkpoints.checkpointer import Checkpointer
from erniesearch.training.checkpoints.resume import find_resume, load_checkpoint
from erniesearch.training.checkpoints.weights import frozen_state, save_model
from erniesearch.training.engine import build_engine, zero_section
from erniesearch.training.faults import guards, preemption
from erniesearch.training.faults.process import exit_with_pipeline, failures_told
from erniesearch.training.faults.watchdog import Watchdog
from erniesearch.training.gradient_cache import cached_backward, one_reduction
from erniesearch.training.monitor import Monitor
from erniesearch.training.precision import tune_for_device
from erniesearch.training.trackers import open_trackers
from erniesearch.training.validation import Validation, is_validated


def train_stage(config: RunConfig, name: str) -> None:
    """Train one stage on all ranks, from its newest whole checkpoint if there is one.

    Leaves ``stages/NAME/model`` and marks the stage done. Does nothing if it is done already.

    Raises:
        UserError: for anything wrong with the input, before the first step; for a checkpoint that
            cannot be written; for losses that stay non-finite.
        RankFailed: when this rank cannot go on.
        Preempted: on all ranks, after a checkpoint, when any of them was asked to stop.
    """
    stage: StageConfig = getattr(config.stages, name)
    if stage.steps == 0:
        raise UserError(f"stage {name} is left out: stages.{name}.steps is 0")
    # Twice the watchdog's time: it must bark before the collectives give up.
    device = distributed.initialize(timedelta(minutes=2 * config.training.timeout_minutes))
    torch.set_num_threads(config.training.threads_per_process)
    exit_with_pipeline()
    folder = RunFolder(config.run_dir).stage(name)
    expected = stages.fingerprint(config, name, distributed.world_size())
    if is_done(folder, expected):
        return
    config = replace(config, seed=stages.stage_seed(config, name))
    with failures_told(folder), claimed(folder, expected):
        facts = _train(config, name, folder, device)
        if distributed.is_main():
            ranks = distributed.world_size()
            mark_done(folder, expected, steps=stage.steps, world_size=ranks, **facts)
        distributed.barrier()


def _train(config: RunConfig, name: str, folder: Path, device: torch.device) -> dict[str, Any]:
    """Returns facts for ``done.json``."""
    training, facts = config.training, {}
    data = load_beir(config.data.path, config.data.train_split, config.data.use_titles)
    model, tokenizer = build_model(config, name)
    batches = build_batches(config, name, data, tokenizer)
    tune_for_device(model, config, device)
    frozen = frozen_state(model)
    resume = find_resume(folder / "checkpoints", zero_section(training).get("stage", 0))
    engine, peaks = build_engine(
        model, training, getattr(config.stages, name),
        stages.queries_per_rank(config, name, distributed.world_size()), device,
        universal=resume is not None and resume.universal,
    )  # fmt: skip
    start_step, state = load_checkpoint(engine, resume)
    model.objective.running_accuracy = dict(state.get("running_accuracy", {}))
    guard = guards.NonFiniteGuard(
        folder, training.max_nonfinite, batches, data.pids, start_step, state.get("nonfinite", {})
    )
    validation = Validation(config, name, data, batches) if is_validated(config, name) else None
    run_steps(config, name, engine, peaks, batches, guard, validation, start_step, folder, device)
    if name == "teacher" and model.teacher is not None:
        found = calibrate(engine, config.stages.teacher, batches, device)
        model.teacher.temperature = found.temperature
        facts["calibration"] = found._asdict()
        if distributed.is_main():
            Console(stderr=True, soft_wrap=True).print(f"{name}: {found.told()}", highlight=False)
    save_model(engine, folder / "model", tokenizer, frozen)
    engine.destroy()
    return facts


def run_steps(
    config: RunConfig,
    name: str,
    engine: DeepSpeedEngine,
    peaks: dict[str, float],
    batches: StepBatches,
    guard: guards.NonFiniteGuard,
    validation: Validation | None,
    start_step: int,
    folder: Path,
    device: torch.device,
) -> None:
    """The updates from ``start_step`` on, logged, guarded and checkpointed under ``folder``."""
    stage: StageConfig = getattr(config.stages, name)
    training = config.training
    todo = range(start_step * stage.accumulation_steps, len(batches))
    loader = iter(
        DataLoader(Subset(batches, todo), batch_size=None, num_workers=training.num_workers)
    )
    monitor = (
        Monitor(folder, name, start_step, stage.steps, open_trackers(config, folder, start_step))
        if distributed.is_main()
        else None
    )
    names = [key for key, weight in asdict(stage.weights).items() if weight]
    watch = guards.TermWatch(names, config.objective.competence_gate)
    checkpoints = Checkpointer(
        engine, folder / "checkpoints", training.keep_checkpoints, training.async_save
    )
    engine.train()
    began, logged, num_tokens = time.monotonic(), start_step, 0
    watchdog = Watchdog(folder, 60 * training.timeout_minutes)
    with monitor or nullcontext(), watchdog:
        for step in range(start_step, stage.steps):
            factor = learning_rate_factor(stage, step)
            for group in engine.optimizer.param_groups:
                group["lr"] = peaks[group["name"]] * factor
            done = step + 1
            made = update(engine, loader, stage, device, partial(watchdog.at, done))
            guard.check(done, made.losses, made.skipped)
            num_tokens += made.num_tokens
            if done % training.log_every == 0 or done == stage.steps:
                sums = made.terms | {"num_tokens": torch.tensor(float(num_tokens), device=device)}
                means = distributed.mean_over_ranks(sums)
                num_tokens = round(means.pop("num_tokens") * distributed.world_size())
                num_queries = batches.sampler.global_batch * (done - logged)
                norm = engine.get_global_grad_norm()
                if norm is not None:
                    means["grad_norm"] = float("nan") if made.skipped else float(norm)
                if guard.total:
                    means["skipped_updates"] = guard.total
                seconds = time.monotonic() - began
                if monitor:
                    rates = {key: peak * factor for key, peak in peaks.items()}
                    speed = {
                        "seconds": seconds,
                        "queries_per_second": num_queries / seconds,
                        "tokens_per_second": num_tokens / seconds,
                    }
                    monitor.log(done, means, rates, speed)
                    for warning in watch.look(done, means):
                        Console(stderr=True, soft_wrap=True).print(
                            f"{name}: {warning}", highlight=False
                        )
                began, logged, num_tokens = time.monotonic(), done, 0
            last = done == stage.steps
            stop = distributed.any_rank(preemption.requested(), device) and not last
            due = last or (training.save_every and done % training.save_every == 0)
            if due or stop:
                validation_loss = None
                if validation and due and not stop:  # who asks for a stop is in a hurry
                    watchdog.at(done, "validating")
                    figures = validation.measure(engine, device)
                    validation_loss = figures["loss"]
                    if monitor:
                        monitor.log_validation(done, figures)
                watchdog.at(done, "saving a checkpoint")
                if monitor:
                    monitor.sync()
                accuracy = engine.module.objective.running_accuracy
                state = {"running_accuracy": accuracy, "nonfinite": guard.state()}
                checkpoints.save(done, state, validation_loss)
            if stop:
                checkpoints.wait()
                raise preemption.Preempted(f"stage {name} stopped after update {done}, saved")
        watchdog.at(stage.steps, "waiting for the last checkpoint")
        checkpoints.wait()


class Update(NamedTuple):
    """What an update was made of on this rank: mean terms, each micro-step's loss, real tokens,
    and whether it changed nothing because it was not finite (the same on every rank)."""

    terms: dict[str, torch.Tensor]
    losses: list[torch.Tensor]
    num_tokens: int
    skipped: bool


def update(
    engine: DeepSpeedEngine,
    loader: Iterator[Batch],
    stage: StageConfig,
    device: torch.device,
    progress: Callable[[str], Any],
) -> Update:
    """Forward and backward over the micro-steps, and the optimizer's step."""
    micro_steps = []
    num_tokens, held = 0, False
    several = stage.chunk_size or stage.accumulation_steps > 1
    with one_reduction(engine) if several else nullcontext(engine.backward) as backward:
        for _ in range(stage.accumulation_steps):
            progress("reading data")
            batch = next(loader)
            num_tokens += batch.num_tokens
            batch = batch.to(device)
            if stage.chunk_size:
                own = cached_backward(
                    engine.module, engine, backward, batch, stage.chunk_size,
                    1 / stage.accumulation_steps, progress,
                )  # fmt: skip
            else:
                progress("forward pass")
                own = engine(batch)
                progress("backward pass")
                backward(guards.spoil_nonfinite(own["loss"]) / stage.accumulation_steps)
            micro_steps.append({name: value.detach() for name, value in own.items()})
    progress("optimizer's step")
    held = guards.hold_nonfinite_gradient(engine)
    engine.step()
    means = {
        name: torch.stack([own[name] for own in micro_steps]).mean() for name in micro_steps[0]
    }
    losses = [own["loss"] for own in micro_steps]
    return Update(means, losses, num_tokens, held or not engine.was_step_applied())
