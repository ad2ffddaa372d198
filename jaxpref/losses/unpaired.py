r"""Losses of single examples: ``[*examples] -> [*examples]``.

``u = logp - reference`` is the log-ratio of a response, ``σ`` the logistic function.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from jaxpref.losses._inputs import (
    AnyArray,
    Hyperparameter,
    log_ratio,
    nonnegative,
    per_token,
    positive,
    wide,
)


def sft(logp: Float[AnyArray, "*examples"]) -> Float[Array, "*examples"]:
    r"""Supervised fine-tuning: negative log-likelihood, a sum over tokens.

    .. math:: -\log\pi

    For the chosen responses of pairs: ``sft(logp[..., 0])``.

    Args:
        logp: Summed response log-probability, nats.

    Returns:
        One loss an example, nats. An empty response costs 0.

    >>> sft(jnp.array([-3.0, -5.0])).tolist()
    [3.0, 5.0]

    References:
        Ouyang et al. (2022), Section 3.5 (SFT), https://arxiv.org/abs/2203.02155
    """
    return -wide(logp)


def sft_token_mean(
    logp: Float[AnyArray, "*examples"], lengths: Num[AnyArray, "*examples"]
) -> Float[Array, "*examples"]:
    r"""Supervised fine-tuning: negative log-likelihood, a mean over the tokens of each response.

    .. math:: -\frac{\log\pi}{n}

    Trainers that take one mean over all tokens of a batch weigh long responses more; for that,
    divide the sum of `sft` by the sum of `lengths`.

    Args:
        logp: Summed response log-probability, nats.
        lengths: Number of scored tokens.

    Returns:
        One loss an example, nats per token. An empty response costs 0.

    References:
        Ouyang et al. (2022), Section 3.5 (SFT), https://arxiv.org/abs/2203.02155
    """
    return -per_token(wide(logp), lengths)


def kto(
    logp: Float[AnyArray, "*examples"],
    reference: Float[AnyArray, "*examples"],
    desirable: Bool[AnyArray, "*examples"],
    kl_baseline: float | Float[AnyArray, ""],
    *,
    beta: Hyperparameter = 0.1,
    desirable_weight: Hyperparameter = 1.0,
    undesirable_weight: Hyperparameter = 1.0,
) -> Float[Array, "*examples"]:
    r"""Kahneman-Tversky optimisation: how far an example is from being a clear gain, or loss.

    .. math:: \lambda_s\,\sigma(-s\beta(u - z)), \quad s = \pm 1

    ``s`` is +1 for a desirable example, weight ``λ_D``, and -1 for an undesirable one, weight
    ``λ_U``. Equal to ``λ(1 - σ(sβ(u - z)))``, the form of HALOs and TRL. ``z`` is a constant, as in
    the paper; the older ``kto_pair`` of HALOs lets a gradient through it.

    Args:
        logp: Summed response log-probability under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        desirable: True for a good example, False for a bad one.
        kl_baseline: ``z``, nats, not times `beta`: one number for the batch, from `kto_baseline`;
            gets no gradient.
        beta: Inverse temperature, per nat, above 0.
        desirable_weight: ``λ_D``, 0 or above.
        undesirable_weight: ``λ_U``, 0 or above.

    Returns:
        One loss an example, between 0 and its weight. The papers' mean is over all examples.

    Raises:
        ValueError: `beta` is not a finite number above 0, or a weight not one of 0 or above.

    >>> two = kto(jnp.array([-3.0, -3.0]), jnp.array([-3.0, -3.0]), jnp.array([True, False]), 0.0)
    >>> two.tolist()
    [0.5, 0.5]

    References:
        Ethayarajh et al. (2024), the KTO loss, https://arxiv.org/abs/2402.01306
    """
    u = log_ratio(logp, reference)
    beta = positive("beta", beta, u)
    gain = nonnegative("desirable_weight", desirable_weight, u)
    loss = nonnegative("undesirable_weight", undesirable_weight, u)
    gap = beta * (u - jax.lax.stop_gradient(jnp.asarray(kl_baseline, u.dtype)))
    wanted = jnp.asarray(desirable)
    return jnp.where(wanted, gain, loss) * jax.nn.sigmoid(jnp.where(wanted, -gap, gap))


def kto_baseline(
    logp: Float[AnyArray, " examples"], reference: Float[AnyArray, " examples"]
) -> Float[Array, ""]:
    r"""The baseline of `kto`: a batch estimate of the divergence from the reference, never below 0.

    .. math:: z = \max\left(0, \frac{1}{N}\sum_i u(x_i, y'_i)\right)

    ``y'_i`` is a completion of *another* prompt of the batch, by custom that of the next example.
    The bound is applied after the mean: over several devices, average ``logp - reference`` over
    all of them first (a global array does so by itself). HALOs leaves ratios of exactly 0 out.

    Args:
        logp: Summed log-probability of each mismatched completion under the policy, nats.
        reference: The same under the frozen reference.

    Returns:
        One number, nats, without gradient.

    Raises:
        ValueError: no examples.

    >>> float(kto_baseline(jnp.array([-3.0, -5.0]), jnp.array([-4.0, -5.0])))
    0.5

    References:
        Ethayarajh et al. (2024), the estimate of the reference point,
        https://arxiv.org/abs/2402.01306
    """
    if logp.shape[0] == 0:
        raise ValueError("logp: got no examples, expected at least one")
    return jax.lax.stop_gradient(jax.nn.relu(log_ratio(logp, reference).mean()))
