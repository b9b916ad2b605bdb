"""A large collection from text to index on two ranks, killed half-way: bytes, time and memory.

ERNIESEARCH_SCALE is the number of passages; ERNIESEARCH_SCALE_RESULT a file for the figures.
"""

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from scaling import ROOT, Started, finish, start, write_passages
from support.tiny import WORDS, write_model

from erniesearch.evaluation.table import describe_machine
from erniesearch.retrieval.embeddings import Embeddings
from erniesearch.retrieval.vector_index import VectorIndex

PASSAGES = int(os.environ.get("ERNIESEARCH_SCALE", "20000"))
SHARDS = 20
MOST_MEMORY = 3 * 2**30
OPEN = """
import sys
from erniesearch.config.keys import StudentConfig
from erniesearch.data.collection import load_beir
from erniesearch.data.corpus.tokens import open_tokens
from erniesearch.models.backbone import load_tokenizer
data = load_beir(sys.argv[1], "test")
store = open_tokens(data.passages, load_tokenizer(StudentConfig(sys.argv[2])))
assert len(data.pids) == len(store) == int(sys.argv[3])
"""


@dataclass
class Bench:
    """Starts processes, and keeps each phase's minutes and peak memory (summed over ranks)."""

    folder: Path
    minutes: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def ranks(self, out: Path) -> list[Started]:
        options = ["--model", str(self.folder / "model"), "--pooling", "mean", "--data",
                   str(self.folder / "data"), "--out", str(out), "--shard_size",
                   str(-(-PASSAGES // SHARDS))]  # fmt: skip
        script = str(ROOT / "launch" / "encode.py")
        return [start([script, *options], rank, 2) for rank in (0, 1)]

    def finish(self, phase: str, started: float, processes: list[Started], status: int = 0) -> None:
        self.memory[phase] = sum(finish(processes, status).peaks)
        self.minutes[phase] = round((time.monotonic() - started) / 60, 3)

    def run(self, phase: str, *arguments: str) -> None:
        self.finish(phase, time.monotonic(), [start(arguments)])

    def index(self, phase: str, embeddings: Path, out: Path) -> None:
        lists = round(PASSAGES**0.5)
        self.run(phase, "-m", "erniesearch.cli", "index", "--embeddings", str(embeddings), "--out",
                 str(out), "--factory", f"IVF{lists},Flat", "--shards", "2")  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(6 * 3600)
def test_killed_half_way_the_index_is_the_same(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    write_passages(WORDS, PASSAGES, tmp_path / "data")
    write_model(tmp_path / "model")
    model, data = str(tmp_path / "model"), str(tmp_path / "data")
    bench.run("read and tokenise", "-c", OPEN, data, model, str(PASSAGES))

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    started, ranks = time.monotonic(), bench.ranks(killed)
    while len(list(killed.glob("embeddings-*.safetensors"))) < SHARDS // 2:
        assert all(process.poll() is None for process, _ in ranks)
        time.sleep(0.02)
    for process, _ in ranks:
        process.kill()
    bench.finish("encode until the kill", started, ranks, status=-9)
    there = len(list(killed.glob("embeddings-*.safetensors")))
    assert SHARDS // 2 <= there < SHARDS
    bench.finish("encode the rest", time.monotonic(), bench.ranks(killed))
    bench.finish("encode without a kill", time.monotonic(), bench.ranks(whole))
    assert len(Embeddings(killed)) == PASSAGES
    bench.index("index after the kill", killed, tmp_path / "first")
    bench.index("index", whole, tmp_path / "second")

    assert contents(killed) == contents(whole)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    vectors = Embeddings(whole)
    rows = np.array([0, PASSAGES // 2, PASSAGES - 1])
    found, _ = VectorIndex.load(tmp_path / "first", nprobe=10_000).search(vectors.rows(rows), 100)
    assert len(set(found[0].tolist())) == 100
    disk = {name: sum(path.stat().st_size for path in (tmp_path / name).rglob("*"))
            for name in ("data", "whole", "first")}  # fmt: skip
    rate = PASSAGES / bench.minutes["encode without a kill"] / 60
    figures = {
        "passages": PASSAGES, "shards": SHARDS, "shards_at_the_kill": there, "ranks": 2,
        "minutes": bench.minutes, "passages_per_second": round(rate),
        "peak_memory_mib": {name: round(size / 2**20) for name, size in bench.memory.items()},
        "disk_mib": {"corpus.jsonl": round(disk["data"] / 2**20, 1),
                     "embeddings": round(disk["whole"] / 2**20, 1),
                     "index": round(disk["first"] / 2**20, 1)},
        "machine": describe_machine(),
    }  # fmt: skip
    if result := os.environ.get("ERNIESEARCH_SCALE_RESULT"):
        Path(result).write_text(json.dumps(figures, indent=2) + "\n")
    shutil.rmtree(tmp_path, ignore_errors=True)
    assert max(bench.memory.values()) < MOST_MEMORY, figures
