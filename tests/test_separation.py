"""How far apart two kinds lie: Gaussian separation, silhouette, principal projection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.embeddings import gaussian_separation, principal_projection, silhouette


@pytest.fixture(scope="module")
def kinds():
    """Nine and six samples of width 3 with different means and covariances."""
    keys = jax.random.split(jax.random.key(4), 2)
    first = jax.random.normal(keys[0], (9, 3)) * jnp.array([[1.0, 2.0, 0.5]])
    return first, jax.random.normal(keys[1], (6, 3)) + jnp.array([[1.0, 0.0, -0.5]])


def test_separation_is_the_formula(kinds):
    first, second = map(np.asarray, kinds)
    one, two = (np.cov(x, rowvar=False) for x in (first, second))
    both, apart = (one + two) / 2, first.mean(axis=0) - second.mean(axis=0)
    expected = apart @ np.linalg.inv(both) @ apart / 8
    determinants = [np.linalg.det(x) for x in (one, two, both)]
    expected += np.log(determinants[2] / np.sqrt(determinants[0] * determinants[1])) / 2
    np.testing.assert_allclose(gaussian_separation(*kinds), expected, rtol=1e-10)


def test_separation_has_two_parts():
    """0 for equal Gaussians, an eighth of the squared Mahalanobis distance for equal spreads."""
    points = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    np.testing.assert_allclose(gaussian_separation(points, -points), 0, atol=1e-14)
    moved = gaussian_separation(points, points + jnp.array([[3.0, 1.0]]))
    np.testing.assert_allclose(moved, (9 / (2 / 3) + 1 / (8 / 3)) / 8, rtol=1e-12)
    wider = gaussian_separation(points, 3 * points)  # det: 9, 1 and 5 times, in two directions
    np.testing.assert_allclose(wider, np.log(5 / 3), rtol=1e-12)


def test_separation_is_invariant_to_affine_maps_and_order(kinds, key):
    map_ = jax.random.normal(key, (3, 3)) + 2 * jnp.eye(3)
    moved = [x @ map_ + jnp.array([[5.0, -1.0, 0.3]]) for x in kinds]
    plain = gaussian_separation(*kinds)
    np.testing.assert_allclose(gaussian_separation(*moved), plain, rtol=1e-8)
    np.testing.assert_allclose(gaussian_separation(*kinds[::-1]), plain, rtol=1e-10)


def test_shrinkage_makes_few_samples_enough(kinds):
    few = [x[:3] for x in kinds]
    found = gaussian_separation(*few, shrinkage=0.1)
    assert np.isfinite(found)
    assert found > 0
    one, two = (np.cov(x, rowvar=False) for x in map(np.asarray, few))
    size = np.trace(one + two) / 6
    apart = np.asarray(few[0]).mean(axis=0) - np.asarray(few[1]).mean(axis=0)
    all_of_it = gaussian_separation(*few, shrinkage=1.0)  # spheres
    np.testing.assert_allclose(all_of_it, apart @ apart / size / 8, rtol=1e-10)


def test_silhouette_against_a_loop(kinds):
    points = np.concatenate([np.asarray(x) for x in kinds])
    labels = np.repeat([0, 1], [9, 6])
    total = 0.0
    for i, label in enumerate(labels):
        distances = [np.sqrt(((points[i] - p) ** 2).sum()) for p in points]
        own = [d for j, d in enumerate(distances) if labels[j] == label and j != i]
        other = [d for j, d in enumerate(distances) if labels[j] != label]
        a, b = np.mean(own), np.mean(other)
        total += (b - a) / max(a, b)
    np.testing.assert_allclose(silhouette(*kinds), total / 15, rtol=1e-10)


def test_silhouette_at_its_ends():
    point = jnp.ones((3, 2))
    assert float(silhouette(point, point + 4)) == 1.0
    assert float(silhouette(point, point)) == 0.0
    assert float(silhouette(point[:1], point[:1] + 1)) == 0.0


def test_projections_keep_the_directions_of_largest_variance(kinds):
    found = jnp.concatenate(principal_projection(*kinds))
    assert found.shape == (15, 2)
    points = np.concatenate([np.asarray(x) for x in kinds])
    values = np.linalg.eigvalsh(np.cov(points, rowvar=False))[::-1]
    np.testing.assert_allclose(np.cov(found, rowvar=False), np.diag(values[:2]), atol=1e-10)
    whole = jnp.concatenate(principal_projection(*kinds, directions=3))
    distances = [np.linalg.norm(x[:1] - x[1:], axis=1) for x in (np.asarray(whole), points)]
    np.testing.assert_allclose(*distances, rtol=1e-10)


def test_a_projection_may_drop_what_separates():
    """As the file's text warns: the kinds differ along the direction of least variance."""
    grid = jnp.stack(jnp.meshgrid(*[jnp.linspace(-9.0, 9.0, 5)] * 2), axis=-1).reshape(-1, 2)
    noise = jnp.where(jnp.arange(25) % 2 == 0, 0.1, -0.1)[:, None]
    kinds = [jnp.concatenate([grid, noise + side], axis=1) for side in (-0.5, 0.5)]
    assert gaussian_separation(*kinds) > 10
    assert gaussian_separation(*principal_projection(*kinds)) < 0.1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: gaussian_separation(x[:1], x), "first: got 1 samples, expected at least two"),
        (lambda x: gaussian_separation(x, x, shrinkage=1.5), "shrinkage: got 1.5"),
        (lambda x: silhouette(x, x[:0]), r"second: got shape \(0, 3\), expected .* above 0"),
        (lambda x: principal_projection(x, x, directions=4), "directions: got 4, expected 1 to 3"),
        (lambda x: principal_projection(x, x, directions=0), "directions: got 0, expected 1 to 3"),
    ],
)
def test_bad_input_is_named(function, message):
    with pytest.raises(ValueError, match=message):
        function(jnp.zeros((4, 3)))


def test_narrow_states_are_measured_in_float32(kinds):
    narrow = [x.astype(jnp.bfloat16) for x in kinds]
    for function in (gaussian_separation, silhouette):
        found = function(*narrow)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, function(*(x.astype(jnp.float32) for x in narrow)))
