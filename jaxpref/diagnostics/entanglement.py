"""Gradient entanglement: what a step does to both log-probabilities of a pair, to first order.

Everything follows from two small arrays. ``gram [*pairs 2 2]`` holds the inner products of the two
log-probability gradients ``g_w`` (chosen) and ``g_l`` (rejected); ``pull [*pairs 2]`` is the
loss's derivative by the two log-probabilities, ``(-d_w, d_l)`` in the paper's letters. A loss that
wants the chosen up and the rejected down has ``d_w > 0`` and ``d_l > 0``.
"""

import enum
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

AnyArray = Array | np.ndarray
Gram = Float[AnyArray, "*pairs 2 2"]
Pull = Float[AnyArray, "*pairs 2"]


class Regime(enum.IntEnum):
    """What a step does to the two log-probabilities of a pair.

    A change of zero counts as wanted, as in the paper: a chosen that stays is up, a rejected down.
    """

    IDEAL = 0  # chosen up, rejected down: Case 1
    BOTH_DOWN = 1  # Case 2
    BOTH_UP = 2  # Case 3
    REVERSED = 3  # chosen down, rejected up: impossible where d_w > 0 and d_l > 0
    UNDEFINED = 4  # a change is NaN


class Band(NamedTuple):
    """The pull ratios ``d_w / d_l`` between which a pair is in the ideal regime."""

    low: Float[Array, "*pairs"]
    high: Float[Array, "*pairs"]


def first_order_change(gram: Gram, pull: Pull) -> Float[Array, "*pairs 2"]:
    r"""Change of both log-probabilities per unit of learning rate, by one step on this pair alone.

    .. math:: \Delta = -G\,p = \begin{pmatrix} d_w \|g_w\|^2 - d_l \langle g_w, g_l \rangle \\
        d_w \langle g_w, g_l \rangle - d_l \|g_l\|^2 \end{pmatrix}

    Args:
        gram: Of `jaxpref.gradients.pair_grams`; under a metric, of that optimizer's step.
        pull: ``jax.grad(loss)(logp)``.

    Returns:
        Nats per unit of learning rate (with a metric that contains it: nats), chosen first.

    >>> gram = jnp.array([[1.0, 2.0], [2.0, 4.0]])  # the rejected gradient is twice the chosen
    >>> first_order_change(gram, jnp.array([-1.0, 1.0])).tolist()
    [-1.0, -2.0]

    References:
        Yuan et al. (2024), Section 3, https://arxiv.org/abs/2410.13828
    """
    gram, pull = jnp.asarray(gram), jnp.asarray(pull)
    return -(gram * pull[..., None, :]).sum(axis=-1)


def batch_change(
    gram: Float[AnyArray, "pairs 2 pairs 2"], pull: Float[AnyArray, "pairs 2"]
) -> Float[Array, "pairs 2"]:
    r"""Change of all log-probabilities per unit of learning rate, by one step on the mean loss.

    .. math:: \Delta_{ia} = -\frac{1}{n} \sum_{jb} G_{ia,jb}\, p_{jb}

    The terms of other pairs, ``j != i``, are how pairs interfere with one another.

    Args:
        gram: Inner products of all gradients of the batch: `jaxpref.gradients.gram` of a function
            that returns both log-probabilities of a pair.
        pull: Of each pair's own loss, not yet divided by the number of pairs.

    Returns:
        Nats per unit of learning rate.

    Raises:
        ValueError: no pairs.

    >>> gram = jnp.eye(4).reshape(2, 2, 2, 2)
    >>> batch_change(gram, jnp.array([[-1.0, 1.0], [-3.0, 3.0]])).tolist()
    [[0.5, -0.5], [1.5, -1.5]]

    Source: `first_order_change` of a sum of losses.
    """
    gram, pull = jnp.asarray(gram), jnp.asarray(pull)
    if len(pull) == 0:
        raise ValueError(f"pull: got shape {pull.shape}, expected at least one pair")
    weighted = gram * pull[None, None]
    return -weighted.sum(axis=(-2, -1)) / len(pull)


def cosine(gram: Gram) -> Float[Array, "*pairs"]:
    r"""Cosine of the two gradients.

    .. math:: \rho = \frac{\langle g_w, g_l \rangle}{\|g_w\| \, \|g_l\|}

    Args:
        gram: Inner products of the pair's gradients.

    Returns:
        Between -1 and 1, 1 for identical responses (under ``jit`` it may be one rounding below);
        NaN where a gradient is zero, which has no direction.

    >>> cosine(jnp.array([[1.0, 1.0], [1.0, 4.0]])).item()
    0.5

    References:
        Yuan et al. (2024), Figure 4a ("correlation"), https://arxiv.org/abs/2410.13828
    """
    w, dot, l = _entries(gram)
    # In this order equal entries give exactly 1, and squared norms above 1e19 stay in float32.
    rho = jnp.clip(dot / w * (jnp.sqrt(w) / jnp.sqrt(l)), -1.0, 1.0)
    return jnp.where((w > 0) & (l > 0), rho, jnp.nan)


def norm_ratio(gram: Gram) -> Float[Array, "*pairs"]:
    r"""How much longer the rejected gradient is, ``q = |g_l| / |g_w|``.

    It is the pull ratio at which a pair is safest: the geometric centre of its `band`.

    Args:
        gram: Inner products of the pair's gradients.

    Returns:
        At least 0; infinite where only the chosen gradient is zero, NaN where both are.

    >>> norm_ratio(jnp.array([[1.0, 0.0], [0.0, 4.0]])).item()
    2.0

    References:
        Disentanglement band (2026), the target ratio, https://arxiv.org/abs/2604.18239
    """
    w, _, l = _entries(gram)
    return jnp.sqrt(l) / jnp.sqrt(w)


def regime(gram: Gram, pull: Pull) -> Int[Array, "*pairs"]:
    r"""Which way the two log-probabilities go: the paper's three cases, for any loss.

    Args:
        gram: Inner products of the pair's gradients.
        pull: ``jax.grad(loss)(logp)``, of any signs.

    Returns:
        Values of `Regime`. Where ``d_w, d_l > 0`` it is never ``REVERSED``, by Cauchy-Schwarz. A
        pair that does not move, such as identical responses under DPO or a hinge already met, is
        ``IDEAL``.

    >>> gram = jnp.array([[1.0, 2.0], [2.0, 4.0]])
    >>> Regime(regime(gram, jnp.array([-1.0, 1.0])).item()).name
    'BOTH_DOWN'

    References:
        Yuan et al. (2024), Table 1, https://arxiv.org/abs/2410.13828
    """
    chosen, rejected = jnp.moveaxis(first_order_change(gram, pull), -1, 0)
    falling = jnp.where(chosen < 0, Regime.BOTH_DOWN.value, Regime.IDEAL.value)
    rising = jnp.where(chosen < 0, Regime.REVERSED.value, Regime.BOTH_UP.value)
    known = jnp.where(rejected > 0, rising, falling)
    return jnp.where(jnp.isnan(chosen) | jnp.isnan(rejected), Regime.UNDEFINED.value, known)


def pull_ratio(pull: Pull) -> Float[Array, "*pairs"]:
    r"""How much harder a loss pulls the chosen up than the rejected down, ``r = d_w / d_l``.

    Args:
        pull: ``jax.grad(loss)(logp)``.

    Returns:
        1 for DPO; infinite where only the chosen is pulled, NaN where neither is. Two pulls the
        wrong way also give a positive ratio.

    >>> pull_ratio(jnp.array([-3.0, 2.0])).item()
    1.5

    References:
        Yuan et al. (2024), Condition 2, https://arxiv.org/abs/2410.13828
    """
    pull = jnp.asarray(pull)
    return -pull[..., 0] / pull[..., 1]


def band(gram: Gram) -> Band:
    r"""The pull ratios at which the chosen rises and the rejected falls.

    .. math:: \rho\, q \le r \le q / \rho \quad (\rho > 0), \qquad q = \|g_l\| / \|g_w\|

    Below it both fall, above it both rise. Its geometric centre is ``q``, its width as a factor
    ``1 / rho^2``: the more alike the directions, the narrower.

    Args:
        gram: Inner products of the pair's gradients.

    Returns:
        `Band`, for ``d_w, d_l > 0``; of gradients at no acute angle all positive ratios, ``0`` to
        infinity.

    >>> edges = band(jnp.array([[1.0, 1.0], [1.0, 4.0]]))  # rho = 1/2, q = 2
    >>> edges.low.item(), edges.high.item()
    (1.0, 4.0)

    References:
        Disentanglement band (2026), https://arxiv.org/abs/2604.18239; equal to Yuan et al. (2024),
        Condition 2.
    """
    w, dot, l = _entries(gram)
    entangled = dot > 0
    low = jnp.where(entangled, dot / w, jnp.zeros_like(dot))
    return Band(low, jnp.where(entangled, l / dot, jnp.inf))


def band_margin(gram: Gram, pull: Pull) -> Float[Array, "*pairs"]:
    r"""How far inside its band a pair's pull ratio is, as a logarithm.

    .. math:: \min(\ln r - \ln \rho q,\; \ln q / \rho - \ln r)

    Args:
        gram: Inner products of the pair's gradients.
        pull: ``jax.grad(loss)(logp)``, with ``d_w, d_l > 0``.

    Returns:
        Positive inside (ideal), negative outside; the factor by which the ratio may still change
        is its exponential. Infinite where the gradients are at no acute angle, NaN where ``d_w`` or
        ``d_l`` is not positive.

    >>> gram = jnp.array([[1.0, 1.0], [1.0, 4.0]])  # the band is 1 to 4
    >>> round(float(band_margin(gram, jnp.array([-2.0, 1.0]))), 3)  # ln 2, at its centre
    0.693

    Source: the logarithm of the conditions of `band`.
    """
    low, high = band(gram)
    chosen, rejected = jnp.moveaxis(jnp.asarray(pull), -1, 0)
    ratio = jnp.log(pull_ratio(pull))
    margin = jnp.minimum(ratio - jnp.log(low), jnp.log(high) - ratio)
    return jnp.where((chosen < 0) & (rejected > 0), margin, jnp.nan)


def entanglement(gram: Gram) -> Float[Array, "*pairs"]:
    r"""The inner product against the smaller squared norm: above 1, DPO moves both the same way.

    .. math:: \frac{\langle g_w, g_l \rangle}{\min(\|g_w\|^2, \|g_l\|^2)} = \rho \max(q, 1/q)

    Args:
        gram: Inner products of the pair's gradients.

    Returns:
        At most 1 exactly where a loss of pull ratio 1 is in the ideal regime; NaN where a gradient
        is zero.

    >>> entanglement(jnp.array([[1.0, 2.0], [2.0, 4.0]])).item()
    2.0

    References:
        Yuan et al. (2024), Condition 1, https://arxiv.org/abs/2410.13828; the published code
        computes `published_entanglement`.
    """
    w, dot, l = _entries(gram)
    return dot / jnp.minimum(w, l)


def published_entanglement(gram: Gram) -> Float[Array, "*pairs"]:
    r"""What the paper's published code computes: the chosen's norm in place of the smaller one.

    .. math:: \langle g_w, g_l \rangle / \|g_w\|^2

    It sees only whether the chosen falls; a pair both of whose responses rise passes for ideal.
    For comparison with numbers made by that code.

    Args:
        gram: Inner products of the pair's gradients.

    Returns:
        Above 1 where DPO lowers the chosen; NaN where the chosen gradient is zero.

    >>> published_entanglement(jnp.array([[4.0, 2.0], [2.0, 1.0]])).item()  # both rise
    0.5

    References:
        https://github.com/HumainLab/Understand_MarginPO, ``Grad_Condition``, the minimum of one
        norm with itself.
    """
    w, dot, _ = _entries(gram)
    return dot / w


def _entries(gram: AnyArray) -> tuple[Array, Array, Array]:
    """``|g_w|^2``, ``<g_w, g_l>``, ``|g_l|^2``; rounding can leave a square below zero."""
    gram = jnp.asarray(gram)
    floor = jnp.zeros((), gram.dtype)
    w, l = (jnp.maximum(gram[..., i, i], floor) for i in (0, 1))
    return w, gram[..., 0, 1], l
