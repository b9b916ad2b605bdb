"""Argument names of Hugging Face's trainers that mean what a key here means, and those that do not.

An alias may stand wherever its key may, in YAML and on the command line; those of the whole run
also without their section, as in ``TrainingArguments``. Everything else that these libraries call
otherwise is an unknown key, whose error names ours.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import yaml

from erniesearch.errors import UserError


class Alias(NamedTuple):
    """Our key, and its value from theirs (None: the same)."""

    key: str
    value: Callable[[Any], Any] | None = None


def _schedule(given: Any) -> Any:
    if given == "constant":
        raise UserError(
            "'lr_scheduler_type' constant has no warm-up: constant_with_warmup, or schedule:"
            " constant and warmup_ratio: 0"
        )
    return "constant" if given == "constant_with_warmup" else given


def _trackers(given: Any) -> Any:
    if isinstance(given, str):
        return [] if given == "none" else [given]
    return given


def _precision(given: Any) -> Any:
    if not isinstance(given, bool):
        raise UserError(f"'bf16' is {given!r}: must be true or false")
    return "bf16" if given else "fp32"


_STAGE = {
    "per_device_train_batch_size": Alias("queries_per_rank"),
    "gradient_accumulation_steps": Alias("accumulation_steps"),
    "mini_batch_size": Alias("chunk_size"),
    "learning_rate": Alias("student_lr"),
    "lr_scheduler_type": Alias("schedule", _schedule),
    "max_steps": Alias("steps", lambda given: 0 if given == -1 else given),
}
_TRAINING = {
    "gradient_checkpointing": Alias("activation_checkpointing"),
    "torch_compile": Alias("compile"),
    "save_steps": Alias("save_every"),
    "save_total_limit": Alias("keep_checkpoints"),
    "logging_steps": Alias("log_every"),
    "report_to": Alias("trackers", _trackers),
    "bf16": Alias("precision", _precision),
    "dataloader_num_workers": Alias("num_workers"),
    "eval_steps": Alias("evaluate_every"),
    "metric_for_best_model": Alias(
        "best_metric", lambda given: "loss" if given == "eval_loss" else given
    ),
}
_SECTIONS = {
    "": {"output_dir": Alias("run_dir")},
    "data": {
        "query_max_len": Alias("max_query_length"),
        "passage_max_len": Alias("max_passage_length"),
    },
    "student": {"model_name_or_path": Alias("path")},
    "teacher": {"model_name_or_path": Alias("path")},
    "objective": {"temperature": Alias("tau_de")},
    "training": _TRAINING,
    "evaluation": {"per_device_eval_batch_size": Alias("batch_size")},
    "stages": {},
    **{f"stages.{name}": _STAGE
       for name in ("post_train", "contrastive", "interaction", "teacher", "cascade")},
}  # fmt: skip
_ALSO_AT_THE_TOP = {
    name: (section, name)
    for section in ("data", "student", "objective", "training", "evaluation")
    for name in _SECTIONS[section]
} | {
    name: ("training", name)
    for name in (
        "max_grad_norm", "weight_decay", "load_best_model_at_end", "early_stopping_patience",
    )
}  # fmt: skip
DIFFERENT = {
    "warmup_steps": "the warm-up is a share of the updates: stages.NAME.warmup_ratio",
    "train_group_size": "it counts the positive; stages.NAME.num_negatives is one less",
    "gc_q_chunk_size": "one size for all texts and pairs: stages.NAME.chunk_size",
    "gc_p_chunk_size": "one size for all texts and pairs: stages.NAME.chunk_size",
    "grad_cache": "stages.NAME.chunk_size is a number, or null",
    "scale": "it is 1 / objective.tau_de",
    "fp16": "training.precision is auto, bf16 or fp32",
    "optim": "the optimizer is AdamW: training.weight_decay, stages.NAME.student_lr",
    "deepspeed": "training.zero_stage, or training.zero_json with a zero_optimization section",
    "eval_strategy": "training.validation_split measures every training.evaluate_every updates",
    "greater_is_better": "known of every training.best_metric",
    "save_strategy": "checkpoints are saved every training.save_every updates",
    "logging_strategy": "lines are logged every training.log_every updates",
    "resume_from_checkpoint": "the same command continues; leave it out",
    "overwrite_output_dir": "a changed stage keeps its old folder beside it; leave it out",
    "push_to_hub": "`erniesearch push --run DIR --repo OWNER/NAME` does it afterwards",
    "hub_model_id": "`erniesearch push --run DIR --repo OWNER/NAME` does it afterwards",
    "negatives_cross_device": "objective.candidates: cross_batch",
    "sentence_pooling_method": "student.pooling is cls or mean",
    "normalize_embeddings": "student.normalize",
    "dataset_name": "data.path is a folder; `erniesearch data import hf NAME` makes one",
    "max_seq_length": "data.max_query_length and data.max_passage_length",
    "absolute_margin": "stages.mine.denoise_margin, from the best positive's score",
    "relative_margin": "stages.mine.denoise_relative_margin, from the best positive's score",
    "matryoshka_weights": "objective.matryoshka_dims; every prefix counts the same",
}
"""What means something else here, or is done otherwise."""


def canonical(content: dict[Any, Any]) -> dict[Any, Any]:
    """A configuration's nested mapping with our names alone, and the values theirs stand for.

    Raises:
        UserError: if a key is given under two names, or a value means something else here.
    """
    out: dict[Any, Any] = {}
    given: dict[str, str] = {}
    for name, value in _leaves(content, ""):
        found = ours(name) or Alias(name)
        if found.key in given:
            raise UserError(f"'{given[found.key]}' and '{name}' are one key: keep one of them")
        given[found.key] = name
        *sections, last = found.key.split(".")
        place = out
        for section in sections:
            if not isinstance(place.get(section), dict):  # a section that stands there empty
                place[section] = {}
            place = place[section]
        place[last] = found.value(value) if found.value else value
    return out


def _leaves(content: dict[Any, Any], section: str) -> Iterator[tuple[str, Any]]:
    """Dotted names and values; what is no section of ours is left as it is."""
    for key, value in content.items():
        name = f"{section}.{key}" if section else str(key)
        if isinstance(value, dict) and value and name in _SECTIONS:
            yield from _leaves(value, name)
        else:
            yield name, value


def ours(name: str) -> Alias | None:
    """The dotted key that a dotted alias stands for; None for what is none."""
    section, _, last = name.rpartition(".")
    if not section and last in _ALSO_AT_THE_TOP:
        section, last = _ALSO_AT_THE_TOP[last]
        own = Alias(f"{section}.{last}")
        return ours(own.key) or own
    found = _SECTIONS.get(section, {}).get(last)
    return found and Alias(f"{section}.{found.key}".strip("."), found.value)


def hint(name: str) -> str | None:
    """What an unknown dotted key is called here, if other libraries have it: `` (…)``."""
    last = name.rpartition(".")[2]
    if last in DIFFERENT:
        return f" ({DIFFERENT[last]})"
    if last in _STAGE or last == "num_train_epochs":
        key = _STAGE[last].key if last in _STAGE else last
        return f" (every stage has its own: stages.NAME.{key})"
    for section, names in _SECTIONS.items():
        if last in names:
            return f" (it is {f'{section}.{names[last].key}'.strip('.')} here)"
    return None


def on_command_line(argv: list[str]) -> list[str]:
    """A command line with our names alone.

    Raises:
        UserError: if a key is given under two names, or a value means something else here.
    """
    out: list[str] = []
    given: dict[str, str] = {}
    take: Alias | None = None
    for position, arg in enumerate(argv):
        if take:  # this one is the value of an alias
            out.append(_text(take, arg))
            take = None
            continue
        name, equals, value = arg[2:].partition("=")
        if not arg.startswith("--"):
            out.append(arg)
            continue
        following = value if equals else "".join(argv[position + 1 : position + 2])
        found = ours(name) or _section_path(name, following)
        key = found.key if found else name
        if given.setdefault(key, name) != name:
            raise UserError(f"--{given[key]} and --{name} are one option: keep one of them")
        if found and equals:
            out.append(f"--{key}={_text(found, value)}")
        else:
            out.append(f"--{key}={value}" if equals else f"--{key}")
            take = found
    return out


def _section_path(name: str, value: str) -> Alias | None:
    """``--data DIR``, as in every other command, is ``--data.path DIR``."""
    whole = value.startswith(("{", "--")) or value.endswith((".yaml", ".yml", ".json"))
    return None if name not in ("data", "student", "teacher") or whole else Alias(f"{name}.path")


def _text(alias: Alias, value: str) -> str:
    if alias.value is None:
        return value
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        return value  # its own parser tells
    made = alias.value(read)
    return value if made == read else str(made)


def table() -> list[tuple[str, str]]:
    """Their name and our dotted key (``stages.NAME``), for the reference."""
    rows = [(name, f"{section}.{alias.key}".strip("."))
            for section, names in _SECTIONS.items() if not section.startswith("stages")
            for name, alias in names.items()]  # fmt: skip
    return rows + [(name, f"stages.NAME.{alias.key}") for name, alias in _STAGE.items()]
