"""DPO and its controls at every dose, each from its own start."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from experiments.dose.protocol import Config, doses, load, looks
from experiments.protocol import arms, inputs
from jaxpref.training.courses import programs
from jaxpref.training.objectives import objective


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Arrays ``[seeds ...]``: of each dose, by its name, what `arms.follow` gives; ``lengths``."""
    subject, pairs = load(config)
    hashes = inputs.hashes(subject, pairs)
    compiled = programs(pairs, {"dpo": objective("dpo"), "sft": objective("sft")})

    @functools.lru_cache(maxsize=1)
    def begun(seed, start):
        params = subject.params
        if config.model == "small":
            params = inputs.subject(config, seed=seed).params
        own = dataclasses.replace(config, supervised_epochs=start)
        room = folder / f"supervised_{start}" if folder else None
        if room:
            room.mkdir(exist_ok=True)
        identity = arms.identity_of(own, hashes)
        return arms.begin(own, compiled, pairs, params, seed, room, identity)

    def first(begin):
        return begin(config.starts[0]).look()

    def course(dose, begin):
        begun, own = begin(dose.start), dataclasses.replace(config, rate=dose.rate)
        return arms.follow(begun._replace(config=own), dose.arm, looks(config))

    begin = functools.partial(functools.partial, begun)
    return arms.over_seeds(config, folder, begin, ("probes", first), doses(config), course)
