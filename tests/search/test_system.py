"""The search system against plain computations with the same models, and under many callers."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.finished_run import write_run
from support.tiny import ALL_TERMS

from erniesearch.config.stage_keys import LossWeights
from erniesearch.data.collection import RetrievalData
from erniesearch.errors import UserError
from erniesearch.search.explain import match_tokens
from erniesearch.search.merging import MergingQueue
from erniesearch.search.result import MODELS, SearchResult
from erniesearch.search.system import SearchSystem, UnknownPassageError

QUERY = "baran desel fitor"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, tiny_data, tiny_model, ALL_TERMS)
    return folder


@pytest.fixture(scope="module")
def system(run_dir: Path) -> SearchSystem:
    return SearchSystem.from_run(run_dir)


def assert_same(found: SearchResult, expected: SearchResult) -> None:
    """Equal up to rounding: a batch of another size may round scores another way."""
    assert found.query == expected.query
    for model in MODELS:
        ours, theirs = found.rankings[model], expected.rankings[model]
        scores = [hit.scores[model] for hit in ours]
        assert scores == pytest.approx([hit.scores[model] for hit in theirs], abs=2e-3)
        both = {hit.pid for hit in ours} & {hit.pid for hit in theirs}
        assert len(both) >= len(ours) - 1  # the last place may be a tie
    assert len(found.hits) == len(expected.hits)


# --- search -------------------------------------------------------------------------------------


def test_scores_are_those_of_the_models(system: SearchSystem) -> None:
    result = system.search(QUERY, depth=60, late_interaction_depth=40, cross_encoder_depth=15)
    assert len(result.hits) == 60
    retriever, scorer = system.retriever, system.scorer
    assert scorer is not None
    query_vector = retriever.vectors([QUERY], "query")[0]
    query_tokens = retriever.tokens([QUERY], "query")[0].float().numpy()
    num_scored = dict.fromkeys(MODELS, 0)
    for hit in result.hits:
        text = system.data.passages[system.data.index_of[hit.pid]]
        assert hit.text == text
        tokens = retriever.tokens([text], "passage")[0].float().numpy()
        expected = {
            "dual_encoder": query_vector @ retriever.vectors([text], "passage")[0],
            "late_interaction": (query_tokens @ tokens.T).max(1).sum(),
            "cross_encoder": scorer.scores([QUERY], [text])[0],
        }
        for model in MODELS:
            assert (hit.scores[model] is None) == (hit.ranks[model] is None)
            if hit.scores[model] is not None:
                num_scored[model] += 1
                assert hit.scores[model] == pytest.approx(float(expected[model]), abs=2e-3)
    assert num_scored == {"dual_encoder": 60, "late_interaction": 40, "cross_encoder": 15}


def test_each_model_orders_the_best_of_the_one_before(system: SearchSystem) -> None:
    result = system.search(QUERY, depth=60, late_interaction_depth=40, cross_encoder_depth=15)
    by_rank = {
        model: sorted(
            (hit for hit in result.hits if hit.ranks[model]), key=lambda h: h.ranks[model] or 0
        )
        for model in MODELS
    }
    for model, hits in by_rank.items():
        assert [hit.ranks[model] for hit in hits] == list(range(1, len(hits) + 1))
        scores = [hit.scores[model] or 0.0 for hit in hits]
        assert scores == sorted(scores, reverse=True)
        assert result.rankings[model] == hits
    pids = {model: [hit.pid for hit in hits] for model, hits in by_rank.items()}
    assert set(pids["late_interaction"]) == set(pids["dual_encoder"][:40])
    assert set(pids["cross_encoder"]) == set(pids["late_interaction"][:15])
    rest = [pid for pid in pids["dual_encoder"] if pid not in pids["late_interaction"]]
    assert [hit.pid for hit in result.hits] == (
        pids["cross_encoder"] + pids["late_interaction"][15:] + rest
    )
    assert pids["dual_encoder"][:15] != pids["late_interaction"][:15] != pids["cross_encoder"]


def test_depth_cuts_hits_and_rankings(system: SearchSystem) -> None:
    result = system.search(QUERY, depth=3, late_interaction_depth=40, cross_encoder_depth=15)
    assert [len(result.hits), *map(len, result.rankings.values())] == [3, 3, 3, 3]
    best = result.rankings["dual_encoder"][0]
    assert best.ranks["dual_encoder"] == 1
    ranks = [hit.ranks["dual_encoder"] or 0 for hit in result.hits]
    assert max(ranks) > 3  # a reranker brought something up that the dual-encoder ranks lower


def test_a_depth_of_0_leaves_a_model_out(system: SearchSystem) -> None:
    dense = system.search(QUERY, depth=5, late_interaction_depth=0, cross_encoder_depth=0)
    assert dense.hits == dense.rankings["dual_encoder"]
    assert dense.rankings["late_interaction"] == dense.rankings["cross_encoder"] == []
    assert all(hit.scores["cross_encoder"] is None for hit in dense.hits)
    crossed = system.search(QUERY, depth=5, late_interaction_depth=0, cross_encoder_depth=9)
    assert {hit.ranks["late_interaction"] for hit in crossed.hits} == {None}
    pool = system.search(QUERY, depth=9, late_interaction_depth=0, cross_encoder_depth=0)
    ranked = system.search(QUERY, depth=9, late_interaction_depth=0, cross_encoder_depth=9)
    assert {hit.pid for hit in ranked.hits} == {hit.pid for hit in pool.hits}


def test_many_queries_are_each_as_one(system: SearchSystem) -> None:
    queries = ["baran", QUERY, "nozul kuhod lapat mivix", "baran"]
    results = system.search_many(queries, depth=10)
    assert [result.query for result in results] == queries
    for query, result in zip(queries, results, strict=True):
        assert_same(result, system.search(query, depth=10))
    assert system.search_many([]) == []


def test_a_long_query_is_cut_and_says_so(system: SearchSystem) -> None:
    short = system.search("baran desel fitor gowen kuhod lapat")  # 6 words: 8 tokens
    assert (short.query_truncated, short.query_tokens, short.query_tokens_read) == (False, 8, 8)
    long = system.search("baran desel fitor gowen kuhod lapat mivix nozul")
    assert (long.query_truncated, long.query_tokens, long.query_tokens_read) == (True, 10, 8)
    assert_same(replace(long, query=short.query), short)


def test_steps_come_model_by_model_and_end_as_the_search_does(system: SearchSystem) -> None:
    depths = {"depth": 7, "late_interaction_depth": 20, "cross_encoder_depth": 12}
    expected = system.search(QUERY, **depths)
    steps = list(system.search_steps(QUERY, **depths))
    done = [step for step in steps if step.result is not None]
    assert [step.model for step in done] == list(MODELS)
    assert [(step.done, step.total) for step in done] == [(20, 20), (20, 20), (12, 12)]
    assert steps[-1] is done[-1]
    for step, model in zip(done, MODELS, strict=True):
        assert step.result is not None
        ready = MODELS[: MODELS.index(model) + 1]
        assert [bool(step.result.rankings[own]) for own in MODELS] == [m in ready for m in MODELS]
        for own in ready:
            assert [hit.pid for hit in step.result.rankings[own]] == [
                hit.pid for hit in expected.rankings[own]
            ]
    assert done[-1].result is not None
    assert_same(done[-1].result, expected)
    assert [hit.pid for hit in done[-1].result.hits] == [hit.pid for hit in expected.hits]


def test_a_slow_model_tells_how_far_it_is_and_lets_others_in(
    system: SearchSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erniesearch.search.system.MOMENT", 1e-9)  # every model is slow
    steps = system.search_steps(QUERY, 5, 0, 3)
    dense = next(steps)
    assert (dense.model, dense.result is not None) == ("dual_encoder", True)
    told = next(steps)
    assert (told.model, told.done, told.total, told.result) == ("cross_encoder", 1, 3, None)
    assert system.search("fitor", 5).hits  # between two parts
    assert [step.done for step in steps] == [2, 3]


def test_an_odd_search_is_refused_before_its_first_step(system: SearchSystem) -> None:
    with pytest.raises(UserError, match="the query is empty"):
        system.search_steps(" ")
    with pytest.raises(UserError, match="depth is 0"):
        system.search_steps(QUERY, depth=0)
    with pytest.raises(UserError, match="no character that the tokenizer knows"):
        next(system.search_steps("\u200b"))


# --- explain ------------------------------------------------------------------------------------


def test_similarities_add_up_to_the_late_interaction_score(system: SearchSystem) -> None:
    result = system.search(QUERY, depth=20, cross_encoder_depth=0)
    for hit in result.hits:
        matches = system.explain(QUERY, hit.pid)
        total = sum(match.similarity for match in matches)
        assert total == pytest.approx(hit.scores["late_interaction"], abs=2e-3)


def test_winners_are_the_most_similar_tokens(system: SearchSystem) -> None:
    retriever = system.retriever
    passage = "Fitor, DESEL; gowen 𝔘baran kuhod"  # a character outside the basic plane
    matches = match_tokens(retriever, QUERY, passage)
    assert [match.query.text for match in matches] == ["[CLS]", *QUERY.split(), "[SEP]"]
    assert [match.query.special for match in matches] == [True, False, False, False, True]
    similarity = (
        retriever.tokens([QUERY], "query")[0].float()
        @ retriever.tokens([passage], "passage")[0].float().T
    )
    words = ["[CLS]", "Fitor", ",", "DESEL", ";", "gowen", "𝔘baran", "kuhod", "[SEP]"]
    assert similarity.shape[1] == len(words)
    for row, match in zip(similarity.numpy(), matches, strict=True):
        assert match.passage.text == words[int(np.argmax(row))]
        assert match.similarity == pytest.approx(float(row.max()))
        for token, text in ((match.query, QUERY), (match.passage, passage)):
            assert token.special or text[token.start : token.end] == token.text
    assert len({match.passage.text for match in matches}) > 1


def test_only_tokens_that_are_read_can_match(system: SearchSystem) -> None:
    long = "baran desel fitor gowen kuhod lapat mivix nozul"
    matches = match_tokens(system.retriever, long, " ".join(["baran desel"] * 20))
    assert [match.query.text for match in matches] == ["[CLS]", *long.split()[:6], "[SEP]"]
    assert max(match.passage.end for match in matches) <= 14 * 6


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["", " \t\n", "\u200b"])
def test_a_query_without_words_is_refused(system: SearchSystem, query: str) -> None:
    with pytest.raises(UserError, match="the query "):
        system.search(query)
    with pytest.raises(UserError, match="the query "):
        system.search_many([QUERY, query])
    with pytest.raises(UserError, match="the query "):
        system.explain(query, "p1")


def test_odd_depths_are_refused(system: SearchSystem) -> None:
    with pytest.raises(UserError, match="depth is 0: must be 1 or more"):
        system.search(QUERY, depth=0)
    with pytest.raises(UserError, match="cross_encoder_depth is -1: must be 0 or more"):
        system.search(QUERY, cross_encoder_depth=-1)


def test_an_unknown_passage_is_refused(system: SearchSystem) -> None:
    with pytest.raises(UnknownPassageError, match="no passage 'p60' in the collection"):
        system.explain(QUERY, "p60")


def test_models_that_were_not_trained_are_left_out(
    tmp_path: Path, tiny_data: Path, tiny_model: Path
) -> None:
    write_run(tmp_path, tiny_data, tiny_model, LossWeights(de=1.0))
    system = SearchSystem.from_run(tmp_path)
    assert system.models == ("dual_encoder",)
    result = system.search(QUERY)
    assert len(result.hits) == 10
    assert result.hits == result.rankings["dual_encoder"]
    with pytest.raises(UserError, match="no trained late-interaction model: set it to 0"):
        system.search(QUERY, late_interaction_depth=5)
    with pytest.raises(UserError, match="no trained cross-encoder model: set it to 0"):
        system.search(QUERY, cross_encoder_depth=5)
    with pytest.raises(UserError, match="need late interaction"):
        system.explain(QUERY, "p1")


def test_the_cross_encoder_can_stay_unloaded(run_dir: Path) -> None:
    system = SearchSystem.from_run(run_dir, cross_encoder=False)
    assert system.models == ("dual_encoder", "late_interaction")


def test_an_index_of_another_collection_is_refused(system: SearchSystem) -> None:
    other = RetrievalData(system.data.pids[:-1], system.data.passages[:-1], {}, {})
    with pytest.raises(UserError, match="passage 'p59', which the collection does not have"):
        SearchSystem(system.retriever, system.index, other)


@pytest.mark.parametrize(
    ("remove", "problem"),
    [
        ("config.yaml", "config.yaml: no such file; --run names the folder of a finished run"),
        ("stages", "the run has no trained student"),
        ("index", "the run has no index yet; finish it with `erniesearch run "),
    ],
)
def test_an_unfinished_run_is_refused(
    remove: str, problem: str, run_dir: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    if (copy / remove).is_dir():
        shutil.rmtree(copy / remove)
    else:
        (copy / remove).unlink()
    with pytest.raises(UserError, match=problem):
        SearchSystem.from_run(copy)


def test_a_collection_that_moved_is_refused(run_dir: Path, tmp_path: Path, tiny_data: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace(str(tiny_data), "data/moved"))
    with pytest.raises(UserError, match=r"data/moved: no such folder; a run's data.path is rela"):
        SearchSystem.from_run(copy)
    (copy / "config.yaml").write_text(text.replace("seed: 42", "seed: soon"))
    with pytest.raises(UserError, match=r"config\.yaml: .*seed"):
        SearchSystem.from_run(copy)


# --- many callers -------------------------------------------------------------------------------


def test_threads_get_the_answers_to_their_own_queries(system: SearchSystem) -> None:
    queries = [*system.data.queries.values()] * 2
    alone = [system.search(query, depth=5) for query in queries]
    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(system.search, query, 5) for query in queries]
        explained = [pool.submit(system.explain, query, "p3") for query in queries]
        odd = [pool.submit(system.search, "\u200b", 5) for _ in range(8)]
        for future, expected in zip(futures, alone, strict=True):
            assert_same(future.result(), expected)
        for future, query in zip(explained, queries, strict=True):
            assert future.result() == system.explain(query, "p3")
        for future in odd:  # merged with good queries, which do not suffer
            with pytest.raises(UserError):
                future.result()


def test_waiting_calls_of_one_key_are_done_together_in_order() -> None:
    queue = MergingQueue(limit=3)
    begun, go, batches = threading.Event(), threading.Event(), []

    def work(items: list[int]) -> list[int]:
        batches.append(list(items))
        if len(batches) == 1:
            begun.set()
            assert go.wait(60)
        if 13 in items:
            raise ValueError("13")
        return [item * 10 for item in items]

    with ThreadPoolExecutor(16) as pool:
        futures = {0: pool.submit(queue.call, "a", 0, work)}
        assert begun.wait(60)
        for item in (1, 2, 100, 3, 4, 13, 5):
            futures[item] = pool.submit(queue.call, "b" if item == 100 else "a", item, work)
            while len(queue._waiting) < len(futures) - 1:
                pass
        go.set()
        with pytest.raises(ValueError, match="13"):
            futures.pop(13).result()
        assert {item: future.result() for item, future in futures.items()} == {
            item: item * 10 for item in futures
        }
    # 4, 13 and 5 fail together, then each is done alone.
    assert batches == [[0], [1, 2, 3], [100], [4, 13, 5], [4], [13], [5]]
