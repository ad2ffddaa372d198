"""One jitted update from a score function, a loss and an optimizer."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxpref.training import parallel


class State(NamedTuple):
    """All that an update changes, and all that a checkpoint must hold.

    Attributes:
      params: what is trained.
      opt_state: of the optimizer.
      step: number of updates done. It is the position in the data, too.
      key: for draws during training; update ``n`` uses ``jax.random.fold_in(key, n)``, so that the
        key itself never changes.
    """

    params: PyTree
    opt_state: PyTree
    step: Int[Array, ""]
    key: Key[Array, ""]


class Update(NamedTuple):
    """What a ``metrics`` function sees of an update.

    Attributes:
      scores: of the whole batch, before the update.
      batch: as given to the step.
      params: before the update.
      gradient: of the mean loss.
      change: what is added to the parameters.
    """

    scores: Any
    batch: Any
    params: PyTree
    gradient: PyTree
    change: PyTree


Metrics = dict[str, Any]
Step = Callable[[State, Any], tuple[State, Metrics, Any]]


def init_state(
    params: PyTree, optimizer: optax.GradientTransformation, *, key: Key[Array, ""]
) -> State:
    """State before the first update.

    The step takes over the arrays of its state: after the first update ``params`` and ``key`` as
    given here are gone. Pass ``jax.tree.map(jnp.copy, params)`` to keep them.

    Args:
      params: what is trained.
      optimizer: whose state is made.
      key: for draws during training.

    Returns:
      A state at step 0.
    """
    return State(params, optimizer.init(params), jnp.zeros((), jnp.int32), key)


def make_step(
    score: Callable[[PyTree, Any], Any],
    loss: Callable[[Any, Any], Float[Array, " pairs"]],
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    mesh: jax.sharding.Mesh | None = None,
    shardings: State | None = None,
    metrics: Callable[[Update], Metrics] | None = None,
) -> Step:
    """A jitted ``step(state, batch) -> (state, metrics, scores)`` that lowers the mean loss.

    Guarantees:

    - The gradient is that of the mean over all pairs of the batch, whatever ``micro_batches`` and
      ``mesh`` are, to rounding.
    - If the loss or the gradient's norm is not finite, the state comes back as it was, its ``step``
      too, so the last good parameters survive. The caller sees it in the metrics.
    - The state is donated: its arrays are updated in place where the device can do that.

    Args:
      score: ``(params, batch) -> scores``, a pytree whose leaves have the axis ``pairs`` first.
      loss: ``(scores, batch) -> [pairs]``, one loss a pair, not averaged.
      optimizer: an optax transformation.
      micro_batches: parts that a batch is worked off in, one after another, to save memory. It
        divides the number of pairs; all leaves of the batch have the axis ``pairs`` first.
      mesh: of `jaxpref.training.parallel.mesh`; each device takes its share of the pairs (of a
        micro-batch). None is the default device.
      shardings: of `jaxpref.training.parallel.shardings`, where the state lies on that mesh, before
        and after an update; None is whole on each device.
      metrics: further scalars, `pair_means` say. What reads ``gradient`` or ``change`` costs a pass
        over all parameters.

    Returns:
      The step. Its metrics are ``loss`` (nats, mean over pairs, before the update),
      ``gradient_norm`` (Euclidean, of all parameters) and those of ``metrics``, NaN where the
      update was refused. Its scores are those before the update.

    Raises:
      ValueError: ``micro_batches`` below 1, or a mesh without an axis ``data``; at the first call,
        a number of pairs that does not divide, or a loss that is not one number a pair.
    """
    if micro_batches < 1:
        raise ValueError(f"micro_batches is {micro_batches}, expected at least 1")
    if mesh is not None:
        parallel.check(mesh)
    slope = functools.partial(_slope, score, loss, micro_batches, mesh)

    def step(state: State, batch: Any) -> tuple[State, Metrics, Any]:
        (value, scores), gradient = slope(state.params, batch)
        norm = tree_norm(gradient)

        def update(state, gradient, scores):
            change, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            params = optax.apply_updates(state.params, change)
            seen = Update(scores, batch, state.params, gradient, change)
            new = State(params, opt_state, state.step + 1, state.key)
            return new, metrics(seen) if metrics else {}

        def refuse(state, gradient, scores):
            _, shapes = jax.eval_shape(update, state, gradient, scores)
            return state, jax.tree.map(_not_a_number, shapes)

        def select(finite, state, gradient, scores):
            two = update(state, gradient, scores), refuse(state, gradient, scores)
            return jax.tree.map(functools.partial(_where, finite), *two)

        def branch(finite, state, gradient, scores):
            return jax.lax.cond(finite, update, refuse, state, gradient, scores)

        # XLA holds old and new parameters in full for one of the two: on CPU for a selection, on
        # accelerators for a branch.
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        state, further = jax.lax.platform_dependent(
            finite, state, gradient, scores, cpu=branch, default=select
        )
        return state, {"loss": value, "gradient_norm": norm, **further}, scores

    everywhere = None if mesh is None else parallel.replicated(mesh)
    placed = (shardings or everywhere, everywhere, everywhere)
    return jax.jit(step, donate_argnums=0, out_shardings=placed if mesh else None)


def tree_norm(tree: PyTree) -> Float[Array, ""]:
    """Euclidean norm of all leaves together, in at least float32.

    >>> print(tree_norm({"a": jnp.array([3.0]), "b": jnp.array([[0.0], [4.0]])}))
    5.0
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.size]
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in leaves) else jnp.float32
    # Row by row, as small products: on CPU several times faster than one long sum, and more exact.
    # Axes stay as they are: to flatten those of an array in slices, its slices would be gathered.
    product = functools.partial(jnp.einsum, precision="highest", preferred_element_type=dtype)
    squares = [product("...i,...i->...", x, x).sum() for x in map(jnp.atleast_1d, leaves)]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), dtype)))


def pair_means(update: Update) -> Metrics:
    """Means over the batch of the scores' ``logp [pairs 2]``, in nats; for ``metrics``."""
    chosen, rejected = update.scores.logp[:, 0], update.scores.logp[:, 1]
    return {"logp_chosen": chosen.mean(), "logp_rejected": rejected.mean()}


def update_norm(update: Update) -> Metrics:
    """Euclidean norm of the parameters' change; for ``metrics``.

    It needs the change as arrays of their own, as many again as there are parameters.
    """
    return {"update_norm": tree_norm(update.change)}


def _slope(score, loss, micro_batches, mesh, params, batch):
    """``((mean loss, scores), gradient)`` of a batch, part by part."""

    def mean_loss(params, part):
        scores = score(params, part)
        each = loss(scores, part)
        if each.ndim != 1:
            raise ValueError(f"loss returned shape {each.shape}, expected [pairs]: one a pair")
        return each.mean() / micro_batches, scores

    slope = jax.value_and_grad(mean_loss, has_aux=True)
    if micro_batches == 1:
        return slope(params, _shard(batch, mesh, axis=0))

    def add(total, part):
        (value, scores), gradient = slope(params, _shard(part, mesh, axis=0))
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, (value, gradient)), scores

    parts = jax.tree.map(functools.partial(_split, micro_batches), batch)
    (value, _), _ = jax.eval_shape(slope, params, jax.tree.map(lambda x: x[0], parts))
    zero = jax.tree.map(_zero_sum, (value, params))
    total, scores = jax.lax.scan(add, zero, _shard(parts, mesh, axis=1))
    value, gradient = jax.tree.map(lambda t, x: t.astype(x.dtype), total, (value, params))
    return (value, jax.tree.map(_join, scores)), gradient


def _zero_sum(like: Any) -> Array:
    """Where parts are summed: in at least float32, or small parts vanish beside the sum."""
    return jnp.zeros(like.shape, jnp.float64 if like.dtype == jnp.float64 else jnp.float32)


def _split(parts: int, x: Array) -> Array:
    """``[pairs ...] -> [parts pairs/parts ...]``; pairs that lie on one device stay there."""
    if x.ndim == 0 or x.shape[0] % parts:
        expected = f"a first axis that micro_batches={parts} divides"
        raise ValueError(f"batch has a leaf of shape {x.shape}, expected {expected}")
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def _join(x: Array) -> Array:
    """The inverse of `_split`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def _shard(batch: Any, mesh: jax.sharding.Mesh | None, *, axis: int) -> Any:
    return batch if mesh is None else parallel.shard(batch, mesh, axis=axis)


def _where(finite: Array, new: Array, old: Array) -> Array:
    return old if new is old else jnp.where(finite, new, old)


def _not_a_number(like: jax.ShapeDtypeStruct) -> Array:
    inexact = jnp.issubdtype(like.dtype, np.inexact)
    return jnp.full(like.shape, jnp.nan if inexact else 0, like.dtype)
