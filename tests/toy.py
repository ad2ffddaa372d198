"""A linear-softmax policy for tests of training: a choice among few answers for each prompt."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpref.training.step import State, init_state


class Toy(NamedTuple):
    features: jax.Array  # [pairs width]
    answers: jax.Array  # [pairs 2]
    reference: jax.Array  # [pairs 2]
    index: jax.Array  # [pairs]


class Scores(NamedTuple):
    logp: jax.Array  # [pairs 2]


def score(params, batch):
    logits = batch.features @ params["kernel"] + params["bias"][None]
    return Scores(jnp.take_along_axis(jax.nn.log_softmax(logits), batch.answers, axis=1))


def dpo(scores, batch):
    log_ratio = scores.logp - batch.reference
    return -jax.nn.log_sigmoid(0.5 * (log_ratio[:, 0] - log_ratio[:, 1]))


def a_batch(pairs=8, width=3, answers=5, seed=1):
    """Features of small integers: nothing of the random generator is in the golden numbers."""
    features = (jnp.arange(pairs * width).reshape(pairs, width) * seed % 7 - 3).astype(jnp.float64)
    chosen = jnp.arange(pairs) % answers
    pair = jnp.stack([chosen, (chosen + 2) % answers], axis=1)
    return Toy(features / 3, pair, jnp.full((pairs, 2), -1.5), 100 + jnp.arange(pairs))


def a_state(optimizer, width=3, answers=5, dtype=jnp.float64) -> State:
    kernel = jnp.linspace(-1, 1, width * answers, dtype=dtype).reshape(width, answers)
    params = {"kernel": kernel, "bias": jnp.zeros(answers, dtype)}
    return init_state(params, optimizer, key=jax.random.key(7))
