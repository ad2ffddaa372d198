"""`jaxpref.models.tabular`: which row a prefix reads, in every layout, and the sizes refused."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import logprobs
from jaxpref.models import tabular

VOCAB, LENGTH, PROMPTS = 3, 3, 2
ROWS = 1 + 3 + 9  # the empty prefix, one token, two tokens


@pytest.fixture(scope="module")
def model():
    """A language model whose logits all differ, and a naive look-up of the same numbers."""
    policy, params = tabular.language_model(
        jax.random.key(1), vocab=VOCAB, length=LENGTH, prompts=PROMPTS, dtype=jnp.float64
    )
    prefixes = [p for n in range(LENGTH) for p in itertools.product(range(VOCAB), repeat=n)]
    table = {
        (prompt, prefix): np.asarray(params["logits"][prompt, row])
        for prompt in range(PROMPTS)
        for row, prefix in enumerate(prefixes)
    }
    return policy, params, table


def naive_logp(table, prompt, response):
    total = 0.0
    for k, token in enumerate(response):
        logits = table[prompt, response[:k]]
        total += logits[token] - np.log(sum(np.exp(logits)))
    return total


def test_softmax_of_a_worked_table():
    policy, params = tabular.softmax(jnp.log(jnp.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])))
    hidden = jax.jit(policy.hidden)(params, jnp.array([[1], [0]]))
    p = jax.nn.softmax(hidden[:, 0] @ policy.unembedding(params).T)
    np.testing.assert_allclose(p, [[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]], rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int64])
def test_every_prefix_reads_its_own_row(model, dtype):
    policy, params, table = model
    assert params["logits"].shape == (PROMPTS, ROWS, VOCAB)
    responses = list(itertools.product(range(VOCAB), repeat=LENGTH - 1))
    tokens = jnp.array([(x, *y) for x in range(PROMPTS) for y in responses], dtype)
    hidden = jax.jit(policy.hidden)(params, tokens)
    for row, (prompt, *response) in enumerate(tokens.tolist()):
        for k in range(LENGTH):
            expected = table[prompt, tuple(response[:k])]
            np.testing.assert_array_equal(hidden[row, k], expected)


def test_unconstrained_features_read_the_same_rows_and_their_own_unembedding():
    sizes = {"vocab": VOCAB, "length": LENGTH, "prompts": PROMPTS}
    policy, params = tabular.unconstrained_features(jax.random.key(2), width=4, **sizes)
    assert params["hidden"].shape == (PROMPTS, ROWS, 4)
    assert policy.unembedding(params).shape == (VOCAB, 4)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hidden = jax.jit(policy.hidden)(params, jnp.array([[1, 2, 0]]))[0]
    # (), (2), (2, 0): rows 0, 1 + 2, 1 + 3 + (2 * 3 + 0).
    np.testing.assert_array_equal(hidden, params["hidden"][1, np.array([0, 3, 10])])


def test_positions_past_the_table_are_nan_and_those_that_attend_to_nothing_zero(model):
    policy, params, _ = model
    tokens = jnp.array([[1, 0, 2, 2, 1, 0]])
    hidden = jax.jit(policy.hidden)(params, tokens)
    assert np.all(np.any(hidden[0, :LENGTH] != 0, axis=-1))
    np.testing.assert_array_equal(hidden[0, LENGTH:], np.nan)
    nothing = jax.jit(policy.hidden)(params, tokens, None, jnp.zeros((1, 6, 6), bool))
    np.testing.assert_array_equal(nothing, 0.0)


@pytest.mark.parametrize("unknown", [[9, 0, 0], [-1, 0, 0], [1, 7, 0], [1, -1, 0]])
def test_ids_that_a_table_does_not_know_are_nan(model, unknown):
    policy, params, _ = model
    hidden = jax.jit(policy.hidden)(params, jnp.array([unknown]))
    first = next(i for i, token in enumerate(unknown) if token not in (0, 1))
    assert np.isfinite(hidden[0, :first]).all()
    assert np.isnan(hidden[0, first:]).all()


def test_left_padding_changes_nothing(model):
    policy, params, _ = model
    plain = jax.jit(policy.hidden)(params, jnp.array([[1, 2, 0]]))
    padded = jnp.array([[0, 0, 1, 2, 0]])
    real = jnp.array([False, False, True, True, True])
    attend = (jnp.tril(jnp.ones((5, 5), bool)) & real[None, :])[None]
    found = jax.jit(policy.hidden)(params, padded, jnp.array([[0, 0, 0, 1, 2]]), attend)
    np.testing.assert_array_equal(found[:, 2:], plain)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_pair_scores_of_a_table_are_the_sums_of_its_rows(model, padding):
    policy, params, table = model
    pairs = [(0, (1, 2, 0), (2, 2, 1)), (1, (0, 0, 0), (0, 1, 2))]
    rows = np.array([[[x, *y] for y in (chosen, rejected)] for x, chosen, rejected in pairs])
    before, after = {"none": (0, 0), "right": (0, 3), "left": (2, 0)}[padding]
    tokens = jnp.pad(jnp.array(rows), ((0, 0), (0, 0), (before, after)))
    is_token = jnp.zeros(tokens.shape, bool).at[..., before : before + 4].set(True)
    is_response = is_token.at[..., before].set(False)
    expected = [[naive_logp(table, x, y) for y in (c, r)] for x, c, r in pairs]
    scores = jax.jit(logprobs.pair_scores, static_argnums=0)(
        policy, params, tokens, is_token, is_response
    )
    np.testing.assert_allclose(scores.logp, expected, rtol=1e-12)


def test_shared_prompt_scores_read_the_same_rows(model):
    """The packed layout lets each response see the prompt and itself only."""
    policy, params, table = model
    tokens = jnp.array([[[1, 2, 0, 1], [1, 2, 2, 0]], [[0, 1, 1, 1], [0, 2, 1, 0]]])
    real = jnp.ones(tokens.shape, bool)
    scored = real.at[..., 0].set(False)
    score = partial(logprobs.shared_prompt_scores, policy, packed_time=6)
    scores = jax.jit(score)(params, tokens, real, scored)
    expected = [[naive_logp(table, x, tuple(y)) for x, *y in pair] for pair in tokens.tolist()]
    np.testing.assert_allclose(scores.logp, expected, rtol=1e-12)


def test_a_row_has_gradient_only_where_its_prefix_occurs(model):
    policy, params, _ = model

    def total(params):
        return jnp.sum(policy.hidden(params, jnp.array([[0, 1, 2, 0, 0]])) ** 2)

    slope = jax.jit(jax.grad(total))(params)["logits"]
    touched = {(int(x), int(row)) for x, row, _ in np.argwhere(np.asarray(slope) != 0)}
    assert touched == {(0, 0), (0, 1 + 1), (0, 1 + 3 + 1 * 3 + 2)}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab": 0}, "vocab: got 0, expected at least 1"),
        ({"length": 0}, "length: got 0, expected at least 1"),
        ({"prompts": -1}, "prompts: got -1, expected at least 1"),
        ({"vocab": 64, "length": 5}, "length: got 5 .* a table of 17043521 rows, expected at most"),
        ({"vocab": 5000, "length": 1}, "vocab: got 5000, expected at most 4096"),
    ],
)
def test_sizes_that_cannot_be_are_errors(sizes, message):
    with pytest.raises(ValueError, match=message):
        tabular.language_model(jax.random.key(0), **({"vocab": 3, "length": 2} | sizes))


def test_an_unembedding_of_no_width_is_an_error():
    with pytest.raises(ValueError, match="width: got 0"):
        tabular.unconstrained_features(jax.random.key(0), vocab=3, width=0)


def test_a_softmax_of_no_answers_is_an_error():
    with pytest.raises(ValueError, match="vocab: got 0"):
        tabular.softmax(jnp.zeros((2, 0)))
