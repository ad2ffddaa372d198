"""Every method from the same start, on trained and on unseen pairs."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from experiments.mitigations import protocol
from experiments.mitigations.protocol import MASK, Config, Contrasted, load
from experiments.protocol import arms
from jaxpref.logprobs import token_kl
from jaxpref.training.pairset import PairSet


def contrasted(begun: arms.Begun) -> PairSet:
    """The pairs of a start with the contrast mask, and the start's log-probabilities of it."""
    masked = Contrasted(begun.pairs.policy, begun.pairs.pairs, begun.pairs.sizes)
    return masked.referring_to(begun.params, begun.parts.preference)


def divergence(pairs: PairSet, start: PyTree, rows: np.ndarray) -> Callable[[PyTree], np.ndarray]:
    """Of parameters, ``[rows]``: KL to the start, mean nats over both responses' tokens."""
    before, _ = pairs.sweep(functools.partial(_states, pairs, start), rows)
    head = pairs.policy.unembedding(start)

    def of(params: PyTree) -> np.ndarray:
        after, mask = pairs.sweep(functools.partial(_states, pairs, params), rows)
        each = np.asarray(_kl(after, pairs.policy.unembedding(params), before, head))
        return np.where(mask, each, 0).sum(axis=(1, 2)) / mask.sum(axis=(1, 2))

    return of


@functools.partial(jax.jit, static_argnums=0)
def _states(pairs: PairSet, params, batch):
    found = pairs.hidden(params, batch)
    return found.hidden, found.is_target


_kl = jax.jit(functools.partial(token_kl, time_chunk=4))


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Arrays ``[seeds ...]``: of each arm what `arms.follow` gives, ``{arm}_change`` and so on.

    And ``{arm}_kl [looks unseen]``, ``lengths`` and ``logp [probes 2]``, the start's.
    """
    subject, pairs = load(config)
    made = protocol.objectives(config), folder, protocol.changes_of(config)
    start, looks = arms.starts(config, subject, pairs, *made), protocol.looks(config)

    def begin(seed):
        begun = start(seed)
        return begun, divergence(pairs, begun.params, begun.parts.unseen)

    def first(start):
        return start[0].look(("lengths", "logp"))

    def arm(name, start):
        begun, kl_of = start
        kl = np.full((len(looks), config.unseen), np.nan, np.float32)

        def also(number, params, state):
            kl[looks.index(number)] = kl_of(params)

        return {"kl": kl} | arms.follow(
            begun, "dpo" if name == MASK else name, looks, also=also,
            shown=contrasted(begun) if name == MASK else None,
        )  # fmt: skip

    names = protocol.names(config)
    return arms.over_seeds(config, folder, begin, ("start", first), names, arm)
