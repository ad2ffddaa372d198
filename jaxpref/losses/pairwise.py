r"""Losses of pairs against a reference model.

``u = logp - reference`` is the log-ratio of a response, ``u_w`` of the chosen one, ``u_l`` of the
rejected one, ``n_w`` and ``n_l`` the numbers of scored tokens, ``σ`` the logistic function.
Every loss is ``[*pairs 2] -> [*pairs]``.
"""

import jax
from jaxtyping import Array, Float, Num

from jaxpref.losses._inputs import (
    AnyArray,
    Hyperparameter,
    counts,
    flip_rate,
    fraction,
    log_ratio,
    nonnegative,
    per_token,
    positive,
    wide,
)


def margin(x: Float[AnyArray, "*pairs 2"]) -> Float[Array, "*pairs"]:
    r"""Chosen minus rejected.

    .. math:: x_w - x_l

    Args:
        x: Any quantity of pairs, chosen first.

    Returns:
        One difference a pair, in the unit of `x`, at least float32.

    >>> import jax.numpy as jnp
    >>> float(margin(jnp.array([-3.0, -5.0])))
    2.0

    References:
        The reward margin of Rafailov et al. (2023), Section 4, https://arxiv.org/abs/2305.18290
    """
    x = wide(x)
    return x[..., 0] - x[..., 1]


def dpo(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""Direct preference optimisation.

    .. math:: -\log\sigma(\beta (u_w - u_l))

    Both responses are pushed equally hard, ``d_w = d_l = β σ(-β(u_w - u_l))``, so only the
    geometry of their gradients decides what each log-probability does. Sums, never token means.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0.

    Returns:
        One loss a pair, nats; ``log 2`` where policy and reference agree.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    >>> import jax.numpy as jnp
    >>> logp = jnp.array([-3.0, -5.0])
    >>> round(float(dpo(logp, reference=logp)), 6)
    0.693147

    References:
        Rafailov et al. (2023), Eq. 7, https://arxiv.org/abs/2305.18290
    """
    u = log_ratio(logp, reference)
    return -jax.nn.log_sigmoid(positive("beta", beta, u) * margin(u))


def cdpo(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
    epsilon: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""Conservative DPO: cross-entropy with labels that are wrong at a known rate.

    .. math:: -(1-\epsilon)\log\sigma(x) - \epsilon\log\sigma(-x), \quad x = \beta(u_w - u_l)

    ``d_w = d_l = β(σ(-x) - ε)``: the pull turns round past ``x = log((1-ε)/ε)`` and holds the
    margin there.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0.
        epsilon: Share of swapped labels, from 0 (DPO) to below 0.5.

    Returns:
        One loss a pair, nats.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `epsilon` not in [0, 0.5).

    Differs:
        TRL has it as ``label_smoothing`` of DPO up to 0.28; later versions accept that and ignore
        it.

    References:
        Mitchell (2023), A note on DPO with noisy preferences, https://ericmitchell.ai/cdpo.pdf
    """
    u = log_ratio(logp, reference)
    epsilon = flip_rate("epsilon", epsilon, u)
    x = positive("beta", beta, u) * margin(u)
    return -(1 - epsilon) * jax.nn.log_sigmoid(x) - epsilon * jax.nn.log_sigmoid(-x)


def robust_dpo(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
    epsilon: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""Robust DPO: its mean over labels swapped at a known rate is the DPO loss of clean ones.

    .. math:: \frac{-(1-\epsilon)\log\sigma(x) + \epsilon\log\sigma(-x)}{1-2\epsilon},
        \quad x = \beta(u_w - u_l)

    The sign of ``ε`` is opposite to `cdpo`: ``d_w = d_l = β(σ(-x) + ε/(1-2ε))`` never vanishes,
    and the loss has no lower bound.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0.
        epsilon: Share of swapped labels, from 0 (DPO) to below 0.5.

    Returns:
        One loss a pair, nats; may be negative.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `epsilon` not in [0, 0.5).

    References:
        Chowdhury, Kini and Natarajan (2024), the rDPO loss, https://arxiv.org/abs/2403.00409
    """
    u = log_ratio(logp, reference)
    epsilon = flip_rate("epsilon", epsilon, u)
    x = positive("beta", beta, u) * margin(u)
    unscaled = -(1 - epsilon) * jax.nn.log_sigmoid(x) + epsilon * jax.nn.log_sigmoid(-x)
    return unscaled / (1 - 2 * epsilon)


def ipo(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    tau: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""Identity preference optimisation on summed log-ratios: a margin to reach and keep.

    .. math:: \left(u_w - u_l - \frac{1}{2\tau}\right)^2

    The pull turns round past the target.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        tau: Strength of the regularisation, above 0; the target margin is ``1/(2τ)`` nats.

    Returns:
        One loss a pair, nats squared.

    Raises:
        ValueError: `tau` is not a finite number above 0.

    Differs:
        The form of the paper and of the DPO authors' code. TRL since 0.7.11 and HALOs use token
        means, which is `ipo_length_normalised`.

    References:
        Azar et al. (2023), Eq. 17, https://arxiv.org/abs/2310.12036
    """
    u = log_ratio(logp, reference)
    return (margin(u) - 1 / (2 * positive("tau", tau, u))) ** 2


def ipo_length_normalised(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    tau: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""Identity preference optimisation on log-ratios averaged over tokens.

    .. math:: \left(\frac{u_w}{n_w} - \frac{u_l}{n_l} - \frac{1}{2\tau}\right)^2

    ``n`` counts the scored tokens. The pull turns round past the target.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        lengths: Number of scored tokens of each response.
        tau: Strength of the regularisation, above 0; the target is ``1/(2τ)`` nats a token.

    Returns:
        One loss a pair, (nats per token) squared. An empty response has a mean of 0.

    Raises:
        ValueError: `tau` is not a finite number above 0.

    Differs:
        The form of TRL since 0.7.11, which reports the authors' word that they used it, not of the
        paper's equation. HALOs divides by the tokens of nonzero log-ratio instead, which is 0/0
        where policy and reference agree.

    References:
        Azar et al. (2023), Eq. 17, with token means, https://arxiv.org/abs/2310.12036
    """
    u = per_token(log_ratio(logp, reference), lengths)
    return (margin(u) - 1 / (2 * positive("tau", tau, u))) ** 2


def hinge(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""Hinge on the log-ratio margin: no pull once it is wide enough.

    .. math:: \max(0, 1 - \beta(u_w - u_l))

    The hinge-norm loss of RSO.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0; the margin to reach is ``1/β`` nats.

    Returns:
        One loss a pair, no unit. At the kink the derivative is 0.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    Differs:
        TRL calls it SLiC, but `slic_hf` has no reference and a term more.

    References:
        Liu et al. (2023), the hinge-norm loss, https://arxiv.org/abs/2309.06657
    """
    u = log_ratio(logp, reference)
    return jax.nn.relu(1 - positive("beta", beta, u) * margin(u))


def r_dpo(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
    alpha: Hyperparameter = 0.01,
) -> Float[Array, "*pairs"]:
    r"""DPO of a reward that pays for length.

    .. math:: -\log\sigma(\beta(u_w - u_l) + \alpha(n_w - n_l))

    The plus follows from maximising ``r - α n``, whose implicit reward is
    ``β u + α n``: a longer chosen response is pushed less. ``α`` is not multiplied by ``β``.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, per nat, above 0.
        alpha: Price of a token, 0 (DPO) or above.

    Returns:
        One loss a pair, nats.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `alpha` not one of 0 or above.

    References:
        Park et al. (2024), the length-regularised DPO loss, https://arxiv.org/abs/2403.19159
    """
    u = log_ratio(logp, reference)
    beta, alpha = positive("beta", beta, u), nonnegative("alpha", alpha, u)
    return -jax.nn.log_sigmoid(beta * margin(u) + alpha * margin(counts(lengths, u)))


def dpop(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
    lam: Hyperparameter = 50.0,
) -> Float[Array, "*pairs"]:
    r"""DPO-positive: a penalty while the chosen response is less likely than under the reference.

    .. math:: -\log\sigma(\beta (u_w - u_l - \lambda \max(0, -u_w)))

    The penalty is inside the logistic and multiplied by ``β``. ``d_w/d_l = 1 + λ`` while the
    penalty is on, 1 otherwise.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0.
        lam: Weight of the penalty, 0 (DPO) or above.

    Returns:
        One loss a pair, nats. At ``u_w = 0``, the first step, the penalty has derivative 0.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `lam` not one of 0 or above.

    Differs:
        Some code has the penalty outside the logistic. turbo-alignment's default `lam` is 0.1.

    References:
        Pal et al. (2024), the DPOP loss, https://arxiv.org/abs/2402.13228
    """
    u = log_ratio(logp, reference)
    beta, lam = positive("beta", beta, u), nonnegative("lam", lam, u)
    return -jax.nn.log_sigmoid(beta * (margin(u) - lam * jax.nn.relu(-u[..., 0])))


def dpo_shift(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
    shift: Hyperparameter = 0.75,
) -> Float[Array, "*pairs"]:
    r"""DPO that counts the rejected response for less, to keep the chosen one from falling.

    .. math:: -\log\sigma(\beta (u_w - f u_l))

    ``d_w/d_l = 1/f`` at every margin: a pair whose chosen response falls under DPO may rise, and
    one whose rejected response falls may rise as well. ``f`` multiplies the reference, too, in the
    paper and in its code, so that the loss is ``log 2`` where policy and reference agree.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0.
        shift: ``f``, above 0 and at most 1 (DPO); 0.5 to 0.95 in the published runs, fixed or
            changed linearly over training, for which it may be traced.

    Returns:
        One loss a pair, nats.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `shift` not in (0, 1].

    References:
        Yang et al. (2025), the DPO-Shift loss, https://arxiv.org/abs/2502.07599
    """
    u = log_ratio(logp, reference)
    beta, shift = positive("beta", beta, u), fraction("shift", shift, u)
    return -jax.nn.log_sigmoid(beta * (u[..., 0] - shift * u[..., 1]))


def ln_dpo(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 2.0,
) -> Float[Array, "*pairs"]:
    r"""Length-normalised DPO: the margin of log-ratios averaged over tokens.

    .. math:: -\log\sigma\left(\beta\left(\frac{u_w}{n_w} - \frac{u_l}{n_l}\right)\right)

    Policy and reference are both divided, so ``d_y = β σ(-x) / n_y``. `beta` is on another scale
    than DPO's, about the average length times it.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, tokens per nat, above 0.

    Returns:
        One loss a pair, nats. An empty response has a mean of 0.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    References:
        Ahrabian et al. (2024), LN-DPO, https://arxiv.org/abs/2407.15229
    """
    u = per_token(log_ratio(logp, reference), lengths)
    return -jax.nn.log_sigmoid(positive("beta", beta, u) * margin(u))


def rpo(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.01,
    eta: Hyperparameter = 0.005,
) -> Float[Array, "*pairs"]:
    r"""Regularised preference optimisation: DPO and the likelihood of the chosen, as a sum.

    .. math:: -\log\sigma(\beta(u_w - u_l)) - \eta\beta\log\pi_w

    The form of the authors' trainer: the weight is `eta` times `beta`, so
    ``d_w = β(σ(-x) + η)`` against ``d_l = β σ(-x)``.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0.
        eta: Weight of the likelihood term, 0 (DPO) or above, times `beta`.

    Returns:
        One loss a pair, nats.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `eta` not one of 0 or above.

    Differs:
        The authors' other code and TRL average the likelihood term over tokens, `rpo_token_mean`.

    References:
        Liu et al. (2024), the RPO loss as in its code, https://arxiv.org/abs/2405.16436
    """
    u = log_ratio(logp, reference)
    beta, eta = positive("beta", beta, u), nonnegative("eta", eta, u)
    return -jax.nn.log_sigmoid(beta * margin(u)) - eta * beta * wide(logp)[..., 0]


def rpo_token_mean(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
    alpha: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""DPO and the likelihood of the chosen response, as a mean over its tokens.

    .. math:: -\log\sigma(\beta(u_w - u_l)) - \alpha a_w

    ``d_w = β σ(-x) + α/n_w``. The likelihood term of RPO and of iterative reasoning preference
    optimisation as most code has it.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        lengths: Number of scored tokens of each response; only the chosen one's is used.
        beta: Inverse temperature, per nat, above 0.
        alpha: Weight of the likelihood term, 0 (DPO) or above, not times `beta`.

    Returns:
        One loss a pair, nats. An empty response has a mean of 0.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `alpha` not one of 0 or above.

    Differs:
        TRL means over all chosen tokens of the batch, not over each response. TRL 0.9 weighs the
        DPO term instead; from 0.10 to 0.28 ``rpo_alpha`` is `alpha`, since 0.12 without the tokens
        of id 0; from 0.29 on it is ``loss_type=["sigmoid", "sft"]`` with ``loss_weights``.

    References:
        Pang et al. (2024), Eq. 1, https://arxiv.org/abs/2404.19733
    """
    u = log_ratio(logp, reference)
    beta, alpha = positive("beta", beta, u), nonnegative("alpha", alpha, u)
    chosen_mean = per_token(wide(logp), lengths)[..., 0]
    return -jax.nn.log_sigmoid(beta * margin(u)) - alpha * chosen_mean
