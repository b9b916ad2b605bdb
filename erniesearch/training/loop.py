"""One training stage: model, engine, steps, checkpoints, and the finished model."""

import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedTokenizerBase

from erniesearch import distributed, stages
from erniesearch.config import RunConfig, StageConfig
from erniesearch.data.collate import Batch, StepBatches
from erniesearch.data.formats import load_beir
from erniesearch.errors import UserError
from erniesearch.training.checkpoint import Checkpointer
from erniesearch.training.engine import build_engine, gathered_state, zero_section
from erniesearch.training.monitor import Monitor
from erniesearch.training.process import claim_folder, exit_with_pipeline
from erniesearch.training.resume import find_resume, load_checkpoint
from erniesearch.training.stage import build_batches, build_model, learning_rate_factor


def train_stage(config: RunConfig, name: str) -> None:
    """Train one stage on all ranks, from its newest checkpoint if there is one.

    Leaves ``stages/NAME/model`` and marks the stage done. Does nothing if it is done already.

    Raises:
        UserError: for anything wrong with the input, before the first step.
    """
    stage: StageConfig = getattr(config.stages, name)
    if stage.steps == 0:
        raise UserError(f"stage {name} is left out: stages.{name}.steps is 0")
    device = distributed.initialize()
    torch.set_num_threads(config.training.threads_per_process)
    exit_with_pipeline()
    folder = stages.RunFolder(config.run_dir).stage(name)
    expected = stages.fingerprint(config, name, distributed.world_size())
    if stages.is_done(folder, expected):
        return
    lock = claim_folder(folder, expected)
    try:
        data = load_beir(config.data.path, config.data.train_split, config.data.use_titles)
        model, tokenizer = build_model(config, name)
        batches = build_batches(config, name, data, tokenizer)
        if config.training.activation_checkpointing:
            model.enable_activation_checkpointing()
        resume = find_resume(folder / "checkpoints", zero_section(config.training).get("stage", 0))
        engine, peaks = build_engine(
            model, config.training, stage,
            stages.queries_per_rank(config, name, distributed.world_size()), device,
            universal=resume is not None and resume.universal,
        )  # fmt: skip
        start_step, state = load_checkpoint(engine, resume)
        model.running_accuracy = dict(state.get("running_accuracy", {}))
        run_steps(config, name, engine, peaks, batches, start_step, folder, device)
        _save_model(engine, folder / "model", tokenizer)
        if distributed.is_main():
            stages.mark_done(
                folder, expected, steps=stage.steps, world_size=distributed.world_size()
            )
        distributed.barrier()
        engine.destroy()
    finally:
        if lock:
            lock.close()


def run_steps(
    config: RunConfig,
    name: str,
    engine: DeepSpeedEngine,
    peaks: dict[str, float],
    batches: StepBatches,
    start_step: int,
    folder: Path,
    device: torch.device,
) -> None:
    """The updates from ``start_step`` on, logged and checkpointed under ``folder``."""
    stage: StageConfig = getattr(config.stages, name)
    training = config.training
    todo = range(start_step * stage.accumulation_steps, len(batches))
    loader = iter(
        DataLoader(Subset(batches, todo), batch_size=None, num_workers=training.num_workers)
    )
    monitor = Monitor(folder, name, start_step, stage.steps) if distributed.is_main() else None
    checkpoints = Checkpointer(
        engine, folder / "checkpoints", training.keep_checkpoints, training.async_save
    )
    engine.train()
    began, logged, num_tokens = time.monotonic(), start_step, 0
    with monitor or nullcontext():
        for step in range(start_step, stage.steps):
            factor = learning_rate_factor(stage, step)
            for group in engine.optimizer.param_groups:
                group["lr"] = peaks[group["name"]] * factor
            sums: dict[str, torch.Tensor] = {}
            for _ in range(stage.accumulation_steps):
                batch: Batch = next(loader)
                num_tokens += batch.num_tokens
                terms = engine(batch.to(device))
                engine.backward(terms["loss"])
                engine.step()
                for key, value in terms.items():
                    sums[key] = sums.get(key, 0) + value.detach() / stage.accumulation_steps
            done = step + 1
            if done % training.log_every == 0 or done == stage.steps:
                sums["num_tokens"] = torch.tensor(float(num_tokens), device=device)
                means = distributed.mean_over_ranks(sums)
                num_tokens = round(means.pop("num_tokens") * distributed.world_size())
                num_queries = batches.sampler.global_batch * (done - logged)
                norm = engine.get_global_grad_norm()
                if norm is not None:
                    means["grad_norm"] = float(norm)
                seconds = time.monotonic() - began
                if monitor:
                    rates = {key: peak * factor for key, peak in peaks.items()}
                    speed = {
                        "seconds": seconds,
                        "queries_per_second": num_queries / seconds,
                        "tokens_per_second": num_tokens / seconds,
                    }
                    monitor.log(done, means, rates, speed)
                began, logged, num_tokens = time.monotonic(), done, 0
            if done == stage.steps or (training.save_every and done % training.save_every == 0):
                state = {"running_accuracy": engine.module.running_accuracy}
                if monitor:
                    monitor.sync()
                checkpoints.save(done, state)
        checkpoints.wait()


def _save_model(engine: DeepSpeedEngine, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write student and teacher as safetensors folders, aside first."""
    state = gathered_state(engine)
    if not distributed.is_main():
        return
    aside = folder.with_name("model.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    for part in ("student", "teacher"):
        module = getattr(engine.module, part)
        if module is not None:
            prefix = f"{part}."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            module.save(aside / part, own)
            tokenizer.save_pretrained(aside / part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
