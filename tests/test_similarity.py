"""`jaxpref.embeddings.similarity`: loops in float64, the identities, both official conventions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxpref import embeddings, gradients, logprobs
from jaxpref.data import batches, pairs
from jaxpref.models import decoder

VOCAB, WIDTH, PAIRS, TIME = 11, 7, 3, 6
LENGTHS = np.array([[4, 6], [6, 1], [2, 2]])


@pytest.fixture(scope="module")
def drawn():
    """States, tokens, mask and unembedding; unused room holds NaN states."""
    random = np.random.default_rng(3)
    is_target = np.arange(TIME) < LENGTHS[..., None]
    hidden = random.normal(size=(PAIRS, 2, TIME, WIDTH))
    hidden[~is_target] = np.nan
    targets = random.integers(VOCAB, size=(PAIRS, 2, TIME))
    return hidden, targets, is_target, random.normal(size=(VOCAB, WIDTH))


def responses(drawn):
    """Each pair's states without unused room."""
    hidden, _, is_target, _ = drawn
    return [
        [states[mask] for states, mask in zip(*x, strict=True)]
        for x in zip(hidden, is_target, strict=True)
    ]


SCORES = {
    "ches": embeddings.ches,
    "ches_length_normalised": embeddings.ches_length_normalised,
    "last_hidden_similarity": embeddings.last_hidden_similarity,
}


def by_a_loop(name, chosen, rejected):
    """The definitions, token by token."""
    if name == "last_hidden_similarity":
        return sum(a * b for a, b in zip(chosen[-1], rejected[-1], strict=True))
    score = 0.0
    for h in chosen:
        cross, own = (sum(float(h @ other) for other in x) for x in (rejected, chosen))
        if name == "ches":
            score += cross - own
        else:
            score += cross / len(chosen) / len(rejected) - own / len(chosen) ** 2
    return score


@pytest.mark.parametrize("name", SCORES)
def test_scores_equal_a_loop_over_tokens(drawn, name):
    hidden, _, is_target, _ = drawn
    expected = [by_a_loop(name, *pair) for pair in responses(drawn)]
    np.testing.assert_allclose(SCORES[name](hidden, is_target), expected, rtol=1e-12)


@pytest.mark.parametrize("name", SCORES)
def test_batching_and_unused_room_change_nothing(drawn, name):
    hidden, _, is_target, _ = drawn
    wide = np.pad(hidden, ((0, 0), (0, 0), (0, 3), (0, 0)), constant_values=np.inf)
    mask = np.pad(is_target, ((0, 0), (0, 0), (0, 3)))
    expected = SCORES[name](hidden, is_target)
    np.testing.assert_array_equal(SCORES[name](wide, mask), expected)
    np.testing.assert_array_equal(
        SCORES[name](hidden[None, :2], is_target[None, :2])[0], expected[:2]
    )
    shifted = np.roll(wide, 2, axis=2), np.roll(mask, 2, axis=2)  # room on both sides
    np.testing.assert_allclose(SCORES[name](*shifted), expected, rtol=1e-14)


@pytest.mark.parametrize("name", SCORES)
def test_scale_and_rotation(drawn, name):
    hidden, _, is_target, _ = drawn
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))
    score = SCORES[name](hidden, is_target)
    np.testing.assert_allclose(SCORES[name](3 * hidden, is_target), 9 * score, rtol=1e-12)
    np.testing.assert_allclose(SCORES[name](hidden @ turn, is_target), score, rtol=1e-12)


def test_the_same_states_score_zero(drawn):
    hidden, _, is_target, _ = drawn
    same = hidden[:, [0, 0]], is_target[:, [0, 0]]
    assert embeddings.ches(*same).tolist() == [0.0] * PAIRS
    assert embeddings.ches_length_normalised(*same).tolist() == [0.0] * PAIRS
    one = embeddings.ches(np.ones((2, 1, WIDTH)), np.full((2, 1), True))  # single tokens
    assert float(one) == 0.0


def test_states_that_point_alike_leave_the_lengths():
    """CHES is ``|y_w| (|y_l| - |y_w|)`` of states of norm 1: 3 * (5 - 3)."""
    mask = np.arange(5) < np.array([[3], [5]])
    hidden = np.ones((2, 5, 4)) / 2
    assert float(embeddings.ches(hidden, mask)) == 6.0
    assert float(embeddings.ches_length_normalised(hidden, mask)) == 0.0


def test_contributions_add_up(drawn):
    hidden, _, is_target, _ = drawn
    each = np.asarray(embeddings.ches_contributions(hidden, is_target))
    np.testing.assert_allclose(each.sum((1, 2)), embeddings.ches(hidden, is_target), rtol=1e-12)
    assert (each[~is_target] == 0).all()
    chosen = responses(drawn)[1][0]
    np.testing.assert_allclose(each[1, 0], [-(chosen.sum(0) @ h) for h in chosen], rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_long_responses_of_narrow_states_do_not_overflow(dtype):
    """2,000 tokens of width 4,096: ``|S|^2`` is 6.4e10, far above float16's 65,504."""
    hidden = np.full((2, 2000, 4096), 2.0, dtype)
    hidden[1] *= 1.5
    mask = np.full((2, 2000), True)
    score = embeddings.ches(hidden, mask)
    assert score.dtype == jnp.float32
    assert float(score) == pytest.approx(2000**2 * 4096 * (6 - 4), rel=1e-6)


def test_a_nan_of_a_scored_state_is_seen(drawn):
    hidden, _, is_target, _ = drawn
    spoilt = hidden.copy()
    spoilt[1, 0, 2, 0] = np.nan
    for score in SCORES.values():
        spoils = score is not embeddings.last_hidden_similarity
        assert np.isnan(score(spoilt, is_target)).tolist() == [False, spoils, False]


def test_an_empty_response_has_no_mean_and_no_last_state():
    hidden, mask = np.ones((2, 1, WIDTH)), np.array([[True], [False]])
    assert float(embeddings.ches(hidden, mask)) == -WIDTH
    assert np.isnan(embeddings.ches_length_normalised(hidden, mask))
    assert np.isnan(embeddings.last_hidden_similarity(hidden, mask))
    assert np.isnan(embeddings.last_hidden_similarity(hidden[:, :0], mask[:, :0]))
    assert embeddings.ches(hidden[:, :0], mask[:, :0]) == 0
    assert embeddings.ches(hidden[None][:0], mask[None][:0]).shape == (0,)


@pytest.mark.parametrize("score", SCORES.values(), ids=list(SCORES))
def test_derivatives_agree_with_finite_differences(drawn, score):
    hidden, _, is_target, _ = drawn
    known = np.where(is_target[..., None], hidden, 0.5)
    check_grads(lambda h: score(h, is_target), (known,), order=1, modes=("rev",))


# The unembedding's Gram.


@pytest.fixture(scope="module")
def slopes(drawn):
    """The gradient of every response's log-probability in the table, ``[pairs 2 vocab*width]``."""
    hidden, targets, is_target, table = drawn
    known = np.where(is_target[..., None], hidden, 0.0)

    def logp(table):
        each = logprobs.token_logprobs(jnp.asarray(known), table, jnp.asarray(targets))
        return jnp.where(is_target, each, 0.0).sum(axis=-1)

    return np.asarray(jax.jit(jax.jacrev(logp))(jnp.asarray(table))).reshape(PAIRS, 2, -1)


@pytest.mark.parametrize("chunk", [1, 4, 11, 4096])
def test_unembedding_gram_equals_autodiff(drawn, slopes, chunk):
    hidden, targets, is_target, table = drawn
    gram = embeddings.unembedding_gram(hidden, targets, is_target, table, vocab_chunk=chunk)
    np.testing.assert_allclose(gram, slopes @ slopes.swapaxes(-1, -2), rtol=1e-11)


def test_unembedding_gram_of_far_logits(drawn):
    """Probability one: residuals of sure tokens are zero, nothing overflows."""
    hidden, targets, is_target, table = drawn
    sure = np.where(is_target[..., None], 1e3 * hidden, np.nan)
    gram = embeddings.unembedding_gram(sure, targets, is_target, table, vocab_chunk=4)
    best = np.nan_to_num(sure) @ table.T
    likely = embeddings.unembedding_gram(sure, best.argmax(-1), is_target, table, vocab_chunk=4)
    assert np.isfinite(gram).all()
    assert np.abs(likely).max() < 1e-9 * np.abs(gram).max()


def test_alpha_weighted_ches_with_all_coefficients_one_is_ches(drawn):
    hidden, _, is_target, _ = drawn
    kept = np.where(is_target[..., None], hidden, 0).sum(2)
    gram = kept @ kept.swapaxes(-1, -2)
    np.testing.assert_allclose(
        embeddings.alpha_weighted_ches(gram), embeddings.ches(hidden, is_target), rtol=1e-12
    )


def test_unembedding_gram_refuses_no_chunk(drawn):
    with pytest.raises(ValueError, match="vocab_chunk: got 0, expected at least 1"):
        embeddings.unembedding_gram(*drawn, vocab_chunk=0)


# Text alone.


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [([], [], 1.0), ([1, 2], [1, 2], 1.0), ([1, 2], [], 0.0), ([1, 2, 3], [2, 3, 4, 5], 0.25)],
)
def test_edit_similarity(chosen, rejected, expected):
    assert embeddings.edit_similarity(chosen, np.array(rejected, np.int32)) == expected


def test_edit_similarity_equals_the_textbook_recursion():
    random = np.random.default_rng(1)
    for _ in range(20):
        x, y = (random.integers(3, size=random.integers(1, 8)).tolist() for _ in range(2))
        row = list(range(len(y) + 1))
        for i, a in enumerate(x, 1):
            old, row = row, [i]
            for j, b in enumerate(y, 1):
                row.append(min(old[j] + 1, row[-1] + 1, old[j - 1] + (a != b)))
        expected = 1 - row[-1] / max(len(x), len(y))
        assert embeddings.edit_similarity(x, y) == pytest.approx(expected, abs=1e-15)


def test_lengths():
    lengths = jnp.array([[2.0, 3.0], [0.0, 1.0]])
    assert embeddings.length_difference(lengths).tolist() == [1.0, 1.0]
    assert embeddings.length_ratio(lengths).tolist() == [1.5, np.inf]


# On a model: positions, and the two conventions of the official code.


@pytest.fixture(scope="module")
def policy():
    from flax import nnx

    sizes: dict[str, Any] = {
        "width": 16,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_width": 8,
        "mlp_width": 32,
    }
    config = decoder.DecoderConfig(vocab=VOCAB, **sizes)
    model = decoder.Decoder(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64,
                            compute_dtype=jnp.float64)  # fmt: skip
    return decoder.functional(model)


PROMPT, END = [3, 1, 4], 9
ANSWERS = [1, 5, 2], [6, 5, 3, 5, 8]


def test_both_official_conventions(policy):
    """States from the prompt's last token on: all of them without the end token (the script), or
    all but the last with it (the package)."""
    model, params = policy
    script, package = [], []
    states = jax.jit(model.hidden)
    for answer in ANSWERS:
        for kept, text in ((script, PROMPT + answer), (package, [*PROMPT, *answer, END])):
            room = np.array([text + [0] * (9 - len(text))])  # no state sees what comes after it
            found = np.asarray(states(params, room))[0, len(PROMPT) - 1 : len(text)]
            kept.append(found if kept is script else found[:-1])
    chosen, rejected = (np.array([*PROMPT, *answer, END], np.int32) for answer in ANSWERS)
    pair = pairs.TokenPair((chosen, rejected), (len(PROMPT), len(PROMPT)), (False, False))
    batch = batches.collate([pair], [0], pad_id=0)

    @jax.jit
    def both(params):
        shared = logprobs.shared_prompt_hidden(model, params, *batch[:3], packed_time=24)
        return shared, logprobs.response_hidden(model, params, *batch[:3])

    shared, apart = both(params)
    for official in (script, package):
        for name, score in SCORES.items():
            expected = by_a_loop(name, *official)
            for found in (shared, apart):
                ours = score(found.hidden, found.is_target)
                np.testing.assert_allclose(ours, [expected], rtol=1e-11, err_msg=name)


def test_alpha_weights_give_the_rate_of_head_only_training(policy):
    """Of gradient flow on the unembedding alone, by one VJP and one JVP."""
    model, params = policy
    tokens = np.array([[[*PROMPT, 1, 5, 2], [*PROMPT, 6, 5, 3]]])
    scored = np.broadcast_to(np.arange(6) >= 3, tokens.shape)

    @jax.jit
    def rates_and_gram(params):
        found = logprobs.response_hidden(model, params, tokens, tokens >= 0, scored)
        table = model.unembedding(params)

        def logp(table):
            each = logprobs.token_logprobs(found.hidden, table, found.targets)
            return jnp.where(found.is_target, each, 0.0).sum(-1)

        _, rates = gradients.flow_rates(logp, lambda x: (x[..., 1] - x[..., 0]).sum(), table)
        known = found.hidden, found.targets, found.is_target
        return rates, embeddings.unembedding_gram(*known, table)

    rates, gram = rates_and_gram(params)
    np.testing.assert_allclose(-embeddings.alpha_weighted_ches(gram), rates[:, 0], rtol=1e-11)
