"""Losses of the catalogue called alike, and one training step for all of them.

What these losses read of a policy is its log-probabilities, so one compiled program serves all: the
loss is a number that picks a pull, which is tiny, and one backward pass carries it to the
parameters.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxpref import losses
from jaxpref.logprobs import Scores
from jaxpref.training.objectives import NAMES, batch_of, objective, pull
from jaxpref.training.objectives import Objective as Loss

LOSSES = {name: objective(name) for name in NAMES}  # by the catalogue's own hyperparameters


def family(name: str) -> str:
    """The file of the catalogue that a loss is in."""
    return getattr(losses, name).__module__.rpartition(".")[2]


def pull_of(some: Mapping[str, Loss], index: Any, scores: Scores, batch: Any) -> Array:
    """The pull ``[pairs 2]`` of the loss of this number."""
    branches = [functools.partial(pull, loss) for loss in some.values()]
    return jax.lax.switch(index, branches, scores, batch)


@functools.partial(jax.jit, static_argnums=0)
def pull_at(name: str, logp: Array, reference: Array, lengths: Array) -> Array:
    """Pulls ``[pairs 2]`` of one loss at these log-probabilities, of one batch."""
    return pull(LOSSES[name], Scores(logp, lengths), batch_of(reference))


def make_step(
    score: Callable[[Any, Any], Scores],
    some: Mapping[str, Loss],
    optimizer: optax.GradientTransformation,
) -> Any:
    """One program for all these losses, whose pulls it divides by a scale.

    Returns:
        ``(params, state, batch, loss's number, scale, rate, is the first) -> params, state``. It
        uses up parameters and state; the optimizer's learning rate is to be 1.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch, index, scale, rate, first):
        scores: Scores
        scores, back = jax.vjp(lambda p: score(p, batch), params)
        # At the start the policy is its own reference, and log-ratios are exactly zero.
        logp = jnp.where(first, jnp.asarray(batch.reference, scores.logp.dtype), scores.logp)
        pull = pull_of(some, index, scores._replace(logp=logp), batch)
        pull = (pull / scale / len(pull)).astype(logp.dtype)
        (gradient,) = back(Scores(pull, jnp.zeros_like(scores.lengths)))
        update, state = optimizer.update(gradient, state, params)
        return jax.tree.map(lambda p, u: p + rate.astype(u.dtype) * u, params, update), state

    return step
