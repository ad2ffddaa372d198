r"""DPO regularised by another divergence than the reverse Kullback-Leibler one.

``u = logp - reference`` is the log-ratio of a response, ``σ`` the logistic function. A divergence
``D_f(π, π_ref) = E_ref[f(π / π_ref)]`` makes ``f'(e^u)`` the reward in place of ``u``; the reverse
Kullback-Leibler divergence makes `dpo`. Every loss is ``[*pairs 2] -> [*pairs]``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.losses._inputs import (
    AnyArray,
    Hyperparameter,
    bounded_together,
    fraction,
    grown,
    log_ratio,
    positive,
    wide,
)
from jaxpref.losses.pairwise import margin


def f_dpo_forward_kl(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""DPO regularised by the forward Kullback-Leibler divergence, from reference to policy.

    .. math:: -\log\sigma\left(\beta(e^{-u_l} - e^{-u_w})\right)

    ``d_y = β e^{-u_y} σ(-x)``: whichever response has fallen further below its reference is pulled
    exponentially harder, the rejected one downwards.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Strength of the regularisation, above 0.

    Returns:
        One loss a pair, nats. Near overflow, a log-ratio below -79 in float32, both responses count
        as moved up together until the lower one is there, and their pulls stand still.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    Differs:
        TRL up to 0.28 reaches it as the alpha divergence of 1.

    References:
        Wang et al. (2023), Table 1, https://arxiv.org/abs/2309.16240
    """
    u = log_ratio(logp, reference)
    x = positive("beta", beta, u) * margin(-grown(-u))
    return -jax.nn.log_sigmoid(x)


def f_dpo_jensen_shannon(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""DPO regularised by the Jensen-Shannon divergence.

    .. math:: -\log\sigma\left(\beta(\log\sigma(u_w) - \log\sigma(u_l))\right)

    ``d_y = β σ(-u_y) σ(-x)``: a response far above its reference has hardly any pull left.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Strength of the regularisation, above 0.

    Returns:
        One loss a pair, nats; ``log 2`` where policy and reference agree.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    Differs:
        TRL 0.28 compares the divergence's name with an enumeration, so that a plain string
        silently means `dpo`.

    References:
        Wang et al. (2023), Table 1, https://arxiv.org/abs/2309.16240
    """
    u = log_ratio(logp, reference)
    return -jax.nn.log_sigmoid(positive("beta", beta, u) * margin(jax.nn.log_sigmoid(u)))


def f_dpo_alpha(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
    alpha: Hyperparameter = 0.5,
) -> Float[Array, "*pairs"]:
    r"""DPO regularised by an alpha divergence, between the two Kullback-Leibler divergences.

    .. math:: -\log\sigma\left(\frac{\beta}{\alpha}(e^{-\alpha u_l} - e^{-\alpha u_w})\right)

    ``d_y = β e^{-α u_y} σ(-x)``. The limit ``α -> 0`` is `dpo`, ``α = 1`` is `f_dpo_forward_kl`.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Strength of the regularisation, above 0.
        alpha: Above 0, at most 1.

    Returns:
        One loss a pair, nats. Near overflow, ``-α u`` above 79 in float32, as `f_dpo_forward_kl`.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `alpha` not in (0, 1].

    Differs:
        `alpha` as in the paper, its code and TRL up to 0.28, where it is 1 by default. In TRL from
        0.29 on the coefficient is ``1 - α``, and exponents end at 80 with no pull beyond.

    References:
        Wang et al. (2023), Table 1, https://arxiv.org/abs/2309.16240
    """
    u = log_ratio(logp, reference)
    alpha = fraction("alpha", alpha, u)
    score = -grown(-alpha * u) / alpha
    return -jax.nn.log_sigmoid(positive("beta", beta, u) * margin(score))


def chi_po(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.05,
    r_max: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Chi-squared preference optimisation: DPO regularised by χ² and the reverse divergence.

    .. math:: -\log\sigma\left(\mathrm{clip}_{\pm 2R}\left(\beta(\phi(u_w) - \phi(u_l))\right)
        \right), \quad \phi(u) = u + e^u

    ``d_y = β (1 + e^{u_y}) σ(-x)`` within the clip, 0 beyond: a response above its reference is
    pulled harder, the opposite of `f_dpo_forward_kl`. Our transcription, from notes and other code:
    the authors' was not at hand.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Strength of the regularisation, above 0; 0.05 and 0.005 in the paper.
        r_max: ``R``, the range of rewards, above 0; the scaled difference is clipped at ``±2R``.

    Returns:
        One loss a pair, nats. Where ``e^u`` nears overflow, both exponentials shrink by one factor:
        the order stays, the numbers are finite.

    Raises:
        ValueError: `beta` or `r_max` is not a finite number above 0.

    Differs:
        Other code clips each side, not the difference.

    References:
        Huang et al. (2024), the χPO loss, https://arxiv.org/abs/2407.13399
    """
    u = log_ratio(logp, reference)
    beta, r_max = positive("beta", beta, u), positive("r_max", r_max, u)
    reward = u + jnp.exp(bounded_together(u))
    return -jax.nn.log_sigmoid(jnp.clip(beta * margin(reward), -2 * r_max, 2 * r_max))


def h_dpo(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
    alpha: Hyperparameter = 0.95,
) -> Float[Array, "*pairs"]:
    r"""DPO whose regulariser weighs the policy's entropy by a factor of its own.

    .. math:: -\log\sigma\left(\alpha\beta(\log\pi_w - \log\pi_l)
        - \beta(\log\pi_{ref,w} - \log\pi_{ref,l})\right)

    Below 1, `alpha` makes the policy sharper than DPO's, above 1 flatter; ``d_w = d_l = αβ σ(-x)``.
    Where policy and reference agree the loss is not ``log 2``. Not the Hölder-DPO of the same
    letters. Our transcription: the paper's equation is from memory, checked against other code.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Strength of the regularisation, per nat, above 0.
        alpha: Weight of the entropy, above 0; 1 is DPO.

    Returns:
        One loss a pair, nats.

    Raises:
        ValueError: `beta` or `alpha` is not a finite number above 0.

    References:
        Omura, Fujita and Kataoka (2024), the H-DPO loss, https://arxiv.org/abs/2411.07595
    """
    logp, reference = wide(logp), jax.lax.stop_gradient(wide(reference))
    beta, alpha = positive("beta", beta, logp), positive("alpha", alpha, logp)
    return -jax.nn.log_sigmoid(alpha * beta * margin(logp) - beta * margin(reference))
