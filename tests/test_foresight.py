"""`experiments.protocol.foresight` on a tiny model, against plain autodiff and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_protocol import begun as begun
from test_protocol import config as config
from test_protocol import made as made

from experiments.protocol import arms, foresight
from jaxpref import losses
from jaxpref.training.optimizers import unit_optimizer
from jaxpref.training.pairset import PairSet

pytestmark = pytest.mark.usefixtures("as_optax_needs_it")


@pytest.fixture(scope="module")
def arm(config):
    return arms.Arm("dpo", 4, config.rate, warmup=2)


@pytest.fixture(scope="module")
def seen(begun, arm):
    return foresight.foresee(begun, arm)


@pytest.fixture(scope="module")
def gradients(begun, arm):
    """Of each batch at the start, by plain autodiff."""
    course = begun.course("given")
    whole = PairSet.of(begun.pairs.policy, begun.pairs.pairs).with_reference(begun.pairs.known)

    @jax.jit
    def slope(params, batch):
        return jax.grad(
            lambda p: losses.dpo(whole.score(p, batch).logp, batch.reference, beta=0.1).mean()
        )(params)

    return [slope(begun.params, whole.rows(course.index(n))) for n in range(arm.updates)]


def close(found, expected, rtol=2e-3):
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(jnp.abs(y).max()))


def test_movements_are_those_of_the_definitions(begun, arm, seen, gradients):
    rates = arm.rates
    assert rates[0] < rates[1] < rates[2] == rates[3] == arm.rate
    mean = jax.tree.map(lambda *g: sum(g) / len(g), *gradients)
    square = jax.tree.map(lambda *g: sum(x * x for x in g) / len(g), *gradients)
    close(seen.plain, jax.tree.map(lambda g: -sum(rates) * g, mean))
    metric = jax.tree.map(lambda g, v: -sum(rates) * g / (jnp.sqrt(v) + 1e-8), mean, square)
    close(seen.metric, metric, rtol=1e-2)
    optimizer, total = optax.adam(1.0), jax.tree.map(jnp.zeros_like, begun.params)
    state = optimizer.init(begun.params)
    for rate, gradient in zip(rates, gradients, strict=True):
        update, state = optimizer.update(gradient, state)
        total = jax.tree.map(lambda t, u, rate=rate: t + rate * u, total, update)
    # Where a gradient is rounding, Adam's update is the rounding's sign.
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (seen.replay, total)]
    assert np.corrcoef(*flat)[0, 1] > 0.999


def test_rmsprop_grows_its_steps_and_descent_has_none():
    square, rates = {"a": jnp.array([4.0, 1.0])}, (1.0, 2.0)
    found = foresight.scale_of("rmsprop", square, rates)["a"]
    expected = (1 / 0.01**0.5 + 2 / (1 - 0.99**2) ** 0.5) / np.array([2.0, 1.0])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(foresight.scale_of("sgd", square, rates)["a"], [3.0, 3.0])
    np.testing.assert_allclose(foresight.scale_of("adam", square, rates)["a"], [1.5, 3.0])


def test_a_movement_astray_is_as_long_and_goes_elsewhere(seen):
    found = [foresight.astray(seen.metric, seed) for seed in (0, 0, 1)]
    flat = [
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (seen.metric, *found)
    ]
    np.testing.assert_allclose(
        [np.linalg.norm(x) for x in flat], np.linalg.norm(flat[0]), rtol=1e-4
    )
    np.testing.assert_array_equal(flat[1], flat[2])
    for x, y in ((0, 1), (0, 3), (1, 3)):
        assert abs(np.corrcoef(flat[x], flat[y])[0, 1]) < 0.1


@pytest.mark.parametrize("name", ["adam", "rmsprop", "sgd"])
def test_squares_are_the_optimizer_s_without_bias(name):
    """Of equal gradients, their square."""
    optimizer = unit_optimizer(name)
    gradient = {"a": jnp.array([2.0, -3.0])}
    state = optimizer.init(gradient)
    for _ in range(3):
        _, state = optimizer.update(gradient, state, gradient)
    if name != "sgd":
        found = foresight.squares_of(name, state, 3)["a"]
        np.testing.assert_allclose(found, [4.0, 9.0], rtol=1e-5)
    else:
        assert foresight.squares_of(name, state, 3) is state


def test_what_is_told_is_what_the_model_does(begun, seen):
    """First order and drag against the model moved a little, and the moved model itself."""
    rows = begun.parts.unseen
    told = foresight.told(begun.pairs, begun.params, seen.metric, rows, moved=True)

    def at(scale):
        moved = jax.tree.map(lambda p, m: p + scale * m, begun.params, seen.metric)
        return begun.pairs.logps(moved, rows)

    np.testing.assert_allclose(told["moved"], at(1.0) - begun.pairs.known[rows], atol=1e-4)
    slope = (at(0.05) - at(-0.05)) / 0.1
    assert np.abs(slope).max() > 0.05
    np.testing.assert_allclose(told["change"], slope, atol=0.02 * np.abs(slope).max())
    # The variance of the logits' change under the softmax, from all logits.
    batch = begun.pairs.rows(rows)

    def logits(params):
        states = begun.pairs.hidden(params, batch).hidden
        return states @ begun.pairs.policy.unembedding(params).T

    before, change = jax.jit(lambda p, m: jax.jvp(logits, (p,), (m,)))(begun.params, seen.metric)
    share = jax.nn.softmax(before)
    mean = (share * change).sum(axis=-1, keepdims=True)
    each = (share * (change - mean) ** 2).sum(axis=-1)
    expected = (each * begun.pairs.targets(batch).is_target).sum(axis=-1)
    np.testing.assert_allclose(told["variance"], expected, rtol=1e-3, atol=1e-5)
    assert (told["variance"] > 0).all()
