r"""Losses of pairs that read tokens, or a divergence of whole next-token distributions.

``u = logp - reference`` is the log-ratio of a response, ``u_t`` that of a token, ``σ`` the logistic
function, ``D_t = KL(ref_t || π_t)`` the forward divergence over the vocabulary at a position and
``D`` its sum over a response. Token arrays are ``[*pairs 2 response]``, chosen first, as in
`jaxpref.logprobs.Responses`; where `is_target` is False they are not read, NaN or not, and a
response without targets has sums of 0.

Divergences and learned masks are functions of what is trained: a gradient enters them, unless the
docstring says not. The two models take their places by their order in `logprobs.token_kl`::

    kl = logprobs.token_kl(reference_hidden, reference_unembedding, hidden, unembedding)  # D_t
    kl = logprobs.token_kl(hidden, unembedding, reference_hidden, reference_unembedding)  # TIS-DPO
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxpref.losses._inputs import (
    AnyArray,
    Hyperparameter,
    finite,
    log_ratio,
    nonnegative,
    positive,
    wide,
)
from jaxpref.losses.pairwise import margin

LAYER_NORM_EPSILON = 1e-5


def tdpo1(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    kl: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""Token-level DPO, first form: DPO of log-ratios plus divergences.

    .. math:: -\log\sigma\left(\beta (u_w - u_l) - \beta (D_l - D_w)\right)

    Summing the soft-optimal token rewards over a response gives ``β(u + D)``. Where policy and
    reference agree a divergence has gradient 0, so the first step is that of `dpo`; later the
    chosen response's divergence is *raised*, which `tdpo2` does not do.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        kl: ``D``, the sum over a response's positions of ``KL(ref || π)``, nats; a function of the
            policy, which gets a gradient through both.
        beta: Inverse temperature, per nat, above 0.

    Returns:
        One loss a pair, nats; ``log 2`` where policy and reference agree.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    References:
        Zeng et al. (2024), the TDPO1 loss, https://arxiv.org/abs/2404.11999
    """
    u = log_ratio(logp, reference)
    return -jax.nn.log_sigmoid(positive("beta", beta, u) * margin(u + wide(kl).astype(u.dtype)))


def tdpo2(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    kl: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
    alpha: Hyperparameter = 0.5,
) -> Float[Array, "*pairs"]:
    r"""Token-level DPO, second form: only the rejected response's divergence is trained.

    .. math:: -\log\sigma\left(\beta (u_w - u_l) - \alpha\beta (D_l - \mathrm{sg}(D_w))\right)

    With ``α = 1`` it has the value of `tdpo1` and another gradient; with ``α = 0`` it is `dpo`.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        kl: ``D``, the sum over a response's positions of ``KL(ref || π)``, nats; a function of the
            policy, which gets a gradient through the rejected response's only.
        beta: Inverse temperature, per nat, above 0.
        alpha: Weight of the divergences, 0 (`dpo`) or above.

    Returns:
        One loss a pair, nats; ``log 2`` where policy and reference agree.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `alpha` not one of 0 or above.

    References:
        Zeng et al. (2024), the TDPO2 loss, https://arxiv.org/abs/2404.11999
    """
    u = log_ratio(logp, reference)
    beta, alpha = positive("beta", beta, u), nonnegative("alpha", alpha, u)
    return -jax.nn.log_sigmoid(beta * (margin(u) - alpha * _rejected_less_chosen(kl, u)))


def sampo(
    token_logp: Float[AnyArray, "*pairs 2 response"],
    token_reference: Float[AnyArray, "*pairs 2 response"],
    is_target: Bool[AnyArray, "*pairs 2 response"],
    key: Key[Array, ""],
    *,
    beta: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""DPO on equally many tokens of both responses, drawn anew for each batch.

    .. math:: -\log\sigma\left(\beta \sum_{t \in S_w} u_t - \beta \sum_{t \in S_l} u_t\right),
        \quad \#S_w = \#S_l = \min(n_w, n_l)

    ``S`` of `sampo_positions`: of the shorter response all tokens, of the longer one a uniform
    draw, the *same* for policy and reference. Pairs of equal length are `dpo`.

    Args:
        token_logp: Log-probability of each token under the policy, nats.
        token_reference: The same under the frozen reference; gets no gradient.
        is_target: The scored tokens.
        key: Of the draw: another one for each step, ``jax.random.fold_in(key, step)``.
        beta: Inverse temperature, per nat, above 0.

    Returns:
        One loss a pair, nats; ``log 2`` where policy and reference agree, or a response is empty.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    Differs:
        The paper draws once, as here. Its code draws for policy and reference apart, so that the
        longer response has a random log-ratio even where the two agree.

    References:
        Lu et al. (2024), the SamPO loss, https://arxiv.org/abs/2406.10957
    """
    drawn = sampo_positions(is_target, key)
    u = _kept(log_ratio(token_logp, token_reference), drawn).sum(axis=-1)
    return -jax.nn.log_sigmoid(positive("beta", beta, u) * margin(u))


def sampo_positions(
    is_target: Bool[AnyArray, "*pairs 2 response"], key: Key[Array, ""]
) -> Bool[Array, "*pairs 2 response"]:
    r"""The tokens that `sampo` reads: as many of both responses.

    .. math:: S \sim \text{uniform subsets of size } \min(n_w, n_l)

    Over draws, a sum over ``S`` has the mean ``|S|/n`` times the sum over the response.

    Args:
        is_target: The scored tokens.
        key: Of the draw, which is without replacement.

    Returns:
        True for a drawn token, ``min(n_w, n_l)`` of them in each response.

    >>> is_target = jnp.array([[True, True, True], [False, True, False]])
    >>> sampo_positions(is_target, jax.random.key(0)).sum(axis=-1).tolist()
    [1, 1]

    References:
        Lu et al. (2024), the SamPO loss, https://arxiv.org/abs/2406.10957
    """
    is_target = jnp.asarray(is_target)
    lengths = is_target.sum(axis=-1)
    draws = jax.random.uniform(key, is_target.shape)
    order = jnp.argsort(jnp.where(is_target, draws, jnp.inf), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return is_target & (rank < lengths.min(axis=-1)[..., None, None])


def sparsepo(
    token_logp: Float[AnyArray, "*pairs 2 response"],
    token_reference: Float[AnyArray, "*pairs 2 response"],
    token_kl: Float[AnyArray, "*pairs 2 response"],
    is_target: Bool[AnyArray, "*pairs 2 response"],
    mask: Float[AnyArray, "*pairs 2 response"],
    kl_mask: Float[AnyArray, "*pairs 2 response"],
    *,
    beta: Hyperparameter = 0.1,
    lam: Hyperparameter = 0.0,
    kl_lam: Hyperparameter = 0.0,
) -> Float[Array, "*pairs"]:
    r"""Sparse preference optimisation: `tdpo1` with a weight a token, and a price of weights.

    .. math:: -\log\sigma\Bigl(\beta \textstyle\sum_t (m_t u_t + m'_t D_t)_w
        - \beta \sum_t (m_t u_t + m'_t D_t)_l\Bigr)
        + \lambda \lVert m \rVert_1 + \lambda' \lVert m' \rVert_1

    Norms are sums over both responses. With masks of ones it is `tdpo1`, with ``m = 1`` and
    ``m' = 0`` it is `dpo`. Masks of zeros have a loss of ``log 2`` and, if they come from a ReLU,
    no gradient that would leave it: start learned masks above.

    Args:
        token_logp: Log-probability of each token under the policy, nats.
        token_reference: The same under the frozen reference; gets no gradient.
        token_kl: ``D_t``, ``KL(ref || π)`` at each position, nats; gets a gradient.
        is_target: The scored tokens.
        mask: ``m``: of `sparsepo_activation_mask`, or of `sparsepo_learned_mask`, which is trained
            by this loss.
        kl_mask: ``m'``: the same array for the authors' common mask, another for independent ones.
        beta: Inverse temperature, per nat, above 0.
        lam: Price of ``m``, nats a unit, 0 or above; 1e-3 in one published run, else 0.
        kl_lam: Price of ``m'``, the same.

    Returns:
        One loss a pair, nats. At a weight of 0 its price has derivative 0.

    Raises:
        ValueError: `beta` is not a finite number above 0, or a price not one of 0 or above.

    References:
        Christopoulou et al. (2024), the SparsePO loss, https://arxiv.org/abs/2410.05102
    """
    u = log_ratio(token_logp, token_reference)
    beta = positive("beta", beta, u)
    lam, kl_lam = nonnegative("lam", lam, u), nonnegative("kl_lam", kl_lam, u)
    arrays = (wide(x).astype(u.dtype) for x in (u, token_kl, mask, kl_mask))
    u, kl, m, m_kl = (_kept(x, is_target) for x in arrays)
    reward = (m * u + m_kl * kl).sum(axis=-1)
    price = (lam * _size(m) + kl_lam * _size(m_kl)).sum(axis=(-2, -1))
    return -jax.nn.log_sigmoid(beta * margin(reward)) + price


def sparsepo_activation_mask(
    activations: Float[AnyArray, "*pairs 2 response hooks"],
    is_target: Bool[AnyArray, "*pairs 2 response"],
) -> Float[Array, "*pairs 2 response"]:
    r"""A mask of `sparsepo` without parameters, from activations of the reference.

    .. math:: m_t = \frac{1}{K} \sum_k \frac{a_{k,t} - \min_s a_{k,s}}{\max_s a_{k,s}
        - \min_s a_{k,s}}

    Extremes are over the response's tokens. The authors standardise each activation over the tokens
    first, which the ratio undoes: the mask is the same for ``c a + d``, ``c > 0``.

    Args:
        activations: ``a_k``, for each hooked place (attention, MLP, norm; of each layer) the mean
            over its units.
        is_target: The scored tokens.

    Returns:
        From 0 to 1, 0 for a token that is not scored; without gradient. An activation that is the
        same for all tokens, as of a single one, tells none apart and counts 1.

    >>> activations = jnp.array([[[3.0], [5.0], [4.0]], [[7.0], [0.0], [0.0]]])
    >>> is_target = jnp.array([[True, True, True], [True, False, False]])
    >>> sparsepo_activation_mask(activations, is_target).tolist()
    [[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]]

    References:
        Christopoulou et al. (2024), model-based masks (MaPO), https://arxiv.org/abs/2410.05102
    """
    a, scored = jax.lax.stop_gradient(wide(activations)), jnp.asarray(is_target)[..., None]
    low = jnp.where(scored, a, jnp.inf).min(axis=-2, keepdims=True, initial=jnp.inf)
    high = jnp.where(scored, a, -jnp.inf).max(axis=-2, keepdims=True, initial=-jnp.inf)
    span = high - low
    flat = span <= 0  # minus infinity without targets
    each = jnp.where(flat, jnp.ones_like(a), (a - low) / jnp.where(flat, 1.0, span))
    return jnp.where(scored, each, jnp.zeros_like(each)).mean(axis=-1)


def sparsepo_learned_mask(
    hidden: Float[AnyArray, "*pairs 2 response layers width"],
    weight: Float[AnyArray, "layers width"],
    bias: Float[AnyArray, " layers"],
    mixer: Float[AnyArray, " layers"],
    is_target: Bool[AnyArray, "*pairs 2 response"],
) -> Float[Array, "*pairs 2 response"]:
    r"""A sparse mask of `sparsepo` that is learned, from hidden states of the reference.

    .. math:: m_t = \mathrm{ReLU}\Bigl(\sum_l v_l\, \mathrm{ReLU}\bigl(w_l \cdot
        \mathrm{LN}(h_{l,t}) + b_l\bigr)\Bigr)

    Layer normalisation has no scale and shift of its own, which ``w`` and ``b`` contain; the
    authors train one of each, common to the layers, and drop out a hundredth to a tenth of the
    layers' numbers and of the masks in training.

    Args:
        hidden: ``h``, states of the reference at each position; gets no gradient.
        weight: ``w``, a parameter.
        bias: ``b``, a parameter.
        mixer: ``v``, a parameter.
        is_target: The scored tokens.

    Returns:
        At least 0, without upper bound; 0 for a token that is not scored. At 0 the derivative is 0:
        a token that is dropped by all layers stays dropped.

    References:
        Christopoulou et al. (2024), learned sparse masks (SPaPO), https://arxiv.org/abs/2410.05102
    """
    h, scored = jax.lax.stop_gradient(wide(hidden)), jnp.asarray(is_target)
    h = jnp.where(scored[..., None, None], h, jnp.zeros_like(h))
    weight, bias, mixer = (wide(x).astype(h.dtype) for x in (weight, bias, mixer))
    centred = h - h.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
    lead = (1,) * (h.ndim - 2)
    each = jnp.einsum("...lw,lw->...l", normal, weight, precision="highest")
    layers = jax.nn.relu(each + bias.reshape(*lead, -1)) * mixer.reshape(*lead, -1)
    return jnp.where(scored, jax.nn.relu(layers.sum(axis=-1)), jnp.zeros_like(h[..., 0, 0]))


def tis_dpo(
    token_logp: Float[AnyArray, "*pairs 2 response"],
    token_reference: Float[AnyArray, "*pairs 2 response"],
    weights: Float[AnyArray, "*pairs 2 response"],
    is_target: Bool[AnyArray, "*pairs 2 response"],
    *,
    beta: Hyperparameter = 0.1,
) -> Float[Array, "*pairs"]:
    r"""DPO with an importance weight a token.

    .. math:: -\log\sigma\left(\beta \textstyle\sum_t (w_t u_t)_w - \beta\sum_t (w_t u_t)_l\right)

    With weights of one it is `dpo`.

    Args:
        token_logp: Log-probability of each token under the policy, nats.
        token_reference: The same under the frozen reference; gets no gradient.
        weights: ``w_t``, of `tis_weights`; gets no gradient.
        is_target: The scored tokens.
        beta: Inverse temperature, per nat, above 0.

    Returns:
        One loss a pair, nats; ``log 2`` where policy and reference agree.

    Raises:
        ValueError: `beta` is not a finite number above 0.

    References:
        Liu et al. (2024), the TIS-DPO loss, https://arxiv.org/abs/2410.04350
    """
    u = _kept(log_ratio(token_logp, token_reference), is_target)
    weighted = (_still(weights, u, is_target) * u).sum(axis=-1)
    return -jax.nn.log_sigmoid(positive("beta", beta, u) * margin(weighted))


def tis_dpo_with_kl(
    token_logp: Float[AnyArray, "*pairs 2 response"],
    token_reference: Float[AnyArray, "*pairs 2 response"],
    token_reverse_kl: Float[AnyArray, "*pairs 2 response"],
    weights: Float[AnyArray, "*pairs 2 response"],
    is_target: Bool[AnyArray, "*pairs 2 response"],
    *,
    beta: Hyperparameter = 0.1,
    alpha: Hyperparameter = 0.5,
) -> Float[Array, "*pairs"]:
    r"""DPO with an importance weight a token, of rewards with their divergence.

    .. math:: -\log\sigma\Bigl(\beta \textstyle\sum_t (w_t (u_t - \alpha K_t))_w
        - \beta\sum_t (w_t (u_t - \alpha K_t))_l\Bigr), \quad K_t = \mathrm{KL}(\pi_t \Vert ref_t)

    The authors' ``token_level`` form. The divergence has the other direction and the other sign
    than in `tdpo1`, and both are right: a token's advantage has mean 0 under the policy for
    ``u_t - K_t``, under the reference for ``u_t + D_t``.

    Args:
        token_logp: Log-probability of each token under the policy, nats.
        token_reference: The same under the frozen reference; gets no gradient.
        token_reverse_kl: ``K_t``, ``KL(π || ref)`` at each position, nats; gets a gradient.
        weights: ``w_t``, of `tis_weights`; gets no gradient.
        is_target: The scored tokens.
        beta: Inverse temperature, per nat, above 0.
        alpha: Weight of the divergences, 0 (`tis_dpo`) or above.

    Returns:
        One loss a pair, nats; ``log 2`` where policy and reference agree.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `alpha` not one of 0 or above.

    References:
        Liu et al. (2024), the TIS-DPO loss as in its code, https://arxiv.org/abs/2410.04350
    """
    u = log_ratio(token_logp, token_reference)
    beta, alpha = positive("beta", beta, u), nonnegative("alpha", alpha, u)
    reward = _kept(u - alpha * wide(token_reverse_kl).astype(u.dtype), is_target)
    weighted = (_still(weights, u, is_target) * reward).sum(axis=-1)
    return -jax.nn.log_sigmoid(beta * margin(weighted))


def tis_weights(
    token_positive: Float[AnyArray, "*pairs 2 response"],
    token_negative: Float[AnyArray, "*pairs 2 response"],
    *,
    scale: Hyperparameter = 1.0,
    mu: Hyperparameter = 1.0,
    low: Hyperparameter = -0.5,
    high: Hyperparameter = 1.5,
) -> Float[Array, "*pairs 2 response"]:
    r"""Importance weights of tokens, from a model that prefers the good and one that does not.

    .. math:: w_t = k\, e^{\pm\mu \min(U, \max(L, \log\pi^+_t - \log\pi^-_t))}

    Plus in the chosen response, minus in the rejected one: a token weighs more where the models
    find that it belongs to its response. Our transcription; the formula and its constants are not
    checked against the paper. The authors' code makes weights from the bare difference of two
    scores, by ranks or thresholds.

    Args:
        token_positive: Log-probability of each token under the better model, nats.
        token_negative: The same under the worse one.
        scale: ``k``, above 0.
        mu: ``μ``, per nat, 0 (weights of ``k``) or above.
        low: ``L``, nats.
        high: ``U``, nats.

    Returns:
        Above 0, without gradient.

    Raises:
        ValueError: `scale` is not a finite number above 0, `mu` not one of 0 or above, or a bound
            not finite.

    References:
        Liu et al. (2024), the weight estimate, https://arxiv.org/abs/2410.04350
    """
    better = jax.lax.stop_gradient(log_ratio(token_positive, token_negative))
    scale, mu = positive("scale", scale, better), nonnegative("mu", mu, better)
    low, high = finite("low", low, better), finite("high", high, better)
    signs = jnp.array([[1.0], [-1.0]], better.dtype)
    signs = signs.reshape(*(1,) * (better.ndim - 2), 2, 1)
    return scale * jnp.exp(signs * mu * jnp.clip(better, low, high))


def _kept(x: Array, mask: AnyArray) -> Array:
    """0 where the mask is False, before a product: nothing of there enters a gradient either."""
    return jnp.where(jnp.asarray(mask), x, jnp.zeros_like(x))


def _size(x: Array) -> Array:
    """Absolute value, with slope 0 at 0."""
    return x * jax.lax.stop_gradient(jnp.sign(x))


def _still(weights: AnyArray, like: Array, mask: AnyArray) -> Array:
    return _kept(jax.lax.stop_gradient(wide(weights).astype(like.dtype)), mask)


def _rejected_less_chosen(x: AnyArray, like: Array) -> Array:
    """Of a divergence that is held for the chosen response."""
    x = wide(x).astype(like.dtype)
    return x[..., 1] - jax.lax.stop_gradient(x[..., 0])
