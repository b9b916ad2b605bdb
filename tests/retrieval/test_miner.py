"""Hard negatives by the dual-encoder: what may be mined, what the teacher drops."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from erniesearch.config.stage_keys import MineConfig
from erniesearch.data.collection import RetrievalData, load_beir
from erniesearch.retrieval.miner import Mined, mine_negatives, spread, statistics
from erniesearch.retrieval.retriever import PairScorer, Retriever


@pytest.fixture(scope="module")
def data(tiny_data: Path) -> RetrievalData:
    """Every query has a second relevant passage, the one after its first."""
    data = load_beir(tiny_data, "train")
    for grades in data.qrels.values():
        first = data.index_of[next(iter(grades))]
        grades[data.pids[(first + 1) % len(data.pids)]] = 1
    return data


class TableRetriever(Retriever):
    """A student whose vectors are whole numbers: inner products are exact on every machine."""

    reads_stored_tokens = False

    def __init__(self, data: RetrievalData) -> None:
        rng = np.random.default_rng(0)
        texts = [*data.passages, *data.queries.values()]
        self.table = {text: rng.integers(-200, 200, size=8) for text in texts}

    def vectors(self, texts: list[str], side: str) -> np.ndarray:
        return np.array([self.table[text] for text in texts], dtype=np.float32)


@pytest.fixture(scope="module")
def retriever(data: RetrievalData) -> Retriever:
    return TableRetriever(data)


@pytest.fixture(scope="module")
def ranking(data: RetrievalData, retriever: Retriever) -> dict[str, list[str]]:
    """All passages that are not relevant, by inner product, best first."""
    passages = retriever.vectors(data.passages, "passage")
    relevant = data.relevant()
    return {
        qid: [pid for i in np.argsort(-(passages @ vector), kind="stable")
              if (pid := data.pids[i]) not in relevant[qid]]
        for qid, vector in zip(
            data.queries, retriever.vectors(list(data.queries.values()), "query"), strict=True
        )
    }  # fmt: skip


class TableScorer(PairScorer):
    """A teacher whose score of a passage is looked up by its text."""

    reads_stored_tokens = False

    def __init__(self, table: dict[str, float]) -> None:
        self.table = table

    def scores(self, queries: list[str], passages: list[str]) -> np.ndarray:
        return np.array([self.table[passage] for passage in passages], dtype=np.float32)


def mine(
    data: RetrievalData, retriever: Retriever, scorer: PairScorer | None = None, **settings: object
) -> Mined:
    return mine_negatives(data, retriever, scorer, MineConfig(**settings), seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("depth", "skip_top", "kept"), [(10, 0, 10), (10, 0, 4), (10, 3, 10), (10, 9, 5), (500, 0, 500)]
)
def test_windows_of_depth_and_skip_top(
    data: RetrievalData, retriever: Retriever, ranking: dict[str, list[str]],
    depth: int, skip_top: int, kept: int,
) -> None:  # fmt: skip
    mined = mine(data, retriever, depth=depth, skip_top=skip_top, num_negatives=kept)
    assert mined.negatives == {q: pids[skip_top:depth][:kept] for q, pids in ranking.items()}
    assert mined.num_candidates == sum(len(pids[skip_top:depth]) for pids in ranking.values())
    assert mined.num_denoised == 0


def test_relevant_passages_are_never_mined(data: RetrievalData, retriever: Retriever) -> None:
    mined = mine(data, retriever, depth=500, num_negatives=500)
    relevant = data.relevant()
    for qid, pids in mined.negatives.items():
        assert set(pids) == set(data.pids) - set(relevant[qid])


@pytest.mark.parametrize("margin", [0.0, 0.5, -0.5])
def test_denoising_drops_what_the_teacher_scores_above_the_positive(
    data: RetrievalData, retriever: Retriever, ranking: dict[str, list[str]], margin: float
) -> None:
    table = dict(zip(data.passages, np.random.default_rng(0).normal(size=60), strict=True))
    table = {text: float(np.float32(score)) for text, score in table.items()}
    mined = mine(
        data, retriever, TableScorer(table), depth=30, num_negatives=100, denoise_margin=margin
    )
    score_of = {pid: table[text] for pid, text in zip(data.pids, data.passages, strict=True)}
    relevant = data.relevant()
    dropped = 0
    for qid, pids in ranking.items():
        threshold = max(score_of[pid] for pid in relevant[qid]) - margin
        expected = [pid for pid in pids[:30] if score_of[pid] <= threshold]
        assert mined.negatives[qid] == expected  # in the dual-encoder's order
        dropped += 30 - len(expected)
    assert 0 < dropped == mined.num_denoised < mined.num_candidates == 30 * len(ranking)


def test_a_candidate_equal_to_the_positive_stays(data: RetrievalData, retriever: Retriever) -> None:
    mined = mine(data, retriever, TableScorer(dict.fromkeys(data.passages, 1.0)), depth=10)
    assert mined.num_denoised == 0


def test_a_query_that_keeps_none_stays_with_an_empty_list(
    data: RetrievalData, retriever: Retriever
) -> None:
    table = dict.fromkeys(data.passages, 1.0)
    for pids in data.relevant().values():
        table |= {data.passages[data.index_of[pid]]: 0.0 for pid in pids}
    others = [pid for pid, text in zip(data.pids, data.passages, strict=True) if table[text] == 1.0]
    mined = mine(data, retriever, TableScorer(table), depth=10, num_negatives=10)
    assert set(mined.negatives) == set(data.queries)
    assert not {pid for pids in mined.negatives.values() for pid in pids} & set(others)
    everything = mine(
        data, retriever, TableScorer(table), depth=10, num_negatives=10, denoise_margin=1.0
    )
    assert set(everything.negatives) == set(data.queries)
    assert not any(everything.negatives.values())
    assert everything.num_denoised == everything.num_candidates


def test_null_margin_does_not_ask_the_teacher(
    data: RetrievalData, retriever: Retriever, ranking: dict[str, list[str]]
) -> None:
    mined = mine(data, retriever, TableScorer({}), depth=5, denoise_margin=None)
    assert mined.negatives == {qid: pids[:5] for qid, pids in ranking.items()}


def test_max_queries_draws_the_same_queries_every_time(
    data: RetrievalData, retriever: Retriever, ranking: dict[str, list[str]]
) -> None:
    first = mine(data, retriever, depth=5, max_queries=9)
    assert len(first.negatives) == 9
    assert first == mine(data, retriever, depth=5, max_queries=9)
    assert first.negatives == {qid: ranking[qid][:5] for qid in first.negatives}
    other = mine_negatives(data, retriever, None, MineConfig(depth=5, max_queries=9), seed=1)
    assert set(other.negatives) != set(first.negatives)


def test_a_copy_of_the_positive_is_no_negative(data: RetrievalData) -> None:
    """The same text under another id, white space aside; its place goes to the next candidate."""
    qid = next(iter(data.relevant()))
    positive = data.passages[data.index_of[data.relevant()[qid][0]]]
    copies = {f"copy{i}": "  ".join(positive.split()) + " " * i for i in range(3)}
    larger = RetrievalData(
        [*data.pids, *copies], [*data.passages, *copies.values()], data.queries,
        {qid: data.qrels[qid]},
    )  # fmt: skip
    table = TableRetriever(larger)
    for text in copies.values():
        table.table[text] = table.table[data.queries[qid]] * 1000  # ranked first
    mined = mine(larger, table, depth=10, num_negatives=10)
    assert not set(mined.negatives[qid]) & set(copies)
    assert len(mined.negatives[qid]) == 10
    assert statistics(mined.queries)["dropped_as_duplicates"] == 3


@pytest.mark.parametrize("margin", [None, 0.0])
def test_an_absolute_threshold_drops_too(
    data: RetrievalData, retriever: Retriever, ranking: dict[str, list[str]], margin: float | None
) -> None:
    scores = np.random.default_rng(0).normal(size=60).astype(np.float32)
    table = dict(zip(data.passages, scores.tolist(), strict=True))
    settings = {"depth": 30, "num_negatives": 100, "denoise_margin": margin}
    mined = mine(data, retriever, TableScorer(table), denoise_threshold=0.25, **settings)
    score_of = {pid: table[text] for pid, text in zip(data.pids, data.passages, strict=True)}
    for qid, pids in ranking.items():
        limit = 0.25
        if margin is not None:
            limit = min(limit, max(score_of[pid] for pid in data.relevant()[qid]))
        assert mined.negatives[qid] == [pid for pid in pids[:30] if score_of[pid] <= limit]
    assert mined.num_denoised > 0


@pytest.mark.parametrize("shift", [3.0, -3.0, 0.0], ids=["positive", "negative", "both"])
@pytest.mark.parametrize("relative", [0.0, 0.25, 1.0])
def test_a_relative_margin_drops_a_share_below_the_positive(
    data: RetrievalData, retriever: Retriever, ranking: dict[str, list[str]], shift: float,
    relative: float,
) -> None:  # fmt: skip
    """By hand, and never a limit above the positive's score, whatever its sign."""
    scores = (np.random.default_rng(0).normal(size=60) + shift).astype(np.float32)
    table = dict(zip(data.passages, scores.tolist(), strict=True))
    settings = {"depth": 30, "num_negatives": 100, "denoise_margin": None}
    mined = mine(data, retriever, TableScorer(table), denoise_relative_margin=relative, **settings)
    score_of = {pid: table[text] for pid, text in zip(data.pids, data.passages, strict=True)}
    for qid, pids in ranking.items():
        best = max(score_of[pid] for pid in data.relevant()[qid])
        limit = best * (1 - relative) if best >= 0 else best * (1 + relative)
        assert mined.negatives[qid] == [pid for pid in pids[:30] if score_of[pid] <= limit]
        assert limit <= best
    assert mined.num_denoised > 0
    whole = mine(data, retriever, TableScorer(table), **(settings | {"denoise_margin": 0.0}))
    assert (mined == whole) == (relative == 0.0)
    # Two limits at once: the lower one counts.
    both = mine(data, retriever, TableScorer(table), denoise_relative_margin=relative,
                denoise_threshold=shift, **settings)  # fmt: skip
    for qid, pids in both.negatives.items():
        assert pids == [pid for pid in mined.negatives[qid] if score_of[pid] <= shift]


def test_blocks_change_nothing(
    data: RetrievalData, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mine(data, retriever, depth=10)
    monkeypatch.setattr("erniesearch.retrieval.miner.QUERIES_PER_BLOCK", 7)
    assert mine(data, retriever, depth=10) == whole


def test_statistics_count_what_was_kept_and_dropped(
    data: RetrievalData, retriever: Retriever
) -> None:
    table = dict(zip(data.passages, np.random.default_rng(0).normal(size=60).tolist(), strict=True))
    mined = mine(data, retriever, TableScorer(table), depth=60, num_negatives=5)
    facts = statistics(mined.queries)
    queries = len(data.relevant())
    assert facts["queries"] == queries
    assert facts["candidates"] == 58 * queries
    assert facts["dropped_as_positives"] == 2 * queries  # all are found at this depth
    assert facts["negatives"] == sum(map(len, mined.negatives.values())) <= 5 * queries
    for name in ("dual_encoder_scores", "teacher_scores"):
        assert sum(facts[name]["negatives"]["counts"]) == facts["negatives"]
        assert sum(facts[name]["positives"]["counts"]) == 2 * queries
        assert len(facts[name]["bin_edges"]) == 21
    dropped = facts["teacher_scores"]["dropped"]
    assert sum(dropped["counts"]) == facts["dropped_by_teacher"] > 0
    for query in mined.queries:
        limit = max(query.teacher_positive_scores)
        assert all(score > limit for score in query.teacher_dropped_scores)
    assert dropped["mean"] > facts["teacher_scores"]["negatives"]["mean"]
    hardest = mined.queries[0]
    assert hardest.scores == sorted(hardest.scores, reverse=True)
    means = facts["dual_encoder_scores"]
    vectors = retriever.vectors([data.queries[q.qid] for q in mined.queries], "query")
    expected = [
        float(vector @ retriever.table[data.passages[data.index_of[pid]]])
        for vector, query in zip(vectors, mined.queries, strict=True) for pid in query.negatives
    ]  # fmt: skip
    assert means["negatives"]["mean"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_spread_covers_the_range_of_scores_evenly() -> None:
    # Wanted: 9, 5, 1. Between 5 and 1 lies nothing, so 5 takes its nearest that is left.
    assert spread([9.0, 8.9, 8.8, 6.0, 1.0, 1.2], 3) == [0, 3, 4]
    assert spread([1.0, 3.0, 2.0, 3.0], 2) == [0, 1]  # of equal ones the first
    assert spread([4.0, 4.0, 4.0], 2) == [0, 1]
    assert spread([1.0, 5.0, 3.0], 1) == [1]
    assert spread([1.0, 5.0, 3.0], 3) == [0, 1, 2]


def test_selections_from_what_denoising_leaves(
    data: RetrievalData, retriever: Retriever, ranking: dict[str, list[str]]
) -> None:
    scores = np.random.default_rng(0).normal(size=60).tolist()
    table = dict(zip(data.passages, scores, strict=True))
    score_of = dict(zip(data.pids, scores, strict=True))
    settings = {"depth": 20, "num_negatives": 4, "denoise_margin": None, "denoise_threshold": 0.5}
    found = {
        selection: mine(data, retriever, TableScorer(table), selection=selection, **settings)
        for selection in ("top", "random", "spread")
    }
    for qid, pids in ranking.items():
        window = [pid for pid in pids[:20] if score_of[pid] <= 0.5]
        assert found["top"].negatives[qid] == window[:4]
        chosen = spread([score_of[pid] for pid in window], 4)
        assert found["spread"].negatives[qid] == [window[i] for i in chosen]
        drawn = found["random"].negatives[qid]
        assert len(drawn) == 4
        assert drawn == [pid for pid in window if pid in drawn]  # best first, from the window
    for query in found["random"].queries:
        assert query.teacher_scores == [np.float32(score_of[pid]) for pid in query.negatives]
    places = [ranking[qid].index(pid) for qid, own in found["random"].negatives.items()
              for pid in own]  # fmt: skip
    assert max(places) > 15
    again = mine(data, retriever, TableScorer(table), selection="random", **settings)
    assert again == found["random"]
    other = MineConfig(selection="random", **settings)  # type: ignore[arg-type]
    assert mine_negatives(data, retriever, TableScorer(table), other, seed=1) != again
    # The same whoever mines for a query, and with whom.
    few = mine_negatives(
        data, retriever, TableScorer(table), replace(other, max_queries=5), seed=0
    )  # fmt: skip
    assert all(again.negatives[qid] == own for qid, own in few.negatives.items())
    # spread asks the teacher even where nothing is denoised.
    wide = mine(data, retriever, TableScorer(table), selection="spread", depth=20,
                num_negatives=4, denoise_margin=None)  # fmt: skip
    assert wide.num_denoised == 0
    assert wide != found["spread"]
