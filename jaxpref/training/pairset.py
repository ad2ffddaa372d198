"""A data set of pairs as arrays, in a few sizes by length, and a policy's numbers of it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxpref import logprobs
from jaxpref.data import batches
from jaxpref.data.batches import Batch
from jaxpref.data.pairs import TokenPair, sha256
from jaxpref.logprobs.responses import Targets, find_targets, right_padded
from jaxpref.models import bounds
from jaxpref.models.decoder import Policy
from jaxpref.training import parallel

QUANTILES = (0.25, 0.5, 0.7, 0.85, 0.95, 1.0)  # of the pairs' lengths, where sizes end
FEW = 64  # pairs for which one size will do: each costs a compilation

NOTHING: Any = None  # arrays of a batch that nobody reads

Index = Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class PairSet:
    """Pairs as arrays, and log-probabilities as functions of them.

    A pair is computed in one row: what its two sequences begin with, then the rest of each. Rows
    come in a few `sizes`, and a batch as arrays of the sizes it needs (`parts`): padding everything
    to the longest pair takes about twice the time. Neither changes a number beyond rounding. A
    program compiles once for each size that it meets.

    Attributes:
        policy: The model.
        pairs: Token ids.
        sizes: Positions of a row, ascending multiples of 8; the last one fits every pair.
        reference: Log-probabilities ``[pairs 2]`` under the reference, nats, once they are known.
        skipped: The rows that were left out, each with its place and fault.

    >>> from jaxpref.models import tabular
    >>> policy, params = tabular.softmax(jnp.log(jnp.array([[0.2, 0.8]])))
    >>> pair = TokenPair((np.array([0, 1]), np.array([0, 0])), (1, 1), (False, False))
    >>> np.exp(PairSet.of(policy, [pair]).logps(params)).round(3).tolist()
    [[0.8, 0.2]]
    """

    policy: Policy
    pairs: tuple[TokenPair, ...]
    sizes: tuple[int, ...]
    reference: Float[np.ndarray, "pairs 2"] | None = None
    skipped: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        policy: Policy,
        pairs: Sequence[TokenPair],
        *,
        quantiles: Sequence[float] = QUANTILES,
        skipped: Sequence[str] = (),
    ) -> "PairSet":
        """A set of these pairs.

        Args:
            policy: The model; its `hidden` must honour `positions` and `attend`.
            pairs: Of `jaxpref.data.pairs.encode`.
            quantiles: Of the pairs' lengths, where sizes end; the last is 1, and ``(1.0,)`` makes
                one size, for programs that compile slowly. Up to `FEW` pairs are of one anyway.
            skipped: Rows that are not among them, as lines.

        Raises:
            ValueError: no pair, or one of another number of responses, by its place.
            DataError: a pair that the model cannot read, by its place.
        """
        if not pairs:
            raise ValueError("pairs: got none, expected at least one")
        for row, pair in enumerate(pairs):
            if len(pair.tokens) != 2:
                raise ValueError(f"pair {row}: got {len(pair.tokens)} responses, expected 2")
        places = [f"pair {row}, {side}" for row in range(len(pairs))
                  for side in ("chosen", "rejected")]  # fmt: skip
        bounds.check(policy.bounds, (ids for pair in pairs for ids in pair.tokens), places)
        need = [logprobs.packed_length(pair) for pair in pairs]
        ends = np.quantile(need, quantiles if len(pairs) > FEW else [1.0], method="higher")
        sizes = {_eights(int(end)) for end in ends}
        return cls(policy, tuple(pairs), tuple(sorted(sizes)), None, tuple(skipped))

    def __len__(self) -> int:
        return len(self.pairs)

    # A set may be a static argument of a program, which depends on pairs and model, and not on the
    # reference: that comes with a batch.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, PairSet) and self._decides == other._decides

    def __hash__(self) -> int:
        return hash(self._decides)

    @functools.cached_property
    def _decides(self) -> tuple[Policy, tuple[int, ...], str]:
        return self.policy, self.sizes, self.digest

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the token ids."""
        return sha256(self.pairs)

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, "pairs 2"]:
        """Scored tokens of each response."""
        whole = [[len(ids) for ids in pair.tokens] for pair in self.pairs]
        return np.array(whole) - np.array([pair.starts for pair in self.pairs])

    @functools.cached_property
    def prompts(self) -> Int[np.ndarray, " pairs"]:
        """A number for each pair, the same for pairs whose prompts have the same token ids.

        A prompt that was cut at another place, or whose end merged into a response, is another.
        """
        numbers: dict[bytes, int] = {}
        keys = [pair.tokens[0][: pair.starts[0]].tobytes() for pair in self.pairs]
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys])

    @functools.cached_property
    def needs(self) -> Int[np.ndarray, " pairs"]:
        """Positions that each pair needs of a row."""
        return np.array([logprobs.packed_length(pair) for pair in self.pairs])

    @functools.cached_property
    def _responses(self) -> dict[int, int]:
        """Room for the longest response of the pairs that fit each size."""
        fitting = {size: self.lengths[self.needs <= size] for size in self.sizes}
        return {size: _eights(int(lengths.max(initial=1))) for size, lengths in fitting.items()}

    def rows(self, index: Index) -> Batch:
        """Some pairs as one batch, in this order, of the smallest size that fits them all."""
        # A row packs both sequences without their last tokens, so `time` is its size and one.
        time = self._size(index) + 1
        return batches.collate(
            self.pairs, index, pad_id=0, buckets=(time,), reference=self.reference
        )

    def _size(self, index: Index) -> int:
        need = max((self.needs[row] for row in index), default=0)
        return min(size for size in self.sizes if size >= need)

    def parts(self, index: Index) -> tuple[Batch, ...]:
        """Some pairs as two batches, the shorter half first, or as one if all are of one size.

        `Batch.index` says which pairs came where.
        """
        by_length = np.asarray(index)[np.argsort(self.needs[index], kind="stable")]
        half = by_length[: len(by_length) // 2]
        if self._size(half) == self._size(by_length) or not half.size:
            return (self.rows(index),)
        return self.rows(half), self.rows(by_length[len(half) :])

    def score(self, params: PyTree, batch: Batch) -> logprobs.Scores:
        """Log-probabilities and lengths ``[pairs 2]`` of a batch of `rows`, for training."""
        return logprobs.shared_prompt_scores(self.policy, params, *batch[:3], **self._room(batch))

    def score_parts(self, params: PyTree, parts: Sequence[Batch]) -> logprobs.Scores:
        """`score` of all parts of a batch, one after the other; `joined` is their batch."""
        return jax.tree.map(lambda *x: jnp.concatenate(x), *(self.score(params, p) for p in parts))

    def hidden(self, params: PyTree, batch: Batch) -> logprobs.Responses:
        """Hidden states ``[pairs 2 response]`` of a batch of `rows`, for numbers of tokens."""
        return logprobs.shared_prompt_hidden(self.policy, params, *batch[:3], **self._room(batch))

    def targets(self, batch: Batch) -> Targets:
        """The scored tokens ``[pairs 2 response]`` of a batch, as `hidden` orders them."""
        tokens, is_token, is_response = right_padded(*batch[:3])
        longest = self._room(batch)["max_response"]
        return find_targets(tokens, is_token, is_response, longest)[1]

    def logp(self, params: PyTree, pair: PyTree) -> Float[Array, "2"]:
        """Of one pair, ``batch[:3]`` without its first axis; for `jaxpref.gradients`."""
        tokens, is_token, is_response = (x[None] for x in pair)
        return self.score(params, Batch(tokens, is_token, is_response, None, NOTHING)).logp[0]

    def _room(self, batch: Batch) -> dict[str, Any]:
        size = batch.tokens.shape[-1] - 1
        return {"packed_time": size, "max_response": self._responses[size]}

    def sweep(
        self, function: Callable[[Batch], PyTree], index: Index | None = None, *, batch: int = 8
    ) -> PyTree:
        """What a function of batches says of some pairs, stacked in their order.

        Args:
            function: ``batch -> `` pytree of arrays with the axis ``pairs`` first, jitted. Where a
                further axis is longer for some batches, as ``response`` is, others get zeros.
            index: Pairs, which may come again; None is all.
            batch: Pairs at a time; a last smaller batch is filled up and what is said of the
                filling dropped, so each size compiles once.

        Returns:
            The pytree of NumPy arrays, first axis in the order of `index`.

        Raises:
            ValueError: no pair.
        """
        rows = np.arange(len(self)) if index is None else np.asarray(index)
        if not rows.size:
            raise ValueError("index: got no pair, expected at least one")
        by_length, found = np.argsort(self.needs[rows], kind="stable"), []
        for begin in range(0, len(rows), batch):
            filled = np.resize(rows[by_length[begin : begin + batch]], batch)
            found.append(parallel.to_host(function(self.rows(filled))))
        back = np.argsort(by_length)  # the filling stands behind the last pair
        return jax.tree.map(lambda *x: _joined(x)[back], *found)

    def logps(
        self, params: PyTree, index: Index | None = None, *, batch: int = 8
    ) -> Float[np.ndarray, "rows 2"]:
        """Log-probabilities of some pairs, or of all, nats, by batches."""

        def logp(rows: Batch) -> Array:
            return _scores(self.policy, params, *rows[:3], **self._room(rows)).logp

        return self.sweep(logp, index, batch=batch)

    @property
    def known(self) -> Float[np.ndarray, "pairs 2"]:
        """The reference log-probabilities, nats.

        Raises:
            ValueError: there are none.
        """
        if self.reference is None:
            raise ValueError("reference: got None, expected log-probabilities of the pairs")
        return self.reference

    def with_reference(self, reference: Float[np.ndarray, "pairs 2"]) -> "PairSet":
        """The same pairs with these reference log-probabilities, of all pairs in order, nats."""
        reference = np.asarray(reference)
        if reference.shape != (len(self), 2):
            raise ValueError(f"reference: got {reference.shape}, expected {(len(self), 2)}")
        return dataclasses.replace(self, reference=reference)

    def referring_to(
        self, params: PyTree, index: Index | None = None, *, batch: int = 8
    ) -> "PairSet":
        """The same pairs with these parameters for a reference, by batches.

        Args:
            params: The reference's.
            index: Pairs that will be read; others get NaN. None is all.
            batch: Pairs at a time.

        >>> from jaxpref.models import tabular
        >>> policy, params = tabular.softmax(jnp.log(jnp.array([[0.2, 0.8]])))
        >>> pair = TokenPair((np.array([0, 1]), np.array([0, 0])), (1, 1), (False, False))
        >>> PairSet.of(policy, [pair] * 2).referring_to(params, [1]).known.round(2).tolist()
        [[nan, nan], [-0.22, -1.61]]
        """
        rows = np.arange(len(self)) if index is None else np.asarray(index)
        found = self.logps(params, rows, batch=batch)
        reference = np.full((len(self), 2), np.nan, found.dtype)
        reference[rows] = found
        return self.with_reference(reference)


def joined(parts: Sequence[Batch]) -> Batch:
    """What losses read of a batch in parts, ``reference``, and ``index``; no tokens."""
    read = jax.tree.map(lambda *x: jnp.concatenate(x), *(part[3:] for part in parts))
    return Batch(NOTHING, NOTHING, NOTHING, *read)


# One for all sets: with references, or of other pairs in the same sizes, nothing compiles again.
_scores = jax.jit(
    logprobs.shared_prompt_scores,
    static_argnums=0,
    static_argnames=("packed_time", "max_response"),
)


def _eights(length: int) -> int:
    return -(-length // 8) * 8


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Along the first axis, others filled up with zeros to the longest."""
    longest = np.max([x.shape for x in parts], axis=0)[1:]
    room = [[(0, 0), *zip([0] * len(longest), longest - x.shape[1:], strict=True)] for x in parts]
    return np.concatenate([np.pad(x, each) for x, each in zip(parts, room, strict=True)])
