"""Attention by another way has the numbers of plain products."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import gradients
from jaxpref.models import attention, decoder


def drawn(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("time", "cap"), [(24, None), (130, 2.0)])
def test_the_kernel_is_the_product_forward_and_backward(time, cap):
    """Of rows that share a prompt, in float32: sums are added in another order, no more."""
    query, key = drawn((2, time, 2, 2, 8), 0) / 3, drawn((2, 2, time, 8), 1)
    value, weight = drawn(key.shape, 2), drawn(query.shape, 3)
    cut = time // 2
    attend = np.tril(np.ones((2, time, time), bool))
    attend[0, cut:, cut // 2 : cut] = False  # the rejected response does not see the chosen one

    @partial(jax.jit, static_argnums=0)
    def both(kind, *states):
        def total(*states):
            found = attention.mix(*states, jnp.asarray(attend), kind=kind, cap=cap)
            return (found * weight).sum(), found

        return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*states)

    expected, found = (both(kind, query, key, value) for kind in ("xla", "splash"))
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


def test_a_row_that_sees_nothing_is_finite_and_spoils_no_other():
    states = drawn((1, 6, 1, 1, 4), 0), drawn((1, 1, 6, 4), 1), drawn((1, 1, 6, 4), 2)
    attend = jnp.tril(jnp.ones((1, 6, 6), bool)).at[0, 3].set(False)
    one, other = (attention.mix(*states, attend, kind=kind) for kind in ("xla", "splash"))
    rows = np.array([0, 1, 2, 4, 5])
    np.testing.assert_allclose(one[:, rows], other[:, rows], rtol=1e-5, atol=1e-6)
    assert np.isfinite(other).all()


CONFIG = decoder.DecoderConfig(*(13, 8, 1, 2, 1, 4, 12))


def test_forward_mode_grams_and_decoding_take_plain_products():
    policy, shapes = decoder.abstract(CONFIG, attention="splash")
    tokens = jnp.arange(6)[None] % 13

    def total(params):
        return policy.hidden(params, tokens).sum()

    def calls(function, *arguments):
        return str(jax.make_jaxpr(function)(*arguments)).count("pallas_call")

    assert calls(total, shapes) > 0
    assert calls(jax.grad(total), shapes) > 0
    assert calls(lambda p: gradients.directional(total, p, p), shapes) == 0
    logp = lambda params, shift: policy.hidden(params, (tokens + shift) % 13).sum()  # noqa: E731
    assert calls(lambda p: gradients.gram(logp, p, jnp.arange(2)).gram, shapes) == 0
    _, cache = jax.eval_shape(
        lambda p: policy.cached(p, tokens, jnp.arange(6)[None], jnp.ones((1, 6, 6), bool)), shapes
    )
    one = jnp.ones((1, 1), int)
    seen = jnp.ones((1, 1, 6), bool)
    assert calls(lambda p, c: policy.cached(p, one, one, seen, c, 5)[0], shapes, cache) == 0


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CONFIG, {"attention": "flash"}, "attention: got 'flash', expected one of"),
        (
            CONFIG,
            {"attention": "cudnn"},
            "attention: cudnn takes no float32, expected",
        ),
        (
            dataclasses.replace(CONFIG, score_cap=50.0),
            {"attention": "cudnn", "compute_dtype": jnp.bfloat16},
            "attention: cudnn bounds no scores, expected xla or splash",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        decoder.abstract(config, **options)
