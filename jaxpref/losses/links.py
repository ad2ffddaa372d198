r"""Losses of DPO's margin through other functions than the logistic one.

``x = β(u_w - u_l)`` is the scaled margin of log-ratios, ``σ`` the logistic function. Each loss
here reads nothing else, so both responses are pushed equally hard: ``d_w = d_l``. Every loss is
``[*pairs 2] -> [*pairs]``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.losses._inputs import (
    AnyArray,
    Hyperparameter,
    bounded,
    fraction,
    inner_fraction,
    log_ratio,
    positive,
)
from jaxpref.losses.pairwise import margin


def exo_pair(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
    epsilon: Hyperparameter = 1e-3,
) -> Float[Array, "*pairs"]:
    r"""Efficient exact optimisation of pairs: the reverse divergence from smoothed labels.

    .. math:: q\log\frac{q}{1-\epsilon} + (1-q)\log\frac{1-q}{\epsilon},
        \quad q = \sigma(\beta(u_w - u_l))

    The gradient goes through both factors: ``d_w = d_l = β q(1-q)(log((1-ε)/ε) - x)``. It vanishes
    for pairs far on either side, those far wrong included, and turns round at
    ``x = log((1-ε)/ε)``.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0.
        epsilon: Probability that the label is wrong, above 0 and below 1.

    Returns:
        One loss a pair, nats, at least 0.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `epsilon` not in (0, 1).

    Differs:
        The authors' code has log-labels (0, -10), not normalised. TRL up to 0.28 takes 0.001 for an
        `epsilon` of 0, later versions refuse it; EasyDeL's fails under jit.

    References:
        Ji et al. (2024), the EXO loss of pairs, https://arxiv.org/abs/2402.00856
    """
    u = log_ratio(logp, reference)
    x = positive("beta", beta, u) * margin(u)
    epsilon = jnp.asarray(inner_fraction("epsilon", epsilon, u), u.dtype)
    for_chosen = jax.nn.sigmoid(x) * (jax.nn.log_sigmoid(x) - jnp.log1p(-epsilon))
    return for_chosen + jax.nn.sigmoid(-x) * (jax.nn.log_sigmoid(-x) - jnp.log(epsilon))


def discopop(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.05,
    tau: Hyperparameter = 0.05,
) -> Float[Array, "*pairs"]:
    r"""Discovered preference optimisation: logistic below a margin of 0, exponential above.

    .. math:: -(1-m)\log\sigma(x) + m e^{-x}, \quad x = \beta(u_w - u_l),\ m = \sigma(x/\tau)

    The weight ``m`` is not detached, so the loss is not convex: at the default `tau` it has a local
    minimum at ``x = -0.119`` and a local maximum at ``x = 0.072``. Between them, and so at the
    first step, the pull has the wrong sign.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0.
        tau: Width of the passage, above 0. Above 1, the exponential rules pairs far wrong.

    Returns:
        One loss a pair, no unit.

    Raises:
        ValueError: `beta` or `tau` is not a finite number above 0.

    Differs:
        The authors' older code has ``m = σ(u_w - u_l)``, the same where `beta` is `tau`. TRL's is
        not a number for ``x`` below about -89.

    References:
        Lu et al. (2024), log-ratio modulated loss, https://arxiv.org/abs/2406.08414
    """
    u = log_ratio(logp, reference)
    x = positive("beta", beta, u) * margin(u)
    gate = x / positive("tau", tau, u)
    # m e^-x as one exponential: apart they are 0 times infinity.
    exponential = jnp.exp(bounded(jax.nn.log_sigmoid(gate) - x))
    return exponential - jax.nn.sigmoid(-gate) * jax.nn.log_sigmoid(x)


def comp_sum_exponential(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""Comp-sum loss of order 0 on the margin: the exponential of boosting.

    .. math:: e^{-\beta(u_w - u_l)}

    The member ``τ = 0`` of the family whose ``τ = 1`` is `dpo`. Pairs far wrong rule it:
    ``d_w = d_l = β e^{-x}``.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0.

    Returns:
        One loss a pair, no unit. Near overflow, ``-x`` above 79 in float32, value and pull stand
        still.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    References:
        Mao, Mohri and Zhong (2023), the comp-sum family, on DPO's margin (our transcription),
        https://arxiv.org/abs/2304.07288
    """
    u = log_ratio(logp, reference)
    return jnp.exp(bounded(-positive("beta", beta, u) * margin(u)))


def comp_sum_generalised_cross_entropy(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
    q: Hyperparameter = 0.7,
) -> Float[Array, "*pairs"]:
    r"""Comp-sum loss of order ``1 + q`` on the margin: between DPO and the absolute error.

    .. math:: \frac{1 - \sigma(x)^q}{q}, \quad x = \beta(u_w - u_l)

    ``d_w = d_l = β σ(-x) σ(x)^q``: pairs far wrong, which may be wrong labels, lose their pull. The
    limit ``q -> 0`` is `dpo`, ``q = 1`` is `comp_sum_mae`.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0.
        q: Above 0, at most 1; 0.7 in the source of the generalised cross-entropy.

    Returns:
        One loss a pair, from 0 to ``1/q``.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `q` not in (0, 1].

    References:
        Mao, Mohri and Zhong (2023), the comp-sum family, on DPO's margin (our transcription),
        https://arxiv.org/abs/2304.07288
    """
    u = log_ratio(logp, reference)
    x, q = positive("beta", beta, u) * margin(u), fraction("q", q, u)
    return -jnp.expm1(q * jax.nn.log_sigmoid(x)) / q


def comp_sum_mae(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""Comp-sum loss of order 2 on the margin: the mean absolute error of the label.

    .. math:: \sigma(-\beta(u_w - u_l))

    The probability of the wrong order. ``d_w = d_l = β σ(x)σ(-x)`` is largest at a margin of 0 and
    the same for pairs as far right as wrong.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0.

    Returns:
        One loss a pair, between 0 and 1.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    References:
        Mao, Mohri and Zhong (2023), the comp-sum family, on DPO's margin (our transcription),
        https://arxiv.org/abs/2304.07288
    """
    u = log_ratio(logp, reference)
    return jax.nn.sigmoid(-positive("beta", beta, u) * margin(u))
