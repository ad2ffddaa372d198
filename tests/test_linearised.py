"""`jaxpref.training.linearised`: the update as a linear function of the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref import gradients, logprobs
from jaxpref.models import decoder
from jaxpref.training.linearised import linearised
from jaxpref.training.optimizers import torch_rmsprop

OPTIMIZERS = {
    "sgd": (optax.sgd(0.1), None),
    "momentum": (optax.sgd(0.1, momentum=0.9), None),
    "nesterov": (optax.sgd(0.1, momentum=0.9, nesterov=True), None),
    "adam": (optax.adam(1e-2), 0.999),
    "adamw": (optax.adamw(1e-2, b2=0.95, weight_decay=0.1), 0.95),
    "rmsprop": (optax.rmsprop(1e-2), 0.9),
    "rmsprop of torch": (torch_rmsprop(1e-2), 0.99),
    "injected": (optax.inject_hyperparams(optax.adam)(1e-2), 0.999),
}


pytestmark = pytest.mark.usefixtures("as_optax_needs_it")


@pytest.fixture
def trained():
    """Parameters and three gradients, one of them with a zero."""
    draw = np.random.default_rng(4)
    params, *slopes = ({"w": draw.normal(size=(3, 2))} for _ in range(4))
    slopes[2]["w"][1, 1] = 0.0
    params, *slopes = jax.tree.map(jnp.asarray, (params, *slopes))
    return params, slopes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_update_is_carried_less_metric_times_gradient(name, trained):
    optimizer, decay = OPTIMIZERS[name]
    params, slopes = trained
    state = optimizer.init(params)
    for gradient in slopes:
        found = linearised(optimizer, state, gradient, params, decay=decay)
        update, state = optimizer.update(gradient, state, params)
        expected = found.carried["w"] - found.metric["w"] * gradient["w"]
        np.testing.assert_allclose(expected, update["w"], rtol=1e-9)
        assert (found.metric["w"] > 0).all()


def test_adam_by_hand(trained):
    params, (first, second, _) = trained
    optimizer = optax.adam(1e-2, b1=0.8, b2=0.9, eps=1e-3)
    _, state = optimizer.update(first, optimizer.init(params), params)
    found = linearised(optimizer, state, second, params, decay=0.9)
    g, h = first["w"], second["w"]
    nu = (0.9 * 0.1 * g**2 + 0.1 * h**2) / (1 - 0.9**2)
    step = 1e-2 / (1 - 0.8**2) / (jnp.sqrt(nu) + 1e-3)
    np.testing.assert_allclose(found.metric["w"], 0.2 * step, rtol=1e-9)
    np.testing.assert_allclose(found.carried["w"], -0.8 * 0.2 * g * step, rtol=1e-9)


RATE, EPS = 1e-2, 1e-3
SLOPES_AT_ZERO = {  # optimizer, decay, the slope of an entry whose gradients were all zero, after 3
    "sgd": (optax.sgd(RATE), None, RATE),
    "momentum": (optax.sgd(RATE, momentum=0.9), None, RATE),
    "adam": (optax.adam(RATE, eps=EPS), 0.999, RATE * 0.1 / (1 - 0.9**4) / EPS),
    "adam, eps under the root": (
        optax.adam(RATE, eps=EPS, eps_root=4.0), 0.999, RATE * 0.1 / (1 - 0.9**4) / (2 + EPS)
    ),
    "adamw": (
        optax.adamw(RATE, b1=0.5, eps=EPS, weight_decay=0.1), 0.999, RATE * 0.5 / (1 - 0.5**4) / EPS
    ),
    "nadam": (
        optax.nadam(RATE, b1=0.5, eps=EPS), 0.999,
        RATE * (0.5 * 0.5 / (1 - 0.5**5) + 0.5 / (1 - 0.5**4)) / EPS,
    ),
    "rmsprop": (optax.rmsprop(RATE, eps=4.0), 0.9, RATE / 2),
    "rmsprop, eps beside the root": (
        optax.rmsprop(RATE, eps=EPS, eps_in_sqrt=False), 0.9, RATE / EPS
    ),
    "rmsprop with momentum": (
        optax.rmsprop(RATE, eps=EPS, eps_in_sqrt=False, momentum=0.9), 0.9, RATE / EPS
    ),
    "rmsprop, corrected": (
        optax.rmsprop(RATE, eps=EPS, eps_in_sqrt=False, bias_correction=True), 0.9, RATE / EPS
    ),
    "rmsprop of torch": (torch_rmsprop(RATE, eps=EPS), 0.99, RATE / EPS),
    "injected": (optax.inject_hyperparams(torch_rmsprop)(RATE, eps=EPS), 0.99, RATE / EPS),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("name", SLOPES_AT_ZERO)
def test_an_untouched_parameter_has_the_slope_at_zero(name, dtype):
    """As learned positions beyond the texts have, and the rows of words that no text has."""
    optimizer, decay, slope = SLOPES_AT_ZERO[name]
    params = jnp.array([0.3, -2.0], dtype)
    gradient, state = jnp.array([0.0, 0.5], dtype), optimizer.init(params)
    for _ in range(3):
        _, state = optimizer.update(gradient, state, params)
    plain = linearised(optimizer, state, gradient, params, decay=decay)  # and checks itself
    rtol = 1e-9 if dtype == jnp.float64 else 1e-5
    np.testing.assert_allclose(plain.metric[0], slope, rtol=rtol)
    update, _ = optimizer.update(gradient, state, params)
    np.testing.assert_allclose(plain.carried - plain.metric * gradient, update, rtol=rtol)
    jitted = jax.jit(lambda s, g, p: linearised(optimizer, s, g, p, decay=decay))
    for one, other in zip(plain, jitted(state, gradient, params), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol)
    if dtype == jnp.float64:  # the definition: what a small gradient adds
        nudge = jnp.array([1e-9, 0.0], dtype)
        moved = optimizer.update(gradient + nudge, state, params)[0] - update
        np.testing.assert_allclose(-moved[0] / nudge[0], slope, rtol=1e-4)


def test_a_model_with_untouched_rows_has_a_metric():
    """As GPT-2 and Pythia have: positions beyond the text, unembeddings of words it lacks."""
    config = decoder.DecoderConfig(
        vocab=9, width=4, layers=1, heads=1, kv_heads=1, head_width=4, mlp_width=4, tied=False,
        positions="learned", max_positions=12,
    )  # fmt: skip
    types = {"param_dtype": jnp.float64, "compute_dtype": jnp.float64}
    policy, shapes = decoder.abstract(config, **types)
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(draw.normal(0.5, 0.5, x.shape)), shapes)
    tokens = jnp.array([[3, 5, 3, 8], [3, 5, 2, 8]])

    def logp(params, tokens):
        scored = jnp.arange(4) >= 2
        return logprobs.response_scores(policy, params, tokens, tokens >= 0, scored).logp

    optimizer = optax.adam(1.0)

    @jax.jit
    def run(params):
        of_both = lambda p: jax.vmap(logp, (None, 0))(p, tokens)  # noqa: E731
        gradient = jax.grad(lambda p: -of_both(p).sum())(params)
        state = optimizer.init(params)
        found = linearised(optimizer, state, gradient, params, decay=0.999)
        update, _ = optimizer.update(gradient, state, params)
        gram = gradients.gram(logp, params, tokens, metric=found.metric).gram
        change = gradients.directional(of_both, params, update)[1]
        return found, gradient, gram.sum(axis=1), change

    found, gradient, by_gram, change = run(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    untouched = np.asarray(gradient["positions"][...] == 0).all(axis=1)
    assert untouched.tolist() == [row >= 3 for row in range(12)]
    # Adam's first step: 1 - b1 of the gradient, which its correction undoes.
    np.testing.assert_allclose(found.metric["positions"][...][untouched], 1 / 1e-8, rtol=1e-6)
    np.testing.assert_allclose(by_gram, change, rtol=1e-9)


def test_errors_name_what_is_wrong(trained):
    params, (gradient, *_) = trained
    adam = optax.adam(1e-2)
    with pytest.raises(ValueError, match="decay: got None, expected that of ScaleByAdamState"):
        linearised(adam, adam.init(params), gradient, params)
    divides_by_zero = torch_rmsprop(1e-2, eps=0.0)
    zero = {"w": gradient["w"].at[0, 0].set(0.0)}
    with pytest.raises(ValueError, match="optimizer: got an update that is not finite"):
        linearised(divides_by_zero, divides_by_zero.init(params), zero, params, decay=0.99)
    for optimizer in (
        optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
        optax.lion(1e-2),
        optax.adagrad(1e-2),
    ):
        with pytest.raises(ValueError, match="optimizer: its update is not"):
            linearised(optimizer, optimizer.init(params), gradient, params)
