"""Late interaction end to end: against exhaustive MaxSim, after kills, and on odd passages."""

import json
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from erniesearch_kernels.reference import maxsim_reference
from support.processes import ROOT
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from erniesearch.config.options import IndexOptions
from erniesearch.errors import UserError
from erniesearch.retrieval import build_token_index
from erniesearch.retrieval.build_index import build_index
from erniesearch.retrieval.embeddings import Dtype, Embeddings, Manifest, claim, write_shard
from erniesearch.retrieval.token_index import TokenIndex, default_candidates, ranges

DIM = 16
TOPICS = 40


def clustered(number: int, seed: int, longest: int = 9) -> list[Tensor]:
    """Passages of one to ``longest`` unit vectors, each near one of a few directions."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((TOPICS, DIM))
    lengths = rng.integers(1, longest + 1, size=number)
    drawn = (centers[rng.integers(TOPICS, size=n)] for n in lengths)
    noisy = (v + 0.3 * rng.standard_normal(v.shape) for v in drawn)
    return [normalize(torch.tensor(v, dtype=torch.float32), dim=-1) for v in noisy]


def write_tokens(
    folder: Path, passages: list[Tensor], shard_size: int = 70, dtype: Dtype = "fp16"
) -> Path:
    manifest = Manifest("tokens", "passage", dtype, DIM, len(passages), shard_size, 16, "fp32",
                        "model", "data")  # fmt: skip
    claim(folder, manifest)
    for number in range(manifest.num_shards):
        start, end = manifest.bounds(number)
        own = passages[start:end]
        write_shard(
            folder, manifest, number, [f"p{i}" for i in range(start, end)],
            torch.cat(own).half() if dtype == "fp16" else torch.cat(own),
            torch.tensor([0, *map(len, own)]).cumsum(0),
        )  # fmt: skip
    return folder


def build(embeddings: Path, out: Path, **settings: Any) -> Path:
    build_index(IndexOptions(str(embeddings), str(out), **settings))
    return out


def exhaustive(queries: list[Tensor], passages: list[Tensor]) -> np.ndarray:
    """MaxSim of every pair over the vectors as they are stored; -inf without vectors."""
    padded = pad_sequence([p.half().float() for p in passages], batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(p) for p in passages])[:, None]
    scores = [maxsim_reference(query[None], padded, None, mask)[0] for query in queries]
    return torch.where(mask.any(1), torch.stack(scores), -torch.inf).numpy()


def best_of(scores: np.ndarray, depth: int) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")[:, :depth]


def recall(found: np.ndarray, best: np.ndarray) -> float:
    pairs = zip(found.tolist(), best.tolist(), strict=True)
    return float(np.mean([len({*ours} & {*theirs}) / len(theirs) for ours, theirs in pairs]))


@pytest.fixture(scope="module")
def passages() -> list[Tensor]:
    """Of very different lengths; two have no vector, one of them at the end, one has one."""
    found = clustered(300, 0)
    found[17], found[299] = torch.empty(0, DIM), torch.empty(0, DIM)
    found[18] = found[18][:1]
    return found


@pytest.fixture(scope="module")
def queries(passages: list[Tensor]) -> list[Tensor]:
    """Of one to twelve vectors; none is a passage."""
    return clustered(25, 1, longest=12)


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory, passages: list[Tensor]) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"), passages)


# --- exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1 << 26, 1])
def test_all_lists_and_no_loss_is_exhaustive_maxsim(
    block: int, embeddings: Path, passages: list[Tensor], queries: list[Tensor], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever number of queries is searched together; the rest is told as missing."""
    monkeypatch.setattr("erniesearch.retrieval.token_index.SIMILARITIES", block)
    build(embeddings, tmp_path / "i", num_centroids=20, nprobe=20)
    index = TokenIndex.load(tmp_path / "i")
    rows, scores = index.search(queries, 1000)
    expected = exhaustive(queries, passages)
    assert rows.shape == scores.shape == (25, 300)
    np.testing.assert_array_equal(rows[:, :298], best_of(expected, 298))
    np.testing.assert_allclose(scores[:, :298], -np.sort(-expected, axis=1)[:, :298], atol=1e-5)
    assert (rows[:, 298:] == -1).all()
    assert np.isneginf(scores[:, 298:]).all()
    assert [index.pids[row] for row in rows[0, :3]] == [f"p{row}" for row in rows[0, :3]]


def test_decoding_gives_what_was_stored(
    embeddings: Path, passages: list[Tensor], tmp_path: Path
) -> None:
    index = TokenIndex.load(build(embeddings, tmp_path / "16", bits=16))
    stored = torch.cat(passages).half().float().numpy()
    np.testing.assert_array_equal(index.decode(np.arange(len(stored))), stored)
    errors = {}
    for bits in (1, 2, 4, 8):
        index = TokenIndex.load(build(embeddings, tmp_path / str(bits), bits=bits))
        found = index.decode(np.arange(len(stored)))
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        assert index.codes.shape[1] == DIM * bits // 8
        errors[bits] = float(np.square(found - stored).sum(1).mean())
    assert errors[8] < errors[4] < errors[2] < errors[1] < 0.2


def test_vectors_of_other_lengths_keep_them(tmp_path: Path) -> None:
    """No unit vectors: nothing is normalised, and scores stay near the exact ones."""
    passages = [3 * vectors for vectors in clustered(200, 3)]
    folder = write_tokens(tmp_path / "e", passages)
    queries = clustered(5, 4)
    index = TokenIndex.load(build(folder, tmp_path / "i", bits=8, num_centroids=10, nprobe=10))
    assert not index.normalized
    rows, scores = index.search(queries, 10)
    expected = np.take_along_axis(exhaustive(queries, passages), rows, 1)
    np.testing.assert_allclose(scores, expected, rtol=0.02, atol=0.02)


def test_recall_on_clustered_vectors(tmp_path: Path) -> None:
    """A few lists of many and a fifth of the passages find what exhaustive MaxSim finds."""
    passages = clustered(2000, 5)
    queries = [vectors[:4] for vectors in clustered(40, 6)]
    folder = write_tokens(tmp_path / "e", passages, shard_size=600)
    best = best_of(exhaustive(queries, passages), 20)
    build(folder, tmp_path / "i", num_centroids=64, bits=4, nprobe=8, candidates=400)
    assert recall(TokenIndex.load(tmp_path / "i").search(queries, 20)[0], best) >= 0.95
    narrow = TokenIndex.load(tmp_path / "i", nprobe=1, candidates=20).search(queries, 20)[0]
    assert recall(narrow, best) < 0.9  # the settings are read
    lossless = build(folder, tmp_path / "16", num_centroids=64, bits=16, candidates=400)
    assert recall(TokenIndex.load(lossless).search(queries, 20)[0], best) >= 0.99


def test_only_allowed_passages_are_found(
    embeddings: Path, passages: list[Tensor], queries: list[Tensor], tmp_path: Path
) -> None:
    build(embeddings, tmp_path / "i", num_centroids=20, nprobe=20)
    allowed = np.zeros(300, dtype=bool)
    allowed[[3, 17, 40, 41, 250]] = True
    rows, _ = TokenIndex.load(tmp_path / "i").search(queries, 10, allowed)
    scores = np.where(allowed, exhaustive(queries, passages), -np.inf)
    np.testing.assert_array_equal(rows[:, :4], best_of(scores, 4))
    assert (rows[:, 4:] == -1).all()  # passage 17 has no vectors


def test_a_query_without_vectors_finds_nothing(embeddings: Path, tmp_path: Path) -> None:
    index = TokenIndex.load(build(embeddings, tmp_path / "i"))
    rows, scores = index.search([torch.empty(0, DIM), clustered(1, 8)[0]], 5)
    assert (rows[0] == -1).all()
    assert (rows[1] >= 0).all()
    assert np.isneginf(scores[0]).all()


def test_ranges_one_after_the_other() -> None:
    starts, ends = np.array([5, 2, 2, 9]), np.array([7, 2, 5, 10])
    assert ranges(starts, ends).tolist() == [5, 6, 2, 3, 4, 9]


# --- building -----------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_lists_hold_each_passage_once(
    embeddings: Path, passages: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks that cut through the corpus too."""
    monkeypatch.setattr(build_token_index, "BLOCK", 64)
    index = TokenIndex.load(build(embeddings, tmp_path / "i", num_centroids=20))
    of_passage = np.repeat(np.arange(300), [len(p) for p in passages])
    for number, (start, end) in enumerate(pairwise(index.list_ends)):
        own = np.unique(of_passage[index.centroids == number])
        np.testing.assert_array_equal(index.lists[start:end], own)


class Killed(BaseException):
    """In the place of SIGKILL: nothing catches it."""


@pytest.mark.parametrize(("place", "number", "done"),
                         [("_array", 1, 0), ("_split", 1, 0), ("_split", 3, 2),
                          ("_write_lists", 1, 5)])  # fmt: skip
def test_goes_on_where_it_was_killed(
    place: str, number: int, done: int, embeddings: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """At the ``number``-th call of a function: the same bytes as without an interrupt, and none of
    the ``done`` shards of five again."""
    whole = content(build(embeddings, tmp_path / "whole", bits=4, num_centroids=20))
    calls: list[str] = []

    def interrupted(name: str, function: Any, last: int | None) -> Any:
        def called(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if calls.count(name) == last:
                raise Killed
            return function(*arguments, **options)

        return called

    with monkeypatch.context() as patched:
        function = getattr(build_token_index, place)
        patched.setattr(build_token_index, place, interrupted(place, function, number))
        with pytest.raises(Killed):
            build(embeddings, tmp_path / "i", bits=4, num_centroids=20)
    assert not (tmp_path / "i").exists()
    calls.clear()
    monkeypatch.setattr(
        build_token_index, "_split", interrupted("_split", build_token_index._split, None)
    )
    assert content(build(embeddings, tmp_path / "i", bits=4, num_centroids=20)) == whole
    assert len(calls) == 5 - done
    assert not (tmp_path / ".i.parts").exists()


def test_parts_of_other_settings_are_not_continued(
    embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(build_token_index, "_write_lists", killed)
        with pytest.raises(Killed):
            build(embeddings, tmp_path / "i", bits=4, num_centroids=20)
    other = build(embeddings, tmp_path / "i", bits=2, num_centroids=20)
    assert content(other) == content(build(embeddings, tmp_path / "j", bits=2, num_centroids=20))


def test_a_killed_process_is_continued(tmp_path: Path) -> None:
    """SIGKILL in the middle of a command, and the command again."""
    write_tokens(tmp_path / "e", clustered(20_000, 7), shard_size=100)
    command = [sys.executable, "-m", "erniesearch", "index", "--embeddings", str(tmp_path / "e"),
               "--num_centroids", "32", "--bits", "4", "--out"]  # fmt: skip
    variables = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([*command, str(tmp_path / "i")], env=variables)
    progress = tmp_path / ".i.parts" / "progress.json"
    while not (progress.is_file() and int(progress.read_text() or 0) >= 3):
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "i").exists()
    done = json.loads(progress.read_text())
    assert 3 <= done < 200
    for name in ("i", "whole"):
        subprocess.run([*command, str(tmp_path / name)], env=variables, check=True)
    assert content(tmp_path / "i") == content(tmp_path / "whole")


def test_defaults_are_plaids(embeddings: Path) -> None:
    assert build_token_index.default_centroids(2_000_000) == 1 << 14  # 16 √n is 22,627
    assert build_token_index.default_centroids(600_000_000) == 1 << 19
    assert build_token_index.default_centroids(10) == 1
    assert build_token_index.default_centroids(160) == 10
    plan = build_token_index.plan_token_index(Embeddings(embeddings), IndexOptions("", ""))
    assert plan.bits == 16
    assert plan.centroids == plan.tokens // 16


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"factory": "Flat"}, "--factory is for one vector a passage, and .* token vectors"),
        ({"shards": 2}, "--shards is for one vector a passage"),
        ({"ef_search": 4}, "--ef_search is for one vector a passage"),
        ({"metric": "l2"}, "--metric is for one vector a passage"),
        ({"gpu": True}, "--gpu is for one vector a passage"),
        ({"num_centroids": 100_000}, "100,000 centroids .* cannot be trained on the collection's"),
        ({"bits": 2, "train_sample": 100}, "256 at least, or fewer --num_centroids"),
    ],
)
def test_options_that_do_not_fit(
    settings: dict[str, Any], problem: str, embeddings: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=problem):
        build(embeddings, tmp_path / "i", **settings)
    assert not (tmp_path / "i").exists()


def test_a_folder_with_something_in_it_stays(embeddings: Path, tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "note").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        build(embeddings, tmp_path / "i")
    assert (tmp_path / "i" / "note").read_text() == "mine"


def test_queries_of_another_size_are_refused(embeddings: Path, tmp_path: Path) -> None:
    index = TokenIndex.load(build(embeddings, tmp_path / "i"))
    with pytest.raises(UserError, match="of 16 dimensions, the query's have 8"):
        index.search([torch.ones(2, 8)], 3)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("codec", "no file 'codec'"),
        ("lists.npy", "no file 'lists.npy'"),
        ("index.json", "no file 'index.json'"),
        ("docid", "docid: 299 entries, expected 300"),
        ("codes.npy", "damaged"),
    ],
)
def test_a_damaged_folder_is_refused(
    name: str, problem: str, embeddings: Path, tmp_path: Path
) -> None:
    path = build(embeddings, tmp_path / "i") / name
    if problem.startswith("no file"):
        path.unlink()
    elif name == "docid":
        path.write_text("".join(f"p{i}\n" for i in range(299)))
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=problem):
        TokenIndex.load(tmp_path / "i")
    shutil.rmtree(tmp_path / "i")


@pytest.mark.parametrize(
    ("depth", "expected"), [(1, 1024), (25, 1024), (100, 4000), (200, 4096), (2000, 8000)]
)
def test_more_passages_are_scored_where_more_are_asked_for(depth: int, expected: int) -> None:
    assert default_candidates(depth) == expected
