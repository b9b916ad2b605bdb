"""The CPU backend against the reference on shapes and values that Hypothesis picks."""

import pytest
import torch
from support.kernel_cases import Where, assert_close, differentiate, poison
from support.kernel_checks import FORMS, build_kl, check_maxsim, check_varlen

pytest.importorskip("hypothesis")
from hypothesis import example, given, settings
from hypothesis import strategies as st


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(
        st.integers(1, 6), st.integers(1, 40), st.integers(1, 6), st.integers(1, 70),
        st.sampled_from([1, 3, 16, 33]),
    ),
    group=st.booleans(), masks=st.booleans(), normalize=st.booleans(),
    seed=st.integers(0, 1000),
)  # fmt: skip
@example(shape=(1, 2, 1, 3, 1), group=True, masks=True, normalize=False, seed=2)
def test_maxsim(
    shape: tuple[int, ...], group: bool, masks: bool, normalize: bool, seed: int
) -> None:
    # In float64, so that near-ties resolve alike and every difference is a mistake. A normalised
    # token of one number is 1 or -1: its gradient is 0 and has no relative error.
    normalize = normalize and shape[-1] > 1
    check_maxsim(
        Where("torch", "cpu"), shape, torch.float64,
        group=group, masks=masks, normalize=normalize, kind="normal", seed=seed,
    )  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(
    query_lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    passage_lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
)
def test_varlen(query_lengths: list[int], passage_lengths: list[int]) -> None:
    check_varlen(Where("torch", "cpu"), query_lengths, passage_lengths, 16, torch.float64, "normal")


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(
        st.integers(1, 4), st.integers(1, 20), st.integers(1, 3), st.integers(1, 40),
        st.sampled_from([1, 8, 17]), st.integers(1, 3), st.sampled_from([1, 4, 9]),
    ),
    form=st.sampled_from(FORMS), masks=st.booleans(), tau=st.floats(0.05, 5.0),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_kl(shape: tuple[int, ...], form: str, masks: bool, tau: float, seed: int) -> None:
    ours, theirs, queries, passages, query_mask, passage_mask = build_kl(
        Where("torch", "cpu"), shape, torch.float64, form, masks, tau, seed
    )
    expected = differentiate(theirs, (queries, passages), seed)
    got = differentiate(ours, (poison(queries, query_mask), poison(passages, passage_mask)), seed)
    assert_close(got[0] + got[1], expected[0] + expected[1], 1e-9)
