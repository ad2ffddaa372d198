"""Scores of every pool by the model that starts, and a training on every subset."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.ches_percentiles import protocol
from experiments.ches_percentiles.protocol import Config, load, looks, names
from experiments.protocol import arms, running
from jaxpref.score import score_pairs
from jaxpref.training.objectives import objective

Record = dict[str, np.ndarray]


def scored(config: Config, begun: arms.Begun) -> Record:
    """A seed's pool, and the subsets that scores of the start choose.

    Returns:
        ``pool [pairs]``, rows of the data; ``scores [scores pairs]``; ``places [scores percentiles
        subset]`` in the pool; and of the probes of each subset, trained ones first,
        ``rows [scores percentiles probes]``, ``lengths`` and ``logp [... 2]`` at the start.
    """
    pool, pairs = begun.parts.preference, begun.pairs
    found: dict[str, Any] = {"random": np.random.default_rng([begun.seed, 18]).random(len(pool))}
    if columns := [name for name in config.scores if name != "random"]:
        texts = [pairs.pairs[row] for row in pool]
        found |= score_pairs(pairs.policy, begun.params, texts, columns=columns)
    scores = np.stack([found[name] for name in config.scores]).astype(float)
    places = np.array([[protocol.quantile_slice(each, at, config.subset)
                        for at in config.percentiles] for each in scores])  # fmt: skip
    rows = np.array([[begun.on(pool[subset]).probes for subset in each] for each in places])
    return {"pool": pool, "scores": scores, "places": places, "rows": rows,
            "lengths": pairs.lengths[rows], "logp": pairs.known[rows]}  # fmt: skip


def trainings(config: Config, begin: Callable[[], arms.Begun], drawn: Record, seed: int,
              folder: Path | None) -> Record:  # fmt: skip
    """Of each arm what `arms.follow` gives, ``[scores percentiles ...]``.

    A subset that several scores chose is trained once.
    """
    shape, found = drawn["places"].shape, {}
    subsets, which = np.unique(drawn["places"].reshape(-1, shape[-1]), axis=0, return_inverse=True)
    for name in names(config):
        made = []
        for number, places in enumerate(tqdm(subsets, f"{name}, seed {seed}", unit="subset")):

            def arm(name=name, rows=drawn["pool"][places]):
                return arms.follow(begin().on(rows), name, looks(config))

            made.append(running.kept(folder, f"{seed}_{number}_{name}", arm))
        for what in made[0]:
            each = np.stack([one[what] for one in made])
            found[f"{name}_{what}"] = each[which.reshape(shape[:2])]
    return found


def run(config: Config, folder: Path | None = None) -> Record:
    """Arrays ``[seeds ...]``: what `scored` and `trainings` return."""
    subject, pairs = load(config)
    losses = {name: objective(name) for name in dict.fromkeys((*config.losses, "dpo", "sft"))}
    start, seeds = arms.starts(config, subject, pairs, losses, folder), []
    for seed in range(config.seeds):
        begin = functools.cache(functools.partial(start, seed))
        drawn = running.kept(folder, f"{seed}_scores", lambda begin=begin: scored(config, begin()))
        seeds.append(drawn | trainings(config, begin, drawn, seed, folder))
    return {name: np.stack([record[name] for record in seeds]) for name in seeds[0]}
