"""The order test: halving the learning rate quarters the error of the predicted change.

For sixteen losses of pairs, and for gradient descent with momentum,
RMSprop and Adam in mid-run, on a decoder. What is predicted is the change of every log-probability
of the batch by the real update: the part that the optimizer carries along, by a directional
derivative, and the part of the gradient, by the Gram of all pairs in the optimizer's metric. If a
term were missing the error would only halve.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

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
    policy, params = decoder.functional(decoder.Decoder(config, rngs=nnx.Rngs(0), **types))
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_halving_the_learning_rate_quarters_the_error(model, pair_losses, name):
    logps, params, pairs = model
    make, decay, rate = OPTIMIZERS[name]
    of_batch = jax.vmap(logps, (None, 0))

    def value(which, logp):
        return jax.lax.switch(which, pair_losses, logp)

    def errors(row):
        """Of one loss: the error of the prediction at a learning rate and at half of it."""
        which, state = row

        def mean_loss(p):
            return value(which, of_batch(p, pairs)).mean()

        gradient = jax.grad(mean_loss)(params)
        logp = of_batch(params, pairs)
        pull = jax.grad(lambda x: value(which, x).sum())(logp)
        # Gradient descent of a steep loss would leave the region where the square rules.
        own = rate / jnp.maximum(1.0, abs(pull).max()) if decay is None else jnp.asarray(rate)
        unit = linearised(make(1.0), state, gradient, params, decay=decay)
        gram = gradients.gram(logps, params, pairs, metric=unit.metric).gram
        _, carried = gradients.directional(lambda p: of_batch(p, pairs), params, unit.carried)
        predicted = carried + diagnostics.batch_change(gram, pull)

        def error(rate):
            update, _ = make(rate).update(gradient, state, params)
            measured = of_batch(optax.apply_updates(params, update), pairs) - logp
            return jnp.linalg.norm(measured - rate * predicted), jnp.linalg.norm(measured)

        return jax.lax.map(error, jnp.stack([own, own / 2]))

    @jax.jit
    def run(params):
        def train(which):  # three updates of this very loss, so that the state is one of mid-run
            def step(carry, _):
                p, state = carry
                slope = jax.grad(lambda p: value(which, of_batch(p, pairs)).mean())(p)
                update, state = make(1e-3).update(slope, state, p)
                return (optax.apply_updates(p, update), state), None

            (_, state), _ = jax.lax.scan(step, (params, make(1.0).init(params)), None, length=3)
            return state

        which = jnp.arange(len(pair_losses))
        return jax.lax.map(lambda i: errors((i, train(i))), which)

    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes integers and floats
        error, change = run(params)
    for loss, (whole, half), (moved, _) in zip(PAIRWISE, error, change, strict=True):
        assert whole > 1e-13, loss  # above the rounding of the log-probabilities
        assert whole < 0.2 * moved, loss
        assert 3.5 < whole / half < 4.5, (loss, float(whole / half), float(whole), float(moved))
