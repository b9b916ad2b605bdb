"""How stages depend on one another, where a run keeps its files, and when a result is still good.

    base ─ post_train ─┬─ contrastive (baseline)
                       └─ interaction ─┬─ mine ─ cascade ─ export, evaluate
    base ─ teacher ────────────────────┤
                                       └─ teacher_check (measures; only evaluate reads it)

A stage whose ``steps`` are 0 is left out and its successors start from its predecessor.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from erniesearch.config.keys import (
    TRAINING_STAGES,
    ObjectiveConfig,
    RunConfig,
    TrainingConfig,
    training_stages,
)
from erniesearch.config.stage_keys import LossWeights, TrainingStageConfig
from erniesearch.config.terms import active, reads, settings_read, weight_of
from erniesearch.errors import UserError
from erniesearch.files import hash_files
from erniesearch.installation import zero_file
from erniesearch.run_folder import RunFolder

ORDER = ("bm25", "post_train", "contrastive", "interaction", "teacher", "teacher_check",
         "mine", "cascade", "export", "evaluate")  # fmt: skip
"""Every step of the pipeline."""
STUDENT_CHAIN = {
    "post_train": (),
    "contrastive": ("post_train",),
    "interaction": ("post_train",),
    "teacher": (),
    "teacher_check": ("interaction", "post_train"),
    "mine": ("interaction", "post_train"),
    "cascade": ("interaction", "post_train"),
}


def needs_student(weights: LossWeights) -> bool:
    """Whether any term of the objective runs the student."""
    return reads(weights, "vectors", "tokens", "projections", "words")


def needs_teacher(weights: LossWeights) -> bool:
    """Whether any term of the objective runs the cross-encoder."""
    return reads(weights, "teacher")


def runs_teacher(stage: TrainingStageConfig) -> bool:
    """Whether the stage runs the cross-encoder, rather than read scores that it has stored."""
    return needs_teacher(stage.weights) and stage.teacher_scores != "stored"


def attention_layers(weights: LossWeights, objective: ObjectiveConfig) -> list[int]:
    """The teacher's layers whose attention the objective has as a target."""
    return [-1] * bool(weights.attention) + objective.virt_layers * bool(weights.virt)


def distilled_from(weights: LossWeights) -> tuple[str, ...]:
    """The models whose scores or attention are a target of the objective."""
    teachers = {term.teacher for term in active(weights).values()}
    return tuple(name for name in ("late_interaction", "cross_encoder") if name in teachers)


def checked_teachers(config: RunConfig) -> tuple[str, ...]:
    """The models that ``teacher_check`` measures: those that the cascade distils from, but no
    cross-encoder where all that is here of it are scores that came with the data."""
    cascade = config.stages.cascade
    elsewhere = not runs_teacher(cascade) and cascade.negatives == "given"
    found = distilled_from(cascade.weights)
    return tuple(name for name in found if not (elsewhere and name == "cross_encoder"))


def is_enabled(config: RunConfig, stage: str) -> bool:
    """Whether the run contains this stage."""
    all_stages, cascade = config.stages, config.stages.cascade
    if stage == "teacher_check":
        check = all_stages.teacher_check
        return bool(check.enabled and cascade.steps and checked_teachers(config))
    if stage == "mine":
        return all_stages.mine.enabled
    return training_stages(config)[stage].steps > 0


def student_source(config: RunConfig, stage: str) -> str | None:
    """The stage whose student this stage starts from; None for the pretrained weights."""
    return next((name for name in STUDENT_CHAIN[stage] if is_enabled(config, name)), None)


def teacher_source(config: RunConfig, stage: str) -> str | None:
    """The stage whose cross-encoder this stage starts from; None for the pretrained weights."""
    wanted = stage in ("mine", "cascade") or (
        stage == "teacher_check" and "cross_encoder" in checked_teachers(config)
    )
    return "teacher" if wanted and is_enabled(config, "teacher") else None


def check_split(config: RunConfig) -> str:
    """The split whose queries ``teacher_check`` draws."""
    if named := config.stages.teacher_check.split or config.training.validation_split:
        return named
    there = (Path(config.data.path) / "qrels" / "dev.tsv").is_file()
    return "dev" if there else config.data.train_split


def final_student(config: RunConfig) -> str | None:
    """The last stage that trains the students; None if there is none."""
    order = ("cascade", "interaction", "post_train", "contrastive")
    return next((name for name in order if trains_student(config, name)), None)


def trains_student(config: RunConfig, stage: str) -> bool:
    """Whether the stage is in the run and any of its terms runs the student."""
    return is_enabled(config, stage) and needs_student(Stage(config, stage).weights)


def trains_late_interaction(config: RunConfig) -> bool:
    """Whether the final student's late-interaction head was trained at all."""
    final = final_student(config)
    chain = [final, *STUDENT_CHAIN[final]] if final else []
    return any(
        reads(Stage(config, name).weights, "tokens") for name in chain if is_enabled(config, name)
    )


def final_teacher(config: RunConfig) -> str | None:
    """The last stage that trains the cross-encoder; None if there is none."""
    cascade = config.stages.cascade
    if cascade.steps and runs_teacher(cascade):
        return "cascade"
    return "teacher" if is_enabled(config, "teacher") else None


@dataclass(frozen=True)
class Stage:
    """A training stage of a run: what it is made of, and on ``ranks`` ranks its batch, its folder
    and what its result depends on."""

    config: RunConfig
    name: str
    ranks: int = 1

    @property
    def settings(self) -> TrainingStageConfig:
        """``config.stages.NAME``."""
        return training_stages(self.config)[self.name]

    @property
    def weights(self) -> LossWeights:
        """The weights of its terms."""
        return self.settings.weights

    @property
    def folder(self) -> Path:
        """Where its log, checkpoints and models lie."""
        return RunFolder(self.config.run_dir).stage(self.name)

    @property
    def seed(self) -> int:
        """Of its data order, dropout and new heads: its own, or the run's."""
        return self.config.seed if self.settings.seed is None else self.settings.seed

    @property
    def queries_per_rank(self) -> int:
        """Queries of a micro-step on each rank.

        Raises:
            UserError: if the ranks cannot share ``batch_size`` equally.
        """
        settings = self.settings
        if settings.batch_size is None:
            return settings.queries_per_rank
        if settings.batch_size % self.ranks:
            raise UserError(
                f"stages.{self.name}.batch_size is {settings.batch_size}, which {self.ranks} ranks"
                " cannot share equally: start a number of ranks that divides it"
            )
        return settings.batch_size // self.ranks

    @property
    def global_batch(self) -> int:
        """Queries of an update over all ranks and micro-steps."""
        return self.queries_per_rank * self.settings.accumulation_steps * self.ranks

    @cached_property
    def fingerprint(self) -> str:
        """As :func:`fingerprint`."""
        return fingerprint(self.config, self.name, self.ranks)


def data_hash(config: RunConfig) -> str:
    """Hash of corpus, queries and qrels."""
    root = Path(config.data.path)
    return hash_files([root / "corpus.jsonl", root / "queries.jsonl", *root.glob("qrels/*.tsv")])


def given_negatives(config: RunConfig) -> Path:
    """The hard negatives that came with the data."""
    return Path(config.data.path) / "negatives.jsonl"


NEW_STUDENT_KEYS = {"keep": "all", "query_prompt": None, "passage_prompt": None}
"""Left out of fingerprints where they do nothing: runs of before them are still good."""


def models_hash(config: RunConfig, stage: str) -> list[Any]:
    """Settings of the models that a stage runs, with the contents of those that are folders."""
    student, teacher = _decisive(asdict(config.student)), _decisive(asdict(config.teacher))
    if stage == "teacher_check":
        if "cross_encoder" not in checked_teachers(config):
            teacher = {"path": ""}
    elif stage in TRAINING_STAGES:
        weights = Stage(config, stage).weights
        if not needs_student(weights):  # its vocabulary, and perhaps its weights, are read
            student = {key: student[key] for key in ("path", "revision", "trust_remote_code")}
        if not needs_teacher(weights):
            teacher = {"path": ""}
    for key, default in NEW_STUDENT_KEYS.items():
        if student.get(key) == default:
            student.pop(key, None)
    described: list[Any] = [student, teacher]
    for path in (student["path"], teacher["path"]):
        folder = Path(path)
        if path and folder.is_dir():
            patterns = ("*.json", "*.safetensors", "artifact.metadata", "[0-9]_Dense/*",
                        "[0-9]_MultiVectorMask/*")  # fmt: skip
            files = [file for pattern in patterns for file in folder.glob(pattern)]
            described.append(hash_files(files))
    return described


def upstream(config: RunConfig, stage: str) -> list[str]:
    """The stages whose results this one reads."""
    if stage == "bm25":
        return []
    if stage in ("evaluate", "export"):
        read = TRAINING_STAGES + ("teacher_check",) * (stage == "evaluate")
        return [name for name in read if is_enabled(config, name)]
    sources = [student_source(config, stage), teacher_source(config, stage)]
    if stage in TRAINING_STAGES:
        settings = Stage(config, stage).settings
        if settings.num_negatives and settings.negatives != "random":
            sources.append({"mined": "mine", "bm25": "bm25"}.get(settings.negatives))
    return [name for name in sources if name]


# One partitioning of parameters each: a stage continues after a change within a row.
ZERO_FAMILY = {None: "1 or 2", 0: "0", 1: "1 or 2", 2: "1 or 2", 3: "3"}
SPEED_ONLY = (
    "log_every", "trackers", "save_every", "keep_checkpoints", "async_save", "timeout_minutes",
    "max_nonfinite", "num_workers", "threads_per_process", "num_processes",
    "vector_search", "compile",
    "activation_checkpointing", "kernels", "late_interaction_exchange", "attn_implementation",
    *(field.name for field in fields(TrainingConfig) if field.name.startswith("validation_")),
    "evaluate_every", "best_metric", "early_stopping_patience", "load_best_model_at_end",
)  # fmt: skip
LATER = ("tau_stored", "tau_de_margin", "tau_li_margin", "matryoshka_dims",
         "denoise_relative_margin")  # fmt: skip
"""Keys that runs of before did not have; null or empty, they decide nothing."""


def fingerprint(config: RunConfig, stage: str, world_size: int | None = None) -> str:
    """Hash of everything that decides a stage's result: settings, data, and upstream stages.

    ``world_size`` is the number of ranks of a training stage; it counts through the size of a
    micro-step's batch alone (but for ``objective.candidates: in_batch``), so that other ranks may
    continue with the same batch. Settings that change only speed or logging, and the objective's
    that no term of the stage reads, are left out, so that changing them redoes nothing.
    """
    settings: dict[str, Any] = {"stage": stage, "seed": config.seed, "data": asdict(config.data)}
    settings["files"] = data_hash(config)
    if stage == "bm25":
        settings["stemmer"] = config.evaluation.bm25_stemmer
        settings["tokenizer"] = config.evaluation.bm25_tokenizer
    else:
        settings["models"] = models_hash(config, stage)
    if stage in ("evaluate", "export"):
        settings["objective"] = _decisive(asdict(config.objective))
    if stage == "evaluate":
        settings["evaluation"] = asdict(config.evaluation)
        if not config.evaluation.late_interaction_index:
            del settings["evaluation"]["late_interaction_index"]  # as before there was one
    elif stage == "teacher_check":
        settings["settings"] = asdict(config.stages.teacher_check) | {"split": check_split(config)}
        settings["teachers"] = checked_teachers(config)
    elif stage == "mine":
        settings["settings"] = _decisive(asdict(config.stages.mine))
    elif stage in TRAINING_STAGES:
        trained = Stage(config, stage, world_size or 1)
        own = asdict(trained.settings)
        own["batch_size"] = trained.queries_per_rank * trained.ranks
        own.pop("queries_per_rank")
        own.pop("num_train_epochs")  # what it stands for are the steps
        if trained.settings.teacher_scores == "live":
            own.pop("teacher_scores", None)  # runs of before the option are still good
        settings["seed"] = trained.seed
        own.pop("seed")
        # A term that is not computed decides nothing, nor does one that this version does not know.
        weights = weight_of(trained.weights)
        own["weights"] = {term: weight for term, weight in weights.items() if weight}
        settings["settings"] = own
        settings["objective"] = _decisive_objective(trained)
        if trained.settings.negatives == "given":
            settings["negatives"] = hash_files([given_negatives(config)])
        training = _decisive(asdict(config.training))
        if decides := validation_decides(config.training):
            training["validation"] = decides
        training["zero_stage"] = ZERO_FAMILY[config.training.zero_stage]
        if config.training.zero_json:
            training["zero_json"] = hash_files([zero_file(config.training.zero_json)])
        settings["training"] = training
    settings["upstream"] = [
        fingerprint(config, name, world_size) for name in upstream(config, stage)
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def result_is_best(training: TrainingConfig) -> bool:
    """Whether a stage's result is its best checkpoint."""
    wanted = training.load_best_model_at_end
    return training.early_stopping_patience is not None if wanted is None else wanted


def validation_decides(training: TrainingConfig) -> dict[str, Any]:
    """The settings of measuring, where a stage's result depends on what is measured."""
    if training.early_stopping_patience is None and not result_is_best(training):
        return {}
    names = ("save_every", "evaluate_every", "best_metric", "early_stopping_patience")
    found = {name: getattr(training, name) for name in names}
    found["load_best_model_at_end"] = result_is_best(training)
    own = {field.name for field in fields(training) if field.name.startswith("validation_")}
    if training.best_metric == "loss":
        own -= {"validation_metrics", "validation_distractors", "validation_rerank_depth"}
    return found | {name: getattr(training, name) for name in own - {"validation_metrics"}}


def _decisive_objective(stage: Stage) -> dict[str, Any]:
    """The objective's settings that a stage's terms read."""
    read = settings_read(stage.weights)
    settings = _decisive(asdict(stage.config.objective))
    if settings["candidates"] == "in_batch":
        # Here the ranks count: a query is compared with its own rank's passages.
        own = f"in_batch of {stage.queries_per_rank}"
        settings["candidates"] = own if stage.ranks > 1 else "cross_batch"
    if stage.settings.teacher_scores != "live":
        read = read | {"tau_stored"}
    return {key: value for key, value in settings.items() if key in read}


def _decisive(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items()
            if key not in SPEED_ONLY and (value not in (None, []) or key not in LATER)}  # fmt: skip
