"""DPO and its controls on each set, and the gradients of unseen pairs along the way."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from experiments.protocol import arms, inputs
from experiments.protocol.arms import ARMS
from experiments.suffix_entanglement.protocol import Config, load, looks
from jaxpref import logprobs
from jaxpref.training.courses import grams, programs
from jaxpref.training.objectives import objective
from jaxpref.training.pairset import PairSet


@functools.partial(jax.jit, static_argnums=0)
def differing(pairs: PairSet, params, batch) -> jax.Array:
    """Log-probability ``[pairs 2]`` of the first token in which two responses differ, nats.

    A response that has ended there has no such token, and counts 0.
    """
    found = pairs.hidden(params, batch)
    head = pairs.policy.unembedding(params)
    token = logprobs.token_logprobs(found.hidden, head, found.targets)
    ids = jnp.where(found.is_target, found.targets, -1)
    at = jnp.argmax(ids[:, 0] != ids[:, 1], axis=-1)[:, None, None]
    return jnp.take_along_axis(jnp.where(found.is_target, token, 0), at, axis=-1)[..., 0]


def look(config: Config, begun: arms.Begun, params: PyTree, *, gram: bool) -> dict[str, np.ndarray]:
    """``differing [probes 2]``, and ``gram [grams 2 2]`` of the first unseen pairs."""
    pairs, todo = begun.pairs, {"differing": (differing, begun.probes)}
    todo |= {"gram": (grams, begun.parts.unseen[: config.grams])} if gram else {}
    return {name: pairs.sweep(functools.partial(function, pairs, params), rows, batch=4)
            for name, (function, rows) in todo.items()}  # fmt: skip


def course(config: Config, name: str, begun: arms.Begun) -> dict[str, np.ndarray]:
    """One arm: what `arms.follow` gives and `look` sees, NaN from where it diverged."""
    numbers = looks(config)
    shapes = {"differing": (config.trained + config.unseen, 2)}
    shapes |= {"gram": (config.grams, 2, 2)} if name == "dpo" else {}
    found = {k: np.full((len(numbers), *x), np.nan, np.float32) for k, x in shapes.items()}

    def also(number, params, state):
        for key, value in look(config, begun, params, gram=name == "dpo").items():
            found[key][numbers.index(number)] = value

    return found | arms.follow(begun, name, numbers, also=also)


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Arrays ``[seeds ...]``: of each set ``{set}_lengths``, and `look` before any update.

    And of each of its arms ``{set}_{arm}_change`` and the like, as `course` names them.
    """
    losses = {"dpo": objective("dpo"), "sft": objective("sft")}
    arrays = {}
    for text, (subject, pairs) in load(config).items():
        compiled = programs(pairs, losses)

        def begin(seed, pairs=pairs, params=subject.params, compiled=compiled):
            if config.model == "small":
                params = inputs.subject(config, seed=seed).params
            return arms.begin(config, compiled, pairs, params, seed)

        def first(begun, text=text):
            found = {**begun.look(), **look(config, begun, begun.params, gram=True)}
            return {f"{text}_{name}": value for name, value in found.items()}

        def arm(name, begun, text=text):
            return course(config, name.removeprefix(f"{text}_"), begun)

        names = [f"{text}_{name}" for name in ARMS]
        arrays |= arms.over_seeds(config, folder, begin, (text, first), names, arm)
    return arrays
