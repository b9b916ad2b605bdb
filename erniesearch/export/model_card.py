"""The model card of an export folder: README.md with YAML front matter.

It states what is known (base model, data set, stages, lengths, configuration, figures) and leaves
the licence to whoever publishes the model.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from erniesearch import __version__
from erniesearch.config.keys import RunConfig, training_stages
from erniesearch.config.yaml_file import to_yaml
from erniesearch.data.text_format import PLAIN, TextFormat

_FRONT = {
    "dual_encoder": ("sentence-transformers", "sentence-similarity", "dual-encoder"),
    "late_interaction": ("PyLate", "sentence-similarity", "late interaction (ColBERT)"),
    "cross_encoder": ("sentence-transformers", "text-ranking", "cross-encoder"),
}
_USAGE = {
    "dual_encoder": """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH")
queries = model.encode(["a query"])
passages = model.encode(["a passage", "another"])
scores = model.similarity(queries, passages)
""",
    "late_interaction": """\
from pylate import models, rank

model = models.ColBERT(model_name_or_path="PATH")
queries = model.encode(["a query"], is_query=True)
passages = model.encode([["a passage", "another"]], is_query=False)
ranking = rank.rerank(
    documents_ids=[["p1", "p2"]], queries_embeddings=queries, documents_embeddings=passages
)
""",
    "cross_encoder": """\
from sentence_transformers import CrossEncoder

model = CrossEncoder("PATH")
scores = model.predict([("a query", "a passage"), ("a query", "another")])
""",
}
_MULTI_VECTOR = """\
from sentence_transformers import MultiVectorEncoder

model = MultiVectorEncoder("PATH")
queries = model.encode_query(["a query"])
passages = model.encode_document(["a passage", "another"])
scores = model.similarity(queries, passages)
"""
_TRANSFORMERS = {
    "dual_encoder": """\
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer(["a query"], padding=True, truncation=True, max_length=MAX, return_tensors="pt")
states = AutoModel.from_pretrained("PATH")(**inputs).last_hidden_state
POOL
""",
    "late_interaction": """\
from safetensors.torch import load_file
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer(["a query"], padding=True, truncation=True, max_length=MAX, return_tensors="pt")
states = AutoModel.from_pretrained("PATH")(**inputs).last_hidden_state
head = load_file("PATH/1_Dense/model.safetensors")["linear.weight"]
tokens = normalize(states @ head.T, dim=-1)  # padding excepted; scores are MaxSim
""",
    "cross_encoder": """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer(["a query"], ["a passage"], padding=True, truncation="only_second",
                   max_length=MAX, return_tensors="pt")
scores = AutoModelForSequenceClassification.from_pretrained("PATH")(**inputs).logits[:, 0]
""",
}


_CARD = """---
# license: none is set; it is yours to choose, within the terms of base model and data
{front}
---

# {title}

Trained with erniesearch {version} by the method of ERNIE-Search
([arXiv 2205.09153](https://arxiv.org/abs/2205.09153)).

| | |
|---|---|
| base model | {origin} |
| data set | `{data}`, split `{split}` |
| stages | {stages} |
| longest query in training | {query_length} tokens |
| longest passage in training | {passage_length} tokens |
| score | {score} |

{lengths}
{pair}
## Use

`PATH` is this folder.

{library}:

```python
{usage}
```
{onnx}
{plain}

## Results

{results}

## Configuration

```yaml
{configuration}
```
"""


def model_card(
    kind: str,
    suffix: str,
    config: RunConfig,
    results: str | None,
    onnx: bool,
    cut: dict[str, Any] | None = None,
    reading: TextFormat = PLAIN,
) -> str:
    """The card of one export folder.

    Args:
        kind: ``dual_encoder``, ``late_interaction`` or ``cross_encoder``.
        suffix: ``_query`` or ``_passage`` of untied towers, or empty.
        results: the evaluation's caption and table in Markdown; None if there is none yet.
        onnx: whether ``onnx/model.onnx`` is there.
        cut: what the model's config.json says of the layers it was left with (``layers``, ``of``).
        reading: how the student's texts are read.
    """
    library, pipeline, name = _FRONT[kind]
    if kind == "late_interaction" and reading.layout == "sentence_transformers":
        library = "sentence-transformers"
    base = config.student.path
    if kind == "cross_encoder":
        base = config.teacher.path or base
    origin = f"`{base}`{_kept_layers(cut)}"
    data = Path(config.data.path).name
    name_there = base.partition("@")[0]
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name_there) and not Path(base).exists()
    front = ModelCardData(
        library_name=library, pipeline_tag=pipeline,
        tags=["erniesearch", "information-retrieval", kind.replace("_", "-")],
        base_model=name_there if on_hub else None,  # a folder's name would point nowhere
    )  # fmt: skip
    tower = f", {suffix.removeprefix('_')} tower" if suffix else ""
    onnx_line = f"\n{_ONNX}\n" if onnx else ""
    pair = (
        f"\nThis is one of two towers: `{kind}_query` encodes queries, `{kind}_passage` passages.\n"
        if suffix else ""
    )  # fmt: skip
    return _CARD.format(
        front=front.to_yaml(),
        title=f"{Path(config.run_dir).resolve().name}: {name}{tower}", version=__version__,
        origin=origin, data=data, split=config.data.train_split, stages=_stages(config),
        query_length=config.data.max_query_length, passage_length=config.data.max_passage_length,
        score=_score(kind, config), lengths=_lengths(kind, config), pair=pair,
        library=_library(kind, reading), usage=_usage(kind, reading), onnx=onnx_line,
        plain=_plain(kind, config, reading).rstrip(),
        results=(results or "Not evaluated yet; `erniesearch run` does it at its end.").rstrip(),
        configuration=to_yaml(config).rstrip(),
    )  # fmt: skip


_ONNX = (
    '`SentenceTransformer("PATH", backend="onnx")` takes the transformer from `onnx/model.onnx`.'
)
_LIBRARY_TITLE = {
    "dual_encoder": "sentence-transformers",
    "late_interaction": "PyLate (sentence-transformers 6 loads it as a `MultiVectorEncoder` too)",
    "cross_encoder": "sentence-transformers",
}


def _library(kind: str, reading: TextFormat) -> str:
    if kind == "late_interaction" and reading.layout == "sentence_transformers":
        return "sentence-transformers 6"
    return _LIBRARY_TITLE[kind]


def _stages(config: RunConfig) -> str:
    counts = {name: stage.steps for name, stage in training_stages(config).items()}
    return ", ".join(f"{name} ({steps} updates)" for name, steps in counts.items() if steps)


def _score(kind: str, config: RunConfig) -> str:
    if kind == "cross_encoder":
        return "the one logit, no sigmoid"
    if kind == "late_interaction":
        return f"MaxSim of unit vectors of {config.student.late_interaction_dim} dimensions"
    product = "cosine" if config.student.normalize else "inner product"
    return f"{product} of {config.student.pooling}-pooled vectors{_prefixes(config)}"


def _prefixes(config: RunConfig) -> str:
    """What ``objective.matryoshka_dims`` lets a reader leave out."""
    dims = sorted(config.objective.matryoshka_dims, reverse=True)
    if not dims:
        return ""
    return (
        f"; the first {', '.join(map(str, dims))} dimensions were trained as vectors of their own"
        f' (Matryoshka): `SentenceTransformer("PATH", truncate_dim={dims[0]})`'
    )


def _kept_layers(cut: dict[str, Any] | None) -> str:
    if not cut:
        return ""
    return f", layers {', '.join(map(str, cut['layers']))} of 0 to {cut['of'] - 1}"


def _lengths(kind: str, config: RunConfig) -> str:
    query, passage = config.data.max_query_length, config.data.max_passage_length
    if kind == "dual_encoder":
        return (
            f"sentence-transformers knows one length: `max_seq_length` is {max(query, passage)}"
            " here, the longer of the two. Training cut queries and passages to the lengths above."
        )
    if kind == "late_interaction":
        return "`query_length` and `document_length` are those of training."
    return (
        "Training cut query and passage each by itself. `model_max_length` of the tokenizer is the"
        f" longest pair of training, {pair_length(config)} tokens."
    )


def pair_length(config: RunConfig) -> int:
    """Tokens of the longest pair; the passage's [CLS] takes part in none."""
    return config.data.max_query_length + config.data.max_passage_length - 1


def _usage(kind: str, reading: TextFormat) -> str:
    usage = _USAGE[kind].rstrip()
    if kind == "dual_encoder" and not reading.is_plain:  # these know the sides' prompts
        usage = usage.replace("queries = model.encode(", "queries = model.encode_query(")
        return usage.replace("passages = model.encode(", "passages = model.encode_document(")
    if kind == "late_interaction" and reading.layout == "sentence_transformers":
        return _MULTI_VECTOR.rstrip()
    if kind == "late_interaction":
        for side, name, flag in (("query", "query", "True"), ("passage", "document", "False")):
            if reading.prompts[side]:  # type: ignore[index]
                given = f"is_query={flag}"
                usage = usage.replace(given, f'{given}, prompt_name="{name}"')
    return usage


def _plain(kind: str, config: RunConfig, reading: TextFormat) -> str:
    if kind != "cross_encoder" and not reading.is_plain:
        return (
            "Texts are not read as they stand: `config_sentence_transformers.json` says which"
            " prompts, prefixes and expansion belong to a side, and the library above adds them."
        )
    longest = max(config.data.max_query_length, config.data.max_passage_length)
    if kind == "late_interaction":
        longest = config.data.max_query_length
    if kind == "cross_encoder":
        longest = pair_length(config)
    pool = "vectors = states[:, 0]"
    if config.student.pooling == "mean":
        pool = (
            'mask = inputs["attention_mask"].unsqueeze(-1)\n'
            "vectors = (states * mask).sum(1) / mask.sum(1)"
        )
    if config.student.normalize:
        pool += "\nvectors = vectors / vectors.norm(dim=-1, keepdim=True)"
    code = _TRANSFORMERS[kind].replace("MAX", str(longest)).replace("POOL", pool)
    return f"transformers alone:\n\n```python\n{code.rstrip()}\n```"
