"""A model's bounds: asked of texts by their own ids and positions, and NaN inside programs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpref import logprobs
from jaxpref.data.files import DataError
from jaxpref.data.pairs import TokenPair
from jaxpref.models import bounds, decoder
from jaxpref.models.bounds import Bounds
from jaxpref.score import score_pairs
from jaxpref.training.pairset import PairSet

LEARNED = decoder.DecoderConfig(
    *(13, 8, 1, 2, 2, 4, 8), positions="learned", max_positions=8, norm="layer", tied=True
)
ROPE = dataclasses.replace(LEARNED, positions="rope", norm="rms")
WINDOW = dataclasses.replace(ROPE, window=4)
TIME = 12


@functools.cache
def build(config):
    return decoder.functional(decoder.Decoder(config, rngs=nnx.Rngs(0)))


@functools.partial(jax.jit, static_argnums=0)
def hidden(policy, params, tokens):
    return policy.hidden(params, tokens)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ([0] * 8, None),
        ([0] * 9, None),  # the ninth is predicted, not encoded
        ([0] * 10, "a text of 10 tokens, expected at most 9: this model knows 8 positions"),
        ([3, 12], None),
        (
            [3, 13, 0],
            "token id 13, expected 0 to 12: the model's table has fewer rows than its tokenizer "
            "has tokens",
        ),
        ([3, -1], "token id -1, expected 0 to 12"),
        ([], None),
    ],
)
def test_a_text_outside_the_bounds_is_named(text, found):
    learned = build(LEARNED)[0].bounds
    assert learned == Bounds(vocab=13, longest=8)
    assert bounds.fault(learned, text) == found
    if found is None:
        bounds.check(learned, [text])
    else:
        with pytest.raises(DataError) as error:
            bounds.check(learned, [[1], text], ["row 4", "row 7"])
        assert str(error.value) == f"row 7: {found}"


@pytest.mark.parametrize("config", [ROPE, WINDOW], ids=["rope", "window"])
def test_rotary_positions_have_no_end(config):
    policy, params = build(config)
    assert policy.bounds == Bounds(vocab=13, longest=None)
    assert np.isfinite(hidden(policy, params, np.zeros((1, TIME), np.int32))).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(-2, 15), min_size=TIME, max_size=TIME))
def test_what_sees_something_unknown_is_nan_and_all_else_as_ever(tokens):
    policy, params = build(LEARNED)
    found = np.asarray(hidden(policy, params, np.array([tokens], np.int32)))[0]
    first = next((i for i, t in enumerate(tokens) if not 0 <= t < 13 or i >= 8), TIME)
    harmless = np.array([tokens[:first] + [0] * (TIME - first)], np.int32)
    plain = np.asarray(hidden(policy, params, harmless))[0]
    np.testing.assert_array_equal(found[:first], plain[:first])
    assert np.isfinite(found[:first]).all()
    assert np.isnan(found[first:]).all()


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64])
def test_any_dtype_of_ids_meets_the_bound(dtype):
    wide = Bounds(vocab=300)
    tokens = np.array([[0, 100, 127]], dtype)
    states, positions = jnp.zeros((1, 3, 2)), jnp.arange(3)[None]
    assert np.isfinite(bounds.mark(states, jnp.asarray(tokens), positions, None, wide)).all()
    tight = bounds.mark(states, jnp.asarray(tokens), positions, None, Bounds(vocab=101))
    assert np.isnan(tight[0]).any(axis=-1).tolist() == [False, False, True]


def test_cached_tokens_are_nan_where_they_are_unknown():
    policy, params = build(LEARNED)
    attend = jnp.ones((1, 1, 1), bool)
    for token, position, known in ((3, 0, True), (13, 0, False), (3, 8, False), (-1, 0, False)):
        states, _ = policy.cached(params, jnp.array([[token]]), jnp.array([[position]]), attend)
        assert np.isfinite(states).all() == known


def pair(*texts, start):
    ids = tuple(np.array(text, np.int32) for text in texts)
    return TokenPair(ids, (start, start), *[None] * (len(TokenPair._fields) - 2))


PAIR = pair([1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 9, 8, 7, 6], start=3)  # packed: 3 + 5 + 3 tokens


def arrays(texts, time, fill):
    tokens = np.full((1, 2, time), fill, np.int32)
    is_token = np.zeros((1, 2, time), bool)
    for side, text in enumerate(texts):
        tokens[0, side, : len(text)], is_token[0, side, : len(text)] = text, True
    is_response = is_token & (np.arange(time) >= 3)
    return tokens, is_token, is_response


@functools.partial(jax.jit, static_argnums=0)
def padded(policy, params, *given):
    return logprobs.pair_scores(policy, params, *given).logp


@functools.partial(jax.jit, static_argnums=0)
def packed(policy, params, *given):
    return logprobs.shared_prompt_scores(policy, params, *given, packed_time=13).logp


def by_hand(policy, params, text):
    """The log-probability of what follows the first three tokens."""
    row = np.zeros((1, TIME), np.int32)
    row[0, : len(text)] = text
    states = np.asarray(hidden(policy, params, row))[0, : len(text) - 1].astype(float)
    logits = states @ np.asarray(policy.unembedding(params)).astype(float).T
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return sum(logp[t - 1, text[t]] for t in range(3, len(text)))


@pytest.mark.parametrize("config", [LEARNED, WINDOW], ids=["learned", "window"])
@pytest.mark.parametrize("fill", [0, 99])
def test_padding_and_packing_neither_trigger_nor_hide_a_bound(config, fill):
    """Texts that fit, in rows longer than the model knows, with padding outside its table."""
    policy, params = build(config)
    expected = [[by_hand(policy, params, text) for text in PAIR.tokens]]
    given = arrays(PAIR.tokens, 16, fill)
    for score in (padded, packed):  # float32 sums in other orders
        np.testing.assert_allclose(score(policy, params, *given), expected, rtol=1e-5)
    long = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]] if config is LEARNED else []
    for text in (*long, [1, 2, 3, 99, 4, 5], [1, 2, 3, -1, 5]):
        wrong = arrays([text, PAIR.tokens[1]], 16, fill)
        for score in (padded, packed):
            assert np.isnan(score(policy, params, *wrong)).tolist() == [[True, False]]


def test_padding_that_is_nan_spoils_no_gradient():
    policy, params = build(LEARNED)

    @jax.jit
    def slope(params, *given):
        return jax.grad(lambda params: padded(policy, params, *given).sum())(params)

    found = slope(params, *arrays(PAIR.tokens, 16, 99))
    expected = slope(params, *arrays(PAIR.tokens, 9, 0))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)


LONG = pair([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 3, 9], start=3)
UNKNOWN = pair([1, 2, 3, 4], [1, 2, 3, 13], start=3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(LONG, "chosen: a text of 10 tokens, exp"), (UNKNOWN, "rejected: token id 13, expected 0")],
)
def test_every_entrance_names_the_pair(wrong, message):
    policy, params = build(LEARNED)
    with pytest.raises(DataError, match=f"^FILE line 8: {message}"):
        score_pairs(policy, params, [PAIR, wrong], places=["FILE line 7", "FILE line 8"])
    with pytest.raises(DataError, match=f"^row 1: {message}"):
        score_pairs(policy, params, [PAIR, wrong])
    with pytest.raises(DataError, match=f"^pair 1, {message}"):
        PairSet.of(policy, [PAIR, wrong])
