"""`jaxpref.gradients.token_gram` against the gradients of single tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpref import gradients, logprobs
from jaxpref.models import decoder

CONFIG = decoder.DecoderConfig(
    vocab=17, width=12, layers=2, heads=2, kv_heads=1, head_width=6, mlp_width=16
)
TOKENS = jnp.array([[3, 5, 3, 8, 1, 3], [3, 5, 3, 2, 8, 8]])


def a_model(**changes):
    model = decoder.Decoder(
        dataclasses.replace(CONFIG, **changes),
        rngs=nnx.Rngs(0),
        param_dtype=jnp.float64,
        compute_dtype=jnp.float64,
    )
    policy, params = decoder.functional(model)
    return policy, jax.tree.map(lambda x: 8 * x, params)


@pytest.mark.parametrize("changes", [{}, {"tied": False}], ids=["tied", "untied"])
def test_it_equals_the_gradients_of_single_tokens(changes):
    policy, params = a_model(**changes)

    def hidden_fn(params, tokens):
        return policy.hidden(params, tokens[None])[0, 2:-1]

    def logp_fn(params, tokens):
        hidden = hidden_fn(params, tokens)
        return logprobs.token_logprobs(hidden, policy.unembedding(params), tokens[3:])

    fast = jax.jit(functools.partial(gradients.token_gram, hidden_fn, policy.unembedding))
    found = fast(params, TOKENS, TOKENS[:, 3:])
    jacobian = jax.jit(jax.vmap(jax.jacrev(logp_fn), (None, 0)))(params, TOKENS)
    flat = np.concatenate([np.reshape(x, (6, -1)) for x in jax.tree.leaves(jacobian)], axis=1)
    expected = (flat @ flat.T).reshape(2, 3, 2, 3)
    np.testing.assert_allclose(found.gram, expected, rtol=1e-9, atol=1e-9 * expected.max())
    np.testing.assert_allclose(found.logp, jax.vmap(logp_fn, (None, 0))(params, TOKENS), rtol=1e-12)
    whole = jax.jit(functools.partial(gradients.gram, lambda p, x: logp_fn(p, x).sum()))
    np.testing.assert_allclose(found.gram.sum(axis=(1, 3)), whole(params, TOKENS).gram, rtol=1e-9)


def test_errors_name_what_is_wrong():
    W = jnp.ones((4, 3), jnp.float64)
    states, targets = jnp.ones((1, 2, 3), jnp.float64), jnp.zeros((1, 2), int)
    with pytest.raises(ValueError, match="unembedding_fn: computes, expected"):
        gradients.token_gram(lambda W, x: x, lambda W: 2 * W, W, states, targets)
    with pytest.raises(ValueError, match="params: is not only a table"):
        gradients.token_gram(lambda W, x: x * W[0, 0], lambda W: W, W, states, targets)
