"""Losses with exponentials, far out: their order, slopes and values, against 200 digits."""

import decimal
import itertools
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses
from jaxpref.losses.__main__ import values_and_pulls

D = Decimal
EXACT = decimal.Context(prec=200, Emax=10**9, Emin=-(10**9))
FAR = [10.0, 100.0, 630.0, 645.0, 700.0, 3000.0, 4000.0]  # float64 ends at 709, the bound is 638.8
BOUND = 638


def softplus(x):
    return x + softplus(-x) if x > 0 else (x.exp() if x < -60 else (1 + x.exp()).ln())


def sigmoid(x):
    return (-softplus(-x)).exp()


# Losses -log s(scale * (r_w - r_l) - target): scale, target, r, its slope, the exponents in r.
REWARDS = {
    "dpo": (D("0.1"), 0, lambda u: u, lambda u: D(1), lambda u: 0),
    "f_dpo_forward_kl": (D("0.1"), 0, lambda u: -(-u).exp(), lambda u: (-u).exp(), lambda u: -u),
    "f_dpo_jensen_shannon": (
        *(D("0.1"), 0, lambda u: -softplus(-u), lambda u: sigmoid(-u)),
        lambda u: 0,
    ),
    "f_dpo_alpha": (
        *(D("0.1"), 0, lambda u: -2 * (-u / 2).exp(), lambda u: (-u / 2).exp()),
        lambda u: -u / 2,
    ),
    "alphapo": (
        *(D("2.5"), D("0.1"), lambda u: -4 * (-u / 4).exp(), lambda u: (-u / 4).exp()),
        lambda u: -u / 4,
    ),
    "simpo": (D(2), D("0.5"), lambda u: u, lambda u: D(1), lambda u: 0),
}
# Functions of one margin, and their slopes.
LINKS = {
    "comp_sum_exponential": (D("0.1"), lambda x: (-x).exp(), lambda x: -(-x).exp()),
    "comp_sum_mae": (D("0.1"), lambda x: sigmoid(-x), lambda x: -sigmoid(x) * sigmoid(-x)),
    "comp_sum_generalised_cross_entropy": (
        D("0.1"),
        lambda x: (1 - (-softplus(-x) * D("0.7")).exp()) / D("0.7"),
        lambda x: -(-softplus(-x) * D("0.7")).exp() * sigmoid(-x),
    ),
}


def exact(name, w, l):
    """Value, ``d_w`` and ``d_l``."""
    if name in LINKS:
        beta, value, slope = LINKS[name]
        d = -beta * slope(beta * (w - l))
        return value(beta * (w - l)), d, d
    if name == "chi_po":
        x = D("0.05") * (w + w.exp() - l - l.exp())
        inside = D("0.05") * sigmoid(-x) * (abs(x) < 2)
        return softplus(-min(max(x, D(-2)), D(2))), inside * (1 + w.exp()), inside * (1 + l.exp())
    scale, target, reward, slope, _ = REWARDS[name]
    x = scale * (reward(w) - reward(l)) - target
    return softplus(-x), *(scale * slope(u) * sigmoid(-x) for u in (w, l))


NAMES = [*REWARDS, *LINKS, "chi_po"]


STEEP = ("dpo", "f_dpo_forward_kl", "f_dpo_alpha", "alphapo", "simpo", "comp_sum_exponential")


def measured(points, dtype):
    found = {name: getattr(losses, name) for name in NAMES}
    points = jnp.asarray(points, dtype)
    return values_and_pulls(found, points, jnp.zeros_like(points), (1, 1))


def grid(side):
    axis = [*(-x for x in side[::-1]), -1.0, 0.0, 1.0, *side]
    return np.array(list(itertools.product(axis, axis))), len(axis)


@pytest.fixture(scope="module")
def far():
    points, _ = grid(FAR)
    return measured(points, jnp.float64)


@pytest.fixture(scope="module")
def far_in_float32():
    points, _ = grid([10.0, 70.0, 80.0, 90.0, 100.0, 400.0, 10_000.0])
    return measured(points, jnp.float32)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_pulls_are_those_of_200_digits(name, far):
    """The value where no exponent is beyond the bound, a pull where its own is not."""
    points, _ = grid(FAR)
    value, pulls = far[name]
    exponent = REWARDS[name][-1] if name in REWARDS else (lambda u: u if name == "chi_po" else 0)
    below_one = name in ("comp_sum_mae", "comp_sum_generalised_cross_entropy")
    with decimal.localcontext(EXACT):
        for (w, l), *found in zip(points.tolist(), value, *pulls.T, strict=True):
            tops = [exponent(u) for u in (w, l)]
            if name == "comp_sum_exponential":
                tops = [0.1 * (l - w)] * 2
            for one, other, top in zip(
                found, exact(name, D(w), D(l)), [max(tops), *tops], strict=True
            ):
                if top < BOUND:
                    # exp(x) is good to x roundings, a slope such as s (1 - s) to one of 1.
                    least = 1e-16 if below_one else 1e-280
                    np.testing.assert_allclose(
                        one, float(other), rtol=1e-12, atol=least, err_msg=f"at {w, l}"
                    )


@pytest.mark.parametrize("name", NAMES)
def test_losses_keep_order_and_pulls_their_sign_where_exponentials_saturate(
    name, far, far_in_float32
):
    size = grid(FAR)[1]
    for value, pulls in (far[name], far_in_float32[name]):
        assert np.isfinite(value).all()
        assert np.isfinite(pulls).all()
        assert (pulls >= 0).all()
        value, pulls = value.reshape(size, size), pulls.reshape(size, size, 2)
        # Rounding may move equal numbers by a few digits of theirs.
        close = 8 * np.finfo(value.dtype).eps * np.abs(value)
        assert (np.diff(value, axis=0) <= close[1:]).all()  # falls as the chosen rises
        assert (np.diff(value, axis=1) >= -close[:, 1:]).all()
        right, wrong = np.tril(value, -1), np.triu(value, 1).T
        assert (right <= wrong + close).all()
        if name in STEEP:  # wherever the lower one is below its reference
            lower = np.tril_indices(size, -1, size // 2)
            assert (right < wrong)[lower].all()
            assert (pulls[lower[::-1]].max(axis=-1) > 0).all()


@pytest.mark.parametrize("name", ["f_dpo_forward_kl", "f_dpo_alpha", "alphapo"])
def test_both_exponents_beyond_the_bound_are_no_tie(name):
    """-90 and -100 nats in float32, and as far for smaller exponents."""
    far = jnp.array([-90.0, -100.0], jnp.float32) / {"f_dpo_alpha": 0.5, "alphapo": 0.25}.get(
        name, 1
    )
    points = jnp.stack([far, far[::-1]])
    found = {name: getattr(losses, name)}
    value, pulls = values_and_pulls(found, points, jnp.zeros_like(points), (1, 1))[name]
    assert value[0] < 1e-6
    np.testing.assert_array_equal(pulls[0], 0)
    assert value[1] > 1e30
    assert np.isfinite(pulls).all()
    assert pulls[1].min() > 1e30


def test_a_stale_average_far_below_the_batch_leaves_kldo_finite():
    logp, zeros = jnp.array([900.0, -3.0]), jnp.zeros(2)

    @jax.jit
    @jax.value_and_grad
    def loss(x):
        return losses.kldo_moving_average(x, zeros, zeros > 0, jnp.array(-5.0), beta=1.0)

    value, pull = loss(logp)
    np.testing.assert_allclose(value, 900 - np.log(2), rtol=1e-12)
    assert np.isfinite(pull).all()
    assert pull[0] > 1e200
