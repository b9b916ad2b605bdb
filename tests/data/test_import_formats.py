"""Every format becomes a BEIR folder that loads; an odd line is named and nothing stays behind."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.inputs import OLDER, lines, msmarco
from support.tiny import write_beir

from erniesearch.config.options import ImportOptions
from erniesearch.data.collection import load_beir
from erniesearch.data.importers.import_data import convert
from erniesearch.data.importers.records import content_id
from erniesearch.data.negatives import read_negatives
from erniesearch.errors import UserError


def titled(data: Any) -> dict[str, str]:
    return dict(zip(data.pids, data.passages, strict=True))


def test_msmarco(tmp_path: Path) -> None:
    facts = convert("msmarco", msmarco(tmp_path / "in"), tmp_path / "out", ImportOptions())
    data = load_beir(tmp_path / "out", "train")
    assert titled(data) == {"7": "the cat", "8": "the dog", "9": 'a "quoted" one', "10": "no é"}
    assert data.queries == {"1": "who meows", "2": "who barks", "3": "who quotes"}
    assert data.qrels == {"1": {"7": 1}, "2": {"8": 1}}
    assert load_beir(tmp_path / "out", "dev.small").qrels == {"3": {"9": 1}}
    assert read_negatives(tmp_path / "out" / "negatives.jsonl", data) == {
        "1": ["8", "10"], "2": ["9"],
    }  # fmt: skip
    assert facts["notes"]["file of no known name, not read"]["count"] == 1
    assert json.loads((tmp_path / "out" / "import.json").read_text()) == facts


def test_msmarco_titles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = msmarco(tmp_path / "in")
    convert("msmarco", sources, tmp_path / "out", ImportOptions(titles=True))
    data = load_beir(tmp_path / "out", "train")
    assert titled(data) == {
        "7": "Cat the cat", "8": "the dog", "9": 'a "quoted" one', "10": "Ten no é",
    }  # fmt: skip
    # Read along in a window: titles in the collection's order pass, in another they are named.
    monkeypatch.setattr("erniesearch.data.importers.msmarco.WINDOW", 2)
    convert("msmarco", sources, tmp_path / "again", ImportOptions(titles=True))
    assert titled(load_beir(tmp_path / "again", "train")) == titled(data)
    lines(tmp_path / "in" / "para.title.txt", ["99\tx", "98\ty", "97\tz"])
    with pytest.raises(UserError, match=r"para\.title\.txt:3: this title is out of .* order"):
        convert("msmarco", sources, tmp_path / "other", ImportOptions(titles=True))


DPR = [
    {"question": "who?", "answers": ["me", "I"],
     "positive_ctxs": [{"title": "T", "text": "me it is", "passage_id": "11"}],
     "negative_ctxs": [{"title": "", "text": "noise", "psg_id": 12}],
     "hard_negative_ctxs": [{"title": "H", "text": "nearly", "passage_id": "13"}]},
    {"question": "what?", "answers": [], "score": 1.5,
     "positive_ctxs": [{"title": "T", "text": "me it is", "passage_id": "11"}]},
]  # fmt: skip


def test_dpr_contexts_are_the_corpus(tmp_path: Path) -> None:
    source = tmp_path / "biencoder-nq-dev.json"
    source.write_text(json.dumps(DPR, indent=1))
    convert("dpr", [source], tmp_path / "out", ImportOptions())
    data = load_beir(tmp_path / "out", "dev")
    assert titled(data) == {"11": "T me it is", "13": "H nearly", "12": "noise"}
    assert data.queries == {"dev-1": "who?", "dev-2": "what?"}
    assert data.qrels == {"dev-1": {"11": 1}, "dev-2": {"11": 1}}
    assert read_negatives(tmp_path / "out" / "negatives.jsonl") == {"dev-1": ["13", "12"]}
    first = json.loads((tmp_path / "out" / "queries.jsonl").read_text().splitlines()[0])
    assert first["metadata"] == {"answers": ["me", "I"]}


def test_dpr_with_wikipedia(tmp_path: Path) -> None:
    packed = tmp_path / "nq-train.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(DPR).encode()))
    with (tmp_path / "psgs.tsv").open("w", newline="") as file:
        rows = [["id", "text", "title"], ["11", 'me "it" is', "T"], ["12", "two\nlines", "N"],
                ["13", "nearly", "H"], ["14", "unused", "U"]]  # fmt: skip
        csv.writer(file, delimiter="\t").writerows(rows)
    sources = [packed, tmp_path / "psgs.tsv"]
    convert("nq", sources, tmp_path / "out", ImportOptions())
    data = load_beir(tmp_path / "out", "train")
    assert titled(data)["11"] == 'T me "it" is'  # the table's text counts
    assert titled(data)["12"] == "N two\nlines"
    assert len(data.pids) == 4
    (tmp_path / "psgs.tsv").write_text("id\ttext\ttitle\n11\tx\ty\n13\tx\ty\n")
    with pytest.raises(UserError, match=r"nq-train\.json\.gz: item 1: passage '12' is not in"):
        convert("dpr", sources, tmp_path / "other", ImportOptions())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (json.dumps(DPR)[:-40], "not valid JSON after item 1"),
        ("{}", "expected a JSON list"),
        ("[]", "expected a JSON list"),
        ('[{"question": "q", "positive_ctxs": [{"txt": "x"}]}]', "item 1: no key 'text'"),
        ('[{"question": 1.5}]', "item 1: 'question' must be text, found Decimal"),
        ('["q"]', "item 1: expected a JSON object, found str"),
        ("\xff", "not valid JSON after item 0"),
    ],
)
def test_odd_dpr_list_is_named(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as error:
        convert("dpr", [tmp_path / "train.json"], tmp_path / "out", ImportOptions())
    assert problem in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "train.json"))


def test_older_tevatron(tmp_path: Path) -> None:
    source = lines(tmp_path / "train.jsonl", [OLDER, OLDER | {"query_id": 6, "query": "and?"}])
    facts = convert("tevatron", [source], tmp_path / "out", ImportOptions())
    data = load_beir(tmp_path / "out", "train")
    assert titled(data) == {"a": "T me", "b": "you", "c": "it"}
    assert data.qrels == {"5": {"a": 1}, "6": {"a": 1}}
    assert read_negatives(tmp_path / "out" / "negatives.jsonl", data) == {
        "5": ["b", "c"], "6": ["b", "c"],
    }  # fmt: skip
    assert facts["queries_with_scores"] == 2
    assert facts["notes"]["passage that came before"]["count"] == 3


def test_newer_tevatron(tmp_path: Path) -> None:
    query = {"query_id": "q", "query_text": "who?", "positive_document_ids": ["a", "b"],
             "negative_document_ids": ["c"]}  # fmt: skip
    lines(tmp_path / "in" / "a-queries.jsonl", [query])
    corpus = [{"docid": "a", "title": None, "text": "me"}, {"docid": "b", "text": "you"},
              {"docid": "c", "title": "C", "text": "it"}]  # fmt: skip
    lines(tmp_path / "in" / "corpus.jsonl", corpus)
    convert("tevatron", [tmp_path / "in"], tmp_path / "out", ImportOptions(split="dev"))
    data = load_beir(tmp_path / "out", "dev")
    assert titled(data) == {"a": "me", "b": "you", "c": "C it"}
    assert data.qrels == {"q": {"a": 1, "b": 1}}
    assert read_negatives(tmp_path / "out" / "negatives.jsonl", data) == {"q": ["c"]}


def test_flagembedding(tmp_path: Path) -> None:
    source = lines(tmp_path / "minedHN.jsonl", [
        {"query": "who?", "pos": ["me"], "neg": ["you", "it", "me", "you"], "prompt": "p"},
        {"query": "what?", "pos": ["it"], "neg": [], "pos_scores": [1.0]},
        {"query": "who?", "pos": ["me", "myself"], "neg": ["they"]},
    ])  # fmt: skip
    convert("flagembedding", [source], tmp_path / "out", ImportOptions())
    data = load_beir(tmp_path / "out", "train")
    who, what = content_id("who?"), content_id("what?")
    assert sorted(data.passages) == ["it", "me", "myself", "they", "you"]
    assert data.queries == {who: "who?", what: "what?"}
    assert data.qrels == {who: {content_id("me"): 1, content_id("myself"): 1},
                          what: {content_id("it"): 1}}  # fmt: skip
    # No positive among the negatives, and none twice.
    assert read_negatives(tmp_path / "out" / "negatives.jsonl", data) == {
        who: [content_id("you"), content_id("it"), content_id("they")]
    }


def test_dureader(tmp_path: Path) -> None:
    answers = [{"paragraph_id": "a1", "paragraph_text": "北京"}]
    lines(tmp_path / "in" / "train.json", [
        {"question": "首都？", "question_id": "q1", "answer_paragraphs": answers}
    ])  # fmt: skip
    lines(tmp_path / "in" / "dev.json", [
        {"question": "哪里？", "question_id": "q2", "answer_paragraphs": answers}
    ])  # fmt: skip
    lines(tmp_path / "in" / "passages.json", [*answers, {"paragraph_id": 7, "paragraph_text": "x"}])
    convert("dureader", [tmp_path / "in"], tmp_path / "out", ImportOptions())
    data = load_beir(tmp_path / "out", "train")
    assert titled(data) == {"a1": "北京", "7": "x"}
    assert data.qrels == {"q1": {"a1": 1}}
    assert load_beir(tmp_path / "out", "dev").qrels == {"q2": {"a1": 1}}


ROWS = [
    {"anchor": "who?", "positive": "me", "negative_1": "you", "negative_2": "it", "id": 3},
    {"anchor": "what?", "positive": "it", "negative_1": "me", "negative_2": None, "id": 4},
]


def as_parquet(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def as_csv(path: Path) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, list(ROWS[0]), delimiter="\t" if path.suffix == ".tsv" else ","
        )
        writer.writeheader()
        writer.writerows(ROWS)
    return path


@pytest.mark.parametrize(
    ("name", "make"),
    [("t.parquet", as_parquet), ("t.csv", as_csv), ("t.tsv", as_csv),
     ("t.jsonl", lambda path: lines(path, ROWS))],
)  # fmt: skip
def test_tables(name: str, make: Callable[[Path], Path], tmp_path: Path) -> None:
    source = make(tmp_path / name)
    options = ImportOptions(query="anchor", query_id="id", split="dev")
    for kind in ("parquet", "hf"):
        convert(kind, [source], tmp_path / kind, options)
        data = load_beir(tmp_path / kind, "dev")
        assert data.queries == {"3": "who?", "4": "what?"}
        assert data.qrels == {"3": {content_id("me"): 1}, "4": {content_id("it"): 1}}
        assert read_negatives(tmp_path / kind / "negatives.jsonl", data) == {
            "3": [content_id("you"), content_id("it")], "4": [content_id("me")],
        }  # fmt: skip


def test_table_with_lists_and_ids(tmp_path: Path) -> None:
    row = {"query": "who?", "positive": ["me", "I"], "pids": ["a", "b"], "negative": ["you"]}
    source = lines(tmp_path / "rows.jsonl", [row])
    convert("hf", [source], tmp_path / "out", ImportOptions(positive_id="pids"))
    data = load_beir(tmp_path / "out", "train")
    assert titled(data) == {"a": "me", "b": "I", content_id("you"): "you"}


def test_missing_column_names_the_nearest(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", [{"querry": "who?", "positive": "me"}])
    with pytest.raises(UserError, match=r"row 1: no column 'query' \(did you mean 'querry'\?\)"):
        convert("hf", [source], tmp_path / "out", ImportOptions())


def test_unreadable_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"broken\.parquet: cannot be read after row 0"):
        convert("parquet", [tmp_path / "broken.parquet"], tmp_path / "out", ImportOptions())
    with pytest.raises(UserError, match=r"missing\.parquet: no such file"):
        convert("parquet", [tmp_path / "missing.parquet"], tmp_path / "out", ImportOptions())


def test_beir_comes_out_as_it_went_in(tmp_path: Path) -> None:
    root = write_beir(tmp_path / "in")
    lines(root / "negatives.jsonl", [{"query_id": "q1", "negative_document_ids": ["p3", "p5"]}])
    convert("beir", [root], tmp_path / "out", ImportOptions())
    for split in ("train", "dev", "test"):
        before, after = load_beir(root, split), load_beir(tmp_path / "out", split)
        assert titled(before) == titled(after)
        assert (before.queries, before.qrels) == (after.queries, after.qrels)
    expected = [pid for pid in ("p3", "p5") if pid not in before.qrels["q1"]]
    assert read_negatives(tmp_path / "out" / "negatives.jsonl", after) == {"q1": expected}


def test_queries_held_out_leave_train(tmp_path: Path) -> None:
    root = write_beir(tmp_path / "in")
    for split in ("dev", "test"):
        (root / "qrels" / f"{split}.tsv").unlink()
    whole = load_beir(root, "train").qrels
    convert("beir", [root], tmp_path / "out", ImportOptions(hold_out="test=10,dev=5", seed=3))
    parts = {s: load_beir(tmp_path / "out", s).qrels for s in ("train", "dev", "test")}
    assert {split: len(qrels) for split, qrels in parts.items()} == {
        "train": len(whole) - 15, "dev": 5, "test": 10,
    }  # fmt: skip
    assert parts["train"] | parts["dev"] | parts["test"] == whole
    convert("beir", [root], tmp_path / "two", ImportOptions(hold_out="test=10,dev=5", seed=3))
    assert load_beir(tmp_path / "two", "test").qrels == parts["test"]
    for bad, problem in (
        ("train=3", "expected SPLIT=NUMBER"),
        ("dev=40", "one at least must stay"),
    ):
        with pytest.raises(UserError, match=problem):
            convert("beir", [root], tmp_path / "three", ImportOptions(hold_out=bad))


ODD = {
    "msmarco columns": ("msmarco", "collection.tsv", "11\ta\tb", "collection.tsv:5: expected 2"),
    "msmarco bytes": ("msmarco", "collection.tsv", b"11\t\xff", "collection.tsv:5: not UTF-8"),
    "msmarco repeated id": ("msmarco", "collection.tsv", "7\tother", ":5: passage '7' came before"),
    "msmarco id": ("msmarco", "collection.tsv", " \tother", ":5: id ' ' is empty or has white"),
    "msmarco unknown query": ("msmarco", "qrels.train.tsv", "9\t0\t7\t1", ":3: query '9' is not"),
    "msmarco unknown passage": ("msmarco", "qrels.train.tsv", "1\t0\t99\t1", "passage '99' is not"),
    "msmarco grade": ("msmarco", "qrels.train.tsv", "1\t0\t7\tx", ":3: score 'x' is not a whole"),
    "msmarco second grade": ("msmarco", "qrels.train.tsv", "1\t0\t7\t2", "have the grades 1 and 2"),
    "msmarco text triple": ("msmarco", "qidpidtriples.train.tsv", "who is\ta b\tc d", "(ids, not"),
    "beir JSON": ("beir", "corpus.jsonl", "{", "corpus.jsonl:61: not valid JSON"),
    "beir key": ("beir", "queries.jsonl", '{"_id": "x", "txt": "y"}', ":41: no key 'text'"),
    "beir columns": ("beir", "qrels/dev.tsv", "q1\tp1", "dev.tsv:42: expected 3 columns"),
    "beir negatives": ("beir", "negatives.jsonl", '{"query_id": "x"}', ":1: query 'x' is not"),
    "tevatron key": ("tevatron", "train.jsonl", '{"query_id": "x"}', ":2: no key 'query_text'"),
    "tevatron passage": (
        "tevatron", "train.jsonl", json.dumps(OLDER | {"negative_passages": ["x"]}),
        ":2: a passage must be an object, found str",
    ),
    "flagembedding pos": ("flagembedding", "a.jsonl", '{"query": "x", "pos": []}', "'pos' is miss"),
    "flagembedding text": (
        "flagembedding", "a.jsonl", '{"query": "x", "pos": ["a", null]}', "'pos' must be text",
    ),
    "dureader": (
        "dureader", "train.json", '{"question": "x", "question_id": "y"}', "'answer_paragraphs'",
    ),
}  # fmt: skip


def good_source(name: str, root: Path) -> Path:
    if name == "msmarco":
        msmarco(root)
    elif name == "beir":
        write_beir(root)
    elif name == "tevatron":
        lines(root / "train.jsonl", [OLDER])
    elif name == "flagembedding":
        lines(root / "a.jsonl", [{"query": "who?", "pos": ["me"], "neg": ["you"]}])
    else:
        answer = {"paragraph_id": "p", "paragraph_text": "t"}
        lines(root / "train.json", [
            {"question": "x", "question_id": "q", "answer_paragraphs": [answer]}
        ])  # fmt: skip
    return root


@pytest.mark.parametrize("case", ODD)
def test_odd_line_is_named_and_can_be_left_out(case: str, tmp_path: Path) -> None:
    name, file, line, problem = ODD[case]
    root = good_source(name, tmp_path / "in")
    convert(name, [root], tmp_path / "good", ImportOptions())
    with (root / file).open("ab") as handle:
        handle.write(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(UserError) as error:
        convert(name, [root], tmp_path / "out", ImportOptions())
    message = str(error.value)
    assert problem in message
    assert str(root / file) in message
    assert "--skip_bad" in message
    assert "\n" not in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good", "in"]  # nothing half-written
    facts = convert(name, [root], tmp_path / "out", ImportOptions(skip_bad=2))
    assert sum(kind["count"] for kind in facts["left_out"].values()) >= 1
    good, out = (load_beir(tmp_path / n, "train") for n in ("good", "out"))
    assert titled(good) == titled(out)
    assert good.qrels == out.qrels
