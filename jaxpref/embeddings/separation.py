"""How far apart a model keeps two kinds of prompts or responses, from their last hidden states.

Two arrays ``[samples width]``, one a kind. What the KLDO paper reports is `gaussian_separation` and
`silhouette` of both kinds projected together by `principal_projection` on two directions. That
projection knows nothing of the kinds and may drop the direction that separates them: report the
measures in the full width, too, where `gaussian_separation` needs its `shrinkage`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.embeddings.geometry import AnyArray, wide

PRECISION = jax.lax.Precision.HIGHEST


def principal_projection(
    first: Float[AnyArray, "first width"],
    second: Float[AnyArray, "second width"],
    *,
    directions: int = 2,
) -> tuple[Float[Array, "first directions"], Float[Array, "second directions"]]:
    r"""Both kinds on the directions of largest variance of all samples together.

    .. math:: (x - \bar x) V, \quad V \text{ the first right singular vectors of } X - \bar X

    Args:
        first: Samples of one kind.
        second: Samples of the other.
        directions: How many, at most `width` and the number of samples.

    Returns:
        The projections. The sign of each direction is free.

    Raises:
        ValueError: `directions` is below 1 or too large.

    References:
        Haldar et al. (2025), the separation measures, https://arxiv.org/abs/2502.00657
    """
    points = jnp.concatenate([wide(first), wide(second)])
    if not 1 <= directions <= min(points.shape):
        raise ValueError(f"directions: got {directions}, expected 1 to {min(points.shape)}")
    centred = points - points.mean(axis=0, keepdims=True)
    _, _, right = jnp.linalg.svd(centred, full_matrices=False)
    found = jnp.einsum("nw,dw->nd", centred, right[:directions], precision=PRECISION)
    return found[: len(first)], found[len(first) :]


def gaussian_separation(
    first: Float[AnyArray, "first width"],
    second: Float[AnyArray, "second width"],
    *,
    shrinkage: float = 0.0,
) -> Float[Array, ""]:
    r"""Bhattacharyya distance of the two Gaussians with the samples' means and covariances.

    .. math:: D = \tfrac18 d^\top S^{-1} d + \tfrac12 \log\frac{\det S}{\sqrt{\det S_1 \det S_2}},
        \quad S = \tfrac12 (S_1 + S_2)

    ``d`` is the difference of the means. ``exp(-D)``, between 0 and 1, is the overlap of the two.
    An invertible affine map of both kinds leaves ``D`` as it is (without shrinkage).

    Args:
        first: Samples of one kind, more than `width` without shrinkage.
        second: Samples of the other, the same.
        shrinkage: Share of ``tr(S) / width`` times the identity in both covariances, from 0 to 1:
            above 0 for fewer samples than `width`.

    Returns:
        At least 0, up to rounding. NaN or infinite where a covariance is singular.

    Raises:
        ValueError: a kind has fewer than two samples, or `shrinkage` is not from 0 to 1.

    >>> square = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> moved = square + jnp.array([[4.0, 0.0]])
    >>> round(float(gaussian_separation(square, moved)), 4)  # 4^2 / (4/3) / 8
    1.5

    References:
        Haldar et al. (2025), the separation measures, https://arxiv.org/abs/2502.00657
    """
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage: got {shrinkage}, expected a number from 0 to 1")
    mean, spread = _moments("first", first)
    other_mean, other_spread = _moments("second", second)
    width = mean.shape[0]
    size = (jnp.trace(spread) + jnp.trace(other_spread)) / (2 * width)
    ridge = shrinkage * size * jnp.eye(width, dtype=mean.dtype)
    one, two = ((1 - shrinkage) * s + ridge for s in (spread, other_spread))
    both, apart = (one + two) / 2, mean - other_mean
    solved = jnp.linalg.solve(both, apart)
    between = jnp.einsum("w,w->", apart, solved, precision=PRECISION) / 8
    one, two, both = (jnp.linalg.slogdet(s)[1] for s in (one, two, both))
    return between + (both - (one + two) / 2) / 2


def silhouette(
    first: Float[AnyArray, "first width"], second: Float[AnyArray, "second width"]
) -> Float[Array, ""]:
    r"""Mean silhouette of two clusters, with Euclidean distances.

    .. math:: \frac1n \sum_i \frac{b_i - a_i}{\max(a_i, b_i)}

    ``a_i`` is the mean distance of a sample to the others of its kind, ``b_i`` that to those of the
    other kind.

    Args:
        first: Samples of one kind.
        second: Samples of the other.

    Returns:
        From -1 to 1: 1 for two points far apart, about 0 for one cloud. The only sample of a kind
        counts 0, and so does one at distance 0 of all.

    Raises:
        ValueError: a kind has no samples.

    >>> round(float(silhouette(jnp.array([[0.0], [1.0]]), jnp.array([[10.0], [10.0]]))), 4)
    0.9472

    References:
        Rousseeuw (1987), the silhouette, https://doi.org/10.1016/0377-0427(87)90125-7
    """
    pair = wide(first), wide(second)
    each = jnp.concatenate([_silhouettes(*pair), _silhouettes(*pair[::-1])])
    return each.mean()


def _silhouettes(own: Array, other: Array) -> Array:
    within = _distances(own, own).sum(axis=1) / max(len(own) - 1, 1)
    between = _distances(own, other).mean(axis=1)
    larger = jnp.maximum(within, between)
    alone = (larger == 0) | (len(own) == 1)
    return jnp.where(
        alone, jnp.zeros_like(larger), (between - within) / jnp.where(alone, 1, larger)
    )


def _distances(x: Array, y: Array) -> Array:
    """Of each to each, row by row: differences, so that near ones are exact."""
    return jax.lax.map(lambda row: jnp.linalg.norm(row[None] - y, axis=-1), x)


def _moments(name: str, x: AnyArray) -> tuple[Array, Array]:
    """Mean and covariance, with one less than the number of samples below the sum."""
    x = wide(x)
    if len(x) < 2:
        raise ValueError(f"{name}: got {len(x)} samples, expected at least two")
    mean = x.mean(axis=0)
    centred = x - mean[None]
    return mean, jnp.einsum("ni,nj->ij", centred, centred, precision=PRECISION) / (len(x) - 1)
