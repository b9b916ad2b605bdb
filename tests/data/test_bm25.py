"""BM25 against its formula, and the hard negatives taken from it."""

import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.processes import ROOT, run_python
from support.tiny import WORDS, ConfigMaker

from erniesearch.data.bm25 import BM25, bm25_negatives, check_analyzer, split_identifiers
from erniesearch.data.collection import RetrievalData, load_beir
from erniesearch.data.corpus.texts import open_corpus
from erniesearch.data.negatives import read_negatives, write_negatives
from erniesearch.errors import UserError
from erniesearch.evaluation.measures import bm25_run, per_query_metrics
from erniesearch.pipeline.run import run_pipeline

RNG = np.random.default_rng(0)
PASSAGES = [" ".join(RNG.choice(WORDS, size=RNG.integers(3, 20))) for _ in range(40)]
QUERIES = [" ".join(RNG.choice(WORDS, size=3, replace=False)) for _ in range(12)]


def formula(query: str, k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """Σ_w ln(1 + (N - df + 0.5) / (df + 0.5)) · tf / (tf + k1·(1 - b + b·length/mean length))."""
    documents = [Counter(text.split()) for text in PASSAGES]
    lengths = np.array([sum(document.values()) for document in documents])
    scores = np.zeros(len(documents))
    for word in query.split():
        frequency = np.array([document[word] for document in documents])
        df = int((frequency > 0).sum())
        idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
        scores += idf * frequency / (frequency + k1 * (1 - b + b * lengths / lengths.mean()))
    return scores


def test_scores_are_the_formulas() -> None:
    positions, scores = BM25(PASSAGES).search(QUERIES, 10)
    assert positions.shape == scores.shape == (12, 10)
    for query, row, row_scores in zip(QUERIES, positions, scores, strict=True):
        expected = formula(query)
        np.testing.assert_allclose(row_scores, expected[row], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(row_scores, np.sort(expected)[::-1][:10], rtol=1e-5, atol=1e-6)


def test_depth_is_at_most_the_corpus() -> None:
    positions, _ = BM25(["one text", "another text here"]).search(["text"], 100)
    assert sorted(positions[0]) == [0, 1]


def test_stemmer_joins_word_forms() -> None:
    passages = ["undoing the edits", "nothing of that kind"]
    for stemmer, expected in ((None, 0.0), ("english", 1.0)):
        _, scores = BM25(passages, stemmer).search(["undo edit"], 1)
        assert (scores[0, 0] > 0) == bool(expected)


def test_unknown_stemmer_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no Snowball stemmer 'klingon'; known: .*english"):
        BM25(PASSAGES, "klingon")


def test_negatives_are_the_best_passages_that_are_not_relevant() -> None:
    pids = [f"p{i}" for i in range(len(PASSAGES))]
    queries = {f"q{i}": text for i, text in enumerate(QUERIES)}
    # The best and the third best passage of each query are relevant.
    order = {qid: np.argsort(-formula(text), kind="stable") for qid, text in queries.items()}
    relevant = {qid: [pids[row[0]], pids[row[2]]] for qid, row in order.items()}
    negatives = bm25_negatives(queries, relevant, pids, PASSAGES, 5)
    assert list(negatives) == list(queries)
    for qid, found in negatives.items():
        scores = formula(queries[qid])
        assert not set(found) & set(relevant[qid])
        others = [i for i in range(len(pids)) if pids[i] not in relevant[qid] and scores[i] > 0]
        best = sorted((scores[i] for i in others), reverse=True)[:5]
        np.testing.assert_allclose([scores[int(pid[1:])] for pid in found], best, rtol=1e-5)


def test_passages_without_a_common_word_are_no_negatives() -> None:
    passages = ["red apple pie", "red brick wall", "blue ocean wave"]
    negatives = bm25_negatives({"q": "red apple"}, {"q": ["a"]}, ["a", "b", "c"], passages, 3)
    assert negatives == {"q": ["b"]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("parse_header", "parse header"), ("__init__", "init"), ("camelCase", "camel Case"),
        ("HTTPServer", "HTTP Server"), ("getHTTPResponse", "get HTTP Response"),
        ("conv2d", "conv 2 d"), ("utf8", "utf 8"), ("MAX_LEN", "MAX LEN"), ("iOS", "i OS"),
        ("isDir(a.b, x='no')", "is Dir a b x no"), ("x = -1.5e3", "x 1 5 e 3"),
        ("ÜberGröße", "Über Größe"), ("检索 text", "检索 text"), ("-> !? ()", ""), ("", ""),
    ],
)  # fmt: skip
def test_identifiers_are_split_into_words(text: str, words: str) -> None:
    assert split_identifiers(text) == words


def test_code_is_found_by_the_words_of_its_identifiers() -> None:
    passages = ["def parseHTTPHeaders(fp): return read(fp)", "def open_file(p): return os.open(p)"]
    query = ["read the headers of http"]
    _, scores = BM25(passages).search(["headers of http"], 2)
    assert not scores.any()  # an identifier counts as one word
    for stemmer in (None, "english"):
        positions, scores = BM25(passages, stemmer, "code").search(query, 2)
        assert positions[0, 0] == 0
        assert scores[0, 0] > scores[0, 1] == 0
    vocabulary = set(BM25(passages, tokenizer="code")._tokenize(passages).vocab)
    assert {"parse", "http", "headers", "fp", "open", "file", "p", "def"} <= vocabulary


def test_stop_words_find_no_code() -> None:
    _, scores = BM25(["def is_for(the): pass"], tokenizer="code").search(["is it for the"], 1)
    assert not scores.any()


CHINESE = [
    "范廷颂于1940年在河内大修道院完成神学学业。",
    "越南民主共和国建都河内，很多神职人员逃至南方。",
    "由于范廷颂被软禁，他无法到所属堂区工作。",
    "BM25 是一种检索函数。",
]


def test_chinese_is_found_by_words_and_not_by_whole_clauses() -> None:
    pytest.importorskip("rjieba", reason="extra zh is not installed")
    query = ["范廷颂在哪里完成神学？"]
    _, scores = BM25(CHINESE, tokenizer="words").search(query, 4)
    assert not scores.any()  # a clause without spaces counts as one word
    positions, scores = BM25(CHINESE, tokenizer="jieba").search(query, 4)
    assert positions[0, 0] == 0
    assert scores[0, 0] > scores[0, 1] > 0


def test_chinese_tokenizer_keeps_words_and_drops_punctuation() -> None:
    pytest.importorskip("rjieba", reason="extra zh is not installed")
    tokens = set(BM25(CHINESE, tokenizer="jieba")._tokenize(CHINESE).vocab)
    assert {"河内", "神学", "1940", "bm25", "在"} <= tokens  # words of one character too
    assert not tokens & set("，。、 ")


def test_punctuation_alone_finds_nothing() -> None:
    pytest.importorskip("rjieba", reason="extra zh is not installed")
    _, scores = BM25(CHINESE, tokenizer="jieba").search(["？！「」"], 4)
    assert not scores.any()


def test_english_inside_chinese_is_stemmed() -> None:
    pytest.importorskip("rjieba", reason="extra zh is not installed")
    passages = ["他喜欢 running 和 edits", "他喜欢苹果"]
    positions, scores = BM25(passages, "english", "jieba").search(["run edit"], 1)
    assert positions[0, 0] == 0
    assert scores[0, 0] > 0


def test_missing_segmenter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rjieba", None)
    with pytest.raises(UserError, match="the package rjieba: pip install rjieba"):
        check_analyzer(None, "jieba")
    check_analyzer(None, "words")
    check_analyzer("english", "code")


@pytest.fixture(scope="module")
def cmrc() -> RetrievalData:
    """The questions of CMRC 2018 and 14,200 passages of the Chinese Wikipedia."""
    pytest.importorskip("rjieba", reason="extra zh is not installed")
    path = ROOT.parent / "shared" / "data" / "cmrc2018-chunk"
    if not path.is_dir():
        pytest.skip(f"{path} is not here")
    return load_beir(path, "dev")


@pytest.mark.slow
def test_chinese_questions_find_their_passages(cmrc: RetrievalData) -> None:
    """Whole clauses as words reach an MRR@10 of 0.14."""
    run = bm25_run(cmrc, 10, None, "jieba")
    assert per_query_metrics(run, cmrc.qrels)["MRR@10"].mean() > 0.8


def test_chinese_negatives_survive_the_file(cmrc: RetrievalData, tmp_path: Path) -> None:
    relevant = dict(list(cmrc.relevant().items())[:200])
    pids, passages = list(cmrc.pids), list(cmrc.passages)
    text_of = dict(zip(pids, passages, strict=True))
    negatives = bm25_negatives(cmrc.queries, relevant, pids, passages, 8, None, "jieba")
    for qid, found in negatives.items():
        assert len(found) == 8
        assert not set(found) & set(relevant[qid])
    # Titles are part of the text: neighbours from the positive's own article are found first.
    first = [text_of[found[0]].split(" ")[0] for found in negatives.values()]
    own = [text_of[relevant[qid][0]].split(" ")[0] for qid in negatives]
    assert np.mean([a == b for a, b in zip(first, own, strict=True)]) > 0.5
    write_negatives(tmp_path / "negatives.jsonl", negatives, relevant)
    assert read_negatives(tmp_path / "negatives.jsonl") == negatives


def test_line_separators_inside_a_text_are_no_line_ends(tmp_path: Path) -> None:
    """Chinese web text holds U+2028, U+0085 and ideographic spaces."""
    texts = ["第一行\u2028第二行\u0085第三行", "全角\u3000空格：「引号」……"]
    lines = [{"_id": f"段{i}", "title": "标题·一", "text": t} for i, t in enumerate(texts)]
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), "utf-8")
    corpus = open_corpus(file, use_titles=True)
    pids, passages = list(corpus.pids), list(corpus.passages)
    assert list(pids) == ["段0", "段1"]
    assert list(passages) == [f"标题·一 {text}" for text in texts]


def test_missing_segmenter_stops_the_pipeline_before_it_starts(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rjieba", None)
    config = make_config(stage="interaction", negatives="bm25", bm25_tokenizer="jieba")
    with pytest.raises(UserError, match="bm25_tokenizer: jieba needs the package rjieba"):
        run_pipeline(config)
    assert not Path(config.run_dir).exists()


def test_jax_is_not_started_where_it_is_installed(tmp_path: Path) -> None:
    """bm25s runs JAX on import, which then holds most of the GPU's memory."""
    fake = tmp_path / "jax"
    fake.mkdir()
    (fake / "__init__.py").touch()
    (fake / "lax.py").write_text("raise SystemExit('JAX was started')\n")
    status, output = run_python(
        "-c", "import sys; import erniesearch.data.bm25 as b; print(b.BM25(['a word']).size);"
        " assert 'jax.lax' not in sys.modules; import jax.lax",
        PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]),
    )  # fmt: skip
    assert output.split() == ["1", "JAX", "was", "started"]  # by our own import, at the end
    assert status == 1
