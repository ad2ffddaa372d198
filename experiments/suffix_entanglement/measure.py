"""DPO and its controls on each set, and the gradients of unseen pairs along the way."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from experiments.protocol import arms, inputs, running
from experiments.protocol.arms import ARMS
from experiments.suffix_entanglement.protocol import Config, load, looks
from jaxpref import gradients, logprobs
from jaxpref.training.objectives import objective
from jaxpref.training.pairset import PairSet


@functools.partial(jax.jit, static_argnums=0)
def grams(pairs: PairSet, params, batch) -> jax.Array:
    """``[pairs 2 2]`` of the gradients of both log-probabilities, by all parameters."""
    return gradients.pair_grams(pairs.logp, params, batch[:3], responses="together").gram


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
    _, pairs, parts, _ = begun
    todo = {"differing": (differing, arms.probes_of(config, parts))}
    todo |= {"gram": (grams, parts.unseen[: config.grams])} if gram else {}
    return {name: pairs.sweep(functools.partial(function, pairs, params), rows, batch=4)
            for name, (function, rows) in todo.items()}  # fmt: skip


def course(
    config: Config, run: arms.Programs, begin: Callable[[], arms.Begun], name: str
) -> dict[str, np.ndarray]:
    """One arm: what `arms.follow` gives and `look` sees, NaN from where it diverged."""
    numbers, begun, (loss, labels) = looks(config), begin(), ARMS[name]
    arm = arms.Arm(loss, numbers[-1], config.rate, labels, config.warmup)
    shapes = {"differing": (config.trained + config.unseen, 2)}
    shapes |= {"gram": (config.grams, 2, 2)} if name == "dpo" else {}
    found = {k: np.full((len(numbers), *x), np.nan, np.float32) for k, x in shapes.items()}

    def also(number, params, state):
        for key, value in look(config, begun, params, gram=name == "dpo").items():
            found[key][numbers.index(number)] = value

    return found | arms.follow(config, run, begun, arm, name=name, looks=numbers, also=also)


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Arrays ``[seeds ...]``: of each set ``{set}_lengths``, and `look` before any update.

    And of each of its arms ``{set}_{arm}_change`` and the like, as `course` names them.
    """
    losses = {"dpo": objective("dpo"), "sft": objective("sft")}
    seeds: list[dict[str, np.ndarray]] = [{} for _ in range(config.seeds)]
    for text, (subject, pairs) in load(config).items():
        compiled = arms.programs(config.optimizer, pairs, losses)
        for seed, record in enumerate(tqdm(seeds, text, unit="seed")):

            @functools.cache
            def begin(seed=seed, pairs=pairs, params=subject.params, compiled=compiled):
                if config.model == "small":
                    params = inputs.open_model("small", seed=seed, scan=True).params
                return arms.begin(config, compiled, pairs, params, seed, None, "")

            def start(begin=begin):
                begun = begin()
                lengths = begun.pairs.lengths[arms.probes_of(config, begun.parts)]
                return {"lengths": lengths, **look(config, begun, begun.params, gram=True)}

            todo = {f"{text}_{n}": functools.partial(course, config, compiled, begin, n)
                    for n in ARMS}  # fmt: skip
            for name, make in {text: start, **todo}.items():
                made = running.kept(folder, f"{seed}_{name}", make)
                record |= {f"{name}_{key}": value for key, value in made.items()}
    return {name: np.stack([record[name] for record in seeds]) for name in seeds[0]}
