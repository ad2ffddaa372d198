"""Every loss from the same start, on trained and on unseen pairs."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments.entanglement_dynamics import protocol
from experiments.entanglement_dynamics.protocol import Config, load
from experiments.protocol import arms
from jaxpref.logprobs import Scores
from jaxpref.training.objectives import Objective, batch_of, objective, pull


def objectives(config: Config) -> dict[str, Objective]:
    """The losses of a run by name, those of the controls among them."""
    return {name: objective(name) for name in dict.fromkeys((*config.losses, "dpo", "sft"))}


def pulls_at_start(loss: Objective, begun: arms.Begun) -> np.ndarray:
    """``[pairs 2]`` of the preference part, where the policy is its own reference."""
    rows = begun.parts.preference
    reference = jnp.asarray(begun.pairs.known[rows])
    scores = Scores(reference, jnp.asarray(begun.pairs.lengths[rows], reference.dtype))
    return np.asarray(pull(loss, scores, batch_of(reference)))


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Arrays ``[seeds ...]``: of each arm what `arms.follow` gives, ``{arm}_change`` and so on.

    And ``lengths``, ``logp [probes 2]``, and each loss's pulls at the start, ``{loss}_start``.
    """
    subject, pairs = load(config)
    losses, looks = objectives(config), protocol.looks(config)
    begin = arms.starts(config, subject, pairs, losses, folder)

    def first(begun):
        pulls = {f"{name}_start": pulls_at_start(losses[name], begun) for name in config.losses}
        return begun.look(("lengths", "logp")) | pulls

    def arm(name, begun):
        return arms.follow(begun, name, looks[name])

    names = protocol.names(config)
    return arms.over_seeds(config, folder, begin, ("start", first), names, arm)
