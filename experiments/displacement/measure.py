"""The forecast, said aloud, and then the training."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import common
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
    compiled = arms.programs(config.optimizer, pairs, losses)
    identity = arms.identity_of(config, common.hashes(subject, pairs))
    seeds = []
    for seed in range(config.seeds):

        @functools.cache
        def begin(seed=seed):
            return arms.begin(config, compiled, pairs, subject.params, seed, folder, identity)

        def first(begin=begin):
            begun = begin()
            unseen, probes = begun.parts.unseen, arms.probes_of(config, begun.parts)
            seen = foresight.foresee(config, compiled, begun, arm_of(config, "dpo"))
            there = jax.tree.map(jnp.add, begun.params, seen.replay)
            forecast = pairs.logps(there, unseen) - begun.pairs.known[unseen]
            return {"unseen": unseen, "lengths": pairs.lengths[probes], "forecast": forecast}

        record = common.kept(folder, f"{seed}_forecast", first)
        tqdm.write(foretold(record, pairs, subject.tokenizer))
        for name in ARMS:

            def arm(name=name, begin=begin):
                return arms.follow(config, compiled, begin(), arm_of(config, name), name=name,
                                   looks=looks(config))  # fmt: skip

            made = common.kept(folder, f"{seed}_{name}", arm)
            record |= {f"{name}_{key}": value for key, value in made.items()}
        seeds.append(record)
    return {name: np.stack([record[name] for record in seeds]) for name in seeds[0]}
