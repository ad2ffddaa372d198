"""Log-probability of one token at each position, the logits of one chunk at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref import plain
from jaxpref.logprobs.tokens import (
    accumulator,
    in_vocabulary,
    product,
    token_logits,
    token_logprobs,
)


def token_logprobs_chunked(
    hidden: Float[Array, "*batch time width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, "*batch time"],
    *,
    vocab_chunk: int | None = 4096,
    time_chunk: int | None = None,
    cap: float | None = None,
) -> Float[Array, "*batch time"]:
    """`token_logprobs` that holds the logits of one chunk at a time, also in its derivative.

    A running log-sum-exp over vocabulary chunks; the reverse derivative computes each chunk's
    logits once more, a third more work than the plain path in the last layer. Largest array:
    ``[*batch, time_chunk, vocab_chunk]``, and ``[vocab, width]`` for the derivative.

    The leading axes are never cut, so an axis spread over devices stays spread.

    Derivatives: reverse mode (``jax.grad``, ``jax.vjp``) under ``jit``, ``vmap``, ``scan`` and
    ``checkpoint``, and forward over reverse (Hessian-vector products). ``jax.jvp`` of the function
    itself raises JAX's TypeError on ``custom_vjp``: use `token_logprobs` there. So does reverse
    over reverse save memory no more: it keeps every chunk's logits. For the functions of
    `jaxpref.gradients`, which read programs and go forward, it is `token_logprobs` (see
    `jaxpref.plain`).

    Args:
        hidden: Final-norm hidden states; ``hidden[..., t, :]`` predicts ``targets[..., t]``.
        unembedding: One row a token of the vocabulary.
        targets: Token ids.
        vocab_chunk: Rows of the unembedding at a time; ``None``: all. Any size, a divisor or not.
        time_chunk: Positions of the time axis at a time; ``None``: all.
        cap: As in `token_logits`.

    Returns:
        Nats, at most 0. NaN where a target is not in the vocabulary.

    Raises:
        ValueError: A chunk size is not positive.

    >>> hidden, targets = jnp.zeros((3, 2)), jnp.array([0, 3, 4])
    >>> print(token_logprobs_chunked(hidden, jnp.ones((4, 2)), targets, vocab_chunk=3).round(4))
    [-1.3863 -1.3863     nan]

    Source: the definition; the running sum is Milakov and Gimelshein (2018), Algorithm 3,
    https://arxiv.org/abs/1805.02867
    """
    require_positive(vocab_chunk=vocab_chunk, time_chunk=time_chunk)
    if plain.ASKED.value:
        return token_logprobs(hidden, unembedding, targets, cap=cap)
    rows = min(unembedding.shape[0], vocab_chunk or unembedding.shape[0])
    axis, time = targets.ndim - 1, targets.shape[-1]
    states = cut_time(hidden, time_chunk, axis)
    ids = cut_time(targets.astype(jnp.int32), time_chunk, axis)
    flat = states.reshape(len(states), -1, states.shape[-1]), ids.reshape(len(ids), -1)
    found = _logprobs(rows, cap, flat[0], unembedding, flat[1])
    logp = join_time(found.reshape(ids.shape), time, axis)
    return jnp.where(in_vocabulary(targets, unembedding), logp, jnp.nan)


def map_time(
    function: Callable[..., Any], chunk: int | None, arrays: tuple[Array, ...], *, time_axis: int
) -> Any:
    """``function(*arrays)``, computed over slices of the time axis one after the other.

    Args:
        function: Maps arrays with one time axis to a pytree of such arrays, position by position.
        chunk: Positions at a time; ``None``: all. The last slice is filled up with zeros, whose
            results are dropped.
        arrays: Arrays whose axis `time_axis` is time.
        time_axis: Counted from the front, the same in all inputs and outputs.

    Returns:
        What ``function(*arrays)`` returns.

    Source: the definition.
    """
    time = arrays[0].shape[time_axis]
    if chunk is None or chunk >= time:
        return function(*arrays)
    parts = tuple(cut_time(array, chunk, time_axis) for array in arrays)
    mapped = jax.lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda part: join_time(part, time, time_axis), mapped)


def cut_time(array: Array, chunk: int | None, axis: int) -> Array:
    """Slices of the time axis `axis` on a new leading axis, the last filled up with zeros."""
    time = array.shape[axis]
    chunk = min(time, chunk or time)
    chunks = -(-time // chunk)
    fill = [(0, 0)] * array.ndim
    fill[axis] = (0, chunks * chunk - time)
    parts = jnp.pad(array, fill).reshape(
        *array.shape[:axis], chunks, chunk, *array.shape[axis + 1 :]
    )
    return jnp.moveaxis(parts, axis, 0)


def join_time(parts: Array, time: int, axis: int) -> Array:
    """The inverse of `cut_time`, for a time axis of `time` positions."""
    parts = jnp.moveaxis(parts, 0, axis)
    whole = parts.reshape(*parts.shape[:axis], -1, *parts.shape[axis + 2 :])
    return jax.lax.slice_in_dim(whole, 0, time, axis=axis)


def require_positive(**sizes: int | None) -> None:
    """Raises a ValueError that names the size which is neither ``None`` nor positive."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}: expected a positive integer or None, got {size!r}")


def _indices(unembedding: Array, rows: int) -> Array:
    return jnp.arange(-(-unembedding.shape[0] // rows), dtype=jnp.int32)


def _vocabulary_chunk(
    unembedding: Array, index: Array, rows: int
) -> tuple[Array, Array, Array, Array]:
    """Chunk `index`: first row, rows, token ids [1 rows], and which were in no earlier chunk.

    The last chunk is moved back to end with the vocabulary, so every chunk has the same size.
    """
    start = jnp.minimum(index * rows, unembedding.shape[0] - rows)
    ids = (start + jnp.arange(rows, dtype=jnp.int32))[None]
    return start, jax.lax.dynamic_slice_in_dim(unembedding, start, rows), ids, ids >= index * rows


def _logprobs_forward(
    rows: int, cap: float | None, hidden: Array, unembedding: Array, targets: Array
) -> tuple[Array, tuple[Array, ...]]:
    def vocabulary(part: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = part

        def body(carry: tuple[Array, Array, Array], index: Array) -> tuple[tuple, None]:
            top, total, picked = carry
            start, chunk, _, fresh = _vocabulary_chunk(unembedding, index, rows)
            logits = token_logits(hidden, chunk, cap)
            new_top = jnp.maximum(top, logits.max(axis=-1))
            level = _level(new_top)
            weights = jnp.where(fresh, jnp.exp(logits - level[:, None]), 0)
            total = total * jnp.exp(top - level) + weights.sum(axis=-1)
            place = targets - start
            here = (place >= 0) & (place < rows)
            found = jnp.take_along_axis(logits, jnp.where(here, place, 0)[:, None], axis=-1)[:, 0]
            return (new_top, total, jnp.where(here, found, picked)), None

        lowest = jnp.full(targets.shape, -jnp.inf, accumulator(hidden.dtype))
        start = lowest, jnp.zeros_like(lowest), lowest
        (top, total, picked), _ = jax.lax.scan(body, start, _indices(unembedding, rows))
        return picked, _level(top) + jnp.log(total)

    picked, logsumexp = jax.lax.map(vocabulary, (hidden, targets))
    return picked - logsumexp, (hidden, unembedding, targets, logsumexp)


def _level(top: Array) -> Array:
    """What logits are taken relative to: the largest, where there is one that is finite."""
    return jnp.where(jnp.isfinite(top), top, 0)


def _logprobs_backward(
    rows: int, cap: float | None, residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, None]:
    all_hidden, unembedding, all_targets, all_logsumexp = residuals
    wide = accumulator(all_hidden.dtype)

    def vocabulary(d_unembedding: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
        hidden, targets, logsumexp, cotangent = part
        put = jax.lax.dynamic_update_slice_in_dim

        def body(carry: tuple[Array, Array], index: Array) -> tuple[tuple, None]:
            d_hidden, d_unembedding = carry
            start, chunk, ids, fresh = _vocabulary_chunk(unembedding, index, rows)
            logits = token_logits(hidden, chunk, cap)
            probability = jnp.exp(logits - logsumexp[:, None])
            slope = (ids == targets[:, None]).astype(wide) - probability
            slope = slope if cap is None else slope * (1 - jnp.square(logits / cap))
            d_logits = jnp.where(fresh, cotangent[:, None] * slope, 0).astype(hidden.dtype)
            d_hidden = d_hidden + product("nv,vd->nd", d_logits, chunk.astype(hidden.dtype))
            before = jax.lax.dynamic_slice_in_dim(d_unembedding, start, rows)
            d_chunk = before + product("nv,nd->vd", d_logits, hidden)
            return (d_hidden, put(d_unembedding, d_chunk, start, axis=0)), None

        start = jnp.zeros(hidden.shape, wide), d_unembedding
        (d_hidden, d_unembedding), _ = jax.lax.scan(body, start, _indices(unembedding, rows))
        return d_unembedding, d_hidden.astype(hidden.dtype)

    parts = all_hidden, all_targets, all_logsumexp, cotangent
    d_unembedding, d_hidden = jax.lax.scan(vocabulary, jnp.zeros(unembedding.shape, wide), parts)
    return d_hidden, d_unembedding.astype(unembedding.dtype), None


def _logprobs_primal(
    rows: int,
    cap: float | None,
    hidden: Float[Array, "chunks positions width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, "chunks positions"],
) -> Float[Array, "chunks positions"]:
    return _logprobs_forward(rows, cap, hidden, unembedding, targets)[0]


# The loop over time is inside too: JAX's own derivative of such a loop keeps, for all of the
# vocabulary at once, what every slice of time has in common.
_logprobs = jax.custom_vjp(_logprobs_primal, nondiff_argnums=(0, 1))
_logprobs.defvjp(_logprobs_forward, _logprobs_backward)
