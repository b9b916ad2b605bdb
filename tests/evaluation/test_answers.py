"""Answer-string recall by DPR's definition, on cases made by hand."""

import json
from pathlib import Path

import pytest

from erniesearch.errors import UserError
from erniesearch.evaluation.answers import AnswerRecall, has_answer, read_answers, tokenize

COMPOSED, DECOMPOSED = "Beyonc\u00e9", "Beyonce\u0301"


@pytest.mark.parametrize(
    ("answer", "text", "found"),
    [
        ("Paris", "It is in paris.", True),
        ("paris", "It is in PARIS, France", True),
        ("art", "The party started", False),  # inside words
        ("art", "The art-party started", True),  # a hyphen is a token of its own
        ("New York", "new\n  york city", True),
        ("New York", "New and York", False),
        ("York New", "New York", False),
        ("New-York", "New York", False),  # punctuation is part of the answer
        ("U.S.", "the U.S. army", True),
        ("U.S.", "the US army", False),
        ("U.S.", "the U . S . army", True),  # tokens, not characters
        ("14 December 1972", "on 14 December 1972 they left", True),
        ("1972", "in 1972's winter", True),
        ("72", "in 1972", False),
        (COMPOSED, f"sung by {DECOMPOSED} Knowles", True),  # NFC and NFD are the same string
        (DECOMPOSED, f"sung by {COMPOSED}", True),
        ("Beyonce", f"sung by {COMPOSED}", False),  # DPR keeps accents
        ("stra\u00dfe", "Die STRASSE", False),  # lower() and not casefold()
        ("ΑΘΗΝΑ", "η αθηνα", True),
        ("东京", "东京是首都", False),  # a run of letters is one token
        ("$5", "it costs $5 now", True),
        ("$5", "it costs 5 $ now", False),
        ("", "anything", False),
        ("\u200b ", "anything \u200b", False),  # format characters are no tokens
        ("in Paris today", "Paris", False),
    ],
)
def test_has_answer(answer: str, text: str, found: bool) -> None:
    assert has_answer([answer], text) is found
    assert has_answer(["no such thing", answer], text) is found


def test_tokens_are_those_of_the_simple_tokenizer() -> None:
    assert tokenize("Don't pay $4.50 (caf\u00e9)!") == [
        "don", "'", "t", "pay", "$", "4", ".", "50", "(", "cafe\u0301", ")", "!",
    ]  # fmt: skip
    assert tokenize(" \t\u00a0\n") == []


def slow_has_answer(answers: list[str], text: str) -> bool:
    """DPR's loop over token windows."""
    words = tokenize(text)
    for answer in map(tokenize, answers):
        for i in range(len(words) - len(answer) + 1):
            if answer and words[i : i + len(answer)] == answer:
                return True
    return False


def test_substring_search_equals_the_loop_over_windows() -> None:
    texts = ["a b c a b", "ab c", "a. b", "c", ". a", "b c a"]
    for text in texts:
        for answer in [*texts, "a b", "b c", "a", "c a b", "."]:
            assert has_answer([answer], text) == slow_has_answer([answer], text)


def write_set(root: Path) -> Path:
    queries = [
        {"_id": "q1", "text": "capital?", "metadata": {"answers": ["Paris"]}},
        {"_id": "q2", "text": "river?", "metadata": {"answers": ["Rhine", "Rhein"]}},
        {"_id": "q3", "text": "elsewhere?"},
    ]
    corpus = [
        {"_id": "p1", "title": "Paris", "text": "It lies on the Seine."},
        {"_id": "p2", "title": "", "text": "Seine, in Paris"},
        {"_id": "p3", "text": "Der Rhein fliesst"},
    ]
    root.mkdir(exist_ok=True)
    for name, records in (("queries", queries), ("corpus", corpus)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (root / f"{name}.jsonl").write_text(lines)
    return root


def test_recall_looks_at_the_top_k_and_not_at_titles(tmp_path: Path) -> None:
    root = write_set(tmp_path)
    run = {"q1": {"p1": 3.0, "p3": 2.0, "p2": 1.0}, "q2": {"p1": 1.0, "p3": 1.0}}
    recall = AnswerRecall.read(root, ["q1", "q2"], [run], 3)
    at = {k: recall.per_query(run, ["q1", "q2"], k).tolist() for k in (1, 2, 3)}
    assert at == {1: [0, 0], 2: [0, 1], 3: [1, 1]}
    assert recall.per_query({}, ["q1", "q2"], 3).tolist() == [0, 0]
    shallow = AnswerRecall.read(root, ["q1"], [run], 1)
    assert list(shallow.texts) == ["p1"]  # nothing else is kept in memory


def test_a_query_without_answers_is_named(tmp_path: Path) -> None:
    path = write_set(tmp_path) / "queries.jsonl"
    assert list(read_answers(path, ["q1"])) == ["q1"]  # others may lack them
    with pytest.raises(UserError, match=rf"{path}:3: query 'q3' has no metadata.answers"):
        read_answers(path, ["q1", "q3"])
    path.write_text('{"_id": "q1", "text": "x", "metadata": {"answers": "Paris"}}\n')
    with pytest.raises(UserError, match="a list of strings"):
        read_answers(path, ["q1"])
