"""DPO and its controls at every dose, each from its own start."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments import common
from experiments.dose.protocol import Config, arm_of, doses, load, looks
from experiments.protocol import arms
from jaxpref.training.objectives import objective


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Arrays ``[seeds ...]``: of each dose, by its name, what `arms.follow` gives; ``lengths``."""
    subject, pairs = load(config)
    hashes = common.hashes(subject, pairs)
    losses = {"dpo": objective("dpo"), "sft": objective("sft")}
    compiled = arms.programs(config.optimizer, pairs, losses)
    seeds = []
    for seed in range(config.seeds):

        @functools.lru_cache(maxsize=1)
        def begin(start, seed=seed):
            params = subject.params
            if config.model == "small":
                params = common.open_model("small", seed=seed, scan=True).params
            own = dataclasses.replace(config, supervised_epochs=start)
            room = folder / f"supervised_{start}" if folder else None
            if room:
                room.mkdir(exist_ok=True)
            return arms.begin(own, compiled, pairs, params, seed, room,
                              arms.identity_of(own, hashes))  # fmt: skip

        def first(begin=begin):
            probes = arms.probes_of(config, begin(config.starts[0]).parts)
            return {"lengths": pairs.lengths[probes]}

        record = common.kept(folder, f"{seed}_probes", first)
        for dose in tqdm(doses(config), f"doses, seed {seed}", unit="dose"):

            def course(dose=dose, begin=begin):
                return arms.follow(config, compiled, begin(dose.start), arm_of(config, dose),
                                   name=str(dose), looks=looks(config))  # fmt: skip

            made = common.kept(folder, f"{seed}_{dose}", course)
            record |= {f"{dose}_{key}": value for key, value in made.items()}
        seeds.append(record)
    return {name: np.stack([record[name] for record in seeds]) for name in seeds[0]}
