"""What each loss of `jaxpref.losses` should be besides its numbers: limits, symmetries, twins."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_points import LENGTHS, ONES, REFERENCE, A, B, bound

from jaxpref import losses

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
    "f_dpo_alpha of 1 is f_dpo_forward_kl": (
        ("f_dpo_alpha", {"alpha": 1}),
        ("f_dpo_forward_kl", {}),
    ),
    "ln_dpo of single tokens is dpo": (("ln_dpo", {"lengths": ONES, "beta": 0.1}), ("dpo", {})),
    "rpo of no likelihood is dpo": (("rpo", {"eta": 0, "beta": 0.1}), ("dpo", {})),
    "rpo by tokens of no likelihood is dpo": (("rpo_token_mean", {"alpha": 0}), ("dpo", {})),
    "rpo by tokens of single tokens is rpo": (
        ("rpo_token_mean", {"lengths": ONES, "alpha": 0.03}),
        ("rpo", {"beta": 0.1, "eta": 0.3}),
    ),
    "h_dpo of alpha 1 is dpo": (("h_dpo", {"alpha": 1}), ("dpo", {})),
    "cal_dpo of no squares is dpo": (("cal_dpo", {"lam": 0}), ("dpo", {"beta": 1})),
    "comp_sum of q 1 is mae": (
        ("comp_sum_generalised_cross_entropy", {"q": 1}),
        ("comp_sum_mae", {}),
    ),
    "aot of one pair is dpo": (("aot", {"beta": 0.1}), ("dpo", {})),
    "aot of one pair and flips is cdpo": (
        ("aot", {"beta": 0.1, "epsilon": 0.2}),
        ("cdpo", {"epsilon": 0.2}),
    ),
    "aot_unpaired of one pair is dpo": (("aot_unpaired", {"beta": 0.1}), ("dpo", {})),
    "d2o of one sample is dpo": (("d2o", {}), ("dpo", {})),
    "d2o of one sample and less rejection is dpo_shift": (
        ("d2o", {"alpha": 0.06}),
        ("dpo_shift", {"shift": 0.6}),
    ),
    "exo of two is exo_pair": (
        ("exo", {"rewards": jnp.log(jnp.array([0.98, 0.02])), "temperature": 1}),
        ("exo_pair", {"epsilon": 0.02}),
    ),
    "rrhf_list of two is rrhf": (("rrhf_list", {}), ("rrhf", {})),
    "aft of two is simpo without target": (("aft", {}), ("simpo", {"beta": 1, "gamma": 0})),
    "logic_cpo is simpo without target": (("logic_cpo", {}), ("simpo", {"beta": 1, "gamma": 0})),
    "confpo of the two halves is simpo": (
        ("confpo", {"beta": 0.4, "gamma": 0.3}),
        # By loss_points.SHARES two of the chosen tokens are kept and one of the rejected.
        ("simpo", {"lengths": jnp.array([1 / 0.375, 1 / 0.5]), "beta": 0.4, "gamma": 0.3}),
    ),
    "simpo of single tokens and no target is dpo without reference": (
        ("simpo", {"lengths": ONES, "gamma": 0, "beta": 0.3}),
        ("dpo", {"beta": 0.3, **NO_REFERENCE}),
    ),
}


@pytest.fixture(scope="module")
def twins():
    """Values and slopes of all twins at A and B, ``[points ...]``, in one program."""

    def of(name, arguments):
        def value(logp):
            found = bound(name, **arguments)(logp)
            return found.sum(), found

        return jax.vmap(jax.grad(value, has_aux=True))(jnp.stack([A, B]))

    return jax.jit(lambda: {name: [of(*one) for one in both] for name, both in TWINS.items()})()


@pytest.mark.parametrize("at", [0, 1], ids="AB")
@pytest.mark.parametrize("name", TWINS)
def test_special_cases(twins, name, at):
    for found, expected in zip(*twins[name], strict=True):  # slopes, values
        np.testing.assert_allclose(found[at], expected[at], rtol=1e-12)


MARGIN_ONLY = ["dpo", "cdpo", "robust_dpo", "ipo", "hinge", "r_dpo", "h_dpo", "exo_pair"]
MARGIN_ONLY += ["discopop", "comp_sum_exponential", "comp_sum_generalised_cross_entropy"]
MARGIN_ONLY += ["comp_sum_mae", "aot", "exo"]


@pytest.fixture(scope="module")
def pulls():
    """Of losses at five random pairs, ``[pairs 2]``, in one program."""
    logp = np.asarray(REFERENCE) + 5 * np.random.default_rng(0).normal(size=(5, 2))
    some = {name: bound(name) for name in MARGIN_ONLY} | {
        "dpo_shift": bound("dpo_shift", shift=0.6)
    }
    return jax.jit(
        lambda logp: {name: jax.vmap(jax.grad(loss))(logp) for name, loss in some.items()}
    )(logp)


@pytest.mark.parametrize("name", MARGIN_ONLY)
def test_margin_losses_push_both_responses_equally(name, pulls):
    np.testing.assert_allclose(np.asarray(pulls[name]).sum(axis=1), 0, atol=1e-12)


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
        ("sppo_soft", [300.0, -200.0]),
        ("exo_pair", [jnp.log(999.0) / 0.1, 0.0]),
        ("exo", [2 / 0.1, 0.0]),
    ],
)
def test_targets_are_minima(name, log_ratio):
    at = np.asarray(REFERENCE) + np.array(log_ratio)
    rows = at + np.array([[0, 0], [1e-3, 0], [-1e-3, 0]])
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(bound(name))))(rows)
    np.testing.assert_allclose(slopes[0], 0, atol=1e-12)
    least, *others = np.asarray(values)
    assert all(value > least for value in others)


def test_dpop_pulls_the_chosen_harder_while_it_is_below_its_reference():
    pull = jax.grad(bound("dpop", lam=5))(B)
    np.testing.assert_allclose(-pull[0] / pull[1], 6, rtol=1e-12)


def test_dpo_shift_pulls_the_rejected_less_at_every_margin(pulls):
    up, down = np.asarray(pulls["dpo_shift"]).T
    np.testing.assert_allclose(-down / up, 0.6, rtol=1e-12)


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


def test_no_gradient_enters_the_baseline():
    slope = jax.grad(lambda z: bound("kto", kl_baseline=z)(A).sum())(jnp.array(0.3))
    assert float(slope) == 0.0


# --- other functions of the margin, other divergences ---------------------------------------------


def pull(name, logp, **arguments):
    return np.asarray(jax.jit(jax.grad(bound(name, **arguments)))(logp))


@pytest.mark.parametrize("logp", [A, B], ids="AB")
def test_comp_sum_losses_are_functions_of_one_probability(logp):
    dpo = bound("dpo")(logp)
    p = np.exp(-dpo)
    np.testing.assert_allclose(bound("comp_sum_exponential")(logp), 1 / p - 1, rtol=1e-12)
    np.testing.assert_allclose(bound("comp_sum_mae")(logp), 1 - p, rtol=1e-12)
    found = bound("comp_sum_generalised_cross_entropy", q=0.3)(logp)
    np.testing.assert_allclose(found, (1 - p**0.3) / 0.3, rtol=1e-12)


LIMITS = {  # the argument that goes to 0, and what is left
    "comp_sum_generalised_cross_entropy": ("q", "dpo", {}),
    "f_dpo_alpha": ("alpha", "dpo", {}),
    "alphapo": ("alpha", "simpo", {"beta": 2.5, "gamma": 0.1}),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name):
    argument, other, settings = LIMITS[name]
    expected = bound(other, **settings)(A)
    far, near = (bound(name, **{argument: x})(A) - expected for x in (1e-3, 1e-4))
    assert abs(near) < 1e-3
    np.testing.assert_allclose(far / near, 10, rtol=0.01)  # of first order


def test_exo_of_even_labels_does_not_care_which_is_chosen():
    swapped = bound("exo_pair", epsilon=0.5, reference=REFERENCE[::-1])(A[::-1])
    np.testing.assert_allclose(swapped, bound("exo_pair", epsilon=0.5)(A), rtol=1e-12)


def test_exo_is_the_divergence_of_two_softmaxes():
    rewards = np.array([0.4, -1.0, 2.0])
    logp, reference = np.array([-3.0, -4.0, -6.5]), np.array([-2.5, -4.5, -5.0])
    q, p = (np.exp(x) / np.exp(x).sum() for x in (0.3 * (logp - reference), rewards / 0.7))
    found = losses.exo(logp, reference, rewards, beta=0.3, temperature=0.7)
    np.testing.assert_allclose(found, (q * np.log(q / p)).sum(), rtol=1e-12)


def test_discopop_is_logistic_below_and_exponential_above():
    below, above = REFERENCE + jnp.array([-9.0, 0.0]), REFERENCE + jnp.array([9.0, 0.0])
    found = [bound("discopop", beta=0.1, tau=0.01)(x) for x in (below, above)]
    np.testing.assert_allclose(found, [np.log1p(np.exp(0.9)), np.exp(-0.9)], rtol=1e-12)


def test_discopop_pulls_the_wrong_way_between_its_extrema():
    at = [
        -0.13,
        -0.11,
        0.0,
        0.06,
        0.08,
    ]  # times the scale, the minimum is -0.119, the maximum 0.072
    d = [-pull("discopop", REFERENCE + jnp.array([x / 0.05, 0.0]))[0] for x in at]
    assert np.array_equal(np.sign(d), [1, -1, -1, -1, 1])
    np.testing.assert_allclose(d[2] / 0.05, -0.784, atol=5e-4)


def test_jensen_shannon_is_dpo_of_half_the_scale_near_the_reference():
    near = REFERENCE + jnp.array([1e-6, -2e-6])
    expected = pull("dpo", near, beta=0.05)
    np.testing.assert_allclose(pull("f_dpo_jensen_shannon", near), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "slope"),
    [
        ("f_dpo_forward_kl", lambda u: np.exp(-u)),
        ("f_dpo_jensen_shannon", lambda u: 1 / (1 + np.exp(u))),
        ("f_dpo_alpha", lambda u: np.exp(-0.5 * u)),
        ("chi_po", lambda u: 1 + np.exp(u)),
    ],
)
def test_divergences_share_the_pull_by_their_own_slope(name, slope):
    found = pull(name, A)
    u = np.asarray(A - REFERENCE)
    np.testing.assert_allclose(-found[0] / found[1], slope(u[0]) / slope(u[1]), rtol=1e-12)


def test_chi_po_is_clipped_at_twice_the_range():
    far = bound("chi_po", r_max=0.4)(REFERENCE + jnp.array([3.0, -3.0]))
    np.testing.assert_allclose(far, np.log1p(np.exp(-0.8)), rtol=1e-12)


def test_chi_po_keeps_its_order_where_its_exponential_overflows():
    far = REFERENCE.astype(jnp.float32) + jnp.array([1e4, 9e3], jnp.float32)
    chi_po = bound("chi_po", dtype=jnp.float32)
    np.testing.assert_allclose(chi_po(far), np.log1p(np.exp(-2.0)), rtol=1e-6)
    swapped = functools.partial(chi_po, reference=chi_po.keywords["reference"][::-1])
    np.testing.assert_allclose(swapped(far[::-1]), np.log1p(np.exp(2.0)), rtol=1e-6)


# --- each response for itself ---------------------------------------------------------------------


@pytest.mark.parametrize("logp", [A, B], ids="AB")
def test_apo_zero_is_kto_at_a_baseline_of_nothing(logp):
    np.testing.assert_allclose(bound("apo_zero")(logp), bound("kto")(logp).sum(), rtol=1e-12)


def test_apo_down_leaves_the_chosen_alone_at_the_reference_and_lowers_both_near_it():
    np.testing.assert_allclose(pull("apo_down", REFERENCE), [0.0, 0.025], atol=1e-15)
    near = pull("apo_down", REFERENCE + jnp.array([0.5, -0.5]))
    assert near.min() > 0


def test_nca_holds_the_chosen_at_log_two_and_lets_the_rejected_go():
    at = REFERENCE + jnp.array([np.log(2) / 0.1, -40.0])
    found = pull("nca_pair", at, beta=0.1)
    np.testing.assert_allclose(found, [0.0, 0.05 / (1 + np.exp(4.0))], atol=1e-15)


@pytest.mark.parametrize("logp", [A, B], ids="AB")
def test_sppo_of_hard_labels_is_twice_the_soft_loss(logp):
    soft = bound("sppo_soft", win_probability=jnp.array([1.0, 0.0]))(logp)
    np.testing.assert_allclose(bound("sppo")(logp), 2 * soft, rtol=1e-12)


def test_sppo_raises_a_rejected_response_that_mostly_wins():
    found = pull("sppo_soft", REFERENCE, win_probability=jnp.array([0.9, 0.7]))
    np.testing.assert_allclose(found, [-400.0, -200.0], rtol=1e-12)


def test_cal_dpo_is_at_rest_only_without_the_logistic_term():
    at = REFERENCE + jnp.array([5.0, -5.0])
    np.testing.assert_allclose(pull("cal_dpo", at, beta=0.1), pull("dpo", at, beta=1), rtol=1e-12)


# --- probabilities of tokens ----------------------------------------------------------------------


def test_mapo_of_equal_means_is_the_likelihood_and_a_constant():
    found = bound("mapo", beta=0.3)(-1.5 * LENGTHS)
    np.testing.assert_allclose(found, 1.5 + 0.3 * np.log(2), rtol=1e-12)


def test_mapo_is_smooth_where_its_series_takes_over():
    def amplified(a):  # the difference to a certain response, whose value is 1
        likelihood = bound("mapo", lengths=ONES, beta=1, scale=1)(jnp.array([a, 0.0]))
        return -jnp.log(jnp.expm1(likelihood + a)) + 1

    for a in (-1.0002e-3, -0.9998e-3):
        exact = a / -np.expm1(-a)
        np.testing.assert_allclose(amplified(a), exact, rtol=1e-12)
    slopes = [pull("mapo", jnp.array([-2.0, a]), lengths=ONES)[1] for a in (-1.0002e-3, -0.9998e-3)]
    np.testing.assert_allclose(slopes[0], slopes[1], rtol=1e-6)


def test_alphapo_pulls_by_how_improbable_a_response_is():
    found = pull("alphapo", A, lengths=2 * ONES, alpha=0.5)
    np.testing.assert_allclose(-found[1] / found[0], np.exp(0.25 * (15.1 - 12.3)), rtol=1e-12)


def test_confpo_keeps_the_tokens_below_the_mean_probability():
    logp = -3 * np.random.default_rng(0).random((4, 2, 7))
    scored = np.arange(7) < np.array([[5, 7], [2, 3], [6, 2], [4, 7]])[..., None]

    def one(logp, scored):
        p = np.exp(logp[scored])
        return logp[scored][p < p.mean()].mean()

    b = np.array(
        [
            [one(*side) for side in zip(*pair, strict=True)]
            for pair in zip(logp, scored, strict=True)
        ]
    )
    x = 1.5 * (b[:, 0] - b[:, 1]) - 1.6
    found = jax.jit(losses.confpo)(np.where(scored, logp, -99.0), scored)
    np.testing.assert_allclose(found, np.log1p(np.exp(-x)), rtol=1e-12)


def test_confpo_compares_tokens_whose_probabilities_underflow():
    logp = jnp.array([[-200.0, -300.0], [-1.0, -2.0]], jnp.float32)
    found = losses.confpo(logp, jnp.ones((2, 2), bool))
    np.testing.assert_allclose(found, 1.5 * (300 - 2) + 1.6, rtol=1e-6)


def test_confpo_drops_pairs_with_a_response_of_equal_tokens():
    logp = jnp.array([[[-1.0, -2.0], [-3.0, -3.0]], [[-1.0, 0.0], [-1.0, -2.0]]])
    scored = jnp.array([[[True, True], [True, True]], [[True, False], [True, True]]])
    value, slope = jax.jit(jax.value_and_grad(lambda x: losses.confpo(x, scored).sum()))(logp)
    assert float(value) == 0.0
    np.testing.assert_array_equal(slope, 0)


# --- the logic of preferences ---------------------------------------------------------------------


W, L = np.array([True, True, False, False]), np.array([True, False, True, False])
IMPLIES, TRUE, FALSE = ~L | W, np.full(4, True), np.full(4, False)
LOGIC = {  # statement, condition, exception, as truth values of the four worlds
    "orpo": (IMPLIES, W ^ L, FALSE),
    "cpo": (IMPLIES, W | L, W & L),
    "ccpo": (IMPLIES, W | L, FALSE),
    "cunl": (~L, W | L, FALSE),
    "qfunl": (IMPLIES, ~(W & L), ~W & ~L),
    "cfunl": (IMPLIES, ~(W & L), FALSE),
    "cce": (W, ~(W & L), FALSE),
    "uncpo": (IMPLIES, TRUE, FALSE),
    "ce": (W, TRUE, FALSE),
    "unl": (~L, TRUE, FALSE),
    "ceunl": (W & ~L, TRUE, FALSE),
    "l_bn": (IMPLIES, TRUE, W & L),
    "l_bd": (W, TRUE, W & L),
    "l_bb": (IMPLIES, TRUE, W == L),
    "l_nb": (IMPLIES, TRUE, ~W & ~L),
    "l_db": (W & ~L, TRUE, ~W & ~L),
}


@pytest.mark.parametrize("name", LOGIC)
def test_logic_losses_count_the_worlds_of_their_formulas(name):
    statement, condition, exception = LOGIC[name]
    p_w, p_l = np.exp(np.asarray(A / LENGTHS))
    weight = np.where(W, p_w, 1 - p_w) * np.where(L, p_l, 1 - p_l)
    pro = weight[(statement | exception) & condition].sum()
    con = weight[(~statement | exception) & condition].sum()
    found = bound(f"logic_{name}", beta=0.7)(A)
    np.testing.assert_allclose(found, np.log1p((con / pro) ** 0.7), rtol=1e-12)


def test_all_sixteen_ways_to_count_two_worlds_are_there():
    ways = set()
    for statement, condition, exception in LOGIC.values():
        counts = [(statement | exception) & condition, (~statement | exception) & condition]
        ways.add(tuple(bool(row[world]) for world in (0, 3) for row in counts))
    assert ways == set(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize("logp", [A, B], ids="AB")
def test_logic_has_likelihood_and_unlikelihood(logp):
    a = np.asarray(logp / LENGTHS)
    ce, unl = bound("logic_ce")(logp), bound("logic_unl")(logp)
    np.testing.assert_allclose(ce, -a[0], rtol=1e-12)
    np.testing.assert_allclose(unl, -np.log1p(-np.exp(a[1])), rtol=1e-12)
    np.testing.assert_allclose(bound("logic_ceunl")(logp), ce + unl, rtol=1e-12)
    orpo = bound("orpo", lam=0.4)(logp)
    np.testing.assert_allclose(orpo, ce + 0.4 * bound("logic_orpo")(logp), rtol=1e-12)


def test_logic_reads_no_response_that_its_formula_lacks():
    far = jnp.array([-1e4, -0.1], jnp.float32)
    data = {"dtype": jnp.float32}
    assert pull("logic_ce", far, **data)[1] == 0
    assert pull("logic_unl", far[::-1], **data)[0] == 0


# --- several responses ----------------------------------------------------------------------------


def four():
    """Log-probabilities, lengths and grades of four responses to three prompts."""
    logp = -20 * np.random.default_rng(0).random((3, 4))
    grades = np.array([[1, 0, 0, 1], [3, 2, 1, 0], [2, 2, 2, 2]])
    return logp, np.array([[3.0, 5.0, 4.0, 6.0]] * 3), grades


def comparisons(grades):
    return [(i, j) for i in range(4) for j in range(4) if grades[i] > grades[j]]


def test_rrhf_list_sums_over_comparisons():
    logp, lengths, grades = four()
    expected = []
    for row, a, r in zip(logp, logp / lengths, grades, strict=True):
        rank = sum(max(0.0, float(a[j] - a[i])) for i, j in comparisons(r))
        expected.append(rank - 0.7 * float(row[r.argmax()]))
    found = jax.jit(functools.partial(losses.rrhf_list, lam=0.7))(logp, lengths, grades)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_aft_sums_over_comparisons_with_and_without_constraints():
    logp, lengths, grades = four()
    plain, bounded = [], []
    for a, r in zip(np.asarray(logp / lengths), grades, strict=True):
        worst = {j: min(a[i] for i, k in comparisons(r) if k == j) for _, j in comparisons(r)}
        terms = [np.exp(a[j] - a[i]) for i, j in comparisons(r)]
        lifts = [np.exp(worst[j] - 0.4 - a[j]) for _, j in comparisons(r)]
        plain.append(np.log1p(sum(terms)))
        bounded.append(np.log1p(sum(terms + lifts)))
    data, some = (logp, lengths, grades), (losses.aft, losses.aft_detached)
    some += (functools.partial(losses.aft_boundary, boundary=0.2),)
    found = jax.jit(lambda *data: [loss(*data) for loss in some])(*data)
    for one, expected in zip(found, (plain, plain, bounded), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-12)
    assert plain[2] == 0


def test_aft_detached_only_raises_and_aft_boundary_is_at_rest_on_its_boundary():
    logp, lengths, grades = four()

    @jax.jit
    def slopes(logp):
        some = (losses.aft_detached, losses.aft)
        return [jax.grad(lambda x, f=f: f(x, lengths, grades).sum())(logp) for f in some]

    slope, whole = map(np.asarray, slopes(logp))
    assert slope.max() == 0
    np.testing.assert_allclose(slope[0, grades[0] == 1], whole[0, grades[0] == 1], rtol=1e-12)
    rest = pull("aft_boundary", jnp.array([-2.0, -2.3]), lengths=ONES, boundary=0.3)
    assert rest[0] < 0
    np.testing.assert_allclose(rest[1], 0, atol=1e-15)


AFT = (losses.aft, losses.aft_detached, losses.aft_boundary)


@pytest.mark.parametrize("loss", [*AFT, losses.rrhf_list], ids=lambda f: f.__name__)
def test_a_grade_that_is_nan_is_not_hidden_and_no_prompts_have_no_losses(loss):
    logp, lengths, grades = four()
    grades = np.asarray(grades, float)
    grades[1, 2] = np.nan
    data = logp, lengths, grades

    @jax.jit
    def of(*data):
        one = loss(*(x[:, :1] for x in data)) if loss in AFT else 0
        return loss(*data), loss(*(x[:0] for x in data)), one

    whole, none, one = of(*data)
    assert np.array_equal(np.isnan(whole), np.arange(len(logp)) == 1)
    assert none.shape == (0,)
    np.testing.assert_array_equal(one, 0)


def test_d2o_takes_the_mean_of_its_samples():
    logp, reference = jnp.array([-3.0, -5.0, -4.0, -6.0]), jnp.array([-3.5, -4.0, -4.2, -5.0])
    x = 0.2 * (0.5 - 1.0 + 0.2) / 3 - 0.4 * -1.0
    found = losses.d2o(logp, reference, beta=0.2, alpha=0.4)
    np.testing.assert_allclose(found, np.log1p(np.exp(-x)), rtol=1e-12)


def test_d2o_needs_a_sample():
    with pytest.raises(ValueError, match=r"logp: got shape \(1,\), expected samples and one"):
        losses.d2o(jnp.zeros(1), jnp.zeros(1))


# --- a batch as a whole ---------------------------------------------------------------------------


def batch():
    return -9 * np.random.default_rng(0).random((2, 5, 2))


def test_aot_compares_sorted_margins():
    logp, reference = batch()
    margin = logp[:, 0] - logp[:, 1]
    delta = np.sort(margin) - np.sort(reference[:, 0] - reference[:, 1])
    expected = np.log1p(np.exp(-0.3 * delta))
    found = losses.aot(logp, reference, beta=0.3)
    np.testing.assert_allclose(np.sort(found)[::-1], np.sort(expected)[::-1], rtol=1e-12)
    order = np.argsort(margin)
    np.testing.assert_allclose(found[order], expected, rtol=1e-12)


def test_aot_unpaired_compares_sorted_log_ratios():
    logp, reference = batch()
    u = np.asarray(logp - reference)
    expected = np.log1p(np.exp(-0.3 * (np.sort(u[:, 0]) - np.sort(u[:, 1]))))
    found = losses.aot_unpaired(logp, reference, beta=0.3)
    np.testing.assert_allclose(found[np.argsort(u[:, 0])], expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_the_gradient_goes_through_the_sort(name):
    logp, reference = batch()
    loss = functools.partial(getattr(losses, name), beta=0.3)
    total = jax.jit(jax.value_and_grad(lambda x: loss(x, reference).sum()))
    slope = np.asarray(total(logp)[1])
    for at in np.ndindex(5, 2):
        step = np.zeros((5, 2))
        step[at] = 1e-5
        ends = [float(total(logp + s * step)[0]) for s in (1, -1)]
        np.testing.assert_allclose(slope[at], (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


def test_aot_unpaired_does_not_know_the_pairs():
    logp, reference = batch()
    mixed = [np.stack([x[:, 0], x[::-1, 1]], axis=1) for x in (logp, reference)]
    found = losses.aot_unpaired(*mixed, beta=0.3)
    np.testing.assert_allclose(found, losses.aot_unpaired(logp, reference, beta=0.3), rtol=1e-12)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_batches_do_not_meet(name):
    logp, reference = batch()
    other = logp[::-1] - 1
    loss = jax.jit(getattr(losses, name))
    both = loss(np.stack([logp, other]), np.stack([reference, reference]))
    for one, found in zip((logp, other), np.asarray(both), strict=True):
        np.testing.assert_allclose(found, loss(one, reference), rtol=1e-12)


# --- weights --------------------------------------------------------------------------------------


def test_wpo_weighs_a_pair_by_its_likeness_to_the_policys_own():
    p = np.array([0.5, 0.3, 0.2])
    logp = np.log([p[0] * p[1], p[2]])  # responses of two tokens and of one
    collision = np.log((p**2).sum()) * np.array([2, 1])
    found = losses.wpo_weight(logp, collision, np.array([2, 1]))
    expected = np.sqrt(p[0] * p[1]) * p[2] / (p**2).sum() ** 2
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_wpo_weight_has_no_gradient():
    slope = jax.grad(lambda x: losses.wpo_weight(x, x - 1.0, LENGTHS))(A)
    np.testing.assert_array_equal(slope, 0)


def test_ld_logp_counts_positions_from_the_first_scored_token(key):
    logp = np.asarray(-jax.random.uniform(key, (2, 2, 6)))
    start, n = np.array([[1, 2], [0, 3]]), np.array([[4, 2], [3, 3]])
    scored = (np.arange(6) >= start[..., None]) & (np.arange(6) < (start + n)[..., None])
    found = losses.ld_logp(logp, scored, alpha=0.3)
    head = logp[0, 0, 1:3].sum() + 0.3 * logp[0, 0, 3:5].sum()
    expected = [[head, logp[0, 1, 2:4].sum()], [logp[1, 0, :3].sum(), logp[1, 1, 3:].sum()]]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_ld_logp_of_alpha_one_is_the_sum(key):
    logp = -jax.random.uniform(key, (3, 2, 6))
    scored = jnp.broadcast_to(jnp.arange(6) < 4, logp.shape)
    found = losses.ld_logp(logp, scored, alpha=1)
    np.testing.assert_allclose(found, logp[..., :4].sum(-1), rtol=1e-12)


def test_ld_logp_refuses_other_weights():
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"alpha: got .+, expected a number from 0 to 1"):
            losses.ld_logp(jnp.zeros((2, 1)), jnp.ones((2, 1), bool), alpha=bad)
