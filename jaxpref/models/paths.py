"""Parameters by path, ``layers.3.attention.query.kernel``, whether scanned or not."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]


def path_of(keys: tuple[Any, ...]) -> str:
    """A leaf's path from its keys in `jax.tree_util.tree_flatten_with_path`."""
    return jax.tree_util.keystr(keys, simple=True, separator=".").removesuffix(".value")


def shapes(params: PyTree, layers: int) -> dict[str, Shape]:
    """The shape of each parameter.

    Args:
      params: of a decoder; its leaves may be ``jax.ShapeDtypeStruct``.
      layers: of that decoder.

    Returns:
      Shapes by path; of a scanned decoder without the axis of its layers.
    """
    return {
        path: leaf.shape[stacked:]
        for paths, stacked, leaf in _leaves(params, layers)
        for path in paths
    }


def flatten(params: PyTree, layers: int) -> Arrays:
    """The parameters as arrays in float32, stacked layers taken apart.

    Args:
      params: of a decoder.
      layers: of that decoder.

    Returns:
      Arrays by path.
    """
    found = {}
    for paths, stacked, leaf in _leaves(params, layers):
        value = np.asarray(leaf, np.float32)
        found |= zip(paths, value if stacked else [value], strict=True)
    return found


def unflatten(
    params: PyTree, arrays: Mapping[str, np.ndarray], layers: int, shardings: PyTree = None
) -> PyTree:
    """Parameters out of arrays, one after the other: no more than one of them is held beside.

    Args:
      params: a tree of the wanted shapes and dtypes, as `jaxpref.models.decoder.abstract` gives.
      arrays: by path.
      layers: of the decoder.
      shardings: a tree of where each lies; each device gets its slices. None is the default device.

    Returns:
      A tree like `params`.
    """
    leaves, places = _leaves(params, layers), jax.tree.leaves(shardings)
    found = []
    for (paths, stacked, leaf), place in zip(leaves, places or [None] * len(leaves), strict=True):
        values = [arrays[path] for path in paths]
        whole = np.asarray(np.stack(values) if stacked else values[0], leaf.dtype)
        if place is None:
            found.append(jnp.asarray(whole))
        else:
            found.append(jax.make_array_from_callback(whole.shape, place, whole.__getitem__))
    return jax.tree.unflatten(jax.tree.structure(params), found)


def _leaves(params: PyTree, layers: int) -> list[tuple[list[str], bool, Any]]:
    """Each leaf with its path, or its paths and True where it stacks all layers."""
    found = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = path_of(keys)
        head, _, tail = path.partition(".")
        stacked = head == "layers" and not tail.split(".")[0].isdigit()
        paths = [f"layers.{i}.{tail}" for i in range(layers)] if stacked else [path]
        found.append((paths, stacked, leaf))
    return found
