"""Synthetic data, random models and configurations; nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import BertConfig, BertModel, BertTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64}  # fmt: skip
ALL_TERMS = dict.fromkeys(
    ("ce", "li", "de", "ce_to_li", "ce_to_de", "li_to_de", "attention", "dual_reg"), 1.0
)


def words(number: int) -> list[str]:
    """Different made-up words, each of them one token of :func:`write_model`'s tokenizer."""
    base = len(SYLLABLES)
    return [
        SYLLABLES[i // base**2 % base] + SYLLABLES[i // base % base] + SYLLABLES[i % base]
        for i in range(number)
    ]


def write_model(
    folder: Path,
    num_words: int = 64,
    seed: int = 0,
    weights: bool = True,
    sizes: dict[str, Any] | None = None,
) -> Path:
    """A BERT over made-up words, random weights if any; sizes are BERT-base's where not given."""
    folder.mkdir(parents=True)
    vocabulary = [*SPECIAL, *words(num_words)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(vocab_size=len(vocabulary), **sizes or {})
    config.save_pretrained(folder)
    if weights:
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    return folder


def write_data(
    folder: Path, passages: int = 60, queries: int = 40, num_words: int = 64,
    lengths: tuple[int, int] = (4, 14), seed: int = 0,
) -> Path:  # fmt: skip
    """A data set in BEIR layout; a query's words come from its passage."""
    rng = np.random.default_rng(seed)
    known = np.array(words(num_words))
    (folder / "qrels").mkdir(parents=True)
    texts = [rng.choice(known, rng.integers(*lengths)) for _ in range(passages)]
    with (folder / "corpus.jsonl").open("w") as file:
        for i, words_of in enumerate(texts):
            line = {"_id": f"p{i}", "title": "", "text": " ".join(words_of)}
            file.write(json.dumps(line) + "\n")
    positives = rng.integers(passages, size=queries)
    with (folder / "queries.jsonl").open("w") as file:
        for i, positive in enumerate(positives):
            text = " ".join(rng.choice(texts[positive], 3))
            file.write(json.dumps({"_id": f"q{i}", "text": text}) + "\n")
    judged = "".join(f"q{i}\tp{positive}\t1\n" for i, positive in enumerate(positives))
    for split in ("train", "dev", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return folder


def tiny(folder: Path) -> dict[str, Any]:
    """A configuration without ``run_dir`` whose cascade trains a tiny model with all terms."""
    return {
        "data": {
            "path": str(write_data(folder / "data")),
            "max_query_length": 8, "max_passage_length": 16,
        },
        "student": {
            "path": str(write_model(folder / "model", sizes=TINY)),
            "late_interaction_dim": 16, "dropout": 0.0,
        },
        "teacher": {"dropout": 0.0},
        "training": {"save_every": 0},
        "stages": {"cascade": stage(5, weights=ALL_TERMS, teacher_lr=1e-3)},
    }  # fmt: skip


def stage(steps: int, **settings: Any) -> dict[str, Any]:
    """A stage on random negatives with a constant learning rate."""
    return {
        "steps": steps, "queries_per_rank": 8, "num_negatives": 2, "negatives": "random",
        "warmup_ratio": 0.0, "schedule": "constant", "student_lr": 1e-3, "head_lr": 1e-3,
    } | settings  # fmt: skip


def changed(config: dict[str, Any], run_dir: Path, **parts: dict[str, Any]) -> dict[str, Any]:
    """The configuration for a run, with keys of its parts changed; ``cascade`` is a part too."""
    made = dict(config) | {"run_dir": str(run_dir)}
    cascade = made["stages"]["cascade"] | parts.pop("cascade", {})
    made["stages"] = made["stages"] | {"cascade": cascade}
    for name, values in parts.items():
        made[name] = made.get(name, {}) | values
    return made


def write_config(config: dict[str, Any], file: Path) -> str:
    """As YAML; returns the file's name."""
    file.write_text(yaml.safe_dump(config))
    return str(file)


def losses(run_dir: Path) -> list[dict[str, float]]:
    """What the cascade logged, without what depends on the machine's speed; NaN for numbers that
    were not finite."""
    file = run_dir / "stages" / "cascade" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        {key: float("nan") if value is None else value for key, value in line.items()
         if not isinstance(value, dict)}
        for line in lines
    ]  # fmt: skip


def largest_difference(own: list[dict[str, float]], wanted: list[dict[str, float]]) -> float:
    """Of any loss term, relative to the trace's total loss at that step; infinite where steps or
    terms differ, and for NaN. Accuracies are step functions and left out."""
    if [line.keys() for line in own] != [line.keys() for line in wanted]:
        return float("inf")
    worst = 0.0
    for ours, theirs in zip(own, wanted, strict=True):
        for name, value in theirs.items():
            if not name.startswith("accuracy"):
                difference = abs(ours[name] - value) / max(abs(theirs["loss"]), abs(value))
                worst = max(worst, difference) if difference < float("inf") else float("inf")
    return worst
