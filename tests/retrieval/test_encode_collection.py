"""Embeddings on disk: equal to the model's, and the same bytes whoever wrote them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.finished_run import finished_run
from support.processes import ROOT, run_python
from support.tiny import ConfigMaker, write_beir, write_model

from erniesearch.cli import main
from erniesearch.config.options import EncodeOptions
from erniesearch.data.collection import load_beir
from erniesearch.errors import UserError
from erniesearch.export import export_all
from erniesearch.retrieval.embeddings import Embeddings, shard_path
from erniesearch.retrieval.encode_collection import encode_collection
from erniesearch.retrieval.load import load_retriever
from erniesearch.run_folder import RunFolder


@pytest.fixture
def exports(make_config: ConfigMaker) -> Path:
    config = finished_run(make_config, pooling="mean", normalize=True)
    export_all(config)
    return RunFolder(config.run_dir).root / "exports"


def encode(
    exports: Path, data: Path, out: Path, kind: str = "dual_encoder", **options: Any
) -> Path:
    options = {"shard_size": 13, "batch_size": 4, "dtype": "fp32", "precision": "fp32"} | options
    encode_collection(EncodeOptions(str(exports / kind), str(data), str(out), **options))
    return out


def as_ranks(monkeypatch: pytest.MonkeyPatch, world_size: int) -> Any:
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("LOCAL_RANK", "0")
        yield rank


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def launcher_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What read_launcher fills in is taken back after each test."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("side", ["passage", "query"])
def test_vectors_are_the_models(exports: Path, tiny_data: Path, tmp_path: Path, side: str) -> None:
    folder = Embeddings(encode(exports, tiny_data, tmp_path / "out", side=side))
    data = load_beir(tiny_data, "test")
    queries = side == "query"
    ids = list(data.queries) if queries else list(data.pids)
    texts = list(data.queries.values()) if queries else list(data.passages)
    retriever = load_retriever(exports / "dual_encoder", device=torch.device("cpu"))
    expected = retriever.vectors(texts, side)
    assert len(folder) == len(ids)
    assert [name for shard in folder for name in shard.ids] == ids
    assert [shard.start for shard in folder] == list(range(0, len(ids), 13))
    stored = torch.cat([shard.embeddings for shard in folder]).numpy()
    np.testing.assert_allclose(stored, expected, atol=1e-6)
    picked = np.array([0, 12, 13, 30])
    np.testing.assert_array_equal(folder.rows(picked), stored[picked])


def test_token_vectors_are_the_models(exports: Path, tiny_data: Path, tmp_path: Path) -> None:
    out = encode(exports, tiny_data, tmp_path / "out", "late_interaction", dtype="fp16")
    folder = Embeddings(out)
    assert (folder.manifest.what, folder.manifest.dim) == ("tokens", 16)
    data = load_beir(tiny_data, "test")
    retriever = load_retriever(exports / "late_interaction", device=torch.device("cpu"))
    expected = retriever.tokens(list(data.passages), "passage")
    row = 0
    for shard in folder:
        assert shard.offsets is not None
        for start, end in zip(shard.offsets[:-1], shard.offsets[1:], strict=True):
            stored = shard.embeddings[start:end]
            torch.testing.assert_close(stored, expected[row], atol=1e-3, rtol=0)
            row += 1
    assert row == 60


def test_queries_of_one_split(exports: Path, tmp_path: Path) -> None:
    data = write_beir(tmp_path / "data")
    (data / "qrels" / "few.tsv").write_text("query-id\tcorpus-id\tscore\nq7\tp0\t1\nq3\tp1\t1\n")
    out = encode(exports, data, tmp_path / "out", side="query", split="few")
    assert [shard.ids for shard in Embeddings(out)] == [["q7", "q3"]]


@pytest.mark.parametrize("kind", ["dual_encoder", "late_interaction"])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_write_the_bytes_of_one(
    exports: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    kind: str, world_size: int,
) -> None:  # fmt: skip
    alone = encode(exports, tiny_data, tmp_path / "alone", kind)
    for _ in as_ranks(monkeypatch, world_size):
        encode(exports, tiny_data, tmp_path / "shared", kind)
    assert len(contents(alone)) == 6  # five shards and the manifest, nothing else
    assert contents(tmp_path / "shared") == contents(alone)


def test_restart_does_what_is_missing_and_nothing_else(
    exports: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = encode(exports, tiny_data, tmp_path / "out")
    before = contents(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    shard_path(out, 1).unlink()
    cut = shard_path(out, 3)
    cut.write_bytes(cut.read_bytes()[:-8])
    aside = out / f".{shard_path(out, 1).name}.0badcafe.tmp"  # a kill in the middle of writing
    aside.write_bytes(b"half")
    with pytest.raises(UserError, match=r"2 of 5 shards are missing or damaged, the first is"
                       r" embeddings-00001"):  # fmt: skip
        Embeddings(out)
    encode(exports, tiny_data, out, batch_size=4)
    assert contents(out) == before
    kept = {name for name, time in times.items() if (out / name).stat().st_mtime_ns == time}
    assert kept == set(before) - {shard_path(out, 1).name, cut.name}


@pytest.mark.parametrize(
    ("key", "changes"),
    [("dtype", {"dtype": "fp16"}), ("shard_size", {"shard_size": 20}), ("side", {"side": "query"}),
     ("max_length", {"max_length": 8}), ("what", {"kind": "late_interaction"}),
     ("precision", {"precision": "bf16"}), ("data", {"use_titles": False})],
)  # fmt: skip
def test_another_setting_is_refused(
    exports: Path, tiny_data: Path, tmp_path: Path, key: str, changes: dict[str, Any]
) -> None:
    out = encode(exports, tiny_data, tmp_path / "out")
    before = contents(out)
    with pytest.raises(UserError, match=rf"manifest.json: '{key}' is .* name another --out"):
        encode(exports, tiny_data, out, **changes)
    assert contents(out) == before


def test_another_model_or_corpus_is_refused(exports: Path, tiny_data: Path, tmp_path: Path) -> None:
    out = encode(exports, tiny_data, tmp_path / "out")
    with pytest.raises(UserError, match="'data' is"):
        encode(exports, write_beir(tmp_path / "other", seed=1), out)
    weights = exports / "dual_encoder" / "model.safetensors"
    state = load_file(weights)
    save_file({name: value + 1e-6 for name, value in state.items()}, weights)
    with pytest.raises(UserError, match="'model' is"):
        encode(exports, tiny_data, out)


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path: Path, tiny_data: Path) -> None:
    model = write_model(tmp_path / "model")
    state = load_file(model / "model.safetensors")
    state["encoder.layer.1.output.LayerNorm.weight"] *= 1e6
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="values that fp16 cannot hold: --dtype bf16"):
        encode(tmp_path, tiny_data, tmp_path / "out", "model", pooling="mean", dtype="fp16")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    encode(tmp_path, tiny_data, tmp_path / "wide", "model", pooling="mean", dtype="bf16")


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"what": "tokens"}, "is a dual-encoder: it makes no tokens"),
     ({"split": "test"}, "--split selects queries"),
     ({"max_length": 65}, "a passage of 65 tokens; from 3 to 64")],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(
    exports: Path, tiny_data: Path, tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        encode(exports, tiny_data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_damaged_manifest_is_named(exports: Path, tiny_data: Path, tmp_path: Path) -> None:
    out = encode(exports, tiny_data, tmp_path / "out")
    manifest = out / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(UserError, match="version 2, this program reads 1"):
        Embeddings(out)
    manifest.write_text("{")
    with pytest.raises(UserError, match=r"manifest.json: damaged"):
        Embeddings(out)
    manifest.unlink()
    with pytest.raises(UserError, match="no such file; `erniesearch encode` makes"):
        Embeddings(out)
    with pytest.raises(UserError, match=r"embeddings without manifest.json"):
        encode(exports, tiny_data, out)


@pytest.mark.distributed
def test_torchrun_writes_the_bytes_of_one_process(
    exports: Path, tiny_data: Path, tmp_path: Path
) -> None:
    options = ["--model", str(exports / "dual_encoder"), "--data", str(tiny_data),
               "--shard_size", "13", "--batch_size", "4", "--dtype", "fp32"]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
                "--rdzv_endpoint=localhost:0", str(ROOT / "launch" / "encode.py")]  # fmt: skip
    status, output = run_python(*launcher, *options, "--out", str(tmp_path / "two"))
    assert status == 0, output[-3000:]
    assert "60 passages to vectors of 32 in fp32, 5 shards on 2 ranks; rank 0 has 3" in output
    assert "34/34 passages" in output
    assert main(["encode", *options, "--out", str(tmp_path / "one"), "--local_rank=0"]) == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
