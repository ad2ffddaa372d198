"""The order test: halving the learning rate quarters the error of the predicted change.

For sixteen losses of pairs, and for gradient descent with momentum,
RMSprop and Adam in mid-run, on a decoder. What is predicted is the change of every log-probability
of the batch by the real update: the part that the optimizer carries along, by a directional
derivative, and the part of the gradient, by the Gram of all pairs in the optimizer's metric. If a
term were missing the error would only halve.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref import diagnostics, gradients, logprobs, losses
from jaxpref.models import decoder
from jaxpref.training.linearised import linearised
from jaxpref.training.optimizers import torch_rmsprop

PAIRS, TIME = 3, 6
PAIRWISE = [  # the rest of the catalogue differs from these in its pull only
    "cdpo", "cpo", "cpo_token_mean", "dpo", "dpo_shift", "dpop", "hinge", "ipo",
    "ipo_length_normalised", "orpo", "r_dpo", "robust_dpo", "rrhf", "simpo", "slic_hf", "sppo",
]  # fmt: skip
# Away from their kinks: the one of `slic_hf` and the reference of `dpop`, both below.
SETTINGS = {"slic_hf": {"delta": 30.0}, "sppo": {"beta": 0.05}}
OPTIMIZERS = {  # of a learning rate; decay of the squares; a rate at which the square rules
    "gradient descent with momentum": (functools.partial(optax.sgd, momentum=0.9), None, 1e-4),
    "rmsprop": (torch_rmsprop, 0.99, 1e-5),
    "adam": (functools.partial(optax.adam, eps=1e-6), 0.999, 1e-5),
}


@pytest.fixture(scope="module")
def model():
    """``logps(params, pair) -> [2]``, parameters and three pairs of a batch."""
    config = decoder.DecoderConfig(
        vocab=11, width=8, layers=1, heads=2, kv_heads=1, head_width=4, mlp_width=12
    )
    types = {"param_dtype": jnp.float64, "compute_dtype": jnp.float64}
    policy, shapes = decoder.abstract(config, **types)
    random = np.random.default_rng(0)

    def draw(path, leaf):
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return mean + 0.02 * random.standard_normal(leaf.shape)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    tokens = np.random.default_rng(7).integers(0, 11, (PAIRS, 2, TIME))
    real = np.ones(tokens.shape, bool)
    scored = real & (np.arange(TIME) >= 3)
    scored[:, 0, -1] = False  # responses of two and of three tokens

    def logps(params, pair):
        def one(response):
            return logprobs.response_scores(policy, params, *response, max_response=3)

        return jax.vmap(one)(pair).logp

    return logps, params, tuple(map(jnp.asarray, (tokens, real, scored)))


@pytest.fixture(scope="module")
def pair_losses(model):
    """Every loss of pairs as ``logp [pairs 2] -> [pairs]``, at these pairs."""
    logps, params, pairs = model
    logp = jax.jit(jax.vmap(logps, (None, 0)))(params, pairs)
    data = {
        "reference": logp + jnp.array([[0.7, -0.4], [-0.5, 0.3], [0.2, 0.9]]),
        "lengths": jnp.broadcast_to(jnp.array([2.0, 3.0]), (PAIRS, 2)),
    }

    def bound(name):
        loss = getattr(losses, name)
        read = {k: v for k, v in data.items() if k in inspect.signature(loss).parameters}
        return lambda logp: loss(logp, **read, **SETTINGS.get(name, {}))

    return [bound(name) for name in PAIRWISE]


def test_every_loss_pulls_here(model, pair_losses):
    """None is flat or at a kink, so none passes by not moving."""
    logps, params, pairs = model

    @jax.jit
    def pulls(params):
        logp = jax.vmap(logps, (None, 0))(params, pairs)
        slopes = [jax.vmap(jax.grad(lambda x, f=f: f(x).sum())) for f in pair_losses]
        return [slope(jnp.stack([logp, logp + 1e-6])) for slope in slopes]

    for name, (here, near) in zip(PAIRWISE, pulls(params), strict=True):
        assert (here != 0).any(), name
        assert abs(near - here).max() < 1e-4 * abs(here).max(), name


class Programs(NamedTuple):
    """What no optimizer changes, of all losses at once: compiled once for the three of them."""

    slope: Callable  # params -> (logp, pull, gradient of the mean loss)
    predicted: Callable  # (params, pull, linearised update) -> change
    logp: Callable  # params -> [losses pairs 2]


@pytest.fixture(scope="module")
def programs(model, pair_losses):
    logps, _, pairs = model

    def of_batch(params):
        return jax.vmap(logps, (None, 0))(params, pairs)

    def slope(row):
        which, params = row
        logp, back = jax.vjp(of_batch, params)
        pull = jax.grad(lambda x: jax.lax.switch(which, pair_losses, x).sum())(logp)
        return logp, pull, back(pull / len(pull))[0]

    def predicted(row):
        params, pull, unit = row
        gram = gradients.gram(logps, params, pairs, metric=unit.metric).gram
        carried = gradients.directional(of_batch, params, unit.carried)[1]
        return carried + diagnostics.batch_change(gram, pull)

    which = jnp.arange(len(pair_losses))
    return Programs(
        jax.jit(lambda params: jax.lax.map(slope, (which, params))),
        jax.jit(lambda *rows: jax.lax.map(predicted, rows)),
        jax.jit(lambda params: jax.lax.map(of_batch, params)),
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_halving_the_learning_rate_quarters_the_error(model, programs, name):
    make, decay, rate = OPTIMIZERS[name]
    params = jax.tree.map(lambda x: np.stack([x] * len(PAIRWISE)), model[1])

    @jax.jit
    @jax.vmap
    def step(rate, params, state, gradient):
        update, state = make(rate).update(gradient, state, params)
        return optax.apply_updates(params, update), state

    @jax.jit
    @jax.vmap
    def linear(params, state, gradient):
        return linearised(make(1.0), state, gradient, params, decay=decay)

    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes integers and floats
        # Three updates of each very loss, so that its state is one of mid-run.
        moving, state = params, jax.jit(jax.vmap(make(1.0).init))(params)
        for _ in range(3):
            *_, gradient = programs.slope(moving)
            moving, state = step(np.full(len(PAIRWISE), 1e-3), moving, state, gradient)
        logp, pull, gradient = programs.slope(params)
        predicted = programs.predicted(params, pull, linear(params, state, gradient))
        # Gradient descent of a steep loss would leave the region where the square rules.
        steep = np.maximum(1.0, np.abs(pull).max(axis=(1, 2))) if decay is None else 1.0
        found = []
        for part in (1.0, 0.5):
            rates = np.broadcast_to(part * rate / steep, len(PAIRWISE))
            measured = programs.logp(step(rates, params, state, gradient)[0]) - logp
            error = measured - rates[:, None, None] * predicted
            found += [np.sqrt(np.square(x).sum(axis=(1, 2))) for x in (error, measured)]
    for loss, whole, moved, half, _ in zip(PAIRWISE, *found, strict=True):
        assert whole > 1e-13, loss  # above the rounding of the log-probabilities
        assert whole < 0.2 * moved, loss
        assert 3.5 < whole / half < 4.5, (loss, float(whole / half), float(whole), float(moved))
