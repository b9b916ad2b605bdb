"""PaddleNLP's ERNIE: its parameter names and sizes, told as transformers' ``ErnieModel`` has them.

Paddle's Linear keeps its weight as ``[in, out]``, PyTorch's as ``[out, in]``: ``y = x·W + b``
becomes ``y = x·Wᵀ + b``. Everything else is a matter of names.

    ErnieModel                     [ernie.]embeddings.… encoder.layers.N.… pooler.dense.…
    ErnieForSequenceClassification ernie.… and classifier.{weight,bias}
    ErnieEncoder (dual-encoders)   ernie.…, an unused classifier, and for ERNIE-Search
                                   emb_reduce_linear.{weight,bias} on the first token's state
    ErnieDualEncoder               query_ernie.ernie.… and title_ernie.ernie.…, an ErnieEncoder each
"""

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import ErnieConfig
from transformers.activations import ACT2FN

from erniesearch.errors import UserError

Kind = Literal["dual_encoder", "cross_encoder"]

_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_PARTS = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}
_EMBEDDINGS = ("word", "position", "token_type", "task_type")
_OTHER = {f"embeddings.{name}_embeddings.weight": f"embeddings.{name}_embeddings.weight"
          for name in _EMBEDDINGS} | {
    "embeddings.layer_norm.weight": "embeddings.LayerNorm.weight",
    "embeddings.layer_norm.bias": "embeddings.LayerNorm.bias",
    "pooler.dense.weight": "pooler.dense.weight",
    "pooler.dense.bias": "pooler.dense.bias",
}  # fmt: skip
REDUCE = ("emb_reduce_linear.weight", "emb_reduce_linear.bias")
CLASSIFIER = ("classifier.weight", "classifier.bias")
_HEADS = {128: 2, 312: 12, 384: 12, 768: 12, 1024: 16}
"""Attention heads of the published ERNIE models by hidden size; shapes do not show them."""
_GELU_VOCABULARIES = (30522, 39981, 40000)
"""Rows of the word embeddings of ERNIE 2.0 (English) and 3.0, which use gelu; others use relu."""


@dataclass(frozen=True)
class Overrides:
    """Values of the configuration that the file's shapes do not show; None means the checkpoint's
    own config.json, or what is known of the published models."""

    num_attention_heads: int | None = None
    """Attention heads."""
    hidden_act: str | None = None
    """Activation of the feed-forward layers: gelu, relu."""
    layer_norm_eps: float | None = None
    """LayerNorm's epsilon."""
    hidden_dropout_prob: float | None = None
    """Dropout of the hidden states in training."""
    attention_probs_dropout_prob: float | None = None
    """Dropout of the attention probabilities in training."""
    pad_token_id: int | None = None
    """Id of [PAD]."""
    do_lower_case: bool | None = None
    """Whether the tokenizer lowers its input."""


def select(tensors: dict[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    """The tensors under ``prefix``, without it and without ``ernie.``."""
    chosen = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not any(name.endswith("embeddings.word_embeddings.weight") for name in chosen):
        raise UserError(
            f"{path}: no tensor '{prefix}[ernie.]embeddings.word_embeddings.weight';"
            f" the names begin with: {', '.join(sorted({n.split('.')[0] for n in tensors})[:8])}"
        )
    towers = sorted(
        {n.split(".")[0] for n in chosen if n.endswith(".embeddings.word_embeddings.weight")}
    )
    if towers and towers != ["ernie"]:
        raise UserError(
            f"{path}: holds {', '.join(towers)}; take one with --prefix "
            + " or ".join(f"{prefix}{tower}." for tower in towers)
        )
    return {name.removeprefix("ernie."): tensor for name, tensor in chosen.items()}


def rename(
    tensors: dict[str, Tensor], kind: Kind, path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """The encoder's tensors under transformers' names, and the names left out: pretraining heads
    and the other kind's head."""
    wanted = CLASSIFIER if kind == "cross_encoder" else REDUCE
    unwanted = REDUCE if kind == "cross_encoder" else CLASSIFIER
    state, left_out, unknown = {}, [], []
    for name, tensor in tensors.items():
        if name in _OTHER:
            state[_OTHER[name]] = tensor.T if name == "pooler.dense.weight" else tensor
        elif (match := _LAYER.fullmatch(name)) and match[2] in _LAYER_PARTS:
            target = f"encoder.layer.{match[1]}.{_LAYER_PARTS[match[2]]}.{match[3]}"
            state[target] = tensor.T if tensor.dim() == 2 else tensor
        elif name in unwanted or name.startswith("cls."):
            left_out.append(name)
        elif name not in wanted:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} tensors that ERNIE does not have: {shorten(unknown)}"
        )
    return state, left_out


def shorten(names: list[str], shown: int = 12) -> str:
    more = f", and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(sorted(names)[:shown]) + more


def read_own_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json; older ones wrap it in ``init_args`` of model_config.json."""
    for name in ("config.json", "model_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path}: not valid JSON: {error}") from None
        while isinstance(content, dict) and isinstance(content.get("init_args"), list):
            content = next((a for a in content["init_args"] if isinstance(a, dict)), {})
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected a JSON object")
        return content
    return {}


def infer_config(
    state: dict[str, Tensor], own: dict[str, Any], overrides: Overrides, path: Path
) -> ErnieConfig:
    """Sizes from the tensors; what they do not show from ``overrides``, the checkpoint's config,
    or the published models, in this order."""

    def rows(name: str) -> int:
        table = state.get(f"embeddings.{name}_embeddings.weight")
        if table is None:
            raise UserError(f"{path}: no tensor 'embeddings.{name}_embeddings.weight'")
        return table.shape[0]

    layers = {int(name.split(".")[2]) for name in state if name.startswith("encoder.layer.")}
    first = state.get("encoder.layer.0.intermediate.dense.weight")
    if first is None or layers != set(range(len(layers))):
        raise UserError(f"{path}: layers {sorted(layers)}, expected 0 to the last without a gap")
    hidden = state["embeddings.word_embeddings.weight"].shape[1]
    uses_tasks = "embeddings.task_type_embeddings.weight" in state
    sizes: dict[str, Any] = {
        "vocab_size": rows("word"), "hidden_size": hidden, "num_hidden_layers": len(layers),
        "intermediate_size": first.shape[0], "max_position_embeddings": rows("position"),
        "type_vocab_size": rows("token_type"), "use_task_id": uses_tasks,
    }  # fmt: skip
    if uses_tasks:
        sizes["task_type_vocab_size"] = rows("task_type")
    for key, value in sizes.items():
        if key in own and own[key] != value:
            raise UserError(
                f"{path}: {key} is {own[key]} in its config.json, {value} by its shapes"
            )
    if own.get("task_id"):
        raise UserError(
            f"{path}: its config.json has task_id {own['task_id']}; transformers' ERNIE uses task 0"
        )
    values = {key: own[key] for key in (f.name for f in fields(Overrides)) if key in own}
    values |= {key: value for key, value in asdict(overrides).items() if value is not None}
    values.pop("do_lower_case", None)
    heads = values.setdefault("num_attention_heads", _HEADS.get(hidden))
    if heads is None:
        raise UserError(f"{path}: hidden size {hidden}: give --num_attention_heads")
    if hidden % heads:
        raise UserError(f"--num_attention_heads {heads}: no divisor of the hidden size {hidden}")
    if "hidden_act" not in values:
        if sizes["vocab_size"] not in _GELU_VOCABULARIES:
            raise UserError(
                f"{path}: no config.json beside it tells the activation: give --hidden_act relu"
                " (ERNIE 1.0, Chinese ERNIE 2.0) or gelu"
            )
        values["hidden_act"] = "gelu"
    values.setdefault("pad_token_id", 0)
    values.setdefault("layer_norm_eps", 1e-12)  # what PaddleNLP sets after building the model
    if values["hidden_act"] not in ACT2FN:
        raise UserError(f"{path}: unknown activation '{values['hidden_act']}': give --hidden_act")
    try:
        return ErnieConfig(**sizes, **values)
    except StrictDataclassError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
