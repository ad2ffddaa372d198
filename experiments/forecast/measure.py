"""The signals of every pair, and what training then did to it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments import common
from experiments.forecast import protocol
from experiments.forecast.protocol import SIGNALS, Config, load
from jaxpref import diagnostics, embeddings, gradients, losses
from jaxpref.data import batches
from jaxpref.training.linearised import linearised


class Programs(NamedTuple):
    """The compiled functions of a run."""

    pull: Any  # (logp, reference) -> [pairs 2]
    slope: Any  # (params, batch) -> gradient of the mean loss
    change: Any  # (params, arrays, tangent) -> (logp, change)
    grams: Any  # (params, arrays, metric) -> [pairs 2 2]
    hidden: Any  # (params, batch) -> Responses
    logp: Any  # (params, batch) -> [pairs 2]


def programs(config: Config, problem: common.Problem) -> Programs:
    """Compiled once a run."""

    def loss(logp, reference):
        return losses.dpo(logp, reference, beta=config.beta)

    def mean_loss(params, batch):
        return loss(problem.score(params, batch).logp, batch.reference).mean()

    def grams(params, arrays, metric):
        found = gradients.pair_grams(
            problem.logp, params, arrays, metric=metric, responses="together"
        )
        return found.gram

    return Programs(
        jax.jit(jax.grad(lambda logp, reference: loss(logp, reference).sum())),
        jax.jit(jax.grad(mean_loss)),
        jax.jit(functools.partial(common.logp_and_change, problem.logp)),
        jax.jit(grams),
        jax.jit(problem.hidden),
        jax.jit(lambda params, batch: problem.score(params, batch).logp),
    )


@functools.partial(jax.jit, static_argnames="name")
def _first_update(name: str, params, gradient):
    optimizer = common.unit_optimizer(name)
    state = optimizer.init(params)
    metric = linearised(optimizer, state, gradient, params, decay=common.DECAY[name]).metric
    return optimizer.update(gradient, state, params)[0], metric


def text_signals(targets: np.ndarray, is_target: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """What the token ids alone say, and chance."""
    words = [
        [x[at] for x, at in zip(*pair, strict=True)]
        for pair in zip(targets, is_target, strict=True)
    ]
    return {
        "edit similarity": np.array([embeddings.edit_similarity(*pair) for pair in words]),
        "length difference": np.asarray(embeddings.length_difference(is_target.sum(axis=2))),
        "chance": np.random.default_rng(seed).random(len(targets)),
    }


@jax.jit
def _of_pairs(gram, own, pull, found, unembedding) -> dict[str, jax.Array]:
    """What the Grams, plain and in the optimizer's metric, and the hidden states say."""
    head = embeddings.unembedding_gram(found.hidden, found.targets, found.is_target, unembedding)
    states = found.hidden, found.is_target
    return {
        "Gram, first-order change": -diagnostics.first_order_change(gram, pull)[:, 0],
        "Gram in the optimizer's metric": -diagnostics.first_order_change(own, pull)[:, 0],
        "Gram, band margin": -diagnostics.band_margin(gram, pull),
        "Gram, cosine": diagnostics.cosine(gram),
        "unembedding Gram (alpha-weighted)": embeddings.alpha_weighted_ches(head),
        "CHES": embeddings.ches(*states),
        "CHES, length-normalised": embeddings.ches_length_normalised(*states),
        "last hidden inner product": embeddings.last_hidden_similarity(*states),
    }


def signals(config: Config, seed: int, problem, params, policy, run: Programs) -> dict[str, Any]:
    """``signals [signals pairs]`` in the order of `SIGNALS`; and ``gram``, ``logp`` beside them."""
    rows = protocol.rows(config, problem, seed)
    batch, name = problem.rows(rows), config.optimizer
    logp = run.logp(params, batch)
    pull = run.pull(logp, batch.reference)
    update, metric = _first_update(name, params, run.slope(params, batch))
    together = run.change(params, batch[:3], update)[1]
    gram = run.grams(params, batch[:3], jax.tree.map(jnp.ones_like, metric))
    own = run.grams(params, batch[:3], metric)
    alone = []
    for i in tqdm(rows, "first updates", leave=False):
        one = problem.rows([i])
        update, _ = _first_update(name, params, run.slope(params, one))
        alone.append(run.change(params, one[:3], update)[1][0, 0])
    found = run.hidden(params, batch)
    values = {
        "first update, pair alone": -np.array(alone),
        "first update, all pairs": -together[:, 0],
        **_of_pairs(gram, own, pull, found, policy.unembedding(params)),
        **text_signals(np.asarray(found.targets), np.asarray(found.is_target), seed),
    }
    # Gradients at an obtuse angle have no edge to be near to: the farthest from a fall.
    stacked = np.stack([np.nan_to_num(np.asarray(values[n]), neginf=-1e30) for n in SIGNALS])
    return {"signals": stacked, "gram": gram, "logp": logp}


def train(config: Config, rows: np.ndarray, seed: int, problem, params, run: Programs,
          horizons: Sequence[int], batch: int) -> np.ndarray:  # fmt: skip
    """Changes of log-probabilities ``[horizons rows 2]``, in nats since the start."""
    start = run.logp(params, problem.rows(rows))
    moving = jax.tree.map(jnp.copy, params)
    state, found = common.unit_optimizer(config.optimizer).init(moving), []
    for number in tqdm(range(max(horizons)), "training", unit="update", leave=False):
        index = rows[batches.order(len(rows), batch, seed, number)]
        gradient = run.slope(moving, problem.rows(index))
        moving, state = common.apply_update(config.optimizer, moving, state, gradient, config.rate)
        if number + 1 in horizons:
            found.append(np.asarray(run.logp(moving, problem.rows(rows)) - start))
    return np.stack(found)


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """``signals [seeds signals pairs]``; ``alone``, ``together [seeds horizons pairs 2]``, nats."""
    subject, problem = load(config)

    def begin():
        params = common.supervise(
            problem, subject.params, optax.adam(config.supervised_rate),
            steps=config.supervised, batch=config.batch, seed=0,
        )  # fmt: skip
        ready = problem.with_reference(params)
        return ready, params, programs(config, ready)

    begun = functools.cache(begin)

    def kept(name: str, make: Callable[..., Mapping[str, Any]]) -> dict[str, np.ndarray]:
        return common.kept(folder, name, lambda: make(*begun()))

    seeds = []
    for seed in range(config.seeds):
        rows = protocol.rows(config, problem, seed)

        def first(ready, params, compiled, seed=seed):
            return signals(config, seed, ready, params, subject.policy, compiled)

        def pair(i, ready, params, compiled):
            one = np.array([i])
            horizons = sorted(config.alone)
            return {"x": train(config, one, 0, ready, params, compiled, horizons, 1)}

        def every(ready, params, compiled, seed=seed, rows=rows):
            horizons = sorted(config.together)
            return {"x": train(config, rows, seed, ready, params, compiled, horizons, config.batch)}

        record = kept(f"{seed}_signals", first)
        alone = [
            kept(f"{seed}_alone_{i}", functools.partial(pair, i))["x"]
            for i in tqdm(rows, f"pairs alone, seed {seed}", unit="pair")
        ]
        record["alone"] = np.concatenate(alone, axis=1)
        record["together"] = kept(f"{seed}_together", every)["x"]
        seeds.append(record)
    return {name: np.stack([record[name] for record in seeds]) for name in seeds[0]}
