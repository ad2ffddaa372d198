"""`jaxpref.training.pairset`: neither sizes nor batches change a number or its place."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpref import logprobs
from jaxpref.data.pairs import TokenPair
from jaxpref.models import decoder
from jaxpref.training import pairset
from jaxpref.training.objectives import objective
from jaxpref.training.pairset import PairSet, joined

VOCAB = 23


def pair(prompt, *answers):
    tokens = tuple(np.array([*prompt, *answer], np.int32) for answer in answers)
    return TokenPair(tokens, (len(prompt),) * len(answers), (False,) * len(answers))


@pytest.fixture(scope="module")
def model():
    config = decoder.DecoderConfig(VOCAB, 8, 1, 2, 1, 4, 8)
    wide = {"param_dtype": jnp.float64, "compute_dtype": jnp.float64}
    return decoder.functional(decoder.Decoder(config, rngs=nnx.Rngs(0), **wide))


@pytest.fixture(scope="module")
def pairs(model):
    """Seven pairs, long and short ones by turns, in rows of 16 and of 24 positions."""
    random, found = np.random.default_rng(0), []
    for number in range(7):
        sizes = ((3, 6, 5 - number % 4), (12, 7, 5 - number % 4))[number % 2]
        found.append(pair(*(random.integers(VOCAB, size=n) for n in sizes)))
    return dataclasses.replace(PairSet.of(model[0], found), sizes=(16, 24))


@pytest.fixture(scope="module")
def naive(model, pairs):
    """Log-probabilities of each pair alone, both sequences apart, padded to the longer one."""
    policy, params = model
    score = jax.jit(logprobs.pair_scores, static_argnums=0)
    found = []
    for tokens, starts, _, *_ in pairs.pairs:
        arrays = np.zeros((3, 1, 2, max(map(len, tokens))), np.int32)
        for side, (ids, start) in enumerate(zip(tokens, starts, strict=True)):
            arrays[0, 0, side, : len(ids)] = ids
            arrays[1, 0, side, : len(ids)] = arrays[2, 0, side, start : len(ids)] = 1
        found.append(score(policy, params, arrays[0], *arrays[1:].astype(bool)).logp[0])
    return np.stack(found)


def test_log_probabilities_are_those_of_each_pair_alone(model, pairs, naive):
    _, params = model
    np.testing.assert_allclose(pairs.logps(params, batch=3), naive, rtol=1e-12)
    whole = PairSet.of(model[0], pairs.pairs)
    assert whole.sizes == (24,)
    np.testing.assert_allclose(
        whole.logps(params, [6, 0, 0], batch=2), naive[[6, 0, 0]], rtol=1e-12
    )
    one = jax.jit(pairs.logp)(params, [x[0] for x in pairs.rows([4])[:3]])
    np.testing.assert_allclose(one, naive[4], rtol=1e-12)


def programs():
    """How many of log-probabilities are compiled."""
    score: Any = pairset._scores
    return score._cache_size()


def test_a_reference_comes_with_the_batch_and_compiles_nothing_again(model, pairs, naive):
    before = programs()
    pairs.logps(model[1], [0, 2], batch=3)
    ready = pairs.with_reference(naive)
    ready.logps(model[1], [1, 3], batch=3)
    assert programs() - before <= 2  # its two sizes
    assert pairs.rows([3]).reference is None
    np.testing.assert_array_equal(ready.rows([3, 1]).reference, naive[[3, 1]])
    for part in ready.parts([5, 2, 1, 0]):
        np.testing.assert_array_equal(part.reference, naive[part.index])


def test_a_batch_comes_in_the_sizes_it_needs(pairs):
    assert pairs.needs.tolist() == [
        len({tuple(ids[:n]) for ids in p.tokens for n in range(1, len(ids))}) for p in pairs.pairs
    ]
    assert pairs.lengths.tolist() == [[6, 5], [7, 4], [6, 3], [7, 2], [6, 5], [7, 4], [6, 3]]
    short, long = pairs.parts([1, 4, 3, 0, 6])
    assert [short.tokens.shape, long.tokens.shape] == [(2, 2, 17), (3, 2, 25)]
    assert sorted([*short.index, *long.index]) == [0, 1, 3, 4, 6]
    assert set(short.index) < {0, 4, 6}
    for index, time in (([0, 2], 17), ([3, 1], 25), ([4], 17), ([1], 25)):
        (part,) = pairs.parts(index)
        assert part.index.tolist() == index
        assert part.tokens.shape[-1] == pairs.rows(index).tokens.shape[-1] == time


def test_parts_have_the_scores_and_the_slope_of_the_whole(model, pairs, naive):
    index = [5, 0, 3, 2, 4]
    ready, loss = pairs.with_reference(naive - 1), objective("dpo")

    @jax.jit
    def both(params, batch, parts):
        def whole(params):
            scores = ready.score(params, batch)
            return loss(scores, batch).mean(), scores

        def apart(params):
            scores = ready.score_parts(params, parts)
            return loss(scores, joined(parts)).mean(), scores

        return [jax.value_and_grad(f, has_aux=True)(params) for f in (whole, apart)]

    parts = ready.parts(index)
    ((value, scores), slope), ((again, found), other) = both(model[1], ready.rows(index), parts)
    order = np.concatenate([part.index for part in parts])
    assert len(parts) == 2
    assert order.tolist() != index
    assert joined(parts).index.tolist() == order.tolist()
    np.testing.assert_allclose(scores.logp, naive[index], rtol=1e-12)
    np.testing.assert_allclose(found.logp, naive[order], rtol=1e-12)
    np.testing.assert_array_equal(found.lengths, pairs.lengths[order])
    np.testing.assert_allclose(value, again, rtol=1e-12)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), slope, other)


def test_a_sweep_keeps_the_order_whatever_the_batches(pairs):
    shapes = []

    def function(batch):
        shapes.append(batch.tokens.shape)
        return {"row": batch.index, "tokens": batch.tokens}

    for index in (None, [6, 5, 5, 1, 0, 6, 6, 2], [3], np.array([2, 1])):
        found = pairs.sweep(function, index, batch=3)
        rows = np.arange(7) if index is None else index
        np.testing.assert_array_equal(found["row"], rows)
        # Shorter batches are filled up with zeros, as rows are.
        np.testing.assert_array_equal(found["tokens"], pairs.rows(rows).tokens)
    assert set(shapes) == {(3, 2, 17), (3, 2, 25)}


def test_hidden_states_give_the_same_log_probabilities(model, pairs, naive):
    policy, params = model

    @jax.jit
    def tokens(batch):
        found = pairs.hidden(params, batch)
        each = logprobs.token_logprobs(found.hidden, policy.unembedding(params), found.targets)
        return {"logp": jnp.where(found.is_target, each, 0), "hidden": found.hidden}

    found = pairs.sweep(tokens, [1, 0, 4], batch=2)
    np.testing.assert_allclose(found["logp"].sum(axis=-1), naive[[1, 0, 4]], rtol=1e-12)
    assert found["hidden"].shape[:2] == (3, 2)


def test_many_pairs_are_of_few_sizes_that_fit_them(model):
    random = np.random.default_rng(1)
    many = [pair([0], random.integers(VOCAB, size=n), [1, 2]) for n in range(2, 70)]
    found = PairSet.of(model[0], many)
    assert list(found.sizes) == sorted(set(found.sizes))
    assert 1 < len(found.sizes) <= len(pairset.QUANTILES)
    assert all(size % 8 == 0 for size in found.sizes)
    assert found.sizes[-1] - 8 < found.needs.max() <= found.sizes[-1]
    for row, need in enumerate(found.needs):
        size = found.rows([row]).tokens.shape[-1] - 1
        assert size == min(size for size in found.sizes if size >= need)
    assert len(PairSet.of(model[0], many[: pairset.FEW]).sizes) == 1


def test_equal_prompts_have_one_number(model):
    some = [pair(p, [1, 2], a) for p, a in (([3, 4], [5]), ([4], [5]), ([3, 4], [6]), ([3], [4]))]
    assert PairSet.of(model[0], some).prompts.tolist() == [0, 1, 0, 2]


def test_what_is_no_pair_set_is_named(model, pairs):
    policy, _ = model
    with pytest.raises(ValueError, match="pairs: got none, expected at least one"):
        PairSet.of(policy, [])
    with pytest.raises(ValueError, match="pair 1: got 1 responses, expected 2"):
        PairSet.of(policy, [pairs.pairs[0], pair([1], [2])])
    with pytest.raises(ValueError, match=r"reference: got \(2, 2\), expected \(7, 2\)"):
        pairs.with_reference(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="index: got no pair, expected at least one"):
        pairs.sweep(lambda batch: batch.index, [])
    with pytest.raises(ValueError, match="index is empty, expected at least one row"):
        pairs.rows([])
