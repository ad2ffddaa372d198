r"""Losses of a whole batch, and the numbers that losses take from one.

``u = logp - reference`` is the log-ratio of an example, ``r = βu`` its reward, ``σ`` the logistic
function. A loss of this file is one number a batch, ``[*batch examples] -> [*batch]``: a step that
takes one loss an example takes it repeated, and no micro-batches, which would change the statistic.

A running statistic is an argument, and what updates it returns the new one: it belongs with the
parameters in a checkpoint. Update it with a batch before that batch's loss reads it::

    delta = losses.bco_running_mean(delta, logp, reference, beta=0.1)
    loss = losses.bco(logp, reference, desirable, delta.mean, beta=0.1)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpref.losses._inputs import (
    AnyArray,
    Hyperparameter,
    bounded,
    fraction,
    log_ratio,
    positive,
    wide,
)

EPSILON = 1e-6  # of KLDO's code, added to its moving average


class RunningMean(NamedTuple):
    """Mean of all examples seen; begin with two zeros.

    Attributes:
        mean: Of the rewards, no unit.
        count: Number of examples.
    """

    mean: Float[AnyArray, ""]
    count: Float[AnyArray, ""]


def bco_running_mean(
    state: RunningMean,
    logp: Float[AnyArray, " examples"],
    reference: Float[AnyArray, " examples"],
    *,
    beta: Hyperparameter = 0.1,
) -> RunningMean:
    r"""The reward shift of `bco`: a mean over all examples seen, each counted once.

    .. math:: \delta' = \delta + \frac{\sum_i (\beta u_i - \delta)}{N + n}

    As in TRL from 0.17: desirable and undesirable examples alike, in training steps only, no decay.
    TRL before that averaged the means of batches, also of evaluation; a copy in the code of KLDO
    never moves.

    Args:
        state: ``δ`` and ``N`` before this batch; begin with ``RunningMean(0, 0)``, as arrays.
        logp: Summed response log-probability under the policy, nats.
        reference: The same under the frozen reference.
        beta: That of the loss, per nat, above 0.

    Returns:
        The state with this batch, without gradient. It is unchanged by an empty one.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    >>> zero = RunningMean(jnp.zeros(()), jnp.zeros(()))
    >>> after = bco_running_mean(zero, jnp.array([-3.0, -5.0]), jnp.array([-14.0, -14.0]))
    >>> round(float(after.mean), 6), float(after.count)
    (1.0, 2.0)

    References:
        Jung et al. (2024), the reward shift, https://arxiv.org/abs/2404.04656
    """
    u = log_ratio(logp, reference)
    reward = jax.lax.stop_gradient(positive("beta", beta, u) * u)
    mean, count = (jnp.asarray(x, u.dtype) for x in state)
    total = count + len(reward)
    shift = (reward - mean).sum() / jnp.maximum(total, 1.0)
    return jax.lax.stop_gradient(RunningMean(mean + shift, total))


def bco_prompt_weight(
    probability: Float[AnyArray, "*examples"],
) -> Float[Array, "*examples"]:
    r"""Weight of an undesirable example of `bco` whose prompt may be of the other kind.

    .. math:: \min\left(10, \max\left(\tfrac12, \frac{p}{1-p}\right)\right)

    ``p`` is a classifier's probability that the prompt comes from the desirable examples: the odds
    correct for a shift between the two sets of prompts. Bounds as in TRL.

    Args:
        probability: ``p``, from 0 to 1.

    Returns:
        From 0.5 to 10, without gradient.

    >>> bco_prompt_weight(jnp.array([0.0, 0.75, 1.0])).tolist()
    [0.5, 3.0, 10.0]

    References:
        Jung et al. (2024), the underlying distribution matching, https://arxiv.org/abs/2404.04656
    """
    p = wide(probability)
    return jax.lax.stop_gradient(jnp.clip(p / (1 - p), 0.5, 10.0))


def kldo(
    logp: Float[AnyArray, "*batch examples"],
    reference: Float[AnyArray, "*batch examples"],
    desirable: Bool[AnyArray, "*batch examples"],
    *,
    beta: Hyperparameter = 0.1,
) -> Float[Array, "*batch"]:
    r"""KL divergence optimisation: desirable and undesirable responses as far apart as can be told.

    .. math:: -\mathrm{E}_{+}[r] + \log \mathrm{E}_{-}[e^{r}], \quad r = \beta u

    The Donsker-Varadhan bound: never below ``-KL(D+ || D-)``, with equality where ``r`` is
    ``log D+/D-`` and a constant. Undesirable examples are pushed by ``β softmax(r)``, the likeliest
    ones most.

    Args:
        logp: Summed response log-probability under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        desirable: True for a good example, False for a bad one.
        beta: Inverse temperature, per nat, above 0.

    Returns:
        One loss a batch, nats; 0 where policy and reference agree. A class without examples has a
        term of 0.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    Differs:
        The authors' default takes the gradient from a moving average, `kldo_moving_average`, and
        multiplies the second term by a ratio of the two terms that can turn its sign. The ratio is
        neither in the paper nor here.

    References:
        Haldar et al. (2025), the KLDO loss, https://arxiv.org/abs/2502.00657
    """
    u = log_ratio(logp, reference)
    r, good = positive("beta", beta, u) * u, jnp.asarray(desirable)
    return -_mean(r, good) + _finite_or_zero(_log_mean_exp(r, ~good))


def kldo_moving_average(
    logp: Float[AnyArray, "*batch examples"],
    reference: Float[AnyArray, "*batch examples"],
    desirable: Bool[AnyArray, "*batch examples"],
    log_average: Float[AnyArray, "*batch"],
    *,
    beta: Hyperparameter = 0.1,
) -> Float[Array, "*batch"]:
    r"""`kldo` with the gradient of its second term taken from a moving average, as in its code.

    .. math:: -\mathrm{E}_{+}[r] + \log \mathrm{E}_{-}[e^{r}], \qquad
        \frac{\partial\ell}{\partial r_j} := \frac{e^{r_j}}{n_- (A + 10^{-6})}
        \text{ for the undesirable}

    A small batch's own mean of ``e^r`` biases the gradient; an average ``A`` over batches less so.

    Args:
        logp: Summed response log-probability under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        desirable: True for a good example, False for a bad one.
        log_average: ``log A`` of `kldo_log_average`, this batch included: then no undesirable
            example is pushed harder than ``β / rate``. Gets no gradient.
        beta: Inverse temperature, per nat, above 0.

    Returns:
        One loss a batch, nats, with the value of `kldo`. A class without examples has a term of 0.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    References:
        Haldar et al. (2025), the loss as in its code, https://arxiv.org/abs/2502.00657
    """
    u = log_ratio(logp, reference)
    r, good = positive("beta", beta, u) * u, jnp.asarray(desirable)
    still = jax.lax.stop_gradient(r)
    average = jnp.logaddexp(wide(log_average).astype(r.dtype), jnp.log(EPSILON))
    slope = jnp.where(
        good, jnp.zeros_like(r), jnp.exp(bounded(_masked(still, ~good) - average[..., None]))
    )
    slope = jax.lax.stop_gradient(slope) / _count(~good, r)[..., None]
    value = _finite_or_zero(_log_mean_exp(still, ~good))
    return -_mean(r, good) + value + (slope * (r - still)).sum(axis=-1)


def kldo_log_average(
    log_average: Float[AnyArray, "*batch"],
    logp: Float[AnyArray, "*batch examples"],
    reference: Float[AnyArray, "*batch examples"],
    desirable: Bool[AnyArray, "*batch examples"],
    *,
    beta: Hyperparameter = 0.1,
    rate: Hyperparameter = 0.1,
) -> Float[Array, "*batch"]:
    r"""The moving average of `kldo_moving_average`, kept as its logarithm.

    .. math:: A' = \rho\,\mathrm{E}_{-}[e^{r}] + (1 - \rho) A, \qquad A' = \mathrm{E}_{-}[e^{r}]
        \text{ at first}

    The authors' code begins anew in each epoch.

    Args:
        log_average: ``log A`` before this batch; minus infinity for none.
        logp: Summed response log-probability under the policy, nats.
        reference: The same under the frozen reference.
        desirable: True for a good example, False for a bad one.
        beta: That of the loss, per nat, above 0.
        rate: ``ρ``, above 0, at most 1.

    Returns:
        ``log A'``, without gradient; ``log A`` if no example is undesirable.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `rate` not in (0, 1].

    >>> zeros, bad = jnp.zeros(2), jnp.array([False, False])
    >>> float(kldo_log_average(jnp.array(-jnp.inf), zeros + 2.0, zeros, bad, beta=0.5))
    1.0

    References:
        Haldar et al. (2025), the loss as in its code, https://arxiv.org/abs/2502.00657
    """
    u = log_ratio(logp, reference)
    r, bad = positive("beta", beta, u) * u, ~jnp.asarray(desirable)
    rate = jnp.asarray(fraction("rate", rate, u), u.dtype)
    old, new = jnp.asarray(log_average, u.dtype), _log_mean_exp(r, bad)
    mixed = jnp.logaddexp(jnp.log(rate) + new, jnp.log1p(-rate) + old)
    moved = jnp.where(jnp.isneginf(old), new, mixed)
    return jax.lax.stop_gradient(jnp.where(bad.any(axis=-1), moved, old))


def mean_token_probability(
    token_logp: Float[AnyArray, "*batch examples response"],
    is_target: Bool[AnyArray, "*batch examples response"],
) -> Float[Array, "*batch"]:
    r"""What the losses of FLAT read: the mean probability of a batch's tokens.

    .. math:: P = \frac{1}{BT} \sum_{i,t} e^{\log\pi_{i,t}}

    Over all ``BT`` positions, where those that are not scored count as 0: as the authors do it, so
    that padding lowers it and the pull on a token is ``p_t / BT`` times that on ``P``.

    Args:
        token_logp: Log-probability of each token, nats; not read where it is not scored.
        is_target: The scored tokens.

    Returns:
        From 0 to 1; one number a batch.

    Raises:
        ValueError: no examples, or no tokens.

    >>> token_logp = jnp.log(jnp.array([[0.5, 1.0], [0.25, 0.7]]))
    >>> is_target = jnp.array([[True, True], [True, False]])
    >>> round(float(mean_token_probability(token_logp, is_target)), 4)
    0.4375

    References:
        Wang et al. (2024), as in its code, https://arxiv.org/abs/2410.11143
    """
    token_logp, is_target = wide(token_logp), jnp.asarray(is_target)
    if 0 in token_logp.shape[-2:]:
        expected = "at least one example and one token"
        raise ValueError(f"token_logp: got shape {token_logp.shape}, expected {expected}")
    kept = jnp.where(is_target, token_logp, jnp.zeros_like(token_logp))
    return jnp.where(is_target, jnp.exp(kept), jnp.zeros_like(kept)).mean(axis=(-2, -1))


def flat_kl(probability: Float[AnyArray, "*batch 2"]) -> Float[Array, "*batch"]:
    r"""Forget-data-only loss adjustment with the KL divergence.

    .. math:: -P_w + e^{P_l - 1}

    ``-g(P_w) + f*(g(P_l))``, the variational form of an f-divergence ``f`` with conjugate ``f*``
    and output ``g``: a template answer is made likelier, the one to forget less likely. Those whose
    published signs do that are here: KL, total variation, Jensen-Shannon, Pearson, Jeffrey.

    Args:
        probability: ``P`` of `mean_token_probability`, of the template answers, then of the
            answers to forget: the chosen, then the rejected.

    Returns:
        One loss a batch, no unit.

    Differs:
        The code's branches for the reverse KL and the squared Hellinger divergence pull both
        answers the wrong way: their outputs fall with ``P_w`` and their conjugates with ``P_l``.
        That for Neyman's pulls the template down, and its conjugate is without ``g``. The paper
        uses none of the three.

    References:
        Wang et al. (2024), the FLAT loss, https://arxiv.org/abs/2410.11143
    """
    good, bad = _both(probability)
    return -good + jnp.exp(bad - 1)


def flat_total_variation(probability: Float[AnyArray, "*batch 2"]) -> Float[Array, "*batch"]:
    r"""Forget-data-only loss adjustment with the total variation, the authors' default.

    .. math:: -\tfrac12\tanh P_w + \tfrac12\tanh P_l

    Args:
        probability: ``P`` of `mean_token_probability`: template answers, answers to forget.

    Returns:
        One loss a batch, no unit. See `flat_kl` for the family.

    References:
        Wang et al. (2024), the FLAT loss, https://arxiv.org/abs/2410.11143
    """
    good, bad = _both(probability)
    return (jnp.tanh(bad) - jnp.tanh(good)) / 2


def flat_jensen_shannon(probability: Float[AnyArray, "*batch 2"]) -> Float[Array, "*batch"]:
    r"""Forget-data-only loss adjustment with the Jensen-Shannon divergence.

    .. math:: \log(1 + e^{-P_w}) + P_l + \log(1 + e^{-P_l}) - 2\log 2

    Args:
        probability: ``P`` of `mean_token_probability`: template answers, answers to forget.

    Returns:
        One loss a batch, no unit. See `flat_kl` for the family.

    References:
        Wang et al. (2024), the FLAT loss, https://arxiv.org/abs/2410.11143
    """
    good, bad = _both(probability)
    return jax.nn.softplus(-good) + jax.nn.softplus(bad) - 2 * jnp.log(2.0)


def flat_pearson(probability: Float[AnyArray, "*batch 2"]) -> Float[Array, "*batch"]:
    r"""Forget-data-only loss adjustment with the Pearson divergence.

    .. math:: -P_w + P_l + \tfrac14 P_l^2

    Args:
        probability: ``P`` of `mean_token_probability`: template answers, answers to forget.

    Returns:
        One loss a batch, no unit. See `flat_kl` for the family.

    References:
        Wang et al. (2024), the FLAT loss, https://arxiv.org/abs/2410.11143
    """
    good, bad = _both(probability)
    return -good + bad + bad**2 / 4


def flat_jeffrey(probability: Float[AnyArray, "*batch 2"]) -> Float[Array, "*batch"]:
    r"""Forget-data-only loss adjustment with Jeffrey's divergence.

    .. math:: -P_w + P_l + \tfrac14 P_l^2 + \tfrac1{16} P_l^3

    The conjugate is a series to third order, as in the authors' code.

    Args:
        probability: ``P`` of `mean_token_probability`: template answers, answers to forget.

    Returns:
        One loss a batch, no unit. See `flat_kl` for the family.

    References:
        Wang et al. (2024), the FLAT loss as in its code, https://arxiv.org/abs/2410.11143
    """
    good, bad = _both(probability)
    return -good + bad + bad**2 / 4 + bad**3 / 16


def _both(probability: AnyArray) -> tuple[Array, Array]:
    p = wide(probability)
    return p[..., 0], p[..., 1]


def _count(mask: Array, like: Array) -> Array:
    """How many are True, at least 1."""
    return jnp.maximum(mask.sum(axis=-1).astype(like.dtype), 1.0)


def _mean(x: Array, mask: Array) -> Array:
    """Over the last axis, where the mask is True; of none, 0."""
    return jnp.where(mask, x, jnp.zeros_like(x)).sum(axis=-1) / _count(mask, x)


def _masked(x: Array, mask: Array) -> Array:
    """``x``, and where the mask is False the largest of the others: ``exp`` cannot overflow."""
    peak = jnp.where(mask, x, -jnp.inf).max(axis=-1, keepdims=True, initial=-jnp.inf)
    peak = jax.lax.stop_gradient(jnp.where(jnp.isneginf(peak), jnp.zeros_like(peak), peak))
    return jnp.where(mask, x, jnp.broadcast_to(peak, x.shape))


def _log_mean_exp(x: Array, mask: Array) -> Array:
    """Over the last axis, where the mask is True; of none, minus infinity."""
    kept = _masked(x, mask)
    peak = jax.lax.stop_gradient(kept.max(axis=-1, keepdims=True, initial=-jnp.inf))
    total = jnp.where(mask, jnp.exp(kept - peak), jnp.zeros_like(x)).sum(axis=-1)
    some = mask.any(axis=-1)
    found = jnp.log(jnp.where(some, total / _count(mask, x), jnp.ones_like(total))) + peak[..., 0]
    return jnp.where(some, found, jnp.full_like(found, -jnp.inf))


def _finite_or_zero(x: Array) -> Array:
    """0 for minus infinity, the logarithm of a class without examples."""
    return jnp.where(jnp.isneginf(x), jnp.zeros_like(x), x)
