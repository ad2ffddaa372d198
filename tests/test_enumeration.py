"""`jaxpref.models.enumeration`: exact sums, against loops and against the log-prob paths."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from jaxpref import logprobs
from jaxpref.models import decoder, enumeration, tabular

VOCAB, LENGTH = 4, 3
sequence_logprobs = jax.jit(enumeration.sequence_logprobs, static_argnames=("policy", "length"))


@pytest.fixture(scope="module")
def table():
    return tabular.language_model(
        jax.random.key(1), vocab=VOCAB, length=LENGTH, prompts=2, dtype=jnp.float64
    )


@pytest.fixture(scope="module")
def features():
    return tabular.unconstrained_features(
        jax.random.key(2), vocab=VOCAB, width=3, length=LENGTH, dtype=jnp.float64
    )


@pytest.fixture(scope="module")
def micro():
    """A real decoder with a vocabulary that can be counted, and capped logits."""
    config = decoder.DecoderConfig(
        vocab=VOCAB,
        width=8,
        layers=1,
        heads=2,
        kv_heads=1,
        head_width=4,
        mlp_width=8,
        logit_cap=0.5,
    )
    types = {"param_dtype": jnp.float64, "compute_dtype": jnp.float64}
    policy, params = decoder.functional(decoder.Decoder(config, rngs=nnx.Rngs(0), **types))
    return policy, jax.tree.map(lambda leaf: 5 * leaf, params)  # far from uniform


@pytest.fixture(params=["table", "features", "micro"])
def model(request):
    return request.getfixturevalue(request.param)


def rounding(logp):
    """Two ways through sums of a few dozen numbers of order 1 part by some 30 roundings."""
    return 30 * float(jnp.finfo(logp.dtype).eps)


def test_sequences_count_in_base_vocab():
    found = enumeration.sequences(vocab=3, length=2)
    assert found.tolist() == [list(pair) for pair in itertools.product(range(3), repeat=2)]
    assert enumeration.sequences(vocab=8, length=4).shape == (4096, 4)


def test_probabilities_sum_to_one(model):
    logp = sequence_logprobs(*model, jnp.array([0]), length=LENGTH)
    assert logp.shape == (VOCAB**LENGTH,)
    np.testing.assert_allclose(jnp.exp(logp).sum(), 1.0, rtol=rounding(logp))


def test_sequence_logprobs_are_what_pair_scores_gives(model):
    """Two implementations that share no line: enumeration, and the masked, chunked path."""
    policy, params = model
    responses = enumeration.sequences(vocab=VOCAB, length=LENGTH)[:32].reshape(16, 2, LENGTH)
    tokens = jnp.pad(responses, ((0, 0), (0, 0), (1, 0)))  # the prompt is token 0
    real = jnp.ones(tokens.shape, bool)
    scores = jax.jit(logprobs.pair_scores, static_argnums=0)(
        policy, params, tokens, real, real.at[..., 0].set(False)
    )
    logp = sequence_logprobs(policy, params, jnp.array([0]), length=LENGTH)
    np.testing.assert_allclose(scores.logp.ravel(), logp[:32], rtol=rounding(logp))


def test_marginals_of_longer_responses_are_shorter_responses(model):
    policy, params = model
    long = sequence_logprobs(policy, params, jnp.array([0]), length=3)
    short = sequence_logprobs(policy, params, jnp.array([0]), length=2)
    summed = jax.nn.logsumexp(long.reshape(-1, VOCAB), axis=-1)
    np.testing.assert_allclose(summed, short, rtol=rounding(long))


def test_a_prompt_of_several_tokens_conditions_a_decoder(micro):
    policy, params = micro
    pi = sequence_logprobs(policy, params, jnp.array([0]), length=3)
    given = sequence_logprobs(policy, params, jnp.array([0, 2]), length=2)
    first = sequence_logprobs(policy, params, jnp.array([0]), length=1)
    np.testing.assert_allclose(first[2] + given, pi.reshape(VOCAB, -1)[2], rtol=rounding(pi))


def test_another_prompt_is_another_distribution(table):
    first, second = (sequence_logprobs(*table, jnp.array([x]), length=LENGTH) for x in (0, 1))
    assert enumeration.kl(first, second) > 0.1


def test_the_mean_score_is_zero(model):
    """``E_pi[grad ln pi] = 0``: the identity behind every policy gradient."""
    policy, params = model
    logp = sequence_logprobs(policy, params, jnp.array([0]), length=2)
    scores = jax.jacrev(lambda p: sequence_logprobs(policy, p, jnp.array([0]), length=2))(params)
    for leaf in jax.tree.leaves(scores):
        assert np.abs(leaf).max() > 0.01
        mean = enumeration.expectation(logp, leaf)
        scale = max(1.0, float(np.abs(leaf).max()))
        np.testing.assert_allclose(mean, 0.0, atol=rounding(logp) * scale)


def test_expectation_equals_a_loop_over_responses(features):
    policy, params = features
    logp = sequence_logprobs(policy, params, jnp.array([0]), length=LENGTH)
    responses = enumeration.sequences(vocab=VOCAB, length=LENGTH)
    counts = jax.nn.one_hot(responses, VOCAB, dtype=logp.dtype).sum(axis=1)
    naive = np.zeros(VOCAB)
    for weight, response in zip(np.exp(logp), np.asarray(responses), strict=True):
        for token in response:
            naive[token] += weight
    np.testing.assert_allclose(enumeration.expectation(logp, counts), naive, rtol=1e-12)
    np.testing.assert_allclose(naive.sum(), LENGTH)


def test_expectation_ignores_values_where_nothing_is_possible():
    logp = jnp.array([0.0, -jnp.inf])
    assert float(enumeration.expectation(logp, jnp.array([2.0, jnp.inf]))) == 2.0


def test_kl_of_worked_distributions():
    p, q = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.log(jnp.array([0.25, 0.25, 0.5]))
    np.testing.assert_allclose(enumeration.kl(p, q), 0.25 * np.log(2.0), rtol=1e-12)


def test_kl_at_the_edges_is_finite_or_infinite_as_it_should_be():
    certain, fair = jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(enumeration.kl(certain, fair), np.log(2.0), rtol=1e-12)
    assert float(enumeration.kl(certain, certain)) == 0.0
    assert np.isinf(enumeration.kl(fair, certain))
    for other in (fair, certain):
        for slope in jax.grad(enumeration.kl, argnums=(0, 1))(certain, other):
            assert np.all(np.isfinite(slope))


def test_kl_obeys_the_chain_rule_over_tokens(features):
    """KL of sequences = KL of the first token + mean KL of the rest given it."""
    policy, params = features
    other = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.sin(9.0 * leaf), params)
    p, q = (sequence_logprobs(policy, x, jnp.array([0]), length=2) for x in (params, other))
    p, q = p.reshape(VOCAB, VOCAB), q.reshape(VOCAB, VOCAB)
    first_p, first_q = jax.nn.logsumexp(p, axis=-1), jax.nn.logsumexp(q, axis=-1)
    rest = enumeration.kl(p - first_p[:, None], q - first_q[:, None])
    assert rest.shape == (VOCAB,)
    chained = enumeration.kl(first_p, first_q) + enumeration.expectation(first_p, rest)
    np.testing.assert_allclose(enumeration.kl(p.ravel(), q.ravel()), chained, rtol=1e-12)


def test_kl_has_the_right_derivative_and_none_at_equality(features):
    policy, params = features

    def divergence(params, reference):
        logp, logq = (
            sequence_logprobs(policy, x, jnp.array([0]), length=2) for x in (params, reference)
        )
        return enumeration.kl(logp, logq)

    other = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.sin(9.0 * leaf), params)
    check_grads(lambda p: divergence(p, other), (params,), order=1, modes=["rev"])
    for leaf in jax.tree.leaves(jax.grad(divergence)(params, params)):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-14)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab": 9, "length": 2}, "vocab: got 9, expected 1 to 8"),
        ({"vocab": 2, "length": 5}, "length: got 5, expected 1 to 4"),
        ({"vocab": 2, "length": 0}, "length: got 0, expected 1 to 4"),
    ],
)
def test_sizes_that_cannot_be_counted_are_errors(sizes, message):
    with pytest.raises(ValueError, match=message):
        enumeration.sequences(**sizes)


def test_an_empty_prompt_is_an_error(table):
    with pytest.raises(ValueError, match="prompt: got no tokens"):
        sequence_logprobs(*table, jnp.zeros((0,), jnp.int32), length=2)
