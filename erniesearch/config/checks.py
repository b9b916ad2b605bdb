"""What is wrong with a configuration, told before anything is loaded."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from erniesearch.config.keys import MAX_TOKENS, RunConfig, StageConfig, training_stages
from erniesearch.config.yaml_file import read_yaml, unknown_key
from erniesearch.errors import UserError

Require = Callable[[bool, str, object, str], None]
"""Raises :class:`UserError` unless the condition holds: condition, key, value, what is allowed."""


def check_yaml(path: str | Path, cls: type = RunConfig) -> None:
    """Reject unreadable YAML and unknown keys before any parser sees the file.

    Raises:
        UserError: naming file and line (syntax), or the key and the nearest known one.
    """
    if problem := unknown_key(read_yaml(path), cls):
        raise UserError(f"{path}: {problem}")


def validate(config: RunConfig) -> RunConfig:
    """Check what the types leave open; returns the config unchanged.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """

    def require(condition: bool, key: str, value: object, what: str) -> None:
        if not condition:
            raise UserError(f"config key '{key}' is {value!r}: must be {what}")

    for key, value in _numbers(asdict(config), ""):
        if isinstance(value, float):
            require(isfinite(value), key, value, "a finite number")
        else:
            require(key.endswith("seed") or abs(value) < 1 << 31, key, value, "below 2^31")
    for name, stage in training_stages(config).items():
        _check_stage(config, name, stage, require)
    _check_objective(config, require)
    for key in ("max_query_length", "max_passage_length"):
        length = getattr(config.data, key)
        require(3 <= length <= MAX_TOKENS, f"data.{key}", length,
                f"3 or more ([CLS], one word, [SEP]) and at most {MAX_TOKENS}")  # fmt: skip
    require(config.seed >= 0, "seed", config.seed, "0 or more")
    _check_layers(config.student.layers, require)
    require(config.student.late_interaction_dim >= 1, "student.late_interaction_dim",
            config.student.late_interaction_dim, "1 or more")  # fmt: skip
    for key in ("log_every", "threads_per_process", "keep_checkpoints", "max_nonfinite",
                "validation_queries"):  # fmt: skip
        require(getattr(config.training, key) >= 1, f"training.{key}",
                getattr(config.training, key), "1 or more")  # fmt: skip
    for key in ("num_processes", "save_every", "num_workers", "max_grad_norm", "weight_decay"):
        require(getattr(config.training, key) >= 0, f"training.{key}",
                getattr(config.training, key), "0 or more")  # fmt: skip
    require(config.training.timeout_minutes > 0, "training.timeout_minutes",
            config.training.timeout_minutes, "above 0")  # fmt: skip
    _check_mining_and_evaluation(config, require)
    for part, dropout in (("student", config.student.dropout), ("teacher", config.teacher.dropout)):
        require(
            dropout is None or 0 <= dropout < 1, f"{part}.dropout", dropout,
            "at least 0 and below 1, or null",
        )  # fmt: skip
    require(config.training.zero_stage is None or config.training.zero_json is None,
            "training.zero_stage", config.training.zero_stage,
            "null while training.zero_json names a file: one place for one value")  # fmt: skip
    return config


def _check_stage(config: RunConfig, name: str, stage: StageConfig, require: Require) -> None:
    prefix = f"stages.{name}"
    for key in ("steps", "num_negatives", "easy_steps"):
        require(getattr(stage, key) >= 0, f"{prefix}.{key}", getattr(stage, key), "0 or more")
    require(stage.seed is None or stage.seed >= 0, f"{prefix}.seed", stage.seed, "0 or more")
    for key in ("queries_per_rank", "accumulation_steps"):
        require(getattr(stage, key) >= 1, f"{prefix}.{key}", getattr(stage, key), "1 or more")
    for key in ("batch_size", "chunk_size"):
        number = getattr(stage, key)
        require(number is None or number >= 1, f"{prefix}.{key}", number, "1 or more, or null")
    for key in ("student_lr", "head_lr", "teacher_lr"):
        require(getattr(stage, key) >= 0, f"{prefix}.{key}", getattr(stage, key), "0 or more")
    rate = stage.teacher_head_lr
    require(rate is None or rate >= 0, f"{prefix}.teacher_head_lr", rate, "0 or more, or null")
    require(0 <= stage.warmup_ratio <= 1, f"{prefix}.warmup_ratio", stage.warmup_ratio, "0 to 1")
    weights = asdict(stage.weights)
    for key, value in weights.items():
        require(value >= 0, f"{prefix}.weights.{key}", value, "0 or more")
    if stage.steps:
        require(
            any(weights.values()), f"{prefix}.weights", weights, "above 0 for one term at least"
        )
        over_group = [k for k in ("ce", "ce_to_li", "ce_to_de") if weights[k]]
        require(
            stage.num_negatives > 0 or not over_group, f"{prefix}.num_negatives", 0,
            f"1 or more: the terms {over_group} compare the passages of a group",
        )  # fmt: skip
    if stage.steps and stage.teacher_scores == "stored":
        _check_stored_scores(config, name, stage, require)
    if name == "post_train":
        for key in ("ce", "ce_to_li", "ce_to_de", "attention", "virt"):
            require(weights[key] == 0, f"{prefix}.weights.{key}", weights[key],
                    "0: post-training has no relevance labels for a teacher")  # fmt: skip
        require(stage.num_negatives == 0, f"{prefix}.num_negatives", stage.num_negatives,
                "0: spans have no hard negatives")  # fmt: skip
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
    prefix, weights = f"stages.{name}", stage.weights
    for key in ("ce", "attention", "virt"):
        require(getattr(weights, key) == 0, f"{prefix}.weights.{key}", getattr(weights, key),
                f"0 while {prefix}.teacher_scores is stored: it runs the teacher")  # fmt: skip
    read = weights.ce_to_li or weights.ce_to_de
    require(bool(read), f"{prefix}.teacher_scores", "stored",
            "live while ce_to_li and ce_to_de are 0: nothing reads the scores")  # fmt: skip
    require(stage.negatives in ("mined", "given") and stage.num_negatives > 0,
            f"{prefix}.teacher_scores", "stored",
            "live unless negatives are mined or given: others have no scores")  # fmt: skip
    require(stage.easy_steps == 0, f"{prefix}.easy_steps", stage.easy_steps,
            f"0 while {prefix}.teacher_scores is stored: random negatives have none")  # fmt: skip
    require(config.objective.detach_targets, "objective.detach_targets", False,
            f"true while {prefix}.teacher_scores is stored: scores cannot be trained")  # fmt: skip
    mine = config.stages.mine
    limits = (mine.denoise_margin, mine.denoise_threshold)
    asked = mine.selection == "spread" or any(limit is not None for limit in limits)
    require(stage.negatives == "given" or (asked and config.stages.teacher.steps > 0),
            f"{prefix}.teacher_scores", "stored",
            "live unless mining asks a teacher: stages.teacher.steps above 0 and"
            " stages.mine.denoise_margin a number (one far below 0 drops nothing)")  # fmt: skip


def _check_mining_and_evaluation(config: RunConfig, require: Require) -> None:
    mine, evaluation, check = config.stages.mine, config.evaluation, config.stages.teacher_check
    for key in ("queries", "depth"):
        require(getattr(check, key) >= 1, f"stages.teacher_check.{key}", getattr(check, key),
                "1 or more")  # fmt: skip
    require(mine.depth > mine.skip_top >= 0, "stages.mine.skip_top", mine.skip_top,
            f"at least 0 and below stages.mine.depth={mine.depth}")  # fmt: skip
    require(mine.num_negatives >= 1, "stages.mine.num_negatives", mine.num_negatives, "1 or more")
    cascade = config.stages.cascade
    mines = cascade.steps and cascade.num_negatives and cascade.negatives == "mined"
    require(
        mine.selection != "spread" or not mines or config.stages.teacher.steps > 0,
        "stages.mine.selection", "spread",
        "top or random while stages.teacher.steps is 0: it goes by the teacher's scores",
    )  # fmt: skip
    for key in ("rerank_depth", "batch_size"):
        require(getattr(evaluation, key) >= 1, f"evaluation.{key}", getattr(evaluation, key),
                "1 or more")  # fmt: skip
    for key, number in (("evaluation.max_queries", evaluation.max_queries),
                        ("stages.mine.max_queries", mine.max_queries)):  # fmt: skip
        require(number is None or number >= 1, key, number, "1 or more, or null")
    for key, number in (("evaluation", evaluation.num_distractors),
                        ("stages.teacher_check", check.num_distractors)):  # fmt: skip
        require(number is None or number >= 0, f"{key}.num_distractors", number,
                "0 or more, or null")  # fmt: skip


def _check_objective(config: RunConfig, require: Require) -> None:
    """Temperatures, candidates, and terms that could be nothing but 0."""
    objective = config.objective
    for key in ("tau_de", "tau_li", "tau_att", "tau_ce", "tau_de_kl", "tau_li_kl", "tau_li_target"):
        tau = getattr(objective, key)
        require(tau is None or tau == "auto" or tau > 0, f"objective.{key}", tau, "above 0")
    layers = objective.virt_layers
    require(bool(layers) and len({*layers}) == len(layers), "objective.virt_layers", layers,
            "one layer of the teacher or more, none of them twice")  # fmt: skip
    require(
        objective.candidates == "cross_batch" or objective.late_interaction_exchange != "ring",
        "objective.late_interaction_exchange", "ring",
        f"all_gather: with objective.candidates {objective.candidates} no passage travels",
    )  # fmt: skip
    for name, stage in training_stages(config).items():
        weights, prefix = stage.weights, f"stages.{name}"
        if not stage.steps:
            continue
        compared = [k for k in ("li", "de", "li_to_de", "dual_reg") if getattr(weights, k)]
        require(
            objective.candidates != "group" or stage.num_negatives > 0 or not compared,
            "objective.candidates", "group", f"cross_batch or in_batch while {prefix}.num_negatives"
            f" is 0: the terms {compared} would compare a passage with none",
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
