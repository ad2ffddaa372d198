"""Many devices by the code of one: a mesh, and rules that say what lies where.

Models know no mesh. Sharding enters in three places: the arrays of a state (`put`), the pairs of a
batch (`shard`, by the step), and a `Policy` whose states and unembedding are told where to lie
(`spread`). XLA derives the rest, and no number changes beyond rounding.

The mesh has three axes. Pairs are spread over ``data`` and ``fsdp`` together. Parameters and
optimizer state are the same along ``data``, in slices along ``fsdp`` (gathered layer by layer when
they are used) and ``tensor`` (each device computes its heads and its part of the MLP's middle).
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxpref.models.decoder import Policy
from jaxpref.models.paths import path_of

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
"""The axes over which pairs are spread."""

Axes = tuple[str | tuple[str, ...] | None, ...]
RULES: tuple[tuple[str, Axes], ...] = (
    (r"attention\.(query|key|value)\.kernel$", ("fsdp", "tensor")),
    (r"mlp\.(gate|up)\.kernel$", ("fsdp", "tensor")),
    (r"(attention\.output|mlp\.down)\.kernel$", ("tensor", "fsdp")),
    (r"(attention\.(query|key|value)|mlp\.(gate|up))\.bias$", ("tensor",)),
    (r"(un)?embedding$", (("fsdp", "tensor"), None)),
    (r"(un)?embedding$", (None, "fsdp")),  # a vocabulary of an odd size
    (r"(scale|bias)$", ()),
)
"""End of a parameter's dotted path, and the mesh axes of its last array axes. The first that
matches and divides counts; axes before those, as of stacked layers, are whole on each device."""

Rules = Sequence[tuple[str, Axes]]


def mesh(
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of ``data * fsdp * tensor`` devices, of all processes.

    With several processes, each calls `start` first, and each gives the step the same whole batch:
    batches are pure functions of the step, so nothing is sent.

    Args:
      data: copies of the parameters; None is as many as there is room for.
      fsdp: slices of parameters and optimizer state, each of which takes a share of the pairs.
      tensor: slices of each layer's heads and MLP.
      devices: by default all.

    Returns:
      The mesh.

    Raises:
      ValueError: an axis below 1, more devices than there are, or fewer than those of all
        processes.

    >>> dict(mesh(1).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    room = len(devices) // max(1, fsdp * tensor)
    sizes = (max(1, room) if data is None else data, fsdp, tensor)
    for name, size in zip(AXES, sizes, strict=True):
        if size < 1:
            raise ValueError(f"mesh: {name} is {size}, expected at least 1")
    wanted = " * ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if math.prod(sizes) > len(devices):
        raise ValueError(f"mesh: {wanted} devices, expected at most the {len(devices)} there are")
    if math.prod(sizes) < len(devices) and jax.process_count() > 1:
        raise ValueError(f"mesh: {wanted} devices, expected all {len(devices)} of the processes")
    devices = devices[: math.prod(sizes)]
    return jax.make_mesh(sizes, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def parse(text: str) -> Mesh:
    """`mesh` of a text like ``data=2,fsdp=4``.

    Raises:
      ValueError: another text, by the part that cannot be read; sizes as `mesh`.

    >>> dict(parse("data=1").shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in sizes or not size.isdecimal():
            expected = f"one of {', '.join(AXES)}, each once, with a number, as data=2,fsdp=4"
            raise ValueError(f"mesh: got {part.strip()!r}, expected {expected}")
        sizes[name] = int(size)
    return mesh(sizes.get("data", 1), sizes.get("fsdp", 1), sizes.get("tensor", 1))


def start() -> None:
    """Joins the processes of a job, where the environment says that there are several.

    ``JAX_COORDINATOR_ADDRESS`` (host:port of the first), ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``; without the first of them nothing happens. Before any use of a device.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ and not jax.distributed.is_initialized():
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        processes, number = (int(x) if (x := os.environ.get(name)) else None for name in names)
        jax.distributed.initialize(num_processes=processes, process_id=number)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Whole on each device."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(tree: PyTree, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> PyTree:
    """Where each array of a state is to lie.

    A leaf of two and more axes that no rule names is cut over ``fsdp`` along the largest axis that
    it divides. Optimizers keep their moments under the paths of the parameters, so that the rules
    are theirs, too.

    Args:
      tree: of arrays or ``jax.ShapeDtypeStruct``: parameters, or a whole `State`.
      mesh: of `mesh`.
      rules: as `RULES`.

    Returns:
      A tree of ``NamedSharding``.

    Raises:
      ValueError: an axis that rules cut and the mesh does not divide: names path, sizes and axis.

    >>> policy_params = {"norm": {"scale": jnp.ones(4)}, "embedding": jnp.ones((6, 4))}
    >>> found = shardings(policy_params, mesh(1))
    >>> tuple(found["norm"]["scale"].spec), tuple(found["embedding"].spec)
    ((), (('fsdp', 'tensor'), None))
    """

    def where(keys: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*_spec(path_of(keys), leaf, mesh, rules)))

    return jax.tree_util.tree_map_with_path(where, tree)


def _spec(path: str, leaf: Any, mesh: Mesh | AbstractMesh, rules: Rules) -> list[Any]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.ndim == 0:
        return []
    fault = ""
    for end, axes in rules:
        if re.search(end, path):
            spec = [None] * (leaf.ndim - len(axes)) + list(axes) if axes else []
            undivided = [_fault(*each, mesh) for each in zip(leaf.shape, spec, strict=bool(spec))]
            if not any(undivided):
                return spec
            fault = fault or next(filter(None, undivided))
    if fault:
        raise ValueError(f"mesh: {fault} of {path} {leaf.shape}, expected a divisor")
    cut = [axis for axis, size in enumerate(leaf.shape) if size % mesh.shape["fsdp"] == 0]
    if leaf.ndim < 2 or not cut:
        return []
    return [None] * max(cut, key=lambda axis: leaf.shape[axis]) + ["fsdp"]


def _fault(size: int, axes: Any, mesh: Mesh | AbstractMesh) -> str:
    """What does not divide, or nothing."""
    names = [axes] if isinstance(axes, str) else axes or []
    if size % math.prod(mesh.shape[name] for name in names) == 0:
        return ""
    sizes = " * ".join(f"{name}={mesh.shape[name]}" for name in names)
    return f"{sizes} does not divide the {size}"


def put(tree: PyTree, where: PyTree) -> PyTree:
    """The same arrays, each device with its slices: what a state needs before its first step.

    With several processes, each gives the same whole values.

    Args:
      tree: of arrays.
      where: a tree of shardings, or one for all leaves (`replicated`).

    Returns:
      The tree.
    """
    if isinstance(where, jax.sharding.Sharding):
        where = jax.tree.map(lambda _: where, tree)

    def one(leaf: Any, sharding: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            bits = one(jax.random.key_data(leaf), replicated(sharding.mesh))
            return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, tree, where)


def to_host(tree: PyTree) -> PyTree:
    """Whole NumPy arrays on every process, wherever their slices lie."""

    def one(leaf: Any) -> np.ndarray:
        if getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)


def agreed(asked: Callable[[], bool]) -> bool:
    """What the first process answers, on all of them: a decision that is made once.

    >>> agreed(lambda: True)
    True
    """
    if jax.process_count() == 1:
        return asked()
    answer = asked() if jax.process_index() == 0 else False
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer)))


def spread(policy: Policy, mesh: Mesh, dtype: Any = None) -> Policy:
    """A policy whose batches are spread, and whose unembedding is gathered once a pass.

    Without it XLA gathers the table anew in every round of a loop over its rows. A batch that the
    devices do not divide is computed by each of them.

    Args:
      policy: a model.
      mesh: of `mesh`.
      dtype: to which the unembedding is cast before it is sent, the model's compute dtype; None
        sends it as it is.

    Returns:
      A policy of the same numbers.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]

    def hidden(params, tokens, *arguments):
        if len(tokens) % devices:
            return policy.hidden(params, tokens, *arguments)
        return shard(policy.hidden(params, shard(tokens, mesh), *arguments), mesh)

    def unembedding(params):
        table, _ = policy.head(params)
        table = table if dtype is None else table.astype(dtype)
        return jax.lax.with_sharding_constraint(table, replicated(mesh))

    return policy._replace(hidden=hidden).with_table(unembedding)


def shard(batch: PyTree, mesh: Mesh | AbstractMesh, *, axis: int = 0) -> Any:
    """Spread ``axis`` of every leaf over ``data`` and ``fsdp``; for use under jit.

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
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))
    for leaf in jax.tree.leaves(batch):
        if leaf.ndim <= axis or leaf.shape[axis] % devices:
            sizes = f"data={mesh.shape['data']} * fsdp={mesh.shape['fsdp']}"
            expected = f"axis {axis} to be a multiple of the mesh's {sizes} devices"
            raise ValueError(f"batch has a leaf of shape {leaf.shape}, expected {expected}")
    return jax.lax.with_sharding_constraint(batch, sharding)


def check(mesh: Mesh | AbstractMesh) -> None:
    """Refuse a mesh that cannot carry the batch.

    Raises:
      ValueError: the mesh has not the axes of `mesh`.
    """
    if mesh.axis_names != AXES:
        raise ValueError(f"mesh: got the axes {mesh.axis_names}, expected {AXES}")
