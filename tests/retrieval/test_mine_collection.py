"""`erniesearch mine`: the pipeline's negatives from an index on disk, whoever works on them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.finished_run import finished_run
from support.processes import run_python
from support.tiny import ConfigMaker, write_beir

from erniesearch.cli import main
from erniesearch.config.options import EncodeOptions, IndexOptions, MineOptions
from erniesearch.config.stage_keys import MineConfig
from erniesearch.data.collection import load_beir
from erniesearch.data.negatives import read_negatives
from erniesearch.errors import UserError
from erniesearch.export import export_all
from erniesearch.retrieval import mine_collection
from erniesearch.retrieval.build_index import build_index
from erniesearch.retrieval.encode_collection import encode_collection
from erniesearch.retrieval.load import load_retriever, load_scorer
from erniesearch.retrieval.miner import mine_negatives
from erniesearch.run_folder import RunFolder

SETTINGS = MineConfig(depth=20, num_negatives=6)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def launcher_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("erniesearch.retrieval.miner.QUERIES_PER_BLOCK", 7)


@pytest.fixture
def root(make_config: ConfigMaker, tiny_data: Path) -> Path:
    """Folder with exports/, and index/ of the tiny corpus."""
    config = finished_run(make_config, pooling="mean", normalize=True)
    export_all(config)
    root = RunFolder(config.run_dir).root
    model = str(root / "exports" / "dual_encoder")
    options = {"dtype": "fp32", "precision": "fp32"}
    encode_collection(EncodeOptions(model, str(tiny_data), str(root / "e"), **options))
    build_index(IndexOptions(str(root / "e"), str(root / "index"), shards=2))
    return root


def mine(root: Path, data: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    options = {
        "teacher": str(root / "exports" / "cross_encoder"), "settings": SETTINGS,
        "precision": "fp32",
    } | options  # fmt: skip
    settings = options.pop("settings")
    paths = (str(root / "exports" / "dual_encoder"), str(root / "index"), str(data), str(out))
    mine_collection.mine_collection(MineOptions(*paths, **options), settings)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_negatives_are_the_pipelines(root: Path, tiny_data: Path, tmp_path: Path) -> None:
    lines = mine(root, tiny_data, tmp_path / "n.jsonl")
    data = load_beir(tiny_data, "train")
    expected = mine_negatives(
        data, load_retriever(root / "exports" / "dual_encoder", device=CPU),
        load_scorer(root / "exports" / "cross_encoder", device=CPU), SETTINGS, 42,
    )  # fmt: skip
    assert read_negatives(tmp_path / "n.jsonl") == expected.negatives
    assert [line["query_id"] for line in lines] == list(data.relevant())
    assert set(lines[0]) == {"query_id", "positive_document_ids", "negative_document_ids"}
    facts = json.loads((tmp_path / "mine.json").read_text())
    assert facts["candidates"] == expected.num_candidates
    assert facts["dropped_by_teacher"] == expected.num_denoised > 0
    assert {path.name for path in tmp_path.iterdir()} >= {"n.jsonl", "mine.json"}
    assert not list(tmp_path.glob(".n.jsonl*"))


def test_scores_of_the_teacher_are_written(root: Path, tiny_data: Path, tmp_path: Path) -> None:
    lines = mine(root, tiny_data, tmp_path / "n.jsonl", write_scores=True)
    data = load_beir(tiny_data, "train")
    scorer = load_scorer(root / "exports" / "cross_encoder", device=CPU)
    for line in lines[:5]:
        for kind in ("positive", "negative"):
            pids = line[f"{kind}_document_ids"]
            texts = [data.passages[data.index_of[pid]] for pid in pids]
            scores = scorer.scores([data.queries[line["query_id"]]] * len(pids), texts)
            assert line[f"{kind}_scores"] == pytest.approx(scores.tolist(), abs=1e-5)


def test_an_interrupted_mining_continues(
    root: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine(root, tiny_data, tmp_path / "whole.jsonl")
    statistics = (tmp_path / "mine.json").read_bytes()
    done: list[int] = []
    found = mine_collection.Miner.mine

    def interrupted(self: Any, qids: list[str]) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(qids))
        return found(self, qids)

    monkeypatch.setattr(mine_collection.Miner, "mine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mine(root, tiny_data, tmp_path / "again.jsonl")
    assert not (tmp_path / "again.jsonl").exists()
    counted: list[int] = []

    def counting(self: Any, qids: list[str]) -> Any:
        counted.append(len(qids))
        return found(self, qids)

    monkeypatch.setattr(mine_collection.Miner, "mine", counting)
    mine(root, tiny_data, tmp_path / "again.jsonl")
    assert sum(done) + sum(counted) == len(load_beir(tiny_data, "train").relevant())
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "mine.json").read_bytes() == statistics


def test_parts_of_another_mining_are_not_used(root: Path, tiny_data: Path, tmp_path: Path) -> None:
    parts = tmp_path / ".n.jsonl.parts"
    parts.mkdir()
    (parts / "started.json").write_text("{}")
    (parts / "block-00000.jsonl").write_text("not ours\n")
    mine(root, tiny_data, tmp_path / "n.jsonl")
    mine(root, tiny_data, tmp_path / "m.jsonl")
    assert (tmp_path / "n.jsonl").read_bytes() == (tmp_path / "m.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"teacher": None, "write_scores": True}, "need the scores of a --teacher"),
     ({"teacher": None, "settings": MineConfig(denoise_threshold=1.0)}, "need the scores"),
     ({"teacher": None, "settings": MineConfig(denoise_relative_margin=0.1)},
      "--denoise_relative_margin need the scores of a --teacher"),
     ({"teacher": None, "settings": MineConfig(selection="spread")}, "goes by the scores"),
     ({"split": "valid"}, "splits here: dev, test, train"),
     ({"nprobe": 4}, "the index is no IVF index")],
)  # fmt: skip
def test_mistakes_are_named_and_nothing_is_left(
    root: Path, tiny_data: Path, tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=problem):
        mine(root, tiny_data, out / "n.jsonl", **options)
    assert not out.exists()


def test_index_of_another_corpus_is_refused(root: Path, tmp_path: Path) -> None:
    other = write_beir(tmp_path / "other", num_passages=20, num_queries=10)
    with pytest.raises(UserError, match=r"passage 'p\d+' of the index is not in the collection"):
        mine(root, other, tmp_path / "n.jsonl")


def test_existing_output_is_kept(root: Path, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "n.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="is there already"):
        mine(root, tiny_data, tmp_path / "n.jsonl")


def test_a_model_that_did_not_make_the_index_is_told(
    root: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine(root, tiny_data, tmp_path / "same.jsonl")
    assert "whose files differ" not in capsys.readouterr().err
    (root / "exports" / "dual_encoder" / "added.json").write_text("{}")
    mine(root, tiny_data, tmp_path / "other.jsonl")
    assert "whose files differ from those of --model" in capsys.readouterr().err


@pytest.mark.distributed
def test_ranks_write_the_file_of_one(root: Path, tiny_data: Path, tmp_path: Path) -> None:
    options = ["mine", "--model", str(root / "exports" / "dual_encoder"), "--index",
               str(root / "index"), "--data", str(tiny_data), "--depth", "20", "--teacher",
               str(root / "exports" / "cross_encoder"), "--out"]  # fmt: skip
    worker = tmp_path / "worker.py"  # blocks of seven queries, as in this process
    worker.write_text(
        "import sys, erniesearch.retrieval.miner as mine\nfrom erniesearch.cli import main\n"
        "mine.QUERIES_PER_BLOCK = 7\nsys.exit(main(sys.argv[1:]))\n"
    )
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=3", "--rdzv_backend=c10d",
                "--rdzv_endpoint=localhost:0", str(worker)]  # fmt: skip
    status, output = run_python(*launcher, *options, str(tmp_path / "three.jsonl"))
    assert status == 0, output[-3000:]
    assert "mined for 40 queries" in output
    statistics = (tmp_path / "mine.json").read_bytes()
    assert main([*options, str(tmp_path / "one.jsonl")]) == 0
    assert (tmp_path / "three.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert (tmp_path / "mine.json").read_bytes() == statistics
