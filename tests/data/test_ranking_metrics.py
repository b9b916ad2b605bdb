"""Metrics by name, what the mean goes over, and paired tests against published formulas."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from support.rankings import random_run

from erniesearch.data.ranking_metrics import averaged_queries, parse_metrics, per_query
from erniesearch.errors import UserError
from erniesearch.evaluation.significance import compare

QRELS = {"a": {"x": 1}, "b": {"y": 2, "z": 1}, "c": {"x": 1}}
RUN = {"a": {"n": 2.0, "x": 1.0}, "b": {"z": 3.0, "n": 2.0, "y": 1.0}, "elsewhere": {"x": 1.0}}


def values(names: str) -> dict[str, list[float]]:
    found = per_query(RUN, QRELS, list(QRELS), parse_metrics(names))
    return {name: by_query.tolist() for name, by_query in found.items()}


def test_metrics_by_hand() -> None:
    found = values("mrr@10,MRR@1,R@1,recall@2,success@1,Success@2,map,P@2,RR,R(rel=2)@2,ndcg@10")
    assert list(found) == ["MRR@10", "MRR@1", "R@1", "R@2", "success@1", "success@2", "MAP",
                           "P@2", "MRR", "R(rel=2)@2", "nDCG@10"]  # fmt: skip
    assert found["MRR@10"] == found["MRR"] == [0.5, 1.0, 0.0]
    assert found["MRR@1"] == [0.0, 1.0, 0.0]
    assert found["R@1"] == [0.0, 0.5, 0.0]
    assert found["R@2"] == [1.0, 0.5, 0.0]
    assert found["success@1"] == [0.0, 1.0, 0.0]
    assert found["success@2"] == [1.0, 1.0, 0.0]
    assert found["MAP"] == pytest.approx([0.5, (1 + 2 / 3) / 2, 0.0])
    assert found["P@2"] == [0.5, 0.5, 0.0]
    assert found["R(rel=2)@2"] == [0.0, 0.0, 0.0]
    assert found["nDCG@10"] == pytest.approx(
        [1 / math.log2(3), (1 + 2 / 2) / (2 + 1 / math.log2(3)), 0.0]
    )


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ("MRR@10,rr@10", "MRR@10 stands twice"),
        ("bogus@3", "bogus@3: unknown; known are MRR"),
        ("R", "R: give a cutoff, for example R@10"),
        ("answer", "give a cutoff, for example A@20"),
        ("R@0", "the cutoff must be 1 or more"),
        ("", "no metric"),
        ("R(rel='x')@3", "unknown"),
        ("R@ten", "unknown"),
        ("__import__('os')", "unknown"),
    ],
)
def test_an_unknown_metric_is_refused(names: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        parse_metrics(names)


def test_the_mean_of_ms_marco_and_of_trec_eval() -> None:
    metrics = parse_metrics("MRR@10")
    means = {}
    for mean in ("qrels", "run"):
        qids = averaged_queries([RUN], QRELS, mean)
        means[mean] = per_query(RUN, QRELS, qids, metrics)["MRR@10"].mean()
    assert means["qrels"] == pytest.approx(1.5 / 3)  # query c has no results and counts as 0
    assert means["run"] == pytest.approx(1.5 / 2)
    assert averaged_queries([RUN, {"a": {"x": 1.0}, "b": {}}], QRELS, "run") == ["a"]


def test_p_values_are_those_of_the_formulas() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random(9), rng.random(9)
    d = second - first
    found = compare(second, first, seed=1)
    assert found.num_queries == 9
    assert found.difference == pytest.approx(d.mean())
    t = d.mean() / (d.std(ddof=1) / 3)
    assert found.p_t_test == pytest.approx(2 * stats.t.sf(abs(t), 8))
    flipped = [abs(np.mean(d * signs)) for signs in itertools.product((1, -1), repeat=9)]
    assert found.p_randomisation == pytest.approx(
        np.mean([value >= abs(d.mean()) - 1e-12 for value in flipped])
    )


def test_randomisation_repeats_and_agrees_with_the_t_test_on_many_queries() -> None:
    rng = np.random.default_rng(2)
    first = rng.random(400)
    second = first + rng.normal(0.02, 0.2, 400)
    found = compare(second, first, seed=3)
    assert found == compare(second, first, seed=3)
    assert found.p_randomisation != compare(second, first, seed=4).p_randomisation
    assert found.p_randomisation == pytest.approx(found.p_t_test, abs=0.02)
    back = compare(first, second, seed=3)
    assert back.difference == -found.difference
    assert back.p_t_test == pytest.approx(found.p_t_test)


def test_equal_systems_do_not_differ() -> None:
    run, qrels = random_run()
    scores = per_query(run, qrels, list(qrels), parse_metrics("nDCG@10"))["nDCG@10"]
    found = compare(scores, scores, seed=0)
    assert (found.difference, found.p_t_test, found.p_randomisation) == (0.0, 1.0, 1.0)
