"""`jaxpref.training.mitigations`: each formula, and each guarantee, on exact small problems."""

import functools
import inspect
from typing import NamedTuple

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import nnx

from jaxpref import diagnostics as regimes
from jaxpref import gradients, logprobs, losses
from jaxpref.models import decoder
from jaxpref.training import mitigations as library
from jaxpref.training.mitigations import Calibration
from jaxpref.training.step import make_step

diagnostics = compiled.functions(regimes)
mitigations = compiled.functions(
    library,
    *("normalised_pull", "projected_pull", "pcgrad_pull", "calibration", "calibrated_pull"),
)
DPO = np.array([-1.0, 1.0])
PAPER = np.array([[1.0, 2.0], [2.0, 4.0]])  # DPO lowers both; cosine 1


def random_pairs(draws=2000, width=3):
    """Gradients ``[draws 2 width]`` of very different lengths and angles, and pulls."""
    random = np.random.default_rng(4)
    both = random.normal(size=(draws, 2, width)) * 10 ** random.uniform(-2, 2, (draws, 2, 1))
    both[: draws // 2, 1] += both[: draws // 2, 0] * 10 ** random.uniform(-2, 2, (draws // 2, 1))
    pulls = 10 ** random.uniform(-2, 2, (draws, 2)) * np.array([-1, 1])
    return both, pulls


def gram_of(both):
    return both @ both.swapaxes(-1, -2)


@pytest.fixture(scope="module")
def model():
    """A small decoder in float64, ``logp_fn(params, response)`` and three pairs of responses."""
    config = decoder.DecoderConfig(
        vocab=11, width=8, layers=1, heads=2, kv_heads=1, head_width=4, mlp_width=12
    )
    types = {"param_dtype": jnp.float64, "compute_dtype": jnp.float64}
    policy, params = decoder.functional(decoder.Decoder(config, rngs=nnx.Rngs(0), **types))
    random = np.random.default_rng(7)
    tokens = random.integers(0, 11, (3, 2, 6))
    tokens[:, 1, [0, 1, 2, 4, 5]] = tokens[:, 0, [0, 1, 2, 4, 5]]  # one word differs, then a suffix
    tokens[:, 1, 3] = (tokens[:, 0, 3] + 1) % 11
    real = np.ones(tokens.shape, bool)
    scored = real & (np.arange(6) >= 3)

    def logp_fn(params, response):
        found = logprobs.response_scores(
            policy, params, *response, max_response=3, head=logprobs.token_logprobs
        )
        return found.logp

    pairs = tuple(map(jnp.asarray, (tokens, real, scored)))
    return logp_fn, params, pairs


def pair_logp(logp_fn, params, pairs):
    return jax.vmap(jax.vmap(logp_fn, (None, 0)), (None, 0))(params, pairs)


# --- the primitive --------------------------------------------------------------------------------


def test_with_pull_keeps_the_value_and_takes_the_pull():
    reference = jnp.array([[-3.0, -4.0], [-2.0, -2.5]])
    logp = reference + jnp.array([[0.5, -0.5], [1.0, 2.0]])
    plain = functools.partial(losses.dpo, reference=reference, beta=0.3)
    scale = jnp.array([[2.0, 5.0], [0.0, -1.0]])

    def changed(logp, scale=scale):
        return mitigations.with_pull(plain, logp, lambda pull: scale * pull)

    np.testing.assert_array_equal(changed(logp), plain(logp))
    own = jax.grad(lambda x: plain(x).sum())(logp)
    for way in (lambda f: f, jax.jit):
        pull = way(jax.grad(lambda x: changed(x).sum()))(logp)
        np.testing.assert_allclose(pull, scale * own, rtol=1e-12)
    # Nothing else is differentiated: neither the factors nor the pull itself.
    by_scale = jax.jit(jax.jacrev(lambda s: jax.grad(lambda x: changed(x, s).sum())(logp)))(scale)
    np.testing.assert_array_equal(by_scale, 0)
    by_rest = jax.grad(lambda c: mitigations.with_pull(lambda x: c * plain(x), logp, abs).sum())
    np.testing.assert_array_equal(by_rest(3.0), 0)
    curvature = jax.jit(jax.jacrev(jax.grad(lambda x: changed(x).sum())))(logp)
    np.testing.assert_array_equal(curvature, 0)


def test_with_pull_computes_bfloat16_in_float32():
    logp = jnp.array([-3.0, -4.0], jnp.bfloat16)
    found, pull = jax.value_and_grad(
        lambda x: mitigations.with_pull(lambda y: y[..., 1] - y[..., 0], x, lambda p: 2 * p)
    )(logp)
    assert found.dtype == jnp.float32
    assert pull.tolist() == [-2.0, 2.0]


def test_a_likelihood_term_is_a_sum_of_losses_that_pulls_harder_at_the_chosen():
    reference = jnp.array([-3.0, -4.0])
    logp = reference + jnp.array([0.5, -1.0])

    def loss(logp):
        return losses.dpo(logp, reference, beta=0.3) + 0.2 * losses.sft(logp[..., 0])

    found = diagnostics.pull_ratio(jax.grad(loss)(logp))
    strength = 0.3 / (1 + np.exp(0.3 * 1.5))
    np.testing.assert_allclose(found, 1 + 0.2 / strength, rtol=1e-12)


# --- normalised -----------------------------------------------------------------------------------


def test_normalised_pulls_are_ideal_for_any_pair_with_the_changes_of_the_formula():
    both, _ = random_pairs()
    gram, weight = gram_of(both), jnp.linspace(0.1, 3.0, len(both))
    pull = mitigations.normalised_pull(gram, weight)
    np.testing.assert_allclose(
        diagnostics.pull_ratio(pull), diagnostics.norm_ratio(gram), rtol=1e-12
    )
    weight = np.asarray(weight)
    length = np.linalg.norm(both, axis=-1)
    rho = (both[:, 0] * both[:, 1]).sum(axis=-1) / length.prod(axis=-1)
    step = -np.einsum("pi,piv->pv", pull, both)  # the update itself, not through the Gram
    change = np.einsum("piv,pv->pi", both, step)
    expected = (weight * (1 - rho))[:, None] * length * np.array([1, -1])
    # Of the larger of two lengths: the change of a nearly parallel pair is a difference.
    scale = (weight[:, None] * length).max(axis=-1)
    assert (abs(change - expected) <= 1e-12 * scale[:, None]).all()
    loose = rho < 1 - 1e-9
    assert (diagnostics.regime(gram, pull)[loose] == diagnostics.Regime.IDEAL).all()
    assert loose.sum() > 1000


def test_a_gradient_of_zero_gets_no_pull_and_a_nan_is_not_hidden():
    grams = jnp.array(
        [[[0.0, 0.0], [0.0, 4.0]], [[4.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]
    )
    found = mitigations.normalised_pull(grams, jnp.ones(3))
    np.testing.assert_array_equal(found, [[0, 0.5], [-0.5, 0], [0, 0]])
    rounded = mitigations.normalised_pull(jnp.array([[-1e-30, 0], [0, 1.0]]), jnp.array(1.0))
    np.testing.assert_array_equal(rounded, [0, 1])
    assert jnp.isnan(mitigations.normalised_pull(jnp.full((2, 2), jnp.nan), jnp.array(1.0))).all()
    for change in (mitigations.projected_pull, mitigations.pcgrad_pull):
        np.testing.assert_array_equal(change(grams, jnp.broadcast_to(DPO, (3, 2))), [DPO] * 3)
    identical = jnp.ones((2, 2))  # both responses the same: they stay
    for pull in (
        mitigations.normalised_pull(identical, jnp.array(1.0)),
        mitigations.pcgrad_pull(identical, DPO),
    ):
        np.testing.assert_array_equal(diagnostics.first_order_change(identical, pull), 0)


def test_one_reweighted_backward_pass_is_the_normalised_gradient(model):
    logp_fn, params, pairs = model
    reference = jnp.array([[-6.0, -7.0], [-8.0, -6.0], [-7.0, -7.0]])

    @jax.jit
    def both(params):
        still = jax.lax.stop_gradient(params)
        plain = functools.partial(losses.dpo, reference=reference, beta=0.3)
        weight = jax.grad(lambda x: -plain(x).sum())(pair_logp(logp_fn, still, pairs))[:, 0]

        def mean_loss(params):
            gram = gradients.pair_grams(logp_fn, jax.lax.stop_gradient(params), pairs).gram
            logp = pair_logp(logp_fn, params, pairs)
            change = lambda pull: mitigations.normalised_pull(gram, -pull[..., 0])  # noqa: E731
            return mitigations.with_pull(plain, logp, change).mean()

        return (
            jax.grad(mean_loss)(params),
            mitigations.normalised_gradient(logp_fn, params, pairs, weight),
            weight,
        )

    fast, slow, weight = both(params)
    assert (weight > 0).all()
    assert np.ptp(weight) > 0.01  # the loss's own weights, and they matter
    size = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(slow))
    assert size > 1e-3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * size), fast, slow
    )


def test_normalised_gradient_is_the_definition_on_a_small_function():
    draw = np.random.default_rng(0)
    W, states = draw.normal(size=(5, 3)), draw.normal(size=(4, 2, 3))
    states[3, 1] = 0.0  # its gradient is zero
    answers = np.array([[0, 1], [2, 2], [3, 0], [4, 1]])
    weight = np.array([1.0, 0.5, 2.0, -1.0])

    def logp_fn(W, response):
        state, answer = response
        return jax.nn.log_softmax(jnp.tanh(W @ state))[answer]

    slope, expected = jax.jit(jax.grad(logp_fn)), np.zeros((5, 3))
    for i in range(4):
        w, l = (np.asarray(slope(W, (states[i, k], answers[i, k]))) for k in (0, 1))
        lengths = [np.linalg.norm(x) or 1.0 for x in (w, l)]
        expected -= float(weight[i]) * (w / lengths[0] - l / lengths[1]) / 4
    found = jax.jit(functools.partial(mitigations.normalised_gradient, logp_fn))(
        W, (states, answers), weight
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


@pytest.fixture(scope="module")
def entangled(model):
    """A Gram under which DPO lowers both, and ``logp`` before and after a step on each pair alone.

    The rejected counts five times, as a longer response would: the chosen falls under DPO at any
    cosine above about a fifth.
    """
    logp_fn, params, pairs = model
    scale = jnp.array([1.0, 5.0])
    found = jax.jit(functools.partial(gradients.pair_grams, logp_fn))(params, pairs)

    @jax.jit
    def after(pull):
        def one(row):
            pair, pull = row
            both = lambda p: scale * jax.vmap(logp_fn, (None, 0))(p, pair)  # noqa: E731
            _, pullback = jax.vjp(both, params)
            moved = jax.tree.map(lambda p, g: p - 1e-6 * g, params, *pullback(pull))
            return both(moved)

        return jax.lax.map(one, (pairs, pull))

    return found.gram * jnp.outer(scale, scale)[None], scale[None] * found.logp, after


CHANGES = {
    "normalised": lambda gram, pull: mitigations.normalised_pull(gram, -pull[..., 0]),
    "calibrated": lambda gram, pull: mitigations.calibrated_pull(
        pull, mitigations.calibration(gram, pull)
    ),
    "pcgrad": mitigations.pcgrad_pull,
}


def test_a_real_step_on_one_entangled_pair_raises_the_chosen_and_lowers_the_rejected(entangled):
    gram, before, after = entangled
    dpo = jnp.stack([DPO] * 3)
    assert ((after(dpo) < before).all(axis=-1)).sum() >= 2
    for name, change in CHANGES.items():
        pull = change(gram, dpo)
        moved = after(pull) - before
        assert (moved[:, 0] > 0).all(), name
        assert (moved[:, 1] < 0).all(), name
        # A step of 1e-6: what is left is its square.
        predicted = 1e-6 * diagnostics.first_order_change(gram, pull)
        np.testing.assert_allclose(moved, predicted, rtol=1e-2)


def test_in_a_batch_another_pair_can_undo_the_guarantee():
    """The rejected gradient of the second pair is the chosen gradient of the first, twice."""
    x, y, z = jnp.eye(3)
    features = jnp.stack([jnp.stack([x, y]), jnp.stack([z, x]), jnp.stack([z, x])])

    def logp_fn(w, feature):
        return jnp.vdot(w, feature)

    gram = gradients.pair_grams(logp_fn, jnp.zeros(3), features).gram
    pull = mitigations.normalised_pull(gram, jnp.ones(3))
    alone = diagnostics.first_order_change(gram, pull)
    np.testing.assert_array_equal(alone, [[1, -1]] * 3)
    slope = mitigations.normalised_gradient(logp_fn, jnp.zeros(3), features, jnp.ones(3))
    change = -features @ slope
    np.testing.assert_allclose(change[0], [(1 - 1 - 1) / 3, -1 / 3], rtol=1e-12)  # chosen falls
    # A pair's own share keeps its sign; the rest is the cross terms.
    all_pairs = jnp.einsum("iav,jbv->iajb", features, features)
    np.testing.assert_allclose(diagnostics.batch_change(all_pairs, pull), change, rtol=1e-12)


# --- calibration ----------------------------------------------------------------------------------


def test_calibrated_pulls_land_on_the_centre_of_the_band():
    both, pull = random_pairs()
    gram = gram_of(both)
    found = mitigations.calibrated_pull(pull, mitigations.calibration(gram, pull))
    ratio = diagnostics.norm_ratio(gram)
    np.testing.assert_allclose(diagnostics.pull_ratio(found), ratio, rtol=1e-12)
    np.testing.assert_allclose(found.prod(axis=-1), pull.prod(axis=-1), rtol=1e-12)
    low, high = diagnostics.band(gram)
    np.testing.assert_allclose(
        diagnostics.band_margin(gram, found)[low > 0], np.log(high / low)[low > 0] / 2, atol=1e-9
    )


def test_calibration_equals_the_published_form_of_the_loss():
    """z_w <- A z_w + (1 - A) sg(z_w), z_l <- z_l / A + (1 - 1 / A) sg(z_l)."""
    reference = jnp.array([-3.0, -4.0])
    plain = functools.partial(losses.dpop, reference=reference, beta=0.3, lam=2.0)
    logp = reference - 0.5  # the penalty is on: a pull ratio of 3
    gram = jnp.array([[1.0, 2.0], [2.0, 36.0]])
    A = np.sqrt(6 / 3)

    def published(z):
        still = jax.lax.stop_gradient(z)
        factor = jnp.array([A, 1 / A])
        return plain(factor * z + (1 - factor) * still)

    def ours(z):
        def change(pull):
            return mitigations.calibrated_pull(pull, mitigations.calibration(gram, pull))

        return mitigations.with_pull(plain, z, change)

    np.testing.assert_allclose(ours(logp), published(logp), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(ours)(logp), jax.grad(published)(logp), rtol=1e-12)


def test_smoothing_by_hand():
    gram = jnp.array([jnp.diag(jnp.array([1.0, 4.0])), jnp.diag(jnp.array([1.0, 64.0]))])
    pull = jnp.array([[-1.0, 1.0], [-1.0, 1.0]])
    state = mitigations.smoothed(Calibration(), mitigations.calibration(gram, pull))
    np.testing.assert_allclose(state.log_target, np.log(4), rtol=1e-12)  # ratios 2 and 8
    # The same number for both pairs: 4 is the centre of neither.
    found = mitigations.calibrated_pull(pull, state)
    np.testing.assert_allclose(diagnostics.pull_ratio(found), [4, 4], rtol=1e-12)
    short = mitigations.calibration(gram[:1], jnp.array([[-3.0, 1.0]]))
    state = mitigations.smoothed(state, short, decay=0.9)
    np.testing.assert_allclose(state.log_target, 0.9 * np.log(4) + 0.1 * np.log(2), rtol=1e-12)
    np.testing.assert_allclose(state.log_ratio, 0.1 * np.log(3), rtol=1e-12)
    fresh = mitigations.smoothed(state, short, decay=0.0)
    np.testing.assert_allclose(fresh.log_ratio, np.log(3), rtol=1e-12)


def test_pairs_without_a_ratio_stay_and_are_left_out_of_the_mean():
    eye = jnp.eye(2)
    gram = jnp.stack(
        [jnp.diag(jnp.array([0.0, 1.0])), jnp.diag(jnp.array([1.0, 0.0])), eye, 9 * eye]
    )
    gram = gram.at[3, 0, 0].set(1.0)
    pull = jnp.array([[-1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])  # the third turned round
    now = mitigations.calibration(gram, pull)
    assert np.isnan(now.log_target).tolist() == [True, True, True, False]
    found = mitigations.calibrated_pull(pull, now)
    np.testing.assert_array_equal(found[:3], pull[:3])
    np.testing.assert_allclose(diagnostics.pull_ratio(found[3]), 3, rtol=1e-12)
    state = mitigations.smoothed(Calibration(), now)
    np.testing.assert_allclose(state.log_target, np.log(3), rtol=1e-12)
    none = mitigations.smoothed(state, Calibration(*(jnp.asarray(x)[:3] for x in now)))
    assert none == state
    untouched = mitigations.calibrated_pull(pull, Calibration())
    np.testing.assert_array_equal(untouched, pull)


# --- projections ----------------------------------------------------------------------------------


def test_projections_are_those_of_the_gradients_themselves():
    both, pull = random_pairs()
    gram = gram_of(both)
    for (w, l), p, one, mutual in zip(
        np.asarray(both),
        np.asarray(pull),
        np.asarray(mitigations.projected_pull(gram, pull)),
        np.asarray(mitigations.pcgrad_pull(gram, pull)),
        strict=True,
    ):
        up, down = -p[0] * w, -p[1] * l
        clash = up @ down < 0
        down_ = down - clash * (down @ w) / (w @ w) * w
        up_ = up - clash * (up @ l) / (l @ l) * l
        size = np.linalg.norm(up) + np.linalg.norm(down)
        size *= 1 + abs(w @ l) / min(w @ w, l @ l)
        for found, expected in ((one, up + down_), (mutual, up_ + down_)):
            step = -found[0] * w - found[1] * l
            np.testing.assert_allclose(step, expected, atol=1e-12 * size)


def test_projections_keep_their_promises():
    both, pull = random_pairs()
    gram = gram_of(both)
    d_w, d_l = -pull[:, 0], pull[:, 1]
    w, dot, l = gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]
    slack = 1 - dot**2 / (w * l)
    clash = dot > 0
    assert 500 < clash.sum() < 1900

    one = diagnostics.first_order_change(gram, mitigations.projected_pull(gram, pull))
    # Differences of terms that are larger by 1 / (1 - rho^2): errors are relative to those.
    scale = d_w * (w + abs(dot)) + d_l * (l + abs(dot)) * (1 + abs(dot) / w)
    assert (abs(one[:, 0] - d_w * w)[clash] <= 1e-12 * scale[clash]).all()
    assert (one[:, 0] > d_w * w)[~clash].all()
    expected = d_w * dot - d_l * l * slack
    assert (abs(one[:, 1] - expected)[clash] <= 1e-12 * scale[clash]).all()
    assert (one[:, 1] > 0).sum() > 100  # the rejected does rise

    two = diagnostics.first_order_change(gram, mitigations.pcgrad_pull(gram, pull))
    scale = scale * (1 + abs(dot) / l)
    assert (two[:, 0] >= d_w * w * slack - 1e-12 * scale).all()
    assert (two[:, 1] <= -d_l * l * slack + 1e-12 * scale).all()
    own = diagnostics.first_order_change(gram, pull)
    np.testing.assert_array_equal(two[~clash], own[~clash])


def test_the_papers_worked_number_under_each():
    """Cosine 1 and a rejected gradient of twice the length: DPO lowers both."""

    def change(pull):
        return diagnostics.first_order_change(PAPER, pull).tolist()

    assert change(DPO) == [-1, -2]
    assert change(mitigations.projected_pull(PAPER, DPO)) == [1, 2]  # and the rejected rises
    assert change(mitigations.pcgrad_pull(PAPER, DPO)) == [0, 0]
    assert change(mitigations.normalised_pull(PAPER, jnp.array(1.0))) == [0, 0]


# --- in a training step ---------------------------------------------------------------------------


class Entangled(NamedTuple):
    logp: jax.Array
    gram: jax.Array


def test_it_works_inside_a_jitted_training_step():
    """The Gram is made inside the step, of parameters that no gradient enters, part by part."""

    def logp_fn(params, response):
        feature, answer = response
        return jax.nn.log_softmax(feature @ params["kernel"] + params["bias"])[answer]

    def responses(batch):
        return jnp.repeat(batch.features[:, None], 2, axis=1), batch.answers

    def score(params, batch):
        still = jax.lax.stop_gradient(params)
        found = gradients.pair_grams(logp_fn, still, responses(batch))
        return Entangled(toy.score(params, batch).logp, found.gram)

    def plain(logp, batch):
        return losses.dpo(logp, batch.reference, beta=0.5)

    def loss(scores, batch):
        return mitigations.with_pull(
            lambda logp: plain(logp, batch),
            scores.logp,
            lambda pull: mitigations.normalised_pull(scores.gram, -pull[..., 0]),
        )

    batch, optimizer = toy.a_batch(), optax.sgd(0.1)
    state = toy.a_state(optimizer)

    @jax.jit
    def by_hand(params):
        logp = toy.score(params, batch).logp
        weight = jax.grad(lambda x: -plain(x, batch).sum())(logp)[:, 0]
        slope = mitigations.normalised_gradient(logp_fn, params, responses(batch), weight)
        return plain(logp, batch).mean(), jax.tree.map(lambda p, g: p - 0.1 * g, params, slope)

    value, expected = by_hand(state.params)
    state, metrics, _ = make_step(score, loss, optimizer, micro_batches=4)(state, batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), state.params, expected)


# --- masks ----------------------------------------------------------------------------------------


def test_the_hard_mask_leaves_what_has_no_partner():
    tokens = np.array(
        [
            [[1, 2, 3, 4, 5, 0], [1, 9, 3, 4, 5, 0]],  # one word differs
            [[1, 2, 3, 4, 5, 6], [1, 3, 4, 5, 6, 0]],  # one word more
            [[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 0]],  # nothing shared
            [[1, 2, 3, 4, 0, 0], [1, 2, 3, 4, 0, 0]],  # the same
        ]
    )
    scored = tokens > 0
    scored[0, :, 0] = False  # the prompt
    expected = np.zeros(tokens.shape, bool)
    expected[0, :, 1] = True
    expected[1, 0, 1] = True
    expected[2] = scored[2]
    np.testing.assert_array_equal(mitigations.contrast_mask(tokens, scored), expected)
    single = mitigations.contrast_mask(tokens[0], scored[0])
    np.testing.assert_array_equal(single, expected[0])


def test_many_equal_tokens_are_aligned_all_the_same():
    tokens = np.full((2, 400), 7)  # difflib would take a frequent token for junk
    tokens[0, 200] = 3
    expected = np.zeros((2, 400), bool)
    expected[0, 200] = expected[1, -1] = True
    found = mitigations.contrast_mask(tokens, np.ones((2, 400), bool))
    assert found[0].sum() == found[1].sum() == 1
    assert found[0, 200]


def test_a_shared_suffix_drags_dpo_down_and_not_the_masked_loss():
    """Logits for each position, shared by both responses; contexts differ after the first token."""
    first = np.log([1e-300, 0.5, 0.5] + [1e-300] * 7)
    late = [np.log([p] + [(1 - p) / 9] * 9) for p in (0.5, 0.1)]
    contexts = jnp.asarray([[first] + 8 * [late[k]] for k in (0, 1)])
    tokens = np.zeros((2, 9), int)
    tokens[:, 0] = [1, 2]

    def token_logp(logits):
        logp = jax.nn.log_softmax(logits[None] + contexts)
        return jnp.take_along_axis(logp, jnp.asarray(tokens)[..., None], axis=-1)[..., 0]

    @jax.jit
    def change(scored, mask):
        """Of both log-probabilities, by the derivative along the step, per C = beta / 2."""
        zero = jnp.zeros((9, 10))

        def loss(logits):
            u = mitigations.masked_log_ratio(token_logp(logits), token_logp(zero), mask)
            return losses.dpo(u, jnp.zeros(2), beta=2.0)

        step = -jax.grad(loss)(zero)
        _, moved = jax.jvp(lambda x: jnp.where(scored, token_logp(x), 0.0), (zero,), (step,))
        return moved.sum(axis=-1)

    for suffix in (0, 1, 2, 4, 5, 8):
        scored = np.broadcast_to(np.arange(9) <= suffix, (2, 9))
        # By hand, for each suffix token: -2/9 and -2/5.
        expected = [1 - 2 * suffix / 9, -1 - 0.4 * suffix]
        np.testing.assert_allclose(change(scored, scored), expected, rtol=1e-9)
        mask = mitigations.contrast_mask(tokens, scored)
        np.testing.assert_allclose(change(scored, mask), [1, -1], rtol=1e-9)


def test_masked_tokens_get_exactly_no_cotangent(key):
    tokens = np.array([[[1, 2, 5, 6, 7], [3, 4, 5, 6, 7]]])
    mask = mitigations.contrast_mask(tokens, np.ones(tokens.shape, bool))
    logp = -jax.random.uniform(key, tokens.shape, jnp.float64)

    @jax.jit
    @jax.grad
    def slope(x):
        u = mitigations.masked_log_ratio(x, 2 * logp, mask)
        return losses.dpo(u, jnp.zeros((1, 2)), beta=0.3).sum()

    pull = slope(logp)
    assert (pull[..., 2:] == 0).all()
    assert (pull[0, 0, :2] < 0).all()
    assert (pull[0, 1, :2] > 0).all()


def test_a_mask_of_ones_is_dpo_and_no_gradient_enters_the_reference(key):
    logp, reference = -jax.random.uniform(key, (2, 3, 2, 4), jnp.float64)
    ones = jnp.ones(logp.shape)

    def sparse(logp, reference):
        return mitigations.sparse_dpo(logp, reference, ones, beta=0.3, lam=0.0)

    def dense(logp, reference):
        return losses.dpo(logp.sum(axis=-1), reference.sum(axis=-1), beta=0.3)

    @functools.partial(jax.jit, static_argnums=0)
    def slopes(loss):
        return jax.value_and_grad(lambda *x: loss(*x).sum(), (0, 1))(logp, reference)

    found, (pull, none) = slopes(sparse)
    expected, (own, _) = slopes(dense)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(pull, own, rtol=1e-12)
    np.testing.assert_array_equal(none, 0)


def test_the_masks_derivative_is_that_of_the_formula(key):
    logp, reference = -jax.random.uniform(key, (2, 2, 4), jnp.float64)
    scored = np.array([[True] * 4, [True] * 3 + [False]])
    logits = jnp.linspace(-1.0, 1.5, 8).reshape(2, 4)

    def loss(logits):
        mask = mitigations.learned_mask(logits, scored)
        return mitigations.sparse_dpo(logp, reference, mask, beta=2.0, lam=0.05)

    value, slope = jax.jit(jax.value_and_grad(loss))(logits)
    assert slope[1, 3] == 0
    gate = 1 / (1 + np.exp(-np.asarray(logits)))
    mask = np.where(scored, 1.2 * gate - 0.1, 0)
    ratio = np.asarray(logp - reference)
    u = (mask * ratio).sum(axis=-1)
    strength = 2 / (1 + np.exp(2 * (u[0] - u[1])))
    by_mask = -strength * ratio * np.array([[1], [-1]]) + 0.05
    np.testing.assert_allclose(slope, by_mask * 1.2 * gate * (1 - gate) * scored, rtol=1e-9)
    expected = np.log1p(np.exp(-2 * (u[0] - u[1]))) + 0.05 * mask.sum()
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def learned(ratio, lam, steps=400):
    """The mask after gradient descent on its logits alone."""
    scored = np.ones(ratio.shape, bool)

    @jax.jit
    def step(_, logits):
        def loss(logits):
            mask = mitigations.learned_mask(logits, scored)
            return mitigations.sparse_dpo(ratio, jnp.zeros_like(ratio), mask, beta=1.0, lam=lam)

        return logits - 2.0 * jax.grad(loss)(logits)

    logits = jax.lax.fori_loop(0, steps, step, jnp.zeros(ratio.shape))
    return mitigations.learned_mask(logits, scored)


def test_the_price_drives_masks_of_tokens_without_contrast_to_zero():
    ratio = jnp.array([[1.0, 0.0, 0.01], [-1.0, 0.0, 0.01]])
    found = learned(ratio, lam=0.05)
    np.testing.assert_array_equal(found, [[1, 0, 0], [1, 0, 0]])  # both ends are reached exactly
    free = learned(ratio, lam=0.0)
    np.testing.assert_allclose(free[:, 1], 0.5, rtol=1e-12)  # nothing moves them


def test_while_the_policy_is_its_reference_the_price_drops_every_token():
    np.testing.assert_array_equal(learned(jnp.zeros((2, 3)), lam=0.05), 0)


def test_a_fallen_chosen_token_is_dropped():
    found = learned(jnp.array([[1.0, -0.5], [-1.0, 0.0]]), lam=0.05)
    np.testing.assert_array_equal(found, [[1, 0], [1, 0]])


# --- bad input ------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong():
    def raw(function):
        return inspect.unwrap(getattr(library, function))  # what users have: no type checker

    three = jnp.ones((3, 2, 2))
    for function in (mitigations.projected_pull, mitigations.pcgrad_pull, mitigations.calibration):
        with pytest.raises(ValueError, match="pull: got shape"):
            function(three, DPO)
        with pytest.raises(ValueError, match="gram: got shape"):
            function(jnp.ones((3, 2)), DPO)
    with pytest.raises(ValueError, match="weight: got shape"):
        mitigations.normalised_pull(three, jnp.ones(()))
    with pytest.raises(ValueError, match=r"to: got shape \(2,\), expected \(3,\) or one number"):
        raw("calibrated_pull")(jnp.ones((3, 2)), Calibration(jnp.ones(2), jnp.ones(2)))
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="decay: got"):
            mitigations.smoothed(Calibration(), Calibration(jnp.ones(2), jnp.ones(2)), decay=decay)
    with pytest.raises(ValueError, match="loss: got shape"):
        raw("with_pull")(lambda x: x.sum(), jnp.ones((3, 2)), lambda pull: pull)
    with pytest.raises(ValueError, match="change: got shape"):
        raw("with_pull")(lambda x: x.sum(axis=-1), jnp.ones((3, 2)), lambda p: p[..., 0])
    logp, mask = jnp.zeros((2, 4)), jnp.ones((2, 4))
    for lam in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="lam: got"):
            mitigations.sparse_dpo(logp, logp, mask, lam=lam)
    with pytest.raises(ValueError, match="beta: got"):
        mitigations.sparse_dpo(logp, logp, mask, beta=0.0, lam=0.0)
    with pytest.raises(ValueError, match=r"mask: got shape \(2, 3\), expected \(2, 4\)"):
        mitigations.masked_log_ratio(logp, logp, mask[:, :3])
    with pytest.raises(ValueError, match=r"tokens: got shape \(3, 4\)"):
        mitigations.contrast_mask(np.ones((3, 4), int), np.ones((3, 4), bool))
