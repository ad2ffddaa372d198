"""The forecast, said aloud, and then the training."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.displacement.protocol import Config, arm_of, load, looks
from experiments.displacement.report import foretold
from experiments.protocol import arms, foresight
from experiments.protocol.arms import ARMS
from jaxpref.training.objectives import objective


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Arrays ``[seeds ...]``: of each arm what `arms.follow` gives; ``forecast [unseen 2]``, nats.

    The forecast is printed before the first update of preference training.
    """
    subject, pairs = load(config)
    losses = {"dpo": objective("dpo"), "sft": objective("sft")}
    begin = arms.starts(config, subject, pairs, losses, folder)

    def first(begun):
        unseen, seen = begun.parts.unseen, foresight.foresee(begun, arm_of(config, "dpo"))
        there = jax.tree.map(jnp.add, begun.params, seen.replay)
        forecast = pairs.logps(there, unseen) - begun.pairs.known[unseen]
        tqdm.write(foretold(unseen, forecast[:, 0], pairs, subject.tokenizer))
        return {**begun.look(), "forecast": forecast}

    def arm(name, begun):
        return arms.follow(begun, arm_of(config, name), name=name, looks=looks(config))

    parts = {name: functools.partial(arm, name) for name in ARMS}
    return arms.over_seeds(config, folder, begin, ("forecast", first), parts)
