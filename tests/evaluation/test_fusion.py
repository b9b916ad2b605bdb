"""Reciprocal rank fusion against values by hand."""

import pytest

from erniesearch.evaluation.fusion import reciprocal_rank_fusion


def test_values_by_hand() -> None:
    lexical = {"q": {"a": 9.0, "b": 7.0, "c": 5.0}, "only": {"x": 1.0}}
    dense = {"q": {"c": 0.9, "a": 0.8, "d": 0.7}}
    fused = reciprocal_rank_fusion([lexical, dense], depth=10)
    assert fused["q"] == pytest.approx(
        {"a": 1 / 61 + 1 / 62, "c": 1 / 63 + 1 / 61, "b": 1 / 62, "d": 1 / 63}
    )
    assert list(fused["q"]) == ["a", "c", "b", "d"]
    assert fused["only"] == pytest.approx({"x": 1 / 61})
    assert list(reciprocal_rank_fusion([lexical, dense], depth=2)["q"]) == ["a", "c"]


def test_scales_do_not_count_and_k_does() -> None:
    one = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}
    other = {"q": {"b": 2e6, "c": 1e6}}
    small = {"q": {"b": 2e-6, "c": 1e-6}}
    assert reciprocal_rank_fusion([one, other], 5) == reciprocal_rank_fusion([one, small], 5)
    # First and third against second twice: near k = 0 the first place wins, far from it the sum.
    runs = [{"q": {"a": 3.0, "b": 2.0, "x": 1.0}}, {"q": {"x": 3.0, "b": 2.0, "a": 1.0}}]
    assert list(reciprocal_rank_fusion(runs, 5, k=0)["q"]) == ["a", "x", "b"]
    assert reciprocal_rank_fusion(runs, 5, k=0)["q"]["b"] == 1.0


def test_equal_scores_go_by_pid() -> None:
    fused = reciprocal_rank_fusion([{"q": {"b": 1.0, "a": 1.0}}, {"q": {"a": 0.5}}], 5)
    assert fused["q"] == pytest.approx({"a": 2 / 61, "b": 1 / 62})
