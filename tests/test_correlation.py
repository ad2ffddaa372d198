"""`experiments.protocol.correlation` against scipy and least squares."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.protocol import correlation


@pytest.fixture(scope="module")
def columns():
    """Two related columns and a third that both follow; the first has ties."""
    random = np.random.default_rng(0)
    z = random.random(40)
    x = random.integers(0, 6, 40) + np.round(4 * z)
    return x, x + 3 * random.random(40) - 2 * z, z


def test_spearman_is_scipys(columns):
    x, y, _ = columns
    assert correlation.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    rows = correlation.spearman(np.stack([x, y]), np.stack([y, y]))
    np.testing.assert_allclose(rows, [correlation.spearman(x, y), 1])
    assert math.isnan(correlation.spearman(np.ones(40), y))


def test_partial_spearman_correlates_residuals_of_ranks(columns):
    a, b, c = (stats.rankdata(v) for v in columns)
    left = [v - np.polyval(np.polyfit(c, v, 1), c) for v in (a, b)]
    expected = np.corrcoef(*left)[0, 1]
    assert correlation.partial_spearman(*columns) == pytest.approx(expected)
    twice = correlation.partial_spearman(*(np.stack([v, v]) for v in columns))
    np.testing.assert_allclose(twice, [expected] * 2)
    x, y, _ = columns
    assert math.isnan(correlation.partial_spearman(x, y, x))


def test_areas_by_hand():
    score, fell = np.array([3.0, 1.0, 2.0, 0.0]), np.array([True, False, False, True])
    assert correlation.auc(score, fell) == 0.5
    assert correlation.auc(-score, ~fell) == 0.5
    assert correlation.auc(np.array([3.0, 1.0, 2.0, 2.0]), fell) == 0.875  # a tie counts half
    assert np.isnan(correlation.auc(score, np.ones(4, bool)))
