"""The theory against the flow itself: Razin et al. (2024), Theorems 4 to 9 and Propositions 1 to 3,
the tabular lemma, the squeezing vectors, and the inner product of log-prob gradients.

What is measured knows no formula: the parameters (the unembedding and *all* hidden states of the
unconstrained features model) are moved forwards and backwards in time by Runge-Kutta steps of the
gradient of the loss, and the log-probabilities are differenced. What is stated is the theorem,
written out in NumPy as printed, but for ``-l'(u)`` where the paper's Theorem 5 and its remarks on
6, 7 and 9 print ``-l(u)``; that sign is tested to be wrong. No other disagreement was found.

Tolerance: fourth-order differences leave STEP^4 = 1e-16 times a fifth derivative, rounding leaves
about 1e-15 / STEP = 1e-11; so 1e-9 of the largest rate. A wrong term shows at order 1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxpref import embeddings, gradients
from jaxpref.models import tabular

DRAWS, VOCAB, WIDTH, STEP, TOLERANCE = 20, 11, 7, 1e-4, 1e-9
CHOSEN, REJECTED = 2, 5
PAIR = {"chosen": CHOSEN, "rejected": REJECTED}

# l(u), u = ln pi(y+|x) - ln pi(y-|x); DPO with beta 0.7, the reference margin is 0.3 throughout.
LOSSES = {
    "dpo": lambda u: jnp.logaddexp(0.0, -0.7 * (u - 0.3)),
    "ipo": lambda u: 0.05 * (u - 0.3 - 1 / (2 * 0.8)) ** 2,  # 0.05: a flow as fast as the others'
    "slic": lambda u: jnp.maximum(0.0, 40.0 - u),  # far from its corner
    "exponential": lambda u: jnp.exp(-0.2 * (u - 0.3)),
}


def loss_number(i):
    """One of `LOSSES` by its number, so that all are measured by one compiled program."""
    return lambda u: jnp.stack([l(u) for l in LOSSES.values()])[i]


@functools.cache
def drawn(*, length=1, prompts=1):
    """The policy, and DRAWS random parameter sets along a leading axis."""
    sizes = {"vocab": VOCAB, "width": WIDTH, "length": length, "prompts": prompts}

    policy, one = tabular.unconstrained_features(jax.random.key(7), **sizes, dtype=jnp.float64)
    flat, unravel = ravel_pytree(one)
    draws = 0.6 * jax.random.normal(jax.random.key(8), (DRAWS, flat.size), jnp.float64)
    return policy, jax.vmap(unravel)(draws)


def each_draw(params):
    """The draws one by one, as NumPy arrays."""
    return [jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), params) for i in range(DRAWS)]


# ------------------------------------------------------------------------------- the measured side


def next_logp(policy, params, prompt=0):
    """``ln pi(z|x)`` for all z: ``[vocab]``."""
    hidden = policy.hidden(params, jnp.array([[prompt]]))[0, 0]
    return jax.nn.log_softmax(policy.unembedding(params) @ hidden)


def response_logp(policy, params, response):
    """``ln pi(y|x)`` of a response to prompt 0."""
    hidden = policy.hidden(params, jnp.array([[0, *response[:-1]]]))[0]
    logp = jax.nn.log_softmax(hidden @ policy.unembedding(params).T)
    return logp[np.arange(len(response)), np.array(response)].sum()


def along_flow(loss, params, time):
    """Gradient flow ``d params / dt = -grad loss`` for a short `time`: one Runge-Kutta step."""

    def move(size, slope):
        return jax.tree.map(lambda leaf, s: leaf - size * s, params, slope)

    def stage(carry, coefficients):
        slope, total = carry
        part, weight = coefficients
        slope = jax.grad(loss)(move(part * time, slope))
        return (slope, jax.tree.map(lambda t, s: t + weight * s, total, slope)), None

    zero = jax.tree.map(jnp.zeros_like, params)
    table = jnp.array([[0, 1 / 6], [1 / 2, 1 / 3], [1 / 2, 1 / 3], [1, 1 / 6]], jnp.float64)
    (_, total), _ = jax.lax.scan(stage, (zero, zero), table)
    return move(time, total)


def measured_rate(outputs, loss, params):
    """Time derivative of ``outputs(params)`` along the flow, by fourth-order differences."""
    times = STEP * jnp.array([1.0, -1.0, 2.0, -2.0])
    one, minus_one, two, minus_two = jax.lax.map(
        lambda time: outputs(along_flow(loss, params, time)), times
    )
    return (8 * (one - minus_one) - (two - minus_two)) / (12 * STEP)


def compiled(function, *args):
    """Run once: most of the time would go into optimizing the program."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.tree.map(np.asarray, jax.jit(function, compiler_options=options)(*args))


def every_draw(function, params):
    return compiled(jax.vmap(function), params)


def every_loss(function, params):
    """``function(l, params)`` for each loss and draw: leaves of ``[losses draws ...]``."""
    draws = jax.vmap(lambda i, p: function(loss_number(i), p), in_axes=(None, 0))
    return compiled(jax.vmap(draws, in_axes=(0, None)), jnp.arange(len(LOSSES)), params)


def assert_same_rates(measured, stated):
    assert measured.shape == stated.shape
    assert np.abs(stated).max() > 0.1  # not an agreement of zeros
    np.testing.assert_allclose(measured, stated, rtol=0, atol=TOLERANCE * np.abs(stated).max())


# --------------------------------------------------------------------- one sample of single tokens


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def next_margin(policy, params):
    logp = next_logp(policy, params)
    return logp[CHOSEN] - logp[REJECTED]


@pytest.fixture(scope="module")
def single():
    """Measured rates ``[losses draws vocab]``, ``-l'(u)``, ``-l(u)``, and `flow_rates`' rates."""
    policy, params = drawn()

    def measure(l, params):
        def logp(p):
            return next_logp(policy, p)

        rates = measured_rate(logp, lambda p: l(next_margin(policy, p)), params)
        exact = gradients.flow_rates(logp, lambda f: l(f[CHOSEN] - f[REJECTED]), params)[1]
        u = next_margin(policy, params)
        return rates, -jax.grad(l)(u), -l(u), exact

    return every_loss(measure, params)


def theorem_4(W, h):
    """The bracket, as printed."""
    p = softmax(W @ h)
    up, down = W[CHOSEN], W[REJECTED]
    error = 1 - p[CHOSEN] + p[REJECTED]
    magnitude = (1 - p[CHOSEN]) * up @ up + p[REJECTED] * down @ down + error * h @ h
    rest = [z for z in range(VOCAB) if z not in (CHOSEN, REJECTED)]
    return magnitude - error * up @ down - sum(p[z] * W[z] @ (up - down) for z in rest)


def theorem_5(W, h):
    """The bracket for every token outside the pair (elsewhere it does not apply)."""
    p, D = softmax(W @ h), W[CHOSEN] - W[REJECTED]
    constant = (p[REJECTED] - p[CHOSEN]) * h @ h - sum(p[z] * W[z] @ D for z in range(VOCAB))
    return np.array([W[z] @ D + constant for z in range(VOCAB)])


def of_single(bracket):
    _, params = drawn()
    return np.stack([bracket(p["unembedding"], p["hidden"][0, 0]) for p in each_draw(params)])


def test_theorem_4_the_chosen_token(single):
    rates, pull, _, _ = single
    assert_same_rates(rates[..., CHOSEN], pull * of_single(theorem_4))


def test_theorem_5_every_other_token(single):
    rates, pull, _, _ = single
    others = np.setdiff1d(np.arange(VOCAB), [CHOSEN, REJECTED])
    assert_same_rates(rates[..., others], pull[..., None] * of_single(theorem_5)[:, others])


def test_the_misprinted_sign_is_wrong(single):
    """With ``-l(u)`` for ``-l'(u)`` Theorem 5 is wrong for each loss, by as much as there is."""
    rates, _, misprint, _ = single
    others = np.setdiff1d(np.arange(VOCAB), [CHOSEN, REJECTED])
    wrong = rates[..., others] - misprint[..., None] * of_single(theorem_5)[:, others]
    wrong, right = (np.abs(x).max(axis=(1, 2)) for x in (wrong, rates[..., others]))
    assert np.all(wrong > 0.5 * right)
    assert wrong.max() > 100  # SLiC: l is near 40 where l' is -1


def test_the_library_states_the_same_rates_for_every_token(single):
    """`embeddings.token_rates`, the pair's own two tokens included, and `chosen_terms`."""
    rates, pull, _, _ = single
    _, params = drawn()

    def stated(p):
        W, h = p["unembedding"], p["hidden"][0, 0]
        terms = embeddings.chosen_terms(W, h, **PAIR)
        return jnp.append(embeddings.token_rates(W, h, **PAIR), sum(terms))

    brackets = pull[..., None] * every_draw(stated, params)
    assert_same_rates(rates, brackets[..., :VOCAB])
    assert_same_rates(rates[..., CHOSEN], brackets[..., VOCAB])


def test_flow_rates_are_the_measured_rates(single):
    rates, _, _, exact = single
    assert_same_rates(rates, exact)


def test_theorem_4_displaces_where_the_similarity_outweighs_the_magnitude():
    """``W- = 3 W+``, other rows and the hidden state zero: the bracket is negative."""
    policy, _ = drawn()
    W = jnp.zeros((VOCAB, WIDTH)).at[CHOSEN, 0].set(1.0).at[REJECTED, 0].set(3.0)
    params = {"unembedding": W, "hidden": jnp.zeros((1, 1, WIDTH))}
    terms = embeddings.chosen_terms(W, jnp.zeros(WIDTH), **PAIR)
    # 10/11 * 1 + 1/11 * 9, then -1 * 3, and the others are orthogonal to everything.
    np.testing.assert_allclose(terms, (19 / 11, -3.0, 0.0), rtol=1e-12)

    def before_and_after(params):
        later = along_flow(lambda p: LOSSES["dpo"](next_margin(policy, p)), params, 0.05)
        return next_logp(policy, params), next_logp(policy, later)

    before, after = compiled(before_and_after, params)
    assert after[CHOSEN] - after[REJECTED] > before[CHOSEN] - before[REJECTED]  # the loss falls
    assert after[CHOSEN] < before[CHOSEN]


# --------------------------------------------------------------------------- one pair of sequences

# Different from the first token on; lengths 3, 2 and 3; tokens shared, so that coefficients of both
# signs occur.
Y_CHOSEN, Y_REJECTED, Y_OTHER = (2, 7, 4), (5, 4), (9, 7, 7)


def sequence_margin(policy, params):
    return response_logp(policy, params, Y_CHOSEN) - response_logp(policy, params, Y_REJECTED)


@pytest.fixture(scope="module")
def sequential():
    """Measured rates of y+ and of another response ``[losses draws 2]``, ``-l'(u)``, and the
    products ``<grad+, grad+ - grad->`` and ``|grad+|^2`` of the log-probs' gradients."""
    policy, params = drawn(length=3)

    def measure(l, params):
        def outputs(p):
            return jnp.stack([response_logp(policy, p, y) for y in (Y_CHOSEN, Y_OTHER)])

        def slope(y):
            return ravel_pytree(jax.grad(lambda p: response_logp(policy, p, y))(params))[0]

        rates = measured_rate(outputs, lambda p: l(sequence_margin(policy, p)), params)
        up, down = slope(Y_CHOSEN), slope(Y_REJECTED)
        return rates, -jax.grad(l)(sequence_margin(policy, params)), up @ (up - down), up @ up

    return every_loss(measure, params)


def states_of(params, response):
    """For each token of a response: its prefix's state, and ``e_{y_k} - pi(.|x, y_<k)``."""
    states, errors = [], []
    for k, token in enumerate(response):
        row = sum(VOCAB**j for j in range(k))  # shorter prefixes come first
        row += sum(t * VOCAB ** (k - 1 - j) for j, t in enumerate(response[:k]))
        states.append(params["hidden"][0, row])
        errors.append(np.eye(VOCAB)[token] - softmax(params["unembedding"] @ states[-1]))
    return states, errors


def coefficients(first, second):
    return np.array([[e @ other for other in second[1]] for e in first[1]])


def coupling(first, second):
    """``sum_{k k'} a_{k k'} <h_k, h_k'>``."""
    products = [[h @ other for other in second[0]] for h in first[0]]
    return (coefficients(first, second) * np.array(products)).sum()


def theorem_6(params):
    W = params["unembedding"]
    chosen, rejected = states_of(params, Y_CHOSEN), states_of(params, Y_REJECTED)
    p = softmax(W @ chosen[0][0])
    y, y_ = Y_CHOSEN[0], Y_REJECTED[0]
    magnitude = (1 - p[y]) * W[y] @ W[y] + p[y_] * W[y_] @ W[y_]
    for k in range(1, len(Y_CHOSEN)):
        gap = W[Y_CHOSEN[k]] - softmax(W @ chosen[0][k]) @ W
        magnitude += gap @ gap
    similarity = -(1 - p[y] + p[y_]) * W[y] @ W[y_]
    similarity -= sum(p[z] * W[z] @ (W[y] - W[y_]) for z in range(VOCAB) if z not in (y, y_))
    return magnitude + similarity - coupling(chosen, rejected) + coupling(chosen, chosen)


def theorem_7(params):
    W = params["unembedding"]
    chosen, rejected, other = (states_of(params, y) for y in (Y_CHOSEN, Y_REJECTED, Y_OTHER))
    D, p = W[Y_CHOSEN[0]] - W[Y_REJECTED[0]], softmax(W @ chosen[0][0])
    constant = -sum(p[z] * W[z] @ D for z in range(VOCAB))
    first = W[Y_OTHER[0]] @ D
    return constant + first - coupling(other, rejected) + coupling(other, chosen)


@pytest.mark.parametrize(("which", "bracket"), [(0, theorem_6), (1, theorem_7)])
def test_theorems_6_and_7_the_chosen_and_another_sequence(sequential, which, bracket):
    rates, pull, _, _ = sequential
    _, params = drawn(length=3)
    assert_same_rates(rates[..., which], pull * np.stack([bracket(p) for p in each_draw(params)]))


def test_theorem_6_coefficients_lie_within_two_and_have_both_signs():
    _, params = drawn(length=3)
    pairs = [(states_of(p, Y_CHOSEN), states_of(p, Y_REJECTED)) for p in each_draw(params)]
    found = np.stack([coefficients(chosen, rejected) for chosen, rejected in pairs])
    assert np.all(np.abs(found) <= 2)
    assert found.min() < 0 < found.max()


# ---------------------------------------------------------------- several samples of single tokens

# One a prompt. The later ones agree with the first on y+, contradict it, take up its rejected
# token, repeat it, and share nothing with it.
SAMPLES = [(2, 5), (2, 7), (4, 2), (5, 9), (2, 5), (3, 8)]


def theorem_8(p, h, other, up, down):
    """What a further sample adds to the chosen token's rate, per unit of its ``-l' / |D|``."""
    return ((up == CHOSEN) - (down == CHOSEN) + p[down] - p[up]) * h @ other


def theorem_9(p, h, other, up, down, z):
    """What any sample, the own one included, adds to the rate of token z by its prompt's state."""
    return ((z == up) - (z == down)) * h @ other + (p[down] - p[up]) * h @ other


def test_theorems_8_and_9_several_samples():
    policy, params = drawn(prompts=len(SAMPLES))

    prompts = np.arange(len(SAMPLES))
    ups, downs = np.array(SAMPLES).T

    def margins(params):
        hidden = policy.hidden(params, jnp.asarray(prompts)[:, None])[:, 0]
        logp = jax.nn.log_softmax(hidden @ policy.unembedding(params).T)
        return logp[prompts, ups] - logp[prompts, downs]

    def rates(l, params):
        def loss(p):
            return jax.vmap(l)(margins(p)).mean()

        pulls = -jax.vmap(jax.grad(l))(margins(params)) / len(SAMPLES)
        return measured_rate(lambda p: next_logp(policy, p), loss, params), pulls

    measured, pull = every_loss(rates, params)
    chosen, every = np.zeros_like(measured[..., 0]), np.zeros_like(measured)
    for d, draw in enumerate(each_draw(params)):
        W, H = draw["unembedding"], draw["hidden"][:, 0]
        h, p, D = H[0], softmax(W @ H[0]), W[CHOSEN] - W[REJECTED]
        chosen[:, d] = pull[:, d, 0] * theorem_4(W, h)
        every[:, d] = pull[:, d, :1] * (W @ D - p @ (W @ D))
        for i, (up, down) in enumerate(SAMPLES):
            if i > 0:
                chosen[:, d] += pull[:, d, i] * theorem_8(p, h, H[i], up, down)
            for z in range(VOCAB):
                every[:, d, z] += pull[:, d, i] * theorem_9(p, h, H[i], up, down, z)
    assert_same_rates(measured[..., CHOSEN], chosen)
    assert_same_rates(measured, every)


# ------------------------------------------------------------------------------------ propositions


def test_proposition_1_an_sft_term_adds_its_squared_gradient(sequential):
    policy, params = drawn(length=3)
    weight = 0.35

    def rate(l, params):
        def chosen(p):
            return response_logp(policy, p, Y_CHOSEN)

        def loss(p):
            return l(sequence_margin(policy, p)) - weight * chosen(p)

        return measured_rate(chosen, loss, params)

    _, pull, product, squared = sequential
    assert_same_rates(every_loss(rate, params), pull * product + weight * squared)


def test_proposition_2_weights_on_the_two_log_probabilities(sequential):
    """``mu(w+ ln pi+ - w- ln pi-)``: the plain rate E times rho, and gamma squared gradients."""
    policy, params = drawn(length=3)
    up, down = 1.3, 0.8

    def weighted(p):
        chosen = response_logp(policy, p, Y_CHOSEN)
        return up * chosen - down * response_logp(policy, p, Y_REJECTED)

    def rate(l, params):
        measured = measured_rate(
            lambda p: response_logp(policy, p, Y_CHOSEN), lambda p: l(weighted(p)), params
        )
        return measured, jax.grad(l)(weighted(params))  # mu', of the same family as l

    measured, slope = every_loss(rate, params)
    _, pull, product, squared = sequential
    rho, gamma = down * slope / -pull, (up - down) * -slope
    assert_same_rates(measured, rho * (pull * product) + gamma * squared)


@pytest.fixture(scope="module")
def head_only():
    """Training ``W`` alone: the chosen token's rate, ``-l'(u)``, and ``ln p+, -L`` along a flow."""
    policy, params = drawn()

    def measure(l, params):
        def trained(W):
            return params | {"unembedding": W}

        def chosen(W):
            return next_logp(policy, trained(W))[CHOSEN]

        def loss(W):
            return l(next_margin(policy, trained(W)))

        def step(W, _):
            W = along_flow(loss, W, 0.01)
            return W, jnp.stack([chosen(W), -loss(W)])

        W = params["unembedding"]
        path = jax.lax.scan(step, W, length=150)[1]
        return measured_rate(chosen, loss, W), -jax.grad(l)(next_margin(policy, params)), path

    return every_loss(measure, params)


def test_proposition_3_rate_with_the_hidden_states_fixed(head_only):
    def bracket(W, h):
        p = softmax(W @ h)
        return (1 - p[CHOSEN] + p[REJECTED]) * h @ h

    rates, pull, _ = head_only
    assert_same_rates(rates, pull * of_single(bracket))
    assert np.all(rates[list(LOSSES).index("dpo")] > 0)


def test_proposition_3_no_displacement_along_the_whole_flow(head_only):
    """The chosen token rises at every step and the loss falls."""
    _, pull, path = head_only  # path: [losses draws steps 2]
    kept = pull > 0  # IPO pulls a margin beyond its optimum down again: not in the proposition
    assert kept.mean() > 0.8
    # Rises of converged values are rounding: a few 1e-16 of numbers up to 40.
    assert np.all(np.diff(path[kept], axis=1) >= -3e-14)
    assert np.all(path[kept][:, -1] > path[kept][:, 0])


# ------------------------------------------------------------------------------- the tabular lemma


def free_logits():
    logits = 1.5 * jax.random.normal(jax.random.key(11), (DRAWS, 1, VOCAB), jnp.float64)
    return tabular.softmax(logits[0])[0], jax.vmap(lambda row: tabular.softmax(row)[1])(logits)


def dpo(policy):
    return lambda params: LOSSES["dpo"](next_margin(policy, params))


def test_tabular_lemma_first_order():
    """``d ln pi_w = beta (1 - a) (1 - pi_w + pi_l) > 0``, ``a = sigmoid(beta (u - u_ref))``."""
    policy, params = free_logits()
    rates = every_draw(
        lambda p: measured_rate(lambda q: next_logp(policy, q)[CHOSEN], dpo(policy), p), params
    )
    stated = []
    for draw in each_draw(params):
        p = softmax(draw["logits"][0, 0])
        a = 1 / (1 + np.exp(-0.7 * (np.log(p[CHOSEN] / p[REJECTED]) - 0.3)))
        stated.append(0.7 * (1 - a) * (1 - p[CHOSEN] + p[REJECTED]))
    assert_same_rates(rates, np.array(stated))
    assert min(stated) > 0


def test_tabular_lemma_holds_for_steps_of_any_size():
    """Moving ``g`` from one logit to another adds ``g - ln(1 + pi_w (e^g - 1) + pi_l (e^-g - 1))``,
    positive for every ``g > 0``: descent with a huge rate does not displace either."""
    policy, params = free_logits()

    def rise(params):
        slope = jax.grad(dpo(policy))(params)
        p, before = jnp.exp(next_logp(policy, params)), next_logp(policy, params)[CHOSEN]

        def by(size):
            moved = jax.tree.map(lambda leaf, s: leaf - size * s, params, slope)
            g = size * slope["logits"][0, 0, REJECTED]
            stated = g - jnp.log1p(p[CHOSEN] * jnp.expm1(g) + p[REJECTED] * jnp.expm1(-g))
            return jnp.stack([next_logp(policy, moved)[CHOSEN] - before, stated])

        return jax.vmap(by)(jnp.array([1e-3, 1.0, 100.0]))

    measured, stated = np.moveaxis(every_draw(rise, params), -1, 0)
    assert np.all(measured > 0)
    # The measured rise is a difference of numbers of order 1: rounding of 1e-15 each.
    np.testing.assert_allclose(measured, stated, rtol=1e-9, atol=1e-14)


def test_tabular_lemma_along_the_whole_flow():
    policy, params = free_logits()

    def path(params):
        def step(params, _):
            params = along_flow(dpo(policy), params, 0.5)
            return params, next_logp(policy, params)[CHOSEN]

        return jax.lax.scan(step, params, length=100)[1]

    assert np.all(np.diff(every_draw(path, params), axis=1) > 0)


# ---------------------------------------------------- squeezing, learning dynamics, inner products


@jax.jit
def pushed_down(start, rate):
    """Probabilities after one descent step on ``+ln pi`` of the last token."""
    policy, params = tabular.softmax(jnp.log(start)[None])
    slope = jax.grad(lambda p: next_logp(policy, p)[-1])(params)
    moved = jax.tree.map(lambda leaf, s: leaf - rate * s, params, slope)
    return jnp.exp(next_logp(policy, moved))


@pytest.mark.parametrize(
    ("rate", "expected"), [(1.0, (0.806, 0.140, 0.050, 0.004)), (3.0, (0.924, 0.059, 0.016, 0.0))]
)
def test_squeezing_pushes_all_mass_to_the_argmax(rate, expected):
    """Ren & Sutherland (2025): from (.7, .2, .08, .02) all but the argmax fall."""
    start = np.array([0.7, 0.2, 0.08, 0.02])
    found = pushed_down(start, rate)
    np.testing.assert_allclose(found, expected, atol=0.5e-3)  # three decimals are printed
    np.testing.assert_array_equal(np.sign(found - start), [1, -1, -1, -1])


def test_squeezing_leaves_the_printed_probability_of_the_pushed_token():
    found = pushed_down(np.array([0.7, 0.2, 0.08, 0.02]), 3.0)
    np.testing.assert_allclose(found[3], 0.0002, atol=0.5e-4)  # four decimals are printed


def test_squeezing_is_worse_for_a_peaked_policy_and_a_rare_token():
    starts = np.array([(0.4, 0.25, 0.25, 0.1), (0.7, 0.1, 0.1, 0.1), (0.78, 0.1, 0.1, 0.02)])
    flat, peaked, rare = (float(np.log(pushed_down(s, 1.0)[1] / s[1])) for s in starts)
    assert rare < peaked < flat


def test_learning_dynamics_decompose_into_a_k_g():
    """``d ln pi(.|o) = -A(o) K(o, u) G(u)``: here ``K = <h_o, h_u> I``, only ``W`` trained."""
    policy, params = drawn(prompts=2)

    def rates(params):
        def logp(W, prompt):
            return next_logp(policy, params | {"unembedding": W}, prompt)

        def sft(W):
            return -logp(W, 1)[CHOSEN]

        def dpo(W):
            return LOSSES["dpo"](logp(W, 1)[CHOSEN] - logp(W, 1)[REJECTED])

        W = params["unembedding"]
        return jnp.stack([measured_rate(lambda W: logp(W, 0), loss, W) for loss in (sft, dpo)])

    stated = []
    for draw in each_draw(params):
        W, (h, h2) = draw["unembedding"], draw["hidden"][:, 0]
        p, p2 = softmax(W @ h), softmax(W @ h2)
        up, down = p2 - np.eye(VOCAB)[CHOSEN], p2 - np.eye(VOCAB)[REJECTED]
        a = 1 / (1 + np.exp(-0.7 * (np.log(p2[CHOSEN] / p2[REJECTED]) - 0.3)))
        A = np.eye(VOCAB) - np.outer(np.ones(VOCAB), p)
        K = h @ h2 * np.eye(VOCAB)
        stated.append([-A @ K @ up, -A @ K @ (0.7 * (1 - a) * (up - down))])
    assert_same_rates(every_draw(rates, params), np.array(stated))


def test_inner_products_of_log_prob_gradients_in_the_unembedding():
    """``<h, h'> (1[a=b] - pi_h(b) - pi_h'(a) + <pi_h, pi_h'>)``, Razin et al. (2025)."""
    policy, params = drawn(prompts=2)

    def products(params):
        def slopes(prompt):
            logp = lambda W: next_logp(policy, params | {"unembedding": W}, prompt)  # noqa: E731
            return jax.jacrev(logp)(params["unembedding"]).reshape(VOCAB, -1)

        return slopes(0) @ slopes(1).T

    stated = np.zeros((DRAWS, VOCAB, VOCAB))
    for d, draw in enumerate(each_draw(params)):
        W, (h, h2) = draw["unembedding"], draw["hidden"][:, 0]
        p, p2 = softmax(W @ h), softmax(W @ h2)
        for a, b in np.ndindex(VOCAB, VOCAB):
            stated[d, a, b] = h @ h2 * ((a == b) - p[b] - p2[a] + p @ p2)
    found = every_draw(products, params)
    np.testing.assert_allclose(found, stated, rtol=0, atol=1e-13)  # no differences: rounding only


def test_a_reward_head_moves_by_hidden_states_alone():
    """A linear head: ``d r(y) = g <h_y, h_+ - h_->``, ``g = sigmoid(-margin)``."""
    drawn = jax.random.normal(jax.random.key(13), (4, WIDTH), jnp.float64)
    head, H = drawn[0], drawn[1:]

    def rate(head):
        return gradients.flow_rates(
            lambda head: H @ head, lambda r: jnp.logaddexp(0.0, r[1] - r[0]), head
        )

    (rewards, rates), states = compiled(rate, head), np.asarray(H)
    stated = states @ (states[0] - states[1]) / (1 + np.exp(rewards[0] - rewards[1]))
    np.testing.assert_allclose(rates, stated, rtol=1e-12)
