"""Inner products of gradients from their factors: the rules of the fast path.

Where a matrix meets data, the gradient of one output is a sum over tokens of outer products,
``sum_t left[t] right[t]^T``, and an inner product of two gradients needs neither of them::

    <sum_s l_s r_s^T, sum_t l'_t r'_t^T> = sum_st <l_s, l'_t> <r_s, r'_t>

Of the two factors one belongs to an example (``[examples rows ...]``; a first axis of one serves
all examples) and one to each of its outputs (``[examples outputs rows ...]``). Results are
``[examples outputs examples outputs]``, summed in float32 or wider at the highest precision.

Source: Goodfellow (2015), https://arxiv.org/abs/1510.01799, for one row; Li et al. (2021), "ghost
clipping", https://arxiv.org/abs/2110.05679, for sequences; the cross terms follow by bilinearity.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

Gram = Float[Array, "examples outputs examples outputs"]
PIECE = 256  # entries that one running sum of a long inner product takes
WRITING = 1.3  # what a gradient that is written out costs beside its arithmetic, on CPU
UNROLLED = 4  # examples of which all blocks are programs of their own; of more they share one


class Use(NamedTuple):
    """Factors of the gradient of a table ``[height width]`` at one of the places it is used.

    Attributes:
        rows: Factor of the height, or token ids that stand for one-hot rows; -1 for no row.
        columns: Factor of the width.
        own: The factor that each output has of its own. If both, each output has a single row:
            ``[examples outputs height]`` and ``[examples outputs width]``.
    """

    rows: Float[Array, "... height"] | Int[Array, "..."]
    columns: Float[Array, "... width"]
    own: Literal["rows", "columns", "both"]


def dense(
    inputs: Float[Array, "shared rows in"],
    slopes: Float[Array, "examples outputs rows out"],
    metric: Float[Array, "in out"] | None = None,
) -> Gram:
    """Gram of the gradients ``inputs.T @ slopes``; without a metric by the cheaper of two ways."""
    if metric is None and prefers_rows(inputs.shape, slopes.shape):
        between = lambda i, j: product(_at(inputs, i), _at(inputs, j), 1, 1)  # noqa: E731
        return _by_rows(between, slopes, slopes, symmetric=True)
    gradients = [_mixed(_at(inputs, i).T, own) for i, own in enumerate(slopes)]
    return held(jnp.stack(gradients), metric)


def prefers_rows(inputs: Sequence[int], slopes: Sequence[int]) -> bool:
    """Whether products between rows cost less than the gradients, from the shapes of `dense`."""
    (_, rows, width_in), (n, m, _, width_out) = inputs, slopes
    between = n * (n + 1) // 2 * rows * (rows * (width_in + m * width_out) + m * m * width_out)
    written = n * m * width_in * width_out * (rows + n * m)
    return between <= WRITING * written


def index(
    ids: Int[Array, "shared rows"],
    slopes: Float[Array, "examples outputs rows width"],
    metric: Float[Array, "height width"] | None = None,
) -> Gram:
    """Gram of the gradients of a table of which the rows `ids` were read; -1 read nothing."""
    weighted = slopes
    if metric is not None:
        weighted = _times(slopes, jnp.take(metric, ids, axis=0, mode="clip")[:, None])
    between = lambda i, j: _overlap(_at(ids, i), _at(ids, j))  # noqa: E731
    return _by_rows(between, weighted, slopes, symmetric=True)


def held(
    gradients: Float[Array, "examples outputs *leaf"], metric: Float[Array, "*leaf"] | None = None
) -> Gram:
    """Gram of gradients that are held as such; with a metric, ``<g, metric * g'>``."""
    n, m = gradients.shape[:2]
    flat = gradients.reshape(n * m, math.prod(gradients.shape[2:]))
    weighted = flat if metric is None else _times(flat, metric.reshape(1, flat.shape[1]))
    return _all_products(weighted, flat).reshape(n, m, n, m)


def shared(uses: Sequence[Use]) -> Gram:
    """Gram of the gradients of a table that is used several times: all pairs of its uses."""
    wide = _accumulator(*(factor for use in uses for factor in use[:2]))
    parts = []
    for k, use in enumerate(uses):
        once = [_cross(use, other).astype(wide) for other in uses[:k]]
        parts += [_cross(use, use).astype(wide), *once, *(x.transpose(2, 3, 0, 1) for x in once)]
    return sum(parts[1:], start=parts[0])


def _cross(one: Use, two: Use) -> Gram:
    """``sum_st <rows_s, rows'_t> <columns_s, columns'_t>`` of two uses."""
    if (one.own, two.own) in (("columns", "rows"), ("columns", "both"), ("rows", "both")):
        return _cross(two, one).transpose(2, 3, 0, 1)
    if one.own == two.own == "columns":
        between = lambda i, j: _overlap(_at(one.rows, i), _at(two.rows, j))  # noqa: E731
        return _by_rows(between, one.columns, two.columns)
    if one.own == two.own == "rows":
        between = lambda i, j: product(_at(one.columns, i), _at(two.columns, j), 1, 1)  # noqa: E731
        return _by_rows(between, one.rows, two.rows)

    def block(i: Any, j: Any) -> Array:
        rows = _at(one.rows, i), _at(two.rows, j)
        columns = _at(one.columns, i), _at(two.columns, j)
        if one.own == two.own:  # both factors of both
            return _times(_overlap(*rows), _overlap(*columns))
        if two.own == "rows":  # both factors of the first, the rows of the second
            return _diagonal(_overlap(*columns), *rows)
        if one.own == "both":
            return _diagonal(_overlap(*rows), *columns)
        left = jnp.stack([_overlap(x, rows[1]) for x in rows[0]])
        right = jnp.stack([product(columns[0], x, 1, 1) for x in columns[1]])
        return _all_products(left.reshape(len(left), -1), right.reshape(len(right), -1))

    return _blocks(block, len(one.rows))


def _diagonal(weights: Array, single: Array, many: Array) -> Array:
    """``sum_t weights[a, t] <single[a], many[b, t]>`` as ``[a b]``."""
    return _sum("at,abt->ab", weights, _sum("aw,btw->abt", single, many))


def _by_rows(
    between: Callable[[Any, Any], Array], slopes: Array, others: Array, *, symmetric: bool = False
) -> Gram:
    """``sum_st between(i, j)[s, t] <slopes[i, a, s], others[j, b, t]>``."""
    m = slopes.shape[1]

    def block(i: Any, j: Any) -> Array:
        mixed = _mixed(between(i, j), others[j])
        return _all_products(slopes[i].reshape(m, -1), mixed.reshape(m, -1))

    return _blocks(block, len(slopes), symmetric=symmetric)


def _blocks(block: Callable[[Any, Any], Array], n: int, *, symmetric: bool = False) -> Gram:
    """``[n a n b]`` from ``block(i, j)``, ``[a b]``; of a symmetric Gram half of them are made."""
    pairs = np.array([(i, j) for i in range(n) for j in range(i if symmetric else 0, n)])
    if n <= UNROLLED:
        found = jnp.stack([block(i, j) for i, j in pairs.tolist()])
    else:
        found = jax.lax.map(lambda pair: block(pair[0], pair[1]), jnp.asarray(pairs))
    place = np.zeros((n, n), np.int32)
    place[pairs[:, 1], pairs[:, 0]] = range(len(pairs))
    place[pairs[:, 0], pairs[:, 1]] = range(len(pairs))
    every = found[place]
    if symmetric:
        below = np.tril(np.ones((n, n), bool), -1)[..., None, None]
        every = jnp.where(jnp.broadcast_to(below, every.shape), every.swapaxes(2, 3), every)
    return every.transpose(0, 2, 1, 3)


def _mixed(weights: Float[Array, "new rows"], slopes: Float[Array, "outputs rows width"]) -> Array:
    """The rows of each output in other proportions, ``[outputs new width]``."""
    if len(slopes) == 1:
        return product(weights, slopes[0], 1, 0)[None]
    return _sum("st,atw->asw", weights, slopes)


def _at(factor: Array, i: Any) -> Array:
    return factor[0] if len(factor) == 1 else factor[i]


def _overlap(left: Array, right: Array) -> Array:
    """``[rows rows']`` inner products of rows, either of which may be ids of one-hot rows."""
    if left.ndim == 1 and right.ndim == 1:  # 0 and 1 are exact in every dtype
        return ((left[:, None] == right[None]) & (left[:, None] >= 0)).astype(jnp.float32)
    if left.ndim == 1:
        return _overlap(right, left).T
    if right.ndim == 1:
        picked = jnp.take(left, right, axis=1, mode="clip")
        real = jnp.broadcast_to(right[None] >= 0, picked.shape)
        return jnp.where(real, picked, jnp.zeros_like(picked))
    return product(left, right, 1, 1)


def _all_products(left: Array, right: Array) -> Array:
    """``[a b]`` inner products of all rows of two matrices."""
    if len(left) * len(right) > 16 or left.shape[1] <= PIECE:
        return product(left, right, 1, 1)
    # One by one: as a product of matrices of few long rows they take many times longer on CPU.
    return jnp.stack([jnp.stack([inner(x, y) for y in right]) for x in left])


def product(left: Array, right: Array, contract: int, with_: int) -> Array:
    """Sum over one axis of each, in float32 or wider."""
    left, right = _alike(left, right)
    return jax.lax.dot_general(left, right, (((contract,), (with_,)), ((), ())), **_exact(left))


def _sum(subscripts: str, left: Array, right: Array) -> Array:
    """Einsum in float32 or wider."""
    left, right = _alike(left, right)
    return jnp.einsum(subscripts, left, right, **_exact(left))


def _times(left: Array, right: Array) -> Array:
    """Entry by entry, axes of one repeated, in float32 or wider."""
    wide = _accumulator(left, right)
    left, right = jnp.broadcast_arrays(left.astype(wide), right.astype(wide))
    return left * right


def _alike(left: Array, right: Array) -> tuple[Array, Array]:
    """Both in one dtype: if one is a sum already, it is wider than the model's."""
    if left.dtype == right.dtype:
        return left, right
    wide = _accumulator(left, right)
    return left.astype(wide), right.astype(wide)


def _exact(operand: Array) -> dict:
    highest = jax.lax.Precision.HIGHEST
    return {"precision": highest, "preferred_element_type": _accumulator(operand)}


def _accumulator(*arrays: Array) -> DTypeLike:
    return jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32


def inner(left: Array, right: Array) -> Float[Array, ""]:
    """Inner product of two arrays of one shape, in pieces.

    One running sum in float32 of the squares of SmolLM2's 28 million embeddings is 5 % too small.
    """
    rows = [_in_pieces(x.reshape(-1)) for x in (left, right)]
    sums = _sum("ij,ij->i", *rows)
    while sums.size > 1:
        sums = _in_pieces(sums).sum(axis=1)
    return sums.sum()


def _in_pieces(x: Array) -> Array:
    """A vector as rows of `PIECE` entries, zeros at its end."""
    return jnp.pad(x, (0, -x.size % PIECE)).reshape(-1, PIECE)
