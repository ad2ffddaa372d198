"""Scores of every pool, and a training on every subset."""

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import common
from experiments.ches_percentiles.protocol import LOSSES, Config, Loaded, load, quantile_slice
from jaxpref import losses
from jaxpref.data import batches
from jaxpref.score import score_pairs
from jaxpref.training.optimizers import torch_rmsprop
from jaxpref.training.step import init_state, make_step


class Programs(NamedTuple):
    """The compiled functions of a run, of batches of one shape."""

    step: Any  # (state, (batch, number of the loss)) -> (state, metrics, scores)
    logp: Any  # (params, batch) -> [pairs 2]


def programs(config: Config, problem: common.Problem) -> Programs:
    """Compiled once a run, whatever the number of trainings."""
    by_name = {
        "dpo": functools.partial(losses.dpo, beta=config.beta),
        "ipo": functools.partial(losses.ipo, tau=config.tau),
    }

    def loss(scores, numbered):
        batch, number = numbered
        branches = [lambda logp, f=f: f(logp, batch.reference) for f in by_name.values()]
        return jax.lax.switch(number, branches, scores.logp)

    def score(params, numbered):
        return problem.score(params, numbered[0])

    return Programs(
        make_step(score, loss, torch_rmsprop(config.rate)),
        jax.jit(lambda params, batch: problem.score(params, batch).logp),
    )


def look(config: Config, run: Programs, problem: common.Problem, params: Any, rows: np.ndarray
         ) -> np.ndarray:  # fmt: skip
    """Log-probabilities ``[rows 2]``, nats; the last batch repeats rows to be whole."""
    whole = np.resize(rows, -(-len(rows) // config.batch) * config.batch)
    parts = whole.reshape(-1, config.batch)
    found = [np.asarray(run.logp(params, problem.rows(part))) for part in parts]
    return np.concatenate(found)[: len(rows)]


def pool(config: Config, seed: int, loaded: Loaded, run: Programs) -> dict[str, np.ndarray]:
    """The pairs of a seed: ``pool [pairs]`` rows of the data, and what is known before training.

    ``scores [scores pairs]``, ``lengths`` and ``start [pairs 2]``, tokens and nats.
    """
    rows = batches.order(len(loaded.encoded), config.pairs, seed, 0)
    columns = [name for name in config.scores if name != "random"]
    pairs = [loaded.encoded[row] for row in rows]
    found: dict[str, Any] = {"random": np.random.default_rng([seed, 1]).random(len(rows))}
    if columns:
        found |= score_pairs(loaded.subject.policy, loaded.subject.params, pairs, columns=columns)
    return {
        "pool": rows,
        "lengths": np.asarray(loaded.problem.batch.is_response)[rows].sum(axis=2),
        "scores": np.stack([found[name] for name in config.scores]),
        "start": look(config, run, loaded.problem, loaded.subject.params, rows),
    }


def train(config: Config, seed: int, loss: str, rows: np.ndarray, start: np.ndarray, params: Any,
          problem: common.Problem, run: Programs) -> np.ndarray:  # fmt: skip
    """Changes of log-probabilities ``[rows 2]`` by one epoch on these rows, nats."""
    batch = problem.rows(rows)._replace(reference=start)
    state = init_state(
        jax.tree.map(jnp.copy, params), torch_rmsprop(config.rate), key=jax.random.key(seed)
    )
    for number in range(len(rows) // config.batch):
        index = batches.order(len(rows), config.batch, seed, number)
        part = jax.tree.map(lambda x, index=index: x[index], batch)
        state, metrics, _ = run.step(state, (part, jnp.int32(LOSSES.index(loss))))
        if not np.isfinite(metrics["loss"]):
            raise ValueError(f"rate: got {config.rate}, and the loss is not finite, expected less")
    return look(config, run, problem, state.params, rows) - start


def trainings(config: Config, seed: int, drawn: Mapping[str, np.ndarray], loaded: Loaded,
              compiled: Programs, folder: Path | None) -> dict[str, np.ndarray]:  # fmt: skip
    """``rows [scores percentiles subset]``, places in the pool, and what came of them.

    ``change [losses scores percentiles subset 2]``. A subset that several scores chose is trained
    once.
    """
    rows = np.array(
        [
            [quantile_slice(scores, at, config.subset) for at in config.percentiles]
            for scores in drawn["scores"]
        ]
    )
    change = np.empty((len(config.losses), *rows.shape, 2))
    known: dict[Any, np.ndarray] = {}
    grid = list(np.ndindex(change.shape[:3]))
    for i, j, k in tqdm(grid, f"trainings, seed {seed}", unit="training"):
        loss, places = config.losses[i], rows[j, k]
        if (key := (loss, places.tobytes())) not in known:
            make = functools.partial(
                train, config, seed, loss, drawn["pool"][places], drawn["start"][places],
                loaded.subject.params, loaded.problem, compiled,
            )  # fmt: skip
            name = f"{seed}_{loss}_{config.scores[j]}_{config.percentiles[k]}"
            known[key] = common.kept(folder, name, lambda make=make: {"x": make()})["x"]
        change[i, j, k] = known[key]
    return {"rows": rows, "change": change}


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """What `pool` and `trainings` return, with a leading axis ``seeds``; ``left_out [2]``."""
    loaded = load(config)
    _tell(loaded)
    compiled, records = programs(config, loaded.problem), []
    for seed in range(config.seeds):
        make = functools.partial(pool, config, seed, loaded, compiled)
        drawn = common.kept(folder, f"{seed}_pool", make)
        records.append(drawn | trainings(config, seed, drawn, loaded, compiled, folder))
    found = {name: np.stack([record[name] for record in records]) for name in records[0]}
    return found | {"left_out": np.array(list(loaded.left_out.values()))}


def _tell(loaded: Loaded) -> None:
    out = loaded.left_out
    print(
        f"{len(loaded.encoded)} pairs; left out: {out['unusable']} that cannot be used,"
        f" {out['too_long']} too long",
        file=sys.stderr,
    )
