"""Training, and what is looked at on the way."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from experiments import common
from experiments.mitigations.methods import MASKS, READ_GRAM, Seen, loss_of, pull_methods
from experiments.mitigations.protocol import Config, Part, looks, parts
from experiments.mitigations.start import Programs, Start, begin, load, programs, rows_of
from jaxpref import diagnostics
from jaxpref.data import batches
from jaxpref.training import mitigations
from jaxpref.training.step import tree_norm


@functools.partial(jax.jit, static_argnames=("config", "method"))
def _pulls(config: Config, method: str, seen: Seen, logits: Array) -> tuple[Array, Array]:
    """Derivatives of the summed losses by token log-probabilities and by mask logits."""

    def total(token_logp, logits):
        return loss_of(config, method, seen._replace(token_logp=token_logp), logits).sum()

    return jax.grad(total, argnums=(0, 1))(seen.token_logp, logits)


@functools.partial(jax.jit, donate_argnums=0)
def _step_of_length(params, gradient, length):
    factor = length / tree_norm(gradient)
    return jax.tree.map(lambda p, g: p - jnp.asarray(factor, g.dtype) * g, params, gradient)


def train(config: Config, part: Part, start: Start, run: Programs) -> dict[str, Any]:
    """One run.

    Returns:
        ``logp``: nats, ``[looks, pairs trained on then held out, 2]``, since the start.
        ``kl``: to the start, mean nats a token of the held-out responses, ``[looks]``.
        ``regime``: of each trained pair at the start, under the method's own pull; -1 where the
        method's pull is not one number a response.
        ``mask``: mean of the learned masks over scored tokens, ``[looks]``.
    """
    rows = rows_of(config, start.problem, part.seed)
    trained, held = rows[: config.pairs], rows[config.pairs :]
    params = jax.tree.map(jnp.copy, start.params)
    state = common.unit_optimizer(part.optimizer).init(params)
    logits = np.zeros(start.token_reference.shape, start.token_reference.dtype)
    found: dict[str, list] = {"logp": [], "kl": [], "mask": []}

    def look_at(index):
        logp = np.asarray(run.tokens(params, start.problem.rows(index))[0])
        change = np.where(start.is_target[index], logp - start.token_reference[index], 0)
        return change.sum(axis=-1)

    def seen_of(index) -> Seen:
        batch = start.problem.rows(index)
        size = len(index)
        grams = np.zeros((size, 2, 2), np.float32)
        if part.method in READ_GRAM:
            grams = run.grams(params, batch[:3])
        columns = (start.token_reference, start.is_target, start.contrast)
        reference, mask, contrast = (jnp.asarray(x[index]) for x in columns)
        return Seen(run.tokens(params, batch)[0], reference, mask, contrast, jnp.asarray(grams))

    def chunks(index):
        return [index[i : i + config.batch] for i in range(0, len(index), config.batch)]

    regimes = _regimes(config, part, start, run, chunks(trained))
    for number in tqdm(range(config.updates + 1), part.method, leave=False):
        if number in looks(config):
            found["logp"].append(np.concatenate([look_at(index) for index in chunks(rows)]))
            each = [
                run.divergence(params, start.params, start.problem.rows(i)) for i in chunks(held)
            ]
            found["kl"].append(np.mean(each))
            gates = mitigations.learned_mask(logits[trained], start.is_target[trained])
            found["mask"].append(float(gates.sum()) / start.is_target[trained].sum())
        if number == config.updates:
            break
        index = trained[batches.order(config.pairs, config.batch, part.seed, number)]
        seen = seen_of(index)
        pull, slope = _pulls(config, part.method, seen, jnp.asarray(logits[index]))
        logits[index] -= config.mask_rate * np.asarray(slope)
        gradient = run.back(params, start.problem.rows(index), pull)
        if part.optimizer == "sgd":
            params = _step_of_length(params, gradient, config.length)
        else:
            params, state = common.apply_update("adam", params, state, gradient, config.adam_rate)
    return {name: np.array(value) for name, value in found.items()} | {"regime": regimes}


def _regimes(config: Config, part: Part, start: Start, run: Programs, chunks) -> np.ndarray:
    if part.method in MASKS:
        return np.full(config.pairs, -1)
    found = []
    loss, change = pull_methods(config)[part.method]

    def pull_of(gram, logp, reference):
        return change(gram, jax.grad(lambda x: loss(x, reference).sum())(logp))

    for index in chunks:
        gram = run.grams(start.params, start.problem.rows(index)[:3])
        columns = start.token_reference[index], start.is_target[index]
        logp = jnp.asarray(np.where(columns[1], columns[0], 0).sum(axis=-1))
        pull = pull_of(gram, logp, logp)
        found.append(np.asarray(diagnostics.regime(gram, pull)))
    return np.concatenate(found)


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Arrays of `train` with a leading axis ``parts``, in the order of `parts`."""
    subject, problem = load(config)
    compiled = programs(problem, subject.policy)
    begun = functools.cache(lambda: begin(config, subject, problem, compiled))
    bar, records = tqdm(parts(config), "runs", unit="run"), []
    for part in bar:
        bar.set_description(f"{part.method}, {part.optimizer}, seed {part.seed}")
        name = "_".join(map(str, part)).replace(" ", "-")
        make = functools.partial(lambda part: train(config, part, begun(), compiled), part)
        records.append(common.kept(folder, name, make))
    return {name: np.stack([record[name] for record in records]) for name in records[0]}
