r"""Losses of several responses to one prompt: ``[*prompts responses] -> [*prompts]``.

A pair is a list of two, chosen first. ``u = logp - reference`` is the log-ratio of a response,
``a = log π / n`` its token mean, ``r`` its reward, of which only `exo` reads more than the order.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxpref.losses._inputs import (
    AnyArray,
    Hyperparameter,
    log_ratio,
    nonnegative,
    per_token,
    positive,
    wide,
)


def exo(
    logp: Float[AnyArray, "*prompts responses"],
    reference: Float[AnyArray, "*prompts responses"],
    rewards: Num[AnyArray, "*prompts responses"],
    *,
    beta: Hyperparameter = 0.1,
    temperature: Hyperparameter = 0.5,
) -> Float[Array, "*prompts"]:
    r"""Efficient exact optimisation with rewards: the reverse divergence between two softmaxes.

    .. math:: \sum_i q_i \log\frac{q_i}{p_i}, \quad q = \mathrm{softmax}(\beta u),
        \ p = \mathrm{softmax}(r / T)

    Minimal where ``βu`` is ``r/T`` but for a constant. Of two responses it is `exo_pair` with
    ``log((1-ε)/ε) = (r_w - r_l)/T``.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        rewards: Of each response; constants.
        beta: Inverse temperature of the policy, per nat, above 0.
        temperature: ``T`` of the rewards, above 0; 0.5 and 0.1 in the authors' runs.

    Returns:
        One loss a prompt, nats, at least 0.

    Raises:
        ValueError: `beta` or `temperature` is not a finite number above 0.

    References:
        Ji et al. (2024), the EXO loss with rewards, https://arxiv.org/abs/2402.00856
    """
    u = log_ratio(logp, reference)
    target = _constant(rewards, u) / positive("temperature", temperature, u)
    log_q = jax.nn.log_softmax(positive("beta", beta, u) * u)
    return (jnp.exp(log_q) * (log_q - jax.nn.log_softmax(target))).sum(axis=-1)


def d2o(
    logp: Float[AnyArray, "*prompts responses"],
    reference: Float[AnyArray, "*prompts responses"],
    *,
    beta: Hyperparameter = 0.1,
    alpha: Hyperparameter = 0.1,
) -> Float[Array, "*prompts"]:
    r"""Distributional dispreference: away from one rejected response, towards the model's own.

    .. math:: -\log\sigma\left(\frac{\beta}{K}\sum_{i=1}^{K} u_i - \alpha u_l\right)

    No response needs to be good: the ``K`` first are samples of the model itself. The mean is
    inside the logistic, so ``d_i = (β/K)σ(-x)`` and ``d_l = α σ(-x)``.

    Args:
        logp: Summed response log-probabilities under the policy, nats: samples of the model first,
            the rejected response last; 11 and 1 in the paper.
        reference: The same under the frozen reference; gets no gradient. The paper allows one
            reference for the samples and another for the rejected response.
        beta: Scale of the samples, per nat, above 0.
        alpha: Scale of the rejected response, per nat, above 0.

    Returns:
        One loss a prompt, nats; ``log 2`` where policy and reference agree.

    Raises:
        ValueError: `beta` or `alpha` is not a finite number above 0, or there is no sample.

    References:
        Duan et al. (2024), Eq. 3, https://arxiv.org/abs/2403.03419
    """
    if logp.shape[-1] < 2:
        raise ValueError(
            f"logp: got shape {logp.shape}, expected samples and one rejected response"
        )
    u = log_ratio(logp, reference)
    beta, alpha = positive("beta", beta, u), positive("alpha", alpha, u)
    return -jax.nn.log_sigmoid(beta * u[..., :-1].mean(axis=-1) - alpha * u[..., -1])


def rrhf_list(
    logp: Float[AnyArray, "*prompts responses"],
    lengths: Num[AnyArray, "*prompts responses"],
    rewards: Num[AnyArray, "*prompts responses"],
    *,
    lam: Hyperparameter = 1.0,
) -> Float[Array, "*prompts"]:
    r"""Rank responses: token means in the order of rewards, and the likelihood of the best.

    .. math:: \sum_{r_i < r_j}\max(0, a_i - a_j) - \lambda\log\pi_{\arg\max r}

    Of two responses it is `rrhf`. Responses of equal reward are not ranked.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        rewards: Of each response; only their order counts.
        lam: Weight of the likelihood term, 0 or above.

    Returns:
        One loss a prompt, nats. Of several best responses the first counts. An empty response has a
        mean of 0.

    Raises:
        ValueError: `lam` is not a finite number, 0 or above.

    Differs:
        As for `rrhf`: the authors' code multiplies the rank term by 100 and averages the other over
        the padded sequence.

    References:
        Yuan et al. (2023), the rank and the fine-tuning loss, https://arxiv.org/abs/2304.05302
    """
    logp = wide(logp)
    lam, a = nonnegative("lam", lam, logp), per_token(logp, lengths)
    rewards = _constant(rewards, logp)
    excess = jnp.where(_is_better(rewards), jax.nn.relu(_lead(a)), 0.0)
    best = jnp.take_along_axis(logp, rewards.argmax(axis=-1)[..., None], axis=-1)
    return _known(excess.sum(axis=(-2, -1)) - lam * best[..., 0], rewards)


def aft(
    logp: Float[AnyArray, "*prompts responses"],
    lengths: Num[AnyArray, "*prompts responses"],
    rewards: Num[AnyArray, "*prompts responses"],
) -> Float[Array, "*prompts"]:
    r"""Alignment fine-tuning: token means in the order of grades, without a constraint.

    .. math:: \log\left(1 + \sum_{r_i > r_j} e^{a_j - a_i}\right)

    With two grades, right and wrong, it is the paper's alignment loss, with more its ranking loss.
    The paper adds `sft` of the best. Nothing stops the worse responses from falling, which
    `aft_detached` and `aft_boundary` are for. Our transcription, the formula from memory.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        rewards: Grade of each response; only their order counts.

    Returns:
        One loss a prompt, nats; 0 where all grades are equal. An empty response has a mean of 0.

    References:
        Wang et al. (2023), the alignment and the ranking loss (our transcription),
        https://arxiv.org/abs/2309.02144
    """
    a = per_token(wide(logp), lengths)
    rewards = _constant(rewards, a)
    return _known(_log_one_plus(_lead(a), _is_better(rewards)), rewards)


def aft_detached(
    logp: Float[AnyArray, "*prompts responses"],
    lengths: Num[AnyArray, "*prompts responses"],
    rewards: Num[AnyArray, "*prompts responses"],
) -> Float[Array, "*prompts"]:
    r"""Alignment fine-tuning in which a response is no longer pushed below a better one.

    .. math:: \log\left(1 + \sum_{r_i > r_j} e^{\mathrm{sg}(a_j) - a_i}\right)

    The value of `aft`; the worse response of a comparison gets no gradient from it, so of a pair
    ``d_l = 0``. Our transcription, the formula from memory.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        rewards: Grade of each response; only their order counts.

    Returns:
        One loss a prompt, nats; 0 where all grades are equal. An empty response has a mean of 0.

    References:
        Wang et al. (2023), the detached constraint (our transcription),
        https://arxiv.org/abs/2309.02144
    """
    a = per_token(wide(logp), lengths)
    lead = jax.lax.stop_gradient(a)[..., None, :] - a[..., :, None]
    rewards = _constant(rewards, a)
    return _known(_log_one_plus(lead, _is_better(rewards)), rewards)


def aft_boundary(
    logp: Float[AnyArray, "*prompts responses"],
    lengths: Num[AnyArray, "*prompts responses"],
    rewards: Num[AnyArray, "*prompts responses"],
    *,
    boundary: Hyperparameter = 0.3,
) -> Float[Array, "*prompts"]:
    r"""Alignment fine-tuning in which a worse response falls to a boundary and stays there.

    .. math:: \log\left(1 + \sum_{r_i > r_j}\left(e^{a_j - a_i} + e^{T_j - a_j}\right)\right),
        \quad T_j = \mathrm{sg}\left(\min_{r_i > r_j} a_i\right) - 2\delta

    Of a pair the rejected response is at rest at ``a_l = a_w - δ`` and is pulled up below. Our
    transcription, the formula from memory.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        rewards: Grade of each response; only their order counts.
        boundary: ``δ``, how far below the worst better response, nats per token, 0 or above.

    Returns:
        One loss a prompt, nats; 0 where all grades are equal. An empty response has a mean of 0.

    Raises:
        ValueError: `boundary` is not a finite number, 0 or above.

    References:
        Wang et al. (2023), the boundary constraint (our transcription),
        https://arxiv.org/abs/2309.02144
    """
    a = per_token(wide(logp), lengths)
    boundary, rewards = nonnegative("boundary", boundary, a), _constant(rewards, a)
    better = _is_better(rewards)
    worst = jnp.where(better, jax.lax.stop_gradient(a)[..., :, None], jnp.inf).min(axis=-2)
    bound = jnp.where(better.any(axis=-2), worst, 0.0) - 2 * boundary
    lift = jnp.broadcast_to((bound - a)[..., None, :], better.shape)
    exponents = jnp.concatenate([_lead(a), lift], axis=-1)
    return _known(_log_one_plus(exponents, jnp.concatenate([better, better], axis=-1)), rewards)


def _constant(rewards: AnyArray, like: Array) -> Array:
    return jax.lax.stop_gradient(jnp.asarray(rewards).astype(like.dtype))


def _lead(a: Array) -> Array:
    """``[..., i, j]``: by how much ``j`` is more probable than ``i``."""
    return a[..., None, :] - a[..., :, None]


def _is_better(rewards: Array) -> Array:
    """``[..., i, j]``: whether ``i`` is better than ``j``."""
    return rewards[..., :, None] > rewards[..., None, :]


def _log_one_plus(exponents: Array, where: Array) -> Array:
    """``log(1 + Σ e^x)`` over the last two axes."""
    *prompts, rows, columns = exponents.shape
    kept = jnp.where(where, exponents, -jnp.inf).reshape(*prompts, rows * columns)
    one = jnp.zeros((*prompts, 1), kept.dtype)
    return jax.nn.logsumexp(jnp.concatenate([one, kept], -1), axis=-1)


def _known(loss: Array, rewards: Array) -> Array:
    """The loss, and NaN where a reward is, which is neither better nor worse than another."""
    return jnp.where(jnp.isnan(rewards).any(axis=-1), jnp.nan, loss)
