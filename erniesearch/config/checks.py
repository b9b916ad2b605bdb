"""What is wrong with a configuration, told before anything is loaded."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import Any

from erniesearch.config import aliases
from erniesearch.config.keys import (
    MAX_TOKENS,
    TRAINING_STAGES,
    RunConfig,
    TrainingConfig,
    training_stages,
)
from erniesearch.config.stage_keys import StageConfig, TrainingStageConfig
from erniesearch.config.terms import TERMS, comparing, own_terms, reads, settings_read, weight_of
from erniesearch.config.yaml_file import read_yaml, unknown_key
from erniesearch.errors import UserError

Require = Callable[[bool, str, object, str], None]
"""Raises :class:`UserError` unless the condition holds: condition, key, value, what is allowed."""


def check_yaml(path: str | Path) -> dict[str, Any]:
    """A run's YAML file, with our names for other libraries' (:mod:`erniesearch.config.aliases`),
    before any parser sees it.

    Raises:
        UserError: naming file and line (syntax), or the key and the nearest known one.
    """
    content = named_as_here(read_yaml(path), str(path))
    if problem := unknown_key(content, RunConfig):
        raise UserError(f"{path}: {problem}")
    return content


def named_as_here(content: dict[str, Any], source: str) -> dict[str, Any]:
    """As :func:`aliases.canonical`; ``source`` is named in errors."""
    try:
        return aliases.canonical(content)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


LEAST = {
    "seed": 0, "student.late_interaction_dim": 1,
    "training.log_every": 1, "training.threads_per_process": 1, "training.keep_checkpoints": 1,
    "training.max_nonfinite": 1, "training.validation_queries": 1, "training.num_processes": 0,
    "training.validation_distractors": 0, "training.validation_rerank_depth": 1,
    "training.evaluate_every": 0, "training.early_stopping_patience": 1,
    "training.save_every": 0, "training.num_workers": 0, "training.max_grad_norm": 0,
    "training.weight_decay": 0,
    "evaluation.rerank_depth": 1, "evaluation.batch_size": 1, "evaluation.max_queries": 1,
    "evaluation.num_distractors": 0, "evaluation.token_vectors_gib": 0,
    "stages.mine.num_negatives": 1, "stages.mine.max_queries": 1, "stages.teacher_check.queries": 1,
    "stages.teacher_check.depth": 1, "stages.teacher_check.num_distractors": 0,
}  # fmt: skip
"""Lower bounds of numbers; null passes where the type allows it."""
STAGE_LEAST = {
    "steps": 0, "num_negatives": 0, "easy_steps": 0, "seed": 0, "queries_per_rank": 1,
    "accumulation_steps": 1, "batch_size": 1, "chunk_size": 1, "student_lr": 0, "head_lr": 0,
    "teacher_lr": 0, "teacher_head_lr": 0, **{f"weights.{term}": 0 for term in TERMS},
}  # fmt: skip
"""The same for every training stage."""


def validate(config: RunConfig) -> RunConfig:
    """Check what the types leave open; returns the config unchanged.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """

    def require(condition: bool, key: str, value: object, what: str) -> None:
        if not condition:
            raise UserError(f"config key '{key}' is {value!r}: must be {what}")

    bounds = LEAST | {
        f"stages.{stage}.{key}": least
        for stage in TRAINING_STAGES
        for key, least in STAGE_LEAST.items()
    }
    given, config = config, with_steps(config)
    for key, value in _numbers(asdict(given), ""):
        if isinstance(value, float):
            require(isfinite(value), key, value, "a finite number")
        else:
            require(key.endswith("seed") or abs(value) < 1 << 31, key, value, "below 2^31")
        if (least := bounds.get(key)) is not None:
            require(value >= least, key, value, f"{least} or more")
    for name, stage in training_stages(config).items():
        _check_stage(config, name, stage, require)
    _check_objective(config, require)
    for key in ("max_query_length", "max_passage_length"):
        length = getattr(config.data, key)
        require(3 <= length <= MAX_TOKENS, f"data.{key}", length,
                f"3 or more ([CLS], one word, [SEP]) and at most {MAX_TOKENS}")  # fmt: skip
    _check_layers(config.student.layers, require)
    require(config.training.timeout_minutes > 0, "training.timeout_minutes",
            config.training.timeout_minutes, "above 0")  # fmt: skip
    _check_mining(config, require)
    _check_validation(config.training, require)
    for part, dropout in (("student", config.student.dropout), ("teacher", config.teacher.dropout)):
        require(
            dropout is None or 0 <= dropout < 1, f"{part}.dropout", dropout,
            "at least 0 and below 1, or null",
        )  # fmt: skip
    require(config.training.zero_stage is None or config.training.zero_json is None,
            "training.zero_stage", config.training.zero_stage,
            "null while training.zero_json names a file: one place for one value")  # fmt: skip
    return given


def with_steps(config: RunConfig) -> RunConfig:
    """The config with one update for stages whose updates follow from ``num_train_epochs``: what
    does not depend on their number needs no data.

    Raises:
        UserError: for a stage that has both.
    """
    found = training_stages(config)
    for name, stage in found.items():
        epochs = stage.num_train_epochs
        if epochs is not None and (epochs <= 0 or stage.steps):
            raise UserError(
                f"config key 'stages.{name}.num_train_epochs' is {epochs!r}: must be "
                + ("above 0, or null" if epochs <= 0 else
                   f"null while stages.{name}.steps is {stage.steps}: one place for one value")
            )  # fmt: skip
    changed: dict[str, Any] = {
        name: replace(stage, steps=1, num_train_epochs=None)
        for name, stage in found.items() if stage.num_train_epochs is not None
    }  # fmt: skip
    return replace(config, stages=replace(config.stages, **changed)) if changed else config


def _check_stage(
    config: RunConfig, name: str, stage: TrainingStageConfig, require: Require
) -> None:
    prefix, weights = f"stages.{name}", weight_of(stage.weights)
    require(0 <= stage.warmup_ratio <= 1, f"{prefix}.warmup_ratio", stage.warmup_ratio, "0 to 1")
    if stage.steps:
        require(
            any(weights.values()), f"{prefix}.weights", weights, "above 0 for one term at least"
        )
        over_group = comparing(stage.weights, "group")
        require(
            stage.num_negatives > 0 or not over_group, f"{prefix}.num_negatives", 0,
            f"1 or more: the terms {over_group} compare the passages of a group",
        )  # fmt: skip
        if isinstance(stage, StageConfig) and stage.teacher_scores != "live":
            _check_stored_scores(config, name, stage, require)
    if name == "post_train":
        for key in (term for term in TERMS if "teacher" in TERMS[term].reads):
            require(weights[key] == 0, f"{prefix}.weights.{key}", weights[key],
                    "0: post-training has no relevance labels for a teacher")  # fmt: skip
    else:
        require(weights["mlm"] == 0, f"{prefix}.weights.mlm", weights["mlm"],
                "0: only post_train masks words")  # fmt: skip
    require(
        not (stage.steps and stage.negatives == "mined" and not config.stages.mine.enabled),
        f"{prefix}.negatives", "mined",
        "bm25, given or random while stages.mine.enabled is false",
    )  # fmt: skip
    require(
        stage.negatives != "mined" or name == "cascade",
        f"{prefix}.negatives", "mined",
        "bm25, given or random: only the cascade follows mining",
    )  # fmt: skip


def _check_stored_scores(
    config: RunConfig, name: str, stage: StageConfig, require: Require
) -> None:
    """A cross-encoder that is not there can only give the scores that it left."""
    prefix, weights, kind = f"stages.{name}", stage.weights, stage.teacher_scores
    key = f"{prefix}.teacher_scores"
    if kind == "stored":
        for term in ("ce", *comparing(weights, "pairs")):
            require(getattr(weights, term) == 0, f"{prefix}.weights.{term}", getattr(weights, term),
                    f"0 while {key} is stored: it runs the teacher")  # fmt: skip
        for own in own_terms(weights):
            require(not own.trains_teacher, key, kind,
                    f"live: LossTerm '{own.name}' trains the cross-encoder")  # fmt: skip
        require(config.objective.detach_targets, "objective.detach_targets", False,
                f"true while {key} is stored: scores cannot be trained")  # fmt: skip
    reading = reads(weights, "teacher") if kind == "stored" else "tau_ce" in settings_read(weights)
    require(reading, key, kind,
            "live while ce_to_li, ce_to_de, margin_mse_li and margin_mse_de are 0: nothing reads"
            " the scores")  # fmt: skip
    require(stage.negatives in ("mined", "given") and stage.num_negatives > 0, key, kind,
            "live unless negatives are mined or given: others have no scores")  # fmt: skip
    require(stage.easy_steps == 0, f"{prefix}.easy_steps", stage.easy_steps,
            f"0 while {key} is {kind}: random negatives have none")  # fmt: skip
    asked = config.stages.mine.asks_teacher
    require(stage.negatives == "given" or (asked and config.stages.teacher.steps > 0), key, kind,
            "live unless mining asks a teacher: stages.teacher.steps above 0 and"
            " stages.mine.denoise_margin a number (one far below 0 drops nothing)")  # fmt: skip


def _check_mining(config: RunConfig, require: Require) -> None:
    mine, cascade = config.stages.mine, config.stages.cascade
    relative = mine.denoise_relative_margin
    require(
        relative is None or relative >= 0, "stages.mine.denoise_relative_margin", relative,
        "0 or more, or null: a share of the positive's score",
    )  # fmt: skip
    require(mine.depth > mine.skip_top >= 0, "stages.mine.skip_top", mine.skip_top,
            f"at least 0 and below stages.mine.depth={mine.depth}")  # fmt: skip
    mines = cascade.steps and cascade.num_negatives and cascade.negatives == "mined"
    require(
        mine.selection != "spread" or not mines or config.stages.teacher.steps > 0,
        "stages.mine.selection", "spread",
        "top or random while stages.teacher.steps is 0: it goes by the teacher's scores",
    )  # fmt: skip


def _check_validation(training: TrainingConfig, require: Require) -> None:
    """What is measured while training needs a split, and what goes by it a measurement."""
    asked = {
        "validation_metrics": training.validation_metrics,
        "evaluate_every": training.evaluate_every,
        "early_stopping_patience": training.early_stopping_patience,
        "load_best_model_at_end": training.load_best_model_at_end,
        "best_metric": training.best_metric if training.best_metric != "loss" else None,
    }  # fmt: skip
    for key, value in asked.items():
        require(not value or training.validation_split is not None, f"training.{key}", value,
                "left out while training.validation_split is null: name one, e.g. dev")  # fmt: skip
    patience = training.early_stopping_patience
    require(
        patience is None or bool(training.evaluate_every or training.save_every),
        "training.early_stopping_patience", patience, "null while training.evaluate_every and"
        " training.save_every are 0: nothing is measured before the end",
    )  # fmt: skip


def _check_objective(config: RunConfig, require: Require) -> None:
    """Temperatures, candidates, and terms that could be nothing but 0."""
    objective = config.objective
    for key in (name for name in vars(objective) if name.startswith("tau_")):
        tau = getattr(objective, key)
        require(tau is None or tau == "auto" or tau > 0, f"objective.{key}", tau, "above 0")
    reads_stored = any(
        stage.steps and stage.teacher_scores != "live" for stage in training_stages(config).values()
    )
    require(objective.tau_stored is None or reads_stored, "objective.tau_stored",
            objective.tau_stored, "null while no stage reads stored scores"
            " (stages.NAME.teacher_scores: stored or both)")  # fmt: skip
    layers = objective.virt_layers
    require(bool(layers) and len({*layers}) == len(layers), "objective.virt_layers", layers,
            "one layer of the teacher or more, none of them twice")  # fmt: skip
    dims = objective.matryoshka_dims
    require(
        len({*dims}) == len(dims) and all(dim >= 1 for dim in dims), "objective.matryoshka_dims",
        dims, "numbers of dimensions of 1 or more, none of them twice",
    )  # fmt: skip
    enabled = [stage for stage in training_stages(config).values() if stage.steps]
    require(
        not dims or not enabled or any(reads(stage.weights, "vectors") for stage in enabled),
        "objective.matryoshka_dims", dims, "empty: no stage has a term of the dual-encoder",
    )  # fmt: skip
    require(
        objective.candidates == "cross_batch" or objective.late_interaction_exchange != "ring",
        "objective.late_interaction_exchange", "ring",
        f"all_gather: with objective.candidates {objective.candidates} no passage travels",
    )  # fmt: skip
    for name, stage in training_stages(config).items():
        weights, prefix = stage.weights, f"stages.{name}"
        if not stage.steps:
            continue
        compared = comparing(weights, "candidates")
        require(
            objective.candidates != "group" or stage.num_negatives > 0 or not compared,
            "objective.candidates", "group", f"cross_batch or in_batch: {prefix} has no hard"
            f" negatives, and its terms {compared} would compare a passage with none",
        )  # fmt: skip
        require(
            not weights.dual_reg or config.student.dropout != 0, f"{prefix}.weights.dual_reg",
            weights.dual_reg, "0 while student.dropout is 0: the two passes would be equal; set"
            " student.dropout above 0 (0.1), or null for the checkpoint's, to use it",
        )  # fmt: skip


def _check_layers(layers: int | list[int] | None, require: Require) -> None:
    """``student.layers`` as far as the encoder need not be known."""
    if isinstance(layers, list):
        possible = bool(layers) and layers == sorted({*layers}) and layers[0] >= 0
        require(possible, "student.layers", layers, "layers in rising order, from 0")
    else:
        require(layers is None or layers >= 1, "student.layers", layers, "1 or more, or null")


def _numbers(content: dict[str, Any], prefix: str) -> Iterator[tuple[str, int | float]]:
    """Every number of a config with its dotted key."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield prefix + key, value
