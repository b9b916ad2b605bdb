"""A late-interaction index over synthetic passages: recall of exhaustive MaxSim, bytes, seconds.

    python benchmarks/late_interaction_index.py --model FOLDER --work DIR --out FILE

FOLDER makes token vectors. The passages are drawn from topics: each topic has words of its own,
from the model's vocabulary, beside words that all use. A query takes words of one passage. Corpus,
token vectors and indexes are made by the commands that a user has, in ``--work``, and kept there;
building is killed once, half-way, and continued by the same command.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from time import perf_counter, process_time, sleep
from typing import Any

import numpy as np
import torch
from erniesearch_kernels import maxsim_varlen
from torch import Tensor
from transformers import AutoTokenizer

from erniesearch.report.benchmark_report import tell_figures
from erniesearch.retrieval.embeddings import Embeddings, read_manifest
from erniesearch.retrieval.token_index import TokenIndex

TOPICS = 2000
TOPIC_WORDS = 40
SHORTEST, LONGEST = 13, 20
"""Words of a passage."""


def write_corpus(root: Path, model: Path, passages: int, queries: int) -> None:
    """A collection in BEIR layout; the same arguments give the same bytes."""
    rng = np.random.default_rng(0)
    vocabulary = AutoTokenizer.from_pretrained(model).get_vocab()
    words = np.array(sorted(w for w in vocabulary if w.isascii() and w.isalpha() and len(w) > 2))
    common = rng.permutation(words)[:3000]
    frequency = 1 / np.arange(10, 10 + len(common))
    of_topic = rng.integers(len(words), size=(TOPICS, TOPIC_WORDS))
    root.mkdir(parents=True, exist_ok=True)
    drawn = rng.permutation(passages)[:queries]
    asked: dict[int, str] = {}
    with (root / "corpus.jsonl").open("w") as corpus:
        for row in range(passages):
            length = int(rng.integers(SHORTEST, LONGEST + 1))
            own = words[rng.choice(of_topic[rng.integers(TOPICS)], size=length)]
            shared = rng.choice(common, size=length, p=frequency / frequency.sum())
            text = np.where(rng.random(length) < 0.6, own, shared)
            corpus.write(json.dumps({"_id": f"p{row}", "text": " ".join(text)}) + "\n")
            asked[row] = " ".join(rng.choice(text, size=6, replace=False))
    (root / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{row}", "text": asked[row]}) + "\n" for row in drawn.tolist())
    )
    (root / "qrels").mkdir(exist_ok=True)
    judged = "".join(f"q{row}\tp{row}\t1\n" for row in drawn.tolist())
    (root / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)


def call(*arguments: object) -> None:
    """``erniesearch ARGUMENTS``, to its end."""
    subprocess.run([sys.executable, "-m", "erniesearch", *map(str, arguments)], check=True)


def build(tokens: Path, out: Path, options: list[str]) -> dict[str, Any]:
    """`erniesearch index`, killed when half of the shards are done and started again."""
    command = [sys.executable, "-m", "erniesearch", "index", "--embeddings", str(tokens), "--out",
               str(out), *options]  # fmt: skip
    began, half = perf_counter(), read_manifest(tokens).num_shards // 2
    progress = out.with_name(f".{out.name}.parts") / "progress.json"
    process = subprocess.Popen(command)
    while not (progress.is_file() and int(progress.read_text() or 0) >= half):
        if process.poll() is not None:
            sys.exit(f"{out}: ended with {process.returncode} before it could be killed")
        sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done, killed = int(progress.read_text()), perf_counter() - began
    subprocess.run(command, check=True)
    return {
        "seconds": perf_counter() - began, "killed_after_seconds": killed,
        "shards_done_when_killed": done, "shards": read_manifest(tokens).num_shards,
    }  # fmt: skip


def exhaustive(queries: list[Tensor], tokens: Embeddings, depth: int) -> np.ndarray:
    """Rows of the best passages by MaxSim over every stored token vector, ``[queries, depth]``."""
    bounds = torch.tensor([0, *map(len, queries)]).cumsum(0)
    joined, parts = torch.cat(queries).float(), []
    for shard in tokens:
        assert shard.offsets is not None
        lengths = shard.offsets.diff()
        parts.append(
            maxsim_varlen(
                joined, shard.embeddings.float(), bounds, shard.offsets, max(map(len, queries)),
                int(lengths.max()),
            )
        )  # fmt: skip
    scores = torch.cat(parts, dim=1).numpy()
    order: np.ndarray = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    return order


def measure(
    folder: Path, queries: list[Tensor], best: np.ndarray, nprobe: int, candidates: int
) -> dict[str, float]:
    """Recall of the exhaustive ranking, and what a query takes, all asked in one call."""
    index = TokenIndex.load(folder, nprobe, candidates)
    index.search(queries[:5], best.shape[1])
    began, began_cpu = perf_counter(), process_time()
    rows, _ = index.search(queries, best.shape[1])
    taken, taken_cpu = perf_counter() - began, process_time() - began_cpu

    def recall(depth: int) -> float:
        pairs = zip(rows[:, :depth].tolist(), best[:, :depth].tolist(), strict=True)
        return float(np.mean([len({*ours} & {*theirs}) / depth for ours, theirs in pairs]))

    return {
        "nprobe": nprobe, "candidates": candidates, "recall@10": recall(10),
        "recall@100": recall(100), "seconds_per_query": taken / len(queries),
        "cpu_seconds_per_query": taken_cpu / len(queries),
    }  # fmt: skip


def describe(folder: Path) -> dict[str, Any]:
    """What an index takes on disk, file by file."""
    record = json.loads((folder / "index.json").read_text())
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    kept = ("tokens", "dim", "bits", "num_centroids", "train_sample")
    return {name: record[name] for name in kept} | {
        "bytes_per_token": sum(sizes.values()) / record["tokens"],
        "bytes_per_token_by_file": {n: size / record["tokens"] for n, size in sizes.items()},
    }


def main() -> None:
    """Make what is missing, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder that makes token vectors")
    parser.add_argument("--about", default="", help="what the model is, for the figures")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=300, help="drawn, or of those there")
    parser.add_argument("--max_length", type=int, default=24, help="tokens of a text")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--num_centroids", type=int)
    parser.add_argument("--nprobe", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--candidates", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    work = given.work
    if not (work / "data" / "qrels" / "test.tsv").is_file():
        write_corpus(work / "data", given.model, given.passages, given.queries)
    for side, name in (("passage", "tokens"), ("query", "queries")):
        if (work / "exhaustive.npy").is_file():  # all is there
            break
        call("encode", "--what", "tokens", "--side", side, "--model", given.model, "--data",
             work / "data", "--out", work / name, "--max_length", given.max_length)  # fmt: skip
    asked = Embeddings(work / "queries").shard(0)
    assert asked.offsets is not None
    queries = list(asked.embeddings.float().split(asked.offsets.diff().tolist()))
    tokens = Embeddings(work / "tokens")
    ranking = work / "exhaustive.npy"
    if not ranking.is_file():
        np.save(ranking, exhaustive(queries, tokens, 100))
    best, queries = np.load(ranking)[: given.queries], queries[: given.queries]
    indexes = []
    for bits in given.bits:
        folder = work / f"index-{bits}-{given.num_centroids or 'default'}"
        options = ["--bits", str(bits)]
        options += ["--num_centroids", str(given.num_centroids)] if given.num_centroids else []
        facts = folder.with_suffix(".json")
        if not folder.exists():
            facts.write_text(json.dumps(build(work / "tokens", folder, options)))
        searches = [
            measure(folder, queries, best, nprobe, candidates)
            for nprobe in given.nprobe for candidates in given.candidates
        ]  # fmt: skip
        built = json.loads(facts.read_text())
        indexes.append(describe(folder) | {"build": built, "searches": searches})
    results = {
        "passages": len(tokens), "queries": len(queries), "about": given.about,
        "precision": tokens.manifest.precision, "threads": torch.get_num_threads(),
        "stored_as": tokens.manifest.dtype, "indexes": indexes,
    }  # fmt: skip
    tell_figures(results, given.out, "python benchmarks/late_interaction_index.py")


if __name__ == "__main__":
    main()
