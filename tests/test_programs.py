"""Exact for any function: random programs of a grammar, held against plain autodiff in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_programs import EXAMPLES, PIECES, REVERSE_ONLY, ROUNDED, build, deal

from jaxpref import gradients

PROGRAMS = deal(0, 5)
DATA = EXAMPLES, jnp.array([[0, 3, 5, 1, 1], [3, 3, 1, 0, 2]])
UNEMBEDDING = jnp.asarray(np.cos(np.arange(24)).reshape(6, 4))


def flat(tree, outputs=0):
    """Entries of all parameters in a row, after so many axes of outputs."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(*x.shape[:outputs], -1) for x in leaves], axis=-1)


def waves(params):
    return jax.tree.map(lambda x: 1.5 + np.sin(np.arange(x.size)).reshape(x.shape), params)


def check(parts, *entrances):
    """A program's inner products by some of the functions, against its Jacobian."""
    program, pieces = build(parts)
    params, names = {"pieces": pieces, "last": UNEMBEDDING}, {part.name for part in parts}

    def hidden(params, example):
        return program(params["pieces"], example)

    def logp(params, data):
        """Of each token of one example."""
        logits = hidden(params, data[0]) @ params["last"].T
        return jnp.take_along_axis(jax.nn.log_softmax(logits), data[1][:, None], axis=1)[:, 0]

    def of_all(params):
        return jax.vmap(logp, (None, 0))(params, DATA)

    found = {
        "gram": lambda p: gradients.gram(logp, p, DATA).gram,
        "token_gram": lambda p: gradients.token_gram(hidden, lambda p: p["last"], p, *DATA).gram,
        "pair_grams": lambda p: gradients.pair_grams(
            lambda p, data: logp(p, data).sum(),
            p,
            jax.tree.map(lambda x: x[None], DATA),
            metric=waves(p),
        ).gram[0],
        "directional": lambda p: gradients.directional(of_all, p, waves(p))[1],
    }
    if names & REVERSE_ONLY:
        entrances = [name for name in entrances if name != "directional"]

    @jax.jit
    def run(params):
        return {name: found[name](params) for name in entrances}, jax.jacrev(of_all)(params)

    values, jacobian = run(params)
    slopes, weights = flat(jacobian, 2), flat(waves(params))
    summed = slopes.sum(axis=1)
    everything = np.einsum("iap,jbp->iajb", slopes, slopes)
    expected = {
        "gram": everything,
        "token_gram": everything,
        "pair_grams": (summed * weights) @ summed.T,
        "directional": slopes @ weights,
    }
    # Where autodiff rounds a gradient to float32, entry by entry, that is all that can be asked.
    rtol = 1e-6 if names & ROUNDED else 1e-10
    for name, value in values.items():
        atol = rtol * abs(expected[name]).max()
        np.testing.assert_allclose(value, expected[name], rtol=rtol, atol=atol, err_msg=name)


# The kinds of Gram share the engine, and each takes a second of compiling: one for each program.
ENTRANCES = (("gram", "directional"), ("token_gram",), ("pair_grams",))


@pytest.mark.parametrize("at", range(len(PROGRAMS)))
def test_random_programs_equal_plain_autodiff(at):
    check(PROGRAMS[at], *ENTRANCES[at % 3])


def test_every_piece_is_dealt():
    assert sum(len(parts) for parts in PROGRAMS) == len(PIECES)
