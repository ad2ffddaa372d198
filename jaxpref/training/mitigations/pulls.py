"""A loss with other pulls: the same value, another derivative by the two log-probabilities.

``pull [*pairs 2]`` is ``(-d_w, d_l)``, the derivative of a pair's loss by its log-probabilities;
``gram [*pairs 2 2]`` holds the inner products of their gradients ``g_w`` and ``g_l``. With
``rho`` for the cosine of the two gradients, ``q = |g_l| / |g_w|`` is the pull ratio in the middle
of those that raise the chosen and lower the rejected (`jaxpref.diagnostics.band`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxpref.training.mitigations._inputs import (
    AnyArray,
    Gram,
    Pull,
    entries,
    over,
    wide,
)
from jaxpref.training.step import tree_norm

LogpFn = Callable[[PyTree, PyTree], Float[Array, ""]]


def with_pull(
    loss: Callable[[Array], Float[Array, "*pairs"]],
    logp: Float[Array, "*pairs 2"],
    change: Callable[[Array], Array],
) -> Float[Array, "*pairs"]:
    r"""A loss whose value stays and whose pull is another.

    .. math:: \mathrm{sg}(\ell) + p' \cdot (x - \mathrm{sg}(x)), \qquad
        p' = \mathrm{sg}(\mathrm{change}(\nabla_x \ell))

    Args:
        loss: ``logp -> [*pairs]``, each pair's loss a function of its own row.
        logp: ``x``, nats. The only way by which a derivative enters: what else `loss` reads is
            data, and so is what `change` computes.
        change: ``pull -> pull``.

    Returns:
        ``loss(logp)``, with ``change(pull)`` for its derivative.

    Raises:
        ValueError: a loss that is not one number a pair, or a `change` of another shape.

    >>> loss = lambda logp: logp[..., 1] - logp[..., 0]
    >>> harder = lambda logp: with_pull(loss, logp, lambda pull: 3 * pull)
    >>> value, pull = jax.value_and_grad(harder)(jnp.array([-1.0, -2.0]))
    >>> float(value), pull.tolist()
    (-1.0, [-3.0, 3.0])

    Source: the straight-through form of reward calibration, https://arxiv.org/abs/2604.18239,
    written for any pull.
    """
    logp = wide(logp)
    still = jax.lax.stop_gradient(logp)
    value, pullback = jax.vjp(loss, still)
    if value.shape != logp.shape[:-1]:
        raise ValueError(f"loss: got shape {value.shape}, expected {logp.shape[:-1]}: one a pair")
    (pull,) = pullback(jnp.ones_like(value))
    changed = change(pull)
    if changed.shape != logp.shape:
        raise ValueError(f"change: got shape {changed.shape}, expected {logp.shape}")
    value, changed = jax.lax.stop_gradient((value, changed))
    return value + (changed * (logp - still)).sum(axis=-1)


def normalised_pull(gram: Gram, weight: Float[AnyArray, "*pairs"]) -> Float[Array, "*pairs 2"]:
    r"""The pulls of pairwise normalised gradient descent: each gradient counts for its direction.

    .. math:: d_w = \frac{s}{\|g_w\|}, \quad d_l = \frac{s}{\|g_l\|} \qquad\Rightarrow\qquad
        \text{step} \propto s \left(\frac{g_w}{\|g_w\|} - \frac{g_l}{\|g_l\|}\right)

    Guarantee, for ``s >= 0`` and to first order: a step of gradient descent on this pair raises the
    chosen by ``s |g_w| (1 - rho)`` and lowers the rejected by ``s |g_l| (1 - rho)`` per unit of
    learning rate, for any two gradients. Through a mean over pairs, the gradient is exactly that of
    `normalised_gradient`; what the other pairs do to this one has no guarantee.

    Args:
        gram: Inner products of the pair's gradients.
        weight: ``s``: ones for the paper's form, ``-pull[..., 0]`` to keep the loss's own
            strength ``d_w``.

    Returns:
        ``(-d_w, d_l)``. 0 for a gradient of zero, which has no direction. A gradient that is zero
        but for rounding does have one: no step is longer than ``2 s`` from it.

    >>> gram = jnp.array([[1.0, 2.0], [2.0, 16.0]])
    >>> normalised_pull(gram, jnp.array(1.0)).tolist()
    [-1.0, 0.25]

    References:
        Yuan et al. (2024), pairwise normalised gradient descent, known to us from reports of the
        paper, https://arxiv.org/abs/2410.13828
    """
    weight, (w, _, l) = jnp.asarray(weight), entries(gram)
    pull = [-over(weight, jnp.sqrt(w)), over(weight, jnp.sqrt(l))]
    return jnp.stack(pull, axis=-1)


def projected_pull(gram: Gram, pull: Pull) -> Float[Array, "*pairs 2"]:
    r"""Pulls of a step from whose rejected part all is taken that lowers the chosen.

    .. math:: d_w g_w - d_l \left(g_l - \frac{\langle g_w, g_l \rangle}{\|g_w\|^2} g_w\right)
        \qquad\Rightarrow\qquad d'_w = d_w + d_l \frac{\langle g_w, g_l \rangle}{\|g_w\|^2}

    Only where the two parts of the step oppose one another, ``d_w d_l <g_w, g_l> > 0``; elsewhere
    the rejected part helps and the pull stays.

    Guarantee, to first order: with ``d_w, d_l >= 0`` the chosen rises by ``d_w |g_w|^2`` or more,
    as if there were no rejected response. The rejected changes by ``d_w <g_w, g_l> - d_l |g_l|^2
    (1 - rho^2)`` and may rise.

    Args:
        gram: Inner products of the pair's gradients.
        pull: Of the loss.

    Returns:
        ``(-d'_w, d_l)``; the given pull where the chosen gradient is zero.

    >>> gram = jnp.array([[1.0, 2.0], [2.0, 4.0]])  # DPO would lower both
    >>> projected_pull(gram, jnp.array([-1.0, 1.0])).tolist()
    [-3.0, 1.0]

    Source: the projection of Yu et al. (2020), https://arxiv.org/abs/2001.06782, of one side.
    """
    d_w, d_l, (w, dot, _) = _opposing(gram, pull)
    return jnp.stack([-d_w - d_l * over(dot, w), d_l], axis=-1)


def pcgrad_pull(gram: Gram, pull: Pull) -> Float[Array, "*pairs 2"]:
    r"""Pulls of a step from each of whose parts all is taken that opposes the other.

    .. math:: d'_w = d_w + d_l \frac{\langle g_w, g_l \rangle}{\|g_w\|^2}, \quad
        d'_l = d_l + d_w \frac{\langle g_w, g_l \rangle}{\|g_l\|^2}
        \qquad \text{where } d_w d_l \langle g_w, g_l \rangle > 0

    Guarantee, to first order: with ``d_w, d_l >= 0`` the chosen rises by ``d_w |g_w|^2
    (1 - rho^2)`` or more and the rejected falls by ``d_l |g_l|^2 (1 - rho^2)`` or more.

    Args:
        gram: Inner products of the pair's gradients.
        pull: Of the loss.

    Returns:
        ``(-d'_w, d'_l)``; the given pull where a gradient is zero.

    >>> gram = jnp.array([[1.0, 1.0], [1.0, 4.0]])
    >>> pcgrad_pull(gram, jnp.array([-1.0, 1.0])).tolist()
    [-2.0, 1.25]

    References:
        Yu et al. (2020), Algorithm 1, with the two responses for its tasks,
        https://arxiv.org/abs/2001.06782
    """
    d_w, d_l, (w, dot, l) = _opposing(gram, pull)
    return jnp.stack([-d_w - d_l * over(dot, w), d_l + d_w * over(dot, l)], axis=-1)


def normalised_gradient(
    logp_fn: LogpFn, params: PyTree, pairs: PyTree, weight: Float[AnyArray, " pairs"]
) -> PyTree:
    r"""Pairwise normalised gradient descent by the gradients themselves, one pair at a time.

    .. math:: -\frac{1}{n} \sum_i s_i
        \left(\frac{g_{w,i}}{\|g_{w,i}\|} - \frac{g_{l,i}}{\|g_{l,i}\|}\right)

    The definition, at the price of two gradients a pair that are held whole: what
    `normalised_pull` is tested against.

    Args:
        logp_fn: ``(params, response) -> log-probability``, nats, of one response.
        params: Any pytree of floating arrays.
        pairs: Pytree of arrays ``[pairs 2 ...]``, chosen first.
        weight: ``s``, of each pair.

    Returns:
        What takes the place of the gradient of the mean loss: an optimizer descends it.

    >>> features = jnp.array([[[3.0, 0.0], [0.0, 2.0]]])
    >>> fn = lambda w, x: jnp.vdot(w, x)
    >>> normalised_gradient(fn, jnp.zeros(2), features, jnp.ones(1)).tolist()
    [-1.0, 1.0]

    References:
        Yuan et al. (2024), pairwise normalised gradient descent, known to us from reports of the
        paper, https://arxiv.org/abs/2410.13828
    """
    weight = jnp.asarray(weight)
    scales = jnp.stack([-weight, weight], axis=-1) / max(len(weight), 1)

    def add(total, row):
        response, scale = row
        gradient = jax.grad(logp_fn)(params, response)
        factor = over(scale, tree_norm(gradient))
        return jax.tree.map(lambda t, g: t + factor.astype(g.dtype) * g, total, gradient), None

    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (pairs, scales[..., None]))
    rows = rows[0], rows[1][:, 0]
    with jax.default_matmul_precision("highest"):
        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), rows)
    return total


def _opposing(gram: AnyArray, pull: AnyArray):
    """``d_w``, ``d_l`` and the entries; the product is 0 where the parts do not oppose."""
    pull, (w, dot, l) = jnp.asarray(pull), entries(gram)
    d_w, d_l = -pull[..., 0], pull[..., 1]
    oppose = jnp.sign(d_w) * jnp.sign(d_l) * dot > 0
    return d_w, d_l, (w, jnp.where(oppose, dot, jnp.zeros_like(dot)), l)
