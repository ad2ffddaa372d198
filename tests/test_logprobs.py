import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grams import largest_array

from jaxpref import diagnostics, logprobs
from jaxpref.data.pairs import TokenPair
from jaxpref.models.decoder import DecoderConfig, Policy, abstract
from jaxpref.plain import ASKED

PAIRS, TIME, VOCAB, WIDTH = 5, 9, 13, 8
SETTINGS = hypothesis.settings(
    derandomize=True, deadline=None, max_examples=12, database=None, print_blob=False
)
HEADS = pytest.mark.parametrize("fn", [logprobs.token_logprobs, logprobs.token_logprobs_chunked])


def close(actual, expected, rtol=1e-12):
    """Equal up to rounding of float64: `rtol` of the largest entry of each array."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        largest = np.abs(np.nan_to_num(e)).max(initial=0)
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * largest)


def numpy_logp(hidden, unembedding):
    """A full log-softmax, the plain way."""
    logits = np.asarray(hidden) @ np.asarray(unembedding).T
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def pick(logp, targets):
    return np.take_along_axis(logp, np.asarray(targets)[..., None], axis=-1)[..., 0]


@pytest.fixture(scope="module")
def states():
    """Hidden states, unembedding, targets, and weights to sum with."""
    draw = np.random.default_rng(1)
    shape = (2, 3, 7)
    return (
        jnp.array(draw.normal(size=(*shape, WIDTH))),
        jnp.array(draw.normal(size=(VOCAB, WIDTH))),
        jnp.array(draw.integers(0, VOCAB, shape)),
        jnp.array(draw.normal(size=shape)),
    )


def value_and_slopes(fn):
    """Jitted ``((weighted sum, values), slopes)`` in hidden states and unembedding."""

    def weighted(hidden, unembedding, targets, weights):
        values = fn(hidden, unembedding, targets)
        return (weights * values).sum(), values

    return jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))


@functools.cache
def chunked(vocab_chunk=None, time_chunk=None):
    chunks = {"vocab_chunk": vocab_chunk, "time_chunk": time_chunk}
    return value_and_slopes(functools.partial(logprobs.token_logprobs_chunked, **chunks))


@pytest.fixture(scope="module")
def plain(states):
    return value_and_slopes(logprobs.token_logprobs)(*states)


# ---- one token at each position


def test_token_logprobs_are_a_log_softmax(states, plain):
    close(plain[0][1], pick(numpy_logp(*states[:2]), states[2]))


@pytest.mark.parametrize(("vocab_chunk", "time_chunk"), [(None, None), (1, 99), (13, 2), (5, 3)])
def test_chunks_change_neither_value_nor_gradient(states, plain, vocab_chunk, time_chunk):
    close(chunked(vocab_chunk, time_chunk)(*states), plain)


def test_a_cap_of_the_logits_is_in_value_and_gradient(states):
    """Of both heads, and not of the model that has none."""
    hidden, unembedding, targets, _ = states
    cap = 1.5
    heads = [
        functools.partial(logprobs.token_logprobs, cap=cap),
        functools.partial(logprobs.token_logprobs_chunked, cap=cap, vocab_chunk=5, time_chunk=3),
    ]
    whole, parts = (value_and_slopes(head)(*states) for head in heads)
    capped = cap * np.tanh(np.asarray(hidden) @ np.asarray(unembedding).T / cap)
    close(whole[0][1], pick(numpy_logp(capped, np.eye(len(unembedding))), targets))
    close(parts, whole)
    assert np.abs(whole[0][1] - logprobs.token_logprobs(hidden, unembedding, targets)).max() > 0.1


def test_chunked_gradient_is_that_of_finite_differences(states):
    hidden, unembedding, *rest = states
    fn = chunked(5, 3)
    draw = np.random.default_rng(2)
    along = draw.normal(size=hidden.shape), draw.normal(size=unembedding.shape)
    slopes = fn(*states)[1]
    exact = sum(np.vdot(slope, step) for slope, step in zip(slopes, along, strict=True))

    def error(size):
        sums = [fn(hidden + s * along[0], unembedding + s * along[1], *rest)[0][0] for s in size]
        return (sums[0] - sums[1]) / (size[0] - size[1]) - exact

    # Half the step, a quarter of the error: nothing of lower order is left in it.
    np.testing.assert_allclose(error((2e-3, -2e-3)) / error((1e-3, -1e-3)), 4.0, rtol=0.01)


def test_chunked_works_inside_vmap_scan_and_checkpoint(states, plain):
    fn = functools.partial(logprobs.token_logprobs_chunked, vocab_chunk=5, time_chunk=3)

    def vmapped(hidden, unembedding, targets):
        return jax.vmap(fn, in_axes=(0, None, 0))(hidden, unembedding, targets)

    def scanned(hidden, unembedding, targets):
        def body(count, row):
            return count + 1, jax.checkpoint(fn)(row[0], unembedding, row[1])

        return jax.lax.scan(body, 0, (hidden, targets))[1]

    both = jax.jit(lambda *arrays: [value_and_slopes(fn)(*arrays) for fn in (vmapped, scanned)])
    for found in both(*states):
        close(found, plain)


def test_chunked_allows_many_cotangents_at_once(states):
    hidden, unembedding, targets, _ = states
    fns = functools.partial(logprobs.token_logprobs_chunked, vocab_chunk=5), logprobs.token_logprobs
    both = jax.jit(lambda *arrays: [jax.jacrev(fn, (0, 1))(*arrays) for fn in fns])
    close(*both(hidden[0, 0], unembedding, targets[0, 0]))


def test_chunked_refuses_forward_mode_and_allows_forward_over_reverse(states):
    hidden, unembedding, targets, _ = states

    def product(fn):
        def squared(hidden):
            return (fn(hidden, unembedding, targets) ** 2).sum()

        return lambda x: jax.jvp(jax.grad(squared), (x,), (x,))[1]

    fns = logprobs.token_logprobs_chunked, logprobs.token_logprobs
    close(*jax.jit(lambda x: [product(fn)(x) for fn in fns])(hidden))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(
            lambda x: logprobs.token_logprobs_chunked(x, unembedding, targets), (hidden,), (hidden,)
        )


@HEADS
def test_half_precision_states_are_summed_in_float32(fn):
    draw = np.random.default_rng(3)
    hidden = jnp.array(draw.normal(size=(2, 2, 64)), jnp.bfloat16)
    unembedding = jnp.array(draw.normal(size=(VOCAB, 64)), jnp.float32)
    targets, weights = jnp.array([[0, 5], [6, 12]]), jnp.ones((2, 2), jnp.float32)
    (_, logp), slopes = value_and_slopes(fn)(hidden, unembedding, targets, weights)
    assert logp.dtype == jnp.float32
    assert [slope.dtype for slope in slopes] == [jnp.bfloat16, jnp.float32]
    rounded = unembedding.astype(jnp.bfloat16).astype(np.float64)
    expected = pick(numpy_logp(hidden.astype(np.float64), rounded), targets)
    # float32 rounding of a sum of 64 products of size one; bfloat16 would be off by 1e-2.
    np.testing.assert_allclose(logp, expected, atol=2e-5)


@HEADS
def test_certain_tokens_have_finite_logprobs_and_gradients(fn):
    hidden = jnp.array([[[1e4, 0.0], [1e4, 0.0]]], jnp.float32)
    unembedding = jnp.array([[1.0, 0.0], [-1.0, 1.0]], jnp.float32)
    targets, weights = jnp.array([[0, 1]]), jnp.ones((1, 2), jnp.float32)
    (_, logp), slopes = value_and_slopes(fn)(hidden, unembedding, targets, weights)
    assert logp.tolist() == [[0.0, -2e4]]
    np.testing.assert_array_equal(slopes[0], [[[0.0, 0.0], [-2.0, 1.0]]])  # W_y - W_top


@jax.jit
def every_reading(hidden, unembedding, targets, learned):
    """Chunked and whole log-probabilities, statistics, and divergences from itself and another."""
    return (
        logprobs.token_logprobs_chunked(hidden, unembedding, targets, vocab_chunk=5),
        logprobs.token_logprobs(hidden, unembedding, targets),
        logprobs.token_statistics(hidden, unembedding, targets),
        logprobs.token_kl(hidden, unembedding, hidden, unembedding),
        logprobs.token_kl(hidden, unembedding, hidden, learned),
    )


@pytest.mark.parametrize("impossible", [slice(0, 5), slice(5, 10), slice(3, 12)])
def test_words_that_are_impossible_leave_the_others_as_they_are(impossible):
    """Logits of minus infinity, of whole chunks: as a model has them for rows it never learned."""
    draw = np.random.default_rng(5)
    hidden = 1 + abs(draw.normal(size=(4, WIDTH)))
    unembedding = draw.normal(size=(VOCAB, WIDTH))
    learned = unembedding.copy()
    unembedding[impossible, 0], learned[impossible, 0] = -np.inf, 0
    targets = np.array([0, 4, 7, 12])
    possible = [word for word in range(VOCAB) if word not in range(VOCAB)[impossible]]
    found, whole, statistics, same, other = every_reading(hidden, unembedding, targets, learned)
    rest = numpy_logp(hidden, unembedding[np.array(possible)])
    among = np.full((4, VOCAB), -np.inf)
    among[:, possible] = rest
    np.testing.assert_allclose(found, pick(among, targets), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found, whole, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(statistics.entropy, -(np.exp(rest) * rest).sum(axis=-1), rtol=1e-9)
    assert float(abs(same).max()) == 0
    kl = (np.exp(rest) * (rest - numpy_logp(hidden, learned)[:, possible])).sum(axis=-1)
    np.testing.assert_allclose(other, kl, rtol=1e-9)


def test_who_reads_programs_gets_the_plain_head(states):
    """Their two programs stand side by side, jitted or not, and have the same numbers."""
    hidden, unembedding, targets, _ = states
    fn = jax.jit(functools.partial(logprobs.token_logprobs_chunked, vocab_chunk=5))
    arguments = hidden, unembedding, targets
    with ASKED(True):
        asked, program = fn(*arguments), str(jax.make_jaxpr(fn)(*arguments))
    assert "custom_vjp" not in program
    assert "custom_vjp" in str(jax.make_jaxpr(fn)(*arguments))
    np.testing.assert_allclose(asked, fn(*arguments), rtol=1e-12)


@HEADS
def test_a_target_outside_the_vocabulary_has_no_logprob(states, fn):
    targets = jnp.array([VOCAB, -1, VOCAB - 1])
    logp = jax.jit(fn)(states[0][0, 0, :3], states[1], targets)
    assert np.isnan(logp).tolist() == [True, True, False]


@pytest.mark.parametrize("name", ["vocab_chunk", "time_chunk"])
def test_a_chunk_size_that_is_not_positive_is_named(states, name):
    with pytest.raises(ValueError, match=f"{name}: expected a positive integer or None, got 0"):
        logprobs.token_logprobs_chunked(*states[:3], **{name: 0})


BIG = {"positions": 256, "vocab": 512, "width": 4}


def big_states():
    hidden = jnp.ones((2, BIG["positions"], BIG["width"]))
    targets = jnp.zeros(hidden.shape[:2], int)
    return hidden, jnp.ones((BIG["vocab"], BIG["width"])), targets, jnp.ones(targets.shape)


def test_chunked_value_and_gradient_never_hold_all_logits():
    all_logits = 2 * BIG["positions"] * BIG["vocab"]
    plain = value_and_slopes(logprobs.token_logprobs)
    assert largest_array(plain, *big_states()) == all_logits
    assert largest_array(chunked(64, 32), *big_states()) == 2 * 32 * 64  # one chunk
    assert largest_array(chunked(64, None), *big_states()) == 2 * BIG["positions"] * 64
    temporary = [
        fn.lower(*big_states()).compile().memory_analysis().temp_size_in_bytes
        for fn in (chunked(64, 32), plain)
    ]
    # The logits alone are half of what the plain path allocates; of them, 1/128 is here.
    assert temporary[0] < all_logits * 8 / 8 < temporary[1]


def test_statistics_and_their_gradients_never_hold_all_logits():
    hidden, unembedding, targets, weights = big_states()

    def entropy(hidden, unembedding, targets):
        return logprobs.token_statistics(hidden, unembedding, targets, time_chunk=8).entropy

    def kl(hidden, unembedding, targets):
        return logprobs.token_kl(hidden, unembedding, hidden, 2 * unembedding, time_chunk=8)

    chunk = 2 * 8 * BIG["vocab"]
    for fn in (entropy, kl):
        assert largest_array(value_and_slopes(fn), hidden, unembedding, targets, weights) == chunk
    moves = functools.partial(logprobs.token_moves, time_chunk=8)
    assert largest_array(moves, *[hidden, unembedding] * 2, targets) == chunk


# ---- responses, by hand

TABLE = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]])  # p(next | token)
BIGRAM = Policy(
    lambda params, tokens, positions=None, attend=None: params[tokens],
    lambda params: jnp.eye(3, dtype=params.dtype),
)


def bigram(tokens, is_response, *, is_token=None, table=None, **options):
    tokens = np.array(tokens)
    is_token = np.full(tokens.shape, True) if is_token is None else np.array(is_token)
    table = np.log(TABLE) if table is None else table
    return bigram_scores(**options)(table, tokens, is_token, np.array(is_response))


@functools.cache
def bigram_scores(**options):
    return jax.jit(functools.partial(logprobs.response_scores, BIGRAM, **options))


@functools.cache
def slope_of(row, **options):
    """Jitted: a row's log-probability as a function of the table, and the scores of all rows."""

    def chosen(table, *batch):
        scores = bigram_scores(**options)(table, *batch)
        return scores.logp[row], scores

    return jax.jit(jax.grad(chosen, has_aux=True))


def test_a_response_is_the_product_of_its_tokens_given_those_before():
    no, yes = False, True
    scores = bigram([[0, 1, 2, 2], [0, 1, 2, 2]], [[no, no, yes, yes], [no, yes, no, yes]])
    # p(2|1) p(2|2), then p(1|0) p(2|2): a mask one place off would give .25 * .7 for the first.
    close(scores.logp, np.log([0.7 * 0.4, 0.25 * 0.4]))
    assert scores.lengths.tolist() == [2.0, 2.0]


def test_pair_scores_are_response_scores_with_chosen_first():
    tokens, scored = np.array([[[0, 1, 2], [0, 2, 0]]]), np.array([[[False, True, True]] * 2])
    real = np.full(tokens.shape, True)
    scores = jax.jit(functools.partial(logprobs.pair_scores, BIGRAM))
    close(scores(np.log(TABLE), tokens, real, scored).logp, np.log([[0.25 * 0.7, 0.25 * 0.3]]))
    with pytest.raises(Exception, match="Type-check error"):
        scores(np.log(TABLE), tokens[:, :1], real[:, :1], scored[:, :1])


def test_an_empty_response_is_certain_and_has_no_gradient():
    tokens, scored = np.array([[0, 1], [0, 1]]), np.array([[False, False], [False, True]])
    slope, scores = slope_of(0)(np.log(TABLE), tokens, np.full((2, 2), True), scored)
    assert (scores.logp[0], scores.lengths.tolist()) == (0.0, [0.0, 1.0])
    assert not slope.any()


@pytest.mark.parametrize(
    ("is_response", "is_token", "max_response"),
    [
        pytest.param([True, False, False], [True, True, True], None, id="first token of all"),
        pytest.param([False, True, False], [False, True, True], None, id="first real token"),
        pytest.param([False, False, True], [True, True, False], None, id="padding"),
        pytest.param([False, True, True], [True, True, True], 1, id="longer than the buffer"),
    ],
)
def test_a_response_that_cannot_be_scored_is_nan_and_leaves_others_alone(
    is_response, is_token, max_response
):
    real, scored = np.array([is_token, [True] * 3]), np.array([is_response, [False, False, True]])
    tokens = np.array([[0, 1, 2], [0, 1, 2]])
    slope, scores = slope_of(1, max_response=max_response)(np.log(TABLE), tokens, real, scored)
    close(scores.logp, np.array([np.nan, np.log(0.7)]))
    close(slope, np.array([[0, 0, 0], [-0.1, -0.2, 0.3], [0, 0, 0]]))


def test_a_buffer_that_is_not_positive_is_named():
    with pytest.raises(ValueError, match="max_response"):
        bigram([[0, 1]], [[False, True]], max_response=0)


# ---- responses, by laws, on a small attention model


def attention_hidden(params, tokens, positions=None, attend=None):
    """A layer of causal attention with learned positions."""
    time = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(time), tokens.shape) if positions is None else positions
    attend = jnp.tril(jnp.ones((1, time, time), bool)) if attend is None else attend
    x = params["embedding"][tokens] + params["positions"][positions]
    for query, value in zip(params["query"], params["value"], strict=True):
        scores = jnp.where(attend, jnp.einsum("bqd,de,bke->bqk", x, query, x), -1e30)
        x = x + jnp.tanh(jnp.einsum("bqk,bkd,de->bqe", jax.nn.softmax(scores), x, value))
    return x


def numpy_hidden(params, tokens):
    """The same for one sequence, token by token."""
    x = params["embedding"][tokens] + params["positions"][: len(tokens)]
    for query, value in zip(params["query"], params["value"], strict=True):
        seen = [np.exp(x[: t + 1] @ query.T @ x[t]) @ x[: t + 1] for t in range(len(x))]
        total = [np.exp(x[: t + 1] @ query.T @ x[t]).sum() for t in range(len(x))]
        x = x + np.tanh(np.array(seen) / np.array(total)[:, None] @ value)
    return x


@functools.cache
def attention(dtype):
    draw = np.random.default_rng(4)
    shapes = {
        "embedding": (VOCAB, WIDTH),
        "positions": (2 * TIME, WIDTH),
        "query": (1, WIDTH, WIDTH),
        "value": (1, WIDTH, WIDTH),
        "unembedding": (VOCAB, WIDTH),
    }
    params = {
        name: jnp.array(0.5 * draw.normal(size=shape), dtype) for name, shape in shapes.items()
    }
    return Policy(attention_hidden, lambda params: params["unembedding"]), params


@functools.cache
def scorer(dtype, fn=logprobs.pair_scores, **options):
    policy, params = attention(dtype)
    jitted = jax.jit(functools.partial(fn, policy, **options))
    return functools.partial(jitted, params)


@functools.cache
def pairs():
    """Pairs of random lengths, right-padded, that begin alike for a while."""
    draw = np.random.default_rng(5)
    tokens = draw.integers(0, VOCAB, (PAIRS, 2, TIME))
    tokens[:, 1, :3] = tokens[:, 0, :3]
    length = draw.integers(4, TIME + 1, (PAIRS, 2, 1))
    start = draw.integers(1, 4, (PAIRS, 1, 1))
    column = np.arange(TIME)
    return tokens, column < length, (column >= start) & (column < length)


# float32: Acceptance 4's bound. float64: its rounding, for sums of a few hundred terms.
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.float64, 1e-12)], ids=["float32", "float64"]
)


@PRECISIONS
def test_pair_scores_match_one_sequence_at_a_time(dtype, rtol):
    params = {name: np.asarray(leaf) for name, leaf in attention(jnp.float64)[1].items()}
    tokens, is_token, is_response = pairs()
    expected = np.zeros((PAIRS, 2))
    for place in np.ndindex(PAIRS, 2):
        row, scored = (x[place][is_token[place]] for x in (tokens, is_response))
        hidden = numpy_hidden(params, row)
        each = pick(numpy_logp(hidden[:-1], params["unembedding"]), row[1:])
        expected[place] = each[scored[1:]].sum()
    np.testing.assert_allclose(scorer(dtype)(*pairs()).logp, expected, rtol=rtol)


@SETTINGS
@hypothesis.given(
    left=st.lists(st.integers(0, 4), min_size=2 * PAIRS, max_size=2 * PAIRS),
    pad_token=st.integers(0, VOCAB - 1),
)
def test_padding_side_and_content_change_no_bit(left, pad_token):
    padded = [np.full((PAIRS, 2, TIME + 4), fill) for fill in (pad_token, False, False)]
    plain = [x.copy() for x in padded]
    for place, before in zip(np.ndindex(PAIRS, 2), left, strict=True):
        for target, straight, source in zip(padded, plain, pairs(), strict=True):
            real = source[place][pairs()[1][place]]
            target[place][before : before + real.size] = real
            straight[place][: real.size] = real
    for dtype in (jnp.float32, jnp.float64):
        found, expected = scorer(dtype)(*padded).logp, scorer(dtype)(*plain).logp
        np.testing.assert_array_equal(found, expected)


@PRECISIONS
def test_padding_amount_changes_nothing(dtype, rtol):
    longer = [np.pad(x, ((0, 0), (0, 0), (0, 4))) for x in pairs()]
    found, expected = scorer(dtype)(*longer).logp, scorer(dtype)(*pairs()).logp
    np.testing.assert_allclose(found, expected, rtol=rtol)


@PRECISIONS
@SETTINGS
@hypothesis.given(order=st.permutations(range(PAIRS)))
def test_batch_order_changes_nothing(dtype, rtol, order):
    shuffled = [x[np.array(order)] for x in pairs()]
    expected = scorer(dtype)(*pairs()).logp[np.array(order)]
    np.testing.assert_allclose(scorer(dtype)(*shuffled).logp, expected, rtol=rtol)


@PRECISIONS
def test_micro_batches_change_nothing(dtype, rtol):
    whole = scorer(dtype)(*pairs()).logp
    for row in ([0, 1], [2, 3], [4, 4]):
        part = scorer(dtype)(*(x[row] for x in pairs())).logp
        np.testing.assert_allclose(part, whole[np.array(row)], rtol=rtol)


@PRECISIONS
def test_chunk_and_buffer_sizes_change_nothing(dtype, rtol):
    head = functools.partial(logprobs.token_logprobs_chunked, vocab_chunk=5, time_chunk=3)
    found = scorer(dtype, head=head, max_response=8)(*pairs())
    np.testing.assert_allclose(found.logp, scorer(dtype)(*pairs()).logp, rtol=rtol)


def slope_and_change(fn, head):
    """Gradient of a weighted sum of scores, in reverse mode and, if `head` allows, forward."""
    policy, params = attention(jnp.float64)
    weights = np.random.default_rng(6).normal(size=(PAIRS, 2))

    def weighted(params):
        return (weights * fn(policy, params, *pairs(), head=head).logp).sum()

    def both(params):
        if head is logprobs.token_logprobs:
            return jax.grad(weighted)(params), jax.jvp(weighted, (params,), (params,))[1]
        return jax.grad(weighted)(params)

    return params, jax.jit(both)(params)


@functools.cache
def plain_slope_and_change():
    return slope_and_change(logprobs.pair_scores, logprobs.token_logprobs)


def test_plain_head_allows_forward_mode():
    params, (slope, change) = plain_slope_and_change()
    along = sum(np.vdot(slope[name], params[name]) for name in params)
    np.testing.assert_allclose(change, along, rtol=1e-12)


def test_both_heads_and_both_layouts_have_one_gradient():
    _, (expected, _) = plain_slope_and_change()
    packed = functools.partial(logprobs.shared_prompt_scores, packed_time=PACKED)
    for fn in (logprobs.pair_scores, packed):
        _, slope = slope_and_change(fn, logprobs.token_logprobs_chunked)
        close(slope, expected)


# ---- a shared prompt, encoded once

PACKED = 2 * TIME - 1
shared = functools.partial(scorer, fn=logprobs.shared_prompt_scores, packed_time=PACKED)


@PRECISIONS
def test_shared_prompt_scores_are_pair_scores(dtype, rtol):
    found, expected = shared(dtype)(*pairs()), scorer(dtype)(*pairs())
    np.testing.assert_allclose(found.logp, expected.logp, rtol=rtol)
    np.testing.assert_array_equal(found.lengths, expected.lengths)


@SETTINGS
@hypothesis.given(seed=st.integers(0, 10_000))
def test_shared_prompt_scores_are_pair_scores_whatever_is_shared(seed):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, 2, (PAIRS, 2, TIME))  # two tokens: common beginnings of any length
    tokens[0, 1] = tokens[0, 0]
    begin, end = draw.integers(0, 4, (PAIRS, 2, 1)), draw.integers(4, 10, (PAIRS, 2, 1))
    is_token = (np.arange(TIME) >= begin) & (np.arange(TIME) < end)
    after_first = np.cumsum(is_token, axis=-1) > 1
    is_response = is_token & after_first & (draw.random(tokens.shape) < 0.6)
    batch = tokens, is_token, is_response
    close(shared(jnp.float64)(*batch), scorer(jnp.float64)(*batch))


def test_packed_lengths_count_each_shared_token_once():
    tokens, is_token, _ = pairs()
    expected = []
    for both, real in zip(tokens, is_token, strict=True):
        ids = tuple(row[mask] for row, mask in zip(both, real, strict=True))
        rows = [tuple(each[:-1]) for each in ids]
        prefixes = {row[:end] for row in rows for end in range(1, len(row) + 1)}
        expected.append(len(prefixes))
        assert logprobs.packed_length(TokenPair(ids, (1, 1), (False, False))) == len(prefixes)
    assert jax.jit(logprobs.packed_lengths)(tokens, is_token).tolist() == expected
    assert max(expected) < PACKED


def test_a_pair_that_needs_more_room_than_the_row_is_refused_and_others_fit():
    need = np.array(jax.jit(logprobs.packed_lengths)(*pairs()[:2]))
    room = int(need.max()) - 1
    small = functools.partial(scorer, jnp.float64, logprobs.shared_prompt_scores)
    logp = small(packed_time=room)(*pairs()).logp
    fits = need <= room
    np.testing.assert_array_equal(np.isnan(logp), np.stack([~fits, ~fits], axis=1))
    assert fits.any()
    close(logp[fits], scorer(jnp.float64)(*pairs()).logp[fits])
    with pytest.raises(ValueError, match="packed_time"):
        small(packed_time=0)(*pairs())


def test_a_real_decoder_scores_both_layouts_alike():
    sizes = {"heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 32}
    config = DecoderConfig(vocab=VOCAB, width=16, layers=1, window=3, logit_cap=2.0, **sizes)
    policy, shapes = abstract(config, param_dtype=jnp.float64, compute_dtype=jnp.float64)
    draw = np.random.default_rng(9)
    params = jax.tree.map(lambda x: draw.normal(0.3, 0.3, x.shape), shapes)

    @jax.jit
    def both(params):
        packed = logprobs.shared_prompt_scores(policy, params, *pairs(), packed_time=PACKED)
        return packed, logprobs.pair_scores(policy, params, *pairs())

    close(*both(params))


# ---- whole distributions


@pytest.mark.parametrize("time_chunk", [None, 3])
def test_token_statistics_match_a_full_softmax(states, time_chunk):
    fn = jax.jit(functools.partial(logprobs.token_statistics, time_chunk=time_chunk))
    found, logp = fn(*states[:3]), numpy_logp(*states[:2])
    close(found.logp, pick(logp, states[2]))
    close(found.entropy, -(np.exp(logp) * logp).sum(axis=-1))
    np.testing.assert_array_equal(found.is_top, logp.argmax(axis=-1) == states[2])
    assert found.is_top.any()


def test_a_target_outside_the_vocabulary_is_neither_probable_nor_top():
    hidden = jnp.array([[0.0, 1.0], [0.0, 1.0]])  # the last token is top, and -1 is not its name
    found = jax.jit(logprobs.token_statistics)(hidden, jnp.eye(2), jnp.array([2, -1]))
    assert np.isnan(found.logp).all()
    assert not found.is_top.any()


def naive_logp(hidden, unembedding):
    return jax.nn.log_softmax(hidden @ unembedding.T, axis=-1)


def test_entropy_gradient_matches_a_full_softmax(states):
    def entropy(hidden, unembedding, targets):
        return logprobs.token_statistics(hidden, unembedding, targets, time_chunk=2).entropy

    def naive(hidden, unembedding, targets):
        logp = naive_logp(hidden, unembedding)
        return -(jnp.exp(logp) * logp).sum(axis=-1)

    close(value_and_slopes(entropy)(*states), value_and_slopes(naive)(*states))


@pytest.mark.parametrize(("scale", "time_chunk"), [(0.1, None), (100.0, 2)])
def test_token_kl_and_its_gradient_match_a_full_softmax(states, scale, time_chunk):
    draw = np.random.default_rng(7)  # scale 100: some ratios are beyond what exp can hold
    reference = jnp.array(scale * draw.normal(size=(2, 3, 7, 4)))
    matrix = jnp.array(draw.normal(size=(VOCAB, 4)))

    def kl(hidden, unembedding, targets):
        return logprobs.token_kl(hidden, unembedding, reference, matrix, time_chunk=time_chunk)

    def naive(hidden, unembedding, targets):
        logp = naive_logp(hidden, unembedding)
        return (jnp.exp(logp) * (logp - naive_logp(reference, matrix))).sum(axis=-1)

    close(value_and_slopes(kl)(*states), value_and_slopes(naive)(*states))


def test_token_kl_of_a_policy_that_all_but_left_the_vocabulary_stays_finite():
    hidden, reference = jnp.array([[300.0, 0.0]]), jnp.array([[-300.0, 0.0]])
    narrow = [x.astype(jnp.float32) for x in (hidden, jnp.eye(2), reference, jnp.eye(2))]
    kl = jax.jit(jax.value_and_grad(lambda h: logprobs.token_kl(h, *narrow[1:]).sum()))
    value, slope = kl(narrow[0])
    assert value == 300.0
    np.testing.assert_array_equal(slope, [[0.0, 0.0]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_token_kl_where_a_model_excludes_a_token(dtype):
    """Infinite where only the reference does, though the policy's probability underflows, too."""
    far = 1e25 if dtype == jnp.float32 else 1e200  # its square is infinite
    state = jnp.array([[far, 1.0]], dtype)

    def kl(*logits):  # a logit of -inf from a product that overflows
        rows = [[[-far, 0.0] if x == -jnp.inf else [0.0, x] for x in some] for some in logits]
        policy, reference = jnp.array(rows, dtype)
        return jax.value_and_grad(lambda h: logprobs.token_kl(h, policy, state, reference)[0])(
            state
        )

    for policy, reference, expected in (
        ([0.0, 0.0], [0.0, -jnp.inf], jnp.inf),
        ([0.0, -2000.0], [0.0, -jnp.inf], jnp.inf),
        ([0.0, -jnp.inf], [0.0, -jnp.inf], 0.0),
        ([0.0, -jnp.inf], [0.0, 0.0], np.log(2)),
    ):
        value, slope = kl(policy, reference)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert np.isfinite(slope).all()


def test_token_kl_of_nearly_equal_models_keeps_its_digits(states):
    draw = np.random.default_rng(8)
    hidden, unembedding = (np.asarray(x, np.float32) for x in states[:2])
    nudged = hidden + (1e-4 * draw.normal(size=hidden.shape)).astype(np.float32)
    kl = jax.jit(logprobs.token_kl)
    assert not kl(hidden, unembedding, hidden, unembedding).any()
    found = kl(nudged, unembedding, hidden, unembedding)
    assert (found >= 0).all()
    logp, logq = (numpy_logp(x.astype(np.float64), unembedding) for x in (nudged, hidden))
    exact = (np.exp(logp) * (logp - logq)).sum(axis=-1)
    # Logits differ by 1e-4, known to 1e-6: one part in a hundred. The plain sum of p (log p - log
    # q) would carry an error of 1e-7 against results of 1e-8.
    np.testing.assert_allclose(found, exact, rtol=0.03)


@pytest.fixture(scope="module")
def movement():
    """Directions of the hidden states and of the unembedding of `states`."""
    draw = np.random.default_rng(11)
    hidden, unembedding = draw.normal(size=(2, 3, 7, WIDTH)), draw.normal(size=(VOCAB, WIDTH))
    return hidden, unembedding


def token_moves(**options):
    return jax.jit(functools.partial(logprobs.token_moves, **options))


@pytest.mark.parametrize("time_chunk", [None, 3])
def test_token_moves_match_a_directional_derivative_and_a_loop(states, movement, time_chunk):
    hidden, unembedding, targets, _ = states
    found = token_moves(time_chunk=time_chunk)(hidden, unembedding, *movement, targets)
    whole = functools.partial(logprobs.token_logprobs, targets=targets)
    derivative = jax.jit(functools.partial(jax.jvp, whole))
    close((found.logp, found.change), derivative((hidden, unembedding), movement))
    p = np.exp(numpy_logp(hidden, unembedding))
    moved = movement[0] @ np.asarray(unembedding).T + np.asarray(hidden) @ movement[1].T
    variance = np.zeros(targets.shape)
    for at in np.ndindex(targets.shape):
        mean = sum(p[at][v] * moved[at][v] for v in range(VOCAB))
        variance[at] = sum(p[at][v] * (moved[at][v] - mean) ** 2 for v in range(VOCAB))
    close(found.variance, variance)


def test_half_the_variance_is_what_every_log_probability_loses_in_second_order(states, movement):
    """Of logits on a straight line: along the unembedding alone they are."""
    hidden, unembedding, targets, _ = states
    still = np.zeros_like(hidden)
    found = token_moves()(hidden, unembedding, still, movement[1], targets)
    step = 1e-3
    ahead, back = (numpy_logp(hidden, unembedding + s * movement[1]) for s in (step, -step))
    bend = (ahead + back - 2 * numpy_logp(hidden, unembedding)) / step**2
    expected = np.broadcast_to(found.variance[..., None], bend.shape)
    # Of the fourth order is left: the square of a step in which logits move by 3e-3.
    np.testing.assert_allclose(-bend, expected, rtol=1e-4)
    change = np.asarray(hidden) @ movement[1].T
    logits = np.asarray(hidden) @ np.asarray(unembedding).T
    close(-found.variance / 2, diagnostics.drag(logits, change))


def test_a_movement_that_all_tokens_share_moves_none(states):
    hidden, unembedding, targets, _ = states
    hidden = hidden.at[..., 0].set(1.0)
    shared = np.zeros((VOCAB, WIDTH))
    shared[:, 0] = 50.0
    found = token_moves()(hidden, unembedding, np.zeros_like(hidden), shared, targets)
    np.testing.assert_allclose(found.change, 0, atol=1e-12)
    np.testing.assert_allclose(found.variance, 0, atol=1e-24)


def test_token_moves_of_targets_that_are_not_there_or_impossible():
    """What is impossible counts nothing; what is not in the vocabulary is not its last token."""
    unembedding = jnp.array([[1.0, 0.0], [0.0, 1.0], [-jnp.inf, 0.0]])
    hidden, targets = jnp.ones((4, 2)), jnp.array([1, -1, 3, 2])
    change, heads = jnp.array([[1.0, 2.0]] * 4), jnp.zeros((3, 2))
    found = token_moves()(hidden, unembedding, change, heads, targets)
    np.testing.assert_allclose(found.logp, [-np.log(2), np.nan, np.nan, -np.inf], rtol=1e-12)
    np.testing.assert_allclose(found.change, [0.5, np.nan, np.nan, np.nan], rtol=1e-12)
    np.testing.assert_allclose(found.variance, [0.25] * 4, rtol=1e-12)
    with pytest.raises(ValueError, match="time_chunk: expected a positive integer or None, got 0"):
        logprobs.token_moves(hidden, unembedding, change, heads, targets, time_chunk=0)


def test_token_moves_sums_in_float32():
    """Of bfloat16 hidden states, as a model has them that computes in it."""
    draw = np.random.default_rng(12)
    hidden, change = (jnp.array(draw.normal(size=(5, WIDTH)), jnp.bfloat16) for _ in range(2))
    heads = (draw.normal(size=(64, WIDTH)).astype(jnp.bfloat16) for _ in range(2))
    unembedding, head_change = (x.astype(np.float32) for x in heads)
    targets = jnp.arange(5)
    found = token_moves()(hidden, unembedding, change, head_change, targets)
    assert {x.dtype for x in found} == {np.dtype(np.float32)}
    wide = [np.asarray(x, np.float64) for x in (hidden, unembedding, change, head_change)]
    # float32 rounding of logits and movements of size ten.
    for x, y in zip(found, token_moves()(*wide, targets), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_response_hidden_feeds_the_statistics():
    policy, params = attention(jnp.float64)

    @jax.jit
    def both(params):
        found = logprobs.response_hidden(policy, params, *pairs(), max_response=8)
        unembedding = policy.unembedding(params)
        return found, logprobs.token_statistics(found.hidden, unembedding, found.targets)

    found, statistics = both(params)
    total = np.where(found.is_target, statistics.logp, 0).sum(axis=-1)
    close(total, scorer(jnp.float64)(*pairs()).logp)
    np.testing.assert_array_equal(found.is_target.sum(axis=-1), found.lengths)
    assert not found.refused.any()
