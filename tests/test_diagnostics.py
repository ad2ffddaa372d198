"""`jaxpref.diagnostics`: worked values, edges, and naive loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import diagnostics

SERIES = jnp.array([0.2, 0.9, 0.5, 0.95, 0.4, 0.7])


def test_largest_drop_of_a_worked_series():
    found = diagnostics.largest_drop(SERIES)
    np.testing.assert_allclose(found[:3], (0.55, 0.95, 0.4), rtol=1e-12)
    assert (int(found.peak_step), int(found.trough_step)) == (3, 4)


def test_largest_drop_equals_the_search_over_all_pairs_of_steps(key):
    batch = jax.random.normal(key, (3, 4, 12), jnp.float64)
    found = diagnostics.largest_drop(batch)
    for row in np.ndindex(3, 4):
        series = np.asarray(batch[row])
        best = max(series[s] - series[t] for s, t in itertools.combinations(range(12), 2))
        peak, trough = int(found.peak_step[row]), int(found.trough_step[row])
        assert peak < trough
        assert float(found.drop[row]) == best == series[peak] - series[trough]
        assert (found.peak[row], found.trough[row]) == (series[peak], series[trough])


@pytest.mark.parametrize(
    "series", [[0.1, 0.2, 0.2, 0.7], [0.3, 0.3, 0.3], [0.4]], ids=["rising", "flat", "one step"]
)
def test_largest_drop_of_a_series_that_never_falls_is_zero(series):
    found = diagnostics.largest_drop(jnp.array(series))
    last = len(series) - 1
    assert (found.drop, found.peak, found.trough) == (0.0, series[last], series[last])
    assert int(found.trough_step) == last


def test_largest_drop_may_begin_at_the_first_step_and_end_at_the_last():
    assert float(diagnostics.largest_drop(jnp.array([1.0, 0.75, 0.5])).drop) == 0.5


def test_largest_drop_of_equal_drops_is_the_latest():
    found = diagnostics.largest_drop(jnp.array([1.0, 0.5, 1.0, 0.5]))
    assert (int(found.peak_step), int(found.trough_step)) == (0, 3)


def test_largest_drop_does_not_hide_a_nan():
    found = diagnostics.largest_drop(jnp.array([[0.5, jnp.nan, 0.2], [0.5, 0.4, 0.2]]))
    for value in found[:3]:
        np.testing.assert_array_equal(np.isnan(value), [True, False])
    np.testing.assert_allclose(found.drop[1], 0.3, rtol=1e-12)


def test_largest_drop_refuses_no_steps():
    with pytest.raises(ValueError, match="series: got shape"):
        diagnostics.largest_drop(jnp.zeros((3, 0)))


def test_displaced_reads_start_and_end_only_whatever_lies_between():
    """A series may fall from its peak without ending below its start, and the other way."""
    assert not bool(diagnostics.displaced(SERIES[0], SERIES[-1]))
    assert float(diagnostics.largest_drop(SERIES).drop) > 0.5


def test_displaced_one_by_one_and_not_at_equality():
    start, end = jnp.array([-2.0, -2.0, -2.0]), jnp.array([-2.5, -2.0, -1.0])
    assert diagnostics.displaced(start, end).tolist() == [True, False, False]


def test_displaced_on_average_is_of_the_mean_log_probability():
    """Means of probabilities would answer otherwise: (.5 + .01) / 2 rises to (.6 + .001) / 2."""
    start, end = jnp.log(jnp.array([[0.5, 0.01]])), jnp.log(jnp.array([[0.6, 0.001]]))
    assert diagnostics.displaced_on_average(start, end).tolist() == [True]
    assert diagnostics.displaced_on_average(end, start).tolist() == [False]


def test_displaced_on_average_refuses_no_examples():
    with pytest.raises(ValueError, match="start: got shape"):
        diagnostics.displaced_on_average(jnp.zeros((2, 0)), jnp.zeros((2, 0)))


def test_share_of_gain_of_a_worked_move():
    before, after = jnp.array([0.5, 0.3, 0.2, 0.0]), jnp.array([0.1, 0.4, 0.2, 0.3])
    members = jnp.array([True, False, True, True])
    np.testing.assert_allclose(diagnostics.share_of_gain(before, after, members), 0.75, rtol=1e-12)


def test_share_of_gain_splits_into_one_over_a_partition(key):
    first, second = jax.random.split(key)
    before = jax.nn.softmax(jax.random.normal(first, (4, 9), jnp.float64))
    after = jax.nn.softmax(jax.random.normal(second, (4, 9), jnp.float64))
    members = jnp.arange(9) % 3 == 0
    share = diagnostics.share_of_gain(before, after, members)
    assert np.all((share > 0) & (share < 1))
    np.testing.assert_allclose(share + diagnostics.share_of_gain(before, after, ~members), 1.0)
    for row in range(4):
        gain = [max(0.0, float(a - b)) for a, b in zip(after[row], before[row], strict=True)]
        np.testing.assert_allclose(share[row], sum(gain[::3]) / sum(gain), rtol=1e-12)


def test_share_of_gain_where_nothing_moved_is_zero():
    same = jnp.array([0.5, 0.5])
    assert float(diagnostics.share_of_gain(same, same, jnp.array([True, True]))) == 0.0


def test_share_of_gain_of_minute_moves_is_not_lost():
    before = jnp.zeros(3)
    after = jnp.array([1e-300, 3e-300, 0.0])
    members = jnp.array([True, False, False])
    np.testing.assert_allclose(diagnostics.share_of_gain(before, after, members), 0.25)


def test_spearman_of_a_worked_table_with_ties():
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: Pearson of the ranks is 4.5 / sqrt(4.5 * 5).
    rho = diagnostics.spearman(jnp.array([1.0, 2.0, 2.0, 3.0]), jnp.array([0.0, 7.0, 5.0, 9.0]))
    np.testing.assert_allclose(rho, np.sqrt(0.9), rtol=1e-12)


def test_spearman_of_many_ties_equals_pearson_of_counted_ranks(key):
    x, y = (jax.random.randint(k, (3, 40), 0, 6).astype(jnp.float64) for k in jax.random.split(key))

    def ranks(row):
        return [sum(o < v for o in row) + (sum(o == v for o in row) + 1) / 2 for v in row]

    for row in range(3):
        r, s = ranks(np.asarray(x[row])), ranks(np.asarray(y[row]))
        expected = np.corrcoef(r, s)[0, 1]
        np.testing.assert_allclose(diagnostics.spearman(x, y)[row], expected, rtol=1e-12)


def test_spearman_sees_order_only(key):
    x, y = jax.random.normal(key, (2, 30), jnp.float64)
    rho = diagnostics.spearman(x, y)
    np.testing.assert_allclose(diagnostics.spearman(jnp.exp(x), y**3), rho, rtol=1e-12)
    np.testing.assert_allclose(diagnostics.spearman(-x, y), -rho, rtol=1e-12)
    np.testing.assert_allclose(diagnostics.spearman(x, x), 1.0, rtol=1e-12)


def test_spearman_ranks_infinities_and_reports_nan():
    x = jnp.array([-jnp.inf, 0.0, jnp.inf])
    np.testing.assert_allclose(diagnostics.spearman(x, jnp.array([1.0, 2.0, 3.0])), 1.0)
    np.testing.assert_allclose(diagnostics.spearman(x, x[::-1]), -1.0)
    assert np.isnan(diagnostics.spearman(jnp.array([1.0, jnp.nan, 2.0]), x))


def test_spearman_of_equal_values_is_undefined():
    assert np.isnan(diagnostics.spearman(jnp.ones(4), jnp.arange(4.0)))


def test_spearman_of_a_whole_vocabulary_in_float32():
    """49,152 items: sums of squared ranks near 1e13, still right to float32 rounding."""
    x = jax.random.normal(jax.random.key(1), (49_152,), jnp.float32)
    np.testing.assert_allclose(diagnostics.spearman(x, x), 1.0, rtol=1e-6)
    assert diagnostics.spearman(x, x).dtype == jnp.float32


def test_spearman_refuses_a_single_item():
    with pytest.raises(ValueError, match="x: got shape"):
        diagnostics.spearman(jnp.ones(1), jnp.ones(1))


def test_arrays_of_numpy_give_the_same_numbers(key):
    """A saved run is read back as NumPy arrays."""
    x, y = (
        jax.nn.softmax(jax.random.normal(k, (3, 9), jnp.float64)) for k in jax.random.split(key)
    )
    members = jnp.arange(9) % 3 == 0
    for function, args in (
        (diagnostics.largest_drop, (x,)),
        (diagnostics.displaced, (x, y)),
        (diagnostics.displaced_on_average, (x, y)),
        (diagnostics.share_of_gain, (x, y, members)),
        (diagnostics.spearman, (x, y)),
    ):
        jax.tree.map(
            np.testing.assert_array_equal, function(*args), function(*map(np.asarray, args))
        )
