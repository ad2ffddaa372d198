"""DPO-Kernels: its losses, kernels and divergences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from loss_points import LENGTHS, A, B, Point

from jaxpref import losses

LOG_KERNEL, DIVERGENCE = jnp.array([-0.4, -2.1]), jnp.array([0.8, 1.7])
DATA = {
    "dpo_kernels": (LENGTHS, LOG_KERNEL, DIVERGENCE),
    "dpo_kernels_linear": (LOG_KERNEL, jnp.array(0.9)),
}


# Computed from the formulas in 40 digits, with numerical derivatives, outside this library.
POINTS = [
    Point("dpo_kernels", {"alpha": 0.25}, A, 0.322336, 0.030616, 0.022962),
    Point("dpo_kernels", {"alpha": 0.25}, B, 0.420055, 0.038110, 0.028583),
    Point("dpo_kernels_linear", {"kappa": 0.3, "alpha": 0.25}, A, -0.87, 0.3, 0.3),
    Point("dpo_kernels_linear", {"kappa": 0.3, "alpha": 0.25}, B, 0.15, 0.3, 0.3),
]
NAMES = sorted({point.name for point in POINTS})


def bound(name, **arguments):
    return lambda logp: getattr(losses, name)(logp, *DATA[name], **arguments)


@pytest.mark.parametrize("point", POINTS, ids=lambda p: p.name)
def test_value_and_pulls_are_those_of_the_formula(point):
    loss = bound(point.name, **point.arguments)
    value, pull = jax.value_and_grad(loss)(point.logp)
    # The numbers are written with six decimals.
    np.testing.assert_allclose(value, point.value, rtol=0, atol=6e-7)
    np.testing.assert_allclose(pull, [-point.d_w, point.d_l], rtol=0, atol=6e-7)


def test_derivatives_by_all_that_is_trained_agree_with_finite_differences():
    trained = (A, LOG_KERNEL, DIVERGENCE)
    check_grads(lambda x, *y: losses.dpo_kernels(x, LENGTHS, *y), trained, order=1, modes=["rev"])
    data = (A, *DATA["dpo_kernels_linear"])
    check_grads(losses.dpo_kernels_linear, data, order=1, modes=["rev"])


def test_equal_kernels_and_divergences_leave_simpo():
    same = jnp.full(2, 0.7)
    found = losses.dpo_kernels(A, LENGTHS, same, same)
    np.testing.assert_allclose(found, losses.simpo(A, LENGTHS, beta=1, gamma=0), rtol=1e-12)


def test_a_frozen_kernel_is_a_margin_inside_a_sigmoid_and_nothing_outside():
    moved = LOG_KERNEL + jnp.array([2.0, 0.0])
    linear = [
        jax.grad(lambda x, k=k: losses.dpo_kernels_linear(x, k, jnp.array(0.9)))(A)
        for k in (LOG_KERNEL, moved)
    ]
    np.testing.assert_array_equal(*linear)
    inside = [losses.dpo_kernels(A, LENGTHS, k, DIVERGENCE, gamma=0.5) for k in (LOG_KERNEL, moved)]
    margins = [-np.log(np.expm1(x)) for x in inside]  # l = log(1 + exp(-x))
    np.testing.assert_allclose(margins[1] - margins[0], 0.5 * 2, rtol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_pull_are_finite_at_the_edges_in_float32(name):
    pairs = jnp.array([[0.0, 0.0], [-3.0, -1e4], [-1e4, -3.0], [-0.5, -9.0]], jnp.float32)
    data = [jnp.broadcast_to(x, (4, *x.shape)).astype(jnp.float32) for x in DATA[name]]
    data = [data[0].at[:2].set(0.0), *data[1:]] if name == "dpo_kernels" else data
    value, pullback = jax.vjp(lambda x: getattr(losses, name)(x, *data), pairs)
    (pull,) = pullback(jnp.ones_like(value))
    assert value.shape == (4,)
    assert value.dtype == pull.dtype == jnp.float32
    assert np.isfinite(value).all()
    assert np.isfinite(pull).all()


@pytest.mark.parametrize("name", NAMES)
def test_jit_vmap_grad_and_bfloat16(name):
    batch = jnp.stack([A, B])
    value, pull = jax.jit(jax.vmap(jax.value_and_grad(bound(name))))(batch)
    for row, one in enumerate((A, B)):
        expected = jax.value_and_grad(bound(name))(one)
        np.testing.assert_allclose(value[row], expected[0], rtol=1e-12)
        np.testing.assert_allclose(pull[row], expected[1], rtol=1e-12)
    narrow = bound(name)(A.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.float32
    expected = bound(name)(A.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(narrow, expected)
    assert np.isnan(bound(name)(A.at[0].set(jnp.nan)))


@pytest.mark.parametrize(
    ("name", "argument"),
    [(n, a) for n in NAMES for a in ("gamma", "alpha")] + [("dpo_kernels_linear", "kappa")],
)
def test_hyperparameters_out_of_range_are_named(name, argument):
    for value in [-0.5, float("nan"), True]:
        with pytest.raises(ValueError, match=rf"{argument}: got .+, expected a .*number"):
            bound(name, **{argument: value})(A)


# --- kernels --------------------------------------------------------------------------------------

X, Y = jnp.array([0.3, -0.2, 0.9]), jnp.array([-0.5, 0.4, 0.1])
PRECISION = jnp.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.25], [0.0, -0.25, 3.0]])
TWO = jnp.array([1.0, 0.5]), jnp.array([1.0, 0.1])
KERNELS = {  # with their values in 40 digits
    "rbf": (functools.partial(losses.log_rbf_kernel, sigma=0.7), -1.673469388),
    "polynomial": (
        functools.partial(losses.log_polynomial_kernel, degree=3, offset=1.5),
        0.9224540992,
    ),
    "polynomial of a negative base": (
        functools.partial(losses.log_polynomial_kernel, degree=2, offset=0),
        -3.932225713,
    ),
    "mahalanobis": (lambda x, y: losses.log_mahalanobis_kernel(x, y, PRECISION), -1.66),
    "spectral": (lambda x, y: losses.log_spectral_kernel(x, y, *TWO), -0.4806989355),
}


@pytest.mark.parametrize(("kernel", "value"), KERNELS.values(), ids=KERNELS)
def test_kernels_have_the_values_of_their_formulas(kernel, value):
    np.testing.assert_allclose(kernel(X, Y), value, rtol=1e-9)
    np.testing.assert_allclose(kernel(Y, X), value, rtol=1e-9)
    check_grads(kernel, (X, Y), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["rbf", "mahalanobis", "spectral"])
def test_gram_matrices_are_positive_semidefinite(name, key):
    points = jax.random.normal(key, (7, 3))
    kernel = KERNELS[name][0]
    left = jnp.broadcast_to(points[:, None], (7, 7, 3))
    gram = np.exp(kernel(left, left.swapaxes(0, 1)))
    assert gram.shape == (7, 7)
    assert np.linalg.eigvalsh(gram).min() > -1e-12


def test_a_mahalanobis_kernel_of_one_variance_is_rbf():
    found = losses.log_mahalanobis_kernel(X, Y, jnp.eye(3) / 0.49)
    np.testing.assert_allclose(found, KERNELS["rbf"][1], rtol=1e-9)
    one = losses.log_spectral_kernel(X, Y, jnp.ones(1), jnp.array([1 / 0.98]))
    np.testing.assert_allclose(one, KERNELS["rbf"][1], rtol=1e-9)


def test_embeddings_get_the_gradient_of_a_mahalanobis_kernel_and_its_precision_none():
    x, y, precision = jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0]), jnp.diag(jnp.array([4.0, 9.0]))
    slopes = jax.grad(losses.log_mahalanobis_kernel, argnums=(0, 1, 2))(x, y, precision)
    by_hand = np.array([-4.0, 18.0])  # -precision (x - y)
    for found, expected in zip(slopes, (by_hand, -by_hand, np.zeros((2, 2))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_weights_and_rates_of_a_spectral_kernel_are_data():
    slopes = jax.grad(losses.log_spectral_kernel, argnums=(0, 2, 3))(X, Y, *TWO)
    assert (slopes[0] != 0).all()
    np.testing.assert_array_equal(np.stack(slopes[1:]), 0)


def test_kernels_of_far_embeddings_have_finite_logarithms_in_float32():
    far, near = jnp.full(3, 100.0, jnp.float32), jnp.zeros(3, jnp.float32)
    single = [x.astype(jnp.float32) for x in TWO]
    for kernel in (losses.log_rbf_kernel, lambda x, y: losses.log_spectral_kernel(x, y, *single)):
        value, slope = jax.value_and_grad(kernel)(far, near)
        assert value < -1000
        assert np.isfinite(slope).all()


def test_polynomials_where_they_have_no_logarithm():
    x, y = jnp.array([1.0, 0.0]), jnp.array([-1.0, 0.0])
    value, slope = jax.value_and_grad(losses.log_polynomial_kernel)(x, y)  # base 0
    np.testing.assert_allclose(value, 2 * np.log(np.finfo(float).eps), rtol=1e-12)
    np.testing.assert_array_equal(slope, 0)
    assert np.isnan(losses.log_polynomial_kernel(x, 3 * y, degree=3))
    assert np.isfinite(losses.log_polynomial_kernel(x, 3 * y, degree=2))
    for degree in (0, -1, True):
        with pytest.raises(ValueError, match=r"degree: got .*, expected a whole number above 0"):
            losses.log_polynomial_kernel(x, y, degree=degree)


def test_mixtures_have_weights_that_sum_to_one(key):
    logits, groups = jax.random.normal(key, (2, 2)), jnp.array([0.4, -1.0])
    same = losses.log_kernel_mixture(jnp.full((3, 2, 2), -7.3), logits, groups)
    np.testing.assert_allclose(same, -7.3, rtol=1e-12)
    logs = jnp.array([[-1.0, 0.3], [-4.0, 0.0]])
    tau = np.exp(groups) / np.exp(groups).sum()
    alpha = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.log((tau[:, None] * alpha * np.exp(logs)).sum())
    np.testing.assert_allclose(
        losses.log_kernel_mixture(logs, logits, groups), expected, rtol=1e-10
    )
    check_grads(losses.log_kernel_mixture, (logs, logits, groups), order=1, modes=["rev"])


# --- divergences ----------------------------------------------------------------------------------

P, Q = jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.log(jnp.array([0.2, 0.2, 0.6]))
DIVERGENCES = {  # with their values in 40 digits
    "kl": (losses.kl_divergence, 0.3600624406),
    "js": (losses.js_divergence, 0.09056584996),
    "renyi 1/2": (losses.renyi_divergence, 0.1939319157),
    "renyi 0.3": (functools.partial(losses.renyi_divergence, order=0.3), 0.118061564),
    "renyi 2": (functools.partial(losses.renyi_divergence, order=2), 0.5690945319),
    "bhattacharyya": (losses.bhattacharyya_divergence, 0.09696595786),
    "hellinger": (losses.hellinger_divergence, 0.09241309819),
    "wasserstein": (losses.wasserstein_divergence, 0.7),
}


@pytest.mark.parametrize(("divergence", "value"), DIVERGENCES.values(), ids=DIVERGENCES)
def test_divergences_have_the_values_of_their_formulas(divergence, value):
    np.testing.assert_allclose(divergence(P, Q), value, rtol=1e-9)
    np.testing.assert_allclose(divergence(P, P), 0, atol=1e-15)
    check_grads(divergence, (P, Q), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_never_negative_and_keep_their_batch(name, key):
    p, q = jax.nn.log_softmax(3 * jax.random.normal(key, (2, 20, 4)))
    found = DIVERGENCES[name][0](p, q)
    assert found.shape == (20,)
    assert (found > 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_of_certain_distributions_in_float32(name):
    """Probabilities of 0: as minus infinity, and as logarithms that underflow."""
    q = jnp.array([-0.1, -2.5, -4.0], jnp.float32)
    q = jax.nn.log_softmax(q)
    for none in (-jnp.inf, -1e4):
        p = jnp.array([none, 0.0, none], jnp.float32)
        value, slope = jax.value_and_grad(DIVERGENCES[name][0], argnums=(0, 1))(p, q)
        assert value.dtype == jnp.float32
        assert np.isfinite(value), none
        assert all(np.isfinite(s).all() for s in slope), none


def test_renyi_divergences_meet_their_relatives():
    near = losses.renyi_divergence(P, Q, order=1 - 1e-7)
    np.testing.assert_allclose(near, DIVERGENCES["kl"][1], rtol=1e-6)
    twice = 2 * losses.bhattacharyya_divergence(P, Q)
    np.testing.assert_allclose(losses.renyi_divergence(P, Q, order=0.5), twice, rtol=1e-12)
    for order in (1, 0, -2.0):
        with pytest.raises(ValueError, match="order: got"):
            losses.renyi_divergence(P, Q, order=order)


def test_divergences_that_are_f_divergences():
    generators = {
        "kl": lambda r: jnp.exp(r) * r,
        "hellinger": lambda r: jnp.expm1(r / 2) ** 2 / 2,
        "js": lambda r: (jnp.exp(r) * r - (jnp.exp(r) + 1) * jnp.log((jnp.exp(r) + 1) / 2)) / 2,
    }
    for name, generator in generators.items():
        found = losses.f_divergence(P, Q, generator)
        np.testing.assert_allclose(found, DIVERGENCES[name][1], rtol=1e-9)
