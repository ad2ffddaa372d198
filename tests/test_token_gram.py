"""`jaxpref.gradients.token_gram` against the gradients of single tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import gradients, logprobs
from jaxpref.models import decoder

CONFIG = decoder.DecoderConfig(
    vocab=17, width=12, layers=1, heads=2, kv_heads=1, head_width=6, mlp_width=16
)
TOKENS = jnp.array([[3, 5, 3, 8, 1, 3], [3, 5, 3, 2, 8, 8]])


def a_model(**changes):
    types = {"param_dtype": jnp.float64, "compute_dtype": jnp.float64}
    policy, shapes = decoder.abstract(dataclasses.replace(CONFIG, **changes), **types)
    random = np.random.default_rng(0)

    def draw(path, leaf):
        mean = 8.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return mean + 0.16 * random.standard_normal(leaf.shape)

    return policy, jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize("changes", [{}, {"tied": False}], ids=["tied", "untied"])
def test_it_equals_the_gradients_of_single_tokens(changes):
    policy, params = a_model(**changes)

    def hidden_fn(params, tokens):
        return policy.hidden(params, tokens[None])[0, 2:-1]

    def logp_fn(params, tokens):
        hidden = hidden_fn(params, tokens)
        return logprobs.token_logprobs(hidden, policy.unembedding(params), tokens[3:])

    @jax.jit
    def run(params):
        found = gradients.token_gram(hidden_fn, policy.unembedding, params, TOKENS, TOKENS[:, 3:])
        return found, jax.vmap(jax.jacrev(twice, has_aux=True), (None, 0))(params, TOKENS)

    def twice(params, tokens):
        logp = logp_fn(params, tokens)
        return logp, logp

    found, (jacobian, logp) = run(params)
    flat = np.concatenate([np.reshape(x, (6, -1)) for x in jax.tree.leaves(jacobian)], axis=1)
    expected = (flat @ flat.T).reshape(2, 3, 2, 3)
    np.testing.assert_allclose(found.gram, expected, rtol=1e-9, atol=1e-9 * expected.max())
    np.testing.assert_allclose(found.logp, logp, rtol=1e-12)
    # The sum over tokens is what whole responses have.
    whole = jax.jit(functools.partial(gradients.gram, lambda p, x: logp_fn(p, x).sum()))
    summed = found.gram.sum(axis=(1, 3))
    np.testing.assert_allclose(summed, whole(params, TOKENS).gram, rtol=1e-9)


def test_errors_name_what_is_wrong():
    W = jnp.ones((4, 3), jnp.float64)
    states, targets = jnp.ones((1, 2, 3), jnp.float64), jnp.zeros((1, 2), int)
    with pytest.raises(ValueError, match="unembedding_fn: computes, expected"):
        gradients.token_gram(lambda W, x: x, lambda W: 2 * W, W, states, targets)
    with pytest.raises(ValueError, match="params: is not only a table"):
        gradients.token_gram(lambda W, x: x * W[0, 0], lambda W: W, W, states, targets)
