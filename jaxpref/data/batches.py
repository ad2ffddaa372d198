"""Batches of pairs: arrays of one shape, drawn by a pure function of seed and step."""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxpref.data.pairs import TokenPair

Last = Literal["drop", "short"]


class Batch(NamedTuple):
    """Pairs as arrays for a training step, chosen first.

    The second axis is of a row's responses: two of a pair, one of a single example, n of a list.

    Attributes:
      tokens: token ids; padding holds the padding id.
      is_token: False on padding.
      is_response: True on the tokens whose log-probabilities count, the end token among them.
      reference: log-probabilities under the reference model in nats, once they are known.
      index: row of the data set.
    """

    tokens: Int[Array | np.ndarray, "pairs responses time"]
    is_token: Bool[Array | np.ndarray, "pairs responses time"]
    is_response: Bool[Array | np.ndarray, "pairs responses time"]
    reference: Float[Array | np.ndarray, "pairs responses"] | None
    index: Int[Array | np.ndarray, " pairs"]


def steps_per_epoch(n: int, batch: int, *, last: Last = "drop") -> int:
    """Number of steps in which `order` shows each of ``n`` rows once, up to ``last``.

    >>> [steps_per_epoch(10, 4, last=last) for last in ("drop", "short")]
    [2, 3]

    Args:
      n: rows of the data set.
      batch: rows of a step.
      last: as in `order`.

    Returns:
      A count of steps, at least 1.

    Raises:
      ValueError: as `order`.
    """
    if n < 1 or batch < 1:
        raise ValueError(f"n is {n} and batch is {batch}, expected at least 1")
    if last not in ("drop", "short"):
        raise ValueError(f"last is {last!r}, expected 'drop' or 'short'")
    if last == "drop" and n < batch:
        raise ValueError(f"batch is {batch}, expected at most the {n} rows, or last='short'")
    return n // batch if last == "drop" else -(-n // batch)


def order(
    n: int, batch: int, seed: int, step: int, *, last: Last = "drop"
) -> Int[np.ndarray, " batch"]:
    """Rows of one training step: a pure function, so that the step is the position in the data.

    Each epoch is a new permutation of the rows, decided by the seed and the epoch's number.

    Args:
      n: rows of the data set.
      batch: rows of a step.
      seed: decides all permutations; at least 0.
      step: from 0 on.
      last: ``"drop"`` leaves out, in each epoch, the rows after its last whole batch (other rows
        each time); ``"short"`` shows them as a smaller batch, which compiles once more.

    Returns:
      Row numbers, ``[batch]``; fewer in the last step of an epoch under ``"short"``.

    Raises:
      ValueError: another ``last``, a negative step or seed, or under ``"drop"`` a batch that is
        larger than the data.

    >>> order(5, 2, seed=0, step=0), order(5, 2, seed=0, step=1)
    (array([2, 4]), array([3, 0]))
    """
    for name, value in (("step", step), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{name} is {value}, expected at least 0")
    epoch, within = divmod(step, steps_per_epoch(n, batch, last=last))
    return _permutation(n, seed, epoch)[within * batch : (within + 1) * batch].copy()


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def collate(
    pairs: Sequence[TokenPair],
    index: Sequence[int] | Int[np.ndarray, " pairs"],
    *,
    pad_id: int,
    side: Literal["left", "right"] = "right",
    buckets: Sequence[int] | None = None,
    reference: Float[np.ndarray, "rows responses"] | None = None,
) -> Batch:
    """The rows ``index`` of a data set as one padded batch.

    Args:
      pairs: the whole data set, of `jaxpref.data.pairs.encode`.
      index: rows to take.
      pad_id: what fills padding; it is masked, and changes no result.
      side: where padding goes.
      buckets: lengths to pad to, the smallest that fits; a step compiles once for each. None pads
        to the longest sequence of the batch.
      reference: log-probabilities of all rows of the data set, in nats.

    Returns:
      The batch as NumPy arrays.

    Raises:
      ValueError: another ``side``, no row, rows of different numbers of responses, or a sequence
        longer than every bucket.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side is {side!r}, expected 'left' or 'right'")
    rows = np.asarray(index, np.int32)
    if rows.size == 0:
        raise ValueError("index is empty, expected at least one row")
    responses = {len(pairs[row].tokens) for row in rows}
    if len(responses) > 1:
        found = f"rows of {min(responses)} and of {max(responses)} responses"
        raise ValueError(f"index takes {found}, expected rows of one number")
    time = _padded(max(len(t) for row in rows for t in pairs[row].tokens), buckets)
    tokens = np.full((len(rows), responses.pop(), time), pad_id, np.int32)
    is_token = np.zeros(tokens.shape, bool)
    is_response = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        for j, (ids, start) in enumerate(zip(pairs[row].tokens, pairs[row].starts, strict=True)):
            begin = time - len(ids) if side == "left" else 0
            end = begin + len(ids)
            tokens[i, j, begin:end] = ids
            is_token[i, j, begin:end] = True
            is_response[i, j, begin + start : end] = True
    return Batch(
        tokens, is_token, is_response, None if reference is None else reference[rows], rows
    )


def _padded(longest: int, buckets: Sequence[int] | None) -> int:
    if buckets is None:
        return longest
    fitting = [length for length in buckets if length >= longest]
    if not fitting:
        raise ValueError(f"buckets is {list(buckets)}, expected one of at least {longest} tokens")
    return min(fitting)
