"""Models as other libraries publish them: what their folders say besides the transformer's weights.

    sentence-transformers    modules.json: Transformer, Pooling (, Dense) (, Normalize)
    PyLate                   modules.json: Transformer, Dense; query_prefix and the rest beside it
    sentence-transformers 6  modules.json: Transformer, Dense, MultiVectorMask, Normalize
    Stanford's ColBERT       config.json names HF_ColBERT; artifact.metadata; the projection inline

What a folder says and is not built here is an error and never left out.
"""

import json
import string
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from erniesearch.data.text_format import PLAIN, Side, SideFormat, TextFormat
from erniesearch.errors import UserError
from erniesearch.models.backbone import resolve


class NotBuilt(UserError):
    """A folder is whole, but asks for what is not built here."""


@dataclass(frozen=True)
class Published:
    """What a folder says.

    Attributes:
        path: the transformer's folder.
        kind: what comes out of it.
        text_format: prompts, prefixes, expansion, skip list.
        lengths: longest texts in tokens by side, empty where none are named.
        pooling: of a dual-encoder; None where another module pools.
        normalize: whether its vectors have length 1.
        normalizes: whether a module says so, rather than the similarity.
        dense: folder of a linear layer applied to the pooled vectors.
        head: safetensors file of the late-interaction projection, ``linear.weight`` of it
            ``[dim, hidden]``, and perhaps ``linear.bias``.
        dim: of a token vector.
    """

    path: Path
    kind: Literal["dual_encoder", "late_interaction"]
    text_format: TextFormat = PLAIN
    lengths: dict[Side, int] = field(default_factory=dict)
    pooling: Literal["cls", "mean"] | None = None
    normalize: bool = False
    normalizes: bool = False
    dense: Path | None = None
    head: Path | None = None
    dim: int | None = None


def read_published(folder: Path) -> Published | None:
    """What a folder says; None for one that holds a transformer and nothing else.

    Raises:
        NotBuilt: for what is not built here.
        UserError: for a damaged folder.
    """
    if (folder / "modules.json").is_file():
        return _modules(folder)
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json", dict)
        if "HF_ColBERT" in (config.get("architectures") or ()):
            return _stanford(folder)
    return None


def read_json(path: Path, kind: type) -> Any:
    """A file's JSON object or list.

    Raises:
        UserError: naming the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, kind):
        raise UserError(f"{path}: expected a JSON {'object' if kind is dict else 'list'}")
    return content


def _modules(folder: Path) -> Published:
    """A folder of modules."""
    modules = read_json(folder / "modules.json", list)
    try:
        kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
        paths = [folder / module["path"] for module in modules]
    except (TypeError, KeyError):
        raise UserError(f"{folder / 'modules.json'}: expected objects with type and path") from None
    for module in modules:
        if not str(module["type"]).startswith(("sentence_transformers.", "pylate.")):
            raise NotBuilt(f"{folder / 'modules.json'}: {module['type']} is code of its own")
    about = folder / "config_sentence_transformers.json"
    said = read_json(about, dict) if about.is_file() else {}
    options = _transformer(paths[0]) if kinds[:1] == ["Transformer"] else {}
    if kinds in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"],
                 ["Transformer", "Pooling", "Dense"]):  # fmt: skip
        found = _pooled(paths, kinds, said, about)
        if longest := options.get("max_seq_length"):
            found = replace(found, lengths={"query": int(longest), "passage": int(longest)})
    elif kinds == ["Transformer", "Dense"]:
        found = _pylate(paths[1], said)
    elif kinds == ["Transformer", "Dense", "MultiVectorMask", "Normalize"]:
        found = _multi_vector(paths, said, options, about)
    else:
        raise NotBuilt(
            f"{folder / 'modules.json'}: modules {', '.join(kinds)}; readable are Transformer +"
            " Pooling (+ Normalize or Dense), and Transformer + Dense (+ MultiVectorMask +"
            " Normalize)"
        )
    return replace(found, path=Path(resolve(str(paths[0].absolute()))))


def _transformer(module: Path) -> dict[str, Any]:
    path = module / "sentence_bert_config.json"
    options = read_json(path, dict) if path.is_file() else {}
    if options.get("do_lower_case"):
        raise NotBuilt(f"{path}: do_lower_case is not read here; set it in the tokenizer")
    task = options.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise NotBuilt(f"{path}: transformer_task is {task!r}; feature-extraction is built")
    return options  # type: ignore[no-any-return]


def _pooled(paths: list[Path], kinds: list[str], about: dict[str, Any], file: Path) -> Published:
    config_file = paths[1] / "config.json"
    config = read_json(config_file, dict)
    modes = {
        key.removeprefix("pooling_mode_")
        for key, value in config.items() if key.startswith("pooling_mode_") and value
    }  # fmt: skip
    if isinstance(config.get("pooling_mode"), str):  # as version 6 writes it
        modes = {config["pooling_mode"]}
    pooling = {"cls_token": "cls", "cls": "cls", "mean_tokens": "mean", "mean": "mean"}
    if len(modes) != 1 or not modes <= pooling.keys():
        raise NotBuilt(f"{config_file}: pooling {sorted(modes)}; readable: cls or mean")
    # Cosine is what sentence-transformers takes where nothing is said.
    similarity = about.get("similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot"):
        raise NotBuilt(f"{file}: similarity_fn_name is {similarity!r}; cosine and dot are built")
    texts = _prompts(about)
    pooled = config.get("include_prompt") is not False
    query, passage = (
        SideFormat(prompt=texts[side], pool_prompt=pooled or not texts[side])
        for side in ("query", "passage")
    )
    return Published(
        paths[0], "dual_encoder", TextFormat(query, passage),
        pooling=pooling[modes.pop()],  # type: ignore[arg-type]
        normalize="Normalize" in kinds or similarity == "cosine", normalizes="Normalize" in kinds,
        dense=_linear(paths[2]) if kinds[2:] == ["Dense"] else None,
    )  # fmt: skip


def _prompts(about: dict[str, Any]) -> dict[str, str]:
    texts = about.get("prompts") or {}
    default = texts.get(about.get("default_prompt_name") or "", "") or ""
    names = {"query": ("query",), "passage": ("document", "passage", "corpus")}
    return {side: next((texts[k] for k in keys if texts.get(k)), default)
            for side, keys in names.items()}  # fmt: skip


def _linear(module: Path, what: str = "a layer after pooling") -> Path:
    """A Dense module that is a linear layer and nothing more."""
    path = module / "config.json"
    config = read_json(path, dict)
    plain = "Identity" in str(config.get("activation_function", "Identity"))
    if not plain or config.get("use_residual"):
        raise NotBuilt(f"{path}: {what} is linear here, without activation and residual")
    if not (module / "model.safetensors").is_file():
        raise UserError(f"{module / 'model.safetensors'}: no such file (pickles are not read)")
    return module


def _token_layer(module: Path) -> dict[str, Any]:
    """``head`` and ``dim`` of a Dense module over token states."""
    path = _linear(module, "a late-interaction head") / "config.json"
    config = read_json(path, dict)
    for key in ("module_input_name", "module_output_name"):
        if config.get(key, "token_embeddings") != "token_embeddings":
            raise NotBuilt(f"{path}: {key} is {config[key]!r}; token_embeddings is built")
    return {"head": module / "model.safetensors", "dim": int(config["out_features"])}


def _pylate(module: Path, about: dict[str, Any]) -> Published:
    """PyLate's keys; one that is missing has PyLate's default."""

    def said(key: str, default: Any) -> Any:
        return default if about.get(key) is None else about[key]

    lengths: dict[Side, int] = {
        "query": int(said("query_length", 32)), "passage": int(said("document_length", 180)),
    }  # fmt: skip
    expands = bool(said("do_query_expansion", True))
    # Only these prompts are the sides' own: PyLate reads none unless it is asked for by name.
    texts = _prompts(about)
    text_format = TextFormat(
        SideFormat(
            prompt=texts["query"], prefix=said("query_prefix", "[Q] "),
            expand=expands, attend=expands and bool(said("attend_to_expansion_tokens", False)),
        ),
        SideFormat(
            prompt=texts["passage"], prefix=said("document_prefix", "[D] "),
            skip=tuple(said("skiplist_words", string.punctuation)), skip_unknown=True,
        ),
    )  # fmt: skip
    if not text_format.passage.skip:
        plain = replace(text_format.passage, skip_unknown=False)
        text_format = replace(text_format, passage=plain)
    return Published(
        module.parent, "late_interaction", text_format, lengths, **_token_layer(module)
    )


def _stanford(folder: Path) -> Published:
    """ColBERT as its authors publish it (colbert-ir/colbertv2.0)."""
    path = folder / "artifact.metadata"
    about = read_json(path, dict) if path.is_file() else {}
    head = folder / "model.safetensors"
    if not head.is_file():
        raise UserError(f"{head}: no such file (pickles are not read)")
    lengths: dict[Side, int] = {
        "query": int(about.get("query_maxlen") or 32),
        "passage": int(about.get("doc_maxlen") or 180),
    }
    skips = about.get("mask_punctuation", True)
    text_format = TextFormat(
        SideFormat(
            prefix=about.get("query_token_id") or "[unused0]", expand=True,
            attend=bool(about.get("attend_to_mask_tokens")),
        ),
        SideFormat(
            prefix=about.get("doc_token_id") or "[unused1]",
            skip=tuple(string.punctuation) if skips else (), skip_unknown=bool(skips),
        ),
    )  # fmt: skip
    dim = about.get("dim")
    return Published(folder, "late_interaction", text_format, lengths, head=head,
                     dim=int(dim) if dim else 128)  # fmt: skip


def _multi_vector(
    paths: list[Path], about: dict[str, Any], options: dict[str, Any], file: Path
) -> Published:
    """What sentence-transformers 6 writes of a MultiVectorEncoder."""
    similarity = about.get("similarity_fn_name") or "maxsim"
    if similarity.lower() != "maxsim":
        raise NotBuilt(f"{file}: similarity_fn_name is {similarity!r}; maxsim is built")
    mask, normalize = (read_json(path / "config.json", dict) for path in paths[2:])
    if mask.get("keep_only_token_ids"):
        raise NotBuilt(f"{paths[2] / 'config.json'}: keep_only_token_ids is not built here")
    if normalize.get("module_input_name") != "token_embeddings":
        raise NotBuilt(f"{paths[3] / 'config.json'}: token_embeddings are normalised here")
    words = tuple(mask.get("skiplist_words") or ())
    tasks = mask.get("skiplist_tasks") or ["document"]
    expansion = options.get("query_expansion") or {}
    fixed = expansion.get("strategy") == "fixed"
    texts = _prompts(about)
    text_format = TextFormat(
        SideFormat(
            prompt=texts["query"], skip=words if "query" in tasks else (),
            expand=bool(expansion), at_least=0 if fixed else int(expansion.get("length", 0)),
            attend=bool(expansion.get("attend")), expansion_token=expansion.get("token") or "",
        ),
        SideFormat(prompt=texts["passage"], skip=words if "document" in tasks else ()),
        layout="sentence_transformers",
    )  # fmt: skip
    longest = options.get("max_seq_length")
    lengths: dict[Side, int] = {}
    query = expansion["length"] if fixed else options.get("query_length") or longest
    for side, length in (("query", query), ("passage", options.get("document_length") or longest)):
        if length:
            lengths[side] = int(length)  # type: ignore[index]
    return Published(paths[0], "late_interaction", text_format, lengths, **_token_layer(paths[1]))
