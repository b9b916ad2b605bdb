"""Do two systems differ? Paired tests over the same queries, two-sided.

    t-test           t = mean(d) / (std(d) / sqrt(n)), d the differences by query
    randomisation    share of random sign flips of d whose |mean| reaches the observed one
                     (Fisher's; all flips where n is small, else 10,000 drawn with the seed)

Neither corrects for testing several metrics or systems.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 9_999
_BLOCK = 10_000_000


@dataclass(frozen=True)
class Comparison:
    """Mean difference to the baseline over ``num_queries`` paired queries and two p-values."""

    num_queries: int
    difference: float
    p_t_test: float
    p_randomisation: float


def compare(values: np.ndarray, baseline: np.ndarray, seed: int) -> Comparison:
    """Test ``values`` against ``baseline``, both ``[num_queries]`` in the same order."""
    assert values.shape == baseline.shape
    assert len(values) >= 2
    differences = np.asarray(values, dtype=np.float64) - baseline
    mean = float(differences.mean())
    if not differences.any():
        return Comparison(len(differences), 0.0, 1.0, 1.0)
    with warnings.catch_warnings():
        # Equal differences throughout have no spread: t is infinite and p is 0, as it should be.
        warnings.simplefilter("ignore", RuntimeWarning)
        t_test = float(stats.ttest_1samp(differences, 0.0).pvalue)
    flips = stats.permutation_test(
        (differences,), lambda d, axis: d.mean(axis=axis), permutation_type="samples",
        n_resamples=RESAMPLES, batch=max(1, _BLOCK // len(differences)),
        rng=np.random.default_rng([seed, 8]),
    )  # fmt: skip
    return Comparison(len(differences), mean, t_test, float(flips.pvalue))
