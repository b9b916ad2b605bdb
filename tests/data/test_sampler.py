"""Which queries and passages make up a step: a pure function of (seed, step)."""

import numpy as np
import pytest

from erniesearch.data.collection import RetrievalData
from erniesearch.data.sampler import Group, GroupSampler
from erniesearch.errors import UserError

NUM_PASSAGES = 50
HARD = {f"q{i}": [f"p{40 + (i + k) % 10}" for k in range(6)] for i in range(10)}


def collection(num_queries: int = 10, num_passages: int = NUM_PASSAGES) -> RetrievalData:
    """Query i is answered by passages i and i + 20; both are in its qrels, with a third of
    grade 0."""
    qrels = {
        f"q{i}": {f"p{i}": 1, f"p{(i + 20) % num_passages}": 2, f"p{(i + 1) % num_passages}": 0}
        for i in range(num_queries)
    }
    return RetrievalData(
        [f"p{i}" for i in range(num_passages)],
        [f"passage {i}" for i in range(num_passages)],
        {qid: f"query {qid}" for qid in qrels},
        qrels,
    )


def step_groups(sampler: GroupSampler, step: int, world_size: int = 1, micro: int = 1):
    """Groups of a whole update in global order, put together from the ranks' slices."""
    each = sampler.global_batch // (world_size * micro)
    return [
        group
        for micro_step in range(micro)
        for rank in range(world_size)
        for group in sampler.micro_batch(step, micro_step, rank, each, world_size)
    ]


def same(left: list[Group], right: list[Group]) -> bool:
    return len(left) == len(right) and all(
        a.query == b.query
        and np.array_equal(a.passages, b.passages)
        and np.array_equal(a.relevant, b.relevant)
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("negatives", [None, HARD])
def test_step_does_not_depend_on_what_ran_before(negatives: dict[str, list[str]] | None) -> None:
    walked = GroupSampler(collection(), negatives, 3, 8, seed=1)
    trace = [step_groups(walked, step) for step in range(6)]
    for step in reversed(range(6)):
        fresh = GroupSampler(collection(), negatives, 3, 8, seed=1)
        assert same(step_groups(fresh, step), trace[step])


def test_seed_changes_queries_and_passages() -> None:
    first, second = (GroupSampler(collection(), None, 3, 8, seed=s) for s in (1, 2))
    assert list(first.queries(0)) != list(second.queries(0))
    ours, theirs = (sampler.group(0, 0, 4).passages for sampler in (first, second))
    assert list(ours) != list(theirs)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_rank_slices_tile_the_same_global_batch(world_size: int, micro: int) -> None:
    sampler = GroupSampler(collection(), HARD, 2, 8, seed=3)
    for step in (0, 1, 7):
        assert same(step_groups(sampler, step, world_size, micro), step_groups(sampler, step))


def test_no_query_repeats_within_an_epoch() -> None:
    sampler = GroupSampler(collection(), None, 1, 4, seed=5)
    order = np.concatenate([sampler.queries(step) for step in range(10)])
    epochs = order.reshape(4, 10)  # batches of 4 cross the border between passes over 10 queries
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("negatives", [None, HARD])
def test_positive_first_and_relevant_never_a_negative(
    negatives: dict[str, list[str]] | None,
) -> None:
    data = collection()
    if negatives is not None:  # mined files may contain relevant passages: they must not pass
        negatives = {qid: [*data.relevant()[qid], *pids] for qid, pids in negatives.items()}
    sampler = GroupSampler(data, negatives, 4, 10, seed=7)
    positives = set()
    for step in range(30):
        for group in step_groups(sampler, step):
            qid = sampler.qids[group.query]
            relevant = {data.index_of[pid] for pid in data.relevant()[qid]}
            assert set(group.relevant) == relevant
            assert group.passages[0] in relevant
            assert not relevant & set(group.passages[1:])
            assert len(set(group.passages)) == 5
            assert group.passages.dtype == np.int64
            positives.add((qid, group.passages[0]))
    assert len(positives) == 20  # both positives of each query get their turn


def test_hard_negatives_come_from_the_querys_own_list() -> None:
    sampler = GroupSampler(collection(), HARD, 4, 10, seed=7)
    seen: dict[str, set[str]] = {}
    for step in range(20):
        for group in step_groups(sampler, step):
            pids = {f"p{i}" for i in group.passages[1:]}
            qid = sampler.qids[group.query]
            assert pids <= set(HARD[qid])
            seen.setdefault(qid, set()).update(pids)
    assert seen == {qid: set(pids) for qid, pids in HARD.items()}
    assert sampler.num_short == 0


def test_short_lists_are_filled_with_random_passages() -> None:
    short = {"q0": ["p45"], "q1": [], "q2": ["p41", "p42", "p43"]}
    sampler = GroupSampler(collection(), short, 3, 3, seed=0)
    assert sampler.qids == ["q0", "q1", "q2"]
    assert sampler.num_short == 2
    filled = set()
    for step in range(12):
        for group in step_groups(sampler, step):
            hard, rest = short[sampler.qids[group.query]], group.passages[1:]
            assert {f"p{i}" for i in rest} >= set(hard)  # what there is of hard ones is used
            assert len(set(group.passages)) == 4
            assert not set(group.relevant) & set(rest)
            filled |= set(rest)
    assert len(filled) > 20


def test_fill_finds_the_last_passages_of_a_small_corpus() -> None:
    """Two of five passages are relevant: a group of three negatives needs all the others."""
    data = RetrievalData(list("abcde"), list("vwxyz"), {"q": "?"}, {"q": {"b": 1, "d": 1}})
    group = GroupSampler(data, None, 3, 1, seed=0).group(0, 0, 0)
    assert sorted(group.passages[1:]) == [0, 2, 4]


def test_easy_steps_draw_random_negatives_first() -> None:
    sampler = GroupSampler(collection(), HARD, 4, 10, seed=7, easy_steps=5)
    plain = GroupSampler(collection(), None, 4, 10, seed=7)
    hard = GroupSampler(collection(), HARD, 4, 10, seed=7)
    for step in range(10):
        expected = plain if step < 5 else hard
        assert same(step_groups(sampler, step), step_groups(expected, step))


def test_queries_without_an_entry_are_left_out() -> None:
    sampler = GroupSampler(collection(), {"q3": ["p45"], "q8": ["p44"]}, 1, 4, seed=0)
    assert {sampler.qids[q] for q in sampler.queries(0)} == {"q3", "q8"}


def test_batch_larger_than_the_training_set_wraps_around() -> None:
    sampler = GroupSampler(collection(num_queries=3), None, 1, 8, seed=0)
    assert sorted(np.bincount(sampler.queries(0))) == [2, 3, 3]


@pytest.mark.parametrize(("num_negatives", "fits"), [(48, True), (49, False)])
def test_corpus_too_small_for_a_group_is_refused(num_negatives: int, fits: bool) -> None:
    if fits:
        sampler = GroupSampler(collection(), None, num_negatives, 1, seed=0)
        assert len(set(sampler.group(0, 0, 0).passages)) == 49
        return
    with pytest.raises(UserError, match="num_negatives is 49, but the corpus of 50 passages"):
        GroupSampler(collection(), None, num_negatives, 1, seed=0)


def test_negatives_naming_an_unknown_passage_are_refused() -> None:
    with pytest.raises(UserError, match="hard negatives name passage 'elsewhere'"):
        GroupSampler(collection(), {"q0": ["p1", "elsewhere"]}, 1, 1, seed=0)


def test_negatives_of_another_data_set_are_refused() -> None:
    with pytest.raises(UserError, match="name no query of the training split"):
        GroupSampler(collection(), {"other": ["p1"]}, 1, 1, seed=0)
