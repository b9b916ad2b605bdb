"""PaddleNLP's ERNIE weights as folders that transformers and sentence-transformers load."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import BertTokenizer, ErnieConfig, ErnieForSequenceClassification, ErnieModel

from erniesearch.config.keys import DataConfig, RunConfig, StudentConfig
from erniesearch.data.text_format import PLAIN
from erniesearch.errors import UserError
from erniesearch.export.layout import cross_encoder_layout, dual_encoder_layout, write_json
from erniesearch.export.paddle_ernie import (
    CLASSIFIER,
    REDUCE,
    Kind,
    Overrides,
    infer_config,
    read_own_config,
    rename,
    select,
    shorten,
)
from erniesearch.export.pdparams import read_pdparams
from erniesearch.files import written_aside


@dataclass(frozen=True)
class Converted:
    """What was written: the folder, its configuration, and the tensors left out by name."""

    folder: Path
    config: ErnieConfig
    left_out: list[str]


def convert_paddle(
    source: Path,
    out: Path,
    kind: Kind = "dual_encoder",
    prefix: str = "",
    vocabulary: Path | None = None,
    max_length: int = 128,
    overrides: Overrides | None = None,
) -> Converted:
    """Write ``source`` as a transformers folder with the files of sentence-transformers.

    Args:
        source: a ``.pdparams`` file, or a folder with one ``*.pdparams``; config.json (or
            model_config.json), vocab.txt and tokenizer_config.json beside it are used.
        out: the folder to write; it must not exist.
        kind: a dual-encoder (first token's state, and ``emb_reduce_linear`` if there is one), or
            a cross-encoder (pooler and one logit; of two classes the difference is kept).
        prefix: of the tensors to take where a file holds two towers, e.g. ``query_ernie.``.
        vocabulary: vocab.txt, if it lies elsewhere.
        max_length: tokens of an input, written for the libraries that load the folder.

    Raises:
        UserError: naming the file and what is missing, unknown or contradictory.
    """
    overrides = overrides or Overrides()
    if out.exists():
        raise UserError(f"--out {out}: exists already; name a new folder")
    weights = _weights_file(source)
    vocabulary = vocabulary or weights.parent / "vocab.txt"
    if not vocabulary.is_file():
        raise UserError(f"{vocabulary}: no such file; --vocab names the checkpoint's vocab.txt")
    tensors = select(read_pdparams(weights), prefix, weights)
    state, left_out = rename(tensors, kind, weights)
    own = read_own_config(weights.parent)
    config = infer_config(state, own, overrides, weights)
    reduce = {name.split(".")[1]: tensors[name] for name in REDUCE if name in tensors}
    model = _fill(kind, config, state, tensors, weights)
    config = model.config
    tokenizer = _tokenizer(vocabulary, config, overrides)

    query_length = passage_length = max_length
    if kind == "cross_encoder":  # the texts of a pair share it; one [CLS] is dropped
        query_length = max_length // 4
        passage_length = max_length - query_length + 1
    data = DataConfig("", max_query_length=query_length, max_passage_length=passage_length)
    run = RunConfig("", data, StudentConfig("", pooling="cls"))
    try:
        with written_aside(out) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            if kind == "cross_encoder":
                cross_encoder_layout(aside, run)
            else:
                dual_encoder_layout(aside, run, PLAIN)
                if reduce:
                    _add_dense(aside, reduce)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None
    return Converted(out, config, left_out)


def _weights_file(source: Path) -> Path:
    if source.is_file():
        return source
    found = sorted(source.glob("*.pdparams")) if source.is_dir() else []
    if len(found) != 1:
        problem = f"{len(found)} files *.pdparams" if source.is_dir() else "no such file or folder"
        raise UserError(f"{source}: {problem}; name the .pdparams file")
    return found[0]


def _fill(
    kind: Kind,
    config: ErnieConfig,
    state: dict[str, Tensor],
    tensors: dict[str, Tensor],
    path: Path,
) -> ErnieModel | ErnieForSequenceClassification:
    """The model with these weights.

    Raises:
        UserError: listing what is missing and what has another shape.
    """
    if kind == "cross_encoder":
        missing = [name for name in CLASSIFIER if name not in tensors]
        if missing:
            raise UserError(f"{path}: no tensor {' or '.join(missing)}: not a cross-encoder")
        weight, bias = (tensors[name] for name in CLASSIFIER)
        if weight.shape[1] == 2:  # softmax over two classes orders pairs as this difference does
            weight, bias = weight[:, 1:] - weight[:, :1], bias[1:] - bias[:1]
        if weight.shape[1] != 1:
            raise UserError(f"{path}: classifier of {weight.shape[1]} classes, expected 1 or 2")
        config.num_labels = 1
        model: ErnieModel | ErnieForSequenceClassification = ErnieForSequenceClassification(config)
        state = {f"ernie.{name}": tensor for name, tensor in state.items()}
        state |= {"classifier.weight": weight.T, "classifier.bias": bias}
    else:
        model = ErnieModel(config, add_pooling_layer="pooler.dense.weight" in state)
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected.keys() - state.keys()]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    problems += [f"{name} has no place" for name in state.keys() - expected.keys()]
    if problems:
        raise UserError(f"{path}: {shorten(problems)}")
    model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()})
    return model


def _tokenizer(vocabulary: Path, config: ErnieConfig, overrides: Overrides) -> BertTokenizer:
    """ERNIE's tokenizer is BERT's over its own vocabulary."""
    try:
        words = vocabulary.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{vocabulary}: not UTF-8: {error.reason}") from None
    if len(words) > config.vocab_size:
        raise UserError(
            f"{vocabulary}: {len(words)} tokens, but the word embeddings have {config.vocab_size}"
            " rows: another checkpoint's vocabulary"
        )
    for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"):
        if token not in words:
            raise UserError(f"{vocabulary}: no {token}: not a vocabulary of ERNIE")
    lower = overrides.do_lower_case
    settings = vocabulary.parent / "tokenizer_config.json"
    if lower is None and settings.is_file():
        try:
            lower = json.loads(settings.read_text(encoding="utf-8")).get("do_lower_case")
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{settings}: not valid JSON: {error}") from None
    return BertTokenizer(str(vocabulary), do_lower_case=True if lower is None else bool(lower))


def _add_dense(folder: Path, reduce: dict[str, Tensor]) -> None:
    """ERNIE-Search's linear layer on the first token's state, as sentence-transformers' Dense."""
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense",
                    "type": "sentence_transformers.models.Dense"})  # fmt: skip
    write_json(folder / "modules.json", modules)
    size_in, size_out = reduce["weight"].shape
    write_json(
        folder / "2_Dense" / "config.json",
        {"in_features": size_in, "out_features": size_out, "bias": "bias" in reduce,
         "activation_function": "torch.nn.modules.linear.Identity"},
    )  # fmt: skip
    state = {"linear.weight": reduce["weight"].T.contiguous()}
    if "bias" in reduce:
        state["linear.bias"] = reduce["bias"].contiguous()
    save_file(state, folder / "2_Dense" / "model.safetensors")
