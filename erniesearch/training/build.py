"""What a stage is made of: its model, its batches, its learning rates."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from erniesearch import distributed, stages
from erniesearch.config.keys import (
    ObjectiveConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    training_stages,
)
from erniesearch.config.stage_keys import LossWeights, TrainingStageConfig
from erniesearch.config.terms import reads, settings_read, trains_teacher
from erniesearch.data.batches import GroupCollator, SpanCollator, StepBatches
from erniesearch.data.collection import RetrievalData, with_split
from erniesearch.data.negatives import read_negatives, read_scored_negatives, scored_lists
from erniesearch.data.sampler import GroupSampler, PassageSampler, StepSampler, check_group_fits
from erniesearch.data.text_format import PLAIN, TextFormat, TextReader
from erniesearch.errors import UserError
from erniesearch.models.attention import attention_options
from erniesearch.models.backbone import (
    check_recomputes,
    check_same_vocabulary,
    kept_layers,
    load_config,
    load_tokenizer,
    max_positions,
    resolve,
    weights_wanted,
)
from erniesearch.models.compiled import check_compiles
from erniesearch.models.cross_encoder import TEMPERATURE_FILE, CrossEncoder, stored_temperature
from erniesearch.models.encoder import StudentEncoder
from erniesearch.models.joint import JointModel, connect_layers
from erniesearch.models.start import check_lengths, read_start
from erniesearch.progress import say
from erniesearch.run_folder import RunFolder
from erniesearch.stages import Stage
from erniesearch.training.engine import zero_section
from erniesearch.training.retrieval_quality import check_best_metric

STORED_LISTS = 4096
"""Lists that ``objective.tau_stored: auto`` is fitted on, the first ones of the file."""


def build_model(stage: Stage) -> tuple[JointModel, PreTrainedTokenizerBase]:
    """The joint module of a stage with just the parts its terms need, and the tokenizer.

    Raises:
        UserError: if vocabularies differ, inputs are longer than the models' positions, or a
            model the stage starts from has not been trained yet.
    """
    return assemble_model(stage, *part_settings(stage.config, stage.name))


def assemble_model(
    stage: Stage, student_settings: StudentConfig, teacher_settings: TeacherConfig
) -> tuple[JointModel, PreTrainedTokenizerBase]:
    """As :func:`build_model`, from models that need not be those the stage starts from."""
    config = stage.config
    tokenizer = load_tokenizer(student_settings)
    # New heads are the same on every rank and for every number of ranks.
    distributed.seed_everything(stage.seed, 4)
    student = teacher = None
    query_length, passage_length = config.data.max_query_length, config.data.max_passage_length
    if stages.needs_student(stage.weights):
        _check_length(load_config(student_settings), student_settings.path,
                      max(query_length, passage_length))  # fmt: skip
        check_lengths(student_settings, query_length, passage_length)
        student = StudentEncoder(student_settings, masked_lm=bool(stage.weights.mlm))
        _check_dims(config.objective, student.hidden_size)
    if stages.runs_teacher(stage.settings):
        check_same_vocabulary(
            tokenizer,
            load_tokenizer(teacher_settings),
            student_settings.path,
            teacher_settings.path,
            read_start(student_settings).text_format.prefixes,
        )
        _check_length(load_config(teacher_settings), teacher_settings.path,
                      query_length + passage_length)  # fmt: skip
        teacher = CrossEncoder(
            teacher_settings, stages.attention_layers(stage.weights, config.objective)
        )
        if not trains_teacher(stage.weights, config.objective.detach_targets):
            teacher.requires_grad_(False)
    objective = config.objective
    if objective.tau_ce == "auto":
        tau = _teacher_temperature(stage, teacher_settings.path)
        objective = replace(objective, tau_ce=tau)
    if objective.tau_stored == "auto":
        objective = replace(objective, tau_stored=_temperature_of_stored(stage))
    model = JointModel(student, teacher, stage.weights, objective, tokenizer, stage.seed)
    return model, tokenizer


def _teacher_temperature(stage: Stage, path: str) -> float:
    """What ``objective.tau_ce: auto`` stands for in a stage."""
    if not _reads_tau_ce(stage.settings, stage.config.objective) or not weights_wanted():
        return 1.0  # nothing depends on it
    temperature = stored_temperature(Path(resolve(path)))
    if temperature is None:
        raise UserError(no_temperature(path))
    return temperature


def _reads_tau_ce(settings: TrainingStageConfig, objective: ObjectiveConfig) -> bool:
    """Whether a term divides scores by it: stored ones may have a temperature of their own."""
    own = settings.teacher_scores == "stored" and objective.tau_stored is not None
    return not own and "tau_ce" in settings_read(settings.weights)


def _temperature_of_stored(stage: Stage) -> float:
    """What ``objective.tau_stored: auto`` stands for in a stage."""
    if stage.settings.teacher_scores == "live" or not weights_wanted():
        return 1.0  # nothing depends on it
    from erniesearch.training.calibration import fit_temperature

    path = _negatives_file(stage)
    lists = scored_lists(path, STORED_LISTS)
    rows = [torch.tensor(scores, dtype=torch.float64) for scores in lists]
    unit = float(torch.cat(rows).std()) if rows else 0.0  # theirs; the fit has bounds
    if not unit:
        raise UserError(
            f"{path}: objective.tau_stored is auto, but no list has a positive and a negative of"
            " different scores to fit a temperature to: set it to a number"
        )
    scores = pad_sequence(rows, batch_first=True, padding_value=math.nan)
    temperature = unit * fit_temperature(scores.nan_to_num() / unit, scores.isfinite())
    say(
        f"{stage.name}: temperature {temperature:.3g} of the stored scores by likelihood on"
        f" {len(lists)} lists of {path}"
    )
    return temperature


def no_temperature(path: str) -> str:
    """Says that ``objective.tau_ce: auto`` has nothing to go by."""
    return (
        f"objective.tau_ce is auto, but no temperature lies with the teacher '{path}'"
        f" ({TEMPERATURE_FILE}): the stage teacher finds one (stages.teacher.steps above 0), or set"
        " objective.tau_ce to a number"
    )


def check_inputs(config: RunConfig, data: RetrievalData) -> None:
    """What can be wrong with models and groups, before anything is trained.

    Raises:
        UserError: as :func:`build_model` would in the middle of a pipeline.
    """
    for stage in training_stages(config).values():
        if stage.steps:
            check_group_fits(data, stage.num_negatives)
    if any(s.steps and s.num_negatives and s.negatives == "given"
           for s in training_stages(config).values()):  # fmt: skip
        given = read_negatives(stages.given_negatives(config), data)
        if not given.keys() & data.relevant().keys():
            raise UserError(
                f"{stages.given_negatives(config)}: names no query of the split"
                f" {config.data.train_split}"
            )
    for name, stage in training_stages(config).items():
        if stage.steps and stage.teacher_scores != "live" and stage.negatives == "given":
            build_sampler(Stage(config, name), data)
    check_best_metric(config)
    if config.training.validation_split is not None:
        with_split(data, config.data.path, config.training.validation_split)
    student = config.student
    teacher = base_teacher(config)
    tokenizer = load_tokenizer(student)
    enabled = [stage for stage in training_stages(config).values() if stage.steps]
    weights = [stage.weights for stage in enabled]
    query_length, passage_length = config.data.max_query_length, config.data.max_passage_length
    start = read_start(student)
    check_lengths(student, query_length, passage_length)
    TextReader(tokenizer, start.text_format.query, query_length)
    TextReader(tokenizer, start.text_format.passage, passage_length)
    _check_expansion(config, start.text_format)
    student_config = load_config(student)
    _check_length(student_config, student.path, max(query_length, passage_length))
    kept_layers(student_config, student)
    _check_computes(config, student, student_config)
    _check_dims(config.objective, int(student_config.hidden_size))
    _check_temperature(config, teacher)
    if any(map(stages.runs_teacher, enabled)):
        check_same_vocabulary(tokenizer, load_tokenizer(teacher), student.path, teacher.path,
                              start.text_format.prefixes)  # fmt: skip
        teacher_config = load_config(teacher)
        _check_length(teacher_config, teacher.path, query_length + passage_length)
        _check_computes(config, teacher, teacher_config)
        _check_attention(config.objective, weights, student, teacher)


def _check_computes(
    config: RunConfig, settings: StudentConfig | TeacherConfig, model: PretrainedConfig
) -> None:
    """The model has the attention that is asked for, and can recompute activations."""
    attention_options(settings, model)
    if config.training.activation_checkpointing:
        check_recomputes(model)
    if config.training.compile:
        zero_stage = zero_section(config.training).get("stage", 0)
        check_compiles(config.training, zero_stage, settings, model)


def _check_expansion(config: RunConfig, text_format: TextFormat) -> None:
    """No library's dual-encoder fills its queries up: its vectors are none where it attends to
    what fills them up."""
    if not (text_format.query.expand and text_format.query.attend):
        return
    for name, stage in training_stages(config).items():
        if stage.steps and reads(stage.weights, "vectors"):
            raise UserError(
                f"stages.{name}: its terms train the dual-encoder, but '{config.student.path}'"
                " attends to the tokens that fill its queries up, which no dual-encoder can be"
                " exported with: train late interaction alone (weights.li, ce_to_li, attention),"
                " or set student.keep to weights_only"
            )


def _check_attention(
    objective: ObjectiveConfig,
    weights: list[LossWeights],
    student: StudentConfig,
    teacher: TeacherConfig,
) -> None:
    """The models have the projections that the stages' terms over attention ask for."""
    layers = [layer for w in weights for layer in stages.attention_layers(w, objective)]
    if layers:
        cross_encoder = CrossEncoder(teacher, layers)
        if any(w.virt for w in weights):
            connect_layers(StudentEncoder(student), cross_encoder, objective.virt_layers)


def _check_dims(objective: ObjectiveConfig, hidden_size: int) -> None:
    for dim in objective.matryoshka_dims:
        if dim >= hidden_size:
            raise UserError(
                f"objective.matryoshka_dims has {dim}: the student's vectors have {hidden_size}"
                " dimensions, which always count; name smaller numbers"
            )


def _check_temperature(config: RunConfig, teacher: TeacherConfig) -> None:
    """``tau_ce: auto`` needs a stage, or a model, that brings a temperature."""
    if config.objective.tau_ce != "auto":
        return
    for name, stage in training_stages(config).items():
        needed = stage.steps and _reads_tau_ce(stage, config.objective)
        if needed and not stages.teacher_source(config, name):
            folder = Path(resolve(teacher.path))
            if stored_temperature(folder) is None:
                raise UserError(no_temperature(teacher.path))


def base_teacher(config: RunConfig) -> TeacherConfig:
    """The teacher's pretrained weights: its own, or the student's."""
    if config.teacher.path:
        return config.teacher
    return replace(config.teacher, path=config.student.path, revision=config.student.revision)


def part_settings(config: RunConfig, name: str) -> tuple[StudentConfig, TeacherConfig]:
    """Student and teacher settings with ``path`` set to what the stage starts from."""
    folder = RunFolder(config.run_dir)
    student, teacher = config.student, base_teacher(config)
    if source := stages.student_source(config, name):
        path = _trained(folder, name, source, "student")
        student = replace(student, path=path, revision=None, layers=None)  # they are cut already
    if source := stages.teacher_source(config, name):
        teacher = replace(teacher, path=_trained(folder, name, source, "teacher"), revision=None)
    return student, teacher


def _trained(folder: RunFolder, name: str, source: str, part: str) -> str:
    path = folder.model(source, part)
    if not path.is_dir():
        raise UserError(
            f"stage {name} starts from the {part} of stage {source}, which is not trained yet"
            f" ({path} is missing): train {source} first, or start `erniesearch run`"
        )
    return str(path)


def _check_length(config: PretrainedConfig, path: str, needed: int) -> None:
    limit = max_positions(config)
    if needed > limit:
        raise UserError(
            f"model '{path}' reads at most {limit} tokens, the data settings need {needed}: lower"
            " data.max_query_length or data.max_passage_length"
        )


def build_batches(
    stage: Stage, data: RetrievalData, tokenizer: PreTrainedTokenizerBase
) -> StepBatches:
    """This rank's batches of the stage."""
    config, settings = stage.config, stage.settings
    sampler: StepSampler
    collator: GroupCollator | SpanCollator
    lengths = (config.data.max_query_length, config.data.max_passage_length)
    text_format = text_format_of(stage)
    if stage.name == "post_train":
        sampler = PassageSampler(len(data.pids), stage.global_batch, stage.seed)
        collator = SpanCollator(
            data, tokenizer, *lengths, stage.seed, stage.weights.mlm > 0, text_format
        )
    else:
        sampler = build_sampler(stage, data)
        collator = GroupCollator(data, sampler.qids, tokenizer, *lengths, text_format)
        _tell_short_lists(stage, sampler)
    return StepBatches(
        sampler, collator, settings.steps, settings.accumulation_steps, distributed.rank(),
        stage.queries_per_rank, stage.ranks,
    )  # fmt: skip


def text_format_of(stage: Stage) -> TextFormat:
    """How a stage's texts are read: as its student does, plain where none runs."""
    if not stages.needs_student(stage.weights):
        return PLAIN
    return read_start(part_settings(stage.config, stage.name)[0]).text_format


def build_sampler(stage: Stage, data: RetrievalData) -> GroupSampler:
    """The stage's sampler over the whole global batch."""
    settings = stage.settings
    negatives = scores = None
    if settings.num_negatives and settings.negatives != "random":
        path, known = _negatives_file(stage), data if settings.negatives == "given" else None
        if settings.teacher_scores != "live":
            negatives, scores = read_scored_negatives(path, known)
        else:
            negatives = read_negatives(path, known)
    return GroupSampler(
        data, negatives, settings.num_negatives, stage.global_batch, stage.seed,
        settings.easy_steps, scores,
    )  # fmt: skip


def _negatives_file(stage: Stage) -> Path:
    kind = stage.settings.negatives
    if kind == "given":
        return stages.given_negatives(stage.config)
    path = RunFolder(stage.config.run_dir).negatives(kind)
    if not path.is_file():
        raise UserError(
            f"stage {stage.name} needs {kind} negatives, but {path} is missing: start"
            " `erniesearch run`, which makes them"
        )
    return path


def _tell_short_lists(stage: Stage, sampler: GroupSampler) -> None:
    settings = stage.settings
    if settings.negatives != "random" and sampler.num_short:
        say(
            f"{stage.name}: {sampler.num_short} of {len(sampler.qids)} queries have fewer than"
            f" {settings.num_negatives} hard negatives; random passages fill their groups"
        )


def learning_rate_factor(stage: TrainingStageConfig, step: int) -> float:
    """Factor of the peak learning rate for the update after ``step`` updates.

    Linear warm-up over ``warmup_ratio · steps`` updates, then linear or cosine decay to 0.
    """
    warmup = math.ceil(stage.warmup_ratio * stage.steps)
    if step < warmup:
        return (step + 1) / warmup
    if stage.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, stage.steps - warmup)
    return 1 - progress if stage.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
