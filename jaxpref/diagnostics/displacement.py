"""What happened to the probabilities of a run, and how predictions agree with it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

AnyArray = Array | np.ndarray


class Drop(NamedTuple):
    """The largest fall of a series between any two of its steps."""

    drop: Float[Array, "*batch"]  # peak - trough, >= 0
    peak: Float[Array, "*batch"]
    trough: Float[Array, "*batch"]  # a later value than the peak
    peak_step: Int[Array, "*batch"]
    trough_step: Int[Array, "*batch"]


def largest_drop(series: Float[AnyArray, "*batch steps"]) -> Drop:
    r"""Largest drop between any two steps, the first included: the paper's peak to trough.

    .. math:: \max_{t \le t'} x_t - x_{t'}

    It measures a fall from a peak *inside* the run and says nothing of where the run began: a
    series may drop and still end above its start. Report it beside `displaced`.

    Args:
        series: One value a step, for example the probability of the chosen answer.

    Returns:
        The drop, its peak and trough, and their steps (from 0). A series that never falls has a
        drop of 0 with peak and trough at its last step. Among equal drops the latest counts, with
        the earliest step of its peak. A NaN anywhere makes drop, peak and trough NaN.

    Raises:
        ValueError: a series of no steps.

    >>> fall = largest_drop(jnp.array([0.2, 0.9, 0.5, 0.95, 0.4, 0.7]))
    >>> round(float(fall.drop), 3), int(fall.peak_step), int(fall.trough_step)
    (0.55, 3, 4)

    References:
        Razin et al. (2024), Table 1, https://arxiv.org/abs/2410.08847
    """
    series = jnp.asarray(series)
    steps = series.shape[-1]
    highest = jax.lax.cummax(series, axis=series.ndim - 1)
    falls = highest - series
    trough_step = steps - 1 - jnp.argmax(falls[..., ::-1], axis=-1)
    peak = jnp.take_along_axis(highest, trough_step[..., None], axis=-1)
    peak_step = jnp.argmax(series == peak, axis=-1)
    trough = jnp.take_along_axis(series, trough_step[..., None], axis=-1)[..., 0]
    bad = jnp.isnan(series).any(axis=-1)
    peak, trough = (jnp.where(bad, jnp.nan, value) for value in (peak[..., 0], trough))
    return Drop(peak - trough, peak, trough, peak_step, trough_step)


def displaced(
    start: Float[AnyArray, "*batch"], end: Float[AnyArray, "*batch"]
) -> Bool[Array, "*batch"]:
    r"""Whether a chosen response became less likely than it was at the start, one by one.

    .. math:: \ln \pi_{end}(y^+|x) < \ln \pi_{start}(y^+|x)

    Definition 1 for one sample. It supposes that training lowered the loss; that is for the caller
    to report. A fall from a later peak does not count here (see `largest_drop`).

    Args:
        start: Log-probability (or, for one sample, probability) of the chosen response before
            training.
        end: The same after it.

    Returns:
        True where `end` is below `start`. Equality is no displacement, nor is a NaN.

    >>> displaced(jnp.array([-1.0, -1.0]), jnp.array([-1.5, -0.5])).tolist()
    [True, False]

    References:
        Razin et al. (2024), Definition 1, https://arxiv.org/abs/2410.08847
    """
    return jnp.asarray(end) < jnp.asarray(start)


def displaced_on_average(
    start: Float[AnyArray, "*batch examples"], end: Float[AnyArray, "*batch examples"]
) -> Bool[Array, "*batch"]:
    r"""Whether the mean log-probability of a data set's chosen responses fell.

    .. math:: \mathbb{E}_D \ln \pi_{end}(y^+|x) < \mathbb{E}_D \ln \pi_{start}(y^+|x)

    Definition 1 for a data set. The means are of log-probabilities: means of probabilities may
    move the other way.

    Args:
        start: Log-probability (nats) of each chosen response before training.
        end: The same after it.

    Returns:
        One answer for each data set.

    Raises:
        ValueError: a data set without examples.

    >>> bool(displaced_on_average(jnp.array([-1.0, -1.0]), jnp.array([-1.5, -0.4])))
    False

    References:
        Razin et al. (2024), Definition 1, https://arxiv.org/abs/2410.08847
    """
    if start.shape[-1] == 0:
        raise ValueError(f"start: got shape {start.shape}, expected at least one example")
    return displaced(jnp.mean(start, axis=-1), jnp.mean(end, axis=-1))


def share_of_gain(
    before: Float[AnyArray, "*batch vocab"],
    after: Float[AnyArray, "*batch vocab"],
    members: Bool[AnyArray, " vocab"],
) -> Float[Array, "*batch"]:
    r"""Share of all gained probability that went to a given set of tokens.

    .. math:: \frac{\sum_{z \in A} \max(0, p'_z - p_z)}{\sum_z \max(0, p'_z - p_z)}

    The denominator is what every gaining token gained, the chosen one included, and equals the
    total variation between the two distributions: the moved mass.

    Args:
        before: Probabilities of all tokens at the start.
        after: The same later.
        members: The set ``A``, for example the tokens of the opposite meaning.

    Returns:
        Between 0 and 1; 0 where nothing moved.

    >>> before, after = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.2, 0.5, 0.3])
    >>> round(float(share_of_gain(before, after, jnp.array([False, True, False]))), 3)
    0.667

    Source: the "tokens increasing most" of Razin et al. (2024), Table 1, as one number.
    """
    gain = jnp.maximum(jnp.asarray(after) - jnp.asarray(before), 0.0)
    total = gain.sum(axis=-1)
    to_members = jnp.where(jnp.broadcast_to(members, gain.shape), gain, 0.0).sum(axis=-1)
    return to_members / jnp.where(total == 0, jnp.ones_like(total), total)


def spearman(
    x: Float[AnyArray, "*batch items"], y: Float[AnyArray, "*batch items"]
) -> Float[Array, "*batch"]:
    r"""Spearman's rank correlation, ties given the mean of their ranks.

    .. math:: \rho = \frac{\sum_i (r_i - \bar r)(s_i - \bar s)}
        {\sqrt{\sum_i (r_i - \bar r)^2 \sum_i (s_i - \bar s)^2}}

    Args:
        x: Values of the items; only their order counts. Infinities are ranked like numbers.
        y: Other values of the same items.

    Returns:
        Between -1 and 1. NaN where it is undefined: all values of a side equal, or a NaN among
        them.

    Raises:
        ValueError: fewer than two items.

    >>> float(spearman(jnp.array([1.0, 2.0, 3.0, 9.0]), jnp.array([1.0, 3.0, 2.0, 4.0])))
    0.8

    References:
        Spearman (1904), The proof and measurement of association between two things,
        https://doi.org/10.2307/1412159
    """
    if x.shape[-1] < 2:
        raise ValueError(f"x: got shape {x.shape}, expected at least two items")
    x, y = jnp.asarray(x), jnp.asarray(y)
    r, s = _centred_ranks(x), _centred_ranks(y)
    rho = (r * s).sum(axis=-1) / jnp.sqrt((r * r).sum(axis=-1) * (s * s).sum(axis=-1))
    bad = (jnp.isnan(x) | jnp.isnan(y)).any(axis=-1)
    return jnp.where(bad, jnp.nan, rho)


def _centred_ranks(x: Array) -> Array:
    """Mean rank of each value among its ties, less the mean of all ranks."""
    rows = x.reshape(-1, x.shape[-1])
    rank_type = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32

    def one(row):
        ordered = jnp.sort(row)
        below = jnp.searchsorted(ordered, row, side="left")
        upto = jnp.searchsorted(ordered, row, side="right")
        # Ranks 1 to n: twice the mean rank of a tie is below + upto + 1, exact in integers,
        # and twice the mean of all ranks is n + 1.
        return (below + upto - row.size).astype(rank_type) / 2

    return jax.vmap(one)(rows).reshape(x.shape)
