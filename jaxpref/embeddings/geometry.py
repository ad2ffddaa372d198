"""Single-token answers: which tokens a preference pushes up, in closed form.

Written for one pair; batch with `jax.vmap`. All sums run in float32 or wider at the highest matrix
precision. `unembedding` is ``[vocab width]``, `hidden` the final-norm state that it reads,
``logits = unembedding @ hidden``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

AnyArray = Array | np.ndarray
Token = int | np.integer | Int[Array, ""]


class DirectionGeometry(NamedTuple):
    """Norms of the two parts of ``W_chosen - W_rejected``."""

    along: Float[Array, ""]  # its projection on W_chosen
    across: Float[Array, ""]  # the rest, orthogonal to W_chosen


class ChosenTerms(NamedTuple):
    """The three terms of Theorem 4, each per unit of ``-l'``; the rate is their sum."""

    magnitude: Float[Array, ""]  # m >= 0
    similarity: Float[Array, ""]  # of the two unembeddings
    others: Float[Array, ""]  # tokens of the rest of the vocabulary


def unembedding_direction(
    unembedding: Float[AnyArray, "vocab width"], *, chosen: Token, rejected: Token
) -> Float[Array, " vocab"]:
    r"""How far each token's unembedding lies along the direction of the preference.

    .. math:: s_z = \langle W_z, W_{y^+} - W_{y^-} \rangle

    One training pair of single tokens raises the log-probabilities of all other tokens in this
    order (Theorem 5). No hidden state is needed.

    Args:
        unembedding: ``W``, one row a token.
        chosen: Token id of the preferred answer.
        rejected: Token id of the dispreferred answer.

    Returns:
        ``s`` in logit units. The entries of the two tokens themselves are of the same formula but
        outside the ranking: their rates have a term more (see `token_rates`).

    Raises:
        ValueError: a token id outside the vocabulary, or ``chosen == rejected`` (seen only
            outside ``jit``).

    >>> W = jnp.array([[2.0, 0.0], [0.0, 1.0], [1.0, 3.0]])
    >>> unembedding_direction(W, chosen=0, rejected=1).tolist()
    [4.0, -1.0, -1.0]

    References:
        Razin et al. (2024), Theorems 2 and 5, https://arxiv.org/abs/2410.08847
    """
    W = wide(unembedding)
    return _dot(W, _direction(W, chosen, rejected))


def direction_geometry(
    unembedding: Float[AnyArray, "vocab width"], *, chosen: Token, rejected: Token
) -> DirectionGeometry:
    r"""Norms of the parts of ``D = W+ - W-`` along ``W+`` and orthogonal to it.

    .. math:: \frac{|\langle D, W_{y^+} \rangle|}{\|W_{y^+}\|}, \qquad
        \left\| D - \frac{\langle D, W_{y^+} \rangle}{\|W_{y^+}\|^2} W_{y^+} \right\|

    The orthogonal part is what the preference adds beyond "more like the chosen token"; where it
    is the larger one, tokens that have little to do with the chosen token may gain most.

    Args:
        unembedding: ``W``, one row a token.
        chosen: Token id of the preferred answer.
        rejected: Token id of the dispreferred answer.

    Returns:
        The two norms, in the unit of `unembedding`. A chosen row of zeros has no direction: then
        ``along`` is 0 and ``across`` the whole norm. The derivative of a norm of 0 is 0.

    Raises:
        ValueError: as `unembedding_direction`.

    >>> W = jnp.array([[2.0, 0.0], [-1.0, 4.0]])
    >>> [float(norm) for norm in direction_geometry(W, chosen=0, rejected=1)]
    [3.0, 4.0]

    References:
        Razin et al. (2024), Table 13, https://arxiv.org/abs/2410.08847
    """
    W = wide(unembedding)
    D, towards = _direction(W, chosen, rejected), W[chosen]
    squared = _dot(towards, towards)
    fraction = _dot(D, towards) / jnp.where(squared > 0, squared, jnp.ones_like(squared))
    return DirectionGeometry(_norm(fraction * towards), _norm(D - fraction * towards))


def chosen_terms(
    unembedding: Float[AnyArray, "vocab width"],
    hidden: Float[AnyArray, " width"],
    *,
    chosen: Token,
    rejected: Token,
) -> ChosenTerms:
    r"""Why the chosen token's log-probability rises or falls: the three terms of Theorem 4.

    .. math:: \frac{d}{dt} \ln p_+ = -\ell'(u) \Big[ m - (1 - p_+ + p_-) \langle W_+, W_- \rangle
        - \sum_{z \ne \pm} p_z \langle W_z, W_+ - W_- \rangle \Big]
    .. math:: m = (1 - p_+) \|W_+\|^2 + p_- \|W_-\|^2 + (1 - p_+ + p_-) \|h\|^2

    Gradient flow on one pair of single-token answers under any loss ``l`` of the margin
    ``u = ln p_+ - ln p_-``, with ``W`` and the prompt's hidden state ``h`` free (the unconstrained
    features model).

    Args:
        unembedding: ``W``, one row a token.
        hidden: ``h``, the final-norm hidden state of the prompt.
        chosen: Token id of the preferred answer.
        rejected: Token id of the dispreferred answer.

    Returns:
        The terms with their signs; multiply by ``-l'(u)`` (``-pull[0]``) for nats per unit of flow
        time. `magnitude` is never negative, so a fall comes from the other two.

    Raises:
        ValueError: as `unembedding_direction`.

    References:
        Razin et al. (2024), Theorems 1 and 4, https://arxiv.org/abs/2410.08847
    """
    W, h = wide(unembedding), wide(hidden)
    D, up, down = _direction(W, chosen, rejected), W[chosen], W[rejected]
    p = jax.nn.softmax(_dot(W, h))
    # 1 - p_+ as a sum: near certainty the difference would be zero and the sign of m lost.
    missing = p.at[chosen].set(0.0).sum()
    error = missing + p[rejected]
    magnitude = missing * _dot(up, up) + p[rejected] * _dot(down, down) + error * _dot(h, h)
    rest = p.at[chosen].set(0.0).at[rejected].set(0.0)
    return ChosenTerms(magnitude, -error * _dot(up, down), -_dot(rest, _dot(W, D)))


def token_rates(
    unembedding: Float[AnyArray, "vocab width"],
    hidden: Float[AnyArray, " width"],
    *,
    chosen: Token,
    rejected: Token,
) -> Float[Array, " vocab"]:
    r"""Rate of every token's log-probability under gradient flow, per unit of ``-l'(u)``.

    .. math:: \frac{d}{dt} \ln p_z = -\ell'(u) \Big[ \langle W_z, D \rangle
        + (\mathbb{1}[z = +] - \mathbb{1}[z = -]) \|h\|^2 + c \Big]
    .. math:: c = (p_- - p_+) \|h\|^2 - \sum_{z'} p_{z'} \langle W_{z'}, D \rangle,
        \qquad D = W_+ - W_-

    For the tokens outside the pair this is Theorem 5; at the chosen token it is the sum of
    `chosen_terms` (Theorem 4). The paper prints ``-l`` for ``-l'`` in Theorem 5; the derivative is
    meant (the flow agrees with it alone).

    Args:
        unembedding: ``W``, one row a token.
        hidden: ``h``, the final-norm hidden state of the prompt.
        chosen: Token id of the preferred answer.
        rejected: Token id of the dispreferred answer.

    Returns:
        The bracket for each token; multiply by ``-l'(u)`` for nats per unit of flow time. Their
        mean under ``p`` is zero.

    Raises:
        ValueError: as `unembedding_direction`.

    References:
        Razin et al. (2024), Theorems 2, 4 and 5, https://arxiv.org/abs/2410.08847
    """
    W, h = wide(unembedding), wide(hidden)
    p = jax.nn.softmax(_dot(W, h))
    logits = _dot(W, _direction(W, chosen, rejected))  # rate of the logits: W's rows and h move
    squared = _dot(h, h)
    logits = logits.at[chosen].add(squared).at[rejected].add(-squared)
    return logits - _dot(p, logits)


def _direction(W: Array, chosen: Token, rejected: Token) -> Array:
    vocab = W.shape[0]
    known = not any(isinstance(token, Tracer) for token in (chosen, rejected))
    for name, token in (("chosen", chosen), ("rejected", rejected)):
        if known and not 0 <= int(token) < vocab:
            raise ValueError(f"{name}: got token {int(token)}, expected one of 0 to {vocab - 1}")
    if known and int(chosen) == int(rejected):
        raise ValueError(f"rejected: got token {int(rejected)}, expected another than chosen")
    return W[chosen] - W[rejected]


def wide(x: AnyArray) -> Array:
    """The same numbers in float32 or wider."""
    x = jnp.asarray(x)
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def _dot(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _norm(x: Array) -> Array:
    squared = _dot(x, x)
    is_zero = squared == 0  # a norm of zero has derivative zero, not 0 / 0
    root = jnp.sqrt(jnp.where(is_zero, jnp.ones_like(squared), squared))
    return jnp.where(is_zero, jnp.zeros_like(root), root)
