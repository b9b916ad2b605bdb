"""Late interaction as the first stage of every command: what exhaustive MaxSim gives."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from support.finished_run import retriever_of, write_run
from support.tiny import ALL_TERMS, ConfigMaker

from erniesearch import stages
from erniesearch.cli import main
from erniesearch.config.keys import EvaluationConfig, RunConfig
from erniesearch.config.options import EncodeOptions, IndexOptions
from erniesearch.config.stage_keys import LossWeights
from erniesearch.data.collection import Run, load_beir
from erniesearch.data.negatives import read_negatives
from erniesearch.data.trec import read_trec_run
from erniesearch.errors import UserError
from erniesearch.evaluation.measures import evaluation_subset, per_query_metrics
from erniesearch.export import export_all
from erniesearch.pipeline.run import run_pipeline
from erniesearch.pipeline.steps import _TableMaker
from erniesearch.retrieval.build_index import build_index
from erniesearch.retrieval.encode_collection import encode_collection
from erniesearch.retrieval.load import load_retriever
from erniesearch.retrieval.retriever import Retriever
from erniesearch.retrieval.token_vectors import store_token_index, store_token_vectors
from erniesearch.run_folder import RunFolder
from erniesearch.search.app import create_app
from erniesearch.search.system import SearchSystem

QUERY = "baran desel fitor"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_model: Path) -> Path:
    """Folder with exports/, and late/ and dual/, the indexes of the tiny corpus."""
    root = tmp_path_factory.mktemp("late")
    config = write_run(root / "run", tiny_data, tiny_model, ALL_TERMS)
    export_all(config)
    for name, model in (("late", "late_interaction"), ("dual", "dual_encoder")):
        folder = str(root / "run" / "exports" / model)
        encode_collection(
            EncodeOptions(folder, str(tiny_data), str(root / f"e-{name}"), precision="fp32")
        )
    build_index(IndexOptions(str(root / "e-dual"), str(root / "dual")))
    settings = {"num_centroids": 16, "nprobe": 16}  # all lists, and no loss
    build_index(IndexOptions(str(root / "e-late"), str(root / "late"), **settings))
    return root


def exhaustive(retriever: Retriever, data: Path) -> Run:
    """MaxSim of all pairs by plain products."""
    collection = load_beir(data, "test")
    passages = retriever.tokens(list(collection.passages), "passage")
    queries = retriever.tokens(list(collection.queries.values()), "query")
    return {
        qid: {
            pid: float((query.float() @ passage.float().T).max(1).values.sum())
            for pid, passage in zip(collection.pids, passages, strict=True)
        }
        for qid, query in zip(collection.queries, queries, strict=True)
    }


def test_evaluate_searches_it(root: Path, tiny_data: Path, tmp_path: Path) -> None:
    late = str(root / "run" / "exports" / "late_interaction")
    arguments = ["evaluate", "--data", str(tiny_data), "--precision", "fp32", "--index",
                 str(root / "late"), "--json", str(tmp_path / "j")]  # fmt: skip
    assert main([*arguments, "--model", late, "--run_out", str(tmp_path / "t")]) == 0
    expected = exhaustive(load_retriever(late), tiny_data)
    data = load_beir(tiny_data, "test")
    wanted = {m: v.mean() for m, v in per_query_metrics(expected, data.qrels).items()}
    (row,) = json.loads((tmp_path / "j").read_text())["rows"]
    assert row["name"] == "late_interaction"
    assert {m: e["mean"] for m, e in row["metrics"].items()} == pytest.approx(wanted)
    found = read_trec_run(tmp_path / "t", data.queries, data.index_of)
    for qid, scores in found.items():
        assert len(scores) == 60
        assert scores == pytest.approx(expected[qid], abs=2e-3)
    # And as the first stage of another model.
    cross = str(root / "run" / "exports" / "cross_encoder")
    assert main([*arguments, "--model", cross, "--first_stage", late]) == 0
    first, second = json.loads((tmp_path / "j").read_text())["rows"]
    assert first["metrics"] == row["metrics"]
    assert second["name"] == "cross_encoder, reranking"


def test_mine_searches_it(root: Path, tiny_data: Path, tmp_path: Path) -> None:
    late = root / "run" / "exports" / "late_interaction"
    out = tmp_path / "n.jsonl"
    arguments = ["mine", "--model", str(late), "--index", str(root / "late"), "--data",
                 str(tiny_data), "--depth", "10", "--num_negatives", "5", "--precision", "fp32",
                 "--out", str(out)]  # fmt: skip
    assert main(arguments) == 0
    expected = exhaustive(load_retriever(late), tiny_data)
    data = load_beir(tiny_data, "train")
    text_of = dict(zip(data.pids, data.passages, strict=True))
    for qid, negatives in read_negatives(out).items():
        positives = data.relevant()[qid]
        texts = {text_of[pid] for pid in positives}
        ranked = sorted(expected[qid], key=lambda pid: -expected[qid][pid])
        best = [p for p in ranked if p not in positives and text_of[p] not in texts][:5]
        assert [expected[qid][pid] for pid in negatives] == pytest.approx(
            [expected[qid][pid] for pid in best], abs=2e-3
        )
    facts = json.loads((tmp_path / "mine.json").read_text())
    assert "late_interaction_scores" in facts
    assert "dual_encoder_scores" not in facts


REFUSED = [
    (["evaluate", "--model", "dual_encoder", "--index", "late"], "a dual-encoder does not make"),
    (["evaluate", "--model", "late_interaction", "--index", "dual"], "nothing searches it"),
    (["evaluate", "--model", "cross_encoder", "--index", "late"], "nothing searches it"),
    (["mine", "--model", "dual_encoder", "--index", "late"], "give the model that encoded"),
    (["mine", "--model", "late_interaction", "--index", "dual"], "give the model that encoded"),
    (["mine", "--model", "late_interaction", "--index", "late", "--ef_search", "3"],
     "--ef_search: index folder .* is late interaction's: leave it out"),
    (["mine", "--model", "dual_encoder", "--index", "dual", "--candidates", "9"],
     "--candidates: index folder .* has one vector a text: leave it out"),
    (["index", "--embeddings", "e-late", "--factory", "Flat"], "--factory is for one vector"),
    (["index", "--embeddings", "e-dual", "--bits", "4"], "--bits is for token vectors"),
    (["index", "--embeddings", "e-late", "--bits", "3"], "bits"),
    (["index", "--embeddings", "e-late", "--num_centroids", "0"], "must be 1 or more"),
    (["search", "--run", "run", "x", "--first_stage", "late_interaction"],
     "no late-interaction index; set evaluation.late_interaction_index"),
    (["search", "--run", "run", "x", "--first_stage", "late_interaction", "--rerank",
      "late_interaction"], "it has ranked already"),
    (["serve", "--run", "run", "--first_stage", "bm25"], "first_stage"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "problem"), REFUSED)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], problem: str, root: Path, tiny_data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    models = ("dual_encoder", "late_interaction", "cross_encoder")
    folders = {name: root / "run" / "exports" / name for name in models}
    folders |= {name: root / name for name in ("late", "dual", "e-late", "e-dual", "run")}
    options = list(arguments)
    for position, (name, value) in enumerate(pairwise(arguments), 1):
        if name in ("--model", "--index", "--embeddings", "--run"):
            options[position] = str(folders[value])
    if options[0] in ("evaluate", "mine"):
        options += ["--data", str(tiny_data)]
    if options[0] in ("index", "mine"):
        options += ["--out", str(tmp_path / "out")]
    assert main(options) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    last = told.strip().splitlines()[-1]
    assert re.search(problem, last), told
    assert not (tmp_path / "out").exists()


# --- a finished run -----------------------------------------------------------------------------


def stored(config: RunConfig) -> RunFolder:
    """A run with token vectors and their index."""
    folder = RunFolder(config.run_dir)
    data = Path(config.data.path)
    assert store_token_vectors(retriever_of(config), data, True, folder.token_vectors, 1e9) is None
    store_token_index(folder.token_vectors, folder.token_index)
    return folder


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_model: Path
) -> RunConfig:
    config = write_run(tmp_path_factory.mktemp("run"), tiny_data, tiny_model, ALL_TERMS)
    stored(config)
    return config


def test_a_run_is_searched_by_it(finished: RunConfig, tiny_data: Path) -> None:
    system = SearchSystem.from_run(finished.run_dir, first_stage="late_interaction")
    assert system.models == ("late_interaction", "cross_encoder")
    result = system.search(QUERY, depth=20, cross_encoder_depth=0)
    tokens = system.retriever.tokens([QUERY], "query")[0].float()
    passages = system.retriever.tokens(list(system.data.passages), "passage")
    scores = torch.stack([(tokens @ p.float().T).max(1).values.sum() for p in passages])
    expected = {system.data.pids[i]: float(s) for i, s in enumerate(scores)}
    best = sorted(expected.values(), reverse=True)[:20]
    assert [hit.scores["late_interaction"] for hit in result.hits] == pytest.approx(best, abs=5e-3)
    for hit in result.hits:
        assert hit.scores["late_interaction"] == pytest.approx(expected[hit.pid], abs=5e-3)
        assert hit.scores["dual_encoder"] is None
    assert result.rankings["dual_encoder"] == []
    reranked = system.search(QUERY, depth=5, cross_encoder_depth=5)
    assert {hit.pid for hit in reranked.hits} == {hit.pid for hit in result.hits[:5]}
    assert all(hit.scores["cross_encoder"] is not None for hit in reranked.hits)
    with pytest.raises(UserError, match="late_interaction_depth is 0, but late-interaction is the"):
        system.search(QUERY, late_interaction_depth=0)


def test_the_service_answers_by_it(finished: RunConfig) -> None:
    system = SearchSystem.from_run(finished.run_dir, first_stage="late_interaction")
    client = TestClient(create_app(system), raise_server_exceptions=False)
    health = client.get("/health").json()
    assert health["models"] == ["late_interaction", "cross_encoder"]
    assert health["passages"] == 60
    found = client.post("/search", json={"query": QUERY, "cross_encoder_depth": 0}).json()
    assert [hit["pid"] for hit in found["hits"]] == [
        hit["pid"] for hit in found["rankings"]["late_interaction"]
    ]
    refused = client.post("/search", json={"query": QUERY, "late_interaction_depth": 0})
    assert refused.status_code == 422
    assert "is the first stage" in refused.json()["detail"]


def test_search_command(finished: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["search", "--run", finished.run_dir, QUERY, "--first_stage", "late_interaction"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "late-interaction" in told
    assert "dual-encoder" not in told
    assert main([*command, "--rerank", "cross_encoder"]) == 0
    assert "cross-encoder" in capsys.readouterr().out


def test_the_same_index_is_kept_and_another_replaced(
    tmp_path: Path, tiny_data: Path, tiny_model: Path
) -> None:
    config = write_run(tmp_path, tiny_data, tiny_model, ALL_TERMS)
    folder = stored(config)
    before = (folder.token_index / "index.json").stat().st_mtime_ns
    stored(config)
    assert (folder.token_index / "index.json").stat().st_mtime_ns == before
    manifest = json.loads((folder.token_vectors / "manifest.json").read_text())
    (folder.token_vectors / "manifest.json").write_text(json.dumps(manifest | {"model": "other"}))
    index = store_token_index(folder.token_vectors, folder.token_index)
    assert (folder.token_index / "index.json").stat().st_mtime_ns > before
    assert len(index.pids) == 60


# --- the pipeline's table -----------------------------------------------------------------------


@pytest.mark.parametrize(("distractors", "gib"), [(None, 2.0), (5, 0.0)])
def test_the_table_gets_a_row(
    distractors: int | None, gib: float, tmp_path: Path, tiny_data: Path, tiny_model: Path
) -> None:
    """Over the passages that the other rows search; index and vectors are of the whole corpus, and
    vectors are kept as far as the run allows."""
    config = write_run(tmp_path, tiny_data, tiny_model, ALL_TERMS)
    settings = EvaluationConfig(
        late_interaction_index=True, num_distractors=distractors, token_vectors_gib=gib,
        max_queries=distractors,
    )  # fmt: skip
    config = replace(config, run_dir=str(tmp_path), evaluation=settings)
    held_out = load_beir(tiny_data, "test")
    data = evaluation_subset(held_out, config.evaluation, config.seed)
    table = _TableMaker(config, held_out, data)
    table.add_student("cascade", "dual-encoder, after cascade")
    table.add_rerankers()
    row = next(row for row in table.rows if row.name == "late interaction, end to end")
    run = read_trec_run(table.folder.root / row.run_file, data.queries, held_out.index_of)
    expected = exhaustive(retriever_of(config), tiny_data)
    assert set(run) == set(data.qrels)
    for qid, scores in run.items():
        assert set(scores) <= set(data.pids)
        wanted = {pid: expected[qid][pid] for pid in scores}
        assert scores == pytest.approx(wanted, abs=5e-3)
        best = max(expected[qid][pid] for pid in data.pids)
        assert max(scores.values()) == pytest.approx(best, abs=5e-3)
    assert table.folder.token_vectors.is_dir() == bool(gib)
    assert len(np.load(table.folder.token_index / "offsets.npy")) == 61
    # Without the key the row is gone, and so is the index.
    plain = replace(config, evaluation=replace(config.evaluation, late_interaction_index=False))
    table = _TableMaker(plain, held_out, data)
    table.add_student("cascade", "dual-encoder, after cascade")
    table.add_rerankers()
    assert "late interaction, end to end" not in [row.name for row in table.rows]
    assert not table.folder.token_index.exists()


def test_the_key_changes_no_finished_run(make_config: ConfigMaker) -> None:
    """Its default leaves the fingerprint as it was without the key; set, it makes another one."""
    config = make_config()
    on = make_config(late_interaction_index=True)
    assert stages.fingerprint(config, "evaluate") != stages.fingerprint(on, "evaluate")
    for name in ("cascade", "export", "bm25"):
        assert stages.fingerprint(config, name) == stages.fingerprint(on, name)


def test_the_key_needs_late_interaction(make_config: ConfigMaker) -> None:
    config = make_config(weights=LossWeights(de=1.0), late_interaction_index=True)
    with pytest.raises(UserError, match="late_interaction_index' is True: must be False while no"):
        run_pipeline(config)
