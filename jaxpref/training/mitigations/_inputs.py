"""What every mitigation does with its arguments before the formula."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

AnyArray = Array | np.ndarray
Gram = Float[AnyArray, "*pairs 2 2"]
Pull = Float[AnyArray, "*pairs 2"]


def wide(x: AnyArray) -> Array:
    """At least float32."""
    x = jnp.asarray(x)
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def over(x: Array, y: Array) -> Array:
    """``x / y``, and 0 where ``y`` is."""
    zero = y == 0
    return jnp.where(zero, jnp.zeros_like(y), x.astype(y.dtype) / jnp.where(zero, 1.0, y))


def entries(gram: AnyArray) -> tuple[Array, Array, Array]:
    """``|g_w|^2``, ``<g_w, g_l>``, ``|g_l|^2``; rounding can leave a square below zero."""
    gram = jnp.asarray(gram)
    w, l = (jnp.maximum(gram[..., i, i], jnp.zeros((), gram.dtype)) for i in (0, 1))
    return w, gram[..., 0, 1], l
