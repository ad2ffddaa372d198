"""Losses of the catalogue called alike, and one training step for all of them.

What these losses read of a policy is its log-probabilities, so one compiled program serves all: the
loss is a number that picks a pull, which is tiny, and one backward pass carries it to the
parameters.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxpref import losses
from jaxpref.data.batches import Batch
from jaxpref.logprobs import Scores
from jaxpref.losses import __main__ as catalogue

Loss = Callable[[Scores, Any], Array]  # (scores, batch) -> [pairs], as `make_step` takes it

EXCLUDED = {  # of the catalogue, and why
    "confpo": "reads single tokens",
    "dpo_kernels": "reads kernels of embeddings",
    "dpo_kernels_linear": "reads kernels of embeddings",
    "fpo": "reads sparse features of hidden states",
    "kldo_moving_average": "reads a statistic of the updates before; of its own batch it is kldo",
    "sampo": "reads single tokens",
    "sparsepo": "reads single tokens",
    "tdpo1": "reads divergences of single tokens",
    "tdpo2": "reads divergences of single tokens",
    "tis_dpo": "reads single tokens",
    "tis_dpo_with_kl": "reads single tokens",
}
SIDE = {"sft": 0, "sft_token_mean": 0, "poft": 0, "dco": 0, "npo": 1}  # the one response they read
OF_A_BATCH = ("kldo",)  # all responses on one axis


def _of_both(*values: Any) -> Callable[[Scores, Array], Array]:
    """A constant of the chosen and of the rejected response."""
    return lambda s, reference: jnp.broadcast_to(jnp.array(values), s.logp.shape)


def _delta(s: Scores, reference: Array) -> Array:
    nothing = losses.RunningMean(jnp.zeros((), s.logp.dtype), jnp.zeros((), s.logp.dtype))
    state = losses.bco_running_mean(nothing, s.logp.reshape(-1), reference.reshape(-1))
    return jnp.asarray(state.mean)


INPUTS: dict[str, Callable[[Scores, Array], Array]] = {  # by the names of the losses' arguments
    "logp": lambda s, reference: s.logp,
    "reference": lambda s, reference: reference,
    "lengths": lambda s, reference: s.lengths,
    "desirable": _of_both(True, False),
    "rewards": _of_both(1.0, 0.0),
    "win_probability": _of_both(1.0, 0.0),
    # Of the batch's own responses, where the paper takes another prompt's.
    "kl_baseline": lambda s, reference: losses.kto_baseline(
        s.logp.reshape(-1), reference.reshape(-1)
    ),
    "delta": _delta,
    # Geometric means of each response's tokens, where the paper takes all tokens of the batch.
    "probability": lambda s, reference: jnp.exp(s.logp / s.lengths).mean(axis=0),
    # The reference is the one aligned model.
    "aligned": lambda s, reference: (reference / s.lengths)[..., None],
}


def _bound(name: str, loss: Callable) -> Loss:
    read = inspect.signature(loss).parameters.values()
    names = [p.name for p in read if p.kind is not p.KEYWORD_ONLY]

    def of_pairs(scores: Scores, batch: Any) -> Array:
        data = [INPUTS[each](scores, batch.reference) for each in names]
        if name in SIDE:
            data = [x[:, SIDE[name]] for x in data]
        if name in OF_A_BATCH:
            data = [x.reshape(-1) for x in data]
        value = loss(*data)
        if value.ndim == 0:
            return jnp.broadcast_to(value, scores.logp.shape[:1])
        return value.mean(axis=-1) if value.ndim == 2 else value

    return of_pairs


LOSSES: dict[str, Loss] = {  # hyperparameters are the catalogue's defaults
    name: _bound(name, loss) for name, loss in catalogue.catalogue().items() if name not in EXCLUDED
}


def family(name: str) -> str:
    """The file of the catalogue that a loss is in."""
    return getattr(losses, name).__module__.rpartition(".")[2]


def pull_of(some: Mapping[str, Loss], index: Any, scores: Scores, batch: Any) -> Array:
    """``[-d_w, d_l]`` of every pair, ``[pairs 2]``, by the loss of this number."""

    def branch(loss: Loss) -> Callable[[Array], Array]:
        return jax.grad(lambda logp: loss(scores._replace(logp=logp), batch).sum())

    return jax.lax.switch(index, [branch(loss) for loss in some.values()], scores.logp)


@functools.partial(jax.jit, static_argnums=0)
def pull_at(name: str, logp: Array, reference: Array, lengths: Array) -> Array:
    """Pulls ``[pairs 2]`` of one loss at these log-probabilities, of one batch."""
    loss, batch = LOSSES[name], batch_of(reference)
    return jax.grad(lambda x: loss(Scores(x, lengths), batch).sum())(logp)


def batch_of(reference: Array) -> Batch:
    """All that losses read of a batch."""
    nothing: Any = None
    return Batch(nothing, nothing, nothing, reference, nothing)


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
