r"""Losses of pairs without a reference model.

``log π_w`` and ``log π_l`` are the summed log-probabilities of the chosen and the rejected
response, ``n_w`` and ``n_l`` their numbers of scored tokens, ``a = log π / n`` the token means.
Every loss is ``[*pairs 2] -> [*pairs]``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxpref.losses._inputs import (
    AnyArray,
    Hyperparameter,
    nonnegative,
    per_token,
    positive,
    wide,
)
from jaxpref.losses.pairwise import margin


def slic_hf(
    logp: Float[AnyArray, "*pairs 2"],
    *,
    delta: Hyperparameter = 1.0,
    lam: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""Sequence likelihood calibration: a hinge on the margin, and the likelihood of the chosen.

    .. math:: \max(0, \delta - \log\pi_w + \log\pi_l) - \lambda \log\pi_w

    The second term takes the chosen response for the paper's supervised target, as code does. The
    newest HALOs adds it per token instead of per pair, which is a mistake of shapes.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        delta: Margin to reach, nats, 0 or above.
        lam: Weight of the likelihood term, 0 or above.

    Returns:
        One loss a pair, nats. At the kink the hinge has derivative 0.

    Raises:
        ValueError: `delta` or `lam` is not a finite number, 0 or above.

    References:
        Zhao et al. (2023), the rank calibration loss, https://arxiv.org/abs/2305.10425
    """
    logp = wide(logp)
    delta, lam = nonnegative("delta", delta, logp), nonnegative("lam", lam, logp)
    return jax.nn.relu(delta - margin(logp)) - lam * logp[..., 0]


def simpo(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 2.0,
    gamma: Hyperparameter = 0.5,
) -> Float[Array, "*pairs"]:
    r"""Simple preference optimisation: token means must differ by more than a target.

    .. math:: -\log\sigma(\beta (a_w - a_l) - \gamma)

    ``γ`` as in the paper and TRL. The authors' code is set by the ratio ``γ/β`` instead; TRL's
    loss of this name adds a likelihood term unless told not to.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Scale of the reward, tokens per nat, above 0.
        gamma: Target margin of rewards, 0 or above, not multiplied by `beta`.

    Returns:
        One loss a pair, nats. An empty response has a mean of 0.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `gamma` not one of 0 or above.

    References:
        Meng et al. (2024), Eq. 6, https://arxiv.org/abs/2405.14734
    """
    a = per_token(wide(logp), lengths)
    beta, gamma = positive("beta", beta, a), nonnegative("gamma", gamma, a)
    return -jax.nn.log_sigmoid(beta * margin(a) - gamma)


def cpo(
    logp: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
    alpha: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Contrastive preference optimisation, likelihood term as a sum over tokens.

    .. math:: -\log\sigma(\beta(\log\pi_w - \log\pi_l)) - \alpha \log\pi_w

    The paper's form. The authors' code and TRL average the likelihood term over tokens, which is
    `cpo_token_mean` and pulls far less on the chosen response.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        beta: Inverse temperature, per nat, above 0.
        alpha: Weight of the likelihood term, 0 or above.

    Returns:
        One loss a pair, nats.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `alpha` not one of 0 or above.

    References:
        Xu et al. (2024), the CPO objective, https://arxiv.org/abs/2401.08417
    """
    logp = wide(logp)
    beta, alpha = positive("beta", beta, logp), nonnegative("alpha", alpha, logp)
    return -jax.nn.log_sigmoid(beta * margin(logp)) - alpha * logp[..., 0]


def cpo_token_mean(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
    alpha: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Contrastive preference optimisation, likelihood term as a mean over tokens.

    .. math:: -\log\sigma(\beta(\log\pi_w - \log\pi_l)) - \alpha a_w

    The form of the authors' code and TRL for one pair; in a batch they take the mean over all
    chosen tokens of the batch, here it is over each response. The preference term stays a sum.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response; only the chosen one's is used.
        beta: Inverse temperature, per nat, above 0.
        alpha: Weight of the likelihood term, 0 or above.

    Returns:
        One loss a pair, nats. An empty response has a mean of 0.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `alpha` not one of 0 or above.

    References:
        Xu et al. (2024), the CPO objective as in its code, https://arxiv.org/abs/2401.08417
    """
    logp = wide(logp)
    beta, alpha = positive("beta", beta, logp), nonnegative("alpha", alpha, logp)
    chosen_mean = per_token(logp, lengths)[..., 0]
    return -jax.nn.log_sigmoid(beta * margin(logp)) - alpha * chosen_mean


def rrhf(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    lam: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Rank responses, for a pair: token means in the right order, and the likelihood of the best.

    .. math:: \max(0, a_l - a_w) - \lambda \log\pi_w

    The paper's weights and its sum of log-probabilities in the second term. The authors' code
    multiplies the rank term by 100 and averages the other over the padded sequence, prompt
    included.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        lam: Weight of the likelihood term, 0 or above.

    Returns:
        One loss a pair, nats. At equal means the rank term has derivative 0. An empty response has
        a mean of 0.

    Raises:
        ValueError: `lam` is not a finite number, 0 or above.

    References:
        Yuan et al. (2023), the rank and the fine-tuning loss, https://arxiv.org/abs/2304.05302
    """
    logp = wide(logp)
    lam = nonnegative("lam", lam, logp)
    return jax.nn.relu(-margin(per_token(logp, lengths))) - lam * logp[..., 0]


def orpo(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    lam: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""Odds-ratio preference optimisation: likelihood of the chosen, and a ratio of odds.

    .. math:: -a_w - \lambda\log\sigma(o_w - o_l), \quad o = a - \log(1 - e^{a})

    Odds are of the token's mean probability ``e^a``. The likelihood term reads response tokens
    only; the authors' code and TRL include the prompt's by default.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        lam: Weight of the odds-ratio term, 0 or above (0.1 in the published runs, 1.0 in the
            code's default).

    Returns:
        One loss a pair, nats. A mean probability nearer to one than the dtype resolves counts as
        ``1 - eps`` in value and slope, so a certain response gives large finite numbers: a
        certain chosen one its true limit, a certain rejected one a strong pull down. An empty
        response has a mean of 0 and counts as certain.

    Raises:
        ValueError: `lam` is not a finite number, 0 or above.

    References:
        Hong et al. (2024), Eqs. 6 and 7, https://arxiv.org/abs/2403.07691
    """
    a = per_token(wide(logp), lengths)
    lam = nonnegative("lam", lam, a)
    return -a[..., 0] - lam * jax.nn.log_sigmoid(margin(_log_odds(a)))


def _log_odds(a: Array) -> Array:
    """``log(p / (1 - p))`` of ``p = exp(a)``; above ``-eps`` with value and slope at ``-eps``."""
    excess = jax.nn.relu(a + jnp.finfo(a.dtype).eps)
    a = a - jax.lax.stop_gradient(excess)
    return a - jax.nn.log1mexp(-a)
