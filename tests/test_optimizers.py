"""torch-style RMSprop against the numbers of the formula worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jaxpref.training.optimizers import torch_rmsprop, unit_optimizer


def updates(optimizer, gradients, params):
    state, out = optimizer.init(params), []
    for gradient in gradients:
        update, state = optimizer.update(gradient, state, params)
        out.append(update)
    return out


def test_first_update_is_ten_learning_rates_unless_the_gradient_is_near_eps():
    # sqrt(v) = |g| / 10, so the update is g / (|g| / 10 + 1e-8): at 1e-2, 10 / (1 + 1e-5); at 1e-7,
    # 1e-7 / 2e-8; and nothing at zero.
    gradient = jnp.array([1e-2, -1e-2, 1e-7, -1e-7, 0.0])
    (update,) = updates(torch_rmsprop(1e-6), [gradient], jnp.zeros(5))
    by_hand = np.array([-10 / (1 + 1e-5), 10 / (1 + 1e-5), -5.0, 5.0, 0.0])
    np.testing.assert_allclose(update / 1e-6, by_hand, rtol=1e-12)  # float64


def test_constant_gradient_approaches_one_learning_rate():
    sizes = [-float(u) for u in updates(torch_rmsprop(1.0), [jnp.array(1.0)] * 100, jnp.array(0.0))]
    by_hand = {2: 7.09, 5: 4.52, 12: 2.97, 16: 2.59, 100: 1.26}  # 1 / sqrt(1 - 0.99 ** t)
    assert {t: round(sizes[t - 1], 2) for t in by_hand} == by_hand


def naive(params, gradients, learning_rate, decay, eps):
    """The update of torch, a number at a time."""
    params, v = np.array(params), np.zeros(len(params))
    for gradient in np.asarray(gradients):
        for i, g in enumerate(gradient):
            v[i] = decay * v[i] + (1 - decay) * g**2
            params[i] -= learning_rate * g / (v[i] ** 0.5 + eps)
    return params


@pytest.mark.parametrize(
    ("decay", "eps"), [(0.99, 1e-8), (0.9, 1e-2), (0.0, 1e-8)], ids=["torch", "wide", "sign"]
)
def test_trajectory_equals_the_naive_loop(key, decay, eps):
    start, gradients = jax.random.normal(key, (4,)), jax.random.normal(key, (6, 4))
    optimizer = torch_rmsprop(0.1, decay=decay, eps=eps)
    ours = start + sum(updates(optimizer, gradients, start))
    expected = naive(start, gradients, 0.1, decay, eps)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)  # float64


def test_optax_says_the_same_when_told_to_be_torch(key):
    gradients = jax.random.normal(key, (6, 4))
    theirs = optax.rmsprop(
        0.1, decay=0.99, eps=1e-8, eps_in_sqrt=False, initial_scale=0.0, bias_correction=False
    )
    for ours, expected in zip(
        updates(torch_rmsprop(0.1), gradients, jnp.zeros(4)),
        updates(theirs, gradients, jnp.zeros(4)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-12)  # float64


def test_state_and_update_keep_each_dtype():
    params = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(3, jnp.bfloat16)}
    optimizer = torch_rmsprop(0.1)
    update, state = optimizer.update(params, optimizer.init(params))
    for tree in (update, state.mean_square):
        assert [x.dtype for x in tree.values()] == [jnp.float32, jnp.bfloat16]


def test_learning_rate_may_lie_in_the_state(key):
    params, gradients = jnp.zeros(4, jnp.float32), jax.random.normal(key, (3, 4), jnp.float32)
    injected = optax.inject_hyperparams(torch_rmsprop)(learning_rate=0.25, decay=0.5)
    assert injected.init(params).hyperparams["learning_rate"] == 0.25
    for ours, expected in zip(
        updates(injected, gradients, params),
        updates(torch_rmsprop(0.25, decay=0.5), gradients, params),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, expected)  # 0.25 and 0.5 are exact in float32


def test_update_has_its_derivative(key):
    gradient = jax.random.normal(key, (4,))
    optimizer = torch_rmsprop(0.1)
    state = optimizer.update(gradient, optimizer.init(gradient))[1]
    check_grads(lambda g: optimizer.update(g, state)[0], (gradient,), order=1, modes=("fwd", "rev"))


def test_compiled_update_reads_and_writes_in_place():
    """Two loops a leaf and no temporary: the second moment, then the parameter with its update."""
    params = {"a": jnp.ones((256, 512), jnp.float32), "b": jnp.ones(4096, jnp.float32)}
    optimizer = torch_rmsprop(0.1)

    def step(params, state, gradient):
        update, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, update), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    compiled = jitted.lower(params, optimizer.init(params), params).compile()
    entry = compiled.as_text().split("ENTRY")[1]
    assert entry.count(" fusion(") == 4
    assert compiled.memory_analysis().temp_size_in_bytes < 1024


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1e-3),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("decay", 1.0),
        ("decay", -0.1),
        ("decay", float("nan")),
        ("eps", -1e-8),
        ("eps", float("nan")),
    ],
)
def test_a_number_out_of_range_is_named(name, value):
    arguments = {"learning_rate": 1e-3} | {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}, expected a number"):
        torch_rmsprop(**arguments)


def test_optimizers_by_name_have_the_rate_one():
    gradient = jnp.array([2.0, -3.0], jnp.float32)
    for name, size in (("sgd", [2.0, 3.0]), ("rmsprop", [10.0, 10.0]), ("adam", [1.0, 1.0])):
        optimizer = unit_optimizer(name)
        assert optimizer is unit_optimizer(name)  # programs that depend on it are compiled once
        with jax.numpy_dtype_promotion("standard"):
            (update,) = updates(optimizer, [gradient], jnp.zeros(2, jnp.float32))
        np.testing.assert_allclose(update, np.array([-1, 1]) * size, rtol=1e-5)
    with pytest.raises(ValueError, match="optimizer: got lion, expected one of sgd, rmsprop, adam"):
        unit_optimizer("lion")
