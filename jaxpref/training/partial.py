r"""Training a part of the parameters: a mask, and an optimizer that moves nothing outside of it.

A mask has the structure of the parameters. A leaf of it is True or False, or an array of booleans
that broadcasts to the parameter: entries, or whole layers of a stack. Adapters need none of this:
there the base is no parameter (`jaxpref.models.lora`), and a mask of adapters is a mask like any
other::

    optimizer = only(optax.adamw(1e-5), half(params, key=key))
    optimizer = only(optax.adamw(1e-5), salient(slope(params, batch), share=0.1))
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree


def only(optimizer: optax.GradientTransformation, mask: PyTree) -> optax.GradientTransformation:
    """An optimizer that sees and moves the entries of a mask; the change of others is exactly 0.

    Gradients outside count as 0 (for a norm that is clipped, too), and so does every update there:
    of momentum, and of weight decay. A leaf of False has no slots in the optimizer's state.

    ``optax.masked`` alone hands the gradients of other leaves through as if they were updates.

    Args:
        optimizer: Any.
        mask: Of the parameters.

    Returns:
        One for the same parameters.

    Raises:
        ValueError: when it is used, a mask of another structure or of a shape that does not fit.

    >>> params = {"a": jnp.ones(2), "b": jnp.ones(1)}
    >>> mask = {"a": np.array([True, False]), "b": False}
    >>> optimizer = only(optax.sgd(0.5), mask)
    >>> update, _ = optimizer.update(params, optimizer.init(params), params)
    >>> update["a"].tolist(), abs(update["b"]).tolist()
    ([-0.5, 0.0], [0.0])
    """
    moves = jax.tree.map(lambda m: bool(np.any(m)), mask)
    rest = jax.tree.map(lambda m: not m, moves)

    def init(params: PyTree) -> optax.EmptyState:
        _check(params, mask)
        return optax.EmptyState()

    def cut(updates: PyTree, state: Any, params: PyTree | None = None) -> Any:
        del params
        return jax.tree.map(_cut, updates, mask), state

    entries = optax.GradientTransformation(init, cut)
    within = optax.masked(optimizer, moves)
    return optax.chain(entries, within, optax.masked(optax.set_to_zero(), rest), entries)


def half(params: PyTree, *, key: Key[Array, ""]) -> PyTree:
    """Half fine-tuning: in each layer a random half of each kind of module is trained.

    The kinds are attention's products, the MLP's, and norms. Of an odd number, as of the MLP's
    three, one more or one less by a coin. A bias goes with its kernel. What is in no layer, the
    embedding, the last norm and the unembedding, is trained. The authors draw anew for each round
    of fine-tuning: call it again with another key.

    Args:
        params: Of a decoder, layers apart or stacked; may be of ``jax.ShapeDtypeStruct``.
        key: Random key. The same modules are drawn for layers apart and stacked.

    Returns:
        A mask, for `only`.

    >>> leaf = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    >>> attention = {name: {"kernel": leaf} for name in ("query", "key", "value", "output")}
    >>> mask = half({"layers": {"0": {"attention": attention}}}, key=jax.random.key(0))
    >>> sum(jax.tree.leaves(mask))
    2

    References:
        Hui et al. (2024), https://arxiv.org/abs/2404.18466: the category-level choice, by its
        description; how they treat embeddings and odd numbers is our guess.
    """
    paths, structure = jax.tree.flatten_with_path(params)
    named = [(_words(path), leaf) for path, leaf in paths]
    groups: dict[tuple[str, str], set[str]] = {}
    for words, leaf in named:
        for layer in _layers(words, leaf):
            groups.setdefault((layer, _kind(words)), set()).add(_module(words))
    drawn = {group: _half_of(sorted(modules), key, group) for group, modules in groups.items()}

    def of(words: list[str], leaf: Any) -> Any:
        layers = _layers(words, leaf)
        found = [_module(words) in drawn[layer, _kind(words)] for layer in layers] or [True]
        if len(layers) < 2:
            return found[0]
        return np.array(found).reshape(-1, *(1,) * (len(leaf.shape) - 1))

    return structure.unflatten([of(words, leaf) for words, leaf in named])


def salient(gradient: PyTree, *, share: float | int) -> PyTree:
    """The entries whose gradient is largest in absolute value, of all parameters together.

    Args:
        gradient: Of a loss that says what is to be changed.
        share: Of the entries that are trained, above 0 and at most 1; ties with the last of them
            are trained too.

    Returns:
        A mask of arrays, for `only`.

    Raises:
        ValueError: a share out of its range.

    >>> salient({"a": jnp.array([3.0, -1.0]), "b": jnp.array([-2.0, 0.5])}, share=0.5)
    {'a': array([ True, False]), 'b': array([ True, False])}

    References:
        Fan et al. (2023), a threshold on the gradient, https://arxiv.org/abs/2310.12508
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}, expected more than 0 and at most 1")
    sizes = jax.tree.map(lambda g: np.abs(np.asarray(g, np.float32)), gradient)
    every = np.concatenate([x.ravel() for x in jax.tree.leaves(sizes)])
    kept = max(1, round(share * every.size))
    least = np.partition(every, every.size - kept)[every.size - kept]
    return jax.tree.map(lambda x: x >= least, sizes)


def _cut(x: Array, mask: Any) -> Array:
    if isinstance(mask, bool):
        return x if mask else jnp.zeros_like(x)
    return jnp.where(jnp.broadcast_to(jnp.asarray(mask), x.shape), x, jnp.zeros_like(x))


def _check(tree: PyTree, mask: PyTree) -> None:
    if jax.tree.structure(tree) != jax.tree.structure(mask):
        counts = len(jax.tree.leaves(mask)), len(jax.tree.leaves(tree))
        raise ValueError(
            f"mask: got {counts[0]} leaves, expected the parameters' structure of {counts[1]}"
        )
    each = zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(mask), strict=True)
    for (path, leaf), m in each:
        fits = np.ndim(m) in (0, leaf.ndim) and all(
            size in (1, full) for size, full in zip(np.shape(m), leaf.shape, strict=False)
        )
        if not fits or np.result_type(m) != np.bool_:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"mask{name}: got {np.result_type(m)}{list(np.shape(m))}, expected booleans that"
                f" fit {list(leaf.shape)}"
            )


def _words(path: tuple[Any, ...]) -> list[str]:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.removesuffix(".value").split(".")


def _layers(words: list[str], leaf: Any) -> list[str]:
    """The layers that a leaf is of: one, those of a stack, or none."""
    if words[0] != "layers":
        return []
    return [words[1]] if words[1].isdigit() else [str(i) for i in range(leaf.shape[0])]


def _module(words: list[str]) -> str:
    return ".".join(word for word in words[1:-1] if not word.isdigit())


def _kind(words: list[str]) -> str:
    module = _module(words)
    return "norm" if module.endswith("norm") else module.partition(".")[0]


def _half_of(modules: list[str], key: Key[Array, ""], group: tuple[str, str]) -> set[str]:
    """A random half of some modules."""
    number = zlib.crc32(".".join(group).encode())
    own, coin = jax.random.split(jax.random.fold_in(key, number))
    size = (len(modules) + int(jax.random.bernoulli(coin))) // 2
    order = np.asarray(jax.random.permutation(own, len(modules)))
    return {modules[i] for i in order[:size]}
