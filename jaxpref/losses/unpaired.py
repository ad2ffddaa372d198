r"""Losses of single examples: ``[*examples] -> [*examples]``.

``u = logp - reference`` is the log-ratio of a response, ``σ`` the logistic function.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from jaxpref.losses._inputs import (
    AnyArray,
    Hyperparameter,
    at_least_one,
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
    ``λ_U``. Equal to ``λ(1 - σ(sβ(u - z)))``, the form of HALOs and TRL.

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

    Differs:
        ``z`` is a constant, as in the paper; the older ``kto_pair`` of HALOs takes it from the
        other half of the same pairs and lets a gradient through it.

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


def bco(
    logp: Float[AnyArray, "*examples"],
    reference: Float[AnyArray, "*examples"],
    desirable: Bool[AnyArray, "*examples"],
    delta: float | Float[AnyArray, ""],
    *,
    beta: Hyperparameter = 0.1,
) -> Float[Array, "*examples"]:
    r"""Binary classifier optimisation: rewards above their average, or below.

    .. math:: -\log\sigma(s(\beta u - \delta)), \quad s = \pm 1

    ``s`` is +1 for a desirable example and -1 for an undesirable one. Where the prompts of the two
    classes differ, multiply the undesirable losses by `bco_prompt_weight`.

    Args:
        logp: Summed response log-probability under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        desirable: True for a good example, False for a bad one.
        delta: ``δ``, a mean reward ``βu``, no unit: one number for the batch; gets no gradient.
        beta: Inverse temperature, per nat, above 0.

    Returns:
        One loss an example, nats. The sources' mean is over all examples.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    Differs:
        The paper's ``δ`` is the mean of the two classes' mean rewards. TRL keeps a running mean
        over all examples, the same for classes of equal size, which is `bco_running_mean`; its
        ``bco_pair`` has none since 0.29.

    References:
        Jung et al. (2024), the BCO loss, https://arxiv.org/abs/2404.04656
    """
    u = log_ratio(logp, reference)
    gap = positive("beta", beta, u) * u
    gap = gap - jax.lax.stop_gradient(jnp.asarray(delta, gap.dtype))
    return -jax.nn.log_sigmoid(jnp.where(jnp.asarray(desirable), gap, -gap))


def npo(
    logp: Float[AnyArray, "*examples"],
    reference: Float[AnyArray, "*examples"],
    *,
    beta: Hyperparameter = 0.1,
) -> Float[Array, "*examples"]:
    r"""Negative preference optimisation: the rejected half of DPO, to forget an answer.

    .. math:: -\frac{2}{\beta}\log\sigma(-\beta u)

    ``d_l = 2σ(βu)``: 1 where policy and reference agree, less as the answer is forgotten, and 1
    everywhere for ``β -> 0``, which is gradient ascent on ``-log π``. The authors add what is to be
    kept: ``npo(forget, ...) + sft(retain)`` with weight 1, or a divergence from the reference on
    the retained data.

    Args:
        logp: Summed log-probability of the answer to forget under the policy, nats.
        reference: The same under the model that still knows it; gets no gradient.
        beta: Inverse temperature, per nat, above 0.

    Returns:
        One loss an example, nats; ``2 log(2) / β`` where policy and reference agree.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    References:
        Zhang et al. (2024), the NPO loss, https://arxiv.org/abs/2404.05868
    """
    u = log_ratio(logp, reference)
    beta = positive("beta", beta, u)
    return -(2 / beta) * jax.nn.log_sigmoid(-beta * u)


def poft(
    logp: Float[AnyArray, "*examples"],
    lengths: Num[AnyArray, "*examples"],
    aligned: Float[AnyArray, "*examples models"],
) -> Float[Array, "*examples"]:
    r"""Preference-oriented fine-tuning: be surer of the target than the average aligned model.

    .. math:: -\log\sigma\left(\frac{\log\pi}{n} - \frac{1}{M}\sum_j a_j\right)

    ``a_j`` is the mean log-probability of a token under the ``j``-th aligned model, with its own
    tokens and their number. The less likely those find a target, the less it pulls:
    ``d_w = σ(-x)/n``.

    Args:
        logp: Summed response log-probability under the policy, nats.
        lengths: Number of scored tokens.
        aligned: ``a_j`` of each aligned model, nats per token; gets no gradient.

    Returns:
        One loss an example, nats. An empty response has a mean of 0.

    Raises:
        ValueError: no models.

    Differs:
        Both means read response tokens; the authors' code reads all tokens of the conversation for
        the policy, the answers' for the aligned models.

    References:
        Fan et al. (2025), Eqs. 5 to 8, https://arxiv.org/abs/2412.12865
    """
    a = per_token(wide(logp), lengths)
    baseline = wide(aligned).astype(a.dtype).mean(axis=-1)
    return -jax.nn.log_sigmoid(a - jax.lax.stop_gradient(baseline))


def dco(
    logp: Float[AnyArray, "*examples"], *, samples: Hyperparameter = 256
) -> Float[Array, "*examples"]:
    r"""Direct coverage optimisation: the chance that one of ``N`` samples is the answer.

    .. math:: -\log\left(1 - (1 - \pi)^N\right)

    ``d_w = N π (1-π)^{N-1} / (1 - (1-π)^N)``: 1 while ``π`` is far below ``1/N``, as in `sft`, and
    0 far above, where more confidence cannot help.

    Args:
        logp: ``log π``, summed over the response, nats.
        samples: ``N``, 1 (`sft`) or above.

    Returns:
        One loss an example, nats. Computed from logarithms: no answer is too unlikely. One more
        probable than the dtype resolves counts as ``1 - eps`` in value and slope.

    Raises:
        ValueError: `samples` is not a finite number, 1 or above.

    >>> round(float(dco(jnp.log(jnp.array(0.5)), samples=2)), 4)  # -log(3/4)
    0.2877

    Differs:
        The authors' code has this gradient and another value, ``d_w`` times the negative
        log-likelihood.

    References:
        Chen et al. (2025), the DCO loss, https://arxiv.org/abs/2502.07154
    """
    x = wide(logp)
    samples = at_least_one("samples", samples, x)
    eps = jnp.finfo(x.dtype).eps
    x = x - jax.lax.stop_gradient(jax.nn.relu(x + eps))
    # log(-log(1 - p)); log p itself where p < eps.
    tiny = x < jnp.log(eps)
    log_failure = jnp.log(-jax.nn.log1mexp(jnp.where(tiny, jnp.ones_like(x), -x)))
    log_failures = jnp.log(jnp.asarray(samples, x.dtype)) + jnp.where(tiny, x, log_failure)
    # -log(1 - exp(-failures)); -log(failures) where these are few.
    few = log_failures < jnp.log(eps)
    many = jnp.exp(jnp.where(few, jnp.zeros_like(x), log_failures))
    return jnp.where(few, -log_failures, -jax.nn.log1mexp(many))
