"""Training under every loss at every rate, and what is measured on the way."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.loss_comparison.protocol import (
    Config,
    drawn,
    load,
    look_steps,
    names,
    rows_of,
)
from experiments.protocol import arms, inputs, running
from jaxpref import gradients, logprobs
from jaxpref.data import batches
from jaxpref.data.batches import Batch
from jaxpref.logprobs import Scores
from jaxpref.training import courses
from jaxpref.training.objectives import batch_of, objective, pull
from jaxpref.training.optimizers import unit_optimizer
from jaxpref.training.pairset import PairSet


class Look(NamedTuple):
    """Numbers of some parameters, of all pairs of a seed."""

    logp: Any  # [pairs 2], nats
    entropy: Any  # [pairs 2], mean over the response's positions, nats
    kl: Any  # [test 2], from the reference, mean over the response's positions, nats
    hidden: Any  # [test 2 response width]


class Programs(NamedTuple):
    """What a run compiles: each program once, for all losses, rates and seeds."""

    train: courses.Programs
    look: Any  # (params, batch, the reference's hidden states and unembedding) -> Look
    gram: Any  # (params, arrays) -> [pairs 2 pairs 2]


def programs(config: Config, subject: inputs.Subject, pairs: PairSet) -> Programs:
    """The losses of the run are branches of one step, supervision's among them."""
    some = {name: objective(name) for name in dict.fromkeys((*names(config), "sft"))}
    unembedding = subject.policy.unembedding

    def look(params, batch, first_hidden, first_unembedding):
        found, table = pairs.hidden(params, batch), unembedding(params)

        def mean(values: jax.Array, scored: jax.Array):
            count = jnp.sum(scored, axis=-1, dtype=values.dtype)
            return jnp.where(scored, values, 0).sum(axis=-1) / count

        def one(pair):
            hidden, targets, scored = pair
            numbers = logprobs.token_statistics(hidden, table, targets, time_chunk=None)
            return jnp.where(scored, numbers.logp, 0).sum(axis=-1), mean(numbers.entropy, scored)

        def divergence(pair):
            hidden, first, scored = pair
            arrays = hidden, table, first, first_unembedding
            return mean(logprobs.token_kl(*arrays, time_chunk=None), scored)

        logp, entropy = jax.lax.map(one, (found.hidden, found.targets, found.is_target))
        held = rows_of(config, "test")
        hidden, scored = found.hidden[held], found.is_target[held]
        return Look(logp, entropy, jax.lax.map(divergence, (hidden, first_hidden, scored)), hidden)

    def gram(params, arrays):
        return gradients.gram(pairs.logp, params, arrays).gram

    return Programs(courses.programs(pairs, some), jax.jit(look), jax.jit(gram))


class Start(NamedTuple):
    """What all losses of a seed begin from."""

    params: Any
    pairs: PairSet  # with the start for a reference
    batch: Any  # training pairs, validation pairs, test pairs
    hidden: Any  # of the reference on the test pairs
    unembedding: Any


def begin(
    config: Config, run: Programs, subject: inputs.Subject, pairs: PairSet, seed: int
) -> tuple[Start, dict[str, Any]]:
    """The start of a seed, and its arrays; the Gram matrix is of training and test pairs."""
    batch = pairs.rows(batches.order(len(pairs), drawn(config), seed, 0))
    course, rates = course_of(config, batch, seed), (config.supervised_rate,) * config.supervised
    params = arms.supervised(run.train, pairs, subject.params, course, rates)
    unembedding = subject.policy.unembedding(params)
    like = jax.eval_shape(pairs.hidden, params, batch).hidden
    nothing = jnp.zeros((config.test, *like.shape[1:]), like.dtype)
    batch = batch._replace(reference=np.zeros((drawn(config), 2), np.float32))
    found = run.look(params, batch, nothing, unembedding)
    arrays = {
        "logp": np.asarray(found.logp),
        "entropy": np.asarray(found.entropy),
        "lengths": batch.is_response.sum(axis=-1).astype(np.float32),
    }
    reference = np.full((len(pairs), 2), np.nan, np.float32)
    reference[batch.index] = arrays["logp"]
    ready = pairs.with_reference(reference)
    return Start(params, ready, batch, found.hidden, unembedding), arrays


def course_of(config: Config, batch: Batch, seed: int) -> courses.Course:
    """The training pairs of a seed."""
    return courses.Course(np.asarray(batch.index)[rows_of(config, "train")], config.batch, seed)


def measure(
    config: Config, run: Programs, start: Start, before: running.Arrays, seed: int, name: str
) -> dict[str, Any]:
    """Of a loss ``[rates looks ...]``, without the start, and its first pulls ``[train 2]``."""
    rows, wanted = rows_of(config, "train"), look_steps(config)[1:]
    logp, lengths = (jnp.asarray(before[key][rows]) for key in ("logp", "lengths"))
    pulls = np.asarray(_pull_at(name, logp, lengths))
    # One that pulls on no pair, such as a hinge already met, moves nothing at any scale.
    scale = float(np.sqrt((pulls**2).mean())) or 1.0
    shapes = {key: before[key].shape for key in ("logp", "entropy")} | {"kl": (config.test, 2)}
    room = len(config.rates), len(wanted)
    found = {key: np.full((*room, *x), np.nan, np.float32) for key, x in shapes.items()}
    for i, rate in enumerate(config.rates):

        def look(number, params, state, i=i):
            seen = run.look(params, start.batch, start.hidden, start.unembedding)
            for key, values in found.items():
                values[i, wanted.index(number)] = getattr(seen, key)

        courses.train(
            run.train, start.pairs, start.params, course_of(config, start.batch, seed), name,
            (rate,) * config.updates, optimizer=unit_optimizer(config.optimizer), scale=scale,
            looks=wanted, look=look, title=f"{name}, {rate:g}",
        )  # fmt: skip
    return {**found, "pull": pulls}


@functools.partial(jax.jit, static_argnums=0)
def _pull_at(name: str, logp: jax.Array, lengths: jax.Array) -> jax.Array:
    """Pulls ``[pairs 2]`` of one loss at the start, of one batch."""
    return pull(objective(name), Scores(logp, lengths), batch_of(logp))


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """The arrays of a run.

    ``logp``, ``entropy [losses seeds rates looks pairs 2]`` and ``kl [losses seeds rates looks
    test 2]``, the start being the first look; ``pull [losses seeds train 2]`` and
    ``gram [seeds train+test 2 train+test 2]``, at the start; ``lengths [seeds pairs 2]``;
    ``step [looks]``, the updates done.
    """
    subject, pairs = load(config)
    compiled = functools.cache(lambda: programs(config, subject, pairs))

    @functools.lru_cache(maxsize=1)  # one seed's parameters at a time
    def begun(seed: int) -> tuple[Start, dict[str, Any]]:
        return begin(config, compiled(), subject, pairs, seed)

    def gram(seed: int) -> dict[str, Any]:
        rows = np.r_[rows_of(config, "train"), rows_of(config, "test")]
        start = begun(seed)[0]
        return {"gram": compiled().gram(start.params, tuple(x[rows] for x in start.batch[:3]))}

    def make(seed: int, name: str, before: running.Arrays) -> dict[str, Any]:
        return measure(config, compiled(), begun(seed)[0], before, seed, name)

    starts, parts = [], {}
    bar = tqdm(total=config.seeds * len(names(config)), desc="losses", unit="loss")
    for seed in range(config.seeds):
        before = running.kept(folder, f"start_{seed}", lambda seed=seed: begun(seed)[1])
        grams = running.kept(folder, f"gram_{seed}", functools.partial(gram, seed))
        starts.append({**before, **grams})
        for name in names(config):
            job = functools.partial(make, seed, name, before)
            parts[name, seed] = running.kept(folder, f"{name}_{seed}", job)
            bar.update()
    bar.close()
    return _stacked(config, starts, parts)


def _stacked(config: Config, starts, parts) -> dict[str, np.ndarray]:
    def every(key: str) -> np.ndarray:
        seeds = range(config.seeds)
        return np.stack([[parts[name, s][key] for s in seeds] for name in names(config)])

    def with_start(key: str) -> np.ndarray:
        later = every(key)
        first = np.stack([start[key] for start in starts])[None, :, None, None]
        return np.concatenate([np.broadcast_to(first, later[:, :, :, :1].shape), later], axis=3)

    kl = every("kl")
    return {
        **{key: with_start(key) for key in ("logp", "entropy")},
        "kl": np.concatenate([np.zeros_like(kl[:, :, :, :1]), kl], axis=3),
        "pull": every("pull"),
        **{key: np.stack([start[key] for start in starts]) for key in ("gram", "lengths")},
        "step": np.array(look_steps(config)),
    }
