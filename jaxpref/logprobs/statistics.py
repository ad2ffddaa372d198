"""Numbers of a whole next-token distribution, token by token, in chunks of the time axis.

On request only: training reads log-probabilities and nothing more. The functions take hidden
states and unembedding, as `response_hidden` and `Policy.unembedding` give them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.logprobs.chunked import map_time, require_positive
from jaxpref.logprobs.tokens import in_vocabulary, token_logits


class TokenStatistics(NamedTuple):
    """One number for each position.

    Attributes:
        logp: Log-probability of the target, nats.
        entropy: Entropy of the next-token distribution, nats, at least 0.
        is_top: Whether no token is more probable than the target.
    """

    logp: Float[Array, "*batch time"]
    entropy: Float[Array, "*batch time"]
    is_top: Bool[Array, "*batch time"]


def token_statistics(
    hidden: Float[Array, "*batch time width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, "*batch time"],
    *,
    time_chunk: int | None = 16,
) -> TokenStatistics:
    r"""Log-probability of each target, the distribution's entropy, and whether the target is top.

    .. math:: H_t = \sum_v \pi_t(v) \, (\log \textstyle\sum_u e^{z_{t,u}} - z_{t,v}) \ge 0

    Forward and reverse derivatives of `logp` and `entropy`; a chunk's logits are computed again
    for the reverse one, and only ``[*batch, time_chunk, vocab]`` is held.

    Args:
        hidden: Final-norm hidden states; ``hidden[..., t, :]`` predicts ``targets[..., t]``.
        unembedding: One row a token of the vocabulary.
        targets: Token ids.
        time_chunk: Positions at a time; ``None``: all.

    Returns:
        `TokenStatistics`. Where a target is not in the vocabulary: logp NaN, `is_top` False. A tie
        for the top counts as top.

    Raises:
        ValueError: `time_chunk` is not positive.

    >>> logits = jnp.array([[0.0, 0.0], [0.0, 200.0]])
    >>> found = token_statistics(logits, jnp.eye(2), jnp.array([1, 0]))
    >>> found.entropy.round(4).tolist(), found.is_top.tolist()
    ([0.6931, 0.0], [True, False])

    Source: the definition of entropy.
    """
    require_positive(time_chunk=time_chunk)

    @jax.checkpoint
    def chunk(hidden: Array, targets: Array) -> TokenStatistics:
        logits = token_logits(hidden, unembedding)
        surprise = jax.nn.logsumexp(logits, axis=-1, keepdims=True) - logits
        possible = jnp.where(jnp.isposinf(surprise), 0, surprise)  # 0 log 0 is 0
        entropy = (jnp.exp(-possible) * possible).sum(axis=-1)
        inside = in_vocabulary(targets, unembedding)
        logp = -jnp.take_along_axis(surprise, targets[..., None], axis=-1)[..., 0]
        is_top = inside & (logp >= -surprise.min(axis=-1))
        return TokenStatistics(jnp.where(inside, logp, jnp.nan), entropy, is_top)

    return map_time(chunk, time_chunk, (hidden, targets), time_axis=targets.ndim - 1)


class TokenMoves(NamedTuple):
    """What a small movement of the model does to each token, to second order in the logits.

    Attributes:
        logp: Log-probability of the target, nats.
        change: Its first-order change along the movement, nats.
        variance: Variance of the logits' change under the next-token distribution, at least 0.
    """

    logp: Float[Array, "*batch time"]
    change: Float[Array, "*batch time"]
    variance: Float[Array, "*batch time"]


def token_moves(
    hidden: Float[Array, "*batch time width"],
    unembedding: Float[Array, "vocab width"],
    hidden_change: Float[Array, "*batch time width"],
    unembedding_change: Float[Array, "vocab width"],
    targets: Int[Array, "*batch time"],
    *,
    time_chunk: int | None = 16,
) -> TokenMoves:
    r"""First-order change of each log-probability, and the variance that drags all of them down.

    .. math:: \dot z = \dot W h + W \dot h, \qquad
        \dot \ell_y = \dot z_y - \mathbb{E}_{v \sim p} \dot z_v, \qquad
        \ell_y(s) = \ell_y + s \dot \ell_y
            - \tfrac{s^2}{2} \operatorname{Var}_{v \sim p} \dot z_v + \dots

    Whatever the direction, the softmax lowers *every* token by half the variance, the likely and
    the unlikely: `jaxpref.diagnostics.drag` is ``-variance / 2``. The logits' own curvature, the
    ``W' h'`` of this product included, is the other part of the second order, and not here.

    Args:
        hidden: Final-norm hidden states; ``hidden[..., t, :]`` predicts ``targets[..., t]``.
        unembedding: One row a token of the vocabulary.
        hidden_change: Tangent of `hidden`, as of `jaxpref.gradients.directional`.
        unembedding_change: Tangent of `unembedding`.
        targets: Token ids.
        time_chunk: Positions at a time; ``None``: all.

    Returns:
        `TokenMoves`. Where a target is not in the vocabulary, logp and change are NaN; so is the
        change of an impossible one (logit minus infinity). The impossible count nothing in others.

    Raises:
        ValueError: `time_chunk` is not positive.

    >>> logits, change = jnp.zeros((1, 2)), jnp.array([[1.0, -1.0]])
    >>> found = token_moves(logits, jnp.eye(2), change, jnp.zeros((2, 2)), jnp.array([0]))
    >>> found.change.tolist(), found.variance.tolist()
    ([1.0], [1.0])

    Source: second derivative of the log-sum-exp.
    """
    require_positive(time_chunk=time_chunk)

    def chunk(hidden: Array, hidden_change: Array, targets: Array) -> TokenMoves:
        logits = token_logits(hidden, unembedding)
        moved = token_logits(hidden_change, unembedding) + token_logits(hidden, unembedding_change)
        excess = logits - logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(excess)
        total = weights.sum(axis=-1, keepdims=True)
        share, counted = weights / total, jnp.where(jnp.isneginf(logits), 0, moved)
        mean = (share * counted).sum(axis=-1, keepdims=True)
        variance = (share * (counted - mean) ** 2).sum(axis=-1)
        index = targets[..., None]
        logp, change = (
            (jnp.take_along_axis(x, index, axis=-1) - y)[..., 0]
            for x, y in ((excess, jnp.log(total)), (moved, mean))
        )
        inside = in_vocabulary(targets, unembedding)
        change = jnp.where(inside & jnp.isfinite(logp), change, jnp.nan)
        return TokenMoves(jnp.where(inside, logp, jnp.nan), change, variance)

    arrays = hidden, hidden_change, targets
    return map_time(chunk, time_chunk, arrays, time_axis=targets.ndim - 1)


def token_kl(
    hidden: Float[Array, "*batch time width"],
    unembedding: Float[Array, "vocab width"],
    reference_hidden: Float[Array, "*batch time reference_width"],
    reference_unembedding: Float[Array, "vocab reference_width"],
    *,
    time_chunk: int | None = 16,
) -> Float[Array, "*batch time"]:
    r"""KL divergence of the policy's next-token distribution from the reference's, per position.

    .. math:: \mathrm{KL}(\pi_t \,\|\, \rho_t) = \sum_v \pi_t(v) \left[\ell_v + e^{-\ell_v} - 1
        \right], \qquad \ell_v = \log \pi_t(v) - \log \rho_t(v)

    Each term is at least 0 (the added parts sum to 0), so the tiny divergences of a policy just
    leaving its reference are not lost in rounding, and equal models give exactly 0. Swap the
    arguments for the other direction. Forward and reverse derivatives; a chunk's logits are
    computed again for the reverse one, and only ``[*batch, time_chunk, vocab]`` is held.

    Args:
        hidden: Final-norm hidden states of the policy.
        unembedding: Its unembedding.
        reference_hidden: The same positions under the reference; another width is allowed.
        reference_unembedding: Its unembedding, over the same vocabulary.
        time_chunk: Positions at a time; ``None``: all.

    Returns:
        Nats, at least 0; infinite where the reference excludes a token that the policy does not,
        with the derivative of the other tokens. What both exclude counts 0.

    Raises:
        ValueError: `time_chunk` is not positive.

    >>> certain, even = jnp.array([[200.0, 0.0]]), jnp.zeros((1, 2))
    >>> token_kl(certain, jnp.eye(2), even, jnp.eye(2)).round(4).tolist()  # log 2
    [0.6931]

    References:
        The non-negative terms: Schulman (2020), "Approximating KL Divergence", k3,
        http://joschu.net/blog/kl-approx.html; here summed over the vocabulary, not sampled.
    """
    require_positive(time_chunk=time_chunk)

    @jax.checkpoint
    def chunk(hidden: Array, reference_hidden: Array) -> Array:
        logp = jax.nn.log_softmax(token_logits(hidden, unembedding), axis=-1)
        logq = jax.nn.log_softmax(token_logits(reference_hidden, reference_unembedding), axis=-1)
        return _kl_terms(logp, logq).sum(axis=-1)

    arrays = hidden, reference_hidden
    return map_time(chunk, time_chunk, arrays, time_axis=hidden.ndim - 2)


def _kl_terms(logp: Array, logq: Array) -> Array:
    impossible = jnp.isneginf(logp)  # of the term exp(logq) is left
    new = jnp.isneginf(logq) & ~impossible  # infinite, however small the probability is
    ratio = jnp.where(impossible | new, 0, logp - logq)
    near = jnp.maximum(ratio, -1.0)  # beyond, exp(-ratio) may overflow: nothing cancels there
    far_term = jnp.exp(logp) * ratio + jnp.exp(logq) - jnp.exp(logp)
    term = jnp.where(ratio > -1.0, jnp.exp(logp) * (near + jnp.expm1(-near)), far_term)
    return jnp.where(impossible, jnp.exp(logq), jnp.where(new, jnp.inf, term))
