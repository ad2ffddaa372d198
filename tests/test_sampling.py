"""The sampler, held against loops that encode the whole text for every token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from test_decoder import FAMILIES, ONE, SMALL, TOKENS

from jaxpref.models import decoder, sampling, tabular
from jaxpref.models.sampling import nucleus, sample

KEY = jax.random.key(7)
PROMPTS = [[3, 1, 4, 1, 5], [2, 7], [9]]
NEW = 5


def build(config, **options):
    """A policy with random parameters, by NumPy: no compilation for them."""
    types = {"param_dtype": jnp.float64, "compute_dtype": jnp.float64}
    policy, shapes = decoder.abstract(config, **types, **options)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(random.normal(0.4, 0.4, x.shape)), shapes)
    return policy._replace(hidden=jax.jit(policy.hidden)), params


ENCODED = []  # a 1 for each call of the cached path by `model`


@pytest.fixture(scope="module")
def model():
    policy, params = build(ONE)

    def counted(*arguments):
        jax.debug.callback(lambda: ENCODED.append(1))
        return policy.cached(*arguments)

    return policy._replace(cached=counted), params


def padded(prompts, *, left=0, width=9):
    """Prompts after `left` columns of padding, the rest of the padding on the right."""
    tokens, is_prompt = np.full((len(prompts), width), 6), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        place = slice(left, left + len(prompt))
        tokens[row, place], is_prompt[row, place] = prompt, True
    return tokens, is_prompt


def log_probabilities(model, text):
    """Of the next token after each of a text, in one uncached forward pass of fixed width."""
    policy, params = model
    tokens = np.pad(text, (0, 16 - len(text)))[None]
    hidden = np.asarray(policy.hidden(params, tokens))[0, : len(text)]
    table, cap = policy.head(params)
    logits = hidden @ np.asarray(table).T
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    return logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)


def naive_greedy(model, prompt, count):
    text = list(prompt)
    for _ in range(count):
        text.append(int(log_probabilities(model, text)[-1].argmax()))
    return text[len(prompt) :]


def own_logp(model, prompt, response):
    """Log-probability of each token of a response."""
    text = [*prompt, *response]
    rows = log_probabilities(model, text)[len(prompt) - 1 : -1]
    return rows[np.arange(len(response)), response]


@pytest.mark.parametrize(
    ("name", "scan"), [*((name, False) for name in FAMILIES), ("llama", True), ("gemma3", True)]
)
def test_cached_states_equal_the_uncached_ones(name, scan):
    # Of several layers what differs between them, and the scanned decoder.
    config = dataclasses.replace(FAMILIES[name], layers=2) if scan else FAMILIES[name]
    policy, params = build(config, scan=scan)
    # Two columns of padding, then token by token.
    tokens = jnp.pad(TOKENS, ((0, 0), (2, 0)))
    columns = jnp.arange(tokens.shape[1])
    encode, seen = jax.jit(policy.cached), jnp.broadcast_to(columns >= 2, tokens.shape)
    everything = jnp.ones((2, len(columns), len(columns)), bool)
    _, cache = jax.eval_shape(policy.cached, params, tokens, tokens, everything)
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
    found = []
    for at in range(2, len(columns)):
        token, position = tokens[:, at : at + 1], jnp.full((2, 1), at - 2)
        attend = (seen & (columns <= at)[None])[:, None]
        state, cache = encode(params, token, position, attend, cache, at)
        found.append(state)
    # Float64; the sums have other lengths, hence another order.
    expected = policy.hidden(params, TOKENS)
    np.testing.assert_allclose(jnp.concatenate(found, 1), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("left", [0, 3])
def test_greedy_equals_the_uncached_loop(model, left):
    tokens, is_prompt = padded(PROMPTS, left=left)
    found = sample(*model, tokens, is_prompt, max_new=NEW, key=KEY, temperature=0.0)
    for row, prompt in enumerate(PROMPTS):
        assert found.tokens[row].tolist() == naive_greedy(model, prompt, NEW)
        expected = own_logp(model, prompt, found.tokens[row].tolist())
        np.testing.assert_allclose(found.logp[row], expected, atol=1e-9)
    assert found.is_token.all()


def test_windows_and_capped_logits_equal_the_uncached_loop():
    windowed = build(FAMILIES["gemma2"])
    options = {"max_new": NEW, "key": KEY, "temperature": 0.0}
    found = sample(*windowed, *padded(PROMPTS, left=2), **options)
    for row, prompt in enumerate(PROMPTS):
        assert found.tokens[row].tolist() == naive_greedy(windowed, prompt, NEW)
        expected = own_logp(windowed, prompt, found.tokens[row].tolist())
        np.testing.assert_allclose(found.logp[row], expected, atol=1e-9)


def test_learned_positions_and_scanned_layers_equal_the_uncached_loop():
    config = dataclasses.replace(FAMILIES["gpt2"], layers=2)
    policy, params = build(config)
    scanned, _ = build(config, scan=True)
    found = sample(
        scanned,
        decoder.stack_layers(params),
        *padded(PROMPTS),
        max_new=NEW,
        key=KEY,
        temperature=0.0,
    )
    for row, prompt in enumerate(PROMPTS):
        assert found.tokens[row].tolist() == naive_greedy((policy, params), prompt, NEW)


def test_padding_batching_and_order_change_nothing(model):
    options = {"max_new": NEW, "key": KEY, "temperature": 1.5, "top_p": 0.9}
    expected = sample(*model, *padded(PROMPTS), **options)
    assert len({tuple(row) for row in expected.tokens.tolist()}) == 3
    holes = padded(PROMPTS, left=2, width=8)
    holes = [np.insert(x, 3, value, axis=1) for x, value in zip(holes, (6, False), strict=True)]
    moved = sample(*model, *holes, **options)
    turned = sample(*model, *padded(PROMPTS[::-1]), rows=np.arange(3)[::-1], **options)
    others = [PROMPTS[1], [5, 5, 0], [12]]
    apart = sample(*model, *padded(others), rows=np.array([1, 7, 8]), **options)
    for k, part in enumerate(expected):
        np.testing.assert_allclose(moved[k], part, atol=1e-9)
        np.testing.assert_allclose(turned[k][::-1], part, atol=1e-9)
        np.testing.assert_allclose(apart[k][0], part[1], atol=1e-9)
    # The probability is the policy's own, at temperature 1 and without truncation.
    own = own_logp(model, PROMPTS[0], expected.tokens[0].tolist())
    np.testing.assert_allclose(expected.logp[0], own, atol=1e-9)


def test_the_key_alone_decides(model):
    draw = functools.partial(sample, *model, *padded(PROMPTS), max_new=NEW, temperature=1.5)
    first = draw(key=KEY)
    np.testing.assert_array_equal(first.tokens, draw(key=jax.random.key(7)).tokens)
    assert (first.tokens != draw(key=jax.random.key(8)).tokens).any(axis=1).all()


def counts(model, temperature, top_p):
    """How often each pair of tokens was drawn after the first prompt."""
    tokens, is_prompt = (np.repeat(x, 5000, axis=0) for x in padded(PROMPTS[:1]))
    options = {"temperature": temperature, "top_p": top_p, "max_new": 2, "key": KEY}
    drawn = np.asarray(sample(*model, tokens, is_prompt, **options).tokens)
    return np.bincount(drawn @ [SMALL.vocab, 1], minlength=SMALL.vocab**2).reshape(2 * (13,))


def exact(model, text, temperature, top_p):
    """The next token's distribution: a sort, a sum, and what it takes to reach `top_p`."""
    p = np.exp(log_probabilities(model, text)[-1] / temperature)
    p, order = p / p.sum(), np.argsort(-p)
    size = np.searchsorted(np.cumsum(p[order]), top_p) + 1
    kept = np.isin(np.arange(p.size), order[:size])
    return np.where(kept, p, 0) / p[kept].sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.7, 1.0), (2.0, 0.6)])
def test_frequencies_are_those_of_the_distribution(model, temperature, top_p):
    found = counts(model, temperature, top_p)
    first = exact(model, PROMPTS[0], temperature, top_p)
    commonest = int(first.argmax())
    second = exact(model, [*PROMPTS[0], commonest], temperature, top_p)
    for drawn, p in ((found.sum(axis=1), first), (found[commonest], second)):
        assert drawn[p == 0].sum() == 0
        expected = drawn.sum() * p
        often = expected > 5  # where chi-square holds; the rest as one cell
        cells = [np.append(x[often], x[~often].sum()) for x in (drawn, expected)]
        cells = [x[cells[1] > 0] for x in cells]
        # One draw in a thousand would fail at another key; a wrong temperature gives 1e-30.
        assert scipy.stats.chisquare(*cells).pvalue > 1e-3
    assert set(np.flatnonzero(found.sum(axis=1))) == set(np.flatnonzero(first * 5000 > 20))


def test_the_nucleus_equals_that_of_a_sort():
    logits = 3 * np.random.default_rng(7).normal(size=(50, 40))
    p, compiled = scipy.special.softmax(logits, axis=1), jax.jit(nucleus)
    ordered = -np.sort(-p)
    for top_p in (1e-6, 0.3, 0.9, 0.999):
        sizes = (np.cumsum(ordered, axis=1) < top_p).sum(axis=1) + 1
        expected = p >= ordered[np.arange(50), sizes - 1, None]
        np.testing.assert_array_equal(compiled(logits, top_p), expected)
        np.testing.assert_array_equal(compiled(logits.astype(np.float32), top_p), expected)


def test_the_nucleus_at_its_edges():
    compiled, equal = jax.jit(nucleus), jnp.zeros((1, 4))
    assert compiled(equal, 0.3).all()  # ties: all or none
    assert compiled(equal, 1.0).all()
    certain = jnp.array([[0.0, -1e4, -1e4, -jnp.inf]])
    assert compiled(certain, 0.99).tolist() == [[True, False, False, False]]


def test_a_stop_token_ends_its_row_and_no_other(model):
    draw = functools.partial(sample, *model, *padded(PROMPTS), max_new=NEW, key=KEY)
    free = draw(temperature=2.0)
    stop = int(free.tokens[0, 2])
    found = draw(temperature=2.0, stop_ids=(stop, stop, stop))
    ended = 0
    for row, tokens in enumerate(free.tokens.tolist()):
        end = tokens.index(stop) + 1 if stop in tokens else NEW
        ended += end < NEW
        assert found.tokens[row].tolist() == tokens[:end] + [0] * (NEW - end)
        assert found.is_token[row].tolist() == [True] * end + [False] * (NEW - end)
        np.testing.assert_allclose(found.logp[row, :end], free.logp[row, :end])
        assert (found.logp[row, end:] == 0).all()
    assert 0 < ended < 3


def test_the_loop_ends_with_the_last_row(model):
    draw = functools.partial(sample, *model, *padded(PROMPTS), max_new=NEW, key=KEY)
    free = draw(temperature=2.0)
    jax.effects_barrier()
    ENCODED.clear()
    found = draw(temperature=2.0, stop_ids=free.tokens[:, 2].tolist())
    jax.effects_barrier()
    last = int(found.is_token.sum(axis=1).max())
    assert last <= 3
    assert len(ENCODED) == last  # the prompts, and each token but the last


def test_a_vocabulary_in_several_pieces_changes_nothing(model, monkeypatch):
    expected = sample(*model, *padded(PROMPTS), max_new=NEW, key=KEY)
    monkeypatch.setattr(sampling, "ROWS", 4)  # of 13: the last piece is filled up
    policy, _ = build(ONE)  # a new one, compiled anew
    found = sample(policy, model[1], *padded(PROMPTS), max_new=NEW, key=KEY)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logp, expected.logp, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1, expected a finite number of at least 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_p": 0.0}, r"top_p: got 0.0, expected in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"max_new": 0}, "max_new: got 0, expected at least 1"),
        ({"max_new": 29}, "max_new: got 29, texts of 34 tokens, expected at most 33"),
        ({"prompts": np.array([[1, 2, 3, 4, 5], [1, 2, 99, 4, 5]])}, "prompts: row 1: token id 99"),
        ({"stop_ids": (13,)}, r"stop_ids: got \(13,\), expected ids from 0 to 12"),
        ({"is_prompt": np.array([[1] * 5, [0] * 5], bool)}, r"is_prompt: got no .* rows \[1\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    policy, params = decoder.abstract(FAMILIES["gpt2"])
    good = {"prompts": TOKENS[:, :5], "is_prompt": np.ones((2, 5), bool), "max_new": 4, "key": KEY}
    with pytest.raises(ValueError, match=message):
        sample(policy, params, **(good | change))


def test_a_policy_without_a_cache_is_refused():
    policy, params = tabular.softmax(jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="policy: got one without `cached`"):
        sample(policy, params, np.zeros((1, 1), int), np.ones((1, 1), bool), max_new=1, key=KEY)
