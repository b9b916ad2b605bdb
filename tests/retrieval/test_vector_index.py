"""FAISS folders: what is found in them, what is refused, and that their bytes repeat."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from support.processes import run_python

from erniesearch.cli import main
from erniesearch.config.options import IndexOptions
from erniesearch.errors import UserError
from erniesearch.retrieval.build_index import build_index, plan_index
from erniesearch.retrieval.embeddings import DTYPES, Embeddings, Manifest, claim, write_shard
from erniesearch.retrieval.vector_index import VectorIndex

ROWS, DIM = 600, 32


def write_embeddings(folder: Path, values: np.ndarray, **changes: Any) -> Path:
    """A folder as `erniesearch encode` writes it, 250 rows a shard."""
    rows, dim = values.shape
    manifest = replace(
        Manifest("vectors", "passage", "fp16", dim, rows, 250, 64, "fp32", "model", "data"),
        **changes,
    )
    claim(folder, manifest)
    stored = torch.from_numpy(values).to(DTYPES[manifest.dtype])
    for k in range(manifest.num_shards):
        start, end = manifest.bounds(k)
        ids = [f"p{row}" for row in range(start, end)]
        offsets = torch.arange(end - start + 1) if manifest.what == "tokens" else None
        write_shard(folder, manifest, k, ids, stored[start:end], offsets)
    return folder


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float16)
    values[500:510] = values[:10]  # equal scores on both sides of every cut into parts
    return values


@pytest.fixture(scope="module")
def embeddings(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embeddings(tmp_path_factory.mktemp("embeddings") / "e", vectors)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(20, DIM)).astype(np.float32)


def build(embeddings: Path, out: Path, **settings: Any) -> Path:
    build_index(IndexOptions(str(embeddings), str(out), **settings))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_flat_search_is_exact_in_any_number_of_parts(
    embeddings: Path, vectors: np.ndarray, queries: np.ndarray, tmp_path: Path, shards: int,
    metric: str,
) -> None:  # fmt: skip
    index = VectorIndex.load(build(embeddings, tmp_path / "i", shards=shards, metric=metric))
    exact = vectors.astype(np.float32)
    wanted = queries @ exact.T
    if metric == "l2":
        wanted = -((queries[:, None] - exact[None]) ** 2).sum(-1)
    rows, scores = index.search(queries, 25)
    order = np.argsort(-wanted.round(3), axis=1, kind="stable")[:, :25]
    np.testing.assert_allclose(scores, np.take_along_axis(wanted, order, 1), atol=1e-3)
    assert (np.diff(scores) <= 0).all()
    assert [index.pids[row] for row in rows[0]] == [f"p{row}" for row in rows[0]]
    ties = scores[:, 1:] == scores[:, :-1]
    assert (rows[:, 1:] > rows[:, :-1])[ties].all()


def test_parts_find_what_one_index_finds(
    embeddings: Path, queries: np.ndarray, tmp_path: Path
) -> None:
    one = VectorIndex.load(build(embeddings, tmp_path / "1")).search(queries, 600)
    three = VectorIndex.load(build(embeddings, tmp_path / "3", shards=3)).search(queries, 600)
    np.testing.assert_array_equal(one[0], three[0])
    np.testing.assert_array_equal(one[1], three[1])
    assert sorted(one[0][0]) == list(range(600))
    equal = {row: row + 500 for row in range(10)}
    for found in one[0].tolist():
        for first, second in equal.items():
            assert found.index(second) == found.index(first) + 1


@pytest.mark.parametrize("shards", [1, 2])
def test_folder_is_one_that_pyserini_reads(
    embeddings: Path, queries: np.ndarray, tmp_path: Path, shards: int
) -> None:
    out = build(embeddings, tmp_path / "i", shards=shards)
    folders = [out] if shards == 1 else [out / "shard-00", out / "shard-01"]
    seen = []
    for folder in folders:  # as pyserini.search.faiss does
        index = faiss.read_index(str(folder / "index"))
        docids = [line.rstrip() for line in (folder / "docid").open()]
        assert index.ntotal == len(docids) == ROWS // shards
        assert index.search(queries, 3)[1].max() < len(docids)
        seen += docids
    assert seen == [f"p{row}" for row in range(ROWS)]
    record = json.loads((out / "index.json").read_text())
    assert (record["rows"], record["dim"], record["factory"]) == (ROWS, DIM, "Flat")
    assert record["embeddings"]["model"] == "model"


@pytest.mark.parametrize(
    "factory", ["Flat", "IVF8,Flat", "IVF4,PQ8x4", "OPQ8,IVF4,PQ8x4", "HNSW8", "SQfp16", "PQ8x4"]
)
def test_bytes_repeat_with_one_thread(embeddings: Path, tmp_path: Path, factory: str) -> None:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        first = build(embeddings, tmp_path / "first", factory=factory, shards=2)
        second = build(embeddings, tmp_path / "second", factory=factory, shards=2)
    finally:
        faiss.omp_set_num_threads(threads)
    assert contents(first) == contents(second)
    assert len(contents(first)) == 5


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF4,PQ8x4", "HNSW8", "SQfp16"])
def test_mapped_index_finds_what_a_read_one_finds(
    embeddings: Path, queries: np.ndarray, tmp_path: Path, factory: str
) -> None:
    out = build(embeddings, tmp_path / "i", factory=factory)
    scores, rows = faiss.read_index(str(out / "index")).search(queries, 10)
    found_rows, found_scores = VectorIndex.load(out).search(queries, 10)
    np.testing.assert_array_equal(found_scores, np.where(rows < 0, -np.inf, scores))
    assert {*found_rows.ravel().tolist()} == {*rows.ravel().tolist()}


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF4,PQ8x4"])
def test_bytes_of_ivf_do_not_depend_on_threads(
    embeddings: Path, tmp_path: Path, factory: str
) -> None:
    command = ["-m", "erniesearch.cli", "index", "--embeddings", str(embeddings), "--factory"]
    for threads in ("1", "2"):
        status, output = run_python(
            *command, factory, "--out", str(tmp_path / threads), OMP_NUM_THREADS=threads
        )
        assert status == 0, output
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_nprobe_and_ef_search_widen_the_search(
    embeddings: Path, queries: np.ndarray, tmp_path: Path
) -> None:
    out = build(embeddings, tmp_path / "ivf", factory="IVF25,Flat")
    exact = VectorIndex.load(build(embeddings, tmp_path / "flat")).search(queries, 10)
    default = VectorIndex.load(out)
    assert default.parts[0].nprobe == 5  # the root of 25
    narrow = VectorIndex.load(out, nprobe=1).search(queries, 10)
    every = VectorIndex.load(out, nprobe=25).search(queries, 10)
    np.testing.assert_allclose(every[1], exact[1], atol=1e-4)
    assert narrow[1].mean() < default.search(queries, 10)[1].mean() < every[1].mean()
    graph = build(embeddings, tmp_path / "hnsw", factory="HNSW4", ef_search=40)
    assert faiss.downcast_index(VectorIndex.load(graph).parts[0]).hnsw.efSearch == 40
    assert faiss.downcast_index(VectorIndex.load(graph, ef_search=7).parts[0]).hnsw.efSearch == 7
    with pytest.raises(UserError, match="nprobe 3: the index is no IVF index"):
        VectorIndex.load(graph, nprobe=3)
    with pytest.raises(UserError, match="efSearch 3: the index is no HNSW index"):
        VectorIndex.load(out, ef_search=3)


def test_too_few_found_are_marked(embeddings: Path, queries: np.ndarray, tmp_path: Path) -> None:
    out = build(embeddings, tmp_path / "i", factory="IVF50,Flat", shards=2)
    rows, scores = VectorIndex.load(out, nprobe=1).search(queries, 600)
    missing = rows < 0
    assert missing.any()
    assert np.isneginf(scores[missing]).all()
    assert np.isfinite(scores[~missing]).all()
    for row in rows:
        found = row[row >= 0]
        assert len(set(found.tolist())) == len(found)
        assert (row[: len(found)] >= 0).all()  # what is missing stands at the end


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"factory": "PQ5"}, "--factory PQ5 for 32 dimensions: FAISS says: .*multiple"),
        ({"factory": "IVF4,PQ7x4"}, "--factory IVF4,PQ7x4 for 32 dimensions: FAISS says"),
        ({"factory": "Flatt"}, "--factory Flatt for 32 dimensions: FAISS says"),
        ({"factory": "IVF601,Flat"}, "601 centroids cannot be trained on 600 vectors"),
        ({"factory": "IVF8,PQ8x10"}, "1,024 centroids cannot be trained on 600 vectors"),
        ({"factory": "IVF40,Flat", "train_sample": 39},
         "40 centroids cannot be trained on --train_sample 39"),
        ({"factory": "Flat", "nprobe": 3}, "the index is no IVF index"),
        ({"factory": "Flat", "shards": 601}, "there are only 600 vectors"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(
    embeddings: Path, tmp_path: Path, settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        build(embeddings, tmp_path / "i", **settings)
    assert not list(tmp_path.iterdir())


def test_other_mistakes_are_named(embeddings: Path, queries: np.ndarray, tmp_path: Path) -> None:
    out = build(embeddings, tmp_path / "i")
    with pytest.raises(UserError, match="is there already: name another --out"):
        build(embeddings, out)
    with pytest.raises(UserError, match="dimensions, the query has 16"):
        VectorIndex.load(out).search(queries[:, :16], 5)
    for option in ({"num_centroids": 4}, {"bits": 4}, {"candidates": 9}):
        with pytest.raises(UserError, match=f"--{next(iter(option))} is for token vectors, and .*"):
            build(embeddings, tmp_path / "j", **option)
    if not hasattr(faiss, "StandardGpuResources"):
        with pytest.raises(UserError, match="this FAISS has no GPU"):
            build(embeddings, tmp_path / "g", gpu=True)
    (out / "index").write_bytes(b"IxF2" + b"\0" * 10)
    with pytest.raises(UserError, match="FAISS says"):
        VectorIndex.load(out)


def test_left_over_of_a_killed_build_is_replaced(embeddings: Path, tmp_path: Path) -> None:
    (tmp_path / ".i.tmp").mkdir()
    (tmp_path / ".i.tmp" / "index").write_bytes(b"half")
    build(embeddings, tmp_path / "i")
    assert [path.name for path in tmp_path.iterdir()] == ["i"]
    assert set(contents(tmp_path / "i")) == {"index", "docid", "index.json"}


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF4,PQ8x4", "HNSW16", "SQfp16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_estimate_of_disk_is_near(
    embeddings: Path, tmp_path: Path, factory: str, shards: int
) -> None:
    plan = plan_index(Embeddings(embeddings), IndexOptions("", "", factory=factory, shards=shards))
    out = build(embeddings, tmp_path / "i", factory=factory, shards=shards)
    written = sum(path.stat().st_size for path in out.rglob("index"))
    assert 0.9 * plan.disk < written < 1.25 * plan.disk + shards * 2000


def test_command_states_its_needs_first(
    embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "i"
    argv = ["index", "--embeddings", str(embeddings), "--out", str(out), "--factory", "IVF8,Flat"]
    assert main(argv) == 0
    said = capsys.readouterr().err
    assert "600 vectors of 32, IVF8,Flat, ip, 1 part(s); trained on 600; about" in said
    assert main([*argv, "--shards", "0"]) == 2
    assert "--shards 0: must be 1 or more" in capsys.readouterr().err


def test_ids_are_mapped(tmp_path: Path) -> None:
    names = ["ä", "p1", "日本", "x" * 1000, "p4"]
    vectors = np.eye(5, dtype=np.float32)
    VectorIndex.build(vectors, names).save(tmp_path / "i")
    pids = VectorIndex.load(tmp_path / "i").pids
    assert (len(pids), list(pids), pids[-1], pids[1:3]) == (5, names, "p4", names[1:3])
    with pytest.raises(IndexError):
        pids[5]


class FaissOfGpus:
    """The part of faiss-gpu that is called; what it is given is kept, and searched on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> None:
        self.asked: list[tuple[bool, bool]] = []
        self.fails = fails
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for name, value in (
            ("StandardGpuResources", object), ("get_num_gpus", lambda: 2),
            ("GpuMultipleClonerOptions", SimpleNamespace), ("index_cpu_to_all_gpus", self.copy),
        ):  # fmt: skip
            monkeypatch.setattr(faiss, name, value, raising=False)

    def copy(self, index: Any, co: Any) -> Any:
        if self.fails:
            raise RuntimeError("Error: 'err == cudaSuccess' failed: out of memory")
        self.asked.append((co.shard, co.useFloat16))
        return faiss.clone_index(index)


def test_vectors_are_searched_on_gpus_where_faiss_has_some(
    monkeypatch: pytest.MonkeyPatch, queries: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    index = VectorIndex.build(np.eye(32, dtype=np.float32), [f"p{i}" for i in range(32)])
    assert index.on("cpu", 5) is index
    if not hasattr(faiss, "StandardGpuResources"):
        assert index.on("auto", 5) is index
        assert capsys.readouterr().err == "", "there is no GPU"
        with pytest.raises(UserError, match="vector_search gpu_fp16: this FAISS has no GPU"):
            index.on("gpu_fp16", 5)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert index.on("auto", 5) is index
        assert "searched on the CPU: training.vector_search auto: this FAISS has no GPU" in (
            capsys.readouterr().err
        )
    gpus = FaissOfGpus(monkeypatch)
    for where, half in (("auto", False), ("gpu", False), ("gpu_fp16", True)):
        there = index.on(where, 2048)  # type: ignore[arg-type]
        assert there is not index
        assert gpus.asked.pop() == (True, half)
        for own, wanted in zip(there.search(queries, 5), index.search(queries, 5), strict=True):
            assert np.array_equal(own, wanted)
    assert capsys.readouterr().err == ""


def test_what_gpus_cannot_search_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = VectorIndex.build(np.eye(8, dtype=np.float32), [f"p{i}" for i in range(8)])
    FaissOfGpus(monkeypatch, fails=True)
    for depth, reason in ((5, "out of memory"), (2049, "2049 passages a query are more than")):
        assert index.on("auto", depth) is index
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"searched on the CPU: {'vectors' if depth == 5 else 'training'}" in said
        assert reason in said
        with pytest.raises(UserError, match=reason):
            index.on("gpu", depth)


@pytest.mark.cuda
@pytest.mark.parametrize("where", ["auto", "gpu", "gpu_fp16"])
def test_gpus_find_what_the_cpu_finds(where: Any, queries: np.ndarray) -> None:
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this FAISS was built for the CPU")
    vectors = np.random.default_rng(3).standard_normal((5000, queries.shape[1])).astype(np.float32)
    index = VectorIndex.build(vectors, [str(row) for row in range(len(vectors))])
    there = index.on(where, 100)
    assert there is not index
    (rows, scores), (wanted, expected) = (each.search(queries, 100) for each in (there, index))
    tolerance = 1e-2 if where == "gpu_fp16" else 1e-4
    np.testing.assert_allclose(scores, expected, rtol=tolerance, atol=tolerance)
    pairs = zip(rows.tolist(), wanted.tolist(), strict=True)
    assert min(len({*own} & {*best}) for own, best in pairs) >= (97 if where == "gpu_fp16" else 99)
