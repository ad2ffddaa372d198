"""`jaxpref.gradients`: exact first-order changes, against Jacobians and against steps taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import gradients

VOCAB, WIDTH = 11, 5


@pytest.fixture(scope="module")
def params():
    first, second = jax.random.split(jax.random.key(3))
    return {
        "W": jax.random.normal(first, (VOCAB, WIDTH), jnp.float64),
        "h": jax.random.normal(second, (WIDTH,), jnp.float64),
    }


def logp_fn(params):
    """Next-token log-probabilities of a small nonlinear model."""
    return jax.nn.log_softmax(params["W"] @ jnp.tanh(params["h"]))


def loss(logp):
    return jnp.logaddexp(0.0, -0.3 * (logp[2] - logp[7]))


def test_directional_is_the_worked_derivative_of_a_product():
    value, change = gradients.directional(
        lambda p: {"product": p["x"] * p["y"]},
        {"x": jnp.array(3.0), "y": jnp.array(4.0)},
        {"x": jnp.array(1.0), "y": jnp.array(10.0)},
    )
    assert (float(value["product"]), float(change["product"])) == (12.0, 34.0)  # 4*1 + 3*10


def test_directional_equals_the_whole_jacobian_times_the_tangent(params):
    tangent = jax.tree.map(lambda leaf: jnp.cos(7.0 * leaf), params)
    _, change = gradients.directional(logp_fn, params, tangent)
    jacobian = jax.jacrev(logp_fn)(params)
    naive = [sum(float(jnp.sum(jacobian[k][z] * tangent[k])) for k in params) for z in range(VOCAB)]
    np.testing.assert_allclose(change, naive, rtol=1e-12)  # float64 rounding of short sums


def test_directional_leaves_only_a_second_order_error(params):
    tangent = jax.tree.map(jnp.sin, params)
    value, change = gradients.directional(logp_fn, params, tangent)

    def error(size):
        moved = jax.tree.map(lambda leaf, along: leaf + size * along, params, tangent)
        return logp_fn(moved) - value - size * change

    # Half the step, a quarter of the error; the third-order part is below 2 % at these sizes.
    np.testing.assert_allclose(error(1e-4) / error(5e-5), 4.0, rtol=0.02)


def test_directional_refuses_a_tangent_of_another_tree(params):
    with pytest.raises(TypeError, match="tree structure"):
        gradients.directional(logp_fn, params, {"W": params["W"]})


def test_flow_rates_equal_minus_the_kernel_times_the_pull(params):
    value, rates = gradients.flow_rates(logp_fn, loss, params)
    jacobian = jax.jacrev(logp_fn)(params)
    flat = jnp.concatenate([jacobian[k].reshape(VOCAB, -1) for k in params], axis=1)
    naive = -(flat @ flat.T) @ jax.grad(loss)(value)
    np.testing.assert_allclose(value, logp_fn(params))
    np.testing.assert_allclose(rates, naive, rtol=1e-11)  # float64 rounding


def test_flow_rates_are_what_one_small_descent_step_does(params):
    _, rates = gradients.flow_rates(logp_fn, loss, params)
    slope = jax.grad(lambda p: loss(logp_fn(p)))(params)

    def stepped(rate):
        return logp_fn(jax.tree.map(lambda leaf, s: leaf - rate * s, params, slope))

    # Central differences: the error falls with the square of the step, here about (1e-5)^2.
    np.testing.assert_allclose((stepped(1e-5) - stepped(-1e-5)) / 2e-5, rates, atol=1e-9)


def test_flow_rates_lower_the_loss_by_the_squared_gradient(params):
    value, rates = gradients.flow_rates(logp_fn, loss, params)
    slope = jax.grad(lambda p: loss(logp_fn(p)))(params)
    squared = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(slope))
    np.testing.assert_allclose(jax.grad(loss)(value) @ rates, -squared, rtol=1e-12)


def test_flow_rates_train_only_what_params_holds(params):
    frozen = params["W"]
    _, rates = gradients.flow_rates(lambda h: logp_fn({"W": frozen, "h": h}), loss, params["h"])
    jacobian = jax.jacrev(lambda h: logp_fn({"W": frozen, "h": h}))(params["h"])
    naive = -(jacobian @ jacobian.T) @ jax.grad(loss)(logp_fn(params))
    np.testing.assert_allclose(rates, naive, rtol=1e-11)


def test_flow_rates_keep_the_tree_of_the_outputs_under_jit(params):
    def outputs(params):
        logp = logp_fn(params)
        return {"all": logp, "pair": logp[jnp.array([2, 7])]}

    jitted = jax.jit(lambda p: gradients.flow_rates(outputs, lambda f: loss(f["all"]), p))
    _, rates = jitted(params)
    _, plain = gradients.flow_rates(logp_fn, loss, params)
    np.testing.assert_allclose(rates["all"], plain, rtol=1e-11)
    np.testing.assert_allclose(rates["pair"], plain[np.array([2, 7])], rtol=1e-11)


def test_flow_rates_refuse_a_loss_that_is_not_a_scalar(params):
    with pytest.raises(TypeError, match="scalar"):
        gradients.flow_rates(logp_fn, lambda logp: logp, params)


def test_both_ask_for_the_highest_matrix_precision(params):
    """The sign of a small change is the finding, also on machines that default to less."""
    tangent = jax.tree.map(jnp.ones_like, params)
    traced = [
        jax.make_jaxpr(lambda p: gradients.directional(logp_fn, p, tangent))(params),
        jax.make_jaxpr(lambda p: gradients.flow_rates(logp_fn, loss, p))(params),
    ]
    for jaxpr in traced:
        products = [line for line in str(jaxpr).split("\n") if "dot_general" in line]
        assert products
        assert str(jaxpr).count("Precision.HIGHEST, Precision.HIGHEST") == len(products)
