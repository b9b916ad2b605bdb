"""The BEIR folder appears whole or not at all, and the command tells what it did."""

import json
from pathlib import Path

import pytest
from support.inputs import OLDER, lines, msmarco
from support.tiny import write_beir

from erniesearch.cli import main
from erniesearch.config.options import ImportOptions
from erniesearch.data.collection import load_beir
from erniesearch.data.importers import import_data as module
from erniesearch.data.importers.import_data import convert
from erniesearch.data.importers.records import (
    HardNegatives,
    Judgement,
    Passage,
    Query,
    Record,
)
from erniesearch.data.negatives import read_negatives
from erniesearch.errors import UserError


def serve(monkeypatch: pytest.MonkeyPatch, *records: Record | BaseException) -> None:
    """Make the format ``test`` yield these records; an exception is raised in its place."""

    def read(*_: object) -> object:
        for record in records:
            if isinstance(record, BaseException):
                raise record
            yield record

    monkeypatch.setitem(module.FORMATS, "test", read)


GOOD = (Passage("p", "text", "f:1"), Passage("r", "other", "f:2"), Query("q", "who?", "f:3"),
        Judgement("train", "q", "p", "f:4"))  # fmt: skip


@pytest.mark.parametrize("failure", [UserError("f:9: odd"), KeyboardInterrupt(), OSError("full")])
def test_nothing_stays_after_a_failure(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, *GOOD, failure)
    with pytest.raises((UserError, KeyboardInterrupt)):
        convert("test", [], tmp_path / "deep" / "out", ImportOptions())
    assert list((tmp_path / "deep").iterdir()) == []


def test_what_was_there_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_beir(tmp_path / "out")
    before = load_beir(tmp_path / "out", "train").queries
    serve(monkeypatch, *GOOD, UserError("f:9: odd"))
    with pytest.raises(UserError, match="odd"):
        convert("test", [], tmp_path / "out", ImportOptions(overwrite=True))
    assert load_beir(tmp_path / "out", "train").queries == before
    serve(monkeypatch, *GOOD)
    with pytest.raises(UserError, match=r"is there already; .*--overwrite"):
        convert("test", [], tmp_path / "out", ImportOptions())
    convert("test", [], tmp_path / "out", ImportOptions(overwrite=True))
    assert load_beir(tmp_path / "out", "train").queries == {"q": "who?"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_a_data_folder_without_the_source_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    with pytest.raises(UserError, match=r"holds no corpus\.jsonl"):
        convert("beir", [tmp_path], tmp_path / "home", ImportOptions(overwrite=True))
    root = write_beir(tmp_path / "data")
    with pytest.raises(UserError, match=r"holds the source"):
        convert("beir", [root], root, ImportOptions(overwrite=True))
    assert load_beir(root, "train")


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        ((), "no passage"),
        (GOOD[:2], "no query"),
        (GOOD[:3], "no relevant passage"),
        ((*GOOD[:3], Judgement("train", "q", "p", "f:4", 0)), "no relevant passage"),
    ],
)
def test_a_set_without_a_part_is_refused(
    records: tuple[Record, ...], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, *records)
    with pytest.raises(UserError, match=problem):
        convert("test", [], tmp_path / "out", ImportOptions())
    assert not (tmp_path / "out").exists()


def test_negatives_are_capped_and_hold_no_positive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = [Passage(f"n{i}", f"text {i}", "f:1") for i in range(9)]
    serve(monkeypatch, *GOOD, *passages, HardNegatives("q", ("p", "n3", "n3", "n1"), "f:5"),
          HardNegatives("q", ("n3", "n7", "n8"), "f:6"))  # fmt: skip
    facts = convert("test", [], tmp_path / "out", ImportOptions(max_negatives=4))
    data = load_beir(tmp_path / "out", "train")
    negatives = read_negatives(tmp_path / "out" / "negatives.jsonl", data)
    assert negatives == {"q": ["n3", "n1", "n7"]}
    assert facts["notes"]["negatives beyond --max_negatives left out"]["first"] == ["f:6"]


def test_half_a_surrogate_pair_is_replaced_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, Passage("p", "a \ud83d b", "f:1"), *GOOD[2:])
    facts = convert("test", [], tmp_path / "out", ImportOptions())
    assert list(load_beir(tmp_path / "out", "train").passages) == ["a ? b"]
    assert facts["notes"]["half of a surrogate pair, replaced by '?'"]["first"] == ["f:1"]


def test_too_many_odd_lines_end_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = [Judgement("train", "q", f"x{i}", f"f:{10 + i}") for i in range(3)]
    serve(monkeypatch, *GOOD, *odd)
    with pytest.raises(UserError, match=r"^f:12: passage 'x2' .*\(3 odd lines\); repair"):
        convert("test", [], tmp_path / "out", ImportOptions(skip_bad=2))
    facts = convert("test", [], tmp_path / "out", ImportOptions(skip_bad=3))
    kind = facts["left_out"]["passage '…' is not in the corpus"]
    assert kind["count"] == 3
    assert kind["first"][0] == "f:10: passage 'x0' is not in the corpus"


def test_command_converts_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lines(tmp_path / "train.jsonl", [OLDER, OLDER | {"query_id": 6}, "{"])
    out = tmp_path / "out"
    status = main(["data", "import", "tevatron", str(source), "--out", str(out), "--skip_bad", "1",
                   "--hold_out", "test=1"])  # fmt: skip
    told = capsys.readouterr().out
    assert status == 0
    assert told.startswith(
        f"{out}: 3 passages, 2 queries (judged: train 1, test 1; with hard negatives: 2,"
        " 2 of them with a teacher's scores)\n"
    )
    (left_out,) = (line for line in told.splitlines() if line.startswith("left out: 1 × "))
    assert "not valid JSON" in left_out
    assert f"{source}:3" in left_out
    assert len(load_beir(out, "test").qrels) == 1
    assert json.loads((out / "import.json").read_text())["format"] == "tevatron"


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["msmarc", "IN"], "format 'msmarc': one of beir, msmarco"),
        (["msmarco", "IN/nothing.tsv"], "IN/nothing.tsv: no such file"),
        (["msmarco", "IN/queries.train.tsv"], "expected one collection.tsv or para.txt"),
        (["msmarco", "IN/collection.tsv"], "no queries.SPLIT.tsv"),
        (["beir", "IN/collection.tsv"], "format beir reads one folder"),
        (["dpr", "IN"], "no .json file"),
        (["msmarco", "IN", "--hold_out", "dev"], "expected SPLIT=NUMBER"),
        (["msmarco", "IN", "--skip_bad", "-1"], "must be 0 or more"),
    ],
)
def test_a_wrong_command_is_one_line(
    argv: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    msmarco(tmp_path / "in")
    argv = [part.replace("IN", str(tmp_path / "in")) for part in argv]
    status = main(["data", "import", *argv, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert status == 2
    assert problem.replace("IN", str(tmp_path / "in")) in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
