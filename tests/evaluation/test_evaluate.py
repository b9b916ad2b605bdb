"""``erniesearch evaluate``: every kind of system in one table, each figure against its parts."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.finished_run import finished_run
from support.tiny import ConfigMaker, write_beir

from erniesearch.cli import main
from erniesearch.data.collection import load_beir
from erniesearch.data.trec import read_trec_run, write_trec_run
from erniesearch.evaluation.macro import macro_estimate
from erniesearch.evaluation.measures import bm25_run, estimate, per_query_metrics
from erniesearch.export import export_all
from erniesearch.retrieval import ranking
from erniesearch.retrieval.load import load_retriever, load_scorer
from erniesearch.retrieval.retriever import Retriever
from erniesearch.retrieval.vector_index import VectorIndex
from erniesearch.run_folder import RunFolder


@pytest.fixture
def exports(make_config: ConfigMaker, tmp_path: Path) -> Path:
    """The exports of a finished run over the tiny data."""
    config = finished_run(make_config, pooling="mean")
    export_all(config)
    return Path(config.run_dir) / "exports"


def run(data: Path, *arguments: str, out: Path) -> dict[str, Any]:
    """The JSON of a run that must succeed."""
    fixed = ("--precision", "fp32", "--json", str(out / "out.json"))
    status = main(["evaluate", "--data", str(data), *arguments, *fixed])
    assert status == 0
    content: dict[str, Any] = json.loads((out / "out.json").read_text())
    return content


def figures(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {row["name"]: {name: estimate["mean"] for name, estimate in row["metrics"].items()}
            for row in result["rows"]}  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], data: Path, *arguments: str) -> str:
    capsys.readouterr()
    status = main(["evaluate", "--data", str(data), *arguments])
    error = capsys.readouterr().err
    assert status == 2, error
    assert error.count("\n") == 1, error
    return error


def test_dual_encoder_searches_exhaustively(
    exports: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dual.trec"
    result = run(tiny_data, "--model", str(exports / "dual_encoder"), "--run_out", str(file),
                 out=tmp_path)  # fmt: skip
    data = load_beir(tiny_data, "test")
    retriever = load_retriever(exports / "dual_encoder")
    scores = retriever.vectors(list(data.queries.values()), "query") @ (
        retriever.vectors(data.passages, "passage").T
    )
    expected = {qid: {pid: float(s) for pid, s in zip(data.pids, row, strict=True)}
                for qid, row in zip(data.queries, scores, strict=True)}  # fmt: skip
    wanted = {m: v.mean() for m, v in per_query_metrics(expected, data.qrels).items()}
    assert figures(result)["dual_encoder"] == pytest.approx(wanted)
    written = read_trec_run(file, data.queries, data.index_of)
    assert {qid: len(found) for qid, found in written.items()} == dict.fromkeys(data.queries, 60)
    again = run(tiny_data, "--trec", str(file), out=tmp_path)
    assert figures(again)["dual"] == pytest.approx(wanted)
    assert again["rows"][0]["metrics"] == result["rows"][0]["metrics"]  # intervals too
    shown = capsys.readouterr().out
    assert "means over all 40 queries of the qrels" in shown
    assert f"{wanted['MRR@10']:.3f}" in shown


def test_rerankers_rerank_the_first_stage(exports: Path, tiny_data: Path, tmp_path: Path) -> None:
    late, cross = str(exports / "late_interaction"), str(exports / "cross_encoder")
    result = run(
        tiny_data, "--model", late, "--rerankers", cross, "--depth", "30", "--rerank_depth", "7",
        "--bm25_stemmer", "null", "--metrics", "MRR@10,nDCG@10,R@10", out=tmp_path,
    )  # fmt: skip
    data = load_beir(tiny_data, "test")
    base = bm25_run(data, 30, None)
    runs = {
        "BM25": base,
        "late_interaction, reranking": ranking.rerank_late_interaction(
            load_retriever(late), data, base, 7
        ),
        "cross_encoder, reranking": ranking.rerank_cross_encoder(load_scorer(cross), data, base, 7),
    }
    assert list(figures(result)) == list(runs)
    for name, of_run in runs.items():
        wanted = {m: v.mean() for m, v in per_query_metrics(of_run, data.qrels).items()}
        wanted.pop("R@100")
        assert figures(result)[name] == pytest.approx(wanted)
    assert len({tuple(row.values()) for row in figures(result).values()}) == 3
    assert list(result["comparisons"]) == list(runs)[1:]


def test_blocks_of_queries_change_nothing(
    exports: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--model", str(exports / "late_interaction"))
    whole = run(tiny_data, *arguments, out=tmp_path)
    monkeypatch.setattr("erniesearch.evaluation.systems.BLOCK", 7)
    assert figures(run(tiny_data, *arguments, out=tmp_path)) == figures(whole)
    dual = ("--model", str(exports / "dual_encoder"))
    whole = run(tiny_data, *dual, out=tmp_path)
    monkeypatch.setattr("erniesearch.evaluation.systems.PASSAGE_BLOCK", 13)  # 60 passages: 5 blocks
    assert figures(run(tiny_data, *dual, out=tmp_path)) == figures(whole)


def test_an_index_is_searched_instead_of_encoding(
    exports: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = load_beir(tiny_data, "test")
    dual = ("--model", str(exports / "dual_encoder"))
    encoded = run(tiny_data, *dual, out=tmp_path)
    vectors = load_retriever(exports / "dual_encoder").vectors(data.passages, "passage")
    VectorIndex.build(vectors, list(data.pids)).save(tmp_path / "index")
    sides: list[str] = []
    original = Retriever.vectors

    def vectors_of(self: Retriever, texts: list[str], side: Any) -> np.ndarray:
        sides.append(side)
        return original(self, texts, side)

    monkeypatch.setattr(Retriever, "vectors", vectors_of)
    searched = run(tiny_data, *dual, "--index", str(tmp_path / "index"), out=tmp_path)
    assert figures(searched) == figures(encoded)
    assert sides == ["query"]
    VectorIndex.build(vectors[:9], list(data.pids)[:9]).save(tmp_path / "part")
    error = refused(capsys, tiny_data, *dual, "--index", str(tmp_path / "part"))
    assert "9 passages, but the corpus has 60" in error
    VectorIndex.build(vectors, [f"x{i}" for i in range(60)]).save(tmp_path / "other")
    error = refused(capsys, tiny_data, *dual, "--index", str(tmp_path / "other"))
    assert "is not in corpus.jsonl: give an index of this corpus" in error
    assert "no such folder" in refused(capsys, tiny_data, *dual, "--index", str(tmp_path / "none"))


def test_first_stage_is_a_run_or_a_dual_encoder(
    exports: Path, tiny_data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "first.trec"
    dual, cross = str(exports / "dual_encoder"), str(exports / "cross_encoder")
    alone = run(tiny_data, "--model", dual, "--rerankers", cross, "--depth", "20",
                "--metrics", "MRR@10", out=tmp_path)  # fmt: skip
    run(tiny_data, "--model", dual, "--depth", "20", "--metrics", "MRR@10",
        "--run_out", str(file), out=tmp_path)  # fmt: skip
    for source in (dual, str(file)):
        result = run(tiny_data, "--model", cross, "--first_stage", source, "--depth", "20",
                     "--metrics", "MRR@10", out=tmp_path)  # fmt: skip
        assert list(figures(result)) == [source, "cross_encoder, reranking"]
        name = "cross_encoder, reranking"
        assert figures(result)[name] == pytest.approx(figures(alone)[name])


def test_a_stage_student_is_two_kinds(
    make_config: ConfigMaker, tiny_data: Path, tmp_path: Path
) -> None:
    from erniesearch.config.yaml_file import to_yaml

    config = finished_run(make_config)
    folder = RunFolder(config.run_dir)
    (folder.root / "config.yaml").write_text(to_yaml(config))
    model = str(folder.model("cascade", "student"))
    assert list(figures(run(tiny_data, "--model", model, out=tmp_path))) == ["student"]
    result = run(tiny_data, "--model", model, "--kind", "late_interaction", out=tmp_path)
    assert list(figures(result)) == ["BM25", "student, reranking"]


def test_runs_are_tested_against_the_first(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load_beir(tiny_data, "test")
    rng = np.random.default_rng(0)
    good = {qid: {pid: float(pid in data.qrels[qid]) + float(noise)
                  for pid, noise in zip(data.pids, rng.random(60) * 1.2, strict=True)}
            for qid in data.queries}  # fmt: skip
    poor = {qid: {pid: float(noise) for pid, noise in zip(data.pids, rng.random(60), strict=True)}
            for qid in list(data.queries)[:30]}  # fmt: skip
    for name, scores in (("good", good), ("poor", poor)):
        write_trec_run(tmp_path / f"{name}.trec", scores, name)
    files = [str(tmp_path / "good.trec"), str(tmp_path / "poor.trec")]
    result = run(tiny_data, "--trec", *files, out=tmp_path)
    found = result["comparisons"]["poor"]["MRR@10"]
    means = figures(result)
    assert found["num_queries"] == 40
    assert found["difference"] == pytest.approx(means["poor"]["MRR@10"] - means["good"]["MRR@10"])
    assert 0 < found["p_t_test"] < 0.01
    assert 0 < found["p_randomisation"] < 0.01
    out = capsys.readouterr().out
    assert "Difference to good" in out
    assert "n = 40 queries" in out
    paired = run(tiny_data, "--trec", files[0], "--trec", files[1], "--mean", "run", out=tmp_path)
    assert (paired["num_queries"], paired["num_judged"]) == (30, 40)
    assert figures(paired)["poor"]["MRR@10"] == pytest.approx(means["poor"]["MRR@10"] * 40 / 30)
    assert "means over the 30 of 40 queries" in capsys.readouterr().out


def test_answer_recall_reads_titles_off(tmp_path: Path) -> None:
    root = write_beir(tmp_path / "nq")
    lines = [json.loads(x) for x in (root / "corpus.jsonl").read_text().splitlines()]
    by_id = {line["_id"]: line["text"] for line in lines}
    (root / "corpus.jsonl").write_text(
        "".join(json.dumps(line | {"title": "Zanzibar"}) + "\n" for line in lines)
    )
    qrels = load_beir(root, "test").qrels
    queries = [json.loads(x) for x in (root / "queries.jsonl").read_text().splitlines()]
    for i, query in enumerate(queries):
        positive = by_id[next(iter(qrels[query["_id"]]))]
        query["metadata"] = {"answers": [positive.upper() if i % 2 else "Zanzibar"]}
    (root / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    oracle = {qid: {pid: 1.0 for pid in grades} for qid, grades in qrels.items()}
    write_trec_run(tmp_path / "oracle.trec", oracle, "oracle")
    result = run(root, "--trec", str(tmp_path / "oracle.trec"), "--metrics", "A@1,answer@20,R@1",
                 out=tmp_path)  # fmt: skip
    assert figures(result)["oracle"] == {"A@1": 0.5, "A@20": 0.5, "R@1": 1.0}


def test_mistakes_are_told_before_models_load(
    exports: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("erniesearch.evaluation.systems.load_retriever", never)
    monkeypatch.setattr("erniesearch.evaluation.systems.load_scorer", never)
    dual, cross = str(exports / "dual_encoder"), str(exports / "cross_encoder")
    file = tmp_path / "odd.trec"
    file.write_text("q0 Q0 p0 1 nan x\n")
    strange = tmp_path / "strange.trec"
    strange.write_text("else Q0 p0 1 1 x\n")
    cases = {
        (): "give --model EXPORT or --trec FILE",
        ("--model", str(tmp_path / "none")): "no such folder",
        ("--model", dual, "--kind", "cross_encoder"): "--kind cross_encoder",
        ("--model", dual, "--kind", "dual"): "one of dual_encoder",
        ("--model", dual, "--rerankers", dual): "given twice",
        ("--model", cross, "--rerankers", dual): "a dual-encoder does not rerank",
        ("--rerankers", cross): "give that too",
        ("--model", dual, "--metrics", "R@1000"): "give --depth 1000 or more",
        ("--model", dual, "--metrics", "A@10"): "has no metadata.answers",
        ("--model", dual, "--split", "tests"): "splits here: dev, test, train",
        ("--model", dual, "--depth", "0"): "--depth 0: must be 1 or more",
        ("--model", dual, "--mean", "all"): "one of qrels, run",
        ("--model", dual, "--json", str(tmp_path)): "a folder; give a file",
        ("--model", dual, "--json", str(file / "out.json")): "cannot be written: File exists",
        ("--model", cross, "--first_stage", "bm52"): "bm25, a run file or a dual-encoder",
        ("--model", cross, "--first_stage", str(exports / "late_interaction")): "no dual-encoder",
        ("--model", dual, "--trec", str(file)): f"{file}:1: score nan is not finite",
        ("--model", dual, "--trec", str(strange)): "none of its queries (the first is 'else')",
    }
    for arguments, problem in cases.items():
        assert problem in refused(capsys, tiny_data, *arguments), arguments


def test_former_options_say_what_they_are_called_now(
    tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--run is --trec here" in refused(capsys, tiny_data, "--run", "x.trec")
    assert "--rerank is --rerankers here" in refused(capsys, tiny_data, "--rerank=x")


def test_several_sets_have_a_macro_average(
    exports: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sets of 40 and 15 queries: each counts the same, and not each query."""
    other = write_beir(tmp_path / "other", num_queries=15, seed=3)
    model = ("--model", str(exports / "cross_encoder"), "--bm25_stemmer", "null")
    alone = [run(root, *model, out=tmp_path) for root in (tiny_data, other)]
    capsys.readouterr()
    both = run(tiny_data, str(other), *model, out=tmp_path)
    assert [found["dataset"] for found in both["datasets"]] == [tiny_data.name, "other"]
    for found, single in zip(both["datasets"], alone, strict=True):
        assert found["rows"] == single["rows"]
        assert found["comparisons"] == single["comparisons"]
    for position, row in enumerate(both["macro_average"]):
        assert row["name"] == alone[0]["rows"][position]["name"]
        for metric, average in row["metrics"].items():
            parts = [single["rows"][position]["metrics"][metric] for single in alone]
            assert average["mean"] == pytest.approx(np.mean([part["mean"] for part in parts]))
            assert average["low"] <= average["mean"] <= average["high"]
            widths = [part["high"] - part["low"] for part in parts]
            assert average["high"] - average["low"] <= max(widths)
    shown = capsys.readouterr().out
    mean = both["macro_average"][1]["metrics"]["MRR@10"]["mean"]
    found = [line.split()[:3] for line in shown.splitlines()]
    assert found.count(["macro", "average", f"{mean:.3f}"]) == 1
    assert "over 2 sets" in shown
    again = run(tiny_data, "--data", str(other), *model, out=tmp_path)
    assert again["macro_average"] == both["macro_average"]


def test_a_macro_interval_resamples_queries_within_their_sets() -> None:
    rng = np.random.default_rng(0)
    sets = [rng.random(50), rng.random(400) + 1]
    assert macro_estimate(sets[:1], 3) == estimate(sets[0], 3)
    found = macro_estimate(sets, 3)
    assert found.mean == pytest.approx((sets[0].mean() + sets[1].mean()) / 2)
    error = np.sqrt(sum(values.var() / len(values) for values in sets)) / 2
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_what_belongs_to_one_set_is_refused_for_several(
    exports: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "some.trec"
    file.write_text("q0 Q0 p0 1 1 x\n")
    dual = ("--model", str(exports / "dual_encoder"))
    several = (str(tmp_path / "other"),)
    for arguments, option in (
        (("--trec", str(file)), "--trec"), ((*dual, "--index", "x"), "--index"),
        ((*dual, "--run_out", str(file)), "--run_out"),
        (("--model", str(exports / "cross_encoder"), "--first_stage", str(file)), "--first_stage"),
    ):  # fmt: skip
        error = refused(capsys, tiny_data, *several, *arguments)
        assert f"{option} belongs to one data set" in error
    assert "given twice" in refused(capsys, tiny_data, str(tiny_data), *dual)
    assert "other: no such folder" in refused(capsys, tiny_data, *several, *dual)
    assert main(["evaluate", *dual]) == 2
    assert "no data set: give --data DIR" in capsys.readouterr().err


def test_untied_exports_are_evaluated_as_one(
    make_config: ConfigMaker, tiny_data: Path, tmp_path: Path
) -> None:
    config = finished_run(make_config, tied=False)
    export_all(config)
    exports = Path(config.run_dir) / "exports"
    result = run(tiny_data, "--model", str(exports / "dual_encoder"), out=tmp_path)
    same = tmp_path / "same"
    shutil.copytree(exports / "dual_encoder_query", same)
    other = run(tiny_data, "--model", str(same), out=tmp_path)
    assert figures(result)["dual_encoder"] != figures(other)["same"]
    assert torch.isfinite(torch.tensor(list(figures(result)["dual_encoder"].values()))).all()
