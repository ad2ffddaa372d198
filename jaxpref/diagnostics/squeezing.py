r"""Where the probability of each token went: from one model's next-token logits to another's.

Both arrays of logits ``[*batch vocab]`` are of the same positions, ``before`` of the start model,
``after`` of the trained one. For hidden states, `jaxpref.logprobs.chunked.map_time` holds the
logits of a few positions at a time. A logit may be minus infinity: its token is impossible.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpref.losses._inputs import AnyArray, wide


class Shift(enum.IntEnum):
    """How far down the start model's list a token stands."""

    UNKNOWN = -1  # rank 0
    UNSHIFTED = 0  # rank 1
    MARGINAL = 1  # ranks 2 and 3
    SHIFTED = 2  # ranks above 3


class TokenShifts(NamedTuple):
    """One number for each position; log-probabilities, entropies and divergence in nats.

    The greedy token of a model is its most likely one, of equals the one with the lowest id. Rank 1
    means that no token is more likely, so equals share the best rank of theirs.
    """

    logp_before: Float[Array, "*batch"]  # of the given token
    logp_after: Float[Array, "*batch"]
    rank_before: Int[Array, "*batch"]  # of the given token, from 1
    rank_after: Int[Array, "*batch"]
    top_before: Float[Array, "*batch"]  # of the model's own greedy token
    top_after: Float[Array, "*batch"]
    old_top_after: Float[Array, "*batch"]  # of the greedy token of `before`, under `after`
    new_top_rank: Int[Array, "*batch"]  # of the greedy token of `after`, under `before`
    entropy_before: Float[Array, "*batch"]
    entropy_after: Float[Array, "*batch"]
    kl: Float[Array, "*batch"]  # KL(after || before)


def token_shifts(
    before: Float[AnyArray, "*batch vocab"],
    after: Float[AnyArray, "*batch vocab"],
    tokens: Int[AnyArray, "*batch"],
) -> TokenShifts:
    r"""What became of each token, of the greedy token, and of the whole distribution.

    .. math:: r(y) = 1 + |\{v : z_v > z_y\}|, \qquad
        \mathrm{KL}(p' \Vert p) = \sum_v p'_v (\ell_v + e^{-\ell_v} - 1), \quad
        \ell_v = \log p'_v - \log p_v

    No term of the divergence is negative, so small ones keep their digits and a model's from
    itself is exactly 0. A mass that is squeezed into the argmax shows in ``old_top_after -
    top_before``; whether the trained model says what the start model would have said, in
    `shift_kind` of ``new_top_rank``.

    Args:
        before: Next-token logits of the start model.
        after: The trained model's, at the same positions.
        tokens: The token that stands at each position.

    Returns:
        `TokenShifts`, in float32 or wider. Of a token outside the vocabulary, log-probabilities
        are NaN and ranks 0; so they are of a model with a NaN among its logits or no token that is
        possible. The divergence is infinite where a token was impossible and is not any more.

    >>> before = jnp.log(jnp.array([[0.5, 0.2, 0.3], [0.5, 0.2, 0.3]]))
    >>> after = jnp.log(jnp.array([[0.5, 0.2, 0.3], [0.3, 0.6, 0.1]]))
    >>> found = token_shifts(before, after, jnp.array([2, 2]))
    >>> found.rank_before.tolist(), found.rank_after.tolist(), found.new_top_rank.tolist()
    ([2, 2], [2, 3], [1, 3])
    >>> found.kl.round(4).tolist()
    [0.0, 0.3961]

    References:
        Ren and Sutherland (2025), Section 3.3, https://arxiv.org/abs/2407.10490; ranks: Lin et al.
        (2023), Section 2, https://arxiv.org/abs/2312.01552
    """
    logits, tokens = _together(before, after), jnp.asarray(tokens)
    logp = jax.nn.log_softmax(logits, axis=-1)
    inside = (tokens >= 0) & (tokens < logits.shape[-1])
    tokens = jnp.where(inside, tokens, 0)[None]
    of_token = jnp.where(inside[None], _pick(logp, tokens), jnp.nan)
    rank = _rank(logits, tokens, of_token)
    tops = jnp.argmax(logits, axis=-1)
    of_top = _pick(logp, tops)
    new_top_before = _pick(logp[0], tops[1])
    surprise = -jnp.where(jnp.isneginf(logp), 0, logp)  # 0 log 0 is 0
    entropy = (jnp.exp(logp) * surprise).sum(axis=-1)
    return TokenShifts(
        logp_before=of_token[0],
        logp_after=of_token[1],
        rank_before=rank[0],
        rank_after=rank[1],
        top_before=of_top[0],
        top_after=of_top[1],
        old_top_after=_pick(logp[1], tops[0]),
        new_top_rank=_rank(logits[0], tops[1], new_top_before + of_top[1]),  # NaN: no such rank
        entropy_before=entropy[0],
        entropy_after=entropy[1],
        kl=_kl_terms(logp[1], logp[0]).sum(axis=-1),
    )


def shift_kind(rank: Int[AnyArray, "*batch"]) -> Int[Array, "*batch"]:
    r"""Unshifted, marginal or shifted: a token's rank under the start model in three classes.

    The paper asks it of the trained model's greedy token, ``token_shifts(...).new_top_rank``.

    Args:
        rank: From 1; 0 where there is none.

    Returns:
        Values of `Shift`: 0 for rank 1, 1 for ranks 2 and 3, 2 above; -1 for no rank.

    >>> shift_kind(jnp.array([0, 1, 2, 3, 4])).tolist()
    [-1, 0, 1, 1, 2]

    References:
        Lin et al. (2023), Section 2, https://arxiv.org/abs/2312.01552
    """
    rank = jnp.asarray(rank)
    known = Shift.UNSHIFTED.value + (rank > 1).astype(jnp.int32) + (rank > 3).astype(jnp.int32)
    return jnp.where(rank < 1, Shift.UNKNOWN.value, known)


def squeezing(
    before: Float[AnyArray, "*batch vocab"],
    after: Float[AnyArray, "*batch vocab"],
    tokens: Int[AnyArray, "*batch"],
) -> Float[Array, "*batch"]:
    r"""How much of what a token left went to the favourite among the others, beyond its share.

    .. math:: \log \frac{p'_{v^*}}{1 - p'_y} - \log \frac{p_{v^*}}{1 - p_y}, \qquad
        v^* = \arg\max_{v \ne y} p_v

    Change of the log-probability of the start model's favourite, given that the token is not said.
    Where only the token's own logit moves, the others keep their proportions and this is 0, however
    far it falls. A step of gradient ascent on the token's loss raises the other logits in
    proportion to their probabilities, so this is above 0: the squeezing effect.

    Args:
        before: Next-token logits of the start model.
        after: The trained model's, at the same positions.
        tokens: The token ``y`` that stands at each position.

    Returns:
        Nats, in float32 or wider; below 0 where the favourite lost ground to the rest. NaN where
        the token is outside the vocabulary or no other was possible.

    >>> p = jnp.array([0.7, 0.2, 0.08, 0.02])
    >>> slope = p - jnp.array([0.0, 0.0, 0.0, 1.0])  # of the last token's loss, in the logits
    >>> round(float(squeezing(jnp.log(p), jnp.log(p) + slope, jnp.array(3))), 4)
    0.1256

    References:
        Ren and Sutherland (2025), Section 3.3 (the effect, not this number of it),
        https://arxiv.org/abs/2407.10490
    """
    logits, tokens = _together(before, after), jnp.asarray(tokens)
    is_token = jax.nn.one_hot(tokens, logits.shape[-1], dtype=jnp.bool_)
    others = jnp.where(is_token[None], -jnp.inf, logits)
    top = jnp.argmax(others[0], axis=-1)
    of_top = _pick(jax.nn.log_softmax(others, axis=-1), top[None])
    return jnp.where(is_token.any(axis=-1), of_top[1] - of_top[0], jnp.nan)


def drag(
    logits: Float[AnyArray, "*batch vocab"], change: Float[AnyArray, "*batch vocab"]
) -> Float[Array, "*batch"]:
    r"""What the softmax alone takes from every token when the logits move, to second order.

    .. math:: -\tfrac12 \operatorname{Var}_{v \sim p} \dot z_v, \qquad p = \mathrm{softmax}(z)

    Along ``z + s dz`` the log-probability of a token ``y`` is ``z_y + s dz_y - log sum_v exp(z_v +
    s dz_v)``. Its first term is straight; the log-sum-exp has the slope ``E_p dz`` and the second
    derivative ``Var_p dz``. So the second order of *every* token's log-probability is the same,
    ``-s^2/2 Var_p dz``, and never positive: whatever the direction, log-probabilities fall short of
    what their slopes say. To this order it is ``-KL(p || p')``, the mean fall over the start's own
    tokens. (Of the logits of a deep model ``dz`` is the slope; their own curvature comes on top.)

    Args:
        logits: Next-token logits at the start.
        change: By how much they move, ``dz``.

    Returns:
        Nats, at most 0, in float32 or wider; the sum over a response's tokens is the response's. A
        shift that all logits share gives 0 up to rounding. What is impossible (a logit of minus
        infinity) counts nothing, whatever its change.

    >>> float(drag(jnp.zeros(2), jnp.array([1.0, -1.0])))
    -0.5

    Source: the second derivative of the log-sum-exp.
    """
    logits, change = _together(logits, change)
    p = jax.nn.softmax(logits, axis=-1)
    change = jnp.where(jnp.isneginf(logits), 0, change)
    centred = change - (p * change).sum(axis=-1, keepdims=True)
    return -(p * centred**2).sum(axis=-1) / 2


def _together(x: AnyArray, y: AnyArray) -> Array:
    """Both on a new leading axis, so that equal ones go through equal operations."""
    x, y = wide(x), wide(y)
    dtype = np.promote_types(x.dtype, y.dtype)
    return jnp.stack([x.astype(dtype), y.astype(dtype)])


def _pick(values: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]


def _rank(logits: Array, tokens: Array, known: Array) -> Array:
    """Of logits: rounding makes equals of log-probabilities. 0 where `known` is NaN."""
    larger = logits > jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    return jnp.where(jnp.isnan(known), 0, 1 + larger.sum(axis=-1, dtype=jnp.int32))


def _kl_terms(logp: Array, logq: Array) -> Array:
    """``p (l + exp(-l) - 1)`` of the log-ratio ``l``; where that may overflow, as ``q`` of it."""
    ratio = jnp.where(logp == logq, 0, logp - logq)  # both impossible, too
    near, far = jnp.maximum(ratio, -1.0), jnp.clip(ratio, -1e3, -1.0)
    near_term = jnp.exp(logp) * (near + jnp.expm1(-near))
    far_term = jnp.exp(logq) * (1 - (1 - far) * jnp.exp(far))
    term = jnp.where(ratio > -1.0, near_term, far_term)
    return jnp.where(jnp.isposinf(ratio), jnp.inf, term)
