"""Collections from what a program holds: Datasets with sentence-transformers' and BEIR's columns,
lists and mappings give what the same data in a folder gives."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.processes import run_python
from support.tiny import ConfigMaker

from erniesearch.config.keys import TRAINING_STAGES
from erniesearch.data.collection import RetrievalData, load_beir
from erniesearch.data.corpus.cache import cache_root
from erniesearch.data.importers.records import content_id
from erniesearch.data.memory import Collection, with_data
from erniesearch.data.negatives import read_negatives, read_scored_negatives
from erniesearch.errors import UserError
from erniesearch.models.backbone import load_tokenizer
from erniesearch.stages import Stage, fingerprint
from erniesearch.training.build import build_batches, build_sampler

TRIPLETS = {
    "anchor": ["baran desel", "fitor gozul", "baran desel"],
    "positive": ["baran baran", "fitor kusel", "desel desel"],
    "negative": ["fitor kusel", "lavix lapat", "baran baran"],
}
N_TUPLES = {
    "query": ["baran desel", "fitor gozul"],
    "positive": ["baran baran", "fitor kusel"],
    "negative_1": ["fitor kusel", "lavix lapat"],
    "negative_2": ["mivix miran", None],
}
CORPUS = {"_id": ["p1", "p2", "p3"], "title": ["Baran", "", "Lavix"],
          "text": ["baran desel", "fitor gozul", "lavix lapat"]}  # fmt: skip
QUERIES = {"_id": ["q1", "q2"], "text": ["baran", "fitor"]}
QRELS = {"query-id": ["q1", "q2", "q2"], "corpus-id": ["p1", "p2", "p3"], "score": [1, 2, 0]}


def table(columns: dict[str, list[Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def texts(data: Collection) -> dict[str, set[str]]:
    """Texts of the relevant passages by the text of their query."""
    by_id = dict(zip(data.pids, data.passages, strict=True))
    return {data.queries[qid]: {by_id[pid] for pid in pids}
            for qid, pids in data.relevant().items()}  # fmt: skip


def negative_texts(data: Collection) -> dict[str, list[str]]:
    by_id = dict(zip(data.pids, data.passages, strict=True))
    found = read_negatives(data.root / "negatives.jsonl", data)
    return {data.queries[qid]: [by_id[pid] for pid in pids] for qid, pids in found.items()}


def test_n_tuples_of_sentence_transformers() -> None:
    data = Collection.from_rows(table(N_TUPLES))
    assert texts(data) == {"baran desel": {"baran baran"}, "fitor gozul": {"fitor kusel"}}
    assert negative_texts(data) == {
        "baran desel": ["fitor kusel", "mivix miran"], "fitor gozul": ["lavix lapat"]
    }  # fmt: skip
    # "fitor kusel" is one passage: the positive of one query and a negative of the other.
    assert sorted(data.passages) == sorted(
        {"baran baran", "fitor kusel", "mivix miran", "lavix lapat"}
    )
    assert list(data.pids) == [content_id(text) for text in data.passages]


@pytest.mark.parametrize(
    ("column", "numbers"),
    [("scores", [[9.0, 4.0, 1.0], [7.0, 2.0, 3.0]]), ("label", [[5.0, 8.0], [5.0, 4.0]])],
)
def test_scores_of_a_teacher(column: str, numbers: list[list[float]]) -> None:
    """sentence-transformers' two forms: scores of positive and negatives, and margins."""
    rows = table({**N_TUPLES, "negative_2": ["mivix miran", "desel desel"], column: numbers})
    data = Collection.from_rows(rows)
    scores = read_scored_negatives(data.root / "negatives.jsonl", data)[1]
    margins = []
    for qid, negatives in read_negatives(data.root / "negatives.jsonl", data).items():
        own = scores[qid]
        (positive,) = data.relevant()[qid]
        margins.append([own[positive] - own[pid] for pid in negatives])
    assert margins == [[5.0, 8.0], [5.0, 4.0]]


def test_triplets_that_share_an_anchor_are_one_query() -> None:
    """A row's negative that another row calls relevant is no negative."""
    data = Collection.from_rows(table(TRIPLETS))
    assert texts(data)["baran desel"] == {"baran baran", "desel desel"}
    assert negative_texts(data) == {"baran desel": ["fitor kusel"], "fitor gozul": ["lavix lapat"]}


def test_lists_of_texts_in_a_cell_and_other_names() -> None:
    rows = {"question": ["baran"], "answer": [["baran desel", "desel"]],
            "negatives": [["fitor", "gozul"]]}  # fmt: skip
    data = Collection.from_rows(table(rows))
    assert texts(data) == {"baran": {"baran desel", "desel"}}
    assert negative_texts(data) == {"baran": ["fitor", "gozul"]}
    renamed = table(rows).rename_columns({"question": "a", "answer": "b", "negatives": "c_1"})
    other = Collection.from_rows(renamed, query="a", positive="b", negative="c")
    assert (texts(other), negative_texts(other)) == (texts(data), negative_texts(data))


def test_a_list_of_rows_gives_what_a_dataset_gives() -> None:
    rows = [{key: value for key, value in row.items() if value is not None}
            for row in table(N_TUPLES)]  # fmt: skip
    of_list, of_table = Collection.from_rows(rows), Collection.from_rows(table(N_TUPLES))
    for one, other in zip(sorted(of_list.root.rglob("*")), sorted(of_table.root.rglob("*")),
                          strict=True):  # fmt: skip
        assert one.name == other.name
        assert one.is_dir() or one.read_bytes() == other.read_bytes()


def test_splits_are_in_one_collection() -> None:
    splits = datasets.DatasetDict(
        train=table(N_TUPLES), dev=table({"query": ["lavix"], "positive": ["lavix lapat"]})
    )
    data = Collection.from_rows(**splits)
    assert texts(Collection.from_beir(data.root, "dev")) == {"lavix": {"lavix lapat"}}
    assert "lavix" not in texts(data)


@pytest.mark.parametrize("form", ["datasets", "lists", "mappings", "other names"])
def test_corpus_queries_and_qrels(form: str) -> None:
    corpus, queries, qrels = table(CORPUS), table(QUERIES), table(QRELS)
    if form == "lists":
        corpus, queries, qrels = list(corpus), list(queries), list(qrels)
    elif form == "mappings":  # as BEIR's loader and sentence-transformers' evaluators have them
        corpus = {row["_id"]: {"title": row["title"], "text": row["text"]} for row in corpus}
        queries = {row["_id"]: row["text"] for row in queries}
        qrels = {"q1": {"p1"}, "q2": {"p2": 2, "p3": 0}}
    elif form == "other names":
        corpus = corpus.rename_column("_id", "document_id").add_column("url", ["a", "b", "c"])
        queries = queries.rename_column("_id", "query_id")
        qrels = qrels.rename_columns({"query-id": "query_id", "corpus-id": "document_id"})
    data = Collection.from_corpus(corpus, queries, qrels, negatives={"q1": ["p3", "p1"]},
                                  test={"q1": ["p2"]})  # fmt: skip
    assert list(data.pids) == ["p1", "p2", "p3"]
    assert list(data.passages) == ["Baran baran desel", "fitor gozul", "Lavix lavix lapat"]
    assert data.queries == {"q1": "baran", "q2": "fitor"}
    assert data.qrels == {"q1": {"p1": 1}, "q2": {"p2": 2, "p3": 0}}
    assert load_beir(data.root, "test").qrels == {"q1": {"p2": 1}}
    assert read_negatives(data.root / "negatives.jsonl", data) == {"q1": ["p3"]}


def test_whole_numbers_are_ids() -> None:
    data = Collection.from_corpus({1: "baran", 2: "fitor"}, [{"id": 7, "text": "desel"}], {7: [2]})
    assert (list(data.pids), data.qrels) == (["1", "2"], {"7": {"2": 1}})


ROW = {"query": "a", "positive": "b"}
ODD = [
    ([ROW, {"query": "a"}], "train[1]: no column 'positive' or 'answer'; columns: query; name it"),
    ([ROW, {"query": 3, "positive": "b"}], "train[1]: 'query' must be text, found int"),
    ([ROW, {"query": "c", "positive": None}], "train[1]: 'positive' must be text, found NoneType"),
    ([ROW, {"query": "c", "positive": []}], "train[1]: column 'positive' is empty"),
    ([ROW | {"label": 1}], "train[0]: column 'label' is neither query, positive nor negatives"),
    ([ROW | {"negative": "c", "score": [1.0] * 3}], "train[0]: 'score' has 3 numbers for 1 posit"),
    (
        [ROW | {"negative": "c", "score": ["x"] * 2}],
        "train[0]: 'score' must hold numbers, found st",
    ),
    ([ROW | {"negative_x": "c"}], "train[0]: column 'negative_x' is neither query"),
    ([ROW | {"negative": [["c"]]}], "train[0]: 'negative' must be text, found list"),
    ([ROW, "c"], "train[1]: expected a mapping of column to value, found str"),
    ([{"query": " ", "positive": "b"}], "train[0]: query '"),
    ([], "the sources hold no passage"),
    (iter([ROW]), "train: expected a datasets.Dataset or a list of rows, which can be read twice"),
    (3, "train: expected a datasets.Dataset or a list of rows"),
    ({"query": ["a"], "positive": ["b"]}, "train: expected rows, found dict; of a dictionary of"),
    (datasets.DatasetDict(train=table(N_TUPLES)), "train: has several splits (train): give one"),
]


@pytest.mark.parametrize(("rows", "problem"), ODD, ids=range(len(ODD)))
def test_odd_rows_are_named(rows: Any, problem: str) -> None:
    with pytest.raises(UserError) as error:
        Collection.from_rows(rows)
    assert str(error.value).startswith(problem)


ODD_CORPUS = [
    ({"corpus": {"_id": ["p1"], "body": ["x"]}}, "corpus[0]: no column 'text'; columns: _id, body"),
    ({"corpus": {"key": ["p1"], "text": ["x"]}}, "corpus[0]: no column of ids (_id, id, docu"),
    ({"corpus": {"_id": ["p1", "p1"], "text": ["x", "y"]}}, "corpus[1]: passage 'p1' came before"),
    ({"corpus": {"_id": ["p 1"], "text": ["x"]}}, "corpus[0]: id 'p 1' is empty or has white"),
    ({"queries": {"_id": ["q1"], "text": [None]}}, "queries[0]: 'text' must be text, found NoneTy"),
    (
        {"qrels": {"query-id": ["q1"], "corpus-id": ["p9"]}},
        "qrels train[0]: passage 'p9' is not in",
    ),
    (
        {"qrels": {"query-id": ["q9"], "corpus-id": ["p1"]}},
        "qrels train[0]: query 'q9' is not amon",
    ),
    ({"qrels": QRELS | {"score": [0.5, 1.0, 1.0]}}, "qrels train[0]: score 0.5 is not a whole"),
    ({"qrels": QRELS | {"score": [0, 0, 0]}}, "the sources hold no relevant passage"),
    ({"negatives": {"q1": ["p9"]}}, "negatives['q1']: passage 'p9' is not in the corpus"),
]


@pytest.mark.parametrize(("changed", "problem"), ODD_CORPUS, ids=range(len(ODD_CORPUS)))
def test_odd_corpora_are_named(changed: dict[str, Any], problem: str) -> None:
    tables = {"corpus": CORPUS, "queries": QUERIES, "qrels": QRELS}
    given = {key: table(columns) for key, columns in (tables | changed).items() if key in tables}
    with pytest.raises(UserError) as error:
        Collection.from_corpus(**given, negatives=changed.get("negatives"))
    assert problem in str(error.value)
    for folder in (cache_root() / "collections").glob("*/*"):  # nothing half-written
        assert folder.suffix == ".lock" or (folder / "whole.json").is_file()


def test_mappings_of_odd_judgements() -> None:
    corpus, queries = {"p1": "x"}, {"q1": "y"}
    with pytest.raises(UserError, match=r"qrels train\['q1'\]: expected passage ids"):
        Collection.from_corpus(corpus, queries, {"q1": "p1"})
    with pytest.raises(UserError, match=r"corpus\['p2'\]: 'text' must be text, found int"):
        Collection.from_corpus({"p1": "x", "p2": 3}, queries, {"q1": ["p1"]})


def test_content_names_the_folder() -> None:
    """Chunks, formats and the order of a set do not change it; transforms and selections do."""
    whole = table(N_TUPLES)
    root = Collection.from_rows(whole).root
    again = datasets.concatenate_datasets([whole.select([0]), whole.select([1])])
    assert Collection.from_rows(again.with_format("numpy")).root == root
    other = whole.map(lambda row: {"positive": row["positive"] + " desel"})
    assert Collection.from_rows(other).root != root
    assert texts(Collection.from_rows(whole.select([1]))) == {"fitor gozul": {"fitor kusel"}}
    shown = whole.with_transform(
        lambda batch: batch | {"positive": [text.upper() for text in batch["positive"]]}
    )
    assert texts(Collection.from_rows(shown))["baran desel"] == {"BARAN BARAN"}


IN_ANOTHER_PROCESS = """
from erniesearch.data.memory import Collection
corpus = {f"p{i}": f"text {i}" for i in range(40)}
print(Collection.from_corpus(corpus, {"q": "x"}, {"q": {f"p{i}" for i in range(40)}}).root)
"""


def test_every_process_finds_the_same_folder() -> None:
    outputs = {run_python("-c", IN_ANOTHER_PROCESS, PYTHONHASHSEED=seed)[1] for seed in "12"}
    assert len(outputs) == 1
    assert Path(outputs.pop().strip()).is_dir()


def test_a_corpus_on_disk_is_streamed(tmp_path: Path) -> None:
    number, line = 30_000, "baran desel fitor gozul " * 40
    lines = (json.dumps({"_id": f"p{i}", "text": f"{i} {line}"}) + "\n" for i in range(number))
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    corpus = datasets.load_dataset("json", data_files=str(tmp_path / "corpus.jsonl"),
                                   split="train", cache_dir=str(tmp_path))  # fmt: skip
    tracemalloc.start()
    data = Collection.from_corpus(corpus, {"q": "baran"}, {"q": ["p1"]})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.passages) == number
    assert peak < 20e6 < number * len(line)  # a block of 8,192 rows and the ids


def test_every_stage_trains_on_it(make_config: ConfigMaker) -> None:
    rows = table(N_TUPLES)
    rows = datasets.concatenate_datasets([rows, table({
        "query": [f"q{i} baran" for i in range(12)], "positive": [f"p{i}" for i in range(12)],
        "negative_1": [f"n{i}" for i in range(12)], "negative_2": [f"m{i}" for i in range(12)],
    })])  # fmt: skip
    data = Collection.from_rows(rows, dev=rows)
    for name in TRAINING_STAGES:
        given = {} if name == "post_train" else {"negatives": "given"}
        config = with_data(make_config(name, validation_split="dev", **given), data)
        assert (config.data.path, config.data.train_split) == (str(data.root), "train")
        stage = Stage(config, name)
        batches = build_batches(stage, data, load_tokenizer(config.student))
        assert len(batches) == stage.settings.steps
        batch = batches[0]
        assert batch.passage_index.max() < len(data.pids)
        if given:
            assert batch.group_size == 3
            own = negative_texts(data)
            sampler = build_sampler(stage, data)
            for query, qid in enumerate(sampler.qids):
                group = sampler.group(0, 0, query)
                found = {data.passages[int(row)] for row in group.passages[1:]}
                assert set(own[data.queries[qid]]) <= found


def test_other_data_makes_a_stage_anew(make_config: ConfigMaker) -> None:
    config = make_config("contrastive")
    prints = {
        fingerprint(with_data(config, Collection.from_rows(rows)), "contrastive", 1)
        for rows in ([ROW], [ROW], [ROW | {"negative": "c"}])
    }
    assert len(prints) == 2


def test_plain_data_is_written_and_missing_data_is_told(make_config: ConfigMaker) -> None:
    config = make_config("contrastive")
    assert with_data(config, None) is config
    plain = RetrievalData(["p1", "p2"], ["x", "y"], {"q": "z"}, {"q": {"p2": 1}})
    written = load_beir(with_data(config, plain).data.path, "train")
    assert (list(written.passages), written.qrels) == (["x", "y"], plain.qrels)
    with pytest.raises(UserError, match=r"Collection\.from_beir"):
        with_data(config, load_beir(config.data.path, "train"))
    nowhere = replace(config, data=replace(config.data, path=""))
    for call in (lambda: load_beir("", "train"), lambda: with_data(nowhere, None)):
        with pytest.raises(UserError, match=r"no data: set data\.path, or give a Collection"):
            call()


def test_a_copy_outlives_the_cache(tmp_path: Path) -> None:
    data = Collection.from_rows([ROW])
    saved = Collection.from_beir(data.save(tmp_path / "kept"))
    assert texts(saved) == texts(data)
    with pytest.raises(UserError, match="is there already"):
        data.save(tmp_path / "kept")
