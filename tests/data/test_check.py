"""The facts about a data set, against values counted by hand."""

import json
from pathlib import Path

import pytest
from support.tiny import write_beir, write_model

from erniesearch.cli import main
from erniesearch.config.keys import StudentConfig
from erniesearch.data.check import check, percentiles
from erniesearch.errors import UserError
from erniesearch.models.backbone import load_tokenizer


def write_set(root: Path) -> Path:
    """Two of five passages have one text, one is empty; q1 and q3 have one text, in two splits."""
    (root / "qrels").mkdir(parents=True)
    texts = ["baran desel", "fitor", "baran desel", "", "baran " * 70]
    lines = (json.dumps({"_id": f"p{i}", "text": text}) + "\n" for i, text in enumerate(texts))
    (root / "corpus.jsonl").write_text("".join(lines))
    queries = {"q1": "one", "q2": "three", "q3": "one", "q4": "nobody"}
    lines = (json.dumps({"_id": qid, "text": text}) + "\n" for qid, text in queries.items())
    (root / "queries.jsonl").write_text("".join(lines))
    (root / "qrels" / "train.tsv").write_text("q1\tp0\t1\nq1\tp1\t2\nq2\tp1\t0\n")
    (root / "qrels" / "test.tsv").write_text("q3\tp4\t1\n")
    (root / "negatives.jsonl").write_text('{"query_id": "q1", "negative_document_ids": ["p3"]}\n')
    return root


def test_facts_are_counted(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    facts = check(write_set(tmp_path / "data"), True, load_tokenizer(StudentConfig(str(model))))
    assert facts["passages"]["number"] == 5
    assert facts["passages"]["characters"]["most"] == 420
    assert facts["passages"]["empty"] == 1
    assert facts["passages"]["same_text"] == {"number": 1, "first": [["p0", "p2"]]}
    assert facts["passages"]["tokens"]["least"] == 2  # [CLS] [SEP]
    assert facts["passages"]["tokens"]["p50"] == 4
    assert facts["passages"]["tokens"]["most"] == 72
    assert facts["passages"]["truncated"] == {"64": 0.2, "128": 0.0, "256": 0.0, "512": 0.0}
    assert facts["queries"] == {
        "number": 4, "not_judged": 1, "same_text": 1, "characters": percentiles([3, 5, 3, 6]),
    }  # fmt: skip
    train = facts["splits"]["train"]
    assert (train["queries"], train["judgements"], train["without_relevant"]) == (2, 3, 1)
    assert train["relevant_per_query"]["most"] == 2
    assert facts["shared"] == {"test, train": 1}
    assert facts["negatives"] == {"queries": 1, "per_query": percentiles([1])}


def test_percentiles() -> None:
    assert percentiles(range(101)) == {
        "least": 0, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "most": 100,
    }  # fmt: skip


def test_every_split_and_the_negatives_are_read(tmp_path: Path) -> None:
    root = write_beir(tmp_path / "data")
    check(root)
    (root / "negatives.jsonl").write_text('{"query_id": "q1", "negative_document_ids": ["x"]}\n')
    with pytest.raises(UserError, match=r"negatives\.jsonl:1: passage 'x'"):
        check(root)
    (root / "negatives.jsonl").unlink()
    (root / "qrels" / "test.tsv").write_text("q1\tx\t1\n")
    with pytest.raises(UserError, match=r"test\.tsv:1: passage 'x'"):
        check(root)


def test_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_set(tmp_path / "data")
    assert main(["data", "check", str(root)]) == 0
    assert json.loads(capsys.readouterr().out) == check(root)
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "qrels: no SPLIT.tsv" in capsys.readouterr().err
