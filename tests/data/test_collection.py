"""BEIR layout in, TREC runs and negatives out; every odd line is named by file and line."""

import re
from pathlib import Path

import ir_measures
import pytest
from support.inputs import replace_line
from support.tiny import write_beir

from erniesearch.data.collection import RetrievalData, load_beir
from erniesearch.data.negatives import read_negatives, write_negatives
from erniesearch.data.trec import write_trec_run
from erniesearch.errors import UserError

BAD_LINES = {
    "broken JSON": ("corpus.jsonl", 2, '{"_id": "p1", "text": ', "not valid JSON"),
    "two objects on a line": ("corpus.jsonl", 2, '{"_id": "p1", "text": "a"} {}', "not valid JSON"),
    "not an object": ("queries.jsonl", 3, '["q2", "x"]', "expected a JSON object, found list"),
    "nested too deeply": ("corpus.jsonl", 5, '{"_id": ' + "[" * 100_000, "not valid JSON"),
    "misspelt key": (
        "corpus.jsonl", 4, '{"_id": "p3", "txt": "x"}', "no key 'text' (did you mean 'txt'?)",
    ),
    "missing id": ("queries.jsonl", 1, '{"id": "q0", "text": "x"}', "did you mean 'id'?"),
    "text is null": ("corpus.jsonl", 1, '{"_id": "p0", "text": null}', "no key 'text'"),
    "text is a number": (
        "corpus.jsonl", 3, '{"_id": "p2", "text": 7}', "'text' must be text, found int",
    ),
    "title is a list": (
        "corpus.jsonl", 3, '{"_id": "p2", "title": [], "text": "x"}', "'title' must be text",
    ),
    "id is a truth value": (
        "corpus.jsonl", 3, '{"_id": true, "text": "x"}', "'_id' must be text, found bool",
    ),
    "duplicate passage id": (
        "corpus.jsonl", 6, '{"_id": "p1", "text": "x"}', "duplicate id 'p1', first on line 2",
    ),
    "duplicate query id": (
        "queries.jsonl", 6, '{"_id": "q1", "text": "x"}', "duplicate query id 'q1'",
    ),
    "white space in a passage id": (
        "corpus.jsonl", 2, '{"_id": "p 1", "text": "x"}', "'p 1' is empty or has white space",
    ),
    "white space in a query id": (
        "queries.jsonl", 2, '{"_id": "q\\t1", "text": "x"}', "is empty or has white space",
    ),
    "empty id": ("corpus.jsonl", 2, '{"_id": "", "text": "x"}', "is empty or has white space"),
    "corpus is not UTF-8": ("corpus.jsonl", 9, b'{"_id": "p8", "text": "\xe9"}', "not UTF-8"),
    "unknown query": ("qrels/dev.tsv", 4, "nobody\tp1\t1", "query 'nobody' is not in queries"),
    "unknown passage": ("qrels/dev.tsv", 5, "q1\tnothing\t1", "passage 'nothing' is not in corpus"),
    "four columns": ("qrels/dev.tsv", 3, "q1\t0\tp1\t1", "found 4 columns"),
    "spaces for tabs": ("qrels/dev.tsv", 3, "q1 p1 1", "found 1 columns"),
    "grade is not whole": ("qrels/dev.tsv", 2, "q1\tp1\t0.5", "score '0.5' is not a whole number"),
    "grade is a word": ("qrels/dev.tsv", 2, "q1\tp1\tyes", "score 'yes' is not a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
def test_odd_line_is_named_by_file_and_line(case: str, tmp_path: Path) -> None:
    file, number, content, problem = BAD_LINES[case]
    root = write_beir(tmp_path / "data", num_passages=12, num_queries=8)
    load_beir(root, "dev")
    replace_line(root / file, number, content)
    with pytest.raises(UserError) as error:
        load_beir(root, "dev")
    message = str(error.value)
    assert message.startswith(f"{root / file}:{number}: ")
    assert problem in message
    assert "\n" not in message


@pytest.mark.parametrize("file", ["corpus.jsonl", "queries.jsonl", "qrels/dev.tsv"])
def test_missing_file_is_named(file: str, tmp_path: Path) -> None:
    root = write_beir(tmp_path / "data", 12, 8)
    (root / file).unlink()
    with pytest.raises(UserError, match=re.escape(f"{root / file}: no such file")):
        load_beir(root, "dev")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path / 'nowhere'}: no such folder"):
        load_beir(tmp_path / "nowhere", "dev")


def test_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    root = write_beir(tmp_path / "data", 12, 8)
    (root / "corpus.jsonl").unlink()
    (root / "corpus.jsonl").mkdir()
    with pytest.raises(UserError, match=r"corpus\.jsonl: cannot be read"):
        load_beir(root, "dev")


def test_missing_split_lists_the_splits_there(tmp_path: Path) -> None:
    root = write_beir(tmp_path / "data", 12, 8)
    with pytest.raises(UserError, match=r"validation\.tsv: no such file; splits here: dev, test, "):
        load_beir(root, "validation")


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("corpus.jsonl", "", "the corpus is empty"),
        ("corpus.jsonl", "\n  \n", "the corpus is empty"),
        ("queries.jsonl", "", "no queries"),
        ("qrels/dev.tsv", "", "no query has a relevant passage"),
        ("qrels/dev.tsv", "query-id\tcorpus-id\tscore\n", "no query has a relevant passage"),
        ("qrels/dev.tsv", "q1\tp1\t0\n", "no query has a relevant passage"),
    ],
)
def test_empty_file_is_named(file: str, content: str, problem: str, tmp_path: Path) -> None:
    root = write_beir(tmp_path / "data", 12, 8)
    (root / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{root / file}: {problem}")):
        load_beir(root, "dev")


def test_qrels_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    root = write_beir(tmp_path / "data", 12, 8)
    (root / "qrels" / "dev.tsv").write_bytes(b"q1\tp\xff\t1\n")
    with pytest.raises(UserError, match=r"dev\.tsv: not UTF-8"):
        load_beir(root, "dev")


def write_small(root: Path) -> Path:
    """Titles, a number for an id, blank lines, Windows line ends, grades."""
    (root / "qrels").mkdir(parents=True)
    (root / "corpus.jsonl").write_text(
        '{"_id": "a", "title": "Title", "text": "body", "metadata": {}}\r\n\n'
        '{"_id": 7, "title": "", "text": "größer"}\n{"_id": "c", "text": "no title"}\n'
    )
    (root / "queries.jsonl").write_text(
        '{"_id": "x", "text": "one"}\n{"_id": "y", "text": "two"}\n'
    )
    (root / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\r\nx\ta\t2\r\nx\t7\t1\r\ny\tc\t0\r\n"
    )
    return root


def test_beir_layout_is_read(tmp_path: Path) -> None:
    data = load_beir(write_small(tmp_path / "data"), "train")
    assert list(data.pids) == ["a", "7", "c"]
    assert list(data.passages) == ["Title body", "größer", "no title"]
    assert data.queries == {"x": "one", "y": "two"}
    assert data.qrels == {"x": {"a": 2, "7": 1}, "y": {"c": 0}}
    assert data.index_of == {"a": 0, "7": 1, "c": 2}
    # A judged but irrelevant passage is no positive.
    assert data.relevant() == {"x": ["a", "7"]}


def test_titles_can_be_left_out(tmp_path: Path) -> None:
    data = load_beir(write_small(tmp_path / "data"), "train", use_titles=False)
    assert list(data.passages) == ["body", "größer", "no title"]


def test_qrels_header_is_optional(tmp_path: Path) -> None:
    root = write_small(tmp_path / "data")
    (root / "qrels" / "train.tsv").write_text("x\ta\t1\n")
    assert load_beir(root, "train").qrels == {"x": {"a": 1}}


def test_trec_run_is_ranked_and_parses_back(tmp_path: Path) -> None:
    run = {
        "q1": {"low": 0.25, "tie-b": 0.5, "tie-a": 0.5, "top": 1.0},
        "q2": {"negative": -3.5, "tiny": 1e-8, "large": 123456.789},
    }
    path = tmp_path / "runs" / "system.trec"
    write_trec_run(path, run, "system")
    rows = [line.split(" ") for line in path.read_text().splitlines()]
    assert [row[2] for row in rows] == [
        "top", "tie-a", "tie-b", "low", "large", "tiny", "negative",
    ]  # fmt: skip
    assert all(row[1] == "Q0" and row[5] == "system" for row in rows)
    for qid in run:
        own = [row for row in rows if row[0] == qid]
        assert [int(row[3]) for row in own] == list(range(1, len(own) + 1))
        scores = [float(row[4]) for row in own]
        assert scores == sorted(scores, reverse=True)
    parsed: dict[str, dict[str, float]] = {}
    for found in ir_measures.read_trec_run(str(path)):
        parsed.setdefault(found.query_id, {})[found.doc_id] = found.score
    assert parsed == run


def test_negatives_survive_writing(tmp_path: Path) -> None:
    negatives = {"q1": ["b", "a"], "q2": []}
    path = tmp_path / "stage" / "negatives.jsonl"
    write_negatives(path, negatives, {"q1": ["p"], "q2": ["r", "s"]})
    assert read_negatives(path) == negatives
    assert path.read_text().splitlines()[1] == (
        '{"query_id": "q2", "positive_document_ids": ["r", "s"], "negative_document_ids": []}'
    )
    assert [p.name for p in path.parent.iterdir()] == ["negatives.jsonl"]  # nothing left aside


@pytest.mark.parametrize("line", ['{"query_id": "q"}', '{"negative_document_ids": []}', '{"a": 1}'])
def test_odd_negatives_are_named_by_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "negatives.jsonl"
    path.write_text('{"query_id": "q", "negative_document_ids": ["a"]}\n' + line + "\n")
    with pytest.raises(UserError, match=re.escape(f"{path}:2: expected query_id")):
        read_negatives(path)


def test_relevant_leaves_out_queries_without_any() -> None:
    data = RetrievalData(["a"], ["x"], {"q": "x", "r": "y"}, {"q": {"a": 0}, "r": {"a": 3}})
    assert data.relevant() == {"r": ["a"]}
