"""`jaxpref.embeddings.geometry`: worked values, laws, naive loops. The flow: test_theorems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxpref import embeddings

VOCAB, WIDTH, CHOSEN, REJECTED = 11, 7, 2, 5
PAIR = {"chosen": CHOSEN, "rejected": REJECTED}


@pytest.fixture(scope="module")
def drawn():
    first, second = jax.random.split(jax.random.key(5))
    W = jax.random.normal(first, (VOCAB, WIDTH), jnp.float64)
    return W, jax.random.normal(second, (WIDTH,), jnp.float64)


@pytest.fixture(scope="module")
def rotation():
    square = jax.random.normal(jax.random.key(6), (WIDTH, WIDTH), jnp.float64)
    return jnp.linalg.qr(square)[0]


# Two tokens, h = 0: p = (1/2, 1/2), W+ = (2, 0), W- = (1, 3), so <W+, W-> = 2, D = (1, -3).
WORKED = jnp.array([[2.0, 0.0], [1.0, 3.0]])
WORKED_PAIR = {"chosen": 0, "rejected": 1}


def test_chosen_terms_of_the_worked_pair():
    terms = embeddings.chosen_terms(WORKED, jnp.zeros(2), **WORKED_PAIR)
    assert [float(t) for t in terms] == [7.0, -2.0, 0.0]  # 4/2 + 10/2; -(1) * 2; nobody else


def test_a_norm_does_not_hide_a_nan():
    assert np.isnan(
        embeddings.direction_geometry(WORKED.at[0, 0].set(jnp.nan), **WORKED_PAIR)
    ).all()


def test_token_rates_of_the_worked_pair():
    # <W_z, D> = (2, -8), their mean under p is -3: rates (5, -5); 5 = 7 - 2 as above.
    assert embeddings.token_rates(WORKED, jnp.zeros(2), **WORKED_PAIR).tolist() == [5.0, -5.0]


def test_direction_of_the_worked_pair():
    assert embeddings.unembedding_direction(WORKED, **WORKED_PAIR).tolist() == [2.0, -8.0]


@pytest.mark.parametrize(
    ("chosen_norm", "rejected_norm", "product", "along", "across"),
    [
        pytest.param(2.3055, 2.1509, 1.7760, 1.535, 2.008, id="Yes>No"),
        pytest.param(2.1509, 2.3186, 1.1371, 1.622, 2.258, id="No>Never"),
    ],
)
def test_geometry_of_the_published_inner_products(
    chosen_norm, rejected_norm, product, along, across
):
    """OLMo-1B: from the norms and inner products of the rows to Table 13."""
    first = product / chosen_norm
    W = jnp.array([[chosen_norm, 0.0], [first, np.sqrt(rejected_norm**2 - first**2)]])
    found = embeddings.direction_geometry(W, chosen=0, rejected=1)
    # Inputs have four decimals: the results are good to three.
    np.testing.assert_allclose(found, (along, across), atol=1e-3)


def test_geometry_obeys_pythagoras(drawn):
    W, _ = drawn
    along, across = embeddings.direction_geometry(W, **PAIR)
    whole = np.linalg.norm(np.asarray(W)[CHOSEN] - np.asarray(W)[REJECTED])
    np.testing.assert_allclose(along**2 + across**2, whole**2, rtol=1e-13)


def test_geometry_of_a_zero_row_is_all_across():
    along, across = embeddings.direction_geometry(
        jnp.array([[0.0, 0.0], [3.0, 4.0]]), chosen=0, rejected=1
    )
    assert (float(along), float(across)) == (0.0, 5.0)


def test_direction_equals_a_loop(drawn):
    W, _ = drawn
    rows = np.asarray(W)
    naive = [
        sum(rows[z, i] * (rows[CHOSEN, i] - rows[REJECTED, i]) for i in range(WIDTH))
        for z in range(VOCAB)
    ]
    np.testing.assert_allclose(embeddings.unembedding_direction(W, **PAIR), naive, rtol=1e-12)


def test_terms_equal_a_loop(drawn):
    W, h = (np.asarray(x) for x in drawn)
    weights = np.exp(W @ h)
    p = weights / weights.sum()
    error = 1 - p[CHOSEN] + p[REJECTED]
    magnitude = (1 - p[CHOSEN]) * W[CHOSEN] @ W[CHOSEN] + p[REJECTED] * W[REJECTED] @ W[REJECTED]
    others = -sum(
        p[z] * W[z] @ (W[CHOSEN] - W[REJECTED]) for z in range(VOCAB) if z not in (CHOSEN, REJECTED)
    )
    expected = (magnitude + error * h @ h, -error * W[CHOSEN] @ W[REJECTED], others)
    np.testing.assert_allclose(embeddings.chosen_terms(*drawn, **PAIR), expected, rtol=1e-12)


def test_terms_sum_to_the_chosen_tokens_rate(drawn):
    terms = embeddings.chosen_terms(*drawn, **PAIR)
    rates = embeddings.token_rates(*drawn, **PAIR)
    np.testing.assert_allclose(sum(terms), rates[CHOSEN], rtol=1e-12)


def test_rates_conserve_probability(drawn):
    W, h = drawn
    rates = embeddings.token_rates(W, h, **PAIR)
    np.testing.assert_allclose(jax.nn.softmax(W @ h) @ rates, 0.0, atol=1e-13)


def test_rates_rank_the_other_tokens_by_the_direction_alone(drawn):
    W, h = drawn
    rates = embeddings.token_rates(W, h, **PAIR)
    direction = embeddings.unembedding_direction(W, **PAIR)
    others = np.array([z for z in range(VOCAB) if z not in (CHOSEN, REJECTED)])
    np.testing.assert_allclose(np.ptp(rates[others] - direction[others]), 0.0, atol=1e-13)


def test_a_rotation_of_the_space_changes_nothing(drawn, rotation):
    W, h = drawn
    for function in (embeddings.chosen_terms, embeddings.token_rates):
        turned = function(W @ rotation, h @ rotation, **PAIR)
        np.testing.assert_allclose(turned, function(W, h, **PAIR), rtol=1e-11, atol=1e-12)
    for function in (embeddings.unembedding_direction, embeddings.direction_geometry):
        turned = function(W @ rotation, **PAIR)
        np.testing.assert_allclose(turned, function(W, **PAIR), rtol=1e-11, atol=1e-12)


def test_near_certainty_the_magnitude_keeps_its_digits():
    """At p+ = 1 - 1e-20 a difference 1 - p+ would be exactly zero."""
    W = jnp.array([[46.0, 0.0], [0.0, 46.0], [0.0, 0.0]])
    terms = embeddings.chosen_terms(W, jnp.array([1.0, 0.0]), chosen=0, rejected=1)
    rest = np.exp(-46.0)  # of each of the other two, to first order
    expected = 2 * rest * 46.0**2 + rest * 46.0**2 + 3 * rest
    np.testing.assert_allclose(terms.magnitude, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["unembedding_direction", "direction_geometry"])
def test_derivatives_agree_with_finite_differences(drawn, name):
    function = getattr(embeddings, name)
    check_grads(lambda W: function(W, **PAIR), drawn[:1], order=1, modes=["rev"])


@pytest.mark.parametrize(
    "W",
    [
        pytest.param([[0.0, 0.0], [3.0, 4.0]], id="zero chosen row"),
        pytest.param([[1.0, 2.0], [2.0, 4.0]], id="rows along one line"),
        pytest.param([[1.0, 2.0], [1.0, 2.0]], id="equal rows"),
    ],
)
def test_geometry_has_finite_derivatives_where_a_norm_is_zero(W):
    slope = jax.jacrev(lambda W: embeddings.direction_geometry(W, chosen=0, rejected=1))(
        jnp.array(W)
    )
    assert all(np.all(np.isfinite(part)) for part in slope)


def test_bfloat16_rows_are_summed_in_float32():
    """Sums of 4,096 ones: bfloat16 cannot count past 256."""
    W = jnp.ones((3, 4096), jnp.bfloat16).at[1].set(0.0)
    direction = embeddings.unembedding_direction(W, chosen=0, rejected=1)
    assert direction.dtype == jnp.float32
    assert direction.tolist() == [4096.0, 0.0, 4096.0]


@pytest.mark.parametrize(
    "name", ["unembedding_direction", "direction_geometry", "chosen_terms", "token_rates"]
)
def test_every_product_asks_for_the_highest_precision(drawn, name):
    """Machines whose float32 products default to fewer digits would turn signs."""
    args = drawn if name in ("chosen_terms", "token_rates") else drawn[:1]
    program = str(jax.make_jaxpr(lambda *x: getattr(embeddings, name)(*x, **PAIR))(*args))
    assert program.count("dot_general[") > 0
    assert program.count("Precision.HIGHEST, Precision.HIGHEST") == program.count("dot_general[")


def test_a_batch_of_pairs_is_a_vmap(drawn):
    W, _ = drawn
    chosen, rejected = jnp.array([2, 5]), jnp.array([5, 9])
    batched = jax.jit(
        jax.vmap(lambda c, r: embeddings.unembedding_direction(W, chosen=c, rejected=r))
    )(chosen, rejected)
    for row, (c, r) in zip(batched, [(2, 5), (5, 9)], strict=True):
        alone = embeddings.unembedding_direction(W, chosen=c, rejected=r)
        np.testing.assert_allclose(row, alone, rtol=1e-12)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ({"chosen": 11, "rejected": 5}, "chosen: got token 11, expected one of 0 to 10"),
        ({"chosen": 2, "rejected": -1}, "rejected: got token -1, expected one of 0 to 10"),
        ({"chosen": 2, "rejected": 2}, "rejected: got token 2, expected another than chosen"),
    ],
)
def test_a_token_that_cannot_be_is_an_error(drawn, pair, message):
    W, h = drawn
    with pytest.raises(ValueError, match=message):
        embeddings.unembedding_direction(W, **pair)
    with pytest.raises(ValueError, match=message):
        embeddings.token_rates(W, h, **pair)


def test_a_matrix_of_another_width_is_a_shape_error(drawn):
    W, h = drawn
    with pytest.raises(Exception, match="hidden"):
        embeddings.token_rates(W, h[:-1], **PAIR)


def test_arrays_of_numpy_give_the_same_numbers(drawn):
    W, h = drawn
    for function, args in (
        (embeddings.unembedding_direction, (W,)),
        (embeddings.direction_geometry, (W,)),
        (embeddings.chosen_terms, (W, h)),
        (embeddings.token_rates, (W, h)),
    ):
        jax.tree.map(
            np.testing.assert_array_equal,
            function(*args, **PAIR),
            function(*map(np.asarray, args), **PAIR),
        )
