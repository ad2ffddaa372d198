"""Log-probability of one token at each position, from hidden states: plain, and in chunks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int


def token_logits(
    hidden: Float[Array, "*batch width"], unembedding: Float[Array, "vocab width"]
) -> Float[Array, "*batch vocab"]:
    """Next-token logits, ``hidden @ unembedding.T``, in float32 or better.

    The product is taken in the dtype of `hidden` (the model's compute dtype, to which
    `unembedding` is cast), summed in float32 or better, at the highest matrix precision: TF32, the
    default of some accelerators, would lose the fourth digit of every log-probability.

    Args:
        hidden: Final-norm hidden states.
        unembedding: One row a token of the vocabulary.

    Returns:
        Logits: float64 for float64 hidden states, else float32.

    >>> print(token_logits(jnp.array([1.0, 2.0]), jnp.eye(2)))
    [1. 2.]

    Source: the definition.
    """
    return _product("...d,vd->...v", hidden, unembedding.astype(hidden.dtype))


def token_logprobs(
    hidden: Float[Array, "*batch time width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, "*batch time"],
) -> Float[Array, "*batch time"]:
    r"""Log-probability of each target token; all logits are held at once.

    .. math:: \log \pi(y_t) = z_{t, y_t} - \log \sum_v e^{z_{t, v}}, \qquad z_t = W h_t

    Plain operations: forward and reverse derivatives of any order. `token_logprobs_chunked` has
    the same numbers in less memory.

    Args:
        hidden: Final-norm hidden states; ``hidden[..., t, :]`` predicts ``targets[..., t]``.
        unembedding: One row a token of the vocabulary.
        targets: Token ids. Shifting by one is the caller's task (see `pair_scores`).

    Returns:
        Nats, at most 0, in the dtype of `token_logits`. NaN where a target is not in the
        vocabulary.

    >>> print(token_logprobs(jnp.zeros((3, 2)), jnp.ones((4, 2)), jnp.array([0, 3, 4])).round(4))
    [-1.3863 -1.3863     nan]

    Source: the definition of a softmax language model.
    """
    logits = token_logits(hidden, unembedding)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logp = picked - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(in_vocabulary(targets, unembedding), logp, jnp.nan)


def token_logprobs_chunked(
    hidden: Float[Array, "*batch time width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, "*batch time"],
    *,
    vocab_chunk: int | None = 4096,
    time_chunk: int | None = None,
) -> Float[Array, "*batch time"]:
    """`token_logprobs` that holds the logits of one chunk at a time, also in its derivative.

    A running log-sum-exp over vocabulary chunks; the reverse derivative computes each chunk's
    logits once more, a third more work than the plain path in the last layer. Largest array:
    ``[*batch, time_chunk, vocab_chunk]``, and ``[vocab, width]`` for the derivative.

    The leading axes are never cut, so an axis spread over devices stays spread.

    Derivatives: reverse mode (``jax.grad``, ``jax.vjp``) under ``jit``, ``vmap``, ``scan`` and
    ``checkpoint``, and forward over reverse (Hessian-vector products). ``jax.jvp`` of the function
    itself raises JAX's TypeError on ``custom_vjp``: use `token_logprobs` there. So does reverse
    over reverse save memory no more: it keeps every chunk's logits.

    Args:
        hidden: Final-norm hidden states; ``hidden[..., t, :]`` predicts ``targets[..., t]``.
        unembedding: One row a token of the vocabulary.
        targets: Token ids.
        vocab_chunk: Rows of the unembedding at a time; ``None``: all. Any size, a divisor or not.
        time_chunk: Positions of the time axis at a time; ``None``: all.

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
    vocab, width = unembedding.shape
    rows = min(vocab, vocab_chunk or vocab)

    def score(
        hidden: Float[Array, "*batch time width"], targets: Int[Array, "*batch time"]
    ) -> Float[Array, "*batch time"]:
        flat = _logprobs(rows, hidden.reshape(-1, width), unembedding, targets.reshape(-1))
        return flat.reshape(targets.shape)

    logp: Array = map_time(score, time_chunk, (hidden, targets), time_axis=targets.ndim - 1)
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
    chunks = -(-time // chunk)

    def cut(array: Array) -> Array:
        fill = [(0, 0)] * array.ndim
        fill[time_axis] = (0, chunks * chunk - time)
        before, after = array.shape[:time_axis], array.shape[time_axis + 1 :]
        parts = jnp.pad(array, fill).reshape(*before, chunks, chunk, *after)
        return jnp.moveaxis(parts, time_axis, 0)

    def join(parts: Array) -> Array:
        parts = jnp.moveaxis(parts, 0, time_axis)
        before, after = parts.shape[:time_axis], parts.shape[time_axis + 2 :]
        whole = parts.reshape(*before, chunks * chunk, *after)
        return jax.lax.slice_in_dim(whole, 0, time, axis=time_axis)

    return jax.tree.map(join, jax.lax.map(lambda xs: function(*xs), tuple(map(cut, arrays))))


def require_positive(**sizes: int | None) -> None:
    """Raises a ValueError that names the size which is neither ``None`` nor positive."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}: expected a positive integer or None, got {size!r}")


def _accumulator(dtype: DTypeLike) -> DTypeLike:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _product(subscripts: str, left: Array, right: Array) -> Array:
    highest, wide = jax.lax.Precision.HIGHEST, _accumulator(left.dtype)
    return jnp.einsum(subscripts, left, right, precision=highest, preferred_element_type=wide)


def in_vocabulary(targets: Array, unembedding: Array) -> Array:
    """Whether a token id has a row in the unembedding."""
    return (targets >= 0) & (targets < unembedding.shape[0])


def _vocabulary_chunk(
    unembedding: Array, index: Array, rows: int
) -> tuple[Array, Array, Array, Array]:
    """Chunk `index`: first row, rows, token ids [1 rows], and which were in no earlier chunk.

    The last chunk is moved back to end with the vocabulary, so every chunk has the same size.
    """
    start = jnp.minimum(index * rows, unembedding.shape[0] - rows)
    ids = (start + jnp.arange(rows))[None]
    return start, jax.lax.dynamic_slice_in_dim(unembedding, start, rows), ids, ids >= index * rows


def _logprobs_forward(
    rows: int, hidden: Array, unembedding: Array, targets: Array
) -> tuple[Array, tuple[Array, ...]]:
    def body(carry: tuple[Array, Array, Array], index: Array) -> tuple[tuple, None]:
        top, total, picked = carry
        _, chunk, ids, fresh = _vocabulary_chunk(unembedding, index, rows)
        logits = jnp.where(fresh, token_logits(hidden, chunk), -jnp.inf)
        new_top = jnp.maximum(top, logits.max(axis=-1))
        total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(axis=-1)
        hit = jnp.where(ids == targets[:, None], logits, -jnp.inf).max(axis=-1)
        return (new_top, total, jnp.maximum(picked, hit)), None

    lowest = jnp.full(targets.shape, -jnp.inf, _accumulator(hidden.dtype))
    start = (lowest, jnp.zeros_like(lowest), lowest)
    chunks = jnp.arange(-(-unembedding.shape[0] // rows))
    (top, total, picked), _ = jax.lax.scan(body, start, chunks)
    logsumexp = top + jnp.log(total)
    return picked - logsumexp, (hidden, unembedding, targets, logsumexp)


def _logprobs_backward(
    rows: int, residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, None]:
    hidden, unembedding, targets, logsumexp = residuals

    def body(carry: tuple[Array, Array], index: Array) -> tuple[tuple, None]:
        d_hidden, d_unembedding = carry
        start, chunk, ids, fresh = _vocabulary_chunk(unembedding, index, rows)
        probability = jnp.exp(token_logits(hidden, chunk) - logsumexp[:, None])
        slope = (ids == targets[:, None]).astype(probability.dtype) - probability
        d_logits = jnp.where(fresh, cotangent[:, None] * slope, 0).astype(hidden.dtype)
        d_hidden = d_hidden + _product("nv,vd->nd", d_logits, chunk.astype(hidden.dtype))
        # Read before writing: the rows that the last chunk shares with the one before keep theirs.
        before = jax.lax.dynamic_slice_in_dim(d_unembedding, start, rows)
        d_chunk = before + _product("nv,nd->vd", d_logits, hidden)
        d_unembedding = jax.lax.dynamic_update_slice_in_dim(d_unembedding, d_chunk, start, axis=0)
        return (d_hidden, d_unembedding), None

    wide = _accumulator(hidden.dtype)
    zeros = jnp.zeros(hidden.shape, wide), jnp.zeros(unembedding.shape, wide)
    chunks = jnp.arange(-(-unembedding.shape[0] // rows))
    (d_hidden, d_unembedding), _ = jax.lax.scan(body, zeros, chunks)
    return d_hidden.astype(hidden.dtype), d_unembedding.astype(unembedding.dtype), None


def _logprobs_primal(
    rows: int,
    hidden: Float[Array, "positions width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, " positions"],
) -> Float[Array, " positions"]:
    return _logprobs_forward(rows, hidden, unembedding, targets)[0]


_logprobs = jax.custom_vjp(_logprobs_primal, nondiff_argnums=(0,))
_logprobs.defvjp(_logprobs_forward, _logprobs_backward)
