"""What model folders say: pooling, normalisation, head and lengths are read from what lies there.

exports/dual_encoder, exports/late_interaction    sentence-transformers and PyLate layout
exports/dual_encoder_query + …_passage            untied towers; the name without suffix is both
exports/cross_encoder                             a sequence classifier with one score
RUN/stages/NAME/model/student                     a stage's student; RUN/config.yaml tells more
any other encoder                                 with a pooling given
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from erniesearch.config.keys import RunConfig, StudentConfig
from erniesearch.config.yaml_file import from_dict
from erniesearch.errors import UserError
from erniesearch.files import hash_files
from erniesearch.models.backbone import resolve
from erniesearch.models.encoder import HEAD_FILE, Side
from erniesearch.retrieval.retriever import Extras

Kind = Literal["dual_encoder", "late_interaction", "cross_encoder", "student"]


@dataclass(frozen=True)
class ModelFolder(Extras):
    """What a model folder says about itself.

    ``kind`` ``student`` has both a dual-encoder and a late-interaction head; ``lengths`` are the
    longest texts in tokens by side, empty where the folder names none.
    """

    kind: Kind
    settings: StudentConfig
    lengths: dict[Side, int] = field(default_factory=dict)

    @property
    def has_vectors(self) -> bool:
        """Whether one vector a text comes out of it."""
        return self.kind in ("dual_encoder", "student")

    @property
    def has_tokens(self) -> bool:
        """Whether token vectors come out of it."""
        return self.kind in ("late_interaction", "student")


def read_folder(path: str | Path, pooling: Literal["cls", "mean"] | None = None) -> ModelFolder:
    """What lies in a model folder; no weights are loaded.

    Args:
        path: a folder, or ``package:NAME``.
        pooling: for encoders that do not say it themselves.

    Raises:
        UserError: for a missing or damaged folder, or one that asks for what is not built here.
    """
    name = str(path)
    folder = Path(resolve(name) if name.startswith("package:") else name)
    if not folder.is_dir():
        return _both_towers(folder, pooling)
    found = _read_one(folder, pooling)
    other: dict[Side, Side] = {"query": "passage", "passage": "query"}
    for side in other:
        stem = folder.name.removesuffix(f"_{side}")
        if stem != folder.name and folder.with_name(f"{stem}_{other[side]}").is_dir():
            return replace(found, only=side)
    return found


def fingerprint(found: ModelFolder) -> str:
    """Hash of the files and settings that decide what the model makes of a text."""
    kinds = (".json", ".safetensors", ".txt", ".model")
    sources = [Path(found.settings.path), found.passage_path, found.head and found.head.parent]
    files = [[file for file in source.rglob("*") if file.suffix in kinds]
             for source in sources if source]  # fmt: skip
    content = [found.settings.pooling, found.settings.normalize, sorted(found.prompts.items()),
               *map(hash_files, files)]  # fmt: skip
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _both_towers(folder: Path, pooling: Literal["cls", "mean"] | None) -> ModelFolder:
    towers = [folder.with_name(f"{folder.name}_{side}") for side in ("query", "passage")]
    if not all(tower.is_dir() for tower in towers):
        raise UserError(
            f"model folder {folder}: no such folder (models from a hub: download them first,"
            " e.g. hf download NAME --local-dir DIR)"
        )
    query, passage = (_read_one(tower, pooling) for tower in towers)
    alike = replace(passage, settings=query.settings, head=query.head)
    if alike != query or replace(passage.settings, path=query.settings.path) != query.settings:
        raise UserError(f"{towers[0]} and {towers[1]} differ in pooling, lengths or prompts")
    return replace(
        query, settings=replace(query.settings, tied=False),
        passage_path=Path(passage.settings.path),
    )  # fmt: skip


def _read_one(folder: Path, pooling: Literal["cls", "mean"] | None) -> ModelFolder:
    if (folder / "modules.json").is_file():
        return _sentence_transformers(folder)
    resolve(str(folder) if folder.is_absolute() else f"./{folder}")  # config.json and safetensors
    config = _json(folder / "config.json", dict)
    settings = StudentConfig(str(folder))
    run = _run_of(folder)
    lengths = {}
    if run:
        lengths = {"query": run.data.max_query_length, "passage": run.data.max_passage_length}
    if any(str(a).endswith("ForSequenceClassification") for a in config.get("architectures") or ()):
        labels = len(config.get("id2label") or "1")
        if labels != 1:
            raise UserError(
                f"model folder {folder}: {labels} labels; a cross-encoder has one score"
            )
        for side, key in (("query", "max_query_length"), ("passage", "max_passage_length")):
            if key in config.get("erniesearch", {}):
                lengths[side] = int(config["erniesearch"][key])
        return ModelFolder("cross_encoder", settings, lengths)  # type: ignore[arg-type]
    if run and (folder / HEAD_FILE).is_file():
        student = replace(run.student, path=str(folder), revision=None, dropout=None, layers=None)
        return ModelFolder("student", student, lengths)  # type: ignore[arg-type]
    if pooling is None:
        raise UserError(
            f"model folder {folder}: nothing says how it pools; --pooling cls or --pooling mean"
        )
    return ModelFolder("dual_encoder", replace(settings, pooling=pooling))


def _run_of(folder: Path) -> RunConfig | None:
    """The configuration beside a stage's model, ``RUN/stages/NAME/model/PART``."""
    parts = folder.resolve().parts
    if len(parts) < 6 or parts[-4] != "stages" or parts[-2] != "model":
        return None
    record = folder.resolve().parents[3] / "config.yaml"
    if not record.is_file():
        return None
    try:
        config: RunConfig = from_dict(RunConfig, yaml.safe_load(record.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError):
        raise UserError(f"{record}: damaged; `erniesearch run` writes it again") from None
    return config


def _sentence_transformers(folder: Path) -> ModelFolder:
    """A folder of modules: Transformer, then Pooling (and Normalize, or a linear layer), or
    PyLate's Dense."""
    modules = _json(folder / "modules.json", list)
    try:
        kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
        paths = [folder / module["path"] for module in modules]
    except (TypeError, KeyError):
        raise UserError(f"{folder / 'modules.json'}: expected objects with type and path") from None
    readers: dict[tuple[str, ...], Callable[[Path, dict[str, Any]], ModelFolder]] = {
        ("Transformer", "Pooling"): _pooled,
        ("Transformer", "Pooling", "Normalize"): _pooled,
        ("Transformer", "Pooling", "Dense"): _pooled,
        ("Transformer", "Dense"): _late_interaction,
    }
    if tuple(kinds) not in readers:
        raise UserError(
            f"{folder / 'modules.json'}: modules {', '.join(kinds)}; readable are Transformer +"
            " Pooling (+ Normalize or Dense), and Transformer + Dense (late interaction)"
        )
    about = folder / "config_sentence_transformers.json"
    said = _json(about, dict) if about.is_file() else {}
    found = readers[tuple(kinds)](paths[1], said)
    # Cosine is what sentence-transformers takes where nothing is said.
    similarity = said.get("similarity_fn_name") or "cosine"
    if found.kind == "dual_encoder" and similarity not in ("cosine", "dot"):
        raise UserError(f"{about}: similarity_fn_name is {similarity!r}; cosine and dot are built")
    transformer = paths[0] / "sentence_bert_config.json"
    options = _json(transformer, dict) if transformer.is_file() else {}
    if options.get("do_lower_case"):
        raise UserError(f"{transformer}: do_lower_case is not read here; set it in the tokenizer")
    lengths = found.lengths
    if not lengths and (longest := options.get("max_seq_length")):
        lengths = {"query": int(longest), "passage": int(longest)}
    settings = replace(
        found.settings, path=resolve(str(paths[0].absolute())),
        normalize="Normalize" in kinds or similarity == "cosine",
    )  # fmt: skip
    dense = _linear(paths[2]) if kinds[2:] == ["Dense"] else None
    return replace(found, settings=settings, lengths=lengths, dense=dense)


def _linear(module: Path) -> Path:
    """A Dense module that is a linear layer and nothing more."""
    config = _json(module / "config.json", dict)
    if "Identity" not in str(config.get("activation_function")) or config.get("use_residual"):
        raise UserError(
            f"{module / 'config.json'}: a layer after pooling is linear here, without activation"
            " and residual"
        )
    if not (module / "model.safetensors").is_file():
        raise UserError(f"{module / 'model.safetensors'}: no such file (pickles are not read)")
    return module


def _pooled(module: Path, about: dict[str, Any]) -> ModelFolder:
    config = _json(module / "config.json", dict)
    modes = {
        key.removeprefix("pooling_mode_")
        for key, value in config.items() if key.startswith("pooling_mode_") and value
    }  # fmt: skip
    if isinstance(config.get("pooling_mode"), str):  # as version 6 writes it
        modes = {config["pooling_mode"]}
    pooling = {"cls_token": "cls", "cls": "cls", "mean_tokens": "mean", "mean": "mean"}
    if len(modes) != 1 or not modes <= pooling.keys():
        raise UserError(f"{module / 'config.json'}: pooling {sorted(modes)}; readable: cls or mean")
    texts = about.get("prompts") or {}
    default = texts.get(about.get("default_prompt_name") or "", "")
    names = {"query": ("query",), "passage": ("document", "passage", "corpus")}
    prompts = {side: next((texts[k] for k in keys if texts.get(k)), default)
               for side, keys in names.items()}  # fmt: skip
    if any(prompts.values()) and config.get("include_prompt") is False:
        raise UserError(f"{module / 'config.json'}: include_prompt false is not read here")
    settings = StudentConfig("", pooling=pooling[modes.pop()])  # type: ignore[arg-type]
    return ModelFolder("dual_encoder", settings, prompts=prompts)  # type: ignore[arg-type]


def _late_interaction(module: Path, about: dict[str, Any]) -> ModelFolder:
    config = _json(module / "config.json", dict)
    plain = "Identity" in str(config.get("activation_function", "Identity"))
    if config.get("bias") or config.get("use_residual") or not plain:
        raise UserError(
            f"{module / 'config.json'}: a late-interaction head is one matrix here, without bias,"
            " activation and residual"
        )
    for key in ("query_prefix", "document_prefix", "skiplist_words", "do_query_expansion"):
        if about.get(key):
            raise UserError(
                f"{module.parent / 'config_sentence_transformers.json'}: {key} is {about[key]!r};"
                " late interaction here has no prefixes, query expansion or skip list"
            )
    head = module / "model.safetensors"
    if not head.is_file():
        raise UserError(f"{head}: no such file (pickles are not read)")
    lengths = {side: int(about[key])
               for side, key in (("query", "query_length"), ("passage", "document_length"))
               if about.get(key)}  # fmt: skip
    settings = StudentConfig("", late_interaction_dim=int(config["out_features"]))
    return ModelFolder("late_interaction", settings, lengths, head=head)  # type: ignore[arg-type]


def _json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, kind):
        raise UserError(f"{path}: expected a JSON {'object' if kind is dict else 'list'}")
    return content
