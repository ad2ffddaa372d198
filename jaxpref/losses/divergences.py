r"""Divergences of next-token distributions, for the losses that take one.

Two arrays of log-probabilities ``[*batch vocab]``, ``log p`` and ``log q``, each normalised over
the last axis, in ``[*batch]`` out, nats unless said. A log-probability may be minus infinity. A
gradient enters both arrays; stop it where one is data. For the KL divergence of two models without
an array of the vocabulary's size, take `jaxpref.logprobs.token_kl`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.losses._inputs import AnyArray, Hyperparameter, positive, wide


def kl_divergence(
    log_p: Float[AnyArray, "*batch vocab"], log_q: Float[AnyArray, "*batch vocab"]
) -> Float[Array, "*batch"]:
    r"""Kullback-Leibler divergence.

    .. math:: \sum_v p_v (\log p_v - \log q_v)

    Args:
        log_p: ``log p``.
        log_q: ``log q``.

    Returns:
        At least 0, up to rounding; infinite where ``q`` is 0 and ``p`` is not.

    >>> p, q = jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75])
    >>> round(float(kl_divergence(jnp.log(p), jnp.log(q))), 4)
    0.1438

    References:
        Das et al. (2025), the KL divergence, https://arxiv.org/abs/2501.03271
    """
    log_p, log_q = _both(log_p, log_q)
    p = jnp.exp(log_p)
    log_ratio = jnp.where(p != 0, log_p - log_q, jnp.zeros_like(p))
    return (p * log_ratio).sum(axis=-1)


def js_divergence(
    log_p: Float[AnyArray, "*batch vocab"], log_q: Float[AnyArray, "*batch vocab"]
) -> Float[Array, "*batch"]:
    r"""Jensen-Shannon divergence.

    .. math:: \tfrac12 \mathrm{KL}(p \Vert m) + \tfrac12 \mathrm{KL}(q \Vert m), \quad
        m = \tfrac12 (p + q)

    Args:
        log_p: ``log p``.
        log_q: ``log q``.

    Returns:
        From 0 to ``log 2``, symmetric.

    >>> p, q = jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.0, 1.0]))
    >>> round(float(js_divergence(p, q)), 4)
    0.6931

    References:
        Das et al. (2025), the Jensen-Shannon divergence, https://arxiv.org/abs/2501.03271
    """
    log_p, log_q = _both(log_p, log_q)
    halves = []
    for one, other in ((log_p, log_q), (log_q, log_p)):
        some, safe = _support(one)
        # log(one / mean) = log 2 - log(1 + other / one)
        excess = jnp.exp(one) * (jnp.log(2.0) - jax.nn.softplus(other - safe))
        halves.append(jnp.where(some, excess, jnp.zeros_like(safe)).sum(axis=-1))
    return (halves[0] + halves[1]) / 2


def renyi_divergence(
    log_p: Float[AnyArray, "*batch vocab"],
    log_q: Float[AnyArray, "*batch vocab"],
    *,
    order: Hyperparameter = 0.5,
) -> Float[Array, "*batch"]:
    r"""Rényi divergence.

    .. math:: \frac{1}{a - 1} \log \sum_v p_v^{a} q_v^{1-a}

    Twice `bhattacharyya_divergence` for ``a = 1/2``, towards `kl_divergence` for ``a -> 1``, where
    this form is 0/0.

    Args:
        log_p: ``log p``.
        log_q: ``log q``.
        order: ``a``, above 0, not 1.

    Returns:
        At least 0, up to rounding; infinite for ``a > 1`` where ``q`` is 0 and ``p`` is not.

    Raises:
        ValueError: `order` is not a finite number above 0, or is 1.

    References:
        Das et al. (2025), the Rényi divergence, https://arxiv.org/abs/2501.03271
    """
    log_p, log_q = _both(log_p, log_q)
    a = positive("order", order, log_p)
    if isinstance(a, float) and a == 1:
        raise ValueError("order: got 1.0, expected another number: of order 1 it is kl_divergence")
    some, safe = _support(log_p)
    powers = jnp.where(some, a * safe + (1 - a) * log_q, -jnp.inf)
    return _log_sum(powers) / (a - 1)


def bhattacharyya_divergence(
    log_p: Float[AnyArray, "*batch vocab"], log_q: Float[AnyArray, "*batch vocab"]
) -> Float[Array, "*batch"]:
    r"""Bhattacharyya distance.

    .. math:: -\log \sum_v \sqrt{p_v q_v}

    Args:
        log_p: ``log p``.
        log_q: ``log q``.

    Returns:
        At least 0, up to rounding, symmetric; infinite for distributions that never meet.

    References:
        Das et al. (2025), the Bhattacharyya distance, https://arxiv.org/abs/2501.03271
    """
    log_p, log_q = _both(log_p, log_q)
    return -_log_sum((log_p + log_q) / 2)


def hellinger_divergence(
    log_p: Float[AnyArray, "*batch vocab"], log_q: Float[AnyArray, "*batch vocab"]
) -> Float[Array, "*batch"]:
    r"""Hellinger distance, squared.

    .. math:: 1 - \sum_v \sqrt{p_v q_v}

    Args:
        log_p: ``log p``.
        log_q: ``log q``.

    Returns:
        From 0 to 1, no unit, symmetric.

    References:
        Das et al. (2025), the Hellinger distance, https://arxiv.org/abs/2501.03271
    """
    log_p, log_q = _both(log_p, log_q)
    return -jnp.expm1(_log_sum((log_p + log_q) / 2))


def wasserstein_divergence(
    log_p: Float[AnyArray, "*batch vocab"], log_q: Float[AnyArray, "*batch vocab"]
) -> Float[Array, "*batch"]:
    r"""Wasserstein-1 distance of two distributions over the places 0, 1, 2, ... of a line.

    .. math:: \sum_{v < V} \left\lvert\textstyle\sum_{v' \le v} (p_{v'} - q_{v'})\right\rvert

    As in the authors' code. The distance of two tokens is then that of their numbers, which means
    little in a vocabulary: sort the last axis by something that does.

    Args:
        log_p: ``log p``.
        log_q: ``log q``.

    Returns:
        At least 0, in steps along the axis, symmetric.

    >>> p, q = jnp.log(jnp.array([1.0, 0.0, 0.0])), jnp.log(jnp.array([0.0, 0.0, 1.0]))
    >>> float(wasserstein_divergence(p, q))
    2.0

    References:
        Das et al. (2025), the Wasserstein distance, https://arxiv.org/abs/2501.03271
    """
    log_p, log_q = _both(log_p, log_q)
    flow = jnp.cumsum(jnp.exp(log_p) - jnp.exp(log_q), axis=-1)
    return jnp.abs(flow[..., :-1]).sum(axis=-1)  # the last is 0


def f_divergence(
    log_p: Float[AnyArray, "*batch vocab"],
    log_q: Float[AnyArray, "*batch vocab"],
    generator: Callable[[Array], Array],
) -> Float[Array, "*batch"]:
    r"""The f-divergence of a generator.

    .. math:: \sum_v q_v f\!\left(\frac{p_v}{q_v}\right)

    Args:
        log_p: ``log p``, finite.
        log_q: ``log q``, finite.
        generator: ``f`` as a function of ``log(p/q)``, so that it can avoid the ratio: ``r ->
            exp(r) r`` is the KL divergence.

    Returns:
        At least 0 for a convex ``f`` with ``f(1) = 0``.

    >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> round(float(f_divergence(p, q, lambda r: jnp.expm1(r) ** 2)), 4)  # Pearson's
    0.3333

    References:
        Das et al. (2025), f-divergences, https://arxiv.org/abs/2501.03271
    """
    log_p, log_q = _both(log_p, log_q)
    return (jnp.exp(log_q) * generator(log_p - log_q)).sum(axis=-1)


def _both(log_p: AnyArray, log_q: AnyArray) -> tuple[Array, Array]:
    """Both in the wider of their dtypes, at least float32."""
    log_p, log_q = wide(log_p), wide(log_q)
    dtype = jnp.promote_types(log_p.dtype, log_q.dtype)
    return log_p.astype(dtype), log_q.astype(dtype)


def _support(log_p: Array) -> tuple[Array, Array]:
    """Where the probability is not 0, and log-probabilities that are finite elsewhere."""
    some = ~jnp.isneginf(log_p)
    return some, jnp.where(some, log_p, jnp.zeros_like(log_p))


def _log_sum(logs: Array) -> Array:
    """`logsumexp` with a gradient of 0 for terms of 0."""
    some, safe = _support(logs)
    return jax.nn.logsumexp(safe, axis=-1, where=some)
