"""Order as a pure function, and padding that says where it is."""

import collections

import numpy as np
import pytest

from jaxpref.data import batches
from jaxpref.data.pairs import TokenPair


def pair(chosen, rejected, starts):
    arrays = (np.array(chosen, np.int32), np.array(rejected, np.int32))
    return TokenPair(arrays, starts, (False, False))


PAIRS = [pair([5, 6, 7], [5, 8], (1, 1)), pair([9], [9, 9, 9, 9, 9], (1, 2))]


def test_collate_by_hand():
    batch = batches.collate(PAIRS, [0], pad_id=3)
    np.testing.assert_array_equal(batch.tokens, [[[5, 6, 7], [5, 8, 3]]])
    np.testing.assert_array_equal(batch.is_token, [[[1, 1, 1], [1, 1, 0]]])
    np.testing.assert_array_equal(batch.is_response, [[[0, 1, 1], [0, 1, 0]]])
    np.testing.assert_array_equal(batch.index, [0])
    assert batch.reference is None
    left = batches.collate(PAIRS, [0], pad_id=3, side="left", buckets=[2, 4])
    np.testing.assert_array_equal(left.tokens, [[[3, 5, 6, 7], [3, 3, 5, 8]]])
    np.testing.assert_array_equal(left.is_token, [[[0, 1, 1, 1], [0, 0, 1, 1]]])
    np.testing.assert_array_equal(left.is_response, [[[0, 0, 1, 1], [0, 0, 0, 1]]])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("buckets", [None, [8, 16], [64]])
def test_neither_side_nor_bucket_changes_what_is_marked(side, buckets):
    batch = batches.collate(PAIRS, [1, 0], pad_id=0, side=side, buckets=buckets)
    for i, row in enumerate([1, 0]):
        for j in range(2):
            tokens, start = PAIRS[row].tokens[j], PAIRS[row].starts[j]
            np.testing.assert_array_equal(batch.tokens[i, j][batch.is_token[i, j]], tokens)
            np.testing.assert_array_equal(
                batch.tokens[i, j][batch.is_response[i, j]], tokens[start:]
            )
    assert not (batch.is_response & ~batch.is_token).any()


def test_collate_takes_the_smallest_bucket_that_fits():
    lengths = [
        batches.collate(PAIRS, [i], pad_id=0, buckets=[9, 3, 5]).tokens.shape[2] for i in (0, 1)
    ]
    assert lengths == [3, 5]
    with pytest.raises(ValueError, match=r"buckets is \[3, 4\], expected one of at least 5 tokens"):
        batches.collate(PAIRS, [0, 1], pad_id=0, buckets=[3, 4])


def test_collate_takes_the_reference_of_its_rows():
    reference = np.array([[-1.0, -2.0], [-3.0, -4.0]], np.float32)
    batch = batches.collate(PAIRS, [1, 1, 0], pad_id=0, reference=reference)
    np.testing.assert_array_equal(batch.reference, reference[[1, 1, 0]])
    assert batch.reference.dtype == np.float32


def test_collate_refuses_what_it_cannot_do():
    with pytest.raises((ValueError, TypeError), match="side"):
        batches.collate(PAIRS, [0], pad_id=0, side="middle")
    with pytest.raises(ValueError, match="index is empty"):
        batches.collate(PAIRS, [], pad_id=0)


def test_rows_of_one_or_of_several_responses_are_batches_too():
    single = TokenPair((np.array([5, 6]),), (1,), (False,), (0,))
    several = TokenPair(tuple(np.array([5, 6, i]) for i in range(3)), (2,) * 3, (False,) * 3)
    batch = batches.collate([single, single], [0, 1], pad_id=0)
    np.testing.assert_array_equal(batch.tokens, [[[5, 6]]] * 2)
    batch = batches.collate([several], [0], pad_id=0, reference=np.ones((1, 3)))
    np.testing.assert_array_equal(batch.tokens, [[[5, 6, 0], [5, 6, 1], [5, 6, 2]]])
    np.testing.assert_array_equal(batch.is_response, [[[0, 0, 1]] * 3])
    assert batch.reference.shape == (1, 3)
    with pytest.raises(ValueError, match="rows of 1 and of 3 responses, expected rows of one num"):
        batches.collate([single, several], [0, 1], pad_id=0)


def test_an_epoch_shows_each_row_once_and_the_next_one_in_another_order():
    epochs = [
        np.concatenate([batches.order(12, 3, 7, 4 * epoch + step) for step in range(4)])
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_depends_on_seed_and_step_alone():
    backwards = [batches.order(10, 4, 0, step) for step in reversed(range(6))][::-1]
    forwards = [batches.order(10, 4, 0, step) for step in range(6)]
    np.testing.assert_array_equal(backwards, forwards)
    other = [batches.order(10, 4, 1, step) for step in range(6)]
    assert not np.array_equal(forwards, other)
    forwards[0][:] = -1  # a caller that writes changes no later call
    np.testing.assert_array_equal(batches.order(10, 4, 0, 0), backwards[0])


def test_last_rows_are_dropped_or_short_as_named():
    shown = [batches.order(10, 4, 3, step) for step in range(400)]
    assert {len(rows) for rows in shown} == {4}
    # 200 epochs drop 2 of 10 rows each: every row is dropped about 40 times, not always the same.
    counts = collections.Counter(np.concatenate(shown).tolist())
    assert min(counts.values()) > 120
    short = [batches.order(10, 4, 3, step, last="short") for step in range(3)]
    assert [len(rows) for rows in short] == [4, 4, 2]
    assert sorted(np.concatenate(short)) == list(range(10))
    assert len(batches.order(2, 4, 3, 5, last="short")) == 2


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ((3, 4, 0, 0), "batch is 4, expected at most the 3 rows"),
        ((3, 0, 0, 0), "n is 3 and batch is 0, expected at least 1"),
        ((0, 1, 0, 0), "n is 0 and batch is 1, expected at least 1"),
        ((3, 1, 0, -1), "step is -1, expected at least 0"),
        ((3, 1, -1, 0), "seed is -1, expected at least 0"),
    ],
)
def test_order_refuses_what_it_cannot_do(arguments, fault):
    with pytest.raises(ValueError, match=fault):
        batches.order(*arguments)


def test_order_is_pinned():
    """The same numbers on every machine: a resumed run must see the data it would have seen.

    If these move, NumPy changed its permutation, and old runs cannot be resumed exactly.
    """
    assert batches.order(8, 8, 0, 0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]
