"""The losses of the catalogue by name, all of one form: what a trainer wants of them.

What a loss reads besides log-probabilities is made of the batch itself (`INPUTS`). A loss of single
responses sees the chosen ones as desirable and the rejected ones as not, and the mean of the two is
the pair's; a few read one response of a pair alone.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref import losses
from jaxpref.data.batches import Batch
from jaxpref.logprobs import Scores
from jaxpref.losses import __main__ as catalogue

Objective = Callable[[Scores, Any], Float[Array, " pairs"]]
"""``(scores, batch) -> [pairs]``, as `jaxpref.training.step.make_step` takes it."""

EXCLUDED = {  # of the catalogue, and what it does
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
_SIDE = {"sft": 0, "sft_token_mean": 0, "poft": 0, "dco": 0, "npo": 1}  # the one response they read
_OF_A_BATCH = ("kldo",)  # all responses on one axis


def _of_both(*values: Any) -> Callable[[Scores, Array], Array]:
    """A constant of the chosen and of the rejected response."""
    return lambda s, reference: jnp.broadcast_to(jnp.array(values), s.logp.shape)


def _delta(s: Scores, reference: Array) -> Array:
    nothing = losses.RunningMean(jnp.zeros((), s.logp.dtype), jnp.zeros((), s.logp.dtype))
    state = losses.bco_running_mean(nothing, s.logp.reshape(-1), reference.reshape(-1))
    return jnp.asarray(state.mean)


INPUTS: dict[str, Callable[[Scores, Any], Array]] = {  # by the names of the losses' arguments
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


NAMES = tuple(name for name in catalogue.catalogue() if name not in EXCLUDED)
"""Of all losses that `objective` knows, in alphabetic order."""


def objective(name: str, **hyperparameters: Any) -> Objective:
    """A loss of the catalogue as a function of pairs' scores and their batch.

    Args:
        name: One of `NAMES`.
        **hyperparameters: Its keyword arguments; what is left out has the catalogue's default.

    Returns:
        ``(scores, batch) -> [pairs]``, nats; of the batch it reads ``reference``. A loss that is
        one number of the whole batch is that number for each pair.

    Raises:
        ValueError: no loss of that name, one that reads more than log-probabilities of whole
            responses, or a hyperparameter that it does not have.

    >>> loss = objective("dpo", beta=0.5)
    >>> scores = Scores(jnp.array([[-3.0, -5.0]]), jnp.ones((1, 2)))
    >>> batch = Batch(None, None, None, jnp.array([[-4.0, -4.0]]), None)
    >>> loss(scores, batch).round(4).tolist()
    [0.3133]

    Source: the catalogue.
    """
    if name in EXCLUDED:
        why = f"which {EXCLUDED[name]}"
        raise ValueError(f"loss: got {name}, {why}; expected one of whole responses")
    if name not in NAMES:
        raise ValueError(f"loss: got {name}, expected a name of the catalogue")
    read = inspect.signature(getattr(losses, name)).parameters.values()
    own = [p.name for p in read if p.kind is p.KEYWORD_ONLY]
    if unknown := [each for each in hyperparameters if each not in own]:
        expected = f"some of {', '.join(own)}" if own else "none"
        raise ValueError(f"{name}: got {unknown[0]}, expected {expected}")
    names = [p.name for p in read if p.kind is not p.KEYWORD_ONLY]
    loss = functools.partial(getattr(losses, name), **hyperparameters)

    def of_pairs(scores: Scores, batch: Batch) -> Array:
        data = [INPUTS[each](scores, batch.reference) for each in names]
        if name in _SIDE:
            data = [x[:, _SIDE[name]] for x in data]
        if name in _OF_A_BATCH:
            data = [x.reshape(-1) for x in data]
        value = loss(*data)
        if value.ndim == 0:
            return jnp.broadcast_to(value, scores.logp.shape[:1])
        return value.mean(axis=-1) if value.ndim == 2 else value

    return of_pairs


def batch_of(reference: Float[Array, "pairs 2"]) -> Batch:
    """All that losses read of a batch, for scores that are known without one.

    Args:
        reference: Log-probabilities under the reference, nats.

    >>> batch_of(jnp.array([[-4.0, -4.0]])).reference.tolist()
    [[-4.0, -4.0]]

    Source: the definition.
    """
    nothing: Any = None
    return Batch(nothing, nothing, nothing, reference, nothing)


def pull(loss: Objective, scores: Scores, batch: Any) -> Float[Array, "pairs 2"]:
    """What a loss does to each response of a batch: ``[-d_w, d_l]``, its slope in `logp`.

    Args:
        loss: Of `objective`, or like it.
        scores: Of ``[pairs 2]``.
        batch: As the loss reads it.

    Returns:
        Slopes of the sum over pairs; divide by their number for those of the mean.

    >>> scores = Scores(jnp.array([[-3.0, -5.0]]), jnp.ones((1, 2)))
    >>> pull(objective("sft"), scores, Batch(None, None, None, None, None)).tolist()
    [[-1.0, 0.0]]

    Source: the definition.
    """
    return jax.grad(lambda logp: loss(scores._replace(logp=logp), batch).sum())(scores.logp)
