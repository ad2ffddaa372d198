"""`jaxpref.diagnostics`: the algebra of gradient entanglement, and the theory it came from."""

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import diagnostics as library
from jaxpref import gradients, losses
from jaxpref.diagnostics import Regime

DPO = np.array([-1.0, 1.0])


diagnostics = compiled.functions(library)


def grams(draws=10_000, width=3):
    """Grams of random gradients of very different lengths and angles."""
    random = np.random.default_rng(2)
    both = random.normal(size=(draws, 2, width)) * 10 ** random.uniform(-2, 2, (draws, 2, 1))
    both[: draws // 2, 1] += both[: draws // 2, 0] * 10 ** random.uniform(-2, 2, (draws // 2, 1))
    return both @ both.swapaxes(1, 2)


def pulls(draws=10_000):
    random = np.random.default_rng(3)
    return 10 ** random.uniform(-2, 2, (draws, 2)) * np.array([-1, 1])


def test_the_papers_worked_number():
    gram = jnp.array([[1.0, 2.0], [2.0, 4.0]])
    change = diagnostics.first_order_change(gram, DPO)
    np.testing.assert_array_equal(change, [-1, -2])
    assert change[0] - change[1] == 1  # the margin grows by |g_w - g_l|^2


def test_a_step_of_gradient_descent_changes_both_as_predicted():
    draw = np.random.default_rng(0)
    W, h = draw.normal(size=(7, 3)), draw.normal(size=(2, 3))

    def logp_fn(W, x):
        hidden, token = x
        return jax.nn.log_softmax(W @ jnp.tanh(hidden))[token]

    pair = (h, jnp.array([1, 4]))

    def loss(W):
        logp = jax.vmap(logp_fn, (None, 0))(W, pair)
        return losses.dpo(logp, jnp.full(2, -2.0), beta=0.3), logp

    @jax.jit
    def both(W):
        slope, before = jax.grad(loss, has_aux=True)(W)
        pull = jax.grad(lambda logp: losses.dpo(logp, jnp.full(2, -2.0), beta=0.3))(before)
        measured = (loss(W - rate * slope)[1] - before) / rate
        return measured, gradients.pair_gram(logp_fn, W, pair), pull

    rate = 1e-6
    measured, gram, pull = both(W)
    predicted = diagnostics.first_order_change(gram, pull)
    np.testing.assert_allclose(predicted, measured, rtol=1e-4)  # of second order: rate * curvature


def test_a_batch_is_the_sum_over_all_pairs():
    flat = np.random.default_rng(0).normal(size=(3, 2, 5))
    gram, pull = np.einsum("iap,jbp->iajb", flat, flat), np.asarray(pulls(3))
    step = -np.einsum("jb,jbp->p", pull, flat) / 3
    found = diagnostics.batch_change(jnp.asarray(gram), jnp.asarray(pull))
    np.testing.assert_allclose(found, flat @ step, rtol=1e-12)


def test_a_step_on_a_mean_loss_changes_all_pairs_as_predicted():
    """The derivative along the batch's own gradient, which no Gram was used for."""
    draw = np.random.default_rng(0)
    W, h = draw.normal(size=(7, 3)), draw.normal(size=(3, 2, 3))
    tokens = jnp.array([[1, 4], [4, 0], [2, 6]])[..., None]
    reference = jnp.array([[-2.0, -1.0], [-3.0, -2.0], [-1.0, -1.0]])

    def logps(W):
        return jnp.take_along_axis(jax.nn.log_softmax(h @ W.T), tokens, axis=-1)[..., 0]

    def loss(logp):
        return losses.dpo(logp, reference, beta=0.3)

    @jax.jit
    def both(W):
        slope = jax.grad(lambda W: loss(logps(W)).mean())(W)
        _, expected = jax.jvp(logps, (W,), (-slope,))
        slopes = jax.jacrev(logps)(W)
        gram = jnp.einsum("iavd,jbvd->iajb", slopes, slopes)
        return expected, gram, jax.grad(lambda logp: loss(logp).sum())(logps(W))

    expected, gram, pull = both(W)
    np.testing.assert_allclose(diagnostics.batch_change(gram, pull), expected, rtol=1e-9)


def test_regimes_are_the_signs_of_the_change():
    gram, pull = grams(), pulls()
    change, found = diagnostics.first_order_change(gram, pull), diagnostics.regime(gram, pull)
    ideal = (change[:, 0] >= 0) & (change[:, 1] < 0)
    np.testing.assert_array_equal(found == Regime.IDEAL, ideal)
    np.testing.assert_array_equal(found == Regime.BOTH_DOWN, (change < 0).all(axis=1))
    np.testing.assert_array_equal(found == Regime.BOTH_UP, (change >= 0).all(axis=1))
    assert not (found == Regime.REVERSED).any()  # Cauchy-Schwarz
    counts = np.bincount(found)
    assert (counts[:3] > 500).all()  # each is tested in earnest
    np.testing.assert_array_equal(library.regime(gram, pull), found)  # with and without jit
    reverse = diagnostics.regime(jnp.eye(2), jnp.array([1.0, -1.0]))
    assert reverse == Regime.REVERSED


def test_the_edges_of_the_band_belong_to_it():
    """Of |g_w| = 1, |g_l| = 2 at 60 degrees the band is 1 to 4; as in the paper, edges included."""
    ratio = jnp.array([0.5, 1.0, 2.0, 4.0, 8.0])
    gram = jnp.broadcast_to(jnp.array([[1.0, 1.0], [1.0, 4.0]]), (5, 2, 2))
    pull = jnp.stack([-ratio, jnp.ones(5)], axis=1)
    down, ideal, up = Regime.BOTH_DOWN, Regime.IDEAL, Regime.BOTH_UP
    assert diagnostics.regime(gram, pull).tolist() == [down, ideal, ideal, ideal, up]
    margin = jnp.log(2) * jnp.array([-1.0, 0.0, 1.0, 0.0, -1.0])
    np.testing.assert_allclose(diagnostics.band_margin(gram, pull), margin, rtol=1e-12)
    for short in (jnp.array([[4.0, 1.0], [1.0, 1.0]]), jnp.ones((2, 2))):  # an edge at ratio 1
        assert diagnostics.entanglement(short) == 1
        assert diagnostics.regime(short, DPO) == Regime.IDEAL


def test_pulls_the_wrong_way_have_a_regime_and_no_margin():
    """IPO past its target pulls both backwards: the ratio is 2 and inside, the pair is not."""
    gram = jnp.array([[1.0, 1.0], [1.0, 4.0]])
    expected = {
        (2.0, -1.0): Regime.REVERSED,
        (-1.0, -1.0): Regime.BOTH_UP,
        (1.0, 1.0): Regime.BOTH_DOWN,
        (-1.0, 0.0): Regime.BOTH_UP,  # only the chosen is pulled
        (0.0, 1.0): Regime.BOTH_DOWN,
        (0.0, 0.0): Regime.IDEAL,
    }
    for pull, regime in expected.items():
        assert diagnostics.regime(gram, jnp.array(pull)) == regime
        assert np.isnan(diagnostics.band_margin(gram, jnp.array(pull)))


def test_a_nan_has_no_regime():
    gram = jnp.array([[[1.0, jnp.nan], [jnp.nan, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    found = diagnostics.regime(gram, jnp.stack([DPO, DPO]))
    assert found.tolist() == [Regime.UNDEFINED, Regime.IDEAL]


def test_the_band_holds_exactly_the_ideal_pulls():
    gram, pull = grams(), pulls()
    low, high = diagnostics.band(gram)
    ratio, margin = diagnostics.pull_ratio(pull), diagnostics.band_margin(gram, pull)
    ideal = diagnostics.regime(gram, pull) == Regime.IDEAL
    np.testing.assert_array_equal((low < ratio) & (ratio < high), ideal)
    np.testing.assert_array_equal(margin > 0, ideal)
    found = diagnostics.regime(gram, pull)
    np.testing.assert_array_equal(ratio < low, found == Regime.BOTH_DOWN)
    np.testing.assert_array_equal(ratio > high, found == Regime.BOTH_UP)
    rho, q = diagnostics.cosine(gram), diagnostics.norm_ratio(gram)
    sharp = rho > 0
    np.testing.assert_allclose(low[sharp], (rho * q)[sharp], rtol=1e-9)
    np.testing.assert_allclose(high[sharp], (q / rho)[sharp], rtol=1e-9)
    np.testing.assert_allclose(np.sqrt(low[sharp] * high[sharp]), q[sharp], rtol=1e-9)
    centre = diagnostics.band_margin(gram, jnp.stack([-q, jnp.ones_like(q)], axis=1))
    np.testing.assert_allclose(centre[sharp], -jnp.log(rho[sharp]), rtol=1e-6, atol=1e-12)


def test_the_scalar_condition_of_dpo_and_the_published_one():
    gram = grams()
    found = diagnostics.regime(gram, jnp.broadcast_to(DPO, (len(gram), 2)))
    np.testing.assert_array_equal(diagnostics.entanglement(gram) <= 1, found == Regime.IDEAL)
    passes = diagnostics.published_entanglement(gram) <= 1
    np.testing.assert_array_equal(passes, found != Regime.BOTH_DOWN)  # both up passes


def test_zero_gradients_have_no_cosine():
    zero = jnp.array([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert np.isnan(diagnostics.cosine(zero)).all()
    assert np.isnan(diagnostics.entanglement(zero)).all()
    np.testing.assert_array_equal(diagnostics.norm_ratio(zero), [0, jnp.inf, jnp.nan])
    low, high = diagnostics.band(zero)
    np.testing.assert_array_equal(low, [0, 0, 0])
    np.testing.assert_array_equal(high, [jnp.inf, jnp.inf, jnp.inf])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_identical_responses_have_cosine_one_exactly(dtype):
    squares = 10 ** np.random.default_rng(0).uniform(-10, 10, (1000, 1, 1))
    same = np.broadcast_to(squares.astype(dtype), (1000, 2, 2))
    for one in (library.cosine(same), library.norm_ratio(same), *library.band(same)):
        np.testing.assert_array_equal(one, np.ones(1000))
    pull = np.broadcast_to(DPO.astype(dtype), (1000, 2))
    np.testing.assert_array_equal(library.first_order_change(same, pull), np.zeros((1000, 2)))


@pytest.mark.parametrize("size", [1e-30, 1e10, 1e37])
def test_the_size_of_a_float32_gram_does_not_matter(size):
    gram = jnp.array([[size, size], [size, 4 * size]], jnp.float32)
    pull = jnp.array([-2.0, 1.0], jnp.float32)
    np.testing.assert_allclose(diagnostics.cosine(gram), 0.5, rtol=1e-6)
    np.testing.assert_allclose(diagnostics.norm_ratio(gram), 2, rtol=1e-6)
    np.testing.assert_allclose(diagnostics.band(gram), (1, 4), rtol=1e-6)
    np.testing.assert_allclose(diagnostics.entanglement(gram), 1, rtol=1e-6)
    margin = diagnostics.band_margin(gram, pull)
    np.testing.assert_allclose(margin, np.log(2), rtol=1e-6)
    assert margin.dtype == jnp.float32


def test_other_shapes_are_refused_by_name():
    names = ("cosine", "norm_ratio", "band", "entanglement", "published_entanglement")
    alone = [getattr(diagnostics, name) for name in names]
    change = diagnostics.first_order_change
    for bad in (jnp.ones((3, 3)), jnp.ones((2, 2, 3)), jnp.ones(2)):
        for function in (*alone, lambda gram: change(gram, DPO)):
            with pytest.raises(ValueError, match="gram: got shape"):
                function(bad)
    with pytest.raises(ValueError, match="pull: got shape"):
        change(jnp.ones((4, 2, 2)), jnp.ones((1, 2)))  # would broadcast
    batch = diagnostics.batch_change
    with pytest.raises(ValueError, match="pull: got shape"):
        batch(jnp.ones((1, 2, 1, 2)), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="pull: got shape"):
        batch(jnp.ones((0, 2, 0, 2)), jnp.ones((0, 2)))


# The theory, by autodiff.


def last_layer(seed, vocab=6, width=4):
    draw = np.random.default_rng(seed)
    scale = 10 ** draw.uniform(-1, 1)
    return scale * draw.normal(size=(vocab, width)), draw.normal(size=width)


@jax.jit
def token_gram(W, hidden, tokens):
    def logp_fn(W, x):
        return jax.nn.log_softmax(W @ x[0])[x[1]]

    return gradients.pair_gram(logp_fn, W, (hidden, tokens))


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def test_the_last_layer_alone_is_always_ideal():
    """T1: one token, only the unembedding trained."""
    signs = set()
    for seed in range(20):
        W, h = last_layer(seed)
        s, H = softmax(W @ h), h @ h
        gram = np.asarray(token_gram(W, np.stack([h, h]), np.array([0, 1])))
        np.testing.assert_allclose(gram[0, 1], H * (s @ s - s[0] - s[1]), rtol=1e-9)
        np.testing.assert_allclose(gram[0, 0] - gram[0, 1], H * (1 - s[0] + s[1]), rtol=1e-9)
        np.testing.assert_allclose(gram[0, 1] - gram[1, 1], -H * (1 + s[0] - s[1]), rtol=1e-9)
        assert diagnostics.regime(gram, DPO) == Regime.IDEAL
        signs.add(bool(gram[0, 1] > 0))
    assert signs == {True, False}  # the inner product itself need not be negative


def test_single_tokens_of_two_prompts():
    """F3: <h, h'> (1[a = b] - p_h(b) - p_h'(a) + <p_h, p_h'>)."""
    W, h = last_layer(1)
    other = np.cos(h)
    p, q = softmax(W @ h), softmax(W @ other)
    for a, b in ((2, 2), (2, 3)):
        expected = (h @ other) * (float(a == b) - p[b] - q[a] + p @ q)
        found = token_gram(W, np.stack([h, other]), np.array([a, b]))
        np.testing.assert_allclose(found[0, 1], expected, rtol=1e-9)


def test_a_table_of_logits_never_displaces():
    """F2: d log pi_w = eta beta (1 - a) (1 - pi_w + pi_l) > 0."""
    reference, tokens = np.array([-2.0, -1.0]), np.array([0, 3])

    @jax.jit
    def gram_and_pull(z):
        gram = gradients.pair_gram(lambda z, t: jax.nn.log_softmax(z)[t], z, tokens)
        logp = jax.nn.log_softmax(z)[tokens]
        return gram, jax.grad(lambda logp: losses.dpo(logp, reference, beta=0.3))(logp)

    for seed in range(20):
        z = 3 * np.random.default_rng(seed).normal(size=5)
        p = softmax(z)
        change = diagnostics.first_order_change(*gram_and_pull(z))
        wrong = 1 / (1 + np.exp(0.3 * (np.log(p[0] / p[3]) + 1)))  # 1 - a
        np.testing.assert_allclose(change[0], 0.3 * wrong * (1 - p[0] + p[3]), rtol=1e-9)
        assert change[0] > 0


@pytest.mark.parametrize(
    ("eta", "expected"), [(1, [0.806, 0.140, 0.050, 0.004]), (3, [0.924, 0.059, 0.016, 0.0002])]
)
def test_pushing_an_unlikely_token_squeezes_into_the_likeliest(eta, expected):
    """F1: gradient ascent on -log p of the last of four tokens."""
    z = jnp.log(jnp.array([0.7, 0.2, 0.08, 0.02]))
    pushed = z - eta * jax.grad(lambda z: jax.nn.log_softmax(z)[3])(z)
    digits = [3, 3, 3, 4 if eta == 3 else 3]
    found = [round(float(p), d) for p, d in zip(jax.nn.softmax(pushed), digits, strict=True)]
    assert found == expected


@jax.jit
def of_a_suffix(suffix):
    """The Gram of a pair with up to eight shared tokens after the first."""
    vocab = 10
    first = jnp.log(jnp.array([0.5, 0.5] + [1e-300] * 8))
    later = [jnp.full(vocab, (1 - p) / 9).at[0].set(p) for p in (0.5, 0.1)]

    def logp_fn(params, response):
        """One vector a position, read at the distributions that the response's context gives."""
        token, context = response
        shift = jnp.where(context == 0, jnp.log(later[0]), jnp.log(later[1]))
        each = jax.nn.log_softmax(params["suffix"] + shift[None])[:, 0]
        own = jax.nn.log_softmax(first + params["first"])[token]
        return own + jnp.where(jnp.arange(8) < suffix, each, 0.0).sum()

    params = {"first": jnp.zeros(vocab), "suffix": jnp.zeros((8, vocab))}
    return gradients.pair_gram(logp_fn, params, (jnp.array([0, 1]), jnp.array([0, 1])))


@pytest.mark.parametrize(
    ("suffix", "cosine", "change"),
    [
        (0, -1, 1.0),
        (1, 0, 0.778),
        (2, 0.321, 0.556),
        (4, 0.584, 0.111),
        (5, 0.651, -0.111),
        (8, 0.764, -0.778),
    ],
)
def test_a_longer_shared_suffix_entangles_more(suffix, cosine, change):
    """T3: a logit vector for each position and response, a shared suffix after one other token."""
    gram = np.asarray(of_a_suffix(suffix))
    found = diagnostics.first_order_change(gram, DPO)
    assert round(float(diagnostics.cosine(gram)), 3) == cosine
    assert round(float(found[0]), 3) == change
    np.testing.assert_allclose(found[1], -1 - 0.4 * suffix, rtol=1e-9)
    expected = Regime.BOTH_DOWN if suffix >= 5 else Regime.IDEAL
    assert diagnostics.regime(gram, DPO) == expected
