"""Every loss from the same start, on trained and on unseen pairs."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments.entanglement_dynamics import protocol
from experiments.entanglement_dynamics.protocol import Config, load
from experiments.protocol import arms, inputs
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
    identity = arms.identity_of(config, inputs.hashes(subject, pairs))
    losses, looks = objectives(config), protocol.looks(config)
    compiled = arms.programs(config.optimizer, pairs, losses)

    def begin(seed):
        return arms.begin(config, compiled, pairs, subject.params, seed, folder, identity)

    def first(begun):
        probes = arms.probes_of(config, begun.parts)
        pulls = {f"{name}_start": pulls_at_start(losses[name], begun) for name in config.losses}
        return {"lengths": pairs.lengths[probes], "logp": begun.pairs.known[probes]} | pulls

    def arm(name, begun):
        return arms.follow(config, compiled, begun, protocol.arm_of(config, name), name=name,
                           looks=looks[name])  # fmt: skip

    parts = {name: functools.partial(arm, name) for name in protocol.names(config)}
    return arms.over_seeds(config, folder, begin, ("start", first), parts)
