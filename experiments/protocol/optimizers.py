"""Optimizers at learning rate 1, and a supervised phase."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree
from tqdm import tqdm

from jaxpref.data import batches
from jaxpref.training.optimizers import torch_rmsprop
from jaxpref.training.pairset import PairSet
from jaxpref.training.step import init_state, make_step


def supervise(
    pairs: PairSet,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    batch: int,
    seed: int,
    among: Array | np.ndarray | None = None,
) -> PyTree:
    """Supervised updates on the chosen responses, mean nats a response.

    Of all pairs, or of those `among`.
    """
    if steps == 0:
        return params

    def loss(scores, _):
        return -scores.logp[:, 0]

    step = make_step(pairs.score, loss, optimizer)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, key=jax.random.key(seed))
    some = np.arange(len(pairs)) if among is None else np.asarray(among)
    bar = tqdm(range(steps), "supervised phase", unit="update", leave=False)
    for number in bar:
        rows = some[batches.order(len(some), batch, seed, number)]
        state, metrics, _ = step(state, pairs.rows(rows))
        bar.set_postfix(loss=f"{float(metrics['loss']):.2f}")
    return state.params


Optimizer = Literal["sgd", "rmsprop", "adam"]

DECAY = {"sgd": None, "rmsprop": 0.99, "adam": 0.999}  # of the running mean of squares


def unit_optimizer(name: str) -> optax.GradientTransformation:
    """The optimizer at learning rate 1: its update scales with the learning rate."""
    if name == "adam":
        return optax.adam(1.0, b2=DECAY["adam"])
    return optax.sgd(1.0) if name == "sgd" else torch_rmsprop(1.0, decay=DECAY["rmsprop"])


@functools.partial(jax.jit, static_argnames="name", donate_argnames=("params", "state"))
def apply_update(name: str, params: PyTree, state: PyTree, gradient: PyTree, rate: Any) -> Any:
    """Parameters and optimizer state after one update; the old ones are used up."""
    update, state = unit_optimizer(name).update(gradient, state, params)
    return jax.tree.map(lambda p, u: p + jnp.asarray(rate, u.dtype) * u, params, update), state
