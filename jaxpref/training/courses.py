"""Trainings from one start on a data set of pairs, by any loss, with one program for all of them.

Each says what it saw of every batch *before* its update, and is looked at where one asks::

    run = programs(pairs, {"dpo": objective("dpo"), "sft": objective("sft")})
    pairs = pairs.referring_to(params)
    course, adam = Course(rows, batch=8, seed=0), unit_optimizer("adam")
    rates = [5e-6] * course.epoch
    found = train(run, pairs, params, course, "dpo", rates, optimizer=adam)

In the first epoch ``found.seen`` is of pairs that were not trained on yet. A control is one line
more: ``course._replace(swapped=coin(len(pairs), seed=0))``, or ``"sft"`` for ``"dpo"``.
"""

import functools
from collections.abc import Callable, Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxpref import gradients
from jaxpref.data import batches
from jaxpref.data.batches import Batch
from jaxpref.logprobs import Scores
from jaxpref.training import parallel
from jaxpref.training.objectives import Objective, pull
from jaxpref.training.pairset import PairSet, joined

Change = Callable[[Array, Array], Array]
"""``(gram [pairs 2 2], pull [pairs 2]) -> pull``, as of `jaxpref.training.mitigations`."""


class Programs(NamedTuple):
    """What trainings on a set of pairs share; made by `programs`.

    Attributes:
        losses: Their names; a loss is its number in this order.
        step: ``(optimizer, params, state, parts, loss, rate, scale, swap, gram) -> params, state,
            logp, pull``, an update that divides pulls by a scale. The loss sees the pairs of `swap`
            the wrong way round; what is told is chosen first. It uses up parameters and state.
        slope: ``(params, parts, loss, swap, gram) -> logp, pull, gradient of the mean loss``.
        changed: Losses whose pulls are changed by the Gram of each pair.
        grams: ``(params, part) -> [pairs 2 2]``.
    """

    losses: tuple[str, ...]
    step: Any
    slope: Any
    changed: frozenset[str]
    grams: Any

    def number(self, loss: str) -> Int[Array, ""]:
        """Of a loss, as `step` and `slope` take it."""
        return jnp.int32(self.losses.index(loss))

    def gram(self, params: PyTree, parts: Sequence[Batch], loss: str) -> Any:
        """``[pairs 2 2]`` of a batch, as they want it: zeros for a loss that reads none."""
        if loss in self.changed:
            return jnp.concatenate([self.grams(params, part) for part in parts])
        return np.zeros((sum(len(part.tokens) for part in parts), 2, 2), np.float32)


def programs(
    pairs: PairSet,
    losses: Mapping[str, Objective],
    changes: Mapping[str, Change] = MappingProxyType({}),
) -> Programs:
    """Compiled once for each sizes of a batch, whatever the loss, the rate and the seed.

    The loss is a number: its pull is tiny, and one backward pass carries it to the parameters.

    Args:
        pairs: The set, or one with the same pairs.
        losses: By name, of `jaxpref.training.objectives.objective` or like them.
        changes: Of some of the losses, by name: what becomes of their pulls before that pass. The
            Grams are of the parameters before the update, in a program of their own.

    Returns:
        The programs, for `train`.
    """

    def pull_of(name, scores, batch, gram):
        found = pull(losses[name], scores, batch)
        return changes[name](gram, found).astype(found.dtype) if name in changes else found

    def gradient(params, parts, index, scale, swap, gram):
        def shown(x: Any) -> Array:  # there and back
            return jnp.where(swap[:, None], x[:, ::-1], x)

        batch = joined(parts)
        scores, back = jax.vjp(lambda p: pairs.score_parts(p, parts), params)
        seen = Scores(shown(scores.logp), shown(scores.lengths))
        batch = batch._replace(reference=shown(batch.reference))
        gram = jnp.where(swap[:, None, None], gram[:, ::-1, ::-1], gram)
        slopes = [functools.partial(pull_of, name) for name in losses]
        pulls: Array = shown(jax.lax.switch(index, slopes, seen, batch, gram))
        mean = (pulls / jnp.asarray(scale, pulls.dtype) / len(pulls)).astype(scores.logp.dtype)
        (found,) = back(Scores(mean, jnp.zeros_like(scores.lengths)))
        return scores.logp, pulls, found

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def step(optimizer, params, state, parts, index, rate, scale, swap, gram):
        *seen, found = gradient(params, parts, index, scale, swap, gram)
        return *_updated(optimizer, params, state, found, rate), *seen

    @jax.jit
    def slope(params, parts, index, swap, gram):
        return gradient(params, parts, index, 1.0, swap, gram)

    own = functools.partial(grams, pairs)
    return Programs(tuple(losses), step, slope, frozenset(changes), own)


def _updated(optimizer, params: PyTree, state: PyTree, gradient: PyTree, rate: Array) -> Any:
    update, state = optimizer.update(gradient, state, params)
    return jax.tree.map(lambda p, u: p + rate.astype(u.dtype) * u, params, update), state


updated = jax.jit(_updated, static_argnums=0, donate_argnums=(1, 2))
"""``(optimizer, params, state, gradient, rate) -> params, state`` after an update by this gradient.

The optimizer has the learning rate 1. Parameters and state are used up.
"""


@functools.partial(jax.jit, static_argnums=0)
def grams(
    pairs: PairSet, params: PyTree, batch: Batch, metric: PyTree = None
) -> Float[Array, "pairs 2 2"]:
    """Inner products of each pair's two gradients, plain or in a metric, of a batch of `pairs`."""
    found = gradients.pair_grams(pairs.logp, params, batch[:3], metric=metric, responses="together")
    return found.gram


class Course(NamedTuple):
    """Which pairs are shown when, and which way round.

    Attributes:
        rows: Pairs that are trained on, as numbers in the set. Each epoch is a new order of them;
            what is left after its last whole batch is left out.
        batch: Pairs of an update.
        seed: Of the order.
        swapped: Pairs that are shown the wrong way round, the same ones every time.

    >>> course = Course(np.array([4, 5, 6]), batch=1, seed=0)
    >>> sorted(int(row) for n in range(course.epoch) for row in course.index(n))
    [4, 5, 6]
    """

    rows: Int[np.ndarray, " rows"]
    batch: int
    seed: int
    swapped: Int[np.ndarray, " swapped"] = np.zeros(0, np.int64)

    @property
    def epoch(self) -> int:
        """Updates of an epoch."""
        return batches.steps_per_epoch(len(self.rows), self.batch)

    def index(self, number: int) -> Int[np.ndarray, " batch"]:
        """Pairs of an update, from 0 on."""
        return self.rows[batches.order(len(self.rows), self.batch, self.seed, number)]

    def parts(self, pairs: PairSet, number: int) -> tuple[Batch, ...]:
        """Its batch, by length."""
        return pairs.parts(self.index(number))

    def swap(self, parts: Sequence[Batch]) -> Bool[np.ndarray, " batch"]:
        """Which pairs of a batch are shown the wrong way round."""
        return np.isin(rows_of(parts), self.swapped)


def rows_of(parts: Sequence[Batch]) -> Int[np.ndarray, " batch"]:
    """The pairs of a batch in parts, as numbers in the set."""
    return np.concatenate([part.index for part in parts])


def coin(pairs: int, seed: int) -> Int[np.ndarray, " swapped"]:
    """About half of so many pairs, each by a coin: the control that takes the preference away.

    Args:
        pairs: Their number.
        seed: Of the coins.

    Returns:
        Pairs to be shown the wrong way round, for `Course.swapped`.
    """
    return np.flatnonzero(np.random.default_rng([seed, 16]).random(pairs) < 0.5)


class Trained(NamedTuple):
    """What a training did.

    Attributes:
        params: After its last update.
        index: Pairs of each update.
        seen: Their log-probabilities *before* it, nats, chosen first whatever was shown.
        pull: What the loss did to each of them then, chosen first.
        diverged: The update that met log-probabilities that are not finite, or -1. From there on
            nothing is trained, nor looked at, and numbers are NaN.
    """

    params: PyTree
    index: Int[np.ndarray, "updates batch"]
    seen: Float[np.ndarray, "updates batch 2"]
    pull: Float[np.ndarray, "updates batch 2"]
    diverged: Int[np.ndarray, ""] | int


def train(
    run: Programs,
    pairs: PairSet,
    params: PyTree,
    course: Course,
    loss: str,
    rates: Sequence[float],
    *,
    optimizer: optax.GradientTransformation,
    scale: float | int = 1.0,
    looks: Container[int] = (),
    look: Callable[[int, PyTree, PyTree], Any] = lambda updates, params, state: None,
    title: str | None = None,
) -> Trained:
    """Trains on pairs by one of the losses.

    Args:
        run: The programs, of these pairs or of others in the same sizes.
        pairs: With the log-probabilities of the start for a reference, of `course.rows` at least
            (`PairSet.referring_to`). Those of the first batch are taken anew, by an update of rate
            0: policy and reference are one program on the same arrays.
        params: The start; it is copied.
        course: Which pairs are shown when.
        loss: Its name in `run`.
        rates: Learning rate of each update; there are as many updates.
        optimizer: Of learning rate 1, such as `jaxpref.training.optimizers.unit_optimizer`.
        scale: Pulls are divided by it; those that are told are not.
        looks: Numbers of updates after which `look` is called.
        look: ``(updates done, parameters, optimizer's state)``. These are used up by the next
            update: copy what is to be kept.
        title: Shows a bar with this title (needs tqdm).

    Returns:
        The parameters, and what was seen before each update.

    Raises:
        ValueError: No update.
        ArithmeticError: The log-ratios of the first update are not zero, by more than 1e-5 nats a
            token: the device computes one program in two ways.
    """
    if not len(rates):
        raise ValueError("rates: got none, expected one for each update")
    index = np.array([course.index(n) for n in range(len(rates))])
    seen, pulls = np.full((2, *index.shape, 2), np.nan, np.float32)

    def step(params, state, n, rate):
        parts = course.parts(pairs, n)
        gram = run.gram(params, parts, loss)
        told = run.number(loss), jnp.float32(rate), jnp.float32(scale), course.swap(parts), gram
        params, state, *found = run.step(optimizer, params, state, parts, *told)
        back = np.argsort(rows_of(parts))[np.argsort(np.argsort(index[n]))]
        return params, state, *(x[back] for x in parallel.to_host(found))

    reference, start = pairs.known.copy(), functools.partial(jax.tree.map, jnp.copy, params)
    reference[index[0]] = step(start(), optimizer.init(params), 0, 0.0)[2]
    pairs = pairs.with_reference(reference)
    moving, state = start(), optimizer.init(params)
    for n in _bar(len(rates), title):
        moving, state, seen[n], pulls[n] = step(moving, state, n, rates[n])
        if not np.isfinite(seen[n]).all():
            return Trained(moving, index, seen, pulls, np.array(n))
        if n == 0:
            _check_first(np.abs(seen[0] - pairs.known[index[0]]) / pairs.lengths[index[0]])
        if n + 1 in looks:
            look(n + 1, moving, state)
    return Trained(moving, index, seen, pulls, np.array(-1))


def _check_first(off: np.ndarray) -> None:
    if off.max() > 1e-5:
        raise ArithmeticError(
            f"the first update's log-ratios are up to {off.max():.2g} nats a token, expected 0"
        )


def _bar(updates: int, title: str | None):
    if title is None:
        return range(updates)
    from tqdm import tqdm

    return tqdm(range(updates), title, unit="update", leave=False)
