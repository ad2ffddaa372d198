"""What a training on pairs will do to any response, said before its first update."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from experiments.protocol import arms
from jaxpref import gradients
from jaxpref.logprobs import token_moves
from jaxpref.training.optimizers import DECAY, unit_optimizer
from jaxpref.training.pairset import PairSet
from jaxpref.training.step import tree_norm


class Foreseen(NamedTuple):
    """What is expected of an arm, from the gradients of its batches at the start.

    Each movement of the parameters is made when it is asked for, as large as they are.
    """

    mean: PyTree  # of gradients
    square: PyTree  # mean of their squares
    state: PyTree  # of the optimizer that is shown these gradients
    replay: PyTree
    """A movement: the sum of the optimizer's own updates, shown the gradients in their order."""
    optimizer: str
    rates: tuple[float, ...]

    @property
    def plain(self) -> PyTree:
        """A movement: gradient descent, the rates' sum along the mean gradient."""
        return jax.tree.map(lambda g: -sum(self.rates) * g, self.mean)

    @property
    def scale(self) -> PyTree:
        """The metric: what `metric` multiplies each entry of the mean gradient by."""
        return scale_of(self.optimizer, self.square, self.rates)

    @property
    def metric(self) -> PyTree:
        """A movement: `plain` in the optimizer's metric, squares of gradients at their mean."""
        return jax.tree.map(lambda d, g: -d * g, self.scale, self.mean)


def foresee(begun: arms.Begun, arm: arms.Arm) -> Foreseen:
    """One gradient for each batch of the arm, at the start: as much as the training itself."""
    course, run, params = begun.course(arm.labels), begun.run, begun.params
    rates, name = arm.rates, begun.config.optimizer
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    sums = zeros(), zeros(), unit_optimizer(name).init(params), zeros()
    share, loss = jnp.float32(1 / len(rates)), run.number(arm.loss)
    words = f"gradients at the start, seed {begun.seed}"
    for number, rate in enumerate(tqdm(rates, words, unit="batch", leave=False)):
        parts = course.parts(begun.pairs, number)
        swap, gram = course.swap(parts), run.gram(params, parts, arm.loss)
        *_, gradient = run.slope(params, parts, loss, swap, gram)
        sums = _absorb(name, sums, params, gradient, jnp.float32(rate), share)
    mean, square, state, replay = sums
    return Foreseen(mean, square, state, replay, name, rates)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _absorb(optimizer: str, sums, params, gradient, rate, share):
    """The first fields of `Foreseen` with another batch's gradient, a `share` of all."""
    mean, square, state, replay = sums

    def add(total, x, weight):
        return jax.tree.map(lambda t, v: t + weight * v, total, x)

    update, state = unit_optimizer(optimizer).update(gradient, state, params)
    squares = jax.tree.map(jnp.square, gradient)
    return add(mean, gradient, share), add(square, squares, share), state, add(replay, update, rate)


def scale_of(optimizer: str, square: PyTree, rates: Sequence[float]) -> PyTree:
    """What so many updates multiply each entry's mean gradient by, if squares were at their mean.

    Args:
        optimizer: Its name.
        square: Mean of the squared gradients.
        rates: Of the updates.
    """
    return _scale(optimizer, square, tuple(rates))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _scale(optimizer: str, square: PyTree, rates: tuple[float, ...]) -> PyTree:
    if optimizer == "sgd":
        return jax.tree.map(lambda x: jnp.full_like(x, sum(rates)), square)
    decay = DECAY[optimizer]  # Adam corrects its bias, this RMSprop does not
    bias = [1.0 if optimizer == "adam" else (1 - decay ** (n + 1)) ** 0.5
            for n in range(len(rates))]  # fmt: skip
    total = sum(rate / b for rate, b in zip(rates, bias, strict=True))
    return jax.tree.map(lambda v: total / (jnp.sqrt(v) + 1e-8), square)


def squares_of(optimizer: str, state: PyTree, updates: int) -> PyTree:
    """The optimizer's own mean of squared gradients, its bias corrected."""
    if optimizer == "sgd":
        return state
    held = state.mean_square if optimizer == "rmsprop" else state[0].nu
    weight = 1 - DECAY[optimizer] ** updates
    return jax.tree.map(lambda v: v / weight, held)


def astray(movement: PyTree, seed: int) -> PyTree:
    """A movement as long, in a direction drawn from all: the control of a forecast."""
    leaves, structure = jax.tree.flatten(movement)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    size = tree_norm(leaves) / tree_norm(drawn)
    return structure.unflatten([size.astype(x.dtype) * x for x in drawn])


def told(
    pairs: PairSet, params: PyTree, movement: PyTree, rows: np.ndarray, *, moved: bool
) -> dict[str, np.ndarray]:
    """What a movement of the parameters does to responses, ``[rows 2]`` each, nats.

    Returns:
        ``change``, to first order; ``variance``, of the logits' change, summed over tokens: half of
        it is the drag; with `moved` also ``moved``, the change of the real model moved there.
    """
    found = pairs.sweep(functools.partial(_moves, pairs, params, movement), rows)
    if not moved:
        return found
    there = jax.tree.map(jnp.add, params, movement)
    return {**found, "moved": pairs.logps(there, rows) - pairs.known[rows]}


@functools.partial(jax.jit, static_argnums=0)
def _moves(pairs: PairSet, params, movement, batch) -> dict[str, jax.Array]:
    def outputs(params):
        return pairs.hidden(params, batch).hidden, pairs.policy.unembedding(params)

    (hidden, head), (hidden_change, head_change) = gradients.directional(outputs, params, movement)
    found = pairs.targets(batch)
    each = token_moves(hidden, head, hidden_change, head_change, found.targets)
    scored = {"change": each.change, "variance": each.variance}
    return {name: jnp.where(found.is_target, x, 0).sum(axis=-1) for name, x in scored.items()}
