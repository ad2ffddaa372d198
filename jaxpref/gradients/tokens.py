"""Which tokens of two responses entangle: inner products of the gradients of single tokens."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxpref import plain
from jaxpref.gradients import _inputs, contractions, insertion, programs
from jaxpref.gradients.planned import Planned


class TokenGram(NamedTuple):
    """Inner products of token gradients, and their log-probabilities in nats."""

    gram: Float[Array, "examples tokens examples tokens"]
    logp: Float[Array, "examples tokens"]


def token_gram(
    hidden_fn: Callable[[PyTree, PyTree], Float[Array, "tokens width"]],
    unembedding_fn: Callable[[PyTree], Float[Array, "vocab width"]],
    params: PyTree,
    examples: PyTree,
    targets: Int[Array, "examples tokens"],
) -> TokenGram:
    r"""Inner products of the gradients of all tokens of some responses, exact.

    .. math:: G_{(a,i),(b,j)} = \langle \nabla_\theta \log \pi(y^a_i | x, y^a_{<i}),
        \nabla_\theta \log \pi(y^b_j | x, y^b_{<j}) \rangle

    Summed over the tokens of two responses it is their entry in `jaxpref.gradients.gram`. The
    model is run forward once; no gradient of the size of the parameters is formed, and the logits
    of a token meet the unembedding in closed form.

    Args:
        hidden_fn: ``(params, example)`` to the states that predict the example's tokens, without
            a batch axis.
        unembedding_fn: ``params`` to the matrix that reads them, ``logits = hidden @ W.T``: one of
            the parameters, or one transposed or rounded, or an array that depends on none of them.
        params: Any pytree of floating arrays.
        examples: Pytree of arrays with a first axis; for a pair its two responses.
        targets: The predicted tokens' ids. Rows of padding are of no meaning and harm no others.

    Returns:
        `TokenGram`.

    Raises:
        ValueError: `unembedding_fn` computes more than that, or uses its parameter elsewhere in
            another way than as a table; then `jaxpref.gradients.gram` with a function that returns
            ``[tokens]`` is right, and slower. See also `jaxpref.gradients.gram`.

    >>> W = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> found = token_gram(lambda W, x: x, lambda W: W, W, jnp.ones((1, 1, 2)), jnp.array([[0]]))
    >>> found.gram.tolist()  # |h|^2 |e_y - p|^2 = 2 * 0.5
    [[[[1.0]]]]

    References:
        Yuan et al. (2024), Figure 4b, https://arxiv.org/abs/2410.13828
    """
    _inputs.require_floating(params)
    leaf, axes = _read_by(unembedding_fn, params)

    def hidden_of(params, both):
        return hidden_fn(params, both[0])

    def directions(hidden, both):
        slopes = _logit_slopes(hidden, unembedding_fn(params), both[1])
        back = contractions.product(slopes, unembedding_fn(params).astype(slopes.dtype), 1, 0)
        place = jnp.eye(len(hidden), dtype=hidden.dtype)[:, :, None]
        back = back.astype(hidden.dtype)[None]
        shape = (len(hidden), *hidden.shape)
        return jnp.broadcast_to(place, shape) * jnp.broadcast_to(back, shape)

    def head(hidden):
        slopes = jax.vmap(_logit_slopes, (0, None, 0))(hidden, unembedding_fn(params), targets)
        factors = (slopes, hidden) if axes == (0, 1) else (hidden, slopes)
        return contractions.Use(*factors, "both")

    with jax.default_matmul_precision("highest"):
        one, n = _inputs.first_of((examples, targets))
        with plain.ASKED(True):
            square = n, targets.shape[1]
            tables = frozenset() if leaf is None else frozenset({leaf})
            planned = Planned(hidden_of, params, one, square, tables=tables)
        if leaf is not None and planned.plans[leaf].rule != "shared":
            where = f"params{planned.paths[leaf]}"
            raise ValueError(f"{where}: is not only a table, expected a function of all tokens")
        further = None if leaf is None else {leaf: head}
        hidden, parts = planned.grams((examples, targets), directions, further)
        unembedding = unembedding_fn(params).astype(hidden.dtype)
        logits = contractions.product(hidden, unembedding, 2, 1)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
    total = sum(x.sum(axis=tuple(range(x.ndim - 4))) for x in parts)
    return TokenGram(jnp.asarray(total), picked[..., 0])


def _logit_slopes(
    hidden: Array, unembedding: Array, targets: Array
) -> Float[Array, "tokens vocab"]:
    """Derivatives of each token's log-probability by its logits."""
    logits = contractions.product(hidden, unembedding.astype(hidden.dtype), 1, 1)
    one_hot = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    return one_hot - jax.nn.softmax(logits)


def _read_by(unembedding_fn: Callable, params: PyTree) -> tuple[int | None, tuple[int, ...]]:
    """Which parameter a function returns, None if it reads none, and the order of its axes."""
    leaves, structure = jax.tree.flatten(params)
    program = programs.trace(lambda leaves: unembedding_fn(structure.unflatten(leaves)), leaves)
    inputs = [insertion.Parameter(i, x, axes=tuple(range(x.ndim))) for i, x in enumerate(leaves)]
    walk = insertion.Walk()
    (found,) = walk.run(*program, inputs)
    if not isinstance(found, insertion.Parameter) and not walk.sites:
        return None, (0, 1)
    if not isinstance(found, insertion.Parameter) or found.axes not in ((0, 1), (1, 0)):
        raise ValueError("unembedding_fn: computes, expected it to return one of the parameters")
    return found.leaf, found.axes
