"""Losses that read tokens, divergences or features: points, laws, masks, edges."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.test_util import check_grads
from loss_points import LENGTHS, REFERENCE, A, B, Point, read

from jaxpref import logprobs, losses

NAN = float("nan")
# Three tokens and two; the NaN stand where nothing may be read.
TOKENS = jnp.array([[-1.2, -0.7, -2.0], [-0.9, -3.1, NAN]])
DATA = {
    "reference": REFERENCE,
    "lengths": LENGTHS,
    "kl": jnp.array([0.8, 1.7]),
    "distance": jnp.array([0.2, 0.7]),
    "token_reference": jnp.array([[-1.0, -1.1, -2.6], [-1.3, -2.2, NAN]]),
    "token_kl": jnp.array([[0.05, 0.2, 0.11], [0.3, 0.02, NAN]]),
    "token_reverse_kl": jnp.array([[0.05, 0.2, 0.11], [0.3, 0.02, NAN]]),
    "mask": jnp.array([[1.0, 0.5, 0.0], [0.25, 2.0, NAN]]),
    "weights": jnp.array([[1.0, 0.5, 0.0], [0.25, 2.0, NAN]]),
    "kl_mask": jnp.array([[0.2, 1.0, 0.7], [0.0, 0.4, NAN]]),
    "is_target": jnp.array([[True, True, True], [True, True, False]]),
    "key": jax.random.key(0),
}
REAL = DATA["is_target"]


def grad(function, **options):
    """One program, not one an operation."""
    return jax.jit(jax.grad(function, **options))


def value_and_grad(function, **options):
    return jax.jit(jax.value_and_grad(function, **options))


def bound(name, *, dtype=jnp.float64, **arguments):
    """The loss as a function of its log-probabilities: what it reads of DATA, unless given here."""
    data = read(name, DATA, dtype)
    return functools.partial(getattr(losses, name), **{**data, **arguments})


HALF = {"beta": 0.5}
# Computed from the papers' formulas in 40 digits, with numerical derivatives, outside this library.
POINTS = [
    Point("tdpo1", {"beta": 0.1}, A, 0.658760, 0.048251, 0.048251),
    Point("tdpo1", {"beta": 0.1}, B, 0.837232, 0.056709, 0.056709),
    Point("tdpo2", {"beta": 0.1, "alpha": 0.5}, A, 0.637299, 0.047128, 0.047128),
    Point("tdpo2", {"beta": 0.1, "alpha": 0.5}, B, 0.811962, 0.055601, 0.055601),
    Point("tdpo2", {"beta": 0.3, "alpha": 2}, A, 0.723597, 0.154499, 0.154499),
    Point("fpo", {"beta": 2, "alpha": 0.5}, A, 0.795088, 0.121880, 0.091410),
    Point("fpo", {"beta": 2, "alpha": 0.5}, B, 1.190349, 0.154641, 0.115981),
    Point(
        "sparsepo",
        {**HALF, "lam": 0.01, "kl_lam": 0.02},
        TOKENS,
        *(0.399596, [0.135505, 0.067753, 0], [0.033876, 0.271011, 0]),
    ),
    Point(
        "tis_dpo",
        HALF,
        TOKENS,
        *(0.355865, [0.149716, 0.074858, 0], [0.037429, 0.299433, 0]),
    ),
    Point(
        "tis_dpo_with_kl",
        {**HALF, "alpha": 0.5},
        TOKENS,
        *(0.358493, [0.150636, 0.075318, 0], [0.037659, 0.301272, 0]),
    ),
    Point("sampo", {**HALF, "key": (0, 1)}, TOKENS, 0.533382, [0.206691] * 2 + [0], [0.206691] * 2),
    Point("sampo", {**HALF, "key": (0, 2)}, TOKENS, 0.493249, [0.19468, 0, 0.19468], [0.19468] * 2),
    Point("sampo", {**HALF, "key": (1, 2)}, TOKENS, 0.386871, [0] + [0.160411] * 2, [0.160411] * 2),
]
NAMES = sorted({point.name for point in POINTS})
OF_TOKENS = ("sampo", "sparsepo", "tis_dpo", "tis_dpo_with_kl")
TRAINED = {  # what beside the log-probabilities is a function of the policy, or a parameter
    "tdpo1": ["kl"],
    "tdpo2": ["kl"],
    "fpo": ["distance"],
    "sparsepo": ["token_kl", "mask", "kl_mask"],
    "tis_dpo_with_kl": ["token_reverse_kl"],
}
HYPERPARAMETERS = [
    (name, p.name, p.default)
    for name in [*NAMES, "tis_weights"]
    for p in inspect.signature(getattr(losses, name)).parameters.values()
    if p.kind is p.KEYWORD_ONLY
]


@functools.cache
def draws(chosen):
    """A key for which `sampo` reads these tokens of the chosen response."""
    for number in range(100):
        key = jax.random.key(number)
        if tuple(np.flatnonzero(losses.sampo_positions(REAL, key)[0])) == chosen:
            return key
    raise AssertionError(f"none of 100 draws is {chosen}")


def arguments_of(point):
    chosen = point.arguments.get("key")
    return {**point.arguments, **({"key": draws(chosen)} if chosen else {})}


def label(point):
    settings = ",".join(f"{k}={v}" for k, v in point.arguments.items())
    return f"{point.name}({settings}){'A' if point.logp is A else 'B' if point.logp is B else ''}"


def somewhere(name):
    return TOKENS if name in OF_TOKENS else A


@pytest.mark.parametrize("point", POINTS, ids=label)
def test_value_and_pulls_are_those_of_the_formula(point):
    value, pull = value_and_grad(bound(point.name, **arguments_of(point)))(point.logp)
    # The numbers are written with six decimals.
    np.testing.assert_allclose(value, point.value, rtol=0, atol=6e-7)
    rows = [pull] if pull.ndim == 1 else pull
    expected = np.zeros(np.shape(rows))
    for side, (d, sign) in enumerate(((point.d_w, -1), (point.d_l, 1))):
        row = expected[0, side : side + 1] if pull.ndim == 1 else expected[side]
        row[: np.size(d)] = sign * np.array(d)
    np.testing.assert_allclose(rows, expected, rtol=0, atol=6e-7)


@pytest.mark.parametrize("point", POINTS, ids=label)
def test_derivatives_agree_with_finite_differences(point):
    """Also by what else is trained; the stopped half of a divergence aside."""
    trained = [n for n in TRAINED.get(point.name, []) if point.name not in ("tdpo2", "fpo")]
    arguments = arguments_of(point)

    def loss(logp, *others):
        other = dict(zip(trained, others, strict=True))
        return bound(point.name, **{**arguments, **other})(logp)

    loss = jax.jit(loss)
    at = [point.logp, *[DATA[name] + 0.03 for name in trained]]  # away from masks of 0, a kink
    at = [jnp.nan_to_num(x) for x in at]  # differences cannot be taken at NaN
    # In float64 a central difference is good to about 1e-9 of the value.
    check_grads(loss, tuple(at), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


# --- laws: divergences ----------------------------------------------------------------------------


def test_tdpo2_of_no_divergence_is_dpo():
    for name in ("tdpo1", "tdpo2"):
        none = bound(name, **({"alpha": 0} if name == "tdpo2" else {"kl": jnp.zeros(2)}))
        found, expected = (value_and_grad(f)(B) for f in (none, dpo))
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-12)


def dpo(logp):
    return losses.dpo(logp, REFERENCE)


def test_tdpo1_and_tdpo2_of_alpha_1_differ_by_the_stopped_gradient_only():
    one, two = (
        value_and_grad(lambda kl, f=f: f(A, REFERENCE, kl))
        for f in (
            losses.tdpo1,
            functools.partial(losses.tdpo2, alpha=1),
        )
    )
    kl = DATA["kl"]
    np.testing.assert_allclose(one(kl)[0], two(kl)[0], rtol=1e-12)
    pull = 0.1 / (1 + np.exp(0.1 * (1.6 - 0.9)))
    np.testing.assert_allclose(one(kl)[1], [-pull, pull], rtol=1e-12)
    np.testing.assert_allclose(two(kl)[1], [0, pull], rtol=1e-12)


@pytest.fixture(scope="module")
def small_model():
    """Hidden states, unembedding and targets of one pair: 3 positions, 5 tokens, width 4."""
    keys = jax.random.split(jax.random.key(3), 3)
    hidden = jax.random.normal(keys[0], (2, 3, 4))
    unembedding = jax.random.normal(keys[1], (5, 4))
    return hidden, unembedding, jax.random.randint(keys[2], (2, 3), 0, 5)


def scores(hidden, small_model):
    """``logp`` and ``D`` of both responses, brute force over the vocabulary."""
    still, unembedding, targets = small_model
    log_p, log_q = (jax.nn.log_softmax(h @ unembedding.T, axis=-1) for h in (hidden, still))
    token_logp = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    divergence = (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1)
    return jnp.where(REAL, token_logp, 0).sum(axis=-1), jnp.where(REAL, divergence, 0).sum(axis=-1)


@pytest.mark.parametrize("loss", [losses.tdpo1, losses.tdpo2], ids=["tdpo1", "tdpo2"])
def test_the_first_step_of_tdpo_is_that_of_dpo(loss, small_model):
    still = small_model[0]
    reference, _ = scores(still, small_model)

    def tdpo(hidden):
        logp, kl = scores(hidden, small_model)
        return loss(logp, reference, kl)

    @jax.jit
    def both(hidden):
        plain = grad(lambda h: losses.dpo(scores(h, small_model)[0], reference))(hidden)
        return grad(tdpo)(hidden), plain

    np.testing.assert_allclose(*both(still), rtol=1e-10, atol=1e-14)
    later, moved = both(1.3 * still)
    assert np.abs(later - moved).max() > 1e-3


def test_token_kl_gives_the_divergence_that_the_docstring_says(small_model):
    still, unembedding, _ = small_model
    moved = 1.3 * still
    kl = logprobs.token_kl(still, unembedding, moved, unembedding)
    found = jnp.where(REAL, kl, 0).sum(axis=-1)
    np.testing.assert_allclose(found, scores(moved, small_model)[1], rtol=1e-10)


def test_a_tokens_advantage_has_mean_zero_with_the_divergence_of_its_own_sign(small_model):
    """``u - KL(π || ref)`` under the policy, ``u + KL(ref || π)`` under the reference."""
    still, unembedding, _ = small_model
    log_p, log_q = (jax.nn.log_softmax(h @ unembedding.T, axis=-1) for h in (1.3 * still, still))
    u = log_p - log_q
    reverse = losses.kl_divergence(log_p, log_q)[..., None]
    forward = losses.kl_divergence(log_q, log_p)[..., None]
    np.testing.assert_allclose((jnp.exp(log_p) * (u - reverse)).sum(axis=-1), 0, atol=1e-14)
    np.testing.assert_allclose((jnp.exp(log_q) * (u + forward)).sum(axis=-1), 0, atol=1e-14)


# --- laws: masks and weights ----------------------------------------------------------------------

ONES = {name: jnp.ones((2, 3)) for name in ("mask", "kl_mask", "weights")}
FLOATS = {"logp": TOKENS, **{k: v for k, v in DATA.items() if v.dtype == jnp.float64}}
SUMS = {k: jnp.where(REAL, v, 0).sum(axis=-1) for k, v in FLOATS.items() if v.ndim == 2}
TWINS = {
    "sparsepo of ones is tdpo1": (
        ("sparsepo", ONES),
        lambda: losses.tdpo1(SUMS["logp"], SUMS["token_reference"], SUMS["token_kl"]),
    ),
    "sparsepo of ones without divergence is dpo": (
        ("sparsepo", {**ONES, "kl_mask": jnp.zeros((2, 3))}),
        lambda: losses.dpo(SUMS["logp"], SUMS["token_reference"]),
    ),
    "sparsepo of zeros is log 2": (
        ("sparsepo", {"mask": jnp.zeros((2, 3)), "kl_mask": jnp.zeros((2, 3))}),
        lambda: jnp.log(2.0),
    ),
    "tis_dpo of ones is dpo": (
        ("tis_dpo", ONES),
        lambda: losses.dpo(SUMS["logp"], SUMS["token_reference"]),
    ),
    "tis_dpo with no divergence is tis_dpo": (
        ("tis_dpo_with_kl", {"alpha": 0}),
        lambda: bound("tis_dpo")(TOKENS),
    ),
    "sampo of equal lengths is dpo": (
        ("sampo", {"is_target": REAL & jnp.array([[True, True, False]])}),
        lambda: losses.dpo(TOKENS[:, :2].sum(-1), DATA["token_reference"][:, :2].sum(-1)),
    ),
}


@pytest.mark.parametrize("twins", TWINS.values(), ids=TWINS)
def test_special_cases(twins):
    (name, arguments), expected = twins
    read = inspect.signature(getattr(losses, name)).parameters
    found = bound(name, **{k: v for k, v in arguments.items() if k in read})(TOKENS)
    np.testing.assert_allclose(found, expected(), rtol=1e-12)


def test_sampo_reads_the_same_places_of_policy_and_reference():
    for number in range(5):
        key = jax.random.key(number)
        same = losses.sampo(TOKENS, TOKENS, REAL, key)
        np.testing.assert_allclose(same, np.log(2), rtol=1e-12)


def test_sampo_positions_are_uniform_subsets_of_the_shorter_length():
    is_target = jnp.array([[True, False, True, True, True], [False, True, False, True, False]])
    keys = jax.random.split(jax.random.key(0), 2000)
    found = np.asarray(jax.vmap(lambda k: losses.sampo_positions(is_target, k))(keys))
    assert (found.sum(axis=-1) == 2).all()
    assert not (found & ~np.asarray(is_target)).any()
    assert found[:, 1, [1, 3]].all()
    places = [tuple(np.flatnonzero(row)) for row in found[:, 0]]
    counts = [places.count(pair) for pair in itertools.combinations([0, 2, 3, 4], 2)]
    # Each of 6 pairs has the chance 1/6: 333 of 2000, standard deviation 17.
    assert sum(counts) == 2000
    assert max(abs(c - 2000 / 6) for c in counts) < 4 * 17
    values = np.array([0.3, 0.0, -1.0, 2.0, 0.4])
    mean = (found[:, 0] * values).sum(axis=-1).mean()
    # T/n of the sum; a subset's sum has the variance T (1 - T/n) s^2.
    spread = np.sqrt(2 * 0.5 * values[[0, 2, 3, 4]].var(ddof=1) / 2000)
    assert abs(mean - 0.5 * values.sum()) < 4 * spread


def test_sampo_draws_for_each_pair_of_a_batch():
    is_target = jnp.broadcast_to(jnp.arange(8)[None] < jnp.array([[8], [4]]), (20, 2, 8))
    found = np.asarray(losses.sampo_positions(is_target, jax.random.key(1)))
    assert (found.sum(axis=-1) == 4).all()
    assert len({row.tobytes() for row in found[:, 0]}) > 10  # of 70 subsets


def test_activation_masks_are_invariant_to_scale_and_shift():
    activations = jax.random.normal(jax.random.key(5), (2, 3, 4))
    scale, shift = jnp.array([0.1, 1.0, 7.0, 3.0]), jnp.array([5.0, -1.0, 0.0, 2.0])
    plain = losses.sparsepo_activation_mask(activations, REAL)
    moved = activations * scale.reshape(1, 1, 4) + shift.reshape(1, 1, 4)
    np.testing.assert_allclose(losses.sparsepo_activation_mask(moved, REAL), plain, rtol=1e-10)
    assert plain.min() >= 0
    assert plain.max() <= 1
    by_hand = []
    for k in range(4):  # as the authors: standardise, then rescale
        z = np.asarray(activations)[0, :, k]
        z = (z - z.mean()) / z.std(ddof=1)
        by_hand.append((z - z.min()) / (z.max() - z.min()))
    np.testing.assert_allclose(plain[0], np.mean(by_hand, axis=0), rtol=1e-10)


def test_activation_masks_at_their_edges():
    activations = jnp.array([[[1.0], [1.0], [NAN]], [[4.0], [NAN], [NAN]]])
    is_target = jnp.array([[True, True, False], [False, False, False]])
    found = losses.sparsepo_activation_mask(activations, is_target)
    np.testing.assert_array_equal(found, [[1, 1, 0], [0, 0, 0]])
    seen = losses.sparsepo_activation_mask(activations, jnp.ones((2, 3), bool))
    assert np.isnan(seen).any(axis=-1).all()
    slope = grad(lambda a: losses.sparsepo_activation_mask(a, REAL).sum())(activations)
    np.testing.assert_array_equal(slope, 0)


@pytest.fixture(scope="module")
def mask_net():
    keys = jax.random.split(jax.random.key(8), 4)
    hidden = jax.random.normal(keys[0], (2, 3, 2, 5)).at[1, 2].set(jnp.nan)
    parameters = {
        "weight": jax.random.normal(keys[1], (2, 5)),
        "bias": jnp.array([0.3, -0.2]),
        "mixer": jnp.array([0.7, -0.4]),
    }
    return hidden, parameters


def test_learned_masks_are_the_formula_and_sparse(mask_net):
    hidden, parameters = mask_net
    found = losses.sparsepo_learned_mask(hidden, **parameters, is_target=REAL)
    h = np.asarray(hidden)
    normal = h - h.mean(axis=-1, keepdims=True)
    normal = normal / np.sqrt((normal**2).mean(axis=-1, keepdims=True) + 1e-5)
    weight, bias, mixer = (np.asarray(parameters[k]) for k in ("weight", "bias", "mixer"))
    each = np.maximum((normal * weight).sum(axis=-1) + bias, 0)
    expected = np.where(REAL, np.maximum((each * mixer).sum(axis=-1), 0), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert (expected[0] == 0).any()
    assert (expected > 0).any()


def test_learned_masks_are_trained_by_the_loss_and_the_reference_is_not(mask_net):
    hidden, parameters = mask_net

    def loss(parameters, hidden):
        mask = losses.sparsepo_learned_mask(hidden, **parameters, is_target=REAL)
        return bound("sparsepo", mask=mask, kl_mask=mask, lam=0.1)(TOKENS)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    slopes, still = gradient(parameters, hidden)
    assert all(np.isfinite(s).all() and np.any(s != 0) for s in slopes.values())
    np.testing.assert_array_equal(still, 0)
    dead = {**parameters, "bias": jnp.full(2, -100.0)}
    np.testing.assert_allclose(loss(dead, hidden), np.log(2), rtol=1e-12)
    slopes, _ = gradient(dead, hidden)
    assert all((np.asarray(s) == 0).all() for s in slopes.values())  # as the docstring warns


def test_the_price_of_a_mask_is_its_sum():
    def priced(mask):
        loss = bound("sparsepo", mask=mask, lam=0.3)(TOKENS)
        return loss - bound("sparsepo", mask=mask)(TOKENS)

    value, slope = value_and_grad(priced)(DATA["mask"])
    np.testing.assert_allclose(value, 0.3 * 3.75, rtol=1e-12)
    np.testing.assert_allclose(slope, [[0.3, 0.3, 0], [0.3, 0.3, 0]], rtol=1e-10, atol=1e-12)


def test_tis_weights_grow_with_agreement_and_are_bounded():
    better = jnp.array([[-0.3, -4.0, -0.1], [-0.3, -4.0, -0.1]])
    worse = jnp.array([[-1.1, -0.2, -5.0], [-1.1, -0.2, -5.0]])
    found = losses.tis_weights(better, worse, scale=2, mu=0.7)
    expected = [[3.501345001, 1.409376179, 5.715302236], [1.142418128, 2.838135097, 0.6998754982]]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    slope = grad(lambda x: losses.tis_weights(x, worse).sum())(better)
    np.testing.assert_array_equal(slope, 0)


def test_tis_weights_rank_tokens_by_a_known_reward():
    """Models tilted by a token reward, up and down: their log-ratio is 2 r and a constant."""
    base = jax.nn.log_softmax(jnp.array([0.3, -1.0, 2.0, 0.1]))
    reward = jnp.array([0.5, -0.2, 0.1, 0.3])
    up, down = (jax.nn.log_softmax(base + s * reward) for s in (1, -1))
    chosen, rejected = losses.tis_weights(*(jnp.stack([x, x]) for x in (up, down)))
    assert (np.argsort(chosen) == np.argsort(reward)).all()
    assert (np.argsort(rejected) == np.argsort(-reward)).all()


# --- features -------------------------------------------------------------------------------------


def test_feature_distance_of_all_features_is_a_mean_square_in_any_order(key):
    codes, other = jax.random.normal(key, (2, 3, 6))
    found = losses.feature_distance(codes, other, k=50)
    np.testing.assert_allclose(found, ((codes - other) ** 2).mean(axis=-1), rtol=1e-12)
    order = jnp.array([3, 1, 5, 0, 2, 4])
    mixed = losses.feature_distance(codes[:, order], other[:, order], k=6)
    np.testing.assert_allclose(mixed, found, rtol=1e-12)


def test_feature_distance_reads_the_policys_strongest():
    codes, other = jnp.array([5.0, 1.0, 4.0, 0.0]), jnp.array([4.0, 9.0, 7.0, 9.0])

    def of(codes, other):
        return losses.feature_distance(codes, other, k=2)

    value, slopes = value_and_grad(of, argnums=(0, 1))(codes, other)
    assert float(value) == (1 + 9) / 2
    np.testing.assert_allclose(slopes[0], [1, 0, -3, 0], rtol=1e-12)
    np.testing.assert_array_equal(slopes[1], 0)
    for k in (0, 2.0, True):
        with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="k"):
            losses.feature_distance(codes, other, k=k)


def test_pooled_codes_are_those_of_the_encoder(key):
    hidden = jax.random.normal(key, (2, 3, 4)).at[1, 2].set(jnp.nan)
    weight = jax.random.normal(jax.random.fold_in(key, 1), (4, 5))
    bias, threshold = jnp.linspace(-0.5, 0.5, 5), jnp.array([0.0, 0.4, -1.0, 0.2, 0.0])
    pooled = jax.jit(losses.pooled_codes)
    found = pooled(hidden, REAL, weight, bias, threshold)
    z = np.asarray(hidden) @ np.asarray(weight) + np.asarray(bias)
    z = np.where(z > np.maximum(threshold, 0), z, 0)
    np.testing.assert_allclose(found, [z[0].mean(axis=0), z[1, :2].mean(axis=0)], rtol=1e-10)
    empty = pooled(hidden, jnp.zeros((2, 3), bool), weight, bias, threshold)
    np.testing.assert_array_equal(empty, 0)
    for place, whole in enumerate((hidden, None, weight, bias, threshold)):
        if place != 1:  # a NaN that is read is not hidden
            broken = [hidden, REAL, weight, bias, threshold]
            broken[place] = whole.at[(0,) * whole.ndim].set(jnp.nan)
            assert np.isnan(pooled(*broken)).any()

    def total(hidden, weight):
        return pooled(hidden, REAL, weight, bias, threshold).sum()

    slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, weight)
    assert np.isfinite(slopes[0]).all()
    np.testing.assert_array_equal(slopes[0][1, 2], 0)
    np.testing.assert_array_equal(slopes[1], 0)


def test_the_first_step_of_fpo_is_dpo_of_token_means():
    hidden = jax.random.normal(jax.random.key(2), (2, 3, 4))
    encoder = jnp.eye(4), jnp.zeros(4), jnp.zeros(4)
    still = losses.pooled_codes(hidden, REAL, *encoder)
    lengths = REAL.sum(axis=-1)

    def logp(hidden):  # any function of the states
        return -jnp.where(REAL, (hidden**2).sum(axis=-1), 0).sum(axis=-1)

    reference = logp(hidden)

    def fpo(hidden):
        distance = losses.feature_distance(losses.pooled_codes(hidden, REAL, *encoder), still, k=2)
        return losses.fpo(logp(hidden), reference, lengths, distance, beta=2)

    def means(hidden):
        u = (logp(hidden) - reference) / lengths.astype(jnp.float64)
        return losses.dpo(u, jnp.zeros(2), beta=2)

    fpo, means = jax.jit(jax.grad(fpo)), jax.jit(jax.grad(means))
    first, plain = fpo(hidden), means(hidden)
    np.testing.assert_allclose(first, plain, rtol=1e-10)
    later, plain = fpo(1.3 * hidden), means(1.3 * hidden)
    assert np.abs(later - plain).max() > 0.01 * np.abs(plain).max()


def test_fpo_of_no_constraint_and_single_tokens_is_dpo():
    found = bound("fpo", lengths=jnp.ones(2), alpha=0)(B)
    np.testing.assert_allclose(found, dpo(B), rtol=1e-12)


# --- what gets a gradient -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gradients_enter_what_is_trained_and_nothing_else(name):
    loss, at = bound(name), somewhere(name)
    floats = {k: v for k, v in loss.keywords.items() if v.dtype == jnp.float64}
    slopes = grad(lambda d: loss.func(at, **{**loss.keywords, **d}).sum())(floats)
    for argument, slope in slopes.items():
        moved = np.any(np.asarray(slope) != 0)
        assert moved == (argument in TRAINED.get(name, [])), argument
        assert np.isfinite(slope).all(), argument
    if name in ("tdpo2", "fpo"):
        (only,) = TRAINED[name]
        assert slopes[only][0] == 0


@pytest.mark.parametrize("name", OF_TOKENS)
def test_tokens_that_are_not_scored_are_not_read(name):
    value, pull = value_and_grad(bound(name))(TOKENS)
    assert np.isfinite(value)
    assert np.isfinite(pull).all()
    assert pull[1, 2] == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_is_not_hidden(name):
    for side in (0, 1):
        at = somewhere(name)
        at = at.at[side].set(jnp.nan) if at.ndim == 1 else at.at[side, :2].set(jnp.nan)
        assert np.isnan(bound(name)(at))


# --- edges ----------------------------------------------------------------------------------------

EDGES = {
    "far above": [[-1.0, -1.0, -1.0], [-1e4, -1.0, 0.0]],
    "far below": [[-1e4, -1.0, -1.0], [-1.0, -1.0, 0.0]],
    "probability one": [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
}
ROOMS = {
    "both are scored": [[True, True, True], [True, True, False]],
    "single tokens": [[True, False, False], [False, True, False]],
    "chosen is empty": [[False, False, False], [True, True, False]],
    "both are empty": [[False] * 3] * 2,
}


@pytest.mark.parametrize("name", OF_TOKENS)
def test_value_and_pulls_of_tokens_are_finite_at_the_edges_in_float32(name):
    rooms = jnp.array(list(ROOMS.values()))

    @jax.jit
    def each(logp, data):
        value, pullback = jax.vjp(lambda x: getattr(losses, name)(x, **data), logp)
        return value, *pullback(jnp.ones_like(value))

    for edge, tokens in [*EDGES.items(), ("reference", DATA["token_reference"])]:
        loss = bound(name, dtype=jnp.float32)
        logp = jnp.array(tokens, jnp.float32)
        data = {k: v for k, v in loss.keywords.items() if v.ndim}
        data = {k: jnp.broadcast_to(v, (4, 2, 3)) for k, v in data.items()} | {"is_target": rooms}
        key = {k: v for k, v in loss.keywords.items() if not v.ndim}
        value, pull = each(jnp.broadcast_to(logp, (4, 2, 3)), data | key)
        assert value.dtype == pull.dtype == jnp.float32
        for room, one, both in zip(ROOMS, value, pull, strict=True):
            assert np.isfinite(one), (edge, room)
            assert np.isfinite(both).all(), (edge, room)
        np.testing.assert_allclose(value[3], np.log(2), rtol=1e-6)


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2", "fpo"])
def test_value_and_pull_are_finite_at_the_edges_in_float32(name):
    edges = [[-13.0, -14.2], [-3.0, -10_003.0], [-10_003.0, -3.0], [0.0, 0.0], [-0.5, -9.0]]
    function = getattr(losses, name)
    each = jax.jit(jax.value_and_grad(lambda x, data: function(x, **data), argnums=(0, 1)))
    for extra in (0.0, 1e4):
        for logp in edges:
            loss = bound(name, dtype=jnp.float32)
            data = {k: v for k, v in loss.keywords.items() if k in TRAINED[name]}
            data = {k: jnp.array([0.0, extra], jnp.float32) for k in data}
            value, pulls = each(jnp.array(logp, jnp.float32), loss.keywords | data)
            assert value.dtype == jnp.float32
            assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, pulls)))
    if name == "fpo":
        empty = bound(name, lengths=jnp.zeros(2))(jnp.zeros(2))
        assert np.isfinite(empty)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_computed_in_float32_and_float64_stays(name):
    narrow = bound(name, dtype=jnp.bfloat16)
    wide = {
        k: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v
        for k, v in narrow.keywords.items()
    }
    at = somewhere(name).astype(jnp.bfloat16)

    @jax.jit
    def both(x):
        return narrow(x), narrow.func(x.astype(jnp.float32), **wide)

    found, expected = both(at)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)
    assert jax.eval_shape(bound(name), somewhere(name)).dtype == jnp.float64


# --- composition ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_batch_axes_are_kept_and_rows_do_not_meet(name, key):
    at = somewhere(name)
    logp = jnp.broadcast_to(at, (2, 3, *at.shape))
    logp = logp + jax.random.uniform(key, logp.shape)
    loss = bound(name)
    arrays = {k: v for k, v in loss.keywords.items() if v.ndim}
    data = {k: jnp.broadcast_to(v, logp.shape) for k, v in arrays.items()}
    rest = {k: v for k, v in loss.keywords.items() if not v.ndim}
    whole = jax.jit(loss.func)(logp, **data, **rest)
    assert whole.shape == (2, 3)
    if name == "sampo":  # a pair has its own draw in a batch
        return
    one = jax.jit(loss)
    rows = np.array([[one(pair) for pair in row] for row in np.asarray(logp)])
    np.testing.assert_allclose(whole, rows, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_jit_vmap_and_grad_compose(name, key):
    at = somewhere(name)
    logp = jnp.stack([at, at]) + jax.random.uniform(key, (2, *at.shape))
    value, pull = jax.jit(jax.vmap(jax.value_and_grad(bound(name))))(logp)
    one = value_and_grad(bound(name))
    for row in range(2):
        expected = one(logp[row])
        np.testing.assert_allclose(value[row], expected[0], rtol=1e-12)
        np.testing.assert_allclose(pull[row], expected[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("name", "argument", "default"), HYPERPARAMETERS)
def test_hyperparameters_out_of_range_are_named(name, argument, default):
    function, at = getattr(losses, name), TOKENS
    data = (TOKENS,) if name == "tis_weights" else ()
    if name != "tis_weights":
        function, at = bound(name), somewhere(name)
    jax.block_until_ready(function(at, *data, **{argument: np.float32(default)}))
    signed = argument in ("low", "high")
    also = {"beta": [0.0], "scale": [0.0]}.get(argument, [])
    for value in [NAN, float("inf"), True, *also, *([] if signed else [-0.5])]:
        with pytest.raises(ValueError, match=rf"{argument}: got .+, expected a .*number"):
            function(at, *data, **{argument: value})


@pytest.mark.parametrize("name", NAMES)
def test_data_of_another_shape_are_refused_not_broadcast(name):
    with pytest.raises(ValueError, match=r": got shape .*, expected"):
        bound(name)(jnp.stack([somewhere(name)] * 4))
