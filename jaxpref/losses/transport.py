r"""Losses that compare distributions over a batch, not pairs: ``[*batch pairs 2]`` of one batch.

The loss of a pair depends on the other pairs of its batch, through ranks. A batch of one pair is
`dpo`. Splitting a batch changes the loss.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.losses._inputs import AnyArray, Hyperparameter, flip_rate, log_ratio, positive
from jaxpref.losses.pairwise import margin


def aot(
    logp: Float[AnyArray, "*batch pairs 2"],
    reference: Float[AnyArray, "*batch pairs 2"],
    *,
    beta: Hyperparameter = 0.01,
    epsilon: Hyperparameter = 0.0,
) -> Float[Array, "*batch pairs"]:
    r"""Alignment by optimal transport: the policy's margins against the reference's of equal rank.

    .. math:: -(1-\epsilon)\log\sigma(\beta\delta_k) - \epsilon\log\sigma(-\beta\delta_k),
        \quad \delta_k = (\log\pi_w - \log\pi_l)_{(k)} - (\log\pi_{ref,w} - \log\pi_{ref,l})_{(k)}

    The margins of the policy are to exceed those of the reference in distribution. A pair's own
    reference counts only through its rank.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0.
        epsilon: Share of swapped labels, from 0 to below 0.5.

    Returns:
        One loss a pair, nats: that of its rank ``k`` among the policy's margins, in the order of
        the pairs.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `epsilon` not in [0, 0.5).

    Differs:
        TRL sorts the pairs of a device, and calls this ``aot``.

    References:
        Melnyk et al. (2024), paired alignment, https://arxiv.org/abs/2406.05882
    """
    own, others = margin(logp), jax.lax.stop_gradient(margin(reference))
    return _smoothed(own - _of_equal_rank(others, own), beta, epsilon)


def aot_unpaired(
    logp: Float[AnyArray, "*batch pairs 2"],
    reference: Float[AnyArray, "*batch pairs 2"],
    *,
    beta: Hyperparameter = 0.01,
    epsilon: Hyperparameter = 0.0,
) -> Float[Array, "*batch pairs"]:
    r"""Alignment by optimal transport: chosen log-ratios against rejected ones of equal rank.

    .. math:: -(1-\epsilon)\log\sigma(\beta\delta_k) - \epsilon\log\sigma(-\beta\delta_k),
        \quad \delta_k = (u_w)_{(k)} - (u_l)_{(k)}

    Which rejected response belongs to which chosen one does not count.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0.
        epsilon: Share of swapped labels, from 0 to below 0.5.

    Returns:
        One loss a pair, nats: that of the rank ``k`` of its chosen response, in the order of the
        pairs.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `epsilon` not in [0, 0.5).

    Differs:
        TRL sorts the pairs of a device; up to 0.27 it calls this ``aot_pair``.

    References:
        Melnyk et al. (2024), unpaired alignment, https://arxiv.org/abs/2406.05882
    """
    u = log_ratio(logp, reference)
    return _smoothed(u[..., 0] - _of_equal_rank(u[..., 1], u[..., 0]), beta, epsilon)


def _of_equal_rank(x: Array, own: Array) -> Array:
    """The value of ``x`` whose rank is that of ``own``, for each of the latter."""
    rank = jnp.argsort(jnp.argsort(own, axis=-1), axis=-1)
    return jnp.take_along_axis(jnp.sort(x, axis=-1), rank, axis=-1)


def _smoothed(delta: Array, beta: Hyperparameter, epsilon: Hyperparameter) -> Array:
    x, epsilon = positive("beta", beta, delta) * delta, flip_rate("epsilon", epsilon, delta)
    return -(1 - epsilon) * jax.nn.log_sigmoid(x) - epsilon * jax.nn.log_sigmoid(-x)
