"""What is known of every probe before training, and what training then did to it."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from experiments.forecast import protocol
from experiments.forecast.protocol import Config, load
from experiments.protocol import arms, foresight, kinds
from experiments.protocol.arms import ARMS
from experiments.protocol.settings import Parts
from jaxpref import diagnostics, embeddings
from jaxpref.logprobs import token_logits
from jaxpref.logprobs.chunked import map_time
from jaxpref.training.courses import grams
from jaxpref.training.objectives import Objective, objective
from jaxpref.training.pairset import PairSet


def objectives(config: Config) -> dict[str, Objective]:
    """The two losses of the arms."""
    return {"sft": objective("sft"), "dpo": objective("dpo", beta=config.beta)}


@functools.partial(jax.jit, static_argnums=0)
def states(pairs: PairSet, params, batch) -> dict[str, jax.Array]:
    """Scores of embeddings, ``[pairs]`` each."""
    found, head = pairs.hidden(params, batch), pairs.policy.unembedding(params)
    seen = found.hidden, found.is_target
    gram = embeddings.unembedding_gram(found.hidden, found.targets, found.is_target, head)
    return {
        "alpha_weighted_ches": embeddings.alpha_weighted_ches(gram),
        "ches": embeddings.ches(*seen),
        "ches_length_normalised": embeddings.ches_length_normalised(*seen),
    }


@functools.partial(jax.jit, static_argnums=0)
def shifts(pairs: PairSet, start, params, batch) -> dict[str, jax.Array]:
    """Of each token ``[pairs 2 response]`` what `jaxpref.diagnostics.token_shifts` says."""
    before, after = pairs.hidden(start, batch), pairs.hidden(params, batch)
    heads = pairs.policy.unembedding(start), pairs.policy.unembedding(params)

    def chunk(before, after, targets):
        logits = token_logits(before, heads[0]), token_logits(after, heads[1])
        return diagnostics.token_shifts(*logits, targets)._asdict()

    found = map_time(chunk, 16, (before.hidden, after.hidden, before.targets), time_axis=2)
    return {**found, "is_target": before.is_target}


def forecast(config: Config, begun: arms.Begun) -> dict[str, np.ndarray]:
    """All signals of the probes, by name, ``[probes 2]`` or ``[probes]``, before any update."""
    params, pairs, probes = begun.params, begun.pairs, begun.probes
    seen = foresight.foresee(begun, protocol.epoch_of(config))
    found: dict[str, Any] = {"rows": probes, **begun.look(("logp", "lengths"))}
    for name in ("plain", "metric", "replay"):
        told = foresight.told(pairs, params, getattr(seen, name), probes, moved=name != "plain")
        found |= _named(name, told)
    told = foresight.told(pairs, params, foresight.astray(seen.metric, begun.seed), probes,
                          moved=False)  # fmt: skip
    found |= _named("astray", told)
    scale = seen.scale
    del seen, told
    plain = functools.partial(grams, pairs, params)
    found["gram"] = pairs.sweep(plain, probes, batch=4)
    weighed = functools.partial(grams, pairs, params, metric=scale)
    found["metric_gram"] = pairs.sweep(weighed, begun.parts.unseen, batch=4)
    return found | pairs.sweep(functools.partial(states, pairs, params), probes)


def explained(config: Config, begun: arms.Begun, others: PairSet, tokenizer: Any, params: PyTree,
              state: PyTree) -> dict[str, np.ndarray]:  # fmt: skip
    """What is known of a run after its first epoch: explanations, and no forecasts.

    What its whole movement does to the probes to first and second order, the Gram of trained probes
    in its own optimizer's metric, the shifts of the tokens of unseen responses and of those of
    other kinds, and what it says.
    """
    start, pairs, parts, probes = begun.params, begun.pairs, begun.parts, begun.probes
    path = jax.tree.map(jnp.subtract, params, start)
    found = _named("path", foresight.told(pairs, start, path, probes, moved=False))
    del path
    rates = protocol.epoch_of(config).rates
    square = foresight.squares_of(config.optimizer, state, len(rates))
    scale = foresight.scale_of(config.optimizer, square, rates)
    weighed = functools.partial(grams, pairs, start, metric=scale)
    found["path_gram"] = pairs.sweep(weighed, probes[: config.grams], batch=4)
    del square, scale, weighed
    found |= _tokens(config, pairs, start, params, parts.unseen, "")
    found |= _tokens(config, others, start, params, np.arange(len(others)), "kinds_")
    return found | spoken(config, pairs, params, parts, tokenizer)


def spoken(config: Config, pairs: PairSet, params: PyTree, parts: Parts, tokenizer: Any
           ) -> dict[str, np.ndarray]:  # fmt: skip
    """Answers to some unseen prompts, ``greedy`` and ``sampled [texts time]``, padded by -1."""
    rows, found = parts.unseen[: config.texts], {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        ids = kinds.say(pairs, params, rows, tokenizer, temperature=temperature, seed=0)
        found[name] = np.full((len(rows), kinds.LONGEST), -1, np.int32)
        for row, said in zip(found[name], ids, strict=True):
            row[: len(said)] = said
    return found


def _tokens(config: Config, pairs: PairSet, start: PyTree, params: PyTree, rows: np.ndarray,
            prefix: str) -> dict[str, np.ndarray]:  # fmt: skip
    found = pairs.sweep(functools.partial(shifts, pairs, start, params), rows)
    # As wide in every seed.
    return {f"{prefix}{name}": _widened(x, max(config.limit, kinds.LONGEST))
            for name, x in found.items()}  # fmt: skip


def _widened(x: np.ndarray, room: int) -> np.ndarray:
    x = x[..., :room]
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, room - x.shape[-1])])


def _named(prefix: str, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}_{name}": value for name, value in found.items()}


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Arrays ``[seeds ...]``: of `forecast`, and of each arm what it saw and `explained`."""
    subject, pairs = load(config)
    start, tokenizer = arms.starts(config, subject, pairs, objectives(config), folder), subject[2]

    def begin(seed):
        begun = start(seed)
        others = kinds.probes(pairs, begun.params, begun.parts.unseen, tokenizer, seed)
        return begun, others

    def first(start):
        begun, _ = start
        said = spoken(config, pairs, begun.params, begun.parts, tokenizer)
        return forecast(config, begun) | _named("start", said)

    def arm(name, start):
        begun, others = start
        found = {}

        def also(number, params, state):
            if number == protocol.horizon(config):
                found.update(explained(config, begun, others, tokenizer, params, state))

        return found | arms.follow(begun, name, protocol.looks(config, name), also=also)

    return arms.over_seeds(config, folder, begin, ("forecast", first), ARMS, arm)
