"""Long and odd text: what works, what is cut, what is refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.processes import run_python
from support.tiny import WORDS, ConfigMaker, write_beir
from transformers import AutoTokenizer

from erniesearch.config.keys import MAX_TOKENS, RunConfig
from erniesearch.config.stage_keys import LossWeights, PostTrainConfig
from erniesearch.data.bm25 import bm25_negatives
from erniesearch.data.collection import RetrievalData, load_beir
from erniesearch.data.corpus import tokens
from erniesearch.data.corpus.tokens import open_tokens
from erniesearch.errors import UserError
from erniesearch.retrieval.retriever import Retriever
from erniesearch.stages import Stage
from erniesearch.training.build import build_batches, build_model

ODD = {
    "long": "baran desel " * 9000,  # 108,000 characters
    "word": "x" * 100_000,
    "empty": "",
    "spaces": " \t\n\u3000 ",
    "controls": "\x01baran\x02 \x7fdesel\x1b[31m\u200b\ufeff",
    "nul": "baran\x00desel\x00",
    "emoji": "🙂👩‍👩‍👧‍👦 baran 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "arabic": "مرحبا بالعالم baran",
    "hebrew": "\u202eשלום עולם\u202c desel",
    "accents": "Z\u0300\u0301\u0302\u0303a\u0336l\u0337go " * 50,
    "lines": "baran\r\ndesel\u2028fivix\x85goku",
    "plane": "\U0010ffff\ufffe𝔟𝔞𝔯𝔞𝔫",
}


def write_odd(root: Path) -> Path:
    """Every odd text as a passage and as a query that it answers, among ordinary ones."""
    write_beir(root)
    for file, prefix in (("corpus.jsonl", "p"), ("queries.jsonl", "q")):
        with (root / file).open("a", encoding="utf-8") as handle:
            for name, text in ODD.items():
                record = {"_id": f"{prefix}-{name}", "text": text}
                handle.write(json.dumps(record, ensure_ascii=name == "nul") + "\n")
    lines = "".join(f"q-{name}\tp-{name}\t1\n" for name in ODD)
    (root / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return root


@pytest.fixture
def odd(make_config: ConfigMaker, tmp_path: Path) -> tuple[RunConfig, RetrievalData]:
    path = write_odd(tmp_path / "odd")
    config = make_config(steps=1, queries_per_rank=len(ODD))
    config = replace(config, data=replace(config.data, path=str(path)))
    return config, load_beir(path, "train")


def test_odd_texts_arrive_unchanged(odd: tuple[RunConfig, RetrievalData]) -> None:
    _, data = odd
    for name, text in ODD.items():
        assert data.passages[data.index_of[f"p-{name}"]] == text
        assert data.queries[f"q-{name}"] == text


@pytest.mark.parametrize("stage", ["cascade", "post_train"])
def test_one_step_on_odd_texts_is_finite(stage: str, odd: tuple[RunConfig, RetrievalData]) -> None:
    config, data = odd
    if stage == "post_train":
        weights = LossWeights(mlm=1.0, de=1.0, li=1.0)
        settings = PostTrainConfig(steps=4, queries_per_rank=len(data.pids), weights=weights)
        config = replace(config, stages=replace(config.stages, post_train=settings))
    model, tokenizer = build_model(Stage(config, stage))
    batch = build_batches(Stage(config, stage), data, tokenizer)[0]
    assert batch.query_ids.shape[1] <= config.data.max_query_length
    assert batch.passage_ids.shape[1] == config.data.max_passage_length  # the long ones are cut
    assert batch.query_mask.any(1).all()
    assert batch.passage_mask.any(1).all()
    model.train()
    terms = model(batch)
    terms["loss"].backward()
    assert all(torch.isfinite(value).all() for value in terms.values()), terms
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name


def test_odd_texts_are_indexed_and_encoded(odd: tuple[RunConfig, RetrievalData]) -> None:
    config, data = odd
    negatives = bm25_negatives(
        data.queries, data.relevant(), data.pids, data.passages, 5, "english"
    )  # fmt: skip
    assert set(negatives) == {f"q-{name}" for name in ODD}
    assert all(f"p-{name}" not in negatives[f"q-{name}"] for name in ODD)
    retriever = Retriever(config.student, 8, 16, 4, seed=1)
    for side, texts in (("query", list(data.queries.values())), ("passage", data.passages)):
        vectors = retriever.vectors(texts, side)
        assert len(vectors) == len(texts)
        assert torch.isfinite(torch.as_tensor(vectors)).all()


REFUSED = {
    "raw NUL": (b'{"_id": "n", "text": "a\x00b"}', "not valid JSON"),
    "half a surrogate pair": (rb'{"_id": "n", "text": "a\ud83d"}', "surrogate"),
    "NUL in an id": (rb'{"_id": "a\u0000b", "text": "a"}', "id "),
    "escape in an id": (rb'{"_id": "a\u001b[1m", "text": "a"}', "id "),
    "white space in an id": (b'{"_id": "a b", "text": "a"}', "white space"),
    "Latin-1": ('{"_id": "n", "text": "é"}'.encode("latin-1"), "not UTF-8"),
    "an id once more": (b'{"_id": "p3", "text": "a"}', "duplicate id 'p3', first on line 4"),
    "5,000 digits": (b'{"_id": ' + b"9" * 5000 + b', "text": "a"}', "digits"),
    "100,000 brackets": (b'{"_id": ' + b"[" * 100_000 + b"}", "nested too deeply"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_run_could_hold_is_refused_by_line(case: str, tmp_path: Path) -> None:
    line, problem = REFUSED[case]
    root = write_beir(tmp_path)
    with (root / "corpus.jsonl").open("ab") as handle:
        handle.write(line + b"\n")
    with pytest.raises(UserError) as refused:
        load_beir(root, "train")
    assert str(refused.value).startswith(f"{root / 'corpus.jsonl'}:61: ")
    assert problem in str(refused.value)


@pytest.mark.parametrize("change", ["byte order mark", "CRLF"])
def test_windows_files_work(change: str, tmp_path: Path) -> None:
    plain, other = write_beir(tmp_path / "plain"), write_beir(tmp_path / "other")
    for file in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"):
        content = (other / file).read_bytes()
        if change == "CRLF":
            content = content.replace(b"\n", b"\r\n")
        else:
            content = b"\xef\xbb\xbf" + content.removeprefix(b"query-id\tcorpus-id\tscore\n")
        (other / file).write_bytes(content)
    one, two = load_beir(plain, "train"), load_beir(other, "train")
    assert list(one.passages) == list(two.passages)
    assert (one.queries, one.qrels) == (two.queries, two.qrels)


BIG = """
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from erniesearch.data.collection import load_beir
from erniesearch.data.corpus.tokens import open_tokens
data = load_beir(Path(sys.argv[1]), "train")
store = open_tokens(data.passages, AutoTokenizer.from_pretrained(sys.argv[2]))
print(len(data.passages[60]), store.lengths[60], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_line_of_50_megabytes(tmp_path: Path, tiny_model: Path) -> None:
    root = write_beir(tmp_path / "data")
    text = (" ".join(WORDS) + " ") * 131_000
    assert len(text) > 50_000_000
    with (root / "corpus.jsonl").open("a") as handle:
        handle.write(json.dumps({"_id": "big", "text": text}) + "\n")
    status, output = run_python("-c", BIG, str(root), str(tiny_model),
                                ERNIESEARCH_CACHE=str(tmp_path / "cache"))  # fmt: skip
    assert status == 0, output[-3000:]
    characters, length, kilobytes = map(int, output.splitlines()[-1].split())
    assert (characters, length) == (len(text), MAX_TOKENS)
    assert kilobytes < 1_500_000


def test_the_beginning_of_a_long_text_has_its_tokens(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [" ".join(WORDS) * 8, "x" * 600, "baran " * 3 + "x" * 600, " " * 600 + "baran", ""]
    expected = [ids[:20] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    monkeypatch.setattr(tokens, "MAX_TOKENS", 20)
    monkeypatch.setattr(tokens, "LONG_TEXT", 300)
    store = open_tokens(texts, tokenizer)
    assert [store[[i]][0].tolist() for i in range(len(texts))] == expected
