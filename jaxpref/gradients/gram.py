"""Inner products of the gradients of log-probabilities, exact, without holding the gradients."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from jaxpref import plain
from jaxpref.gradients import _inputs, contractions
from jaxpref.gradients.planned import Planned

LogpFn = Callable[[PyTree, PyTree], Float[Array, "*outputs"]]


class Grams(NamedTuple):
    """Inner products of gradients, and the log-probabilities they are gradients of.

    Attributes:
        gram: Sum over all parameters; ``[pairs 2 2]`` of `pair_grams`.
        logp: Nats; ``[pairs 2]`` of `pair_grams`.
        by_parameter: The part of each parameter, in the structure of the parameters. A parameter
            that the program stacks for a scan has an axis `layers` before the last two.
    """

    gram: Array
    logp: Array
    by_parameter: PyTree


def pair_gram(logp_fn: LogpFn, params: PyTree, pair: PyTree) -> Float[Array, "2 2"]:
    r"""Gram matrix of the two log-probability gradients of one pair, by plain autodiff.

    .. math:: G_{ij} = \langle \nabla_\theta \log \pi(y_i|x), \nabla_\theta \log \pi(y_j|x) \rangle

    The definition, at the price of two gradients that are held whole: what `pair_grams` is tested
    against, and right for any function that jax can differentiate.

    Args:
        logp_fn: ``(params, response) -> log-probability``, nats, of one response.
        params: Any pytree of floating arrays.
        pair: Pytree of arrays with a first axis of two, chosen first: the two responses.

    Returns:
        The inner products, in at least float32.

    >>> features = jnp.array([[3.0, 0.0], [1.0, 1.0]])  # of the two responses
    >>> pair_gram(lambda w, x: jnp.vdot(w, x), jnp.zeros(2), features).tolist()
    [[9.0, 3.0], [3.0, 2.0]]

    References:
        Yuan et al. (2024), Section 3, https://arxiv.org/abs/2410.13828
    """
    _inputs.require_floating(params)
    with jax.default_matmul_precision("highest"):
        chosen, rejected = (jax.tree.map(lambda x, i=i: x[i], pair) for i in (0, 1))
        both = [jax.grad(logp_fn)(params, response) for response in (chosen, rejected)]
        rows = [[_inner(left, right) for right in both] for left in both]
    return jnp.stack([jnp.stack(row) for row in rows])


def _inner(left: PyTree, right: PyTree) -> Array:
    both = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return jnp.stack([contractions.inner(x, y) for x, y in both]).sum()


def pair_grams(
    logp_fn: LogpFn,
    params: PyTree,
    pairs: PyTree,
    *,
    metric: PyTree | None = None,
    responses: Literal["apart", "together"] = "apart",
    chunk: int = 1,
) -> Grams:
    r"""`pair_gram` of every pair of a batch, at about the price of one backward pass.

    .. math:: G_{ij} = \langle \nabla_\theta \log \pi(y_i|x),
        D\, \nabla_\theta \log \pi(y_j|x) \rangle, \qquad D = 1 \text{ by default}

    Exact for any function: the program of `logp_fn` is traced and each parameter's part is taken
    from the factors of its gradient inside one backward pass, so that no gradient of the size of
    the parameters is formed. `explain` says how each parameter is done. Wrap it in `jax.jit` when
    it is called more than once.

    Args:
        logp_fn: ``(params, response) -> log-probability``, nats, of one response without a batch
            axis; with `responses` ``together``, ``(params, pair) -> [2]``.
        params: Any pytree of floating arrays: what is trained. Close over the rest.
        pairs: Pytree of arrays ``[pairs 2 ...]``, chosen first (``together``: ``[pairs ...]``).
        metric: Weights of the entries, of the structure and shapes of `params`, for example
            an optimizer's step for each parameter; more expensive.
        responses: Whether `logp_fn` sees one response or both, as a function does that encodes
            their prompt once.
        chunk: Pairs worked off at once; memory grows with it.

    Returns:
        `Grams`: ``gram [pairs 2 2]`` and ``logp [pairs 2]``. A response without scored tokens, or
        of probability one, has a gradient of zero, and zeros in its row and column.

    Raises:
        ValueError: a parameter that is not floating, or a shape that is not as above; outside of
            `jax.jit` also a log-probability that is not finite, naming its pair.

    >>> features = jnp.array([[[3.0, 0.0], [1.0, 1.0]]])  # one pair
    >>> found = pair_grams(lambda w, x: jnp.vdot(w, x), jnp.zeros(2), features)
    >>> found.gram.tolist(), found.logp.tolist()
    ([[[9.0, 3.0], [3.0, 2.0]]], [[0.0, 0.0]])

    References:
        Yuan et al. (2024), Section 3, https://arxiv.org/abs/2410.13828
    """
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, expected at least 1")

    def one(pair):
        if responses == "together":
            pair = jax.tree.map(lambda x: x[None], pair)
        found = gram(logp_fn, params, pair, metric=metric)
        if found.logp.size != 2:
            shape = found.logp.shape
            raise ValueError(
                f"logp_fn: got log-probabilities of shape {shape}, expected two a pair"
            )
        square = lambda x, axes: x.reshape(*x.shape[: x.ndim - axes], 2, 2)  # noqa: E731
        axes = found.gram.ndim
        by_parameter = jax.tree.map(lambda x: square(x, axes), found.by_parameter)
        return Grams(square(found.gram, axes), found.logp.reshape(2), by_parameter)

    found = jax.lax.map(one, pairs, batch_size=chunk)
    _require_finite(found.logp)
    return found


def gram(
    logp_fn: LogpFn, params: PyTree, examples: PyTree, *, metric: PyTree | None = None
) -> Grams:
    """Inner products of the gradients of all log-probabilities of some examples, fast and exact.

    All pairs of a batch against each other: ``gram[i, j]`` is how far a step that raises the
    log-probability of example ``j`` raises that of example ``i``. See `pair_grams`.

    Args:
        logp_fn: ``(params, example) -> []`` or ``[outputs]``, nats.
        params: Any pytree of floating arrays.
        examples: Pytree of arrays with a first axis `examples`, which may be empty.
        metric: As in `pair_grams`.

    Returns:
        `Grams`: ``logp [examples]`` and ``gram [examples examples]``, or with outputs
        ``[examples outputs]`` and ``[examples outputs examples outputs]``.

    Raises:
        ValueError: see `pair_grams`.

    >>> features = jnp.array([[3.0, 0.0], [1.0, 1.0], [0.0, -1.0]])
    >>> gram(lambda w, x: jnp.vdot(w, x), jnp.zeros(2), features).gram.tolist()
    [[9.0, 3.0, 0.0], [3.0, 2.0, -1.0], [0.0, -1.0, 1.0]]

    Source: the empirical neural tangent kernel of the log-probabilities, by `contractions`.
    """

    def directions(logp, example):
        return jnp.eye(logp.size, dtype=logp.dtype).reshape(logp.size, *logp.shape)

    planned, n, shape = _planned(logp_fn, params, examples, metric)
    with jax.default_matmul_precision("highest"):
        logp, parts = planned.grams(examples, directions)
    parts = [x.reshape(*x.shape[:-4], n, *shape, n, *shape) for x in parts]
    axes = 2 + 2 * len(shape)
    total = sum(x.sum(axis=tuple(range(x.ndim - axes))) for x in parts)
    return Grams(jnp.asarray(total), logp, planned.structure.unflatten(parts))


def explain(logp_fn: LogpFn, params: PyTree, examples: PyTree) -> dict[str, str]:
    """How `gram` gets the part of each parameter.

    Args:
        logp_fn: As in `gram`.
        params: As in `gram`.
        examples: As in `gram`; for a pair, its two responses.

    Returns:
        Of each parameter, by its path: ``tokens``, products between tokens of the layer's inputs
        and of its slopes; ``layer``, its gradient, one layer at a time; ``rows``, token equality;
        ``shared``, several uses and the products between them; ``gradient``, its whole gradient
        (any other use; for a large parameter this is slow); ``unused``.

    Raises:
        ValueError: see `gram`.

    >>> params = {"a": jnp.ones((9, 9)), "b": jnp.ones(9)}
    >>> explain(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((2, 9)))
    {"['a']": 'tokens', "['b']": 'tokens'}

    Source: the plan that `gram` follows.
    """
    planned, _, _ = _planned(logp_fn, params, examples, None)
    return {path: planned.way(leaf) for leaf, path in enumerate(planned.paths)}


def _planned(
    logp_fn: LogpFn, params: PyTree, examples: PyTree, metric: PyTree | None
) -> tuple[Planned, int, tuple[int, ...]]:
    """A function's plan, the number of examples, and the shape of each one's outputs."""
    _inputs.require_floating(params)
    one, n = _inputs.first_of(examples)
    with jax.default_matmul_precision("highest"), plain.ASKED(True):
        shape = _inputs.output_of(logp_fn, params, one)
        return Planned(logp_fn, params, one, (n, math.prod(shape)), metric=metric), n, shape


def _require_finite(logp: Array) -> None:
    if isinstance(logp, Tracer):
        return
    bad = np.flatnonzero(~np.isfinite(np.asarray(logp)).all(axis=-1))
    if bad.size:
        i = int(bad[0])
        raise ValueError(f"logp of pair {i}: got {logp[i].tolist()}, expected finite numbers")
