"""Losses of single examples and of whole batches: points, laws, running statistics, edges."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_points import LENGTHS, REFERENCE, A, B, Point, read

from jaxpref import losses

P = jnp.array([0.62, 0.17])  # what the losses of FLAT read
DATA = {
    "reference": REFERENCE,
    "lengths": LENGTHS,
    "desirable": jnp.array([True, False]),
    "delta": jnp.array(0.0),
    "aligned": jnp.array([[-1.4, -1.1], [-0.9, -1.6]]),
    "log_average": jnp.array(0.0),
}
# Five examples, two of them desirable.
LOGP = jnp.array([-12.3, -15.1, -9.2, -20.0, -7.5])
FIVE = {
    "reference": jnp.array([-13.0, -14.2, -9.0, -21.5, -8.0]),
    "desirable": jnp.array([True, False, True, False, False]),
}


def grad(function, **options):
    """One program, not one an operation."""
    return jax.jit(jax.grad(function, **options))


def value_and_grad(function, **options):
    return jax.jit(jax.value_and_grad(function, **options))


def bound(name, *, dtype=jnp.float64, **arguments):
    """The loss as a function of its first argument: what it reads of DATA, unless given here."""
    data = read(name, DATA, dtype)
    return functools.partial(getattr(losses, name), **{**data, **arguments})


# Computed from the papers' formulas in 40 digits, with numerical derivatives, outside this library.
POINTS = [
    Point("npo", {"beta": 0.1}, A, 13.779189, -0.517493, 0.477515),
    Point("npo", {"beta": 0.1}, B, 14.287178, -0.487503, 0.532454),
    Point("npo", {"beta": 0.5}, A, 2.753262, -0.586618, 0.389361),
    Point("bco", {"beta": 0.1}, A, 0.653959, 0.024125, 0.023876),
    Point("bco", {"beta": 0.1}, B, 0.739359, 0.025625, 0.026623),
    Point("bco", {"beta": 0.1, "delta": -0.01}, A, 0.653947, 0.024001, 0.024001),
    Point("bco", {"beta": 0.1, "delta": 0.3}, B, 0.747569, 0.029331, 0.022880),
    Point("dco", {"samples": 1}, A, 13.7, 0.5, -0.5),
    Point("dco", {"samples": 8}, A, 11.620567, 0.499992, -0.5),
    Point("dco", {"samples": 256}, A, 8.155130, 0.499710, -0.499982),
    Point("dco", {"samples": 256}, B, 7.655069, 0.499913, -0.499841),
    Point("poft", {}, A, 0.725252, 0.029396, -0.020920),
    Point("poft", {}, B, 0.717705, 0.031232, -0.019015),
    Point("kldo", {"beta": 0.1}, A, -0.16, 0.1, 0.1),
    Point("kldo", {"beta": 0.1}, B, 0.18, 0.1, 0.1),
    Point("kldo_moving_average", {"beta": 0.1}, A, -0.16, 0.1, 0.091393),
    Point("kldo_moving_average", {"beta": 0.1}, B, 0.18, 0.1, 0.113883),
    Point("flat_kl", {}, P, -0.183951, 1.0, 0.436049),
    Point("flat_total_variation", {}, P, -0.191373, 0.348129, 0.485824),
    Point("flat_jensen_shannon", {}, P, -0.174092, 0.349781, 0.542398),
    Point("flat_pearson", {}, P, -0.442775, 1.0, 1.085),
    Point("flat_jeffrey", {}, P, -0.442468, 1.0, 1.090419),
]
NAMES = sorted({point.name for point in POINTS})
OF_ONE = ("npo", "bco", "dco", "poft")
OF_TWO = [name for name in NAMES if name.startswith("flat")]
OF_BATCH = ("kldo", "kldo_moving_average")
HYPERPARAMETERS = [
    (name, p.name, p.default)
    for name in [*NAMES, "bco_running_mean", "kldo_log_average"]
    for p in inspect.signature(getattr(losses, name)).parameters.values()
    if p.kind is p.KEYWORD_ONLY
]


def label(point):
    settings = ",".join(f"{k}={v}" for k, v in point.arguments.items())
    return f"{point.name}({settings}){'A' if point.logp is A else 'B' if point.logp is B else ''}"


@pytest.fixture(scope="module")
def measured():
    """At every point the mean and its pull, all derivatives, and the loss a step up and down.

    In one program.
    """
    moves = 1e-5 * np.concatenate([np.eye(2), -np.eye(2)])

    def of(point):
        loss = bound(point.name, **point.arguments)
        value, pull = value_and_grad(lambda x: loss(x).mean())(point.logp)
        near = jax.vmap(loss)(np.asarray(point.logp) + moves)
        return value, pull, jax.jacrev(loss)(point.logp), near

    found = jax.jit(lambda: {label(point): of(point) for point in POINTS})()
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("point", POINTS, ids=label)
def test_value_and_pulls_are_those_of_the_formula(point, measured):
    value, pull, *_ = measured[label(point)]
    # The numbers are written with six decimals.
    np.testing.assert_allclose(value, point.value, rtol=0, atol=6e-7)
    np.testing.assert_allclose(pull, [-point.d_w, point.d_l], rtol=0, atol=6e-7)


@pytest.mark.parametrize("point", [p for p in POINTS if "moving" not in p.name], ids=label)
def test_derivatives_agree_with_finite_differences(point, measured):
    # In float64 a central difference is good to about 1e-9 of the value.
    *_, slopes, near = measured[label(point)]
    difference = (near[:2] - near[2:]) / 2e-5
    np.testing.assert_allclose(np.moveaxis(slopes, -1, 0), difference, atol=1e-6, rtol=1e-6)


def test_published_points_of_single_examples():
    """The specification's own numbers, where it has them for one response."""
    one = {"reference": REFERENCE[1:]}
    found = jax.jit(jax.value_and_grad(lambda x: losses.npo(x, **one, beta=0.1).sum()))(A[1:])
    np.testing.assert_allclose([found[0], found[1][0]], [12.983187, 0.955030], atol=6e-7)
    found = jax.jit(jax.value_and_grad(losses.dco))(A[0])
    np.testing.assert_allclose(found, [6.755403, -0.999420], atol=6e-7)
    found = jax.jit(jax.value_and_grad(lambda x: losses.dco(x, samples=8)))(jnp.log(0.3))
    np.testing.assert_allclose(found, [0.059376, -0.209742], atol=6e-7)
    aligned = (REFERENCE[0] / 9)[None]
    found = jax.jit(jax.value_and_grad(lambda x: losses.poft(x, LENGTHS[0], aligned)))(A[0])
    np.testing.assert_allclose(found, [0.655014, -0.053396], atol=6e-7)


# --- laws: single examples ------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_npo_is_dpo_with_the_chosen_held_at_its_reference(beta):
    pairs = jnp.stack([REFERENCE, B], axis=-1)
    zero = jnp.stack([REFERENCE, REFERENCE], axis=-1)
    expected = 2 / beta * losses.dpo(pairs, zero, beta=beta)
    np.testing.assert_allclose(bound("npo", beta=beta)(B), expected, rtol=1e-12)


def test_npo_of_small_beta_is_gradient_ascent():
    slope = grad(lambda x: bound("npo", beta=1e-6)(x).sum())(B)
    np.testing.assert_allclose(slope, [1.0, 1.0], rtol=1e-6)


def test_bco_reads_the_reward_less_the_shift_only():
    moved = bound("bco", delta=0.25, beta=0.5)(A + 0.5)
    np.testing.assert_allclose(moved, bound("bco", delta=0.0, beta=0.5)(A), rtol=1e-12)
    both = bound("bco", beta=0.5)(A) - bound("bco", beta=0.5, desirable=jnp.array([False, True]))(A)
    np.testing.assert_allclose(both, [-0.5 * 0.7, -0.5 * 0.9], rtol=1e-12)  # log s(x) - log s(-x)


def test_bco_at_its_best_measures_the_jensen_shannon_divergence():
    """Of three kinds of answers: the rewards ``log D+/D-``, weighted by how often each occurs."""
    good, bad = np.array([[3, 2, 1], [1, 1, 4]]) / 6
    reward = np.log(good / bad)
    data = {"reference": np.zeros(3), "delta": 0.7, "beta": 1}
    each = [losses.bco(reward + 0.7, desirable=np.full(3, side), **data) for side in (True, False)]
    total = (good * each[0] + bad * each[1]).sum()
    divergence = losses.js_divergence(np.log(good), np.log(bad))
    np.testing.assert_allclose(total, np.log(4) - 2 * divergence, rtol=1e-12)


def test_poft_is_log_2_where_the_policy_is_the_average_of_the_aligned_models():
    logp = DATA["aligned"].mean(axis=-1) * LENGTHS
    np.testing.assert_allclose(bound("poft")(logp), np.log(2), rtol=1e-12)


def test_dco_of_one_sample_is_sft():
    logp = jnp.array([-1e4, -40.0, -3.0, -0.1])
    found = jax.jit(jax.value_and_grad(lambda x: losses.dco(x, samples=1).sum()))(logp)
    np.testing.assert_allclose(found[0], 1e4 + 43.1, rtol=1e-12)
    np.testing.assert_allclose(found[1], -1, rtol=1e-12)


def test_dco_is_the_chance_of_some_success_in_many_tries():
    p = np.array([1e-9, 1e-4, 0.02, 0.3, 0.9, 0.999])
    for samples in (2, 16):
        failure = (1 - p) ** samples
        loss = functools.partial(losses.dco, samples=samples)
        value, slope = jax.jit(jax.vmap(jax.value_and_grad(loss)))(np.log(p))
        # By hand, 1 - failure loses digits: 1e-9 leaves seven of sixteen.
        np.testing.assert_allclose(value, -np.log1p(-failure), rtol=1e-6)
        by_hand = -samples * p * (1 - p) ** (samples - 1) / (1 - failure)
        np.testing.assert_allclose(slope, by_hand, rtol=1e-6)


def test_dco_is_accurate_in_float32_from_certain_to_improbable():
    logp = -np.logspace(-6, 4, 60).astype(np.float32)
    each = jax.jit(jax.vmap(jax.value_and_grad(losses.dco)))
    (narrow, slope), (wide, expected) = each(logp), each(logp.astype(np.float64))
    # A few roundings; (1 - p)^256 passes a rounding of log(1 - p) on 256-fold.
    np.testing.assert_allclose(narrow, wide, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(slope, expected, rtol=2e-5, atol=1e-7)
    assert (np.diff(wide) >= 0).all()


# --- laws: batches --------------------------------------------------------------------------------


def test_kldo_of_a_batch_has_the_numbers_of_the_formula():
    found = jax.jit(jax.value_and_grad(lambda x: losses.kldo(x, **FIVE, beta=0.4)))(LOGP)
    np.testing.assert_allclose(found[0], 0.1207935615, atol=6e-11)
    expected = [-0.2, 0.074593897, -0.2, 0.19481662, 0.13058948]
    np.testing.assert_allclose(found[1], expected, atol=6e-9)


def test_kldo_is_blind_to_a_shift_of_all_rewards():
    moved = losses.kldo(LOGP + 7, **FIVE, beta=0.4)
    np.testing.assert_allclose(moved, losses.kldo(LOGP, **FIVE, beta=0.4), rtol=1e-12)


def test_kldo_is_bounded_by_the_divergence_of_the_classes(key):
    """Three prompts' answers: (3, 2, 1) of 6 are desirable, (1, 1, 4) of 6 undesirable."""
    counts = np.array([[3, 2, 1], [1, 1, 4]])
    kind = np.repeat(np.tile(np.arange(3), 2), counts.ravel())
    data = {"reference": jnp.zeros(12), "desirable": jnp.arange(12) < 6}
    good, bad = counts / 6
    optimum = jnp.array(np.log(good / bad))[kind] + 2.5
    divergence = (good * np.log(good / bad)).sum()
    noise = jax.random.normal(key, (6, 3)).at[0].set(0)
    value, slope = jax.jit(
        jax.vmap(jax.value_and_grad(lambda n: losses.kldo(optimum + n[kind], **data, beta=1)))
    )(noise)
    np.testing.assert_allclose(value[0], -divergence, rtol=1e-12)
    np.testing.assert_allclose(slope[0], 0, atol=1e-12)
    assert (value[1:] > -divergence).all()


def test_a_batch_statistic_passes_a_gradient_just_where_the_source_does():
    """Example 1 moves example 3's pull in KLDO; the shifts of BCO and KLDO's average do not."""
    other = LOGP.at[1].add(1.0)

    def pull(loss, logp):
        return float(grad(lambda x: loss(x).sum())(logp)[3])

    kldo = functools.partial(losses.kldo, **FIVE)
    assert pull(kldo, other) < pull(kldo, LOGP) - 1e-4
    average = functools.partial(losses.kldo_moving_average, **FIVE, log_average=jnp.array(0.1))
    assert pull(average, other) == pull(average, LOGP)
    zero = losses.RunningMean(jnp.zeros(()), jnp.zeros(()))

    def bco(logp):
        delta = losses.bco_running_mean(zero, logp, FIVE["reference"]).mean
        return losses.bco(logp, **FIVE, delta=delta)

    delta = losses.bco_running_mean(zero, LOGP, FIVE["reference"]).mean
    fixed = functools.partial(losses.bco, **FIVE, delta=delta)
    assert pull(bco, LOGP) == pull(fixed, LOGP)
    assert pull(bco, other) != pull(bco, LOGP)  # by its value


def test_kldo_takes_the_gradient_from_the_moving_average():
    def moved(logp):
        old = jnp.array(0.2)
        average = losses.kldo_log_average(old, logp, **FIVE, beta=0.4, rate=0.1)
        return losses.kldo_moving_average(logp, **FIVE, log_average=average, beta=0.4), average

    (value, average), slope = value_and_grad(moved, has_aux=True)(LOGP)
    np.testing.assert_allclose(average, 0.2020989211, atol=6e-11)
    np.testing.assert_allclose(value, 0.1207935615, atol=6e-11)
    expected = [-0.2, 0.076001458, -0.2, 0.19849274, 0.13305366]
    np.testing.assert_allclose(slope, expected, atol=6e-9)


def test_kldo_by_an_average_of_this_batch_alone_is_kldo():
    first = losses.kldo_log_average(jnp.array(-jnp.inf), LOGP, **FIVE, beta=0.4)
    anew = losses.kldo_log_average(jnp.array(5.0), LOGP, **FIVE, beta=0.4, rate=1)
    np.testing.assert_allclose([first, anew], 0.2207935615, atol=6e-11)
    slope = grad(lambda x: losses.kldo_moving_average(x, **FIVE, log_average=first, beta=0.4))
    expected = grad(lambda x: losses.kldo(x, **FIVE, beta=0.4))(LOGP)
    np.testing.assert_allclose(slope(LOGP), expected, rtol=2e-6)  # the 1e-6 beside the average


def test_running_statistics_do_not_depend_on_how_examples_came_in_batches():
    zero = losses.RunningMean(jnp.zeros(()), jnp.zeros(()))
    whole = losses.bco_running_mean(zero, LOGP, FIVE["reference"], beta=0.3)
    parts = zero
    for part in (slice(0, 1), slice(1, 1), slice(1, 5)):
        parts = losses.bco_running_mean(parts, LOGP[part], FIVE["reference"][part], beta=0.3)
    expected = 0.3 * (LOGP - FIVE["reference"]).mean(), 5.0
    np.testing.assert_allclose(whole, expected, rtol=1e-12)
    np.testing.assert_allclose(parts, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["bco_running_mean", "kldo_log_average"])
def test_running_statistics_pass_no_gradient_and_may_be_scanned(name):
    data = {k: v for k, v in FIVE.items() if k in inspect.signature(bound(name).func).parameters}
    start = jnp.array(-jnp.inf)
    if name == "bco_running_mean":
        start = losses.RunningMean(jnp.zeros(()), jnp.zeros(()))

    def last(logp):
        def update(state, logp):
            return getattr(losses, name)(state, logp, **data), None

        state, _ = jax.lax.scan(update, start, jnp.stack([logp, logp + 1]))
        return jax.tree.leaves(state)[0]

    value, slope = jax.jit(jax.value_and_grad(last))(LOGP)
    assert np.isfinite(value)
    np.testing.assert_array_equal(slope, 0)


def test_bco_prompt_weights_are_bounded_odds():
    p = jnp.array([0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
    found = losses.bco_prompt_weight(p)
    np.testing.assert_allclose(found, [0.5, 0.5, 1.0, 4.0, 10.0, 10.0], rtol=1e-12)
    slope = grad(lambda x: losses.bco_prompt_weight(x).sum())(p)
    np.testing.assert_array_equal(slope, 0)


CLASSES = {"nobody": [False] * 5, "all": [True] * 5}


@pytest.mark.parametrize("desirable", CLASSES.values(), ids=CLASSES)
def test_a_batch_without_a_class_has_the_term_of_the_other(desirable):
    data = {**FIVE, "desirable": jnp.array(desirable)}
    r = 0.1 * (LOGP - FIVE["reference"])
    expected = -r.mean() if all(desirable) else np.log(np.exp(r).mean())
    old = jnp.array(0.3)
    for loss in (losses.kldo, functools.partial(losses.kldo_moving_average, log_average=old)):
        value, slope = value_and_grad(lambda x, f=loss: f(x, **data))(LOGP)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        assert np.isfinite(slope).all()
        assert (slope != 0).all()
    after = losses.kldo_log_average(old, LOGP, **data)
    assert (after == old) == all(desirable)


def test_a_batch_without_examples_has_a_loss_of_0_and_moves_no_statistic():
    data = {k: v[:0] for k, v in FIVE.items()}
    old = jnp.array(0.3)
    for loss in (losses.kldo, functools.partial(losses.kldo_moving_average, log_average=old)):
        assert loss(LOGP[:0], **data) == 0
    assert losses.kldo_log_average(old, LOGP[:0], **data) == old
    with pytest.raises(ValueError, match=r"token_logp: got shape \(0, 3\), expected at least one"):
        losses.mean_token_probability(jnp.zeros((0, 3)), jnp.ones((0, 3), bool))


# --- FLAT -----------------------------------------------------------------------------------------

# f(u) of the divergence and g(v) of the output; f*(t) is the largest u t - f(u).
FAMILY = {
    "flat_kl": (lambda u: u * np.log(u), lambda v: v),
    "flat_total_variation": (lambda u: abs(u - 1) / 2, lambda v: np.tanh(v) / 2),
    "flat_jensen_shannon": (
        lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
        lambda v: np.log(2) - np.log1p(np.exp(-v)),
    ),
    "flat_pearson": (lambda u: (u - 1) ** 2, lambda v: v),
    "flat_jeffrey": (lambda u: (u - 1) * np.log(u), lambda v: v),
}


@pytest.mark.parametrize("name", OF_TWO)
def test_flat_is_the_variational_form_of_its_divergence(name):
    f, g = FAMILY[name]
    u = np.arange(1, 60_001) / 10_000  # the maximum is off by less than the square of a step
    good, bad = np.asarray(P)
    conjugate = (u * g(bad) - f(u)).max()
    # Jeffrey's is published as a series, right to third order.
    atol = 0.17**4 if name == "flat_jeffrey" else 1e-7
    np.testing.assert_allclose(getattr(losses, name)(P), -g(good) + conjugate, rtol=0, atol=atol)


@pytest.mark.parametrize("name", OF_TWO)
def test_flat_raises_the_template_and_lowers_what_is_to_be_forgotten(name):
    grid = jnp.stack(jnp.meshgrid(*[jnp.linspace(0, 1, 5)] * 2), axis=-1)
    pull = jax.jit(jax.grad(lambda p: getattr(losses, name)(p).sum()))(grid)
    assert (pull[..., 0] < 0).all()
    assert (pull[..., 1] > 0).all()


def test_mean_token_probability_pulls_each_token_by_its_probability():
    token_logp = jnp.log(jnp.array([[0.5, 0.1, 0.9], [0.3, jnp.nan, -1.0]]))
    is_target = jnp.array([[True, True, True], [True, False, False]])

    def of(x):
        return losses.mean_token_probability(x, is_target)

    value, pull = jax.jit(jax.value_and_grad(of))(token_logp)
    np.testing.assert_allclose(value, 1.8 / 6, rtol=1e-12)
    np.testing.assert_allclose(pull, np.array([[0.5, 0.1, 0.9], [0.3, 0, 0]]) / 6, rtol=1e-12)
    assert float(of(token_logp.at[0, 0].set(-1e4))) > 0
    assert losses.mean_token_probability(token_logp, jnp.zeros((2, 3), bool)) == 0


# --- edges ----------------------------------------------------------------------------------------

EDGES = {
    "policy is reference": [-13.0, -14.2],
    "far above": [-3.0, -10_003.0],
    "far below": [-10_003.0, -3.0],
    "far above the reference": [9_987.0, 9_986.0],
    "probability one": [0.0, 0.0],
    "chosen has probability one": [0.0, -3.0],
    "single tokens": [-0.5, -9.0],
}


@pytest.mark.parametrize("name", [*OF_ONE, *OF_BATCH])
def test_value_and_pull_are_finite_at_the_edges_in_float32(name):
    edges = {k: v for k, v in EDGES.items() if name != "dco" or max(v) <= 0}
    loss = bound(name, dtype=jnp.float32)

    def of(logp, lengths):
        data = loss.keywords | ({"lengths": lengths} if "lengths" in loss.keywords else {})
        if name == "kldo_moving_average":  # as in training: the average has seen the batch
            shared = {k: data[k] for k in ("reference", "desirable")}
            data["log_average"] = losses.kldo_log_average(data["log_average"], logp, **shared)
        value = loss.func(logp, **data)
        return value.sum(), value

    each = jax.jit(jax.vmap(jax.grad(of, has_aux=True), in_axes=(0, None)))
    for lengths in ([9.0, 12.0], [1.0, 1.0], [0.0, 0.0]):
        logp, lengths = (
            jnp.array(list(edges.values()), jnp.float32),
            jnp.array(lengths, jnp.float32),
        )
        pull, value = each(logp, lengths)
        assert value.dtype == pull.dtype == jnp.float32
        for edge, one, both in zip(edges, value, pull, strict=True):
            assert np.isfinite(one).all(), edge
            assert np.isfinite(both).all(), edge


def test_far_rewards_have_the_slopes_of_their_asymptotes():
    far = REFERENCE + jnp.array([1e4, -1e4])
    for name, slopes in {"npo": [2, 0], "bco": [0, 0], "kldo": [-0.1, 0.1]}.items():
        found = grad(lambda x, n=name: bound(n, beta=0.1)(x).sum())(far)
        np.testing.assert_allclose(found, slopes, atol=1e-12)
    wrong = grad(lambda x: bound("bco", beta=0.1)(x).sum())(2 * REFERENCE - far)
    np.testing.assert_allclose(wrong, [-0.1, 0.1], rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_computed_in_float32_and_float64_stays(name):
    narrow = bound(name, dtype=jnp.bfloat16)
    logp = (P if name in OF_TWO else A).astype(jnp.bfloat16)
    wide = {
        k: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v
        for k, v in narrow.keywords.items()
    }

    @jax.jit
    def both(x):
        return narrow(x), narrow.func(x.astype(jnp.float32), **wide)

    found, expected = both(logp)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)
    assert jax.eval_shape(bound(name), P if name in OF_TWO else A).dtype == jnp.float64


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_is_not_hidden(name):
    loss, logp = jax.jit(bound(name)), np.asarray(P if name in OF_TWO else A)
    for place in (0, 1):
        seen = np.isnan(loss(np.where(np.arange(2) == place, np.nan, logp)))
        assert seen[place] if name in OF_ONE else seen


# --- composition ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_batch_axes_are_kept_and_rows_do_not_meet(name):
    logp = -20 * np.random.default_rng(0).random((2, 2))
    logp = np.exp(logp) if name in OF_TWO else logp
    loss = bound(name)
    own = (2,) if name in OF_ONE else ()
    shared = ("delta",)
    data = {
        k: v if k in shared else jnp.broadcast_to(v, (2, *v.shape))
        for k, v in loss.keywords.items()
    }

    def total(x):
        found = loss(x)
        return found.sum(), found

    one = jax.jit(jax.grad(total, has_aux=True))
    expected, rows = (np.stack(each) for each in zip(*map(one, logp), strict=True))
    assert rows.shape == (2, *own)
    np.testing.assert_allclose(jax.jit(loss.func)(logp, **data), rows, rtol=1e-12)
    # jit, vmap and grad in one.
    value, pull = jax.jit(jax.vmap(jax.value_and_grad(lambda x: loss(x).sum())))(logp)
    np.testing.assert_allclose(value, rows.reshape(2, -1).sum(axis=-1), rtol=1e-12)
    np.testing.assert_allclose(pull, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", [n for n in NAMES if bound(n).keywords])
def test_no_gradient_enters_the_data(name):
    loss = bound(name)
    floats = {k: v for k, v in loss.keywords.items() if v.dtype == jnp.float64}
    if not floats:
        return
    slopes = grad(lambda d: loss.func(A, **{**loss.keywords, **d}).sum())(floats)
    assert all((np.asarray(s) == 0).all() for s in slopes.values())


def test_no_aligned_models_are_refused():
    with pytest.raises(ValueError, match=r"aligned: got shape .*, expected .* with models above 0"):
        losses.poft(A, LENGTHS, jnp.zeros((2, 0)))


@pytest.mark.parametrize(("name", "argument", "default"), HYPERPARAMETERS)
def test_hyperparameters_out_of_range_are_named(name, argument, default):
    function = functools.partial(getattr(losses, name), **{**FIVE, **DATA})
    read = inspect.signature(function.func).parameters
    data = {k: v for k, v in DATA.items() if k in read}
    data |= {"state": losses.RunningMean(jnp.zeros(()), jnp.zeros(()))} if "state" in read else {}
    data |= {"logp": A}
    good = {argument: np.float32(default)}
    jax.block_until_ready(function.func(**data, **good))
    also = {"beta": [0.0], "samples": [0.5], "rate": [0.0, 1.5]}
    for value in [-0.5, float("nan"), float("inf"), True, *also[argument]]:
        with pytest.raises(ValueError, match=rf"{argument}: got .+, expected a .*number"):
            function.func(**data, **{argument: value})
