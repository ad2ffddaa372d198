"""An optimizer's update as a linear function of the gradient: the metric that theory needs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, PyTree

SQUARES = ("nu", "mean_square")  # what optax and `torch_rmsprop` call a running mean of squares


class Linearised(NamedTuple):
    """``update = carried - metric * gradient``, entry by entry.

    Attributes:
        metric: The step taken for each unit of each entry of the gradient, at least 0.
        carried: What is added whatever the gradient is: momentum, weight decay.
    """

    metric: PyTree
    carried: PyTree


def linearised(
    optimizer: optax.GradientTransformation,
    opt_state: PyTree,
    gradient: PyTree,
    params: PyTree,
    *,
    decay: float | None = None,
) -> Linearised:
    r"""The next update of an optimizer, split into what each part of the gradient contributes.

    .. math:: u = c - D\, g, \qquad g = \sum_i g_i \;\Rightarrow\; u = c - \sum_i D\, g_i

    Adam and RMSprop divide by running means of squares that include this very gradient. With those
    means held at the values that this update uses, it is linear in the gradient, and each pair's
    share of it is well defined. Where an entry's gradients were all zero, the slope is its limit
    there: ``rate / eps``, or ``rate / sqrt(eps)`` where `eps` stands under the root.
    ``jaxpref.gradients.pair_grams(..., metric=found.metric)`` then predicts what the update does
    to each log-probability, to first order.

    Args:
        optimizer: SGD with or without momentum, Adam, AdamW, RMSprop, `torch_rmsprop`, and chains
            of them with scalings and weight decay. A transformation that mixes entries, such as
            clipping by the global norm, is to be applied to `gradient` first and left out here.
        opt_state: Before the update.
        gradient: Of the whole batch.
        params: Before the update.
        decay: Of the running mean of squares (``b2`` of Adam), where there is one.

    Returns:
        `Linearised`, of the structure of `params`. `metric` contains the learning rate.

    Raises:
        ValueError: a running mean of squares without its `decay`, or an update that is not finite
            or not of this form (seen only outside of `jax.jit`).

    >>> params = gradient = jnp.array([3.0, -4.0])
    >>> found = linearised(optax.sgd(0.1), optax.sgd(0.1).init(params), gradient, params)
    >>> found.metric.round(3).tolist(), jnp.abs(found.carried).tolist()
    ([0.1, 0.1], [0.0, 0.0])

    Source: the definition; the squares are held by dividing them by `decay` and taking the
    derivative at a gradient of zero, where they do not depend on it.
    """
    update, new = optimizer.update(gradient, opt_state, params)
    held = _with_squares_of(new, opt_state, decay)
    zeros, ones = (jax.tree.map(f, gradient) for f in (jnp.zeros_like, jnp.ones_like))
    carried, slope = jax.jvp(lambda g: optimizer.update(g, held, params)[0], (zeros,), (ones,))
    metric = jax.tree.map(jnp.negative, slope)
    _require_linear(update, metric, carried, gradient)
    return Linearised(metric, carried)


def _squares(state: PyTree) -> str | None:
    """The name of a state's running mean of squares, if it has one."""
    return next((name for name in SQUARES if name in getattr(state, "_fields", ())), None)


def _with_squares_of(new: PyTree, old: PyTree, decay: float | None) -> PyTree:
    """The old state, but with squares that decay to those of the new one."""

    def held(before, after):
        name = _squares(before)
        if name is None:
            return before
        if decay is None or not 0 < decay < 1:
            kind = type(before).__name__
            raise ValueError(f"decay: got {decay}, expected that of {kind}, between 0 and 1")
        squares = jax.tree.map(_away_from_zero, getattr(after, name))
        return before._replace(**{name: jax.tree.map(lambda x: x / decay, squares)})

    return jax.tree.map(held, old, new, is_leaf=lambda x: _squares(x) is not None)


def _away_from_zero(squares: Array) -> Array:
    """A root has no derivative at zero; that of the smallest numbers vanishes beside any `eps`."""
    return jnp.maximum(squares, 1e3 * jnp.finfo(squares.dtype).tiny)


def _require_linear(update: PyTree, metric: PyTree, carried: PyTree, gradient: PyTree) -> None:
    leaves = [jax.tree.leaves(tree) for tree in (update, metric, carried, gradient)]
    for u, d, c, g in zip(*leaves, strict=True):
        if isinstance(u, Tracer):
            return
        if not np.isfinite(np.asarray(u)).all():
            raise ValueError("optimizer: got an update that is not finite, expected finite numbers")
        scale = np.abs(np.asarray(c)) + np.abs(np.asarray(d * g)) + np.abs(np.asarray(u))
        error = np.abs(np.asarray(c - d * g - u))
        if not (error <= 1e-3 * scale).all():
            raise ValueError(
                "optimizer: its update is not an entry-wise linear function of the gradient with"
                " squares held; expected SGD, Adam, RMSprop or a chain of them without clipping"
            )
