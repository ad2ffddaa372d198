r"""Losses that hold each response of a pair to a place of its own, not only the two apart.

``u = logp - reference`` is the log-ratio of a response, ``u_w`` of the chosen one, ``u_l`` of the
rejected one, ``σ`` the logistic function. Every loss is ``[*pairs 2] -> [*pairs]``.
"""

import jax
from jaxtyping import Array, Float

from jaxpref.losses._inputs import AnyArray, Hyperparameter, log_ratio, nonnegative, positive, wide
from jaxpref.losses.pairwise import margin


def sppo(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1e-3,
) -> Float[Array, "*pairs"]:
    r"""Self-play preference optimisation with hard labels: each response has a target of its own.

    .. math:: \left(u_w - \frac{1}{2\beta}\right)^2 + \left(u_l + \frac{1}{2\beta}\right)^2

    Win probabilities are 1 and 0 and the constant in front is 1.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference (the previous iterate); gets no gradient.
        beta: ``1/η`` of the paper, above 0; the targets are ``±1/(2β)`` nats.

    Returns:
        One loss a pair, nats squared.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    Differs:
        TRL's ``sppo_hard``. The authors' code has 1/2 in front and measured win probabilities in
        place of 1 and 0, which is `sppo_soft`.

    References:
        Wu et al. (2024), the SPPO loss with P = 1 and 0, https://arxiv.org/abs/2405.00675
    """
    u = log_ratio(logp, reference)
    target = 1 / (2 * positive("beta", beta, u))
    return (u[..., 0] - target) ** 2 + (u[..., 1] + target) ** 2


def sppo_soft(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    win_probability: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1e-3,
) -> Float[Array, "*pairs"]:
    r"""Self-play preference optimisation with measured win probabilities, the authors' form.

    .. math:: \frac{1}{2}\sum_{y \in \{w, l\}} \left(u_y - \frac{P_y - 1/2}{\beta}\right)^2

    ``d_w = (P_w - 1/2)/β - u_w`` and ``d_l = u_l - (P_l - 1/2)/β``: a rejected response that wins
    more than half of its games is to rise.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference (the previous iterate); gets no gradient.
        win_probability: ``P``, of each response against the policy's own, from 0 to 1; constants.
        beta: ``1/η`` of the paper, above 0.

    Returns:
        One loss a pair, nats squared.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    Differs:
        Probabilities 1 and 0 without the 1/2 in front are `sppo`, TRL's ``sppo_hard``; with the 1/2
        they are the loss of the code of gradient entanglement.

    References:
        Wu et al. (2024), the SPPO loss, https://arxiv.org/abs/2405.00675
    """
    u = log_ratio(logp, reference)
    wins = jax.lax.stop_gradient(wide(win_probability).astype(u.dtype))
    return ((u - (wins - 0.5) / positive("beta", beta, u)) ** 2).sum(axis=-1) / 2


def nca_pair(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.01,
) -> Float[Array, "*pairs"]:
    r"""Noise-contrastive alignment of a pair: each response comes from the data or the reference.

    .. math:: -\log\sigma(\beta u_w) - \tfrac{1}{2}\log\sigma(-\beta u_w)
        - \tfrac{1}{2}\log\sigma(-\beta u_l)

    ``d_w = β(σ(-βu_w) - σ(βu_w)/2)`` holds the chosen response at ``βu_w = log 2``,
    ``d_l = β σ(βu_l)/2`` lets the rejected one go.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0.

    Returns:
        One loss a pair, nats; ``2 log 2`` where policy and reference agree.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    Differs:
        `beta` is 0.01 in the paper, 0.1 by default in TRL.

    References:
        Chen et al. (2024), the NCA loss of pairs, https://arxiv.org/abs/2402.05369
    """
    u = log_ratio(logp, reference)
    reward = positive("beta", beta, u) * u
    from_reference = -jax.nn.log_sigmoid(-reward).sum(axis=-1) / 2
    return from_reference - jax.nn.log_sigmoid(reward[..., 0])


def apo_zero(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""Anchored preference optimisation: chosen up, rejected down, each against its reference.

    .. math:: 1 - \sigma(\beta u_w) + \sigma(\beta u_l)

    For a policy that is worse than the data. ``d_y = β σ(βu_y)σ(-βu_y)``: each response's pull
    vanishes by itself, far on either side.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0.

    Returns:
        One loss a pair, between 0 and 2; 1 where policy and reference agree.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    References:
        D'Oosterlinck et al. (2024), APO-zero, https://arxiv.org/abs/2408.06266
    """
    u = log_ratio(logp, reference)
    reward = positive("beta", beta, u) * u
    return jax.nn.sigmoid(-reward[..., 0]) + jax.nn.sigmoid(reward[..., 1])


def apo_down(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""Anchored preference optimisation: both down, the rejected response further.

    .. math:: \sigma(\beta u_w) + \sigma(-\beta(u_w - u_l))

    For a policy that is better than the data. ``d_l = β σ'(x)`` and ``d_w = d_l - β σ'(βu_w)``:
    where policy and reference agree the chosen response has no pull at all.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Inverse temperature, per nat, above 0.

    Returns:
        One loss a pair, between 0 and 2; 1 where policy and reference agree.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    References:
        D'Oosterlinck et al. (2024), APO-down, https://arxiv.org/abs/2408.06266
    """
    u = log_ratio(logp, reference)
    reward = positive("beta", beta, u) * u
    return jax.nn.sigmoid(reward[..., 0]) + jax.nn.sigmoid(-margin(reward))


def cal_dpo(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 2e-3,
    lam: Hyperparameter = 0.5,
) -> Float[Array, "*pairs"]:
    r"""Calibrated DPO: DPO at inverse temperature 1, and a target for each log-ratio.

    .. math:: -\log\sigma(u_w - u_l) + \lambda\left[\left(u_w - \frac{1}{2\beta}\right)^2
        + \left(u_l + \frac{1}{2\beta}\right)^2\right]

    `beta` sets only the targets. ``d_w = σ(-(u_w - u_l)) + 2λ(1/(2β) - u_w)`` and
    ``d_l = σ(-(u_w - u_l)) + 2λ(1/(2β) + u_l)``.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        beta: Above 0; the targets are ``±1/(2β)`` nats.
        lam: Weight of the squares, 0 or above.

    Returns:
        One loss a pair, nats (nats squared, the second term).

    Raises:
        ValueError: `beta` is not a finite number above 0, or `lam` not one of 0 or above.

    Differs:
        `lam` is 0.5 in the authors' code, 1 in other code and, from memory, in the paper.

    References:
        Xiao et al. (2024), the Cal-DPO loss as in its code, https://arxiv.org/abs/2412.14516
    """
    u = log_ratio(logp, reference)
    target, lam = 1 / (2 * positive("beta", beta, u)), nonnegative("lam", lam, u)
    squares = (u[..., 0] - target) ** 2 + (u[..., 1] + target) ** 2
    return -jax.nn.log_sigmoid(margin(u)) + lam * squares
