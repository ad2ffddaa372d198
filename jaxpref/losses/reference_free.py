r"""Losses of pairs without a reference model.

``log π_w`` and ``log π_l`` are the summed log-probabilities of the chosen and the rejected
response, ``n_w`` and ``n_l`` their numbers of scored tokens, ``a = log π / n`` the token means.
Every loss is ``[*pairs 2] -> [*pairs]``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from jaxpref.losses._inputs import (
    AnyArray,
    Hyperparameter,
    below_one,
    grown,
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

    The second term takes the chosen response for the paper's supervised target.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        delta: Margin to reach, nats, 0 or above.
        lam: Weight of the likelihood term, 0 or above.

    Returns:
        One loss a pair, nats. At the kink the hinge has derivative 0.

    Raises:
        ValueError: `delta` or `lam` is not a finite number, 0 or above.

    Differs:
        The newest HALOs adds the second term per token instead of per pair, which is a mistake of
        shapes. What TRL calls SLiC is `hinge`.

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

    ``d_y = β σ(-x) / n_y``: the shorter response is pulled the harder.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Scale of the reward, tokens per nat, above 0.
        gamma: Target margin of rewards, 0 or above, not multiplied by `beta`.

    Returns:
        One loss a pair, nats. An empty response has a mean of 0.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `gamma` not one of 0 or above.

    Differs:
        ``γ`` as in the paper and TRL; the authors' code is set by the ratio ``γ/β`` instead. TRL's
        loss of this name adds a likelihood term unless ``cpo_alpha`` is 0.

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

    ``d_w = β σ(-x) + α`` against ``d_l = β σ(-x)``.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        beta: Inverse temperature, per nat, above 0.
        alpha: Weight of the likelihood term, 0 or above.

    Returns:
        One loss a pair, nats.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `alpha` not one of 0 or above.

    Differs:
        The paper's form. The authors' code and TRL average the likelihood term over tokens, which
        is `cpo_token_mean` and pulls far less on the chosen response. The newest code of the
        authors is another loss, ARPO.

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

    The preference term stays a sum.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response; only the chosen one's is used.
        beta: Inverse temperature, per nat, above 0.
        alpha: Weight of the likelihood term, 0 or above.

    Returns:
        One loss a pair, nats. An empty response has a mean of 0.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `alpha` not one of 0 or above.

    Differs:
        The form of the authors' code and TRL for one pair; in a batch they take the mean over all
        chosen tokens of the batch, here it is over each response.

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

    Of more than two responses it is `rrhf_list`.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        lam: Weight of the likelihood term, 0 or above.

    Returns:
        One loss a pair, nats. At equal means the rank term has derivative 0. An empty response has
        a mean of 0.

    Raises:
        ValueError: `lam` is not a finite number, 0 or above.

    Differs:
        The paper's weights and its sum of log-probabilities in the second term. The authors' code
        multiplies the rank term by 100 and averages the other over the padded sequence, prompt
        included.

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
    only.

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

    Differs:
        The authors' code and TRL include the prompt's tokens in the likelihood term by default;
        tunix 0.1.7 has the odds of sums, nearly probabilities. Several libraries take the logarithm
        of ``1 - e^a`` as written, which is infinite for certain responses.

    References:
        Hong et al. (2024), Eqs. 6 and 7, https://arxiv.org/abs/2403.07691
    """
    a = per_token(wide(logp), lengths)
    lam = nonnegative("lam", lam, a)
    p = below_one(a)
    return -a[..., 0] - lam * jax.nn.log_sigmoid(margin(p - jax.nn.log1mexp(-p)))


def alphapo(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 2.5,
    gamma: Hyperparameter = 0.1,
    alpha: Hyperparameter = 0.25,
) -> Float[Array, "*pairs"]:
    r"""SimPO with a bent reward: improbable responses count for more.

    .. math:: -\log\sigma(\beta(r_w - r_l) - \gamma), \quad r = \frac{1 - e^{-\alpha a}}{\alpha}

    ``d_y = β e^{-αa_y} σ(-x) / n_y``: the rejected response, the less probable it is, is pulled the
    harder. The limit ``α -> 0`` is `simpo`.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Scale of the reward, above 0.
        gamma: Target margin of rewards, 0 or above, not multiplied by `beta`.
        alpha: Bend of the reward, above 0.

    Returns:
        One loss a pair, nats. An empty response has a mean of 0. Near overflow, ``-α a`` above 79
        in float32, as `f_dpo_forward_kl`.

    Raises:
        ValueError: `beta` or `alpha` is not a finite number above 0, or `gamma` not one of 0 or
            above.

    Differs:
        In TRL an ``alpha`` with another ``loss_type`` than SimPO's bends summed probabilities,
        which overflow.

    References:
        Gupta et al. (2025), the AlphaPO reward, https://arxiv.org/abs/2501.03884
    """
    a = per_token(wide(logp), lengths)
    beta, gamma = positive("beta", beta, a), nonnegative("gamma", gamma, a)
    alpha = positive("alpha", alpha, a)
    reward = -grown(-alpha * a) / alpha
    return -jax.nn.log_sigmoid(beta * margin(reward) - gamma)


def mapo(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
    scale: Hyperparameter = 1000.0,
) -> Float[Array, "*pairs"]:
    r"""Margin-aware preference optimisation, its likelihood form for language models.

    .. math:: -a_w - \beta\log\sigma(T(\phi_w - \phi_l)),
        \quad \phi = \frac{-a e^{a}}{1 - e^{a}}

    Our transcription: the published code is for diffusion models, with a scaled squared error in
    place of ``-a``. ``φ`` is ``-p log p / (1 - p)`` of the mean probability ``p``, from 0 for an
    impossible response to 1 for a certain one.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Weight of the margin term, above 0.
        scale: ``T``, above 0; the code's number of diffusion steps.

    Returns:
        One loss a pair, nats per token. An empty response has a mean of 0 and counts as certain.

    Raises:
        ValueError: `beta` or `scale` is not a finite number above 0.

    References:
        Hong et al. (2024), the MaPO loss as in its code (our transcription),
        https://arxiv.org/abs/2406.06424
    """
    a = per_token(wide(logp), lengths)
    beta, scale = positive("beta", beta, a), positive("scale", scale, a)
    return -a[..., 0] - beta * jax.nn.log_sigmoid(scale * margin(_amplified(a)))


def _amplified(a: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """``-a e^a / (1 - e^a)``, near a = 0 by its series, ``1 + a/2 + a²/12``."""
    near = jnp.abs(a) < 1e-3
    away = jnp.where(near, -1.0, a)
    return jnp.where(near, 1 + a / 2 + a * a / 12, away * jnp.exp(away) / jnp.expm1(away))


def confpo(
    token_logp: Float[AnyArray, "*pairs 2 response"],
    is_target: Bool[AnyArray, "*pairs 2 response"],
    *,
    beta: Hyperparameter = 1.5,
    gamma: Hyperparameter = 1.6,
) -> Float[Array, "*pairs"]:
    r"""SimPO on the tokens that the policy is least sure of.

    .. math:: -\log\sigma(\beta(b_w - b_l) - \gamma),
        \quad b = \mathrm{mean}\{\log\pi_t : \pi_t < \mathrm{mean}_s\,\pi_s\}

    Which tokens are kept is decided anew by the policy at hand and has no gradient. A response
    whose tokens are all equally probable, as one of a single token is, keeps none.

    Args:
        token_logp: Log-probability of each token under the policy, nats.
        is_target: True at the scored tokens.
        beta: Scale of the reward, tokens per nat, above 0.
        gamma: Target margin of rewards, 0 or above, not multiplied by `beta`.

    Returns:
        One loss a pair, nats; 0, without pull, for a pair with a response that keeps no token.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `gamma` not one of 0 or above.

    References:
        Yoon et al. (2025), the ConfPO loss as in its code, https://arxiv.org/abs/2506.08712
    """
    scored = jnp.asarray(is_target)
    logp = jnp.where(scored, wide(token_logp), 0.0)
    beta, gamma = positive("beta", beta, logp), nonnegative("gamma", gamma, logp)
    # Probabilities relative to the largest: those of improbable responses would all be 0.
    most = jnp.max(logp, axis=-1, keepdims=True, where=scored, initial=-jnp.inf)
    p = jnp.where(scored, jnp.exp(jax.lax.stop_gradient(logp - most)), 0.0)
    mean = p.sum(-1, keepdims=True) / jnp.maximum(scored.sum(-1, keepdims=True), 1).astype(p.dtype)
    kept = scored & ~(p >= mean)  # not p < mean: a NaN is kept, to be seen
    count = kept.sum(-1)
    b = per_token(jnp.where(kept, logp, 0.0).sum(-1), count)
    return jnp.where((count > 0).all(-1), -jax.nn.log_sigmoid(beta * margin(b) - gamma), 0.0)
