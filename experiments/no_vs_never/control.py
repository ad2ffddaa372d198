"""The learning rate at which a control gains the whole model's margin, found without a model."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.training import optimizers


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def margins(loss: Callable, updates: int, decay: float, hidden, rates) -> jax.Array:
    """Margin ``[rates]``, nats, that a control has gained at its end, at each learning rate.

    A loss of the margin has no gradient in other logits than the two answers', and equal and
    opposite ones in those: two rows that begin at zero tell all there is to know of the margin.
    """

    def gained(rows):
        return (rows[0] - rows[1]) @ hidden

    def value(rows):
        logp = jnp.stack([gained(rows), jnp.zeros((), hidden.dtype)])
        return loss(logp, jnp.zeros_like(logp))

    def train(rate):
        optimizer = optimizers.torch_rmsprop(rate, decay=decay)

        def update(carry, _):
            rows, state = carry
            change, state = optimizer.update(jax.grad(value)(rows), state)
            return (rows + change, state), None

        rows = jnp.zeros((2, len(hidden)), hidden.dtype)
        (rows, _), _ = jax.lax.scan(update, (rows, optimizer.init(rows)), length=updates)
        return gained(rows)

    return jax.vmap(train)(rates)


def matched_rate(loss: Callable, updates: int, decay: float, hidden, wanted: float) -> float:
    """The lowest learning rate at which a control gains this margin; the nearest if none does.

    The first update gains ``2 sum|h| rate / sqrt(1 - decay)``, so the rate is below the one at
    which this is all, unless the margin is beyond what the loss asks for. Between the ends the
    margin need not grow: three rounds look at 64 rates each, and narrow in on the first crossing.
    No rate gains a margin of zero or less; the nearest is 0.
    """
    if not wanted > 0:
        return 0.0
    at_once = wanted * (1 - decay) ** 0.5 / (2 * float(jnp.abs(hidden).sum()))
    low, high, rates, found = 1e-4 * at_once, 10 * at_once, np.zeros(1), np.zeros(1)
    for _ in range(3):
        rates = np.geomspace(low, high, 64)
        tried = jnp.asarray(rates, hidden.dtype)
        found = np.asarray(margins(loss, updates, decay, hidden, tried))
        over = np.flatnonzero((found[:-1] < wanted) & (found[1:] >= wanted))
        if not over.size:
            break
        low, high = rates[over[0] : over[0] + 2]
    return float(rates[np.abs(found - wanted).argmin()])
