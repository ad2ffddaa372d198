"""Data parallelism: pairs spread over devices, parameters the same on all of them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

AXIS = "data"


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the one axis ``data``, over all devices of all processes unless told.

    With several processes, each calls ``jax.distributed.initialize`` first, and each gives the
    step the same whole batch: batches are pure functions of the step, so nothing is sent.

    >>> data_mesh().axis_names
    ('data',)
    """
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """The same arrays on every device of the mesh: what a state needs before its first step.

    With several processes, each gives the same values, and it is checked that they are the same.

    Args:
      tree: of arrays.
      mesh: of devices.

    Returns:
      The tree, each leaf whole on every device.
    """

    def put(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            bits = put(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))
        # Through numpy: an array committed to a device of this process cannot go to all others.
        return jax.device_put(np.asarray(leaf), replicated(mesh))

    return jax.tree.map(put, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on each device."""
    return NamedSharding(mesh, PartitionSpec())


def shard(batch: PyTree, mesh: Mesh | AbstractMesh, *, axis: int = 0) -> Any:
    """Spread ``axis`` of every leaf over the mesh; for use under jit.

    Args:
      batch: a tree of arrays.
      mesh: of devices.
      axis: which axis of every leaf is spread.

    Returns:
      The tree with that constraint on its leaves.

    Raises:
      ValueError: a leaf without that axis, or one that the devices do not divide.
    """
    check(mesh)
    devices = mesh.shape[AXIS]
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))
    for leaf in jax.tree.leaves(batch):
        if leaf.ndim <= axis or leaf.shape[axis] % devices:
            expected = f"axis {axis} to be a multiple of the mesh's {devices} devices"
            raise ValueError(f"batch has a leaf of shape {leaf.shape}, expected {expected}")
    return jax.lax.with_sharding_constraint(batch, sharding)


def check(mesh: Mesh | AbstractMesh) -> None:
    """Refuse a mesh that cannot carry the batch.

    Raises:
      ValueError: the mesh has no axis ``data``.
    """
    if AXIS not in mesh.axis_names:
        raise ValueError(f"mesh has the axes {mesh.axis_names}, expected an axis {AXIS!r}")
