"""What every function of gradients asks of its parameters, examples and outputs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

NUMBERS = (jax.Array, np.ndarray, np.generic, int, float, complex)


def require_floating(params: PyTree) -> None:
    """Raises a ValueError that names the leaf which is no array of floating numbers."""
    for path, leaf in jax.tree.leaves_with_path(params):
        name = f"params{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, NUMBERS):
            expected = "an array (of a whole module pass its arrays, and close over the rest)"
            raise ValueError(f"{name}: got {type(leaf).__name__}, expected {expected}")
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            expected = "floating numbers (close over what is not trained)"
            raise ValueError(f"{name}: got {dtype}, expected {expected}")


def first_of(examples: PyTree) -> tuple[PyTree, int]:
    """Shapes of one example, and the number of examples.

    Raises:
        ValueError: there is no array, or their first axes differ.
    """
    shapes = jax.eval_shape(lambda tree: tree, examples)
    sizes = {x.shape[:1] for x in jax.tree.leaves(shapes)}
    if len(sizes) != 1 or () in sizes:
        found = sorted(x.shape for x in jax.tree.leaves(shapes))
        raise ValueError(f"examples: got arrays of shapes {found}, expected one first axis for all")
    ((size,),) = sizes

    def one(x):
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, weak_type=x.weak_type)

    return jax.tree.map(one, shapes), size


def output_of(logp_fn: Callable, params: PyTree, example: PyTree) -> tuple[int, ...]:
    """Shape of the log-probabilities of one example: ``[]`` or ``[outputs]``.

    Raises:
        ValueError: it is something else.
    """
    found: Any = jax.eval_shape(logp_fn, params, example)
    leaves = jax.tree.leaves(found)
    if len(leaves) != 1 or leaves[0] is not found:
        kind = type(found).__name__
        raise ValueError(f"logp_fn: got a {kind} of {len(leaves)} arrays, expected one array")
    if len(found.shape) > 1:
        raise ValueError(f"logp_fn: got shape {found.shape}, expected [] or [outputs]")
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(f"logp_fn: got {found.dtype}, expected floating numbers")
    return found.shape
