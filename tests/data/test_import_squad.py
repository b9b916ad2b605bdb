"""SQuAD's form: passages, cuts, the passage that holds the answer, splits by article."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support.processes import ROOT

from erniesearch.cli import main
from erniesearch.config.options import ImportOptions
from erniesearch.data.collection import load_beir
from erniesearch.data.importers.cut import by_chars, by_words
from erniesearch.data.importers.import_data import convert
from erniesearch.errors import UserError

SHARED = ROOT.parent / "shared" / "data"


def question(qid: str, context: str, *answers: str, text: str = "") -> dict[str, Any]:
    found = [{"text": answer, "answer_start": context.index(answer)} for answer in answers]
    return {"id": qid, "question": text or f"{qid}?", "answers": found}


def paragraph(context: str, *questions: dict[str, Any], **more: str) -> dict[str, Any]:
    return {"context": context, "qas": list(questions), **more}


def article(title: str, *paragraphs: dict[str, Any]) -> dict[str, Any]:
    return {"title": title, "paragraphs": list(paragraphs)}


def squad(path: Path, *articles: Any) -> Path:
    path.write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")
    return path


def corpus(folder: Path) -> list[tuple[str, str, str]]:
    rows = map(json.loads, (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["_id"], row["title"], row["text"]) for row in rows]


def simple(title: str) -> dict[str, Any]:
    context = f"All about {title}."
    return article(title, paragraph(context, question(f"q-{title}", context, title)))


def test_paragraphs_are_passages(tmp_path: Path) -> None:
    text = "Oil was\n dear.  It fell. "
    impossible = {"id": "q2", "question": "no?", "answers": [], "is_impossible": True}
    unanswered = {"id": "q3", "question": "open?", "answers": [{"text": "", "answer_start": -1}]}
    silent = {"id": "q4", "question": " ", "answers": [{"text": "It", "answer_start": 16}]}
    source = squad(
        tmp_path / "squad-dev.json",
        article("Oil_crisis", paragraph(text, question("q1", text, "Oil", "dear", text=" why \n?"),
                                        impossible, unanswered, silent)),
        article("Again", paragraph("Oil was dear. It fell.", question("q5", "It", "It"))),
    )  # fmt: skip
    facts = convert("squad", [source], tmp_path / "out", ImportOptions())
    assert corpus(tmp_path / "out") == [("w00000", "Oil crisis", "Oil was dear. It fell.")]
    data = load_beir(tmp_path / "out", "dev")
    assert data.queries == {"q1": "why ?", "q5": "q5?"}
    assert data.qrels == {"q1": {"w00000": 1}, "q5": {"w00000": 1}}
    assert {kind: note["count"] for kind, note in facts["notes"].items()} == {
        "question that cannot be answered, left out": 1,
        "question without an answer, left out": 1,
        "question without text, left out": 1,
        "passage whose text came before, taken as one": 1,
    }
    first = json.loads((tmp_path / "out" / "queries.jsonl").read_text().splitlines()[0])
    assert first["metadata"] == {"answers": ["Oil", "dear"]}


def test_cmrc_in_both_forms(tmp_path: Path) -> None:
    context = "范廷颂生于越南。他是枢机。" + "他住在河内很久很久。" * 3
    asked = question("A_QUERY_0", context, "枢机", text="他是谁？")
    newer = squad(tmp_path / "train.json", article("范廷颂", paragraph(context, asked, id="A")))
    older = tmp_path / "trial.json.gz"
    old = {"query_id": "A_QUERY_0", "query_text": "他是谁？", "answers": ["枢机"]}
    flat = {"context_id": "A", "context_text": context, "title": "范廷颂", "qas": [old]}
    older.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps([flat]).encode()))
    for source, name in ((newer, "newer"), (older, "older")):
        convert("squad", [source], tmp_path / name, ImportOptions(max_chars=20))
        assert corpus(tmp_path / name) == [
            ("A-0", "范廷颂", "范廷颂生于越南。他是枢机。"),
            ("A-1", "范廷颂", "他住在河内很久很久。" * 2),
            ("A-2", "范廷颂", "他住在河内很久很久。"),
        ]
        assert load_beir(tmp_path / name, "train").qrels == {"A_QUERY_0": {"A-0": 1}}
    convert("squad", [older], tmp_path / "whole", ImportOptions())
    assert corpus(tmp_path / "whole") == [("A", "范廷颂", context)]


FOX = "The fox ran far.  The dog slept on. A cat saw the fox again."


@pytest.mark.parametrize(
    ("answers", "relevant"),
    [
        ([("fox", 4)], ["c00000"]),  # it stands in the third passage too, but starts here
        ([("fox", 50)], ["c00002"]),
        ([("fox", 52)], ["c00002"]),  # off by two: the nearest one is meant
        ([("fox", 4), ("fox", 50)], ["c00000", "c00002"]),
        ([("fox", 4), ("far.  The dog", 12)], ["c00000"]),
        ([("far.  The dog", 12)], []),  # across a cut
        ([("wolf", 4)], []),
        ([("fox", None)], []),  # in two passages, and nobody says which
        ([("fox", -1), ("dog slept", None)], ["c00001"]),
        ([("dog\nslept", None)], ["c00001"]),
    ],
)
def test_the_passage_that_holds_the_answer(
    answers: list[tuple[str, int | None]], relevant: list[str], tmp_path: Path
) -> None:
    found = [{"text": text} if start is None else {"text": text, "answer_start": start}
             for text, start in answers]  # fmt: skip
    asked = {"id": "q", "question": "what?", "answers": found}
    source = squad(
        tmp_path / "a.json", article("T", paragraph(FOX, asked, question("r", FOX, "A cat")))
    )
    facts = convert("squad", [source], tmp_path / "out", ImportOptions(max_words=5))
    assert [text for _, _, text in corpus(tmp_path / "out")] == [
        "The fox ran far.", "The dog slept on.", "A cat saw the fox again.",
    ]  # fmt: skip
    qrels = load_beir(tmp_path / "out", "train").qrels
    assert list(qrels.get("q", {})) == relevant
    assert qrels["r"] == {"c00002": 1}
    left_out = facts["notes"].get("question whose answers no passage holds whole, left out")
    assert (left_out is None) == bool(relevant)


def test_answers_start_where_white_space_is_not_folded_yet(tmp_path: Path) -> None:
    context = "\n" * 20 + "One ox here. Two ox there."
    source = squad(
        tmp_path / "a.json", article("T", paragraph(context, question("q", context, "ox")))
    )
    convert("squad", [source], tmp_path / "out", ImportOptions(max_words=3))
    assert load_beir(tmp_path / "out", "train").qrels == {"q": {"c00000": 1}}


@pytest.mark.parametrize(
    ("text", "passages"),
    [
        ("One two three. four five six seven.", 1),  # a small letter goes on
        ("One two three. (Four did. too.)", 2),
        ('He said "one two." Then three four.', 2),
        ("He (said [so.]) Then three four five.", 2),
        ("He went to Istanbul. İstanbul is large.", 1),
        ("Он пришёл домой поздно. Дом был пуст.", 2),
        ("그는 집에 왔다. 집은 비어 있었다.", 2),
        ("one two three four five six seven", 1),  # a long sentence stays whole
    ],
)
def test_sentences_of_words(text: str, passages: int) -> None:
    spans = by_words(4).cut(text)
    assert len(spans) == passages
    assert " ".join(text[start:end] for start, end in spans) == text


def test_a_short_tail_joins_and_marks_stay_with_their_sentence() -> None:
    sentences = " ".join(["A" + " b" * 19 + "."] * 3)
    for tail, lengths in ((" C d e.", [20, 20, 23]), (" C d e. f g", [20, 20, 20, 5])):
        text = sentences + tail
        assert [len(text[a:b].split()) for a, b in by_words(20).cut(text)] == lengths
    text = "他说：「走吧！」我走了；你呢？？好。"
    assert [text[a:b] for a, b in by_chars(4).cut(text)] == [
        "他说：「走吧！」", "我走了；", "你呢？？", "好。",
    ]  # fmt: skip


def test_splits_share_no_article(tmp_path: Path) -> None:
    articles = [simple(title) for title in ("E_e", "B", "D", "A", "C", "F")]
    (tmp_path / "dev.txt").write_text("D\n\nE_e\n")
    (tmp_path / "test.txt").write_text("A\n")
    given = ImportOptions(
        dev_articles=str(tmp_path / "dev.txt"), test_articles=str(tmp_path / "test.txt")
    )
    one = squad(tmp_path / "dev-v1.1.json", *articles)
    convert("squad", [one], tmp_path / "one", given)
    assert [title for _, title, _ in corpus(tmp_path / "one")] == ["B", "C", "F", "D", "E e", "A"]
    found = {s: set(load_beir(tmp_path / "one", s).qrels) for s in ("train", "dev", "test")}
    assert found == {"train": {"q-B", "q-C", "q-F"}, "dev": {"q-D", "q-E_e"}, "test": {"q-A"}}
    other = squad(tmp_path / "other.json", *articles[::-1])
    drawn = []
    for source, seed in ((one, 1), (other, 1), (other, 2)):
        out = tmp_path / f"{source.stem}-{seed}"
        options = ImportOptions(dev_articles="2", test_articles="1", seed=seed)
        convert("squad", [source], out, options)
        drawn.append({s: set(load_beir(out, s).qrels) for s in ("train", "dev", "test")})
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(qids) for qids in drawn[0].values()] == [3, 2, 1]
    assert len(set.union(*drawn[0].values())) == 6


@pytest.mark.parametrize(
    ("dev", "test", "problem"),
    [
        ("Fox\n", "A\n", r"dev\.txt: no article 'Fox' \(did you mean 'Foxes'\?\)"),
        ("A\n", "A\n", r"test\.txt: article 'A' is among those of dev already"),
        (None, "A\n", r"--dev_articles .*dev\.txt: cannot be read: No such file.*one title a line"),
        ("2", "A\n", r"--dev_articles 2: 2 articles to draw from.*one must stay"),
        ("0", "A\n", r"--dev_articles 0: 2 articles to draw from; at least one must be drawn"),
    ],
)
def test_odd_splits_are_refused(dev: str | None, test: str, problem: str, tmp_path: Path) -> None:
    values = []
    for name, value in (("dev.txt", dev), ("test.txt", test)):
        if value and value.strip() and not value.isdigit():
            (tmp_path / name).write_text(value)
        values.append(value if value and value.isdigit() else str(tmp_path / name))
    source = squad(tmp_path / "in.json", *map(simple, ("A", "Foxes", "B")))
    with pytest.raises(UserError, match=problem):
        convert("squad", [source], tmp_path / "out", ImportOptions(
            dev_articles=values[0], test_articles=values[1]))  # fmt: skip
    assert not (tmp_path / "out").exists()


GOOD = article("T", paragraph("A b.", question("q", "A b.", "A")))


@pytest.mark.parametrize(
    ("odd", "problem"),
    [
        ("x", "article 2: expected an object, found str"),
        ({"title": "T"}, "article 2: no key 'paragraphs'"),
        ({"title": 1.5, "paragraphs": []}, "article 2: 'title' must be text, found Decimal"),
        (article("T", 3), "article 2, paragraph 1: expected an object, found int"),  # type: ignore[arg-type]
        (article("T", {"contxt": "C", "qas": []}), "paragraph 1: no key 'context' (did you mean"),
        (article("T", paragraph(" ")), "article 2, paragraph 1: the text is empty"),
        (article("T", {"context": "C"}), "article 2, paragraph 1: no key 'qas'"),
        (article("T", paragraph("C", {"question": "x"})), "paragraph 1: no key 'id'"),
        (article("T", paragraph("C", {"id": "x"})), "question x: no key 'question'"),
        (article("T", paragraph("C", {"id": "x", "question": "y"})), "x: no key 'answers'"),
        (article("T", paragraph("C", {"id": "x", "question": "y", "answers": [1]})),
         "question x: 'answers' must hold objects, found int"),
        (article("T", paragraph("C", {"id": "x", "question": "y", "answers": [
            {"text": "C", "answer_start": "0"}]})), "'answer_start' must be a whole number"),
        (article("T", paragraph("C", {"id": "x y", "question": "y", "answers": ["C"]})),
         "question x y: id 'x y' is empty or has white space"),
    ],
)  # fmt: skip
def test_odd_article_is_named_and_can_be_left_out(odd: Any, problem: str, tmp_path: Path) -> None:
    source = squad(tmp_path / "in.json", GOOD, odd)
    with pytest.raises(UserError) as error:
        convert("squad", [source], tmp_path / "out", ImportOptions())
    assert str(error.value).startswith(f"{source}: article 2")
    assert problem in str(error.value)
    assert "--skip_bad" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]
    facts = convert("squad", [source], tmp_path / "out", ImportOptions(skip_bad=2))
    assert not any("article" in kind for kind in facts["left_out"])  # kinds do not name places
    assert load_beir(tmp_path / "out", "train").qrels == {"q": {"w00000": 1}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{}", "expected articles"), ("[]", "expected articles"), ("{", "not valid JSON after item 0"),
     ('{"data": [{"title": "T", "paragraphs": []}', "not valid JSON after item 1")],
)  # fmt: skip
def test_other_files_are_refused(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(text)
    with pytest.raises(UserError, match=problem):
        convert("squad", [tmp_path / "in.json"], tmp_path / "out", ImportOptions())


def test_a_cut_archive_is_named(tmp_path: Path) -> None:
    packed = gzip.compress(json.dumps({"data": [GOOD] * 50}).encode())
    (tmp_path / "in.json.gz").write_bytes(packed[:-20])
    with pytest.raises(UserError, match=r"in\.json\.gz: cannot be read to its end"):
        convert("squad", [tmp_path / "in.json.gz"], tmp_path / "out", ImportOptions())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["squad", "--max_words", "5", "--max_chars", "5"], "give one of them"),
        (["squad", "--max_words", "0"], "--max_words 0: must be 1 or more"),
        (["beir", "--max_chars", "5"], "--max_chars: format squad alone knows it"),
        (["hf", "--dev_articles", "5"], "--dev_articles: format squad alone knows it"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = squad(tmp_path / "in.json", GOOD)
    command = ["data", "import", options[0], str(source), "--out", str(tmp_path / "out")]
    assert main([*command, *options[1:]]) == 2
    assert problem in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = squad(tmp_path / "in.json", *map(simple, "ABCD"))
    assert main(["data", "import", "squad", str(source), "--out", str(tmp_path / "out"),
                 "--max_words", "70", "--test_articles", "1", "--split", "dev"]) == 0  # fmt: skip
    assert "4 passages, 4 queries (judged: dev 3, test 1;" in capsys.readouterr().out


@pytest.mark.skipif(not (SHARED / "squad").is_dir(), reason="needs squad and squad-chunk")
def test_cuts_are_those_of_squad_chunk() -> None:
    """Every passage of a published set, from its paragraphs; those that came before are one."""
    known: set[str] = set()
    passages = []
    for _, title, text in corpus(SHARED / "squad"):
        for part in (text[start:end] for start, end in by_words(70).cut(text)):
            if part not in known:
                known.add(part)
                passages.append((f"c{len(passages):05d}", title, part))
    assert passages == corpus(SHARED / "squad-chunk")
