r"""Low-rank adapters (LoRA): a frozen model, and thin matrices beside its kernels that are trained.

.. math:: y = x W + s\,(x A) B, \qquad s = \alpha / r, \quad A\ [in, r],\ B\ [r, out]

``params`` of the policy that `attach` makes are the adapters alone: so state, optimizer,
checkpoints, log-probabilities, references, sampler and Grams hold and see nothing else. With
``B = 0``, as `draw` starts them, the policy is the base model: its own reference::

    policy, adapters = attach(base, params, alpha=16), draw(params, rank=8, key=key)

Adapters are ``{"layers.0.attention.query": {"a": A, "b": B}, ...}``, by the path of the kernel's
module (`jaxpref.models.decoder`); of a decoder of stacked layers ``layers.attention.query``, with
the axis of the layers first. A has independent uniform entries of mean 0 and variance ``1 / (3
in)``. `alpha` is a number, or one for each module by its path (``layers.0.attention.query``, of
stacked layers too). PEFT's rsLoRA scales by ``alpha / sqrt(rank)``: the same as ``alpha *
sqrt(rank)`` here.

**The Gram at the start.** With ``B = 0`` the gradient by A is zero and that by B is ``s A^T G`` of
the kernel's gradient G, so the Gram has a part from B alone, and its mean over draws of A is

.. math:: E\,\langle s A^T G_i, s A^T G_j \rangle = s^2\, r\, \mathrm{var}(A)\,\langle G_i, G_j
    \rangle = \frac{\alpha^2}{r}\, \mathrm{var}(A)\, \langle G_i, G_j \rangle

as ``E[A A^T] = r var(A) 1``: the Gram of full fine-tuning of the same kernels, smaller.

**Where the base lies.** Arrays that a jitted function closes over become constants in the text of
every program (jax 0.9.2 and 0.12.0: 50 MB of weights make a text of 105 MB, two to three times the
time of compiling and 130 to 180 MB of memory, and again for each shape of a batch; 400 MB took 1 GB
and half a minute). Of a `jax.new_ref` that is only read, the same two versions make an argument of
the program: no text, no memory, the time of a call as before. So the base is held in refs, copied
once. For several devices put it there first (`jaxpref.training.parallel.put`).
"""

import zlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from jaxpref.models.blocks import LowRank, wide
from jaxpref.models.decoder import Policy
from jaxpref.models.paths import path_of

KERNELS = ("layers.*.kernel",)
"""All kernels of all layers: attention's four and the MLP's two or three."""

Adapters = dict[str, dict[str, Float[Array, "..."]]]
Alpha = float | int | Mapping[str, float]
_END = ".kernel"


class Dropped(NamedTuple):
    """Adapters that do not see all of their inputs, for one call of a policy; of `dropped`."""

    adapters: Any  # Adapters, or their tracers
    key: Key[Array, ""]
    kept: Float[Array, ""]


class Site(NamedTuple):
    """A kernel that may have an adapter.

    Attributes:
        leaf: Its number among the parameters.
        names: Of its module in each layer; one name, but for stacked layers.
        shape: ``(in, out)``, of stacked layers with the layers first.
    """

    leaf: int
    names: tuple[str, ...]
    shape: tuple[int, ...]


def draw(
    params: PyTree, *, rank: int, key: Key[Array, ""], targets: Sequence[str] = KERNELS
) -> Adapters:
    r"""New adapters: ``A`` uniform in ``±1 / sqrt(in)``, ``B`` zero.

    As PEFT draws them (Kaiming's bound for a slope of ``sqrt 5``): ``var(A) = 1 / (3 in)``. The
    same key gives the same numbers to a decoder with layers apart and stacked.

    Args:
        params: Of a decoder; may be of ``jax.ShapeDtypeStruct``.
        rank: At least 1. Above the smaller side of a kernel it adds no function that is not there.
        key: Random key.
        targets: Patterns (`fnmatch`; ``*`` is any text, dots too) over the kernels' paths, with or
            without ``.kernel`` at their end: ``*.attention.query``, ``layers.3.mlp.*``.

    Returns:
        Adapters, in the kernels' dtype but at least float32.

    Raises:
        ValueError: a rank below 1, or a pattern that matches no kernel, or a part of a stack.

    >>> kernel = jax.ShapeDtypeStruct((6, 4), jnp.float32)
    >>> params = {"layers": {"0": {"mlp": {"up": {"kernel": kernel}}}}}
    >>> found = draw(params, rank=2, key=jax.random.key(0))
    >>> jax.tree.map(lambda x: x.shape, found)
    {'layers.0.mlp.up': {'a': (6, 2), 'b': (2, 4)}}

    References:
        Hu et al. (2021), https://arxiv.org/abs/2106.09685
    """
    if rank < 1:
        raise ValueError(f"rank: got {rank}, expected at least 1")
    leaves, found = jax.tree.leaves(params), {}
    for module, (leaf, names, shape) in _targeted(params, targets).items():
        *stack, width_in, width_out = shape
        dtype = wide(leaves[leaf].dtype)
        bound = width_in**-0.5
        keys = _keys(key, names)
        a = jax.vmap(
            lambda k, n=width_in, d=dtype, m=bound: jax.random.uniform(k, (n, rank), d, -m, m)
        )(keys)
        b = jnp.zeros((*stack, rank, width_out), dtype)
        found[module] = {"a": a if stack else a[0], "b": b}
    return found


def attach(policy: Policy, params: PyTree, *, alpha: Alpha) -> Policy:
    """A policy whose parameters are adapters of a frozen model.

    Args:
        policy: Of the decoder.
        params: Of the decoder, frozen. They are copied, see above: drop them to free memory.
        alpha: The scale is ``alpha / rank``, with the rank that an adapter has.

    Returns:
        A policy of `Adapters` for any of the kernels, of any rank, or of `Dropped` ones.

    Raises:
        ValueError: when it is used, adapters that do not fit the model, by their path.
    """
    leaves, structure = jax.tree.flatten(params)
    known = sites(params)
    refs = [jax.new_ref(jnp.asarray(leaf)) for leaf in leaves]

    def base() -> list[Any]:
        return [ref[...] for ref in refs]

    def whole(adapters: Any) -> PyTree:
        adapters, *dropout = adapters if isinstance(adapters, Dropped) else (adapters,)
        values = base()
        for module, place, scale in _fitting(known, adapters, alpha):
            stacked = scale.ndim > 0
            values[place.leaf] = LowRank(values[place.leaf], *_both(adapters[module]), scale)
            if dropout:
                keys = _keys(dropout[0], place.names)
                kept = jnp.broadcast_to(dropout[1], keys.shape)
                both = (keys, kept) if stacked else (keys[0], kept[0])
                values[place.leaf] = values[place.leaf]._replace(key=both[0], kept=both[1])
        return structure.unflatten(values)

    def hidden(adapters, *arguments, **named):
        return policy.hidden(whole(adapters), *arguments, **named)

    def cached(adapters, *arguments, **named):
        return policy.cached(whole(adapters), *arguments, **named)

    # Compiled, for of all that is read here only one table is used.
    table = jax.jit(lambda: policy.head(structure.unflatten(base()))[0])
    return policy._replace(hidden=hidden, cached=cached).with_table(lambda adapters: table())


def dropped(adapters: Adapters, *, rate: float | int, key: Key[Array, ""]) -> Dropped:
    """Adapters of which each sees a part of its inputs, the rest made larger by ``1 / (1 - rate)``.

    For one call, in the place of the policy's parameters; the frozen kernels see all. Nothing is
    drawn that the key does not say: a training folds the number of the update into it::

        score = lambda adapters, batch: pairs.score(dropped(adapters, rate=0.1, key=...), batch)

    Args:
        adapters: Of the policy.
        rate: Share of the inputs' entries that are dropped, at least 0 and below 1.
        key: Random key.

    Returns:
        What the policies of `attach` take for their parameters.

    Raises:
        ValueError: a rate out of its range.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate: got {rate}, expected at least 0 and below 1")
    return Dropped(adapters, key, jnp.asarray(1 - rate, jnp.float32))


def merge(params: PyTree, adapters: Adapters, *, alpha: Alpha) -> PyTree:
    r"""The model with its adapters in its kernels, ``W + s A B``: parameters of the base's policy.

    Args:
        params: Of the decoder.
        adapters: Trained ones.
        alpha: As of `attach`.

    Returns:
        Parameters like `params`; `jaxpref.models.pretrained.save` writes them. Sums are of at
        least float32, and in the kernels' dtype.

    Raises:
        ValueError: adapters that do not fit the model, by their path.

    >>> params = {"layers": {"0": {"up": {"kernel": jnp.ones((1, 2))}}}}
    >>> adapters = {"layers.0.up": {"a": jnp.array([[2.0]]), "b": jnp.array([[1.0, 0.0]])}}
    >>> merge(params, adapters, alpha=3)["layers"]["0"]["up"]["kernel"].tolist()
    [[7.0, 1.0]]
    """
    leaves, structure = jax.tree.flatten(params)
    for module, place, scale in _fitting(sites(params), adapters, alpha):
        a, b = _both(adapters[module])
        added = scale.astype(a.dtype)[..., None, None] * jnp.matmul(a, b, precision="highest")
        kernel = jnp.asarray(leaves[place.leaf])
        total = wide(kernel.dtype)
        leaves[place.leaf] = (kernel.astype(total) + added.astype(total)).astype(kernel.dtype)
    return structure.unflatten(leaves)


def sites(params: PyTree) -> dict[str, Site]:
    """The kernels of a decoder by their modules' paths.

    Args:
        params: Of a decoder; may be of ``jax.ShapeDtypeStruct``.

    Returns:
        A `Site` each: ``layers.0.mlp.up``, of stacked layers ``layers.mlp.up``.
    """
    found = {}
    for number, (keys, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0]):
        path = path_of(keys)
        if path.endswith(_END):
            module = path.removesuffix(_END)
            tail = module.removeprefix("layers.")
            layers = range(leaf.shape[0]) if len(leaf.shape) == 3 else None
            names = (module,) if layers is None else tuple(f"layers.{i}.{tail}" for i in layers)
            found[module] = Site(number, names, tuple(leaf.shape))
    return found


def scales(site: Site, rank: int, alpha: Alpha) -> Float[np.ndarray, "..."]:
    """``alpha / rank`` of a kernel, or of each layer of a stack.

    Args:
        site: The kernel.
        rank: Of its adapter.
        alpha: As of `attach`.

    Returns:
        ``[]`` or ``[layers]``.

    Raises:
        ValueError: a module without an `alpha`.
    """
    each = alpha if isinstance(alpha, Mapping) else dict.fromkeys(site.names, alpha)
    for name in site.names:
        if name not in each:
            raise ValueError(f"alpha: got none for {name}, expected one for each adapter")
    found = np.array([each[name] / rank for name in site.names], np.float64)
    return found.reshape(found.shape if len(site.shape) == 3 else ())


def _targeted(params: PyTree, targets: Sequence[str]) -> dict[str, Site]:
    known, found = sites(params), {}
    for pattern in targets:
        hits = {
            module: [fnmatchcase(n, pattern) or fnmatchcase(n + _END, pattern) for n in site.names]
            for module, site in known.items()
        }
        if not any(map(any, hits.values())):
            example = next((site.names[0] for site in known.values()), "no kernel")
            raise ValueError(
                f"targets: {pattern!r} matches no kernel, expected patterns of paths such as"
                f" {example} (embeddings and norms take no adapters)"
            )
        for module, matched in hits.items():
            if any(matched) and not all(matched):
                raise ValueError(
                    f"targets: {pattern!r} matches {sum(matched)} of the {len(matched)} stacked"
                    f" layers of {module}, expected all or none"
                )
            if all(matched):
                found[module] = known[module]
    return found


def _fitting(known: Mapping[str, Site], adapters: Any, alpha: Alpha):
    """Each adapter's path, kernel and scale, after its shapes were found right."""
    for module, both in adapters.items():
        a, b = _both(both)
        if module not in known:
            raise ValueError(f"adapters: {module} is no kernel of the model, expected one of its")
        *stack, width_in, width_out = known[module].shape
        rank = a.shape[-1]
        if a.shape != (*stack, width_in, rank) or b.shape != (*stack, rank, width_out):
            raise ValueError(
                f"adapters: {module} has a {a.shape} and b {b.shape}, expected"
                f" {(*stack, width_in, 'rank')} and {(*stack, 'rank', width_out)} by the model"
            )
        yield module, known[module], jnp.asarray(scales(known[module], rank, alpha), a.dtype)


def _both(adapter: Mapping[str, Array]) -> tuple[Array, Array]:
    return adapter["a"], adapter["b"]


def _keys(key: Key[Array, ""], names: Sequence[str]) -> Key[Array, " names"]:
    """A key for each name, whatever else there is."""
    numbers = np.array([zlib.crc32(name.encode()) for name in names], np.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers))
