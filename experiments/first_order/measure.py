"""Predictions of an optimizer's steps, and what the steps did."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from tqdm import tqdm

from experiments.first_order.protocol import Config, Part, load, parts, rates_of
from experiments.protocol import arms, running
from jaxpref import diagnostics, gradients
from jaxpref.data import batches
from jaxpref.data.batches import Batch
from jaxpref.training import courses
from jaxpref.training.linearised import linearised
from jaxpref.training.objectives import objective
from jaxpref.training.optimizers import DECAY, unit_optimizer
from jaxpref.training.pairset import PairSet
from jaxpref.training.step import tree_norm


@functools.partial(jax.jit, static_argnums=0)
def change(pairs: PairSet, params: PyTree, batch: Batch, tangent: PyTree) -> Array:
    """Exact first-order change ``[pairs 2]`` of log-probabilities along a direction."""

    def one(pair):
        return gradients.directional(lambda p: pairs.logp(p, pair), params, tangent)[1]

    return jax.lax.map(one, batch[:3])


Slope = Callable[[PyTree, Batch, float | Array], tuple[Array, PyTree, Array]]


def slope_of(config: Config, pairs: PairSet) -> Slope:
    """``(params, batch, clip) -> pull, gradient of the mean loss, clipped, and by which factor``.

    Compiled once a run: the optimizer is applied outside of it.
    """
    dpo = courses.programs(pairs, {"dpo": objective("dpo", beta=config.beta)})
    number = dpo.number("dpo")

    def slope(params, batch, clip):
        gram, given = dpo.gram(params, (batch,), "dpo"), np.zeros(len(batch.tokens), bool)
        _, pull, gradient = dpo.slope(params, (batch,), number, given, gram)
        return pull, *_clipped(gradient, clip)

    return slope


@functools.partial(jax.jit, donate_argnums=0)
def _clipped(gradient: PyTree, clip: Array) -> tuple[PyTree, Array]:
    factor = jnp.minimum(1.0, clip / tree_norm(gradient))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradient), factor


@functools.partial(jax.jit, static_argnames=("name", "steps"))
def _frozen(name: str, steps: int, params, state, gradient):
    """Sum of so many updates, all of the same gradient, at learning rate 1."""

    def one(_, carry):
        total, state = carry
        update, state = unit_optimizer(name).update(gradient, state, params)
        return jax.tree.map(jnp.add, total, update), state

    zero = jax.tree.map(jnp.zeros_like, params)
    return jax.lax.fori_loop(0, steps, one, (zero, state))[0]


@functools.partial(jax.jit, static_argnames="name")
def own_metric(name: str, params, state, gradient):
    """The update as a metric of the gradient, and what the state carries on."""
    return linearised(unit_optimizer(name), state, gradient, params, decay=DECAY[name])


@jax.jit
def _moved(params, rate, direction):
    return jax.tree.map(lambda p, u: p + jnp.asarray(rate, u.dtype) * u, params, direction)


def measure(config: Config, part: Part, pairs: PairSet, params, slope: Slope) -> dict[str, Any]:
    """Predictions and measurements of one part.

    Returns:
        ``total``, ``own``, ``frozen``: predicted changes per unit of learning rate by one step, by
        one step of the pair alone, and by all steps, ``[probes 2]`` (``own``: ``[pairs 2]``).
        ``measured``: nats, ``[one or all steps, rates, probes, 2]``.
    """
    n, rates = config.pairs, rates_of(config, part.optimizer)
    optimizer = unit_optimizer(part.optimizer)
    drawn = batches.order(len(pairs), n * (1 + config.warm) + config.others, part.seed, 0)
    trained, probes = drawn[:n], drawn[: n + config.others]
    clip = jnp.float32(part.clip)
    params, state = jax.tree.map(jnp.copy, params), optimizer.init(params)
    for at in range(config.warm):
        begin = len(probes) + at * n
        _, gradient, _ = slope(params, pairs.rows(drawn[begin : begin + n]), clip)
        params, state = courses.updated(optimizer, params, state, gradient, jnp.float32(rates[0]))

    batch, seen = pairs.rows(trained), pairs.rows(probes)

    def logp(params):
        return pairs.logps(params, probes, batch=len(probes))

    pull, gradient, factor = slope(params, batch, clip)
    metric, carried = own_metric(part.optimizer, params, state, gradient)
    update = jax.tree.map(lambda c, d, g: c - d * g, carried, metric, gradient)
    total, momentum = change(pairs, params, seen, update), change(pairs, params, batch, carried)
    gram = courses.grams(pairs, params, batch, metric)
    own = momentum + diagnostics.first_order_change(gram, pull) * factor / n
    direction = _frozen(part.optimizer, config.steps, params, state, gradient)
    frozen = change(pairs, params, seen, direction)
    after = np.zeros((2, len(rates), *total.shape))
    for i, rate in enumerate(rates):
        size = jnp.float32(rate)
        after[0, i] = logp(_moved(params, size, update))
        moving, kept = (jax.tree.map(jnp.copy, x) for x in (params, state))
        for _ in range(config.steps):
            _, gradient, _ = slope(moving, batch, clip)
            moving, kept = courses.updated(optimizer, moving, kept, gradient, size)
        after[1, i] = logp(moving)
    return {
        "total": total, "own": own, "frozen": frozen, "gram": gram, "pull": pull,
        "factor": factor, "measured": after - logp(params),
    }  # fmt: skip


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Arrays of `measure` with a leading axis ``parts``, in the order of `parts`."""
    subject, pairs = load(config)
    todo = parts(config)

    def begin() -> tuple[PairSet, Any, Slope]:
        course = courses.Course(np.arange(len(pairs)), config.pairs, 0)
        rates = (config.supervised_rate,) * config.supervised
        only = courses.programs(pairs, {"sft": objective("sft")})
        params = arms.supervised(only, pairs, subject.params, course, rates)
        return pairs.referring_to(params), params, slope_of(config, pairs)

    begun = functools.cache(begin)  # not for a run that is only read back

    def make(part: Part) -> dict[str, Any]:
        return measure(config, part, *begun())

    bar, records = tqdm(todo, "parts", unit="part"), []
    for part in bar:
        bar.set_description(f"{part.optimizer}, clip {part.clip:g}, seed {part.seed}")
        name = f"{part.seed}_{part.optimizer}_{part.clip:g}"
        records.append(running.kept(folder, name, functools.partial(make, part)))
    return {name: np.stack([record[name] for record in records]) for name in records[0]}
