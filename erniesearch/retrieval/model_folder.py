"""What model folders say: pooling, normalisation, head and lengths are read from what lies there.

exports/dual_encoder, exports/late_interaction    sentence-transformers and PyLate layout
exports/dual_encoder_query + …_passage            untied towers; the name without suffix is both
exports/cross_encoder                             a sequence classifier with one score
RUN/stages/NAME/model/student                     a stage's student; RUN/config.yaml tells more
any other encoder                                 with a pooling given
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import yaml

from erniesearch.config.keys import RunConfig, StudentConfig
from erniesearch.config.yaml_file import from_dict
from erniesearch.data.text_format import PLAIN, stored_format
from erniesearch.errors import UserError
from erniesearch.files import hash_files
from erniesearch.models.backbone import resolve
from erniesearch.models.encoder import HEAD_FILE, Side
from erniesearch.models.published import NotBuilt, Published, read_json, read_published
from erniesearch.retrieval.retriever import Extras

Kind = Literal["dual_encoder", "late_interaction", "cross_encoder", "student"]


@dataclass(frozen=True)
class ModelFolder(Extras):
    """What a model folder says about itself.

    ``kind`` ``student`` has both a dual-encoder and a late-interaction head; ``lengths`` are the
    longest texts in tokens by side, empty where the folder names none; ``foreign`` is what of the
    model is not built here, so that sentence-transformers runs it.
    """

    kind: Kind
    settings: StudentConfig
    lengths: dict[Side, int] = field(default_factory=dict)
    foreign: str | None = None

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
        path: a folder, ``package:NAME``, or a name on the hub (``OWNER/NAME``, with
            ``@REVISION`` if wanted).
        pooling: for encoders that do not say it themselves.

    Raises:
        UserError: for a missing or damaged folder, or one that asks for what is not built here.
    """
    name = str(path)
    folder = Path(name)
    if not folder.is_dir():
        if _towers(folder):
            return _both_towers(folder, pooling)
        folder = Path(resolve(name))
    found = _read_one(folder, pooling)
    other: dict[Side, Side] = {"query": "passage", "passage": "query"}
    for side in other:
        stem = folder.name.removesuffix(f"_{side}")
        if stem != folder.name and folder.with_name(f"{stem}_{other[side]}").is_dir():
            return replace(found, only=side)
    return found


def as_named(path: str) -> str:
    """A model's or a collection's name that holds from everywhere: absolute, where it is a path."""
    hub = path.startswith("package:") or (not Path(path).exists() and path.count("/") == 1)
    return path if hub else str(Path(path).absolute())


def fingerprint(found: ModelFolder) -> str:
    """Hash of the files and settings that decide what the model makes of a text."""
    kinds = (".json", ".safetensors", ".txt", ".model")
    sources = [Path(found.settings.path), found.passage_path, found.head and found.head.parent]
    files = [[file for file in source.rglob("*") if file.suffix in kinds]
             for source in sources if source]  # fmt: skip
    reading = found.text_format or stored_format(Path(found.settings.path)) or PLAIN
    prompts: dict[Side, str] = {}
    if found.kind == "dual_encoder" and found.text_format:
        prompts = found.text_format.prompts
    settings = found.settings
    content: list[object] = [settings.pooling, settings.normalize, sorted(prompts.items())]
    content += map(hash_files, files)
    if reading != PLAIN.prompted(prompts.get("query"), prompts.get("passage")):
        content.append(asdict(reading))
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _towers(folder: Path) -> list[Path]:
    """The towers of an untied model whose folder's common name this is."""
    towers = [folder.with_name(f"{folder.name}_{side}") for side in ("query", "passage")]
    return towers if folder.name and all(tower.is_dir() for tower in towers) else []


def _both_towers(folder: Path, pooling: Literal["cls", "mean"] | None) -> ModelFolder:
    towers = _towers(folder)
    query, passage = (_read_one(tower, pooling) for tower in towers)
    alike = replace(passage, settings=query.settings, head=query.head)
    if alike != query or replace(passage.settings, path=query.settings.path) != query.settings:
        raise UserError(f"{towers[0]} and {towers[1]} differ in pooling, lengths or prompts")
    return replace(
        query, settings=replace(query.settings, tied=False),
        passage_path=Path(passage.settings.path),
    )  # fmt: skip


def _read_one(folder: Path, pooling: Literal["cls", "mean"] | None) -> ModelFolder:
    try:
        if found := read_published(folder):
            return _published(found)
    except NotBuilt as why:
        return _foreign(folder, str(why))
    resolve(str(folder) if folder.is_absolute() else f"./{folder}")  # config.json and safetensors
    config = read_json(folder / "config.json", dict)
    settings = StudentConfig(str(folder), keep="weights_only")
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
        student = replace(
            run.student, path=str(folder), revision=None, dropout=None, layers=None,
            keep="weights_only",
        )  # fmt: skip
        return ModelFolder("student", student, lengths)  # type: ignore[arg-type]
    if pooling is None:
        raise UserError(
            f"model folder {folder}: nothing says how it pools; --pooling cls or --pooling mean"
        )
    return ModelFolder("dual_encoder", replace(settings, pooling=pooling))


def _published(found: Published) -> ModelFolder:
    settings = StudentConfig(
        str(found.path), keep="weights_only", pooling=found.pooling or "cls",
        normalize=found.normalize, late_interaction_dim=found.dim or 128,
    )  # fmt: skip
    return ModelFolder(
        found.kind, settings, found.lengths, text_format=found.text_format, head=found.head,
        dense=found.dense,
    )  # fmt: skip


def _foreign(folder: Path, why: str) -> ModelFolder:
    """A folder for sentence-transformers to run: token vectors where it says so, or pools none."""
    about = folder / "config_sentence_transformers.json"
    said = read_json(about, dict).get("model_type") if about.is_file() else None
    modules = [str(module.get("type")) for module in read_json(folder / "modules.json", list)]
    pools = any(module.endswith(".Pooling") for module in modules)
    if said == "SparseEncoder":
        raise UserError(f"{about}: a SparseEncoder makes no vectors that an index here holds")
    multi_vector = said in ("MultiVectorEncoder", "ColBERT") or (said is None and not pools)
    return ModelFolder(
        "late_interaction" if multi_vector else "dual_encoder",
        StudentConfig(str(folder), keep="weights_only"), foreign=why,
    )  # fmt: skip


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
