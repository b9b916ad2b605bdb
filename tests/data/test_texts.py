"""The corpus on disk behaves as a list, opens once for all, and is never read half-written."""

import json
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from support.processes import run_python, start
from support.tiny import write_beir

from erniesearch.data.collection import RetrievalData, load_beir
from erniesearch.data.corpus import texts
from erniesearch.data.corpus.texts import ArrowColumn, Corpus, PidIndex, open_corpus, rows_of, take
from erniesearch.errors import UserError


def write_corpus(path: Path, texts: list[str]) -> Path:
    lines = (json.dumps({"_id": f"p{i}", "text": text}) + "\n" for i, text in enumerate(texts))
    path.write_text("".join(lines))
    return path


def caches(cache: Path) -> list[Path]:
    """Whole cached corpora."""
    return [p for p in cache.glob("corpora/*/*") if p.is_dir() and not p.name.startswith(".")]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ERNIESEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def blocks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erniesearch.data.corpus.arrow.BLOCK_ROWS", 4)


TEXTS = [f"größe {i} " + "x" * (i % 5) for i in range(19)]


@pytest.mark.usefixtures("blocks_of_four")
def test_column_reads_like_a_list(tmp_path: Path, cache: Path) -> None:
    column = open_corpus(write_corpus(tmp_path / "corpus.jsonl", TEXTS), True).passages
    assert len(column._arrays) == 5
    assert len(column) == 19
    assert list(column) == TEXTS
    for item in (0, 3, 4, 18, -1, -19, np.int64(7)):
        assert column[item] == TEXTS[item]
    for part in (slice(None), slice(3, 9), slice(4, 8), slice(-5, None), slice(2, 17, 5),
                 slice(9, 3), slice(None, None, -1), slice(17, 99)):  # fmt: skip
        assert column[part] == TEXTS[part]
    rows = [18, 0, 7, 7, -1, 4]
    for wanted in (rows, np.array(rows), np.array(rows, np.int32)):
        assert column[wanted] == take(column, wanted) == take(TEXTS, wanted) == [
            TEXTS[i] for i in rows
        ]  # fmt: skip
    assert column[[]] == column[np.array([], np.int64)] == []
    for bad in (19, -20, [3, 19], np.array([-20])):
        with pytest.raises(IndexError):
            column[bad]
    with pytest.raises(TypeError, match="flatnonzero"):
        column[np.ones(19, bool)]


def test_a_block_ends_by_its_size_too(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erniesearch.data.corpus.arrow.BLOCK_WEIGHT", 1000)
    texts = ["a" * 300] * 10 + ["b" * 5000] + ["c"]
    column = open_corpus(write_corpus(tmp_path / "corpus.jsonl", texts), True).passages
    assert list(column) == texts
    assert max(len(block) for block in column._arrays) == 4


@pytest.mark.usefixtures("blocks_of_four")
def test_index_finds_every_pid_and_no_other(tmp_path: Path, cache: Path) -> None:
    corpus = open_corpus(write_corpus(tmp_path / "corpus.jsonl", TEXTS), True)
    index = corpus.index_of
    expected = {f"p{i}": i for i in range(19)}
    assert dict(index) == expected
    assert "p19" not in index
    with pytest.raises(KeyError):
        index["p19"]
    wanted = ["p3", "nothing", "p18", "p3", ""]
    assert index.rows(wanted).tolist() == [3, -1, 18, 3, -1]
    assert rows_of(expected, wanted).tolist() == [3, -1, 18, 3, -1]
    assert index.rows([]).tolist() == []
    assert sum(p.stat().st_size for p in corpus.pids.folder.glob("*.npy")) <= 19 * 16 + 2 * 128


@pytest.mark.usefixtures("blocks_of_four")
def test_pids_of_one_hash_are_told_apart(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "hash_text", lambda pid: 7 if pid < "p5" else 2**64 - 1)
    path = write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    index = open_corpus(path, True).index_of
    expected = {f"p{i}": i for i in range(19)}
    assert dict(index) == expected
    assert index.rows(list(expected)).tolist() == list(range(19))
    assert index.rows(["p19", "a"]).tolist() == [-1, -1]
    # A real duplicate among them is still found, by its lines.
    with path.open("a") as handle:
        handle.write('\n{"_id": "p7", "text": "x"}\n{"_id": "p8", "text": "x"}\n')
    with pytest.raises(UserError, match=r":21: duplicate id 'p7', first on line 8"):
        open_corpus(path, True)


def test_columns_travel_to_other_processes(tmp_path: Path, cache: Path) -> None:
    corpus = open_corpus(write_corpus(tmp_path / "corpus.jsonl", TEXTS), True)
    passages, index = pickle.loads(pickle.dumps((corpus.passages, corpus.index_of)))
    assert list(passages) == TEXTS
    assert index["p7"] == 7


def test_second_opening_does_not_read_the_source(tmp_path: Path, cache: Path) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    open_corpus(path, True)
    before = path.stat()
    path.write_bytes(b"?" * before.st_size)  # no parser can read this
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert list(open_corpus(path, True).passages) == TEXTS
    with pytest.raises(UserError, match=":1: not valid JSON"):
        open_corpus(path, False)  # the other reading has a cache of its own


def test_a_changed_source_is_read_again_and_its_old_cache_goes(tmp_path: Path, cache: Path) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    old = open_corpus(path, True).passages
    write_corpus(path, ["other", *TEXTS])
    assert list(open_corpus(path, True).passages) == ["other", *TEXTS]
    assert len(caches(cache)) == 1
    assert old[3] == TEXTS[3]  # whoever has it open may go on


@pytest.mark.parametrize("name", ["corpus.arrow", "hashes.npy", "rows.npy", "whole.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "overwritten"])
def test_a_damaged_cache_is_made_again(name: str, damage: str, tmp_path: Path, cache: Path) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    open_corpus(path, True)
    file = caches(cache)[0] / name
    size = file.stat().st_size
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"\0" * (size // 2 if damage == "cut" else size))
    corpus = open_corpus(path, True)
    assert list(corpus.passages) == TEXTS
    assert corpus.index_of["p18"] == 18


def test_nothing_of_a_refused_corpus_stays(tmp_path: Path, cache: Path) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    with path.open("a") as handle:
        handle.write("{\n")
    with pytest.raises(UserError, match=":20: not valid JSON"):
        open_corpus(path, True)
    assert [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_half_a_surrogate_pair_is_named(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"_id": "a", "text": "x"}\n{"_id": "b", "text": "\\ud83d"}\n')
    with pytest.raises(UserError, match=r":2: 'text' has half of a surrogate pair"):
        open_corpus(path, True)


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ERNIESEARCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written: .*set ERNIESEARCH_CACHE"):
        open_corpus(write_corpus(tmp_path / "corpus.jsonl", TEXTS), True)


OPEN = """
import sys, time
from pathlib import Path
from erniesearch.data.corpus import texts
read = texts.read_jsonl
def counted(*arguments):
    print("reads", flush=True)
    for i, record in enumerate(read(*arguments)):
        time.sleep(float(sys.argv[2]))
        yield record
texts.read_jsonl = counted
corpus = texts.open_corpus(Path(sys.argv[1]), True)
print(len(corpus.passages), corpus.index_of["p18"])
"""


def test_of_two_processes_at_once_one_reads(tmp_path: Path, cache: Path) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    processes = [start("-c", OPEN, str(path), "0.05") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert all(output.endswith("19 18\n") for output in outputs)
    assert sum("reads" in output for output in outputs) == 1


def test_a_kill_in_the_middle_leaves_nothing_that_is_read(tmp_path: Path, cache: Path) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    process = start("-c", OPEN, str(path), "60")
    deadline = time.monotonic() + 60
    while not list(cache.rglob("corpus.arrow")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(cache.rglob("corpus.arrow"))  # it was in the middle
    assert caches(cache) == []
    assert list(open_corpus(path, True).passages) == TEXTS
    assert [p.name for p in cache.rglob("*.part")] == []


MEMORY = """
import resource, sys
from pathlib import Path
from erniesearch.data.corpus.texts import open_corpus
from erniesearch.data.collection import RetrievalData
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus = open_corpus(Path(sys.argv[1]), True)
data = RetrievalData(corpus.pids, corpus.passages, {}, {})
assert len(data.pids) == 300_000
assert data.index_of["p299999"] == 299_999
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_large_corpus_takes_little_memory(tmp_path: Path, cache: Path) -> None:
    """300,000 passages of 600 characters: 180 MB of text, read and opened in 64 MiB, opened
    again in 32 MiB."""
    path = tmp_path / "corpus.jsonl"
    text = "lorem ipsum " * 50
    with path.open("w") as handle:
        for i in range(300_000):
            handle.write(f'{{"_id": "p{i}", "title": "t{i}", "text": "{text}"}}\n')
    for bound in (64, 32):
        status, output = run_python("-c", MEMORY, str(path))
        assert status == 0, output
        assert float(output.split()[-1]) < bound, output


def test_beir_corpus_stays_on_disk(tmp_path: Path) -> None:
    data = load_beir(write_beir(tmp_path / "data"), "train")
    assert isinstance(data.pids, ArrowColumn)
    assert isinstance(data.index_of, PidIndex)
    assert data.index_of is data.index_of  # made once
    plain = RetrievalData(list(data.pids), list(data.passages), {}, {})
    assert plain.index_of == dict(data.index_of)
    assert plain.index_of is plain.index_of


def test_corpus_of_a_folder_that_lacks_rows_is_no_corpus(tmp_path: Path, cache: Path) -> None:
    folder = open_corpus(write_corpus(tmp_path / "corpus.jsonl", TEXTS), True).pids.folder
    np.save(folder / "rows.npy", np.arange(18))
    with pytest.raises(ValueError, match="differ in length"):
        Corpus(folder)
