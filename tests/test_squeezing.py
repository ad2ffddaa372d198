"""`jaxpref.diagnostics.squeezing`: worked values, laws, a plain loop over all logits, edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grams import largest_array

from jaxpref import diagnostics, logprobs
from jaxpref.logprobs.chunked import map_time

INF, NAN = np.inf, np.nan
SHAPE, VOCAB, WIDTH = (2, 5), 11, 4
SHIFTS = jax.jit(diagnostics.token_shifts)
SQUEEZING = jax.jit(diagnostics.squeezing)
DRAG = jax.jit(diagnostics.drag)


@pytest.fixture(scope="module")
def models():
    """Hidden states and unembeddings of two models, and tokens; some are greedy in both."""
    draw = np.random.default_rng(3)
    start = draw.normal(size=(*SHAPE, WIDTH)), draw.normal(size=(VOCAB, WIDTH))
    end = tuple(x + 0.7 * draw.normal(size=x.shape) for x in start)
    return start, end, draw.integers(0, VOCAB, SHAPE)


@pytest.fixture(scope="module")
def logits(models):
    start, end, tokens = models
    return start[0] @ start[1].T, end[0] @ end[1].T, tokens


def softmax(logits):
    weights = [np.exp(float(z)) for z in logits]
    return [w / sum(weights) for w in weights]


def by_loop(before, after, tokens):
    """All fields, one position and one token of the vocabulary at a time."""
    found = {name: np.zeros(tokens.shape) for name in diagnostics.TokenShifts._fields}
    for at in np.ndindex(tokens.shape):
        p, q, y = softmax(before[at]), softmax(after[at]), tokens[at]
        tops = [max(range(len(x)), key=x.__getitem__) for x in (p, q)]
        row = {
            "logp_before": np.log(p[y]),
            "logp_after": np.log(q[y]),
            "rank_before": sorted(p, reverse=True).index(p[y]) + 1,
            "rank_after": sorted(q, reverse=True).index(q[y]) + 1,
            "top_before": np.log(p[tops[0]]),
            "top_after": np.log(q[tops[1]]),
            "old_top_after": np.log(q[tops[0]]),
            "new_top_rank": sorted(p, reverse=True).index(p[tops[1]]) + 1,
            "entropy_before": -sum(x * np.log(x) for x in p),
            "entropy_after": -sum(x * np.log(x) for x in q),
            "kl": sum(y * np.log(y / x) for x, y in zip(p, q, strict=True)),
        }
        for name, value in row.items():
            found[name][at] = value
    return diagnostics.TokenShifts(**found)


def close(found, expected, rtol=1e-10):
    for name, x, y in zip(found._fields, found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol, err_msg=name)


def test_shifts_match_a_loop_over_the_full_softmax(logits):
    found, expected = SHIFTS(*logits), by_loop(*logits)
    close(found, expected)
    assert {1, 2, 3} < set(np.ravel(found.new_top_rank).tolist())  # all kinds are among them
    assert {1} < set(np.ravel(found.rank_before).tolist())


@pytest.mark.parametrize("chunk", [2, None])
def test_shifts_of_hidden_states_by_chunks_of_time_match_the_loop(models, logits, chunk):
    """As an experiment calls it: of both models' logits only a chunk's are held."""
    (hidden, head), (moved, moved_head), tokens = jax.tree.map(jnp.asarray, models)

    def of_chunk(hidden, moved, tokens):
        both = logprobs.token_logits(hidden, head), logprobs.token_logits(moved, moved_head)
        return diagnostics.token_shifts(*both, tokens)

    @jax.jit
    def shifts(*arrays):
        return map_time(of_chunk, chunk, arrays, time_axis=1)

    close(shifts(hidden, moved, tokens), by_loop(*logits))
    positions = 2 * (chunk or 5)
    assert largest_array(shifts, hidden, moved, tokens) == 2 * positions * VOCAB


def test_shifts_of_a_worked_move():
    """The mass of the last token goes to the favourite; then another becomes the favourite."""
    before = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]] * 2))
    after = jnp.log(jnp.array([[0.75, 0.125, 0.0625, 0.0625], [0.125, 0.125, 0.5, 0.25]]))
    found = SHIFTS(before, after, jnp.array([3, 1]))
    bits = {name: np.asarray(value) / np.log(2) for name, value in found._asdict().items()}
    np.testing.assert_allclose(bits["logp_before"], [-3, -2])
    np.testing.assert_allclose(bits["logp_after"], [-4, -3])
    np.testing.assert_allclose(bits["top_before"], [-1, -1])
    np.testing.assert_allclose(bits["top_after"], [np.log2(0.75), -1])
    np.testing.assert_allclose(bits["old_top_after"], [np.log2(0.75), -3])
    np.testing.assert_allclose(bits["entropy_before"], [1.75, 1.75])
    np.testing.assert_allclose(bits["entropy_after"][1], 1.75)
    np.testing.assert_allclose(bits["kl"][1], -0.125 * 2 - 0.125 + 0.5 * 2 + 0.25)
    assert found.rank_before.tolist() == [3, 2]  # equals share the best rank
    assert found.rank_after.tolist() == [3, 3]
    assert found.new_top_rank.tolist() == [1, 3]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_a_model_is_unshifted_from_itself(logits, dtype):
    same = jnp.asarray(logits[0], dtype)
    found = SHIFTS(same, same, logits[2])
    assert np.all(found.kl == 0)
    assert np.all(found.new_top_rank == 1)
    assert np.all(diagnostics.shift_kind(found.new_top_rank) == diagnostics.Shift.UNSHIFTED)
    for before, after in (("logp_before", "logp_after"), ("top_before", "old_top_after"),
                          ("rank_before", "rank_after"), ("top_before", "top_after")):  # fmt: skip
        np.testing.assert_array_equal(getattr(found, before), getattr(found, after))
    np.testing.assert_array_equal(SQUEEZING(same, same, logits[2]), 0)
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert found.kl.dtype == found.logp_after.dtype == DRAG(same, same).dtype == wide


def test_nothing_depends_on_the_order_of_the_vocabulary_or_on_a_constant(logits):
    before, after, tokens = logits
    order = np.random.default_rng(4).permutation(VOCAB)
    shuffled = before[..., order], after[..., order], np.argsort(order)[tokens]
    higher = before + 3.0, after - np.arange(5.0)[:, None], tokens
    for other in (shuffled, higher):
        close(SHIFTS(*other), SHIFTS(*logits))
        np.testing.assert_allclose(SQUEEZING(*other), SQUEEZING(*logits), atol=1e-12)


def test_the_divergence_of_nearly_equal_models_keeps_its_digits(logits):
    """Of 1e-10, where a plain sum of float32 has rounding of 1e-7."""
    before = np.asarray(logits[0], np.float32)
    after = before + np.float32(2**-15) * (np.arange(VOCAB) % 2).astype(np.float32)
    found = SHIFTS(before, after, logits[2]).kl
    assert np.all(found >= 0)
    exact = by_loop(before.astype(float), after.astype(float), logits[2]).kl
    np.testing.assert_allclose(found, exact, rtol=0.1)


def test_divergence_of_far_models_and_of_impossible_tokens():
    """Two tokens, the second one lost or won, at ratios beyond what exp can hold."""
    before = jnp.array(
        [[0.0, 0.0], [0.0, -INF], [0.0, -800.0], [0.0, -INF], [0.0, -INF], [5, -INF]]
    )
    after = jnp.array(
        [[0.0, -INF], [0.0, 0.0], [-800.0, 0.0], [0.0, -INF], [0.0, -800.0], [-INF, 5]]
    )
    found = SHIFTS(before, after, jnp.ones(6, int))
    np.testing.assert_allclose(found.kl, [np.log(2), INF, 800.0, 0.0, INF, INF], rtol=1e-12)
    low = np.log(2)
    np.testing.assert_allclose(found.logp_before, [-low, -INF, -800, -INF, -INF, -INF])
    np.testing.assert_allclose(found.logp_after, [-INF, -low, 0, -INF, -800, 0])
    np.testing.assert_allclose(found.old_top_after, [0, -low, -800, 0, 0, -INF])
    assert found.new_top_rank.tolist() == [1, 1, 2, 1, 1, 2]
    assert found.rank_after.tolist() == [2, 1, 1, 2, 2, 1]
    np.testing.assert_allclose(found.entropy_before, [low, 0, 0, 0, 0, 0], atol=1e-12)


@pytest.mark.parametrize("scale", [2.0, 200.0])  # 200: ratios beyond what exp can hold
def test_the_divergence_has_a_gradient(logits, scale):
    before, after = logits[0], scale * logits[1]
    slope = jax.jit(jax.grad(lambda x: SHIFTS(before, x, logits[2]).kl.sum()))(after)
    logp, logq = (np.asarray(jax.nn.log_softmax(x)) for x in (before, after))
    kl = (np.exp(logq) * (logq - logp)).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(slope, np.exp(logq) * (logq - logp - kl), rtol=1e-9, atol=1e-9)


def test_ties_have_the_best_rank_and_the_first_is_greedy():
    before = jnp.array([[1.0, 2.0, 2.0, 0.0, 1.0]] * 5)
    after = jnp.array([[0.0, 0.0, 3.0, 0.0, 3.0]] * 5)
    found = SHIFTS(before, after, jnp.arange(5))
    assert found.rank_before.tolist() == [3, 1, 1, 5, 3]
    assert found.rank_after.tolist() == [3, 3, 1, 3, 1]
    assert found.new_top_rank.tolist() == [1] * 5
    np.testing.assert_allclose(found.old_top_after, found.top_after - 3.0)  # of token 1, not 2


def test_ranks_are_of_logits_that_log_probabilities_cannot_tell_apart():
    before = jnp.array([0.0, -1e-9, -2e-9], jnp.float32)
    assert len(set(np.asarray(jax.nn.log_softmax(before)).tolist())) == 1
    assert [int(SHIFTS(before, before, jnp.array(y)).rank_before) for y in range(3)] == [1, 2, 3]


def test_what_is_not_known_has_no_rank():
    before, after = jnp.zeros((4, 3)), jnp.array([[0.0, 1.0, 2.0]] * 4)
    before = before.at[2].set(-INF)
    after = after.at[3, 0].set(NAN)
    tokens = jnp.array([-1, 3, 0, 1])
    found = SHIFTS(before, after, tokens)
    assert np.isnan(found.logp_before).tolist() == [True, True, True, False]
    assert np.isnan(found.logp_after).tolist() == [True, True, False, True]
    assert found.rank_before.tolist() == [0, 0, 0, 1]
    assert found.rank_after.tolist() == [0, 0, 3, 0]
    assert found.new_top_rank.tolist() == [1, 1, 0, 0]
    assert np.isfinite(found.kl).tolist() == [True, True, False, False]
    kinds = diagnostics.shift_kind(found.new_top_rank).tolist()
    assert kinds == [diagnostics.Shift.UNSHIFTED] * 2 + [diagnostics.Shift.UNKNOWN] * 2
    assert np.isnan(SQUEEZING(before, after, tokens)).all()


def test_shift_kinds_are_the_papers():
    kinds = diagnostics.shift_kind(np.array([[0, 1, 2], [3, 4, 49152]])).tolist()
    assert [[diagnostics.Shift(kind).name for kind in row] for row in kinds] == [
        ["UNKNOWN", "UNSHIFTED", "MARGINAL"],
        ["MARGINAL", "SHIFTED", "SHIFTED"],
    ]


def test_shifts_map_over_positions_as_over_a_batch(logits):
    both = jax.jit(jax.vmap(jax.vmap(diagnostics.token_shifts)))(*logits)
    close(both, SHIFTS(*logits))
    mixed = SHIFTS(logits[0], logits[1].astype(np.float32), logits[2])
    assert mixed.logp_after.dtype == jnp.float64


def test_no_sort_of_the_vocabulary(logits):
    for function in (diagnostics.token_shifts, diagnostics.squeezing):
        assert " sort[" not in str(jax.make_jaxpr(function)(*logits))
    assert " sort[" in str(jax.make_jaxpr(jnp.sort)(logits[0]))


# ---- squeezing


def ascent(p, token, rate):
    """Logits after gradient ascent on the loss of a token, of a table of logits."""
    return np.log(p) + rate * (p - np.eye(len(p))[token])


@pytest.mark.parametrize(("rate", "expected"), [(1.0, 0.1256), (3.0, 0.2581)])
def test_squeezing_of_an_unlikely_token_pushed_down(rate, expected):
    p = np.array([0.7, 0.2, 0.08, 0.02])
    after = ascent(p, 3, rate)
    weights = p * np.exp(rate * p)  # of the other three
    naive = np.log(weights[0] / weights[:3].sum()) - np.log(0.7 / 0.98)
    found = SQUEEZING(np.log(p), after, 3)
    np.testing.assert_allclose(found, naive, rtol=1e-10)
    np.testing.assert_allclose(found, expected, atol=5e-5)


def test_a_token_that_falls_alone_squeezes_nothing(logits):
    """Its mass is shared out in proportion, though the favourite takes most of it."""
    before, _, tokens = logits
    for fall in (1e-3, 5.0, 60.0, INF):
        after = before - np.where(np.eye(VOCAB)[tokens] > 0, fall, 0.0)
        assert np.all(SHIFTS(before, after, tokens).logp_after < jnp.log(0.99))
        np.testing.assert_allclose(SQUEEZING(before, after, tokens), 0, atol=1e-12)


def test_squeezing_matches_its_formula_and_has_the_runner_up_for_a_greedy_token(logits):
    found = SQUEEZING(*logits)
    greedy = 0
    for at in np.ndindex(SHAPE):
        p, q, y = softmax(logits[0][at]), softmax(logits[1][at]), logits[2][at]
        greedy += p[y] == max(p)
        top = max((v for v in range(VOCAB) if v != y), key=p.__getitem__)
        expected = np.log(q[top] / (1 - q[y])) - np.log(p[top] / (1 - p[y]))
        np.testing.assert_allclose(found[at], expected, rtol=1e-9)
    assert greedy


def test_squeezing_of_a_certain_token_keeps_its_digits():
    """1 - p is below what float32 can hold next to 1."""
    before = jnp.array([0.0, -30.0, -31.0], jnp.float32)
    after = jnp.array([0.0, -40.0, -45.0], jnp.float32)
    expected = np.log1p(np.exp(-1.0)) - np.log1p(np.exp(-5.0))
    np.testing.assert_allclose(SQUEEZING(before, after, 0), expected, rtol=1e-6)
    assert np.isnan(SQUEEZING(before[:1], after[:1], 0))  # no other token


# ---- drag


def test_drag_is_the_second_order_of_every_log_probability(logits):
    before, after, _ = logits
    change, step = after - before, 1e-3
    log_softmax = jax.nn.log_softmax
    ahead, back = (log_softmax(before + s * change) for s in (step, -step))
    bend = np.asarray(ahead + back - 2 * log_softmax(before)) / step**2
    expected = np.broadcast_to(DRAG(before, change)[..., None], bend.shape)
    # Of the fourth order is left: the square of a step in which logits move by 3e-3.
    np.testing.assert_allclose(bend / 2, expected, rtol=1e-4)


def test_drag_is_minus_the_divergence_from_the_start_up_to_the_third_order(logits):
    before, after, tokens = logits
    errors = []
    for step in (1e-2, 5e-3):
        change = step * (after - before)
        drag = DRAG(before, change)
        errors.append(drag + SHIFTS(before + change, before, tokens).kl)
    np.testing.assert_allclose(errors[0] / errors[1], 8, rtol=0.1)


def test_drag_of_a_worked_move_scales_with_its_square_and_is_never_positive(logits):
    p, change = np.array([0.5, 0.25, 0.25]), np.array([1.0, -1.0, 3.0])
    found = DRAG(np.log(p), change)  # mean 1, variance 0.25 * 4 + 0.25 * 4
    np.testing.assert_allclose(found, -1.0, rtol=1e-12)
    np.testing.assert_allclose(DRAG(np.log(p), -3 * change), 9 * found, rtol=1e-12)
    assert np.all(DRAG(*logits[:2]) < 0)


@pytest.mark.parametrize(("dtype", "rounding"), [(jnp.float64, 1e-15), (jnp.float32, 1e-6)])
def test_drag_of_a_shift_that_all_share_is_zero(logits, dtype, rounding):
    before = jnp.asarray(logits[0], dtype)
    found = DRAG(before, jnp.full_like(before, 1000.0))
    # The mean of a thousand is a thousand to rounding, and its square is what is left.
    np.testing.assert_allclose(found, 0, atol=(1000 * rounding) ** 2)


def test_what_is_impossible_drags_nothing():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25, 0.0]] * 3))
    change = jnp.array([[1.0, -1.0, 3.0, far] for far in (1e9, INF, NAN)])
    np.testing.assert_allclose(DRAG(logits, change), -1.0, rtol=1e-12)


def test_drag_keeps_a_small_variance_beside_a_large_shift():
    """Of float32: the mean square less the squared mean would lose 0.25 beside 1e8."""
    change = jnp.array([1e4 - 0.5, 1e4 + 0.5], jnp.float32)
    np.testing.assert_allclose(DRAG(jnp.zeros(2, jnp.float32), change), -0.125, rtol=1e-6)


def test_arrays_of_other_lengths_are_refused(logits):
    before, after, tokens = logits
    with pytest.raises(ValueError, match=r"after: got shape \(2, 5, 10\), expected \(2, 5, 11\)"):
        diagnostics.token_shifts(before, after[..., 1:], tokens)
    for function in (diagnostics.token_shifts, diagnostics.squeezing):
        with pytest.raises(ValueError, match=r"tokens: got shape \(2,\), expected \(2, 5\)"):
            function(before, after, tokens[:, 0])
    drag = functools.partial(diagnostics.drag, before)
    with pytest.raises(ValueError, match=r"change: got shape \(2, 5\), expected \(2, 5, 11\)"):
        drag(tokens)
