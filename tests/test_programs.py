"""Exact for any function: random programs of a grammar, held against plain autodiff in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_programs import EXAMPLES, PARAMS, PIECES, REVERSE_ONLY, ROUNDED, build, deal

from jaxpref import gradients

pytestmark = pytest.mark.usefixtures("compiled_quickly")

PROGRAMS = deal(0, 5)
DATA = EXAMPLES, jnp.array([[0, 3, 5], [3, 3, 1]])
METRIC = jax.tree.map(lambda x: 1 + jnp.cos(jnp.arange(x.size)).reshape(x.shape), PARAMS)
TANGENT = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size) + 1).reshape(x.shape), PARAMS)


def flat(tree, outputs=0):
    """Entries of all parameters in a row, after so many axes of outputs."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(*x.shape[:outputs], -1) for x in leaves], axis=-1)


@pytest.mark.parametrize("names", PROGRAMS, ids=lambda names: "; ".join(map(" in ".join, names)))
def test_random_programs_equal_plain_autodiff(names):
    program, pieces = build(names), {name for name, _ in names}

    def outputs(params, data):
        """Of one example: a sum, and its three tokens' log-probabilities."""
        states, unembedding = program(params, data[0]), params["unembedding"]
        logp = jax.nn.log_softmax(states @ unembedding.T)
        tokens = jnp.take_along_axis(logp, data[1][:, None], axis=1)[:, 0]
        return jnp.concatenate([jnp.sin(states).sum()[None], tokens])

    def of_all(params):
        return jax.vmap(outputs, (None, 0))(params, DATA)

    @jax.jit
    def run(params):
        all_pairs = gradients.gram(outputs, params, DATA)
        one_pair = jax.tree.map(lambda x: x[None], DATA)
        first = lambda params, data: outputs(params, data)[0]  # noqa: E731
        weighted = gradients.pair_grams(first, params, one_pair, metric=METRIC)
        tokens = gradients.token_gram(program, lambda p: p["unembedding"], params, *DATA)
        along = () if pieces & REVERSE_ONLY else gradients.directional(of_all, params, TANGENT)
        grams = all_pairs.gram, weighted.gram[0], tokens.gram, along[1:]
        return grams, jax.jacrev(of_all)(params)

    (all_pairs, weighted, tokens, along), jacobian = run(PARAMS)
    slopes = flat(jacobian, 2)
    # Where autodiff rounds a gradient to float32, entry by entry, that is all that can be asked.
    rtol = 1e-6 if pieces & ROUNDED else 1e-10

    def close(found, expected):
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * abs(expected).max())

    close(all_pairs, np.einsum("iap,jbp->iajb", slopes, slopes))
    close(weighted, np.einsum("ip,jp->ij", slopes[:, 0] * flat(METRIC), slopes[:, 0]))
    close(tokens, np.einsum("iap,jbp->iajb", slopes[:, 1:], slopes[:, 1:]))
    for change in along:
        close(change, slopes @ flat(TANGENT))


def test_every_piece_is_dealt():
    assert sum(len(names) for names in PROGRAMS) == len(PIECES)
