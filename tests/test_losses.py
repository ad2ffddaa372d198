"""`jaxpref.losses`: worked points, derivatives, laws, edges; the catalogue and its page agree."""

import functools
import inspect
import pathlib
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import test_kernels
import test_tokenwise
import test_unpaired
from jax.test_util import check_grads

from jaxpref import losses
from jaxpref.losses import __main__ as docs

REFERENCE, LENGTHS = jnp.array([-13.0, -14.2]), jnp.array([9.0, 12.0])
A = jnp.array([-12.3, -15.1])  # log-ratios 0.7 and -0.9: margin 1.6
B = jnp.array([-13.5, -12.9])  # log-ratios -0.5 and 1.3: margin -1.8
DATA = {
    "reference": REFERENCE,
    "lengths": LENGTHS,
    "desirable": jnp.array([True, False]),
    "kl_baseline": jnp.array(0.0),
}


def bound(name, *, dtype=jnp.float64, **arguments):
    """The loss as a function of `logp`: what it reads of DATA, unless given here."""
    loss = getattr(losses, name)
    read = {k: v for k, v in DATA.items() if k in inspect.signature(loss).parameters}
    read = {k: v.astype(dtype) if v.dtype == jnp.float64 else v for k, v in read.items()}
    return functools.partial(loss, **{**read, **arguments})


class Point(typing.NamedTuple):
    """A loss somewhere. For single examples, of the mean over the two."""

    name: str
    arguments: dict
    logp: jax.Array
    value: float
    d_w: float  # -dl/dlogp_w
    d_l: float  # +dl/dlogp_l


# Computed from the papers' formulas in 40 digits, with numerical derivatives, outside this library.
POINTS = [
    Point("dpo", {"beta": 0.1}, A, 0.616344, 0.046009, 0.046009),
    Point("dpo", {"beta": 0.1}, B, 0.787192, 0.054488, 0.054488),
    Point("cdpo", {"beta": 0.1, "epsilon": 0.1}, A, 0.632344, 0.036009, 0.036009),
    Point("cdpo", {"beta": 0.1, "epsilon": 0.1}, B, 0.769192, 0.044488, 0.044488),
    Point("robust_dpo", {"beta": 0.1, "epsilon": 0.1}, A, 0.596344, 0.058509, 0.058509),
    Point("robust_dpo", {"beta": 0.1, "epsilon": 0.1}, B, 0.809692, 0.066988, 0.066988),
    Point("ipo", {"tau": 0.1}, A, 11.56, 6.8, 6.8),
    Point("ipo", {"tau": 0.1}, B, 46.24, 13.6, 13.6),
    Point("ipo_length_normalised", {"tau": 0.1}, A, 23.495563, 1.077160, 0.807870),
    Point("ipo_length_normalised", {"tau": 0.1}, B, 26.665748, 1.147531, 0.860648),
    Point("hinge", {"beta": 0.1}, A, 0.84, 0.1, 0.1),
    Point("hinge", {"beta": 0.1}, B, 1.18, 0.1, 0.1),
    Point("r_dpo", {"beta": 0.1, "alpha": 0.01}, A, 0.630258, 0.046755, 0.046755),
    Point("r_dpo", {"beta": 0.1, "alpha": 0.2}, A, 0.937154, 0.060826, 0.060826),
    Point("r_dpo", {"beta": 0.1, "alpha": 0.2}, B, 1.157344, 0.068568, 0.068568),
    Point("dpop", {"beta": 0.1, "lam": 50}, A, 0.616344, 0.046009, 0.046009),
    Point("dpop", {"beta": 0.1, "lam": 50}, B, 2.746315, 4.772764, 0.093584),
    Point("dpop", {"beta": 0.1, "lam": 5}, B, 0.931084, 0.363524, 0.060587),
    Point("dpo_shift", {"beta": 0.1, "shift": 0.75}, A, 0.626759, 0.046568, 0.034926),
    Point("dpo_shift", {"beta": 0.1, "shift": 0.75}, B, 0.769614, 0.053681, 0.040261),
    Point("sppo", {"beta": 0.1}, A, 35.3, 8.6, 8.2),
    Point("sppo", {"beta": 0.1}, B, 69.94, 11.0, 12.6),
    Point("slic_hf", {"delta": 1, "lam": 0.1}, A, 1.23, 0.1, 0.0),
    Point("slic_hf", {"delta": 5, "lam": 0.1}, A, 3.43, 1.1, 1.0),
    Point("slic_hf", {"delta": 1, "lam": 0.1}, B, 2.95, 1.1, 1.0),
    Point("simpo", {"beta": 2, "gamma": 0.5}, A, 1.114353, 0.149305, 0.111979),
    Point("simpo", {"beta": 0.1, "gamma": 0.5}, A, 0.980834, 0.006944, 0.005208),
    Point("simpo", {"beta": 10, "gamma": 3}, A, 4.100044, 1.092698, 0.819523),
    Point("simpo", {"beta": 2, "gamma": 0.5}, B, 1.580509, 0.176473, 0.132355),
    Point("cpo", {"beta": 0.1, "alpha": 0}, A, 0.562915, 0.043045, 0.043045),
    Point("cpo", {"beta": 0.1, "alpha": 1}, A, 12.862915, 1.043045, 0.043045),
    Point("cpo", {"beta": 0.1, "alpha": 1}, B, 14.223597, 1.051500, 0.051500),
    Point("cpo_token_mean", {"beta": 0.1, "alpha": 1}, A, 1.929582, 0.154156, 0.043045),
    Point("cpo_token_mean", {"beta": 0.1, "alpha": 1}, B, 2.223597, 0.162611, 0.051500),
    Point("rrhf", {"lam": 0}, A, 0.108333, 0.111111, 0.083333),
    Point("rrhf", {"lam": 1}, A, 12.408333, 1.111111, 0.083333),
    Point("rrhf", {"lam": 1}, B, 13.925, 1.111111, 0.083333),
    Point("orpo", {"lam": 0.1}, A, 1.443670, 0.119120, 0.006251),
    Point("orpo", {"lam": 1}, A, 2.136697, 0.191196, 0.062511),
    Point("orpo", {"lam": 0.1}, B, 1.603104, 0.120313, 0.008139),
    Point("sft", {}, A, 13.7, 0.5, -0.5),
    Point("sft", {}, B, 13.2, 0.5, -0.5),
    Point("sft_token_mean", {}, A, 1.3125, 0.055556, -0.041667),
    Point("sft_token_mean", {}, B, 1.2875, 0.055556, -0.041667),
    Point("kto", {"beta": 0.1}, A, 0.480011, 0.012485, 0.012475),
    Point("kto", {"beta": 0.1, "kl_baseline": 0.5}, A, 0.480029, 0.012499, 0.012439),
    Point(
        "kto",
        {"beta": 0.1, "kl_baseline": 0.5, "desirable_weight": 2, "undesirable_weight": 3},
        B,
        *(1.304963, 0.024938, 0.037440),
    ),
]
ELSEWHERE = {*test_unpaired.NAMES, *test_tokenwise.NAMES, *test_kernels.NAMES}
NAMES = [name for name in docs.catalogue() if name not in ELSEWHERE]
UNPAIRED = ("sft", "sft_token_mean", "kto")
HYPERPARAMETERS = [
    (name, p.name, p.default)
    for name in NAMES
    for p in inspect.signature(getattr(losses, name)).parameters.values()
    if p.kind is p.KEYWORD_ONLY
]


def label(point):
    settings = ",".join(f"{k}={v}" for k, v in point.arguments.items())
    return f"{point.name}({settings}){'A' if point.logp is A else 'B'}"


@pytest.mark.parametrize("point", POINTS, ids=label)
def test_value_and_pulls_are_those_of_the_formula(point):
    loss = bound(point.name, **point.arguments)
    value, pull = jax.value_and_grad(lambda x: loss(x).mean())(point.logp)
    # The numbers are printed with six decimals.
    np.testing.assert_allclose(value, point.value, rtol=0, atol=6e-7)
    np.testing.assert_allclose(pull, [-point.d_w, point.d_l], rtol=0, atol=6e-7)


@pytest.mark.parametrize("point", POINTS, ids=label)
def test_derivatives_agree_with_finite_differences(point):
    # In float64 a central difference is good to about 1e-9 of the value; no point is at a kink.
    check_grads(bound(point.name, **point.arguments), (point.logp,), order=1, atol=1e-6, rtol=1e-6)


# --- laws -----------------------------------------------------------------------------------------

ONES = jnp.ones(2)
NO_REFERENCE = {"reference": jnp.zeros(2)}
TWINS = {
    "cdpo of no flips is dpo": (("cdpo", {"epsilon": 0}), ("dpo", {})),
    "robust_dpo of no flips is dpo": (("robust_dpo", {"epsilon": 0}), ("dpo", {})),
    "r_dpo of free tokens is dpo": (("r_dpo", {"alpha": 0}), ("dpo", {})),
    "r_dpo of equal lengths is dpo": (("r_dpo", {"lengths": 7 * ONES}), ("dpo", {})),
    "dpo_shift of the whole rejected is dpo": (("dpo_shift", {"shift": 1}), ("dpo", {})),
    "dpop of no penalty is dpo": (("dpop", {"lam": 0}), ("dpo", {})),
    "cpo of no likelihood is dpo without reference": (("cpo", {"alpha": 0}), ("dpo", NO_REFERENCE)),
    "slic_hf of no likelihood is hinge without reference": (
        ("slic_hf", {"delta": 1, "lam": 0}),
        ("hinge", {"beta": 1, **NO_REFERENCE}),
    ),
    "ipo by tokens of single tokens is ipo": (
        ("ipo_length_normalised", {"lengths": ONES}),
        ("ipo", {}),
    ),
    "cpo by tokens of single tokens is cpo": (("cpo_token_mean", {"lengths": ONES}), ("cpo", {})),
    "sft by tokens of single tokens is sft": (("sft_token_mean", {"lengths": ONES}), ("sft", {})),
    "simpo of single tokens and no target is dpo without reference": (
        ("simpo", {"lengths": ONES, "gamma": 0, "beta": 0.3}),
        ("dpo", {"beta": 0.3, **NO_REFERENCE}),
    ),
}


@pytest.mark.parametrize("logp", [A, B], ids="AB")
@pytest.mark.parametrize("twins", TWINS.values(), ids=TWINS)
def test_special_cases(twins, logp):
    (one, first), (other, second) = twins
    found, expected = bound(one, **first), bound(other, **second)
    np.testing.assert_allclose(found(logp), expected(logp), rtol=1e-12)
    slopes = (jax.grad(lambda x, f=f: f(x).sum())(logp) for f in (found, expected))
    np.testing.assert_allclose(*slopes, rtol=1e-12)


@pytest.mark.parametrize("name", [n for n in NAMES if "reference" in bound(n).keywords])
def test_only_the_log_ratio_counts(name):
    shift = jnp.array([3.0, -4.5])
    moved = bound(name, reference=REFERENCE + shift)(A + shift)
    np.testing.assert_allclose(moved, bound(name)(A), rtol=1e-12)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "robust_dpo", "ipo", "hinge", "r_dpo"])
def test_margin_losses_push_both_responses_equally(name, key):
    for noise in 5 * jax.random.normal(key, (5, 2)):
        logp = REFERENCE + noise
        pull = jax.grad(bound(name))(logp)
        np.testing.assert_allclose(pull.sum(), 0, atol=1e-12)


def test_dpo_of_the_swapped_pair_costs_the_margin_more():
    swapped = bound("dpo", beta=0.3)(2 * REFERENCE - A)  # log s(x) - log s(-x) = x
    np.testing.assert_allclose(swapped - bound("dpo", beta=0.3)(A), 0.3 * 1.6, rtol=1e-12)


def test_robust_dpo_averages_over_flips_to_the_loss_of_clean_labels():
    clean, swapped = A - REFERENCE, (A - REFERENCE)[::-1]
    robust = bound("robust_dpo", epsilon=0.2, **NO_REFERENCE)
    mean = 0.8 * robust(clean) + 0.2 * robust(swapped)
    np.testing.assert_allclose(mean, bound("dpo")(A), rtol=1e-12)


def test_cdpo_is_the_mean_of_dpo_over_flips():
    clean, swapped = A - REFERENCE, (A - REFERENCE)[::-1]
    dpo = bound("dpo", **NO_REFERENCE)
    mean = 0.8 * dpo(clean) + 0.2 * dpo(swapped)
    np.testing.assert_allclose(bound("cdpo", epsilon=0.2)(A), mean, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "log_ratio"),
    [
        ("cdpo", [jnp.log(9.0) / 0.1, 0.0]),
        ("ipo", [5.0, 0.0]),
        ("ipo_length_normalised", [9 * 5.0, 0.0]),
        ("sppo", [500.0, -500.0]),
    ],
)
def test_targets_are_minima(name, log_ratio):
    at = REFERENCE + jnp.array(log_ratio)
    loss = bound(name)
    np.testing.assert_allclose(jax.grad(loss)(at), 0, atol=1e-12)
    assert all(loss(at + jnp.array(step)) > loss(at) for step in ([1e-3, 0], [-1e-3, 0]))


def test_dpop_pulls_the_chosen_harder_while_it_is_below_its_reference():
    pull = jax.grad(bound("dpop", lam=5))(B)
    np.testing.assert_allclose(-pull[0] / pull[1], 6, rtol=1e-12)


def test_dpo_shift_pulls_the_rejected_less_at_every_margin(key):
    for noise in 5 * jax.random.normal(key, (5, 2)):
        pull = jax.grad(bound("dpo_shift", shift=0.6))(REFERENCE + noise)
        np.testing.assert_allclose(-pull[1] / pull[0], 0.6, rtol=1e-12)


def test_r_dpo_pushes_a_longer_chosen_response_less():
    pulls = [
        jax.grad(bound("r_dpo", lengths=jnp.array([n, 12.0])))(A)[1] for n in (5.0, 12.0, 20.0)
    ]
    assert pulls[0] > pulls[1] > pulls[2] > 0


def test_dpo_of_large_beta_is_a_hinge_and_of_small_beta_a_line():
    large = bound("dpo", beta=1e4)(B) / 1e4
    np.testing.assert_allclose(large, 1.8, rtol=1e-12)
    small = bound("dpo", beta=1e-4)(A)  # log 2 - x / 2 + x^2 / 8
    np.testing.assert_allclose(small, np.log(2) - 0.8e-4, rtol=0, atol=1e-8)


def test_orpo_compares_odds():
    p = np.array([0.7, 0.2])
    odds = p / (1 - p)
    expected = -np.log(0.7) - 0.3 * np.log(odds[0] / odds.sum())
    found = bound("orpo", lengths=ONES, lam=0.3)(jnp.log(p))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_kto_mirrors_gains_and_losses_around_the_baseline():
    kto = bound("kto", desirable=jnp.array([True, False]), kl_baseline=0.4, **NO_REFERENCE)
    found = kto(jnp.array([0.4 + 1.3, 0.4 - 1.3]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
    np.testing.assert_allclose(found[0], 1 - 1 / (1 + np.exp(-0.13)), rtol=1e-12)


def test_margin_is_chosen_minus_rejected():
    found = losses.margin(jnp.array([[1.0, 4.0], [2.0, -0.5]]))
    np.testing.assert_array_equal(found, [-3.0, 2.5])


def test_kto_baseline_is_bounded_after_the_mean():
    zeros = jnp.zeros(3)
    assert float(losses.kto_baseline(jnp.array([2.0, -1.0, 0.5]), zeros)) == 0.5
    assert float(losses.kto_baseline(jnp.array([2.0, -1.0, -4.0]), zeros)) == 0.0
    assert np.isnan(losses.kto_baseline(jnp.array([2.0, jnp.nan, 0.5]), zeros))


def test_kto_baseline_passes_no_gradient():
    slope = jax.grad(losses.kto_baseline)(jnp.array([2.0, 1.0]), jnp.zeros(2))
    np.testing.assert_array_equal(slope, 0)


def test_kto_baseline_refuses_no_examples():
    with pytest.raises(ValueError, match="logp: got no examples, expected at least one"):
        losses.kto_baseline(jnp.zeros(0), jnp.zeros(0))


@pytest.mark.parametrize("name", [n for n in NAMES if "reference" in bound(n).keywords])
def test_no_gradient_enters_the_reference_even_of_the_same_parameters(name):
    def both(x):
        return bound(name, reference=x - 1.0)(x).sum()

    alone = jax.grad(lambda x: bound(name, reference=A - 1.0)(x).sum())(A)
    np.testing.assert_array_equal(jax.grad(both)(A), alone)
    assert np.any(alone != 0)


def test_no_gradient_enters_the_baseline():
    slope = jax.grad(lambda z: bound("kto", kl_baseline=z)(A).sum())(jnp.array(0.3))
    assert float(slope) == 0.0


# --- edges ----------------------------------------------------------------------------------------

EDGES = {
    "policy is reference": ([-13.0, -14.2], [9.0, 12.0]),
    "far above": ([-3.0, -10_003.0], [9.0, 12.0]),
    "far below": ([-10_003.0, -3.0], [9.0, 12.0]),
    "single tokens": ([-0.5, -9.0], [1.0, 1.0]),
    "probability one": ([0.0, 0.0], [9.0, 12.0]),
    "chosen has probability one": ([0.0, -3.0], [9.0, 12.0]),
    "rejected has probability one": ([-3.0, 0.0], [9.0, 12.0]),
    "both are empty": ([0.0, 0.0], [0.0, 0.0]),
    "chosen is empty": ([0.0, -3.0], [0.0, 3.0]),
    "rejected is empty": ([-3.0, 0.0], [3.0, 0.0]),
}


@pytest.mark.parametrize("name", NAMES)
def test_value_and_pull_are_finite_at_the_edges_in_float32(name):
    logp, lengths = (jnp.array(x, jnp.float32) for x in zip(*EDGES.values(), strict=True))
    loss = bound(name, dtype=jnp.float32)
    data = {k: jnp.broadcast_to(v, logp.shape) for k, v in loss.keywords.items() if v.ndim}
    data = {k: lengths if k == "lengths" else v for k, v in data.items()}
    value, pullback = jax.vjp(lambda x: functools.partial(loss, **data)(x), logp)
    (pull,) = pullback(jnp.ones_like(value))
    assert value.dtype == pull.dtype == jnp.float32
    for edge, one, both in zip(EDGES, value, pull, strict=True):
        assert np.isfinite(one).all(), edge
        assert np.isfinite(both).all(), edge


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_far_margins_have_the_slopes_of_their_asymptotes(far):
    logp = REFERENCE + jnp.array([far, 0.0])
    right = far > 0
    slope = {name: float(-jax.grad(bound(name))(logp)[0]) for name in ("dpo", "cdpo", "robust_dpo")}
    assert slope["dpo"] == (0.0 if right else 0.1)
    np.testing.assert_allclose(slope["cdpo"], -0.01 if right else 0.09, rtol=1e-12)
    np.testing.assert_allclose(slope["robust_dpo"], 0.0125 if right else 0.1125, rtol=1e-12)


KINKS = {
    "hinge": (bound("hinge", beta=0.5), REFERENCE + jnp.array([2.0, 0.0]), [0.0, 0.0]),
    "slic_hf": (bound("slic_hf", delta=1, lam=0), jnp.array([-3.0, -4.0]), [0.0, 0.0]),
    "rrhf": (bound("rrhf", lengths=2 * ONES, lam=0), jnp.array([-3.0, -3.0]), [0.0, 0.0]),
    "dpop": (bound("dpop"), REFERENCE, [-0.05, 0.05]),
}


@pytest.mark.parametrize(("loss", "logp", "pull"), KINKS.values(), ids=KINKS)
def test_kinks_have_the_derivative_of_their_flat_side(loss, logp, pull):
    np.testing.assert_allclose(jax.grad(loss)(logp), pull, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_orpo_of_a_certain_chosen_response_has_its_true_limit(dtype):
    a_l = -1.5
    loss = bound("orpo", lam=0.1, lengths=jnp.array([4.0, 2.0], dtype))
    value, pull = jax.value_and_grad(loss)(jnp.array([0.0, 2 * a_l], dtype))
    odds = np.exp(a_l) / -np.expm1(a_l)
    # d_w = (1 + lam odds_l) / n_w; the value is off by less than lam odds_l eps.
    rtol = 8 * jnp.finfo(dtype).eps
    np.testing.assert_allclose(pull[0], -(1 + 0.1 * odds) / 4, rtol=rtol)
    np.testing.assert_allclose(value, 0, atol=rtol)


def test_orpo_pulls_a_certain_rejected_response_down_as_hard_as_the_dtype_can_say():
    eps = float(jnp.finfo(jnp.float32).eps)
    loss = bound("orpo", lam=0.1, lengths=jnp.ones(2, jnp.float32))
    value, pull = jax.value_and_grad(loss)(jnp.array([-1.0, 0.0], jnp.float32))
    np.testing.assert_allclose(pull[1], 0.1 / eps, rtol=1e-5)
    assert 1.0 < value < 1.0 + 0.1 * 20  # -log eps is 15.9


def test_orpo_is_accurate_in_float32_from_near_certain_to_improbable():
    a = -np.logspace(-5, 1.3, 40).astype(np.float32)
    pairs = np.stack([np.full_like(a, -0.7), a], axis=-1)

    @jax.jit
    def slopes(pairs):
        loss = bound("orpo", lam=1, lengths=jnp.ones_like(pairs))
        return jax.value_and_grad(lambda x: loss(x).sum())(pairs)

    narrow, found = slopes(jnp.array(pairs, jnp.float32))
    wide, expected = slopes(jnp.array(pairs, jnp.float64))
    # A few roundings each; log(1 - exp(a)) as written would lose three digits and more.
    np.testing.assert_allclose(narrow, wide, rtol=1e-6)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_computed_in_float32_and_float64_stays(name):
    narrow = bound(name, dtype=jnp.bfloat16)
    found = narrow(A.astype(jnp.bfloat16))
    wide = {
        k: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v
        for k, v in narrow.keywords.items()
    }
    expected = narrow.func(A.astype(jnp.bfloat16).astype(jnp.float32), **wide)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)
    assert bound(name)(A).dtype == jnp.float64


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_is_not_hidden(name):
    for place in (0, 1):
        seen = np.isnan(bound(name)(A.at[place].set(jnp.nan)))
        assert seen[place] if name in UNPAIRED else seen


@pytest.mark.parametrize("name", [n for n in NAMES if "lengths" in bound(n).keywords])
def test_lengths_may_be_integers(name):
    whole = bound(name, lengths=LENGTHS.astype(jnp.int32))(A)
    np.testing.assert_array_equal(whole, bound(name)(A))


# --- composition ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_batch_axes_are_kept_and_rows_do_not_meet(name, key):
    logp = -20 * jax.random.uniform(key, (2, 3, 2))
    loss = bound(name)
    each = loss.func
    data = {k: jnp.broadcast_to(v, logp.shape) for k, v in loss.keywords.items() if v.ndim}
    fixed = {k: v for k, v in loss.keywords.items() if not v.ndim}
    own = (2,) if name in UNPAIRED else ()
    whole = each(logp, **data, **fixed)
    assert whole.shape == (2, 3, *own)
    assert loss(A).shape == own
    row = {k: v[0] for k, v in data.items()}
    assert jax.eval_shape(functools.partial(each, **row, **fixed), logp[0]).shape == (3, *own)
    rows = np.array([[loss(pair) for pair in row] for row in logp])
    np.testing.assert_allclose(whole, rows, rtol=1e-12)  # different sizes may round differently
    mapped = jax.jit(jax.vmap(loss))(logp.reshape(6, 2))
    np.testing.assert_allclose(mapped, rows.reshape(6, *own), rtol=1e-12)


@pytest.mark.parametrize(("name", "argument", "default"), HYPERPARAMETERS)
def test_hyperparameters_may_be_traced_and_differentiated(name, argument, default):
    def of(value):
        return bound(name, **{argument: value})(B).sum()

    value, slope = jax.jit(jax.vmap(jax.value_and_grad(of)))(jnp.array([default]))
    np.testing.assert_allclose(value, [of(default)], rtol=1e-12)
    # SPPO's beta of 1e-3 needs a small step: its third derivative is 1e9 times its first.
    step = 1e-4 * default
    difference = (of(default + step) - of(default - step)) / (2 * step)
    np.testing.assert_allclose(slope, [difference], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "value", [1, np.float32(0.25), np.int64(1), jnp.float32(0.25), np.array(0.25)], ids=repr
)
def test_hyperparameters_may_be_any_real_number(value):
    found = bound("dpo", beta=value)(A)
    np.testing.assert_array_equal(found, bound("dpo", beta=float(value))(A))
    assert bound("dpo", dtype=jnp.float32, beta=value)(A.astype(jnp.float32)).dtype == jnp.float32


# --- bad input ------------------------------------------------------------------------------------

ALSO_BAD = {"beta": [0.0], "tau": [0.0], "epsilon": [0.5, 1.0], "shift": [0.0, 1.5]}


@pytest.mark.parametrize(("name", "argument", "default"), HYPERPARAMETERS)
def test_hyperparameters_out_of_range_are_named(name, argument, default):
    bad = [-0.5, float("nan"), float("inf"), jnp.array(-0.5), True]
    bad += ALSO_BAD.get(argument, [])
    for value in bad:
        with pytest.raises(ValueError, match=rf"{argument}: got .+, expected a .*number"):
            bound(name, **{argument: value})(A)


def test_the_error_says_what_came_and_what_was_expected():
    with pytest.raises(ValueError, match=r"^beta: got -0\.5, expected a finite number above 0$"):
        losses.dpo(A, REFERENCE, beta=-0.5)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in UNPAIRED])
def test_pairs_have_two_responses(name):
    three = {k: jnp.ones(3) for k in bound(name).keywords}
    with pytest.raises(jaxtyping.TypeCheckError):
        bound(name, **three)(jnp.ones(3))


@pytest.mark.parametrize("name", [n for n in NAMES if "reference" in bound(n).keywords])
def test_a_reference_of_another_shape_is_refused_not_broadcast(name):
    with pytest.raises(jaxtyping.TypeCheckError):
        bound(name)(jnp.tile(A, (4, 1)))


# --- the catalogue --------------------------------------------------------------------------------


def test_every_loss_has_both_points():
    both = {name: {True, False} for name in NAMES}
    found = {name: {p.logp is A for p in POINTS if p.name == name} for name in NAMES}
    assert found == both, "add its rows at the points A and B to POINTS"
    assert {p.name for p in POINTS} == set(NAMES)


def test_every_public_function_of_the_room_is_re_exported():
    room = pathlib.Path(inspect.getfile(losses)).parent
    files = [f.stem for f in room.glob("*.py") if not f.stem.startswith("_")]
    modules = [getattr(losses, stem) for stem in files]
    defined = {
        name
        for module in modules
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_")
        if value.__module__ == module.__name__
    }
    assert defined == {*NAMES, *ELSEWHERE, *docs.HELPERS}, "name it in jaxpref/losses/__init__.py"


@pytest.mark.parametrize("name", [*NAMES, *sorted(ELSEWHERE), *docs.HELPERS])
def test_docstrings_hold_formula_arguments_and_source(name):
    function = getattr(losses, name)
    text = inspect.getdoc(function) or ""
    for section in (".. math::", "Args:", "Returns:", "References:"):
        assert section in text, f"{name}: no {section}"
    for argument in inspect.signature(function).parameters:
        assert f"\n    {argument}: " in text, f"{name}: Args does not name {argument}"
    assert "https://" in text.partition("References:")[2]


@pytest.mark.parametrize("name", NAMES)
def test_signatures_keep_data_before_hyperparameters_and_have_no_flags(name):
    parameters = inspect.signature(getattr(losses, name)).parameters.values()
    data = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    rest = [p for p in parameters if p.name not in data]
    assert data[0] == "logp"
    assert set(data[1:]) <= set(DATA)
    assert all(p.kind is p.KEYWORD_ONLY for p in rest)
    assert not any(isinstance(p.default, bool) for p in rest)


def test_the_page_of_losses_is_the_one_the_code_prints():
    written = pathlib.Path(__file__).parent.parent / "docs" / "losses.md"
    assert written.read_text() == docs.page(), "run: make docs"
    for name in [*NAMES, *ELSEWHERE]:
        assert written.read_text().count(f"| `{name}` |") == 1
