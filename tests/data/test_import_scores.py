"""A teacher's scores come out of every format that carries them as training reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.inputs import OLDER, lines
from support.tiny import write_beir

from erniesearch.cli import main
from erniesearch.config.options import ImportOptions
from erniesearch.data.collection import load_beir
from erniesearch.data.importers.import_data import convert
from erniesearch.data.importers.records import content_id
from erniesearch.data.negatives import read_scored_negatives
from erniesearch.data.sampler import GroupSampler
from erniesearch.errors import UserError

Found = dict[str, dict[str, float]]


def scores_in(folder: Path, split: str = "train") -> Found:
    """What training reads, after it has found the scores whole."""
    data = load_beir(folder, split)
    negatives, scores = read_scored_negatives(folder / "negatives.jsonl", data)
    GroupSampler(data, negatives, 0, 1, seed=0, teacher_scores=scores)
    return scores


def by_text(folder: Path) -> Found:
    """The same, by texts where ids are hashes of them."""
    data = load_beir(folder, "train")
    texts = dict(zip(data.pids, data.passages, strict=True))
    return {
        data.queries[qid]: {texts[pid]: score for pid, score in own.items()}
        for qid, own in scores_in(folder).items()
    }


def imported(name: str, source: Path, out: Path, **options: Any) -> Path:
    convert(name, [source], out, ImportOptions(**options))
    return out


def test_tevatron(tmp_path: Path) -> None:
    source = lines(tmp_path / "train.jsonl", [OLDER])
    out = imported("tevatron", source, tmp_path / "out")
    assert scores_in(out) == {"5": {"a": 3.5, "b": 1.0, "c": -2.25}}


def test_newer_tevatron_and_the_folder_that_an_import_writes(tmp_path: Path) -> None:
    query = {"query_id": "q", "query_text": "who?", "positive_document_ids": ["a", "b"],
             "negative_document_ids": ["c"], "positive_scores": [2, 1.5],
             "negative_scores": [-1e-3]}  # fmt: skip
    lines(tmp_path / "in" / "queries.jsonl", [query])
    lines(tmp_path / "in" / "corpus.jsonl", [{"docid": name, "text": name} for name in "abc"])
    out = imported("tevatron", tmp_path / "in", tmp_path / "out")
    assert scores_in(out) == {"q": {"a": 2.0, "b": 1.5, "c": -1e-3}}
    again = imported("beir", out, tmp_path / "again")
    assert (again / "negatives.jsonl").read_bytes() == (out / "negatives.jsonl").read_bytes()


def test_annotated_tevatron(tmp_path: Path) -> None:
    passages = [{"title": "T", "text": "me"}, {"title": "", "text": "you"}]
    row = {"query_id": "1", "query": "who?", "passages": passages, "scores": [4.0, -3.0]}
    out = imported("tevatron", lines(tmp_path / "train.jsonl", [row]), tmp_path / "out")
    assert by_text(out) == {"who?": {"T me": 4.0, "you": -3.0}}


def test_flagembedding(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [
        {"query": "who?", "pos": ["me", "I"], "neg": ["you", "it"], "pos_scores": [5, 4.5],
         "neg_scores": [-1.0, 0.25]},
        {"query": "who?", "pos": ["me"], "neg": ["they"], "pos_scores": [5.125],
         "neg_scores": [-7]},
        {"query": "what?", "pos": ["it"], "neg": ["me"], "pos_scores": None},
        {"query": "where?", "pos": ["it"], "neg": [], "pos_scores": [1.0]},
    ])  # fmt: skip
    facts = convert("flagembedding", [source], tmp_path / "out", ImportOptions())
    path = tmp_path / "out" / "negatives.jsonl"
    # Scored once more, in another batch: the first score stays.
    assert facts["notes"]["passage scored twice, the first score kept"]["first"] == [f"{source}:2"]
    assert (facts["queries_with_negatives"], facts["queries_with_scores"]) == (2, 1)
    with pytest.raises(UserError, match=r"negatives\.jsonl:2: no positive_scores"):
        read_scored_negatives(path)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert by_text(tmp_path / "out") == {
        "who?": {"me": 5.0, "I": 4.5, "you": -1.0, "it": 0.25, "they": -7.0}
    }
    imported("flagembedding", source, tmp_path / "plain", scores=None)
    assert "scores" not in (tmp_path / "plain" / "negatives.jsonl").read_text()


TRIPLES = [
    {"anchor": "who?", "positive": "me", "negative": "you", "label": 4.5},
    {"anchor": "who?", "positive": "me", "negative": "it", "label": -0.5},
    {"anchor": "what?", "positive": "it", "negative": "you", "label": 1},
]
LISTS: dict[str, tuple[dict[str, Any], dict[str, Any], Found]] = {
    "margins": (
        {"query": "who?", "positive": "me", "negative_1": "you", "negative_2": "it",
         "label": [4.5, -0.5]},
        {}, {"who?": {"me": 0.0, "you": -4.5, "it": 0.5}},
    ),
    "scores": (
        {"query": "who?", "positive": "me", "negative1": "you", "negative2": "it",
         "scores": [9.0, 4.5, 9.5]},
        {}, {"who?": {"me": 9.0, "you": 4.5, "it": 9.5}},
    ),
    "a column by name": (
        {"query": "who?", "positive": "me", "negative": ["you", "it"], "label": [1, 0, 0],
         "teacher": [9.0, 4.5, 9.5]},
        {"scores": "teacher"}, {"who?": {"me": 9.0, "you": 4.5, "it": 9.5}},
    ),
    "labelled list": (
        {"query": "who?", "docs": ["me", "you", "it"], "scores": [9.0, 4.5, 9.5]},
        {"documents": "docs"}, {"who?": {"me": 9.0, "you": 4.5, "it": 9.5}},
    ),
    "ids": (
        {"query": "who?", "qid": "7", "positive": "me", "pid": "p", "negative": "you",
         "labels": [3.0, 2.0]},
        {"query_id": "qid", "positive_id": "pid"}, {"who?": {"me": 3.0, "you": 2.0}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LISTS)
def test_sentence_transformers(case: str, tmp_path: Path) -> None:
    row, options, expected = LISTS[case]
    source = lines(tmp_path / "train.jsonl", [row])
    assert by_text(imported("parquet", source, tmp_path / "out", **options)) == expected


def test_margins_of_triples_join_where_they_have_one_positive(tmp_path: Path) -> None:
    source = lines(tmp_path / "train.jsonl", TRIPLES)
    found = by_text(imported("hf", source, tmp_path / "out", query="anchor"))
    assert found == {"who?": {"me": 0.0, "you": -4.5, "it": 0.5}, "what?": {"it": 0.0, "you": -1.0}}
    lines(source, [*TRIPLES, TRIPLES[0] | {"positive": "I"}])
    with pytest.raises(UserError, match=r"row 4: the margins of query .* another passage .* row 1"):
        imported("hf", source, tmp_path / "other", query="anchor")


def test_pairs_with_a_score_are_pairs(tmp_path: Path) -> None:
    source = lines(tmp_path / "train.jsonl", [{"query": "who?", "positive": "me", "score": 0.5}])
    facts = convert("hf", [source], tmp_path / "out", ImportOptions())
    assert facts["notes"]["'score' of a query without negatives, not kept"]["count"] == 1


def pylate_tables(root: Path, train: list[Any]) -> Path:
    """As files that nothing but their columns tells apart."""
    lines(root / "a.jsonl", train)
    lines(root / "b.jsonl", [{"query_id": f"q{i}", "text": f"query {i}"} for i in range(2)])
    lines(root / "c.jsonl", [{"document_id": f"d{i}", "text": f"text {i}"} for i in range(4)])
    return root


PYLATE = [
    {"query_id": "q0", "document_ids": ["d1", "d0", "d2"], "scores": [0.5, 0.75, -3.0]},
    {"query_id": "q1", "document_ids": ["d3", "d1"], "scores": [2, 1]},
]


@pytest.mark.parametrize("spelt", [False, True])
def test_pylate(spelt: bool, tmp_path: Path) -> None:
    rows = [{k: str(v) if spelt else v for k, v in row.items()} for row in PYLATE]
    root = pylate_tables(tmp_path / "in", rows)
    expected = {"q0": {"d1": 0.5, "d0": 0.75, "d2": -3.0}, "q1": {"d3": 2.0, "d1": 1.0}}
    positives = {"first": {"q0": {"d1": 1}, "q1": {"d3": 1}},
                 "best": {"q0": {"d0": 1}, "q1": {"d3": 1}}}  # fmt: skip
    for relevant, qrels in positives.items():
        out = imported("pylate", root, tmp_path / relevant, relevant=relevant)
        assert scores_in(out) == expected
        assert load_beir(out, "train").qrels == qrels
    note = "the first passage of a list is not that of the highest score"
    assert note in json.loads((tmp_path / "first" / "import.json").read_text())["notes"]


ODD = {
    "no 'neg_scores'": ("flagembedding", {"query": "x", "pos": ["a"], "neg": ["b"],
        "pos_scores": [1]}, ":1: 'pos_scores' without 'neg_scores'"),
    "too few": ("flagembedding", {"query": "x", "pos": ["a"], "neg": ["b", "c"],
        "pos_scores": [1], "neg_scores": [1]}, ":1: 'neg_scores' has 1 scores for 2 passages"),
    "nan": ("flagembedding", {"query": "x", "pos": ["a"], "neg": ["b"], "pos_scores": [1],
        "neg_scores": [float("nan")]}, ":1: 'neg_scores' holds nan, which is no score"),
    "infinite": ("flagembedding", {"query": "x", "pos": ["a"], "neg": ["b"],
        "pos_scores": [float("inf")], "neg_scores": [0]}, ":1: 'pos_scores' holds inf"),
    "text": ("flagembedding", {"query": "x", "pos": ["a"], "neg": ["b"], "pos_scores": ["1"],
        "neg_scores": [0]}, ":1: 'pos_scores' must hold numbers, found str"),
    "no list": ("flagembedding", {"query": "x", "pos": ["a"], "neg": ["b"], "pos_scores": 1,
        "neg_scores": [0]}, ":1: 'pos_scores' must be a list of scores, found int"),
    "some passages": ("tevatron", OLDER | {"negative_passages": [{"docid": "b", "text": "t"}]},
        ":1: 1 of 2 passages have a 'score'"),
    "annotated": ("tevatron", {"query_id": 1, "query": "x", "passages": [{"text": "t"}]},
        ":1: 'scores' must be a list of scores, found NoneType"),
    "beir": ("beir", {"query_id": "q1", "positive_document_ids": ["p1"],
        "negative_document_ids": ["p3", "p5"], "positive_scores": [1.0],
        "negative_scores": [True, 2]}, ":1: 'negative_scores' must hold numbers, found bool"),
    "label": ("parquet", {"query": "x", "positive": "a", "negative": ["b", "c"], "label": 1.0},
        "row 1: 'label' has 1 numbers for 1 positives and 2 negatives"),
    "null label": ("parquet", {"query": "x", "positive": "a", "negative": "b", "label": None},
        "row 1: 'label' must hold numbers, found NoneType"),
    "pylate": ("pylate", {"query_id": "q0", "document_ids": ["d1"], "scores": [1, 2]},
        "row 1: 'scores' has 2 scores for 1 passages"),
    "pylate passage": ("pylate", {"query_id": "q0", "document_ids": ["d9"], "scores": [1]},
        "row 1: passage 'd9' is not in the corpus"),
    "pylate text": ("pylate", {"query_id": "q0", "document_ids": "d1", "scores": [1]},
        "row 1: 'document_ids' must be a list, found the text 'd1'"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_scores_are_named(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a user sees it: one line, exit code 2, nothing written."""
    name, record, problem = ODD[case]
    root, file = tmp_path / "in", "train.jsonl"
    if name == "beir":
        write_beir(root)
        file = "negatives.jsonl"
    if name == "pylate":
        pylate_tables(root, [record])
        file = "a.jsonl"
    else:
        lines(root / file, [record])
    more = ["--relevant", "first"] if name == "pylate" else []
    assert main(["data", "import", name, str(root), "--out", str(tmp_path / "out"), *more]) == 2
    told = capsys.readouterr().err
    assert problem in told
    assert str(root / file) in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_passage_that_no_record_scores_is_named(tmp_path: Path) -> None:
    scored = {"query": "who?", "pos": ["me"], "neg": ["you"], "pos_scores": [1], "neg_scores": [0]}
    source = lines(tmp_path / "a.jsonl", [scored, {"query": "who?", "pos": ["me"], "neg": ["it"]}])
    pid = content_id("it")
    with pytest.raises(UserError, match=rf"a\.jsonl:1: query .* none for its passage '{pid}'"):
        imported("flagembedding", source, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["pylate", "IN"], "do not say which passage is relevant: --relevant first"),
        (["pylate", "IN/b.jsonl", "--relevant", "best"], "b.jsonl: no table of documents"),
        (["pylate", "IN/d.jsonl", "--relevant", "best"], "the columns x are of no table of PyLate"),
        (["tevatron", "IN", "--relevant", "best"], "--relevant: format pylate alone knows it"),
        (["hf", "IN/d.jsonl", "--query", "x", "--positive", "x", "--scores", "teacher"],
         "row 1: no column 'teacher'"),
    ],
)  # fmt: skip
def test_impossible_options_are_named(
    arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = pylate_tables(tmp_path / "in", PYLATE)
    lines(root / "d.jsonl", [{"x": "y"}])
    arguments = [argument.replace("IN", str(root)) for argument in arguments]
    assert main(["data", "import", *arguments, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert problem in told
    assert told.count("\n") == 1
