"""One training stage: model, engine, updates, log, checkpoints, and the finished model."""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from erniesearch import distributed
from erniesearch.config.checks import validate, with_steps
from erniesearch.config.keys import TRAINING_STAGES, RunConfig
from erniesearch.config.terms import LossTerm, weight_of, with_terms
from erniesearch.data.batches import Batch
from erniesearch.data.collection import RetrievalData, load_beir
from erniesearch.data.memory import with_data
from erniesearch.errors import UserError, nearest
from erniesearch.models.compiled import compile_layers
from erniesearch.models.precision import tune_for_device
from erniesearch.progress import say, set_stage
from erniesearch.run_folder import RunFolder, claimed, is_done, mark_done
from erniesearch.stages import Stage, result_is_best
from erniesearch.training.build import build_batches, build_model, learning_rate_factor
from erniesearch.training.calibration import calibrate
from erniesearch.training.callbacks import Callback, Callbacks, TrainingState
from erniesearch.training.checkpoints.checkpointer import Checkpointer
from erniesearch.training.checkpoints.manifest import Quality
from erniesearch.training.checkpoints.resume import (
    Resume,
    find_best_resume,
    find_resume,
    goes_on_in_bf16,
    load_checkpoint,
)
from erniesearch.training.checkpoints.weights import frozen_state, save_model
from erniesearch.training.engine import build_engine, zero_section
from erniesearch.training.epochs import resolve_epochs
from erniesearch.training.faults import guards, preemption
from erniesearch.training.faults.process import exit_with_pipeline, failures_told
from erniesearch.training.faults.watchdog import Watchdog
from erniesearch.training.monitor import Monitor
from erniesearch.training.quality_watch import QualityWatch, is_watched
from erniesearch.training.retrieval_quality import check_best_metric
from erniesearch.training.trackers import open_trackers
from erniesearch.training.update import Update, update

GO_ON, STOPPED, PREEMPTED = 0, 1, 2
"""What a rank wants after an update; the highest of them is done."""


class Trainer:
    """A stage's training in this process: one rank without a launcher, or each rank of any.

    Args:
        config: the run's; ``run_dir`` receives everything.
        stage: one of ``post_train``, ``contrastive``, ``interaction``, ``teacher``, ``cascade``; a
            stage that starts from another's result needs it in ``run_dir``.
        data: what to train on in place of ``config.data.path``.
        terms: loss terms of one's own beside those of ``stages.STAGE.weights``.
        callbacks: told of the training while it runs, on every rank.

    Attributes:
        stage: the stage on this number of ranks.
        model: the joint module, inside ``engine``, once :meth:`prepare` has made them.
        batches: this rank's, of every update.
        start_step: updates that the checkpoint had behind it, from which it continues.
        monitor: what rank 0 shows and logs, None on the others.

    Raises:
        UserError: for anything wrong with the input, before anything is loaded.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: str,
        data: RetrievalData | None = None,
        *,
        terms: Sequence[LossTerm] = (),
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if stage not in TRAINING_STAGES:
            hint = nearest(stage, TRAINING_STAGES)
            raise UserError(f"no training stage '{stage}': {', '.join(TRAINING_STAGES)}{hint}")
        self.config = config = with_data(config, data)
        self.stage = Stage(with_terms(config, stage, terms), stage)
        if Stage(with_steps(self.stage.config), stage).settings.steps == 0:
            raise UserError(f"stage {stage} is left out: stages.{stage}.steps is 0")
        validate(self.stage.config)
        check_best_metric(self.stage.config)
        self.callbacks = Callbacks(callbacks)

    def train(self) -> Path:
        """Train, from the stage's newest whole checkpoint if there is one.

        Does nothing if the stage is done already, made from the same inputs.

        Returns:
            The folder of the finished model: ``student/`` and ``teacher/``, what the stage has.

        Raises:
            UserError: for anything wrong with the input, before the first step; for a checkpoint
                that cannot be written; for losses that stay non-finite.
            RankFailed: when this rank cannot go on.
            Preempted: on all ranks, after a checkpoint, when any of them was asked to stop.
        """
        self.initialize()
        stage = self.stage
        if is_done(stage.folder, stage.fingerprint):
            say(f"{stage.name}: done before, as {stage.folder / 'done.json'} says")
            return stage.folder / "model"
        with failures_told(stage.folder), claimed(stage.folder, stage.fingerprint):
            self.prepare()
            facts = self._updates()
            if distributed.is_main():
                mark_done(stage.folder, stage.fingerprint, **facts)
            distributed.barrier()
            self.callbacks.tell("on_train_end", self.state)
        return stage.folder / "model"

    def initialize(self) -> None:
        """Join the other ranks, and settle the device; :meth:`train` does so."""
        training = self.config.training
        set_stage(self.stage.name)
        # Twice the watchdog's time: it must bark before the collectives give up.
        self.device = distributed.initialize(timedelta(minutes=2 * training.timeout_minutes))
        torch.set_num_threads(training.threads_per_process)
        exit_with_pipeline()
        ranks = distributed.world_size()
        self.config = resolve_epochs(self.config, ranks)
        self.stage = Stage(resolve_epochs(self.stage.config, ranks), self.stage.name, ranks)

    def prepare(self) -> None:
        """Make model, batches and engine, and load the checkpoint; :meth:`train` does so."""
        stage, config, folder = self.stage, self.stage.config, self.stage.folder
        if distributed.is_main():
            RunFolder(config.run_dir).record(self.config)
        data = load_beir(config.data.path, config.data.train_split, config.data.use_titles)
        zero_stage = zero_section(config.training).get("stage", 0)
        self.model, self.tokenizer = build_model(stage)
        self.batches = build_batches(stage, data, self.tokenizer)
        saved = self._start(find_resume(folder / "checkpoints", zero_stage))
        self.callbacks.load(saved.get("callbacks", []))
        self.guard = guards.NonFiniteGuard(
            folder, config.training.max_nonfinite, self.batches, data.pids, self.start_step,
            saved.get("nonfinite", {}),
        )  # fmt: skip
        self.quality = None
        if is_watched(stage):
            self.quality = QualityWatch(stage, data, self.batches, saved.get("quality", {}))
        self.checkpoints = Checkpointer(
            self.engine, folder / "checkpoints", config.training.keep_checkpoints,
            config.training.async_save,
        )  # fmt: skip
        self._watch(saved.get("stopped", ""))

    def _start(self, resume: Resume | None) -> dict[str, Any]:
        """The engine, as a checkpoint left it; returns the state saved with it."""
        stage, config = self.stage, self.stage.config
        bf16 = goes_on_in_bf16(config.training.precision, resume, self.device)
        tune_for_device(self.model, config, self.device, bf16)
        if config.training.compile:
            zero_stage = zero_section(config.training).get("stage", 0)
            compile_layers(self.model, config, zero_stage)
        self._frozen = frozen_state(self.model)
        self.engine, self.peaks = build_engine(
            self.model, config.training, stage.settings, stage.queries_per_rank, bf16,
            universal=resume is not None and resume.universal,
        )  # fmt: skip
        self.start_step, saved = load_checkpoint(self.engine, resume)
        self.model.objective.running_accuracy = dict(saved.get("running_accuracy", {}))
        return saved

    def _watch(self, stopped: str) -> None:
        """What follows the training; ``stopped`` says why it has ended before, if it has."""
        stage, config, main = self.stage, self.stage.config, distributed.is_main()
        self.state = TrainingState(
            stage.name, stage.settings.steps, stage.folder, stage.folder / "model", main,
            self.start_step, should_stop=bool(stopped), stop_reason=stopped,
        )  # fmt: skip
        self.monitor = None
        if main:
            trackers = open_trackers(self.config, stage.folder, self.start_step)
            self.monitor = Monitor(
                stage.folder, stage.name, self.start_step, stage.settings.steps, trackers
            )
        terms = [term for term, weight in weight_of(stage.weights).items() if weight]
        self.watch = guards.TermWatch(terms, config.objective.competence_gate)
        self.watchdog = Watchdog(stage.folder, 60 * config.training.timeout_minutes)
        self._since_log = _Interval(self.start_step)
        self._poll = distributed.Poll(self.device)

    def _updates(self) -> dict[str, Any]:
        """The updates that are left, and the finished model; returns facts for ``done.json``."""
        settings, loader, state = self.stage.settings, self._loader(), self.state
        self.engine.train()
        self._since_log = _Interval(self.start_step)
        with self.monitor or nullcontext(), self.watchdog:
            self.callbacks.tell("on_train_begin", state)
            stopped = bool(state.stop_reason)
            while state.step < settings.steps and not stopped:
                self._set_learning_rates(state.step)
                done = state.step + 1
                made = update(
                    self.engine, loader, settings, self.device, partial(self.watchdog.at, done)
                )
                state.step = done
                self.guard.check(done, made.losses, made.skipped)
                self._log(done, made)
                self.callbacks.tell("on_step_end", state)
                stopped = self._measure_and_save(done)
            self.watchdog.at(state.step, "waiting for the last checkpoint")
            self.checkpoints.wait()
        return self._finish()

    def _loader(self) -> Iterator[Batch]:
        todo = range(self.start_step * self.stage.settings.accumulation_steps, len(self.batches))
        return iter(
            DataLoader(
                Subset(self.batches, todo), batch_size=None, pin_memory=self.device.type == "cuda",
                num_workers=self.stage.config.training.num_workers,
            )
        )  # fmt: skip

    def _set_learning_rates(self, step: int) -> None:
        factor = learning_rate_factor(self.stage.settings, step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.peaks[group["name"]] * factor

    def _log(self, done: int, made: Update) -> None:
        """Count an update, and log it if it is time to."""
        since, device = self._since_log, self.device
        since.num_tokens += made.num_tokens
        steps, log_every = self.stage.settings.steps, self.stage.config.training.log_every
        if done % log_every and done != steps:
            return
        sums = made.terms | {"num_tokens": torch.tensor(float(since.num_tokens), device=device)}
        means = distributed.mean_over_ranks(sums)
        num_tokens = round(means.pop("num_tokens") * self.stage.ranks)
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            means["grad_norm"] = float("nan") if made.skipped else float(norm)
        if self.guard.total:
            means["skipped_updates"] = self.guard.total
        seconds = time.monotonic() - since.began
        factor = learning_rate_factor(self.stage.settings, done - 1)
        rates = {name: peak * factor for name, peak in self.peaks.items()}
        speed = {
            "seconds": seconds,
            "queries_per_second": self.stage.global_batch * (done - since.step) / seconds,
            "tokens_per_second": num_tokens / seconds,
        }
        if self.monitor:
            self.monitor.log(done, means, rates, speed)
            for warning in self.watch.look(done, means):
                say(f"{self.stage.name}: {warning}", "warning")
        self.state.figures = means | {
            f"{group}/{key}": value
            for group, own in (("learning_rate", rates), ("speed", speed))
            for key, value in own.items()
        }
        self.callbacks.tell("on_log", self.state)
        self._since_log = _Interval(done)

    def _measure_and_save(self, done: int) -> bool:
        """Measure and save a checkpoint if it is time to, or if any rank was asked to stop; whether
        the training ends with this update before its last one."""
        state, training = self.state, self.stage.config.training
        last = done == self.stage.settings.steps
        wish = PREEMPTED if preemption.requested() else STOPPED if state.should_stop else GO_ON
        level = self._poll.highest(wish)
        preempted, stopped = level == PREEMPTED and not last, level == STOPPED and not last
        saves = last or stopped or preempted or _is_due(done, training.save_every)
        measured = None
        # Who asks for a stop by a signal is in a hurry.
        if self.quality and not preempted and (saves or _is_due(done, training.evaluate_every)):
            measured = self._measure(done)
            stopped |= not last and distributed.any_rank(state.should_stop, self.device)
        if saves or stopped or (measured is not None and measured.is_best):
            self._save(done, measured, stopped)
        if preempted:
            self.checkpoints.wait()
            raise preemption.Preempted(
                f"stage {self.stage.name} stopped after update {done}, saved"
            )
        return stopped

    def _measure(self, done: int) -> Quality:
        """Measure on the held-out queries; what a checkpoint says of it."""
        assert self.quality is not None
        state, progress = self.state, self.quality.progress
        figures, measured = self.quality.measure(
            self.engine, self.device, done, partial(self.watchdog.at, done)
        )
        self._since_log.began += figures["seconds"]  # no part of the training's speed
        if self.monitor:
            self.monitor.log_validation(done, figures, measured.is_best)
        state.evaluation = figures
        state.best_metric, state.best_step = progress.best, progress.best_step
        if reason := self.quality.reason_to_stop:
            state.should_stop, state.stop_reason = True, state.stop_reason or reason
        self.callbacks.tell("on_evaluate", state)
        return measured

    def _save(self, done: int, measured: Quality | None, stopped: bool) -> None:
        """Save a checkpoint."""
        state = self.state
        if stopped:
            reasons = filter(None, distributed.gather_objects(state.stop_reason))
            state.should_stop, state.stop_reason = True, next(reasons, "a callback")
        self.watchdog.at(done, "saving a checkpoint")
        if self.monitor:
            self.monitor.sync()
        saved = {
            "running_accuracy": self.model.objective.running_accuracy,
            "nonfinite": self.guard.state(),
            "callbacks": self.callbacks.state(),
            "quality": self.quality.state() if self.quality else {},
            "stopped": state.stop_reason if stopped else "",
        }
        self.checkpoints.save(done, saved, measured)
        self.callbacks.tell("on_save", state)

    def _finish(self) -> dict[str, Any]:
        """Write the model, the last or the best; for the stage teacher, with its temperature."""
        settings, state = self.stage.settings, self.state
        facts: dict[str, Any] = {"steps": state.step, "world_size": self.stage.ranks}
        told = []
        if state.step < settings.steps:
            facts["stopped"] = state.stop_reason
            told.append(f"stopped after update {state.step} of {settings.steps}:"
                        f" {state.stop_reason}")  # fmt: skip
        if self.quality:
            facts["validation"] = self.quality.state()
            told.append(self.quality.told())
        if result_is_best(self.stage.config.training) and self.quality:
            facts["result_after"] = self._load_best()
            told.append(f"the result is the model after update {facts['result_after']}")
        if self.stage.name == "teacher" and self.model.teacher is not None:
            found = calibrate(self.engine, settings, self.batches, self.device)
            self.model.teacher.temperature = found.temperature
            facts["calibration"] = found._asdict()
            told.append(found.told())
        for line in told:
            say(f"{self.stage.name}: {line}")
        save_model(self.engine, state.model_folder, self.tokenizer, self._frozen)
        self.engine.destroy()
        return facts

    def _load_best(self) -> int:
        """Go back to the best checkpoint, if one was measured; returns its updates.

        In a new engine: under ZeRO-3 one that has trained cannot load (DeepSpeed's
        ``load_checkpoint``).
        """
        zero_stage = zero_section(self.stage.config.training).get("stage", 0)
        best = find_best_resume(self.stage.folder / "checkpoints", zero_stage)
        if best is None or best.step == self.state.step:
            return self.state.step
        self.engine.destroy()
        del self.engine, self.model, self.checkpoints
        gc.collect()
        self.model, _ = build_model(self.stage)
        self._start(best)
        return self.start_step


def _is_due(done: int, every: int) -> bool:
    """Whether ``done`` is one of every so many updates; 0 is never."""
    return bool(every) and done % every == 0


class _Interval:
    """What has passed since the last logged update."""

    def __init__(self, step: int) -> None:
        self.step, self.began, self.num_tokens = step, time.monotonic(), 0
