"""The forecast, said aloud, and then the training."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.displacement.protocol import Config, load, looks
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
        unseen, arm = begun.parts.unseen, arms.arm_of(config, "dpo", looks(config)[-1])
        seen = foresight.foresee(begun, arm)
        there = jax.tree.map(jnp.add, begun.params, seen.replay)
        forecast = pairs.logps(there, unseen) - begun.pairs.known[unseen]
        tqdm.write(foretold(unseen, forecast[:, 0], pairs, subject.tokenizer))
        return {**begun.look(), "forecast": forecast}

    def arm(name, begun):
        return arms.follow(begun, name, looks(config))

    return arms.over_seeds(config, folder, begin, ("forecast", first), ARMS, arm)
