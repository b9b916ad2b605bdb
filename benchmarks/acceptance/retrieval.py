"""From an encoder to a searchable index, and a whole run."""

import json
import re
import time
from pathlib import Path

import numpy as np

from acceptance import material
from acceptance.check import Context, require

SEEN_ALONE = 8
"""Passages encoded again on the CPU in fp32."""


def encode(context: Context) -> None:
    """`erniesearch encode` of synthetic passages: BERT-base, 100,000; a tiny model and 200 on a
    CPU."""
    sizes = {} if context.gpu else material.TINY
    passages, lengths = (100_000, (40, 120)) if context.gpu else (200, (4, 14))
    num_words = 30_517 if context.gpu else 64
    data = material.write_data(context.folder / "data", passages, 8, num_words, lengths)
    model = material.write_model(context.folder / "model", num_words, sizes=sizes)
    arguments = [
        "encode", "--model", str(model), "--data", str(data), "--out",
        str(context.folder / "embeddings"), "--pooling", "cls", "--max_length",
        "128" if context.gpu else "16", "--batch_size", "512",
    ]  # fmt: skip
    began = time.monotonic()
    context.erniesearch(*arguments)
    seconds = time.monotonic() - began
    lines = (data / "corpus.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    tokens = sum(2 + len(text.split()) for text in texts)
    cosines = _compare(context, model, texts[:SEEN_ALONE])
    context.tell(
        passages=passages, tokens=tokens, seconds=round(seconds, 2),
        passages_per_s=round(passages / seconds, 1), tokens_per_s=round(tokens / seconds, 1),
        lowest_cosine_to_cpu_fp32=round(float(cosines.min()), 5),
    )  # fmt: skip
    require(float(cosines.min()) > 0.995, f"embeddings are not those of the CPU: {cosines}")


def _compare(context: Context, model: Path, texts: list[str]) -> np.ndarray:
    """Cosines between the first stored vectors and those of the CPU in fp32."""
    import torch

    from erniesearch.config.keys import StudentConfig
    from erniesearch.retrieval.embeddings import Embeddings
    from erniesearch.retrieval.retriever import Retriever

    length = 128 if context.gpu else 16
    retriever = Retriever(StudentConfig(str(model)), length, length, device=torch.device("cpu"))
    wanted = retriever.vectors(texts, "passage")
    own = Embeddings(context.folder / "embeddings").rows(np.arange(len(texts)))
    return np.sum(own * wanted, 1) / np.linalg.norm(own, axis=1) / np.linalg.norm(wanted, axis=1)


def index(context: Context) -> None:
    """`erniesearch encode` and `erniesearch index`; on a GPU with --gpu true where FAISS can. All
    lists visited, an IVF index finds what a search of every vector finds."""
    import faiss

    from erniesearch.retrieval.embeddings import Embeddings

    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    context.tell(faiss=faiss.__version__, faiss_gpus=gpus)
    passages, lists = (20_000, 128) if context.gpu else (600, 8)
    data = material.write_data(context.folder / "data", passages)
    model = material.write_model(context.folder / "model", sizes=material.TINY)
    folder, out = context.folder / "embeddings", context.folder / "index"
    context.erniesearch(
        "encode",
        "--model",
        str(model),
        "--data",
        str(data),
        "--out",
        str(folder),
        "--pooling",
        "mean",
    )
    began = time.monotonic()
    context.erniesearch("index", "--embeddings", str(folder), "--out", str(out), "--factory",
                        f"IVF{lists},Flat", "--nprobe", str(lists),
                        "--gpu", str(bool(gpus and context.gpu)).lower())  # fmt: skip
    seconds = time.monotonic() - began
    vectors = Embeddings(folder).rows(np.arange(passages))
    built = faiss.read_index(str(next(path for path in out.rglob("*") if path.name == "index")))
    faiss.extract_index_ivf(built).nprobe = lists
    queries = vectors[:: len(vectors) // 50]
    scores = queries @ vectors.T
    wanted = -np.sort(-scores, axis=1)[:, :10]
    found, _ = built.search(queries, 10)
    worst = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    context.tell(vectors=len(vectors), build_seconds=round(seconds, 2), largest_difference=worst)
    require(worst < 1e-3, f"the index finds other scores: relative difference {worst:.2g}")


def pipeline(context: Context) -> None:
    """`erniesearch run` through every stage at tiny size, and a search in what it made."""
    config = material.changed(
        material.tiny(context.folder), context.folder / "run", student={"dropout": 0.1}
    )
    weights = {"li": 1.0, "de": 1.0, "li_to_de": 1.0, "dual_reg": 1.0}
    config["training"] = config["training"] | {"num_processes": 1}
    config["evaluation"] = {"rerank_depth": 10}
    config["stages"] = {
        "interaction": material.stage(2, weights=weights, negatives="bm25"),
        "teacher": material.stage(2, weights={"ce": 1.0}, negatives="bm25"),
        "mine": {"depth": 10, "num_negatives": 4},
        "cascade": config["stages"]["cascade"] | {"steps": 3, "negatives": "mined"},
    }
    file = material.write_config(config, context.folder / "run.yaml")
    began = time.monotonic()
    context.erniesearch("run", file)
    seconds = time.monotonic() - began
    run = context.folder / "run"
    evaluated = json.loads((run / "evaluation.json").read_text())
    rows = [row["name"] for row in evaluated["rows"]]
    said = context.erniesearch("search", " ".join(material.words(3)), "--run", str(run))
    context.tell(seconds=round(seconds, 1), rows=rows,
                 exports=sorted(path.name for path in (run / "exports").iterdir()))  # fmt: skip
    require(len(rows) == 7, f"rows of the table: {rows}")
    require(bool(re.search(r"\bp\d+\b", said)), f"the search found no passage: {said[-500:]}")
