"""`experiments.correlation` against scipy and least squares."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments import correlation


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


def test_matching_removes_what_the_third_variable_did():
    """Inside each bin the second column falls with the first; across bins both rise."""
    by = np.repeat([1.0, 2.0], 5)
    x = np.tile(np.arange(5.0), 2) + 10 * by
    y = 10 * by - np.tile(np.arange(5.0), 2)
    assert correlation.spearman(x, y) > 0.4
    assert correlation.matched_spearman(x, y, by, bins=2) == pytest.approx(-1)
    flat = np.where(by == 1, 0.0, y)  # no order in the first bin
    assert correlation.matched_spearman(x, flat, by, bins=2) == pytest.approx(-1)
    assert math.isnan(correlation.matched_spearman(x, np.zeros(10), by, bins=2))


def test_matching_weighs_bins_by_their_size():
    by = np.arange(5.0)  # bins of three and two
    x, y = np.arange(5.0), np.array([1.0, 2.0, 3.0, 5.0, 4.0])
    assert correlation.matched_spearman(x, y, by, bins=2) == pytest.approx((3 - 2) / 5)


def test_the_interval_holds_the_value(columns):
    x, y, _ = columns
    low, high = correlation.interval(correlation.spearman, (x, y), 400)
    assert low < correlation.spearman(x, y) < high
    assert np.isnan(correlation.interval(correlation.spearman, (np.ones(40), y), 10)).all()


def test_areas_by_hand():
    score, fell = np.array([3.0, 1.0, 2.0, 0.0]), np.array([True, False, False, True])
    assert correlation.auc(score, fell) == 0.5
    assert correlation.auc(-score, ~fell) == 0.5
    assert correlation.auc(np.array([3.0, 1.0, 2.0, 2.0]), fell) == 0.875  # a tie counts half
    assert np.isnan(correlation.auc(score, np.ones(4, bool)))
