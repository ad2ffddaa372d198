"""Reward calibration: a loss's pull ratio moved to the middle of the band, by pair or by batch."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.training.mitigations._inputs import Gram, Pull, entries


class Calibration(NamedTuple):
    """Where the pull ratio is and where it should be, of each pair or smoothed over batches.

    ``Calibration()`` is the state before the first batch; it changes no pull.

    Attributes:
        log_target: ``ln q``; ``[*pairs]``, or one number of `smoothed`. NaN where undefined.
        log_ratio: ``ln r = ln d_w / d_l``, the same.
    """

    log_target: Array | float = math.nan
    log_ratio: Array | float = math.nan


def calibration(gram: Gram, pull: Pull) -> Calibration:
    r"""The pull ratio of each pair and the one in the middle of its band, as logarithms.

    .. math:: \ln r^* = \ln \frac{\|g_l\|}{\|g_w\|}, \qquad \ln r = \ln \frac{d_w}{d_l}

    Args:
        gram: Inner products of the pair's gradients.
        pull: Of the loss.

    Returns:
        `Calibration` with arrays ``[*pairs]``; NaN where a gradient is zero, or where ``d_w`` or
        ``d_l`` is not positive.

    >>> now = calibration(jnp.array([[1.0, 0.0], [0.0, 4.0]]), jnp.array([-1.0, 1.0]))
    >>> round(float(now.log_target), 4), float(now.log_ratio)
    (0.6931, 0.0)

    References:
        Disentanglement band (2026), the target ratio, https://arxiv.org/abs/2604.18239
    """
    pull, (w, _, l) = jnp.asarray(pull), entries(gram)
    d_w, d_l = -pull[..., 0], pull[..., 1]
    defined = (w > 0) & (l > 0) & (d_w > 0) & (d_l > 0)
    found = (jnp.log(l) - jnp.log(w)) / 2, jnp.log(d_w) - jnp.log(d_l)
    return Calibration(*(jnp.where(defined, x, jnp.nan) for x in found))


def smoothed(before: Calibration, now: Calibration, *, decay: float = 0.98) -> Calibration:
    r"""Running means over batches of the logarithms of `calibration`.

    .. math:: m \leftarrow \alpha m + (1 - \alpha)\, \mathrm{mean}_i(x_i)

    The mean is over the pairs for which they are defined. It is pure: pass the result on as
    `before` of the next batch, and pass `decay` 0 for the mean of this batch alone.

    Args:
        before: Of the batches so far; ``Calibration()`` for none, and then `now` counts fully.
        now: Of `calibration`, this batch.
        decay: ``α``, in [0, 1).

    Returns:
        Two numbers; `before` where no pair of the batch is defined.

    Raises:
        ValueError: `decay` outside [0, 1).

    >>> first = smoothed(Calibration(), Calibration(jnp.array([1.0, 3.0]), jnp.array([0.0, 0.0])))
    >>> second = smoothed(first, Calibration(jnp.array([4.0]), jnp.array([0.0])), decay=0.75)
    >>> float(first.log_target), float(second.log_target)
    (2.0, 2.5)

    References:
        Disentanglement band (2026), https://arxiv.org/abs/2604.18239. Its code has one ratio of
        norms a batch, of gradients of mean log-probabilities by some of the parameters; here each
        pair has its own and their logarithms are averaged.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay: got {decay}, expected a number in [0, 1)")

    def running(old, new):
        new = jnp.asarray(new)
        mean, old = jnp.nanmean(new), jnp.asarray(old, new.dtype)
        after = decay * old + (1 - decay) * mean
        return jnp.where(jnp.isnan(mean), old, jnp.where(jnp.isnan(old), mean, after))

    return Calibration(*map(running, before, now))


def calibrated_pull(pull: Pull, to: Calibration) -> Float[Array, "*pairs 2"]:
    r"""Reward calibration: the pull ratio moved to its target, the product of pulls unchanged.

    .. math:: d'_w = A\, d_w, \quad d'_l = d_l / A, \qquad A = e^{(\ln r^* - \ln r) / 2}

    The derivative of a loss of ``z_w <- A z_w + (1 - A) sg(z_w)`` and ``z_l <- z_l / A +
    (1 - 1 / A) sg(z_l)``.

    Guarantee: with the `calibration` of these very pairs ``d'_w / d'_l = q``, the centre of the
    band, so the chosen rises and the rejected falls as under `normalised_pull`. With `smoothed`
    numbers there is none: a pair whose ratios are far from the mean may be moved out of its band.

    Args:
        pull: Of the loss.
        to: Of `calibration` or `smoothed`.

    Returns:
        ``(-d'_w, d'_l)``; the given pull where `to` is undefined.

    >>> pull, gram = jnp.array([-1.0, 1.0]), jnp.array([[1.0, 2.0], [2.0, 16.0]])
    >>> calibrated_pull(pull, calibration(gram, pull)).round(6).tolist()
    [-2.0, 0.5]

    References:
        Disentanglement band (2026), reward calibration, https://arxiv.org/abs/2604.18239
    """
    pull = jnp.asarray(pull)
    half = jnp.asarray(to.log_target, pull.dtype) - jnp.asarray(to.log_ratio, pull.dtype)
    half = jnp.where(jnp.isnan(half), jnp.zeros_like(half), half) / 2
    if half.shape not in ((), pull.shape[:-1]):
        raise ValueError(f"to: got shape {half.shape}, expected {pull.shape[:-1]} or one number")
    factors = jnp.stack([jnp.exp(half), jnp.exp(-half)], axis=-1)
    return pull * jnp.broadcast_to(factors, pull.shape)
