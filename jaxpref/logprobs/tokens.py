"""Log-probability of one token at each position, from hidden states, all logits at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from jaxpref.models.attention import capped


def token_logits(
    hidden: Float[Array, "*batch width"],
    unembedding: Float[Array, "vocab width"],
    cap: float | None = None,
) -> Float[Array, "*batch vocab"]:
    """Next-token logits, ``hidden @ unembedding.T``, in float32 or better.

    The product is taken in the dtype of `hidden` (the model's compute dtype, to which
    `unembedding` is cast), summed in float32 or better, at the highest matrix precision: TF32, the
    default of some accelerators, would lose the fourth digit of every log-probability.

    Args:
        hidden: Final-norm hidden states.
        unembedding: One row a token of the vocabulary.
        cap: Of a model that caps its logits ``z`` (Gemma 2): ``cap tanh(z / cap)``; None has none.

    Returns:
        Logits: float64 for float64 hidden states, else float32.

    >>> print(token_logits(jnp.array([1.0, 2.0]), jnp.eye(2)))
    [1. 2.]

    Source: the definition.
    """
    return capped(product("...d,vd->...v", hidden, unembedding.astype(hidden.dtype)), cap)


def token_logprobs(
    hidden: Float[Array, "*batch time width"],
    unembedding: Float[Array, "vocab width"],
    targets: Int[Array, "*batch time"],
    *,
    cap: float | None = None,
) -> Float[Array, "*batch time"]:
    r"""Log-probability of each target token; all logits are held at once.

    .. math:: \log \pi(y_t) = z_{t, y_t} - \log \sum_v e^{z_{t, v}}, \qquad z_t = W h_t

    Plain operations: forward and reverse derivatives of any order. `token_logprobs_chunked` has
    the same numbers in less memory.

    Args:
        hidden: Final-norm hidden states; ``hidden[..., t, :]`` predicts ``targets[..., t]``.
        unembedding: One row a token of the vocabulary.
        targets: Token ids. Shifting by one is the caller's task (see `pair_scores`).
        cap: As in `token_logits`.

    Returns:
        Nats, at most 0, in the dtype of `token_logits`. NaN where a target is not in the
        vocabulary.

    >>> print(token_logprobs(jnp.zeros((3, 2)), jnp.ones((4, 2)), jnp.array([0, 3, 4])).round(4))
    [-1.3863 -1.3863     nan]

    Source: the definition of a softmax language model.
    """
    logits = token_logits(hidden, unembedding, cap)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logp = picked - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(in_vocabulary(targets, unembedding), logp, jnp.nan)


def accumulator(dtype: DTypeLike) -> DTypeLike:
    """The dtype to sum products of `dtype` in."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def product(subscripts: str, left: Array, right: Array) -> Array:
    """Einsum at the highest precision, summed in float32 or better."""
    highest, wide = jax.lax.Precision.HIGHEST, accumulator(left.dtype)
    return jnp.einsum(subscripts, left, right, precision=highest, preferred_element_type=wide)


def in_vocabulary(targets: Array, unembedding: Array) -> Array:
    """Whether a token id has a row in the unembedding."""
    return (targets >= 0) & (targets < unembedding.shape[0])
