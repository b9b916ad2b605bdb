"""`erniesearch score`: lists scored by any CrossEncoder of sentence-transformers."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.foreign import write_cross_encoder

from erniesearch.cli import main
from erniesearch.data.collection import load_beir
from erniesearch.data.negatives import read_scored_negatives

NEEDED = "needs sentence-transformers 6 in this environment"


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """The tiny data with a list for every query of train; the first one names no positives."""
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    found = load_beir(root, "train")
    records: list[dict[str, Any]] = []
    for number, (qid, relevant) in enumerate(found.relevant().items()):
        others = [pid for pid in found.pids if pid not in relevant]
        records.append({"query_id": qid, "positive_document_ids": relevant,
                        "negative_document_ids": others[number : number + 4]})  # fmt: skip
    del records[0]["positive_document_ids"]
    (root / "negatives.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return root


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cross_encoder(tmp_path_factory.mktemp("foreign"))


def score(data: Path, teacher: Path, out: Path, *more: str) -> int:
    return main(["score", "--model", str(teacher), "--data", str(data), "--out", str(out), *more])


def by_hand(data: Path, teacher: Path, qid: str, pids: list[str]) -> np.ndarray:
    """Logits, pair by pair, by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    found = load_beir(data, "train")
    texts = dict(zip(found.pids, found.passages, strict=True))
    with torch.inference_mode():
        return np.array([
            model(**tokenizer(found.queries[qid], texts[pid], return_tensors="pt")).logits.item()
            for pid in pids
        ])  # fmt: skip


def test_scores_are_the_models_logits_as_training_reads_them(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    pytest.importorskip("sentence_transformers", reason=NEEDED)
    out = tmp_path / "scored.jsonl"
    assert score(data, teacher, out, "--precision", "fp32") == 0
    negatives, scores = read_scored_negatives(out, load_beir(data, "train"))
    before = [json.loads(x) for x in (data / "negatives.jsonl").read_text().splitlines()]
    assert negatives == {line["query_id"]: line["negative_document_ids"] for line in before}
    qrels = load_beir(data, "train").qrels
    for qid in list(negatives)[:3]:
        assert scores[qid].keys() == {*negatives[qid], *qrels[qid]}
        expected = by_hand(data, teacher, qid, list(scores[qid]))
        np.testing.assert_allclose(list(scores[qid].values()), expected, atol=2e-6)
    # In place, and through the sigmoid that the library would apply by itself.
    lists = data / "negatives.jsonl"
    assert score(data, teacher, lists) == 2
    assert score(data, teacher, lists, "--overwrite", "--activation", "model",
                 "--precision", "fp32") == 0  # fmt: skip
    squashed = read_scored_negatives(lists)[1]
    for qid in list(negatives)[:3]:
        expected = 1 / (1 + np.exp(-np.array(list(scores[qid].values()))))
        np.testing.assert_allclose(list(squashed[qid].values()), expected, atol=2e-6)


def test_in_bf16_the_head_keeps_its_precision(data: Path, teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason=NEEDED)
    found = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        assert score(data, teacher, out, "--precision", precision) == 0
        scores = read_scored_negatives(out)[1].values()
        found[precision] = torch.tensor([value for own in scores for value in own.values()])
    assert not torch.equal(found["bf16"], found["fp32"])
    torch.testing.assert_close(found["bf16"], found["fp32"], atol=0.05, rtol=0.05)
    assert not torch.equal(found["bf16"], found["bf16"].bfloat16().float())


def test_an_interrupted_job_continues(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sentence_transformers", reason=NEEDED)
    from erniesearch.retrieval import score_lists

    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    monkeypatch.setattr(score_lists, "LISTS_PER_BLOCK", 16)
    assert score(data, teacher, whole, "--precision", "fp32") == 0
    calls = []
    real = score_lists.Teacher.scores

    def counted(self: Any, pairs: list[tuple[str, str]]) -> np.ndarray:
        calls.append(len(pairs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, pairs)

    monkeypatch.setattr(score_lists.Teacher, "scores", counted)
    assert score(data, teacher, out, "--precision", "fp32") == 130
    assert not out.exists()
    assert score(data, teacher, out, "--precision", "fp32", "--batch_size", "3") == 0
    assert calls == [16 * 5, 16 * 5, 8 * 5, 8 * 5]  # the two that were done are not done again
    first, second = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (whole, out)
    )
    for one, other in zip(first, second, strict=True):
        for key in ("positive_scores", "negative_scores"):
            np.testing.assert_allclose(other.pop(key), one.pop(key), atol=1e-5)
        assert one == other
    assert not list(tmp_path.glob(".*.parts"))


def test_parts_of_other_scores_are_not_used(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sentence_transformers", reason=NEEDED)
    from erniesearch.retrieval import score_lists

    monkeypatch.setattr(score_lists, "LISTS_PER_BLOCK", 16)
    counts = []
    real = score_lists.Teacher.scores

    def stops(self: Any, pairs: list[tuple[str, str]]) -> np.ndarray:
        counts.append(len(pairs))
        if len(counts) == 2:
            raise KeyboardInterrupt
        return real(self, pairs)

    monkeypatch.setattr(score_lists.Teacher, "scores", stops)
    assert score(data, teacher, tmp_path / "out") == 130
    assert score(data, teacher, tmp_path / "out", "--activation", "model") == 0
    assert len(counts) == 2 + 3
    values = [
        v for own in read_scored_negatives(tmp_path / "out")[1].values() for v in own.values()
    ]
    assert 0 < min(values) < max(values) < 1


BAD_LISTS = {
    "unknown passage": ({"negative_document_ids": ["p0", "zz"]}, ":1: passage 'zz' is not in corp"),
    "unknown positive": (
        {"positive_document_ids": ["zz"], "negative_document_ids": ["p0"]},
        ":1: passage 'zz' is not in corpus.jsonl",
    ),
    "unknown query": ({"query_id": "x", "negative_document_ids": []}, ":1: query 'x' is not in"),
    "no list": ({"negatives": ["p0"]}, ":1: expected query_id and negative_document_ids"),
    "no positives' list": (
        {"negative_document_ids": [], "positive_document_ids": "p0"},
        ":1: positive_document_ids must be a list",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LISTS)
def test_lists_that_cannot_be_scored_are_named(
    case: str, data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, problem = BAD_LISTS[case]
    lists = tmp_path / "lists.jsonl"
    lists.write_text(json.dumps({"query_id": "q0", **record}) + "\n")
    assert score(data, teacher, tmp_path / "out", "--lists", str(lists)) == 2
    told = capsys.readouterr().err
    assert f"{lists}{problem}" in told
    assert told.count("\n") == 1


def test_the_library_that_is_missing_is_named(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert score(data, teacher, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "pip install 'erniesearch[sentence-transformers]'" in told
    assert told.count("\n") == 1


def test_models_that_are_no_teacher_are_named(
    data: Path, teacher: Path, tiny_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("sentence_transformers", reason=NEEDED)
    three = write_cross_encoder(tmp_path / "three", num_labels=3)
    cases = [(three, "gives 3 scores a pair, a teacher gives one"),
             (tmp_path / "nowhere", "nowhere' does not load: ")]  # fmt: skip
    for model, problem in cases:
        assert score(data, model, tmp_path / "out") == 2
        told = capsys.readouterr().err
        assert problem in told
        assert told.count("\n") == 1
    from erniesearch.retrieval import score_lists

    def broken(self: Any, pairs: list[tuple[str, str]]) -> np.ndarray:
        return np.full(len(pairs), np.nan, dtype=np.float32)

    monkeypatch.setattr(score_lists.Teacher, "scores", broken)
    assert score(data, teacher, tmp_path / "out") == 2
    assert "is nan: if it was computed in bf16, try --precision fp32" in capsys.readouterr().err


def test_a_passage_without_text_is_named(
    data: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sentence_transformers", reason=NEEDED)
    lines = (data / "corpus.jsonl").read_text().splitlines()
    lines[3] = json.dumps({"_id": "p3", "title": "", "text": " "})
    (data / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    assert score(data, teacher, tmp_path / "out") == 2
    assert "passage 'p3' of the lists has no text in corpus.jsonl" in capsys.readouterr().err
