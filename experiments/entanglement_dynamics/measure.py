"""Training under every loss with one compiled program, and what is measured on the way."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import common, pulling
from experiments.entanglement_dynamics.protocol import LOSSES, OPTIMIZERS, Config, load, look_steps
from jaxpref import gradients
from jaxpref.data import batches
from jaxpref.logprobs import Scores


def pull_of(index, scores: Scores, batch) -> jax.Array:
    """``[-d_w, d_l]`` of every pair, ``[pairs 2]``, by the loss of this number in `LOSSES`."""
    return pulling.pull_of(LOSSES, index, scores, batch)


class Programs(NamedTuple):
    """What a run compiles: each program once, for all losses and seeds."""

    step: Any  # (params, state, batch, loss's branch, scale, rate, is the first) -> params, state
    scores: Any  # (params, batch) -> Scores
    grams: Any  # (params, arrays) -> [pairs 2 2]
    together: Any  # (params, arrays) -> [pairs 2 pairs 2]


def programs(config: Config, problem: common.Problem) -> Programs:
    """The loss is an argument: its pull is tiny, and one backward pass carries it to parameters."""
    some = {name: LOSSES[name] for name in branches(config)}
    step = pulling.make_step(problem.score, some, OPTIMIZERS[config.optimizer](1.0))

    def grams(params, arrays):
        return gradients.pair_grams(problem.logp, params, arrays, responses="together").gram

    def together(params, arrays):
        return gradients.gram(problem.logp, params, arrays).gram

    return Programs(step, jax.jit(problem.score), jax.jit(grams), jax.jit(together))


def branches(config: Config) -> list[str]:
    """The losses of a run by their number in its step; `sft` is that of the supervised phase."""
    return list(dict.fromkeys((*config.losses, "sft")))


class Start(NamedTuple):
    """What all losses of a seed begin from."""

    params: Any
    batch: Any  # training pairs first, then those held out


def train(
    config: Config,
    run: Programs,
    start: Start,
    seed: int,
    *,
    name: str,
    steps: int,
    rate: float,
    scale: float = 1.0,
    look: Callable[[int, Any], None] = lambda number, params: None,
) -> Any:
    """Parameters after so many updates; `look` sees those after each."""
    params = jax.tree.map(jnp.copy, start.params)
    state = OPTIMIZERS[config.optimizer](1.0).init(params)
    index = jnp.int32(branches(config).index(name))
    sizes = jnp.float32(scale), jnp.float32(rate)
    for number in tqdm(range(steps), f"{name}, seed {seed}", unit="update", leave=False):
        rows = batches.order(config.pairs, config.batch, seed, number)
        batch = jax.tree.map(lambda x, rows=rows: x[rows], start.batch)
        params, state = run.step(params, state, batch, index, *sizes, jnp.bool_(number == 0))
        look(number + 1, params)
    return params


def measure_start(config: Config, run: Programs, start: Start) -> dict[str, Any]:
    """Log-probabilities ``[rows 2]``, lengths, Grams of the probes alone and of all together."""
    scores, arrays = run.scores(start.params, start.batch), _probes(config, start)
    return {
        "logp": scores.logp,
        "lengths": scores.lengths,
        "gram": run.grams(start.params, arrays),
        "together": run.together(start.params, arrays),
    }


def measure(
    config: Config, run: Programs, start: Start, before: common.Arrays, seed: int, name: str
) -> dict[str, Any]:
    """Log-probabilities and pulls ``[looks rows 2]`` of a loss, Grams ``[looks probes 2 2]``."""
    first = np.asarray(pulls(name, before["logp"], before["logp"], before["lengths"]))
    scale = float(np.sqrt((first[: config.pairs] ** 2).mean()))
    if scale == 0:
        raise ValueError(f"losses: {name} pulls on no pair at the start, expected one that trains")
    logp, gram = [before["logp"]], [before["gram"]]

    def look(number, params):
        if number in look_steps(config):
            logp.append(np.asarray(run.scores(params, start.batch).logp))
            gram.append(np.asarray(run.grams(params, _probes(config, start))))

    train(
        config, run, start, seed, name=name, steps=config.steps, rate=config.rate, scale=scale,
        look=look,
    )  # fmt: skip
    each = [pulls(name, x, before["logp"], before["lengths"]) for x in logp]
    return {"logp": np.stack(logp), "gram": np.stack(gram), "pull": np.stack(each)}


def pulls(name: str, logp, reference, lengths) -> np.ndarray:
    """Pulls ``[pairs 2]`` of a loss at these log-probabilities."""
    logp, reference, lengths = (jnp.asarray(x, jnp.float32) for x in (logp, reference, lengths))
    return np.asarray(_pulls(jnp.int32(list(LOSSES).index(name)), logp, reference, lengths))


@jax.jit
def _pulls(index, logp, reference, lengths):
    return pull_of(index, Scores(logp, lengths), pulling.batch_of(reference))


def _probes(config: Config, start: Start) -> Any:
    return tuple(x[: config.probes] for x in start.batch[:3])


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Arrays of `measure`, with leading axes ``[losses seeds]``.

    ``together [seeds probes 2 probes 2]``, inner products between all probes at the start, and
    ``step [looks]``, the updates done, come in addition.
    """
    subject, problem = load(config)
    compiled = functools.cache(lambda: programs(config, problem))

    @functools.lru_cache(maxsize=1)  # one seed's parameters at a time
    def begin(seed: int) -> Start:
        rows = batches.order(len(problem), config.pairs + config.held_out, seed, 0)
        batch = problem.rows(rows)._replace(reference=np.zeros((len(rows), 2), np.float32))
        params = train(
            config, compiled(), Start(subject.params, batch), seed, name="sft",
            steps=config.supervised, rate=config.supervised_rate,
        )  # fmt: skip
        reference = np.asarray(compiled().scores(params, batch).logp)
        return Start(params, batch._replace(reference=reference))

    def start(seed: int) -> dict[str, Any]:
        return measure_start(config, compiled(), begin(seed))

    def make(seed: int, name: str, before: common.Arrays) -> dict[str, Any]:
        return measure(config, compiled(), begin(seed), before, seed, name)

    starts, parts = [], {}
    bar = tqdm(total=config.seeds * len(config.losses), desc="losses", unit="run")
    for seed in range(config.seeds):
        starts.append(common.kept(folder, f"start_{seed}", functools.partial(start, seed)))
        for name in config.losses:
            job = functools.partial(make, seed, name, starts[-1])
            parts[name, seed] = common.kept(folder, f"{name}_{seed}", job)
            bar.update()
    bar.close()
    arrays = {
        key: np.stack(
            [[parts[name, s][key] for s in range(config.seeds)] for name in config.losses]
        )
        for key in ("logp", "gram", "pull")
    }
    for key in ("together", "lengths"):
        arrays[key] = np.stack([each[key] for each in starts])
    return {**arrays, "step": np.array(look_steps(config))}
